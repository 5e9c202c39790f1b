#include "attention_call.h"

#if defined(__x86_64__)
#include "arch_avx512bf16.h"
#include "attention.h"

const seqkern::AttentionTable* seqkern::attention_avx512bf16_table() {
    static const AttentionTable table = isa_avx512bf16::over(*attention_avx512_table());
    return &table;
}
#else
const seqkern::AttentionTable* seqkern::attention_avx512bf16_table() { return nullptr; }
#endif
