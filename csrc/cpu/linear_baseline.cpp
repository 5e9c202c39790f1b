#include "arch_baseline.h"
#include "linear.h"
#include "linear_call.h"

const seqkern::LinearTable* seqkern::linear_baseline_table() { return &isa_baseline::linear_table; }
