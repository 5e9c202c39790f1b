// Compiles what follows in a source file for AVX-512, in a namespace of its own.
// The system's headers come first: their inline functions belong to every machine.
#include <sched.h>
#include <time.h>

#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define SEQKERN_ISA isa_avx512
#define SEQKERN_ISA_NAME "avx512"
#define SEQKERN_VECTOR_BYTES 64
#define SEQKERN_ACCUMULATORS 28
