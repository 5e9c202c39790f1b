// Products of many rows, blocked as the packed matmul wants them: each thread packs the panels of B that it
// computes with, as many as its second-level cache holds beside some rows of A, and nothing is shared among
// threads.
#pragma once

#include "activation.h"
#include "gemm_bf16.h"
#include "parallel.h"

namespace seqkern {
namespace SEQKERN_ISA {

constexpr unsigned long DENSE_PANEL_BYTES = 512u << 10;  // of B, packed at once
constexpr long DENSE_CHUNK = 2048;                       // rows between two packings of the same panel
constexpr long DENSE_STEPS = 512;                        // along the depth, between two visits of a sum
constexpr long DENSE_UNITS = 4;                          // pieces of work for each thread, at least

template <class A, class S>
struct DenseProduct {
    using E = typename FactorsOf<A, S>::E;
    using F = Factor<E>;
    static constexpr int n = Simd<A>::n, W = 2 * n;
    static constexpr long BLOCK = 4 * max_rows<2>();                      // rows of A, a few tiles
    static constexpr long BLOCK_LD = (BLOCK + n - 1) / n * n * F::depth;  // of a block that lies by depth
    static constexpr bool NATIVE = __is_same(E, S);

    const Product& c;
    long panels, chunks, chunk, depth_block, together, lda;
    bool as_it_lies;  // A
    E *packed, *block;
    A* sums;

    DenseProduct(const Product& call, int threads) : c(call) {
        panels = ceil_div(c.columns, W);
        chunks = max_of(ceil_div(c.rows, DENSE_CHUNK), ceil_div(threads * DENSE_UNITS, panels));
        chunks = min_of(chunks, ceil_div(c.rows, BLOCK));
        chunk = ceil_div(c.rows, chunks);
        chunks = ceil_div(c.rows, chunk);
        const long blocks = ceil_div(c.depth, DENSE_STEPS * F::depth);
        depth_block = ceil_div(ceil_div(c.depth, blocks), F::width) * F::width;
        const unsigned long panel_bytes = sizeof(E) * whole_steps<E>(depth_block) * W;
        together = max_of(1, min_of(panels, static_cast<long>(DENSE_PANEL_BYTES / panel_bytes)));
        // Rows some powers of two apart share a few sets of the first-level cache.
        const bool crowded = c.ld_a * sizeof(E) % 1024 == 0 && c.rows > 1;
        as_it_lies = NATIVE && !c.a_by_depth && !crowded && c.depth % F::depth == 0;
        lda = c.a_by_depth ? BLOCK_LD : as_it_lies ? c.ld_a : ceil_div(depth_block, W) * W + n * F::depth;
    }

    bool in_one_block() const { return depth_block >= c.depth; }

    void run(const Team& team) {
        const long rows_kept = in_one_block() ? BLOCK : together * chunk;
        Arena sizes{nullptr};
        lay_out(sizes, rows_kept);
        Scratch scratch(sizes.used);
        if (!scratch.p) {
            __atomic_store_n(team.failed, 1, __ATOMIC_RELAXED);
            return;
        }
        Arena arena{static_cast<char*>(scratch.p)};
        lay_out(arena, rows_kept);
        Range mine = share(chunks * panels, team.thread, team.threads);
        while (mine.begin < mine.end) {
            const long first = mine.begin % panels;
            const long count = min_of(min_of(together, panels - first), mine.end - mine.begin);
            const long row = mine.begin / panels * chunk;
            panels_of(first, count, row, min_of(row + chunk, c.rows));
            mine.begin += count;
        }
    }

    void lay_out(Arena& arena, long rows_kept) {
        packed = arena.take<E>(together * whole_steps<E>(depth_block) * W);
        block = as_it_lies     ? nullptr
                : c.a_by_depth ? arena.take<E>(ceil_div(depth_block, F::depth) * BLOCK_LD)
                               : arena.take<E>(BLOCK * lda);
        sums = arena.take<A>(rows_kept * W);
    }

    void panels_of(long first, long count, long row, long end) {
        for (long k0 = 0; k0 == 0 || k0 < c.depth; k0 += depth_block) {
            const long depth = min_of(depth_block, c.depth - k0);
            const Panels<E> b = pack_b(first, count, k0, depth);
            for (long r = row; r < end; r += BLOCK) {
                const long m = min_of(BLOCK, end - r);
                const E* a = rows_of_a(r, m, k0, depth);
                for (long p = 0; p < count; ++p) {
                    A* o = sums + (in_one_block() ? 0 : (p * chunk + r - row) * W);
                    if (k0 + depth == c.depth) {
                        const S* to = static_cast<const S*>(c.out) + r * c.columns + (first + p) * W;
                        for (long i = 0; i < m; ++i) ask_for(to + i * c.columns, W);
                    }
                    if (c.a_by_depth)
                        gemm<E, 2, true>(m, a, lda, b.from(p), 1, depth, o, W, 0, k0 > 0);
                    else
                        gemm<E, 2>(m, a, lda, b.from(p), 1, depth, o, W, 0, k0 > 0);
                    if (k0 + depth == c.depth) emit(o, r, m, (first + p) * W);
                }
            }
        }
    }

    Panels<E> pack_b(long first, long count, long k0, long depth) {
        const long stride = whole_steps<E>(depth) * W;
        const S* b = static_cast<const S*>(c.b);
        for (long p = 0; p < count; ++p) {
            const long column = (first + p) * W, left = c.columns - column;
            E* to = packed + p * stride;
            if (c.b_by_depth) {
                for (long k = 0; k < depth; k += F::depth) {
                    const S* from = b + (k0 + k) * c.ld_b + column;
                    if constexpr (F::depth == 2) {
                        pack_pair(to + k * W, W, from, k + 1 < depth ? from + c.ld_b : nullptr, left);
                    } else {
                        pack_row(to + k * W, W, from, left);
                    }
                }
            } else {
                for (long j = 0; j < W; j += n)
                    pack_transposed<E>(to + j * F::depth, W, b + (column + j) * c.ld_b + k0, c.ld_b, left - j,
                                       depth);
            }
        }
        return {packed, W * F::depth, stride};
    }

    const E* rows_of_a(long row, long m, long k0, long depth) {
        const S* a = static_cast<const S*>(c.a);
        if (as_it_lies) return reinterpret_cast<const E*>(a + row * c.ld_a + k0);
        if (!c.a_by_depth) {
            for (long r = 0; r < m; ++r) factor_row(block + r * lda, a + (row + r) * c.ld_a + k0, depth);
            return block;
        }
        for (long k = 0; k < depth; k += F::depth) {
            const S* from = a + (k0 + k) * c.ld_a + row;
            E* to = block + k / F::depth * BLOCK_LD;
            if constexpr (F::depth == 2) {
                pack_pair(to, BLOCK_LD / 2, from, k + 1 < depth ? from + c.ld_a : nullptr, m);
            } else {
                pack_row(to, BLOCK_LD, from, m);
            }
        }
        return block;
    }

    void emit(const A* o, long row, long m, long column) {
        for (long j = 0; j < W && column + j < c.columns; j += n) {
            const long left = c.columns - column - j;
            const Vec<A> bias =
                c.bias ? load_n<A>(static_cast<const S*>(c.bias) + column + j, left) : Vec<A>{};
            S* to = static_cast<S*>(c.out) + row * c.columns + column + j;
            for (long r = 0; r < m; ++r) {
                store_n<A>(to + r * c.columns, activated<A>(c.activation, load<A>(o + r * W + j) + bias),
                           left);
            }
        }
    }
};

template <class A, class S>
void dense_run(const Product& c, const Team& team) {
    DenseProduct<A, S>(c, team.threads).run(team);
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
