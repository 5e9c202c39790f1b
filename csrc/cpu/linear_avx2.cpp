#include "linear_call.h"

#if defined(__x86_64__)
#include "arch_avx2.h"
#include "linear.h"

const seqkern::LinearTable* seqkern::linear_avx2_table() { return &isa_avx2::linear_table; }
#else
const seqkern::LinearTable* seqkern::linear_avx2_table() { return nullptr; }
#endif
