#include "arch_baseline.h"
#include "scan.h"
#include "scan_call.h"

const seqkern::KernelTable* seqkern::isa_baseline_table() { return &isa_baseline::table; }
