#include "attention_call.h"

#if defined(__x86_64__)
#include "arch_avx2.h"
#include "attention.h"

const seqkern::AttentionTable* seqkern::attention_avx2_table() { return &isa_avx2::attention_table; }
#else
const seqkern::AttentionTable* seqkern::attention_avx2_table() { return nullptr; }
#endif
