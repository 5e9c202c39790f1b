#include "arch_baseline.h"
#include "attention.h"
#include "attention_call.h"

const seqkern::AttentionTable* seqkern::attention_baseline_table() { return &isa_baseline::attention_table; }
