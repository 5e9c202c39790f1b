#include "scan_call.h"

#if defined(__x86_64__)
#include "arch_avx512.h"
#include "scan.h"

const seqkern::KernelTable* seqkern::isa_avx512_table() { return &isa_avx512::table; }
#else
const seqkern::KernelTable* seqkern::isa_avx512_table() { return nullptr; }
#endif
