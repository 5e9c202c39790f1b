#include "scan_call.h"

#if defined(__x86_64__)
#include "arch_avx512bf16.h"
#include "scan.h"

const seqkern::KernelTable* seqkern::isa_avx512bf16_table() {
    static const KernelTable table = isa_avx512bf16::over(*isa_avx512_table());
    return &table;
}
#else
const seqkern::KernelTable* seqkern::isa_avx512bf16_table() { return nullptr; }
#endif
