// What the forward and backward scans share: workspace layout, packing of the weights, math policy, cells as
// table.
#pragma once

#include "../cells.h"
#include "gemm_bf16.h"
#include "parallel.h"
#include "vmath.h"

namespace seqkern {
namespace SEQKERN_ISA {

template <class A>
struct Math {
    template <int N>
    static SK_INLINE Several<A, N> sigmoid(const Several<A, N>& x) {
        return SEQKERN_ISA::sigmoid<A, N>(x);
    }
    template <int N>
    static SK_INLINE Several<A, N> tanh(const Several<A, N>& x) {
        return SEQKERN_ISA::tanh<A, N>(x);
    }
    template <int N>
    static SK_INLINE Several<A, N> relu(const Several<A, N>& x) {
        Several<A, N> found;
        SK_UNROLL
        for (int i = 0; i < N; ++i) found.v[i] = x.v[i] < 0 ? Vec<A>{} : x.v[i];
        return found;
    }
    static SK_INLINE Vec<A> tanh(Vec<A> x) { return SEQKERN_ISA::tanh<A>(x); }
};

// Hidden units are shared out in blocks of two vectors; a panel of the cell's matmul holds U vectors of each
// gate.
template <class CellT, class A>
struct Shape {
    static constexpr int n = Simd<A>::n, G = CellT::G;
    static constexpr int U = G == 1 ? 2 : 1, NV = G * U, W = NV * n;
    // Of a panel, packed apart: four vectors and a few rows of sums would not fit sixteen registers.
    static constexpr int PART = SEQKERN_ACCUMULATORS < 16 && NV == 4 ? 2 : NV, PARTS = NV / PART;
    static constexpr int BLOCK = 2 * n, PANELS = 2 / U;  // panels in a block
    static constexpr int RESERVE = CellT::R;
    long I, H, P, blocks_h, blocks_p, blocks_i, ld_h, ld_p, ld_i;

    explicit Shape(const Layer& c) : I(c.I), H(c.H), P(c.P) {
        blocks_h = ceil_div(H, BLOCK), blocks_p = ceil_div(P, BLOCK), blocks_i = ceil_div(I, BLOCK);
        ld_h = padded(blocks_h), ld_p = padded(blocks_p), ld_i = padded(blocks_i);
    }
    // A row more than a whole number of blocks: rows a power of two apart would share a few cache sets.
    static long padded(long blocks) { return blocks * BLOCK + n; }
};

// Row bookkeeping of step t.
SK_INLINE long active(const Layer& c, long t) { return c.row_start[t + 1] - c.row_start[t]; }
SK_INLINE long active_in(const Layer& c, long t, const Group& g) {
    return max_of(0, min_of(g.rows_end, active(c, t)) - g.rows_begin);
}

// Element address of input row (t, b).
template <class S>
SK_INLINE const S* input_row(const Layer& c, long t, long b) {
    return static_cast<const S*>(c.input) + (c.packed ? c.row_start[t] * c.input_b : t * c.input_t) +
           b * c.input_b;
}

// W (G H x K) into forward panels [H / (U n)][PARTS][K][PART][n], the vectors of a panel in the order [G][U].
template <class CellT, class E, class S, class A>
void pack_gates(E* to, const S* w, long K, const Shape<CellT, A>& s, long panel) {
    using Sh = Shape<CellT, A>;
    constexpr int n = Sh::n, U = Sh::U, PART = Sh::PART;
    for (int v = 0; v < Sh::NV; ++v) {
        const long unit = (panel * U + v % U) * n;
        E* part = to + v / PART * whole_steps<E>(K) * PART * n;
        pack_transposed<E>(part + v % PART * Factor<E>::width, PART * n, w + (v / U * s.H + unit) * K, K,
                           s.H - unit, K);
    }
}

// o[panel][row][W] (+)= a[row][K] times the packed gates of panel `first` and those behind it.
template <class CellT, class E, class A>
void gates_times(long rows, const E* a, long lda, const E* packed, long first, long panels, long K, A* o,
                 long o_stride, bool accumulate, long next = -1) {
    using Sh = Shape<CellT, A>;
    constexpr int width = Sh::PART * Sh::n;
    const long stride = whole_steps<E>(K) * Sh::W;
    for (int part = 0; part < Sh::PARTS; ++part) {
        const Panels<E> b{packed + first * stride + part * whole_steps<E>(K) * width,
                          width * Factor<E>::depth, stride};
        gemm<E, Sh::PART>(rows, a, lda, b, panels, K, o + part * width, Sh::W, o_stride, accumulate,
                          next < 0 ? nullptr : b.at(next - first));
    }
}

// Whether a layer's steps multiply one row whatever the split. Those whose weights are packed take row_times.
SK_INLINE bool steps_of_one_row(const Layer& c) { return SEQKERN_VECTOR_BYTES == 64 && c.B == 1; }

// Panel `first` and those behind it, of W columns each, in a factor packed for K steps.
template <class E>
SK_INLINE Panels<E> packed_panels(const E* packed, long K, int W, long first) {
    const long stride = whole_steps<E>(K) * W;
    return {packed + first * stride, W * Factor<E>::depth, stride};
}

// What gates_times does, for the one row of a step (see steps_of_one_row).
template <class CellT, class E, class A>
void gates_of_row(const E* a, const E* packed, long first, long panels, long K, A* o, long o_stride,
                  bool accumulate) {
    using Sh = Shape<CellT, A>;
    row_times<E, Sh::NV>(a, packed_panels(packed, K, Sh::W, first), panels, K, o, o_stride, accumulate);
}

// o[row][W] = x[row][I] times one panel of w_ih + h[row][P] times that of w_hh, both packed gates.
template <class CellT, class E, class A>
void gates_of_both(long rows, const E* x, long ldx, const E* w_ih, long I, const E* h, long ldh,
                   const E* w_hh, long P, long panel, A* o) {
    using Sh = Shape<CellT, A>;
    constexpr int width = Sh::PART * Sh::n;
    for (int part = 0; part < Sh::PARTS; ++part) {
        const E *wx = w_ih + panel * I * Sh::W + part * I * width,
                *wh = w_hh + panel * P * Sh::W + part * P * width;
        gemm_led<E, Sh::PART>(rows, {x, ldx, wx, I}, h, ldh, wh, width, P, o + part * width, Sh::W);
    }
}

// W (R x K) into forward panels [R / 2n][K][2n].
template <class E, class S>
void pack_plain(E* to, const S* w, long R, long K, long panel) {
    constexpr int n = Simd<Sum<E>>::n;
    for (int u = 0; u < 2; ++u) {
        long row = (panel * 2 + u) * n;
        pack_transposed<E>(to + panel * whole_steps<E>(K) * 2 * n + u * Factor<E>::width, 2 * n, w + row * K,
                           K, R - row, K);
    }
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
