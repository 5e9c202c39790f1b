// The recurrent kernels of one ISA, and their table with the probes. Included last in scan_*.cpp, under the
// target pragma and the SEQKERN_ macros. With SEQKERN_BF16_DOT only what it changes is compiled, the rest is
// avx512's.
#include "probes.h"
#include "scan_backward.h"
#include "scan_forward.h"

namespace seqkern {
namespace SEQKERN_ISA {

#ifdef SEQKERN_BF16_DOT
SK_TILES(bfloat)
#define SK_FOR_DTYPE(dtype, CellT, CALL) CALL(CellT, float, bfloat)
#define SK_UNLESS_BF16(call, c, ...) \
    if (c.dtype != Dtype::bf16) return isa_avx512_table()->call(c __VA_OPT__(, ) __VA_ARGS__)
#else
SK_TILES(float)
SK_TILES(double)
#define SK_UNLESS_BF16(...)
#define SK_FOR_DTYPE(dtype, CellT, CALL) \
    switch (dtype) {                     \
        case Dtype::f32:                 \
            CALL(CellT, float, float)    \
        case Dtype::f64:                 \
            CALL(CellT, double, double)  \
        case Dtype::bf16:                \
            CALL(CellT, float, bfloat)   \
        case Dtype::f16:                 \
            CALL(CellT, float, half)     \
    }
#endif
#define SK_FOR_CELL(cell, dtype, CALL)                \
    switch (cell) {                                   \
        case Cell::lstm:                              \
            SK_FOR_DTYPE(dtype, Lstm, CALL) break;    \
        case Cell::gru:                               \
            SK_FOR_DTYPE(dtype, Gru, CALL) break;     \
        case Cell::rnn_tanh:                          \
            SK_FOR_DTYPE(dtype, RnnTanh, CALL) break; \
        case Cell::rnn_relu:                          \
            SK_FOR_DTYPE(dtype, RnnRelu, CALL) break; \
    }

static unsigned long forward_shared_bytes(const ForwardCall& c) {
    SK_UNLESS_BF16(forward_shared_bytes, c);
#define SK_CALL(C, A, S) return forward_bytes<C, A, S>(c);
    SK_FOR_CELL(c.cell, c.dtype, SK_CALL)
#undef SK_CALL
    return 0;
}

static void forward(const ForwardCall& c, char* shared, const Team& team) {
    SK_UNLESS_BF16(forward, c, shared, team);
#define SK_CALL(C, A, S) return forward_run<C, A, S>(c, shared, team);
    SK_FOR_CELL(c.cell, c.dtype, SK_CALL)
#undef SK_CALL
}

static unsigned long backward_shared_bytes(const BackwardCall& c) {
    SK_UNLESS_BF16(backward_shared_bytes, c);
#define SK_CALL(C, A, S) return backward_bytes<C, A, S>(c);
    SK_FOR_CELL(c.cell, c.dtype, SK_CALL)
#undef SK_CALL
    return 0;
}

static void backward(const BackwardCall& c, char* shared, const Team& team) {
    SK_UNLESS_BF16(backward, c, shared, team);
#define SK_CALL(C, A, S) return backward_run<C, A, S>(c, shared, team);
    SK_FOR_CELL(c.cell, c.dtype, SK_CALL)
#undef SK_CALL
}

#ifndef SEQKERN_BF16_DOT
static const KernelTable table = {
    SEQKERN_ISA_NAME, forward_shared_bytes, forward,   backward_shared_bytes,       backward,   probe_vmath,
    probe_gemm,       probe_gemm_bf16,      probe_fma, 2 * CHAINS * Simd<float>::n, probe_read,
};
#else
static KernelTable over(KernelTable table) {
    table.name = SEQKERN_ISA_NAME;
    table.forward_shared_bytes = forward_shared_bytes, table.forward = forward;
    table.backward_shared_bytes = backward_shared_bytes, table.backward = backward;
    table.gemm_bf16 = probe_gemm_bf16;
    return table;
}
#endif

}  // namespace SEQKERN_ISA
}  // namespace seqkern
