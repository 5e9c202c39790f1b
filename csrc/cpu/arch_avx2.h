// Compiles what follows in a source file for AVX2, in a namespace of its own.
// The system's headers come first: their inline functions belong to every machine.
#include <sched.h>
#include <time.h>

#pragma GCC target("avx2,fma,f16c")
#define SEQKERN_ISA isa_avx2
#define SEQKERN_ISA_NAME "avx2"
#define SEQKERN_VECTOR_BYTES 32
#define SEQKERN_ACCUMULATORS 12
