#include "linear_call.h"

#if defined(__x86_64__)
#include "arch_avx512.h"
#include "linear.h"

const seqkern::LinearTable* seqkern::linear_avx512_table() { return &isa_avx512::linear_table; }
#else
const seqkern::LinearTable* seqkern::linear_avx512_table() { return nullptr; }
#endif
