#include "kernels.h"

#if defined(__x86_64__)
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#pragma GCC target("avx2,fma,f16c")
#define SEQKERN_ISA isa_avx2
#define SEQKERN_ISA_NAME "avx2"
#define SEQKERN_VECTOR_BYTES 32
#define SEQKERN_ACCUMULATORS 12
#include "isa.h"

const seqkern::KernelTable* seqkern::isa_avx2_table() { return &isa_avx2::table; }
#else
const seqkern::KernelTable* seqkern::isa_avx2_table() { return nullptr; }
#endif
