#include "kernels.h"

#if defined(__x86_64__)
#include "arch_avx512.h"
#include "isa.h"

const seqkern::KernelTable* seqkern::isa_avx512_table() { return &isa_avx512::table; }
#else
const seqkern::KernelTable* seqkern::isa_avx512_table() { return nullptr; }
#endif
