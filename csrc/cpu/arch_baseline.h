// What every machine runs: SSE2 on x86-64, the base vector width elsewhere.
#define SEQKERN_ISA isa_baseline
#define SEQKERN_ISA_NAME "baseline"
#define SEQKERN_VECTOR_BYTES 16
#define SEQKERN_ACCUMULATORS 12
