#include "arch_baseline.h"
#include "isa.h"
#include "kernels.h"

const seqkern::KernelTable* seqkern::isa_baseline_table() { return &isa_baseline::table; }
