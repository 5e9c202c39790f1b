// What the gradients of a layer are made of, the same for every cell: the weights as the backward reads them,
// rows packed as factors of a matmul, and blocks of a weight's gradient.
#pragma once

#include "scan_common.h"

namespace seqkern {
namespace SEQKERN_ISA {

constexpr long ROWS_WORTH_COPYING = 64;  // with fewer, weights are read as they lie
constexpr long SUM_ROWS = 32;            // rows of a bias gradient summed before they join the rest

template <class A, class S>
struct Gradients {
    using E = typename FactorsOf<A, S>::E;
    using F = Factor<E>;
    static constexpr int n = Simd<A>::n, PW = 2 * n;
    static constexpr bool NATIVE = __is_same(A, S);  // no result is rounded at the end
    static constexpr bool PAIRS = F::depth == 2;

    // A matrix of weights [K][columns]: its first panels as they lie, the others packed.
    struct Weights {
        long lying;
        Panels<E> as_it_lies, packed;
    };

    static bool are_packed(long N) { return !NATIVE || N >= ROWS_WORTH_COPYING; }

    // For products with N rows in all.
    static Weights weights_of(Arena& arena, const void* w, long rows, long columns, long N) {
        const long panels = ceil_div(columns, PW);
        const long lying = are_packed(N) ? 0 : columns / PW;
        E* packed = arena.take<E>((panels - lying) * whole_steps<E>(rows) * PW);
        return {lying,
                {static_cast<const E*>(NATIVE ? w : nullptr), columns, PW},
                packed_panels(packed, rows, PW, 0)};
    }
    static E* packed_from(const Weights& w) { return const_cast<E*>(w.packed.first); }

    // o[panel][row][PW] (+)= a[row][k] times panels [first, first + panels) of w, rows [w_row, w_row +
    // depth).
    SK_APART static void multiply(long rows, const E* a, long lda, const Weights& w, long first, long panels,
                                  long w_row, long depth, A* o, long ldo, long o_stride, bool accumulate) {
        const long lying = max_of(0, min_of(panels, w.lying - first));
        if (lying)
            gemm<E, 2>(rows, a, lda, w.as_it_lies.from(first, w_row), lying, depth, o, ldo, o_stride,
                       accumulate);
        if (panels > lying)
            gemm<E, 2>(rows, a, lda, w.packed.from(first + lying - w.lying, w_row), panels - lying, depth,
                       o + lying * o_stride, ldo, o_stride, accumulate);
    }

    // o[panel][PW] (+)= a[k] times panels [first, first + panels) of w, all packed.
    static void multiply_row(const E* a, const Weights& w, long first, long panels, long depth, A* o,
                             long o_stride, bool accumulate) {
        row_times<E, 2>(a, w.packed.from(first), panels, depth, o, o_stride, accumulate);
    }

    // Where a result is summed: in its place, or apart to be rounded at the end.
    static A* result(Arena& arena, void* out, long count) {
        if (!out) return nullptr;
        return NATIVE ? static_cast<A*>(out) : arena.take<A>(count);
    }

    static void start_state(A* to, const void* grad, long at, long width) {
        if (grad) {
            copy_row<A>(to, static_cast<const S*>(grad) + at, width);
        } else {
            for (long j = 0; j < width; ++j) to[j] = 0;
        }
    }

    SK_APART static void pack_weights(const Weights& to, long step, long depth, const void* w, long columns) {
        const long done = to.lying * PW, row = step * F::depth;
        const S* from = static_cast<const S*>(w) + row * columns + done;
        pack_panels(packed_from(to), row, depth, from, row + 1 < depth ? from + columns : nullptr,
                    columns - done);
    }

    // Row k of a matrix with `depth` rows into its panels; the one behind it too where two make a step.
    template <class From>
    SK_APART static void pack_panels(E* to, long k, long depth, const From* row, const From* behind,
                                     long width) {
        for (long p = 0; p * PW < width; ++p) {
            E* at = to + (p * whole_steps<E>(depth) + k) * PW;
            if constexpr (PAIRS) {
                pack_pair(at, PW, row + p * PW, behind ? behind + p * PW : nullptr, width - p * PW);
            } else {
                pack_row(at, PW, row + p * PW, width - p * PW);
            }
        }
    }

    // to[row][width] = from[row][0..width), and the sums over the rows. Whole vectors: what is read and
    // written past a row's width belongs to the padding or is written next.
    SK_APART static void pack_block(E* to, const E* from, long ld, long width, long rows, A* sums) {
        constexpr int VECTORS = (max_rows<2>() + n - 1) / n;
        Vec<A> total[VECTORS] = {};
        for (long first = 0; first < rows; first += SUM_ROWS) {
            Vec<A> part[VECTORS] = {};
            for (long k = first; k < min_of(rows, first + SUM_ROWS); k += F::depth) {
                SK_UNROLL
                for (int v = 0; v < VECTORS; ++v) {
                    const E* row = from + k * ld + v * n;
                    if constexpr (PAIRS) {
                        auto pairs = bfloat_bits(row, n);
                        if (k + 1 < rows) pairs |= bfloat_bits(row + ld, n) << 16;
                        F::store(to + k * width + v * F::width, pairs);
                        part[v] += F::lower(pairs) + F::upper(pairs);
                    } else {
                        Vec<A> x = load<A>(row);
                        store<A>(to + k * width + v * n, x);
                        part[v] += x;
                    }
                }
            }
            for (int v = 0; v < VECTORS; ++v) total[v] += part[v];
        }
        for (int v = 0; v < VECTORS; ++v) store<A>(sums + v * n, total[v]);
    }

    struct Gradient {
        A* sums;  // null: the result is rounded as it comes
        void* out;
    };
    // Rows [first, first + width) of some panels of a gradient [..][columns] (+)= block^T b. b: packed for
    // `chunk` rows.
    SK_APART static void block_gradient(const E* block, A* tile, long width, long rows, const E* b,
                                        long chunk, Range panels, long columns, Gradient to, long first,
                                        bool add) {
        TileFn<E> run = tile_for<E, 2, true>(width, 1);
        for (long p = panels.begin; p < panels.end; ++p) {
            const Panels<E> panel = packed_panels(b, chunk, PW, p);
            for (long m = 0; to.sums && m < width; ++m) ask_for(to.sums + (first + m) * columns + p * PW, PW);
            const bool last = p + 1 == panels.end;
            run(block, width * F::depth, panel.first, panel.ld, 0, rows, tile, PW, 0, false, nullptr,
                reinterpret_cast<const char*>(panel.at(last ? 0 : 1)), last ? 0 : 64);
            for (long m = 0; m < width; ++m) {
                const long at = (first + m) * columns + p * PW;
                if (to.sums) {
                    emit(to.sums + at, tile + m * PW, columns - p * PW, add);
                } else {
                    emit(static_cast<S*>(to.out) + at, tile + m * PW, columns - p * PW, false);
                }
            }
        }
    }

    // At most one panel's width of a result.
    template <class To>
    static void emit(To* to, const A* from, long columns, bool add) {
        for (long j = 0; j < min_of(PW, columns); j += n) {
            Vec<A> v = load<A>(from + j);
            if (add) v += load_n<A>(to + j, columns - j);
            store_n<A>(to + j, v, columns - j);
        }
    }

    static void bias_gradient(A* to, long first, const A* sums, long width, bool add) {
        if (!to) return;
        for (long m = 0; m < width; ++m) to[first + m] = add ? to[first + m] + sums[m] : sums[m];
    }

    static void copy_out(S* to, const A* from, long count) {
        for (long j = 0; j < count; j += n) store_n<A>(to + j, load_n<A>(from + j, count - j), count - j);
    }
    SK_APART static void rounded(void* out, const A* from, long count, const Team& team) {
        if (NATIVE || !out || !from) return;
        Range r = share(count, team.thread, team.threads);
        copy_out(static_cast<S*>(out) + r.begin, from + r.begin, r.end - r.begin);
    }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
