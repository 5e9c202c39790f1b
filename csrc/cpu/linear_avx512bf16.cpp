#include "linear_call.h"

#if defined(__x86_64__)
#include "arch_avx512bf16.h"
#include "linear_dense.h"

namespace seqkern {
namespace isa_avx512bf16 {

static void product(const Product& c, char* shared, const Team& team) {
    if (c.dtype == Dtype::bf16) return dense_run<float, bfloat>(c, team);
    linear_avx512_table()->product(c, shared, team);
}

}  // namespace isa_avx512bf16
}  // namespace seqkern

const seqkern::LinearTable* seqkern::linear_avx512bf16_table() {
    static const LinearTable table = {linear_avx512_table()->shared_bytes, linear_avx512_table()->run,
                                      isa_avx512bf16::product, linear_avx512_table()->ending};
    return &table;
}
#else
const seqkern::LinearTable* seqkern::linear_avx512bf16_table() { return nullptr; }
#endif
