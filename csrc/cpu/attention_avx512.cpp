#include "attention_call.h"

#if defined(__x86_64__)
#include "arch_avx512.h"
#include "attention.h"

const seqkern::AttentionTable* seqkern::attention_avx512_table() { return &isa_avx512::attention_table; }
#else
const seqkern::AttentionTable* seqkern::attention_avx512_table() { return nullptr; }
#endif
