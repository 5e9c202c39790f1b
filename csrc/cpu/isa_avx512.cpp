#include "kernels.h"

#if defined(__x86_64__)
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define SEQKERN_ISA isa_avx512
#define SEQKERN_ISA_NAME "avx512"
#define SEQKERN_VECTOR_BYTES 64
#define SEQKERN_ACCUMULATORS 28
#include "isa.h"

const seqkern::KernelTable* seqkern::isa_avx512_table() { return &isa_avx512::table; }
#else
const seqkern::KernelTable* seqkern::isa_avx512_table() { return nullptr; }
#endif
