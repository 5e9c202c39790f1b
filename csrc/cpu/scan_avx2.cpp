#include "scan_call.h"

#if defined(__x86_64__)
#include "arch_avx2.h"
#include "scan.h"

const seqkern::KernelTable* seqkern::isa_avx2_table() { return &isa_avx2::table; }
#else
const seqkern::KernelTable* seqkern::isa_avx2_table() { return nullptr; }
#endif
