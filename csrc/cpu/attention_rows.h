// Which queries are computed together, which keys they see, and blocks of operands as the matmuls read them.
#pragma once

#include "attention_call.h"
#include "gemm_bf16.h"
#include "parallel.h"

namespace seqkern {
namespace SEQKERN_ISA {

constexpr double LOG2E = 1.4426950408889634074, LN2 = 0.69314718055994530942;

// A number that is finite in double stays so.
template <class A>
SK_INLINE A finite(double x) {
    constexpr double most = sizeof(A) == 4 ? __FLT_MAX__ : __DBL_MAX__;
    return static_cast<A>(x > most && x <= __DBL_MAX__ ? most : x < -most && x >= -__DBL_MAX__ ? -most : x);
}

// Keys in a block: their scores for a panel of queries stay in the first-level cache.
constexpr long KEYS = 128;

// One sequence of the batch, and where its rows begin if it is packed. The place of query i is key i + d.
struct Sequence {
    long b, L, S, from_q, from_k, d;
};

SK_INLINE Sequence sequence(const AttentionCall& c, long b) {
    Sequence s{b, c.L, c.S, 0, 0, 0};
    if (c.start_q) {
        s.from_q = c.start_q[b], s.from_k = c.start_k[b];
        s.L = c.start_q[b + 1] - s.from_q, s.S = c.start_k[b + 1] - s.from_k;
    }
    if (c.bottom_right) s.d = s.S - s.L;
    return s;
}

template <class S>
SK_INLINE const S* row_of(const Operand& x, const Sequence& s, long h, long i) {
    return static_cast<const S*>(x.p) + s.b * x.b + h * x.h + i * x.i;
}
template <class S>
SK_INLINE S* row_of(const Result& x, const Sequence& s, long h, long i) {
    return static_cast<S*>(x.p) + s.b * x.b + h * x.h + i * x.i;
}

struct Span {
    long begin, end;
    SK_INLINE bool empty() const { return begin >= end; }
    SK_INLINE bool holds(Span other) const { return begin <= other.begin && other.end <= end; }
};

// Queries of the heads that share keys, one to a lane.
template <class A>
struct Panel {
    static constexpr long W = 2 * Simd<A>::n;
    long count;        // lanes in use; the others repeat lane 0
    long first, last;  // the smallest and the largest query
    long i[W], h[W];   // query and head of each lane
};

// The queries of one sequence and one head of keys in panels: whole ones of one head each, or, where a head
// has few queries, those of all its heads side by side. Panels of neighbouring queries follow one another.
template <class A>
struct HeadGroup {
    static constexpr long W = Panel<A>::W;
    long G, L, head;
    bool by_head;

    HeadGroup(const AttentionCall& c, const Sequence& s, long kv_head)
        : G(c.Hq / c.Hkv), L(s.L), head(kv_head * G), by_head(G == 1 || L >= W) {}

    static long panels_for(long G, long L) {
        return G == 1 || L >= W ? ceil_div(L, W) * G : ceil_div(L * G, W);
    }
    long panels() const { return panels_for(G, L); }
    // The last panel with a query of panel p.
    long last_beside(const Panel<A>& panel, long p) const {
        return by_head ? (p / G + 1) * G - 1 : ((panel.last + 1) * G - 1) / W;
    }

    SK_INLINE Panel<A> panel(long p) const {
        Panel<A> found;
        const long first = by_head ? p / G * W : p * W, rows = by_head ? L : L * G;
        found.count = min_of(W, rows - first);
        for (long lane = 0; lane < W; ++lane) {
            const long r = first + (lane < found.count ? lane : 0);
            found.i[lane] = by_head ? r : r / G;
            found.h[lane] = head + (by_head ? p % G : r % G);
        }
        found.first = found.i[0], found.last = found.i[found.count - 1];
        return found;
    }
};

// The keys that a window shows to some of the queries first..last: from a whole number of vectors on, and of
// the fours that dropout draws for.
template <class A>
SK_INLINE Span seen_by_some(const AttentionCall& c, const Sequence& s, long first, long last) {
    constexpr long step = Simd<A>::n < 4 ? 4 : Simd<A>::n;
    long begin = 0, end = s.S;
    if (c.left >= 0) begin = max_of(0, first + s.d - c.left) / step * step;
    if (c.right >= 0) end = min_of(end, last + s.d + c.right + 1);
    return {begin, max_of(begin, end)};
}

// Those that it shows to all of them.
SK_INLINE Span seen_by_all(const AttentionCall& c, const Sequence& s, long first, long last) {
    long begin = 0, end = s.S;
    if (c.left >= 0) begin = max_of(0, last + s.d - c.left);
    if (c.right >= 0) end = min_of(end, first + s.d + c.right + 1);
    return {begin, max_of(begin, end)};
}

SK_INLINE Span overlap(Span a, Span b) {
    const long begin = max_of(a.begin, b.begin);
    return {begin, max_of(begin, min_of(a.end, b.end))};
}

// Rows of a factor: those that a matmul broadcasts from, or, ld from one step along k to the next, those that
// it reads vectors of.
template <class E>
struct Rows {
    const E* p;
    long ld;
};

// What the products multiply: numbers of A or, where one instruction multiplies them, the bfloats that the
// operands are made of. Weights and the gradients of scores are then rounded to bfloats, as the output is,
// and the factor of the scores comes behind the product.
template <class A, class S>
using FactorOf = typename FactorsOf<A, S>::E;
template <class E>
constexpr bool IN_PAIRS = Factor<E>::depth > 1;

// Rows that a matmul can read where they lie. Rows a large power of two apart would share a few cache sets:
// of tiles with few registers, which read a row more often, fewer apart than of others.
template <class E, class S>
SK_INLINE bool lies_well(long ld) {
    constexpr long apart = SEQKERN_ACCUMULATORS < 16 ? 1024 : 4096;
    return __is_same(E, S) && ld * static_cast<long>(sizeof(E)) % apart != 0;
}

// How much of a row a matmul reads: as many numbers as there are, or whole vectors, of which the rest is kept
// by nobody.
enum class Reads { numbers, vectors };

// to[row][0..size) = factor from[row][0..size), zeros up to a whole vector.
template <class A, class S>
SK_INLINE void copy_scaled(A* to, const S* from, long size, A factor) {
    for (long c = 0; c < size; c += Simd<A>::n) store<A>(to + c, load_n<A>(from + c, size - c) * factor);
}

// Rows of x for a matmul; what is read once only is not copied for the cache's sake.
template <class E, class S>
SK_INLINE Rows<E> block(const Operand& x, const Sequence& s, long h, Span rows, long size, E* buffer,
                        bool once = false, Reads reads = Reads::vectors) {
    using A = Sum<E>;
    const S* from = row_of<S>(x, s, h, rows.begin);
    const long most = reads == Reads::vectors ? padded<A>(size) : whole_steps<E>(size);
    // What lies behind a row may be read up to the end of the last one, unless it is multiplied.
    const bool there = most == size || (!IN_PAIRS<E> && most - size <= (s.from_k + s.S - rows.end) * x.i);
    if (there && lies_well<E, S>(once ? 1 : x.i)) return {reinterpret_cast<const E*>(from), x.i};
    const long ld = buffer_ld<A>(size);
    for (long r = 0; r < rows.end - rows.begin; ++r) {
        if constexpr (IN_PAIRS<E>)
            factor_row(buffer + r * ld, from + r * x.i, size);
        else
            copy_scaled<A, S>(buffer + r * ld, from + r * x.i, size, 1);
    }
    return {buffer, ld};
}

// Rows of `size` numbers, ld apart, that a product before their use asks for.
template <class T>
SK_INLINE Ahead rows_of_lines(const T* first, long ld, long rows, long size) {
    constexpr long bytes = static_cast<long>(sizeof(T));
    return {reinterpret_cast<const char*>(first), ld * bytes, rows, max_of(1, ceil_div(size * bytes, 64))};
}
// Rows of x so.
template <class S>
SK_INLINE Ahead rows_ahead(const Operand& x, const Sequence& s, long h, long first, long end, long size) {
    return rows_of_lines(row_of<S>(x, s, h, s.from_k + first), x.i, min_of(KEYS, end - first), size);
}

// The rows of a panel of x, row-major: [count][buffer_ld]. Numbers of A are multiplied with the factor.
template <class E, class S>
SK_INLINE void panel_rows(E* to, const Operand& x, const Sequence& s, const Panel<Sum<E>>& panel, long size,
                          Sum<E> factor) {
    const long ld = buffer_ld<Sum<E>>(size);
    for (long lane = 0; lane < panel.count; ++lane) {
        const S* row = row_of<S>(x, s, panel.h[lane], s.from_q + panel.i[lane]);
        if constexpr (IN_PAIRS<E>)
            factor_row(to + lane * ld, row, size);
        else
            copy_scaled<E, S>(to + lane * ld, row, size, factor);
    }
}

// The same as a panel of the matmul: [size][W], zeros in lanes without a query.
template <class E>
SK_INLINE void panel_columns(E* to, const E* rows, long count, long size) {
    using A = Sum<E>;
    constexpr long n = Simd<A>::n, W = 2 * n;
    for (long half = 0; half < 2; ++half)
        pack_transposed<E>(to + half * Factor<E>::width, W, rows + half * n * buffer_ld<A>(size),
                           buffer_ld<A>(size), count - half * n, size);
}
template <class E>
SK_INLINE Panels<E> panel_of_columns(const E* columns) {
    return {columns, 2 * Factor<E>::width, 0};
}
// Numbers that it takes.
template <class E>
SK_INLINE long columns_size(long size) {
    return whole_steps<E>(size) * 2 * Simd<Sum<E>>::n;
}

// Rows that a matmul reads vectors of, two rows side by side: [row / 2][right_ld].
template <class E>
SK_INLINE long right_ld(long size) {
    return Factor<E>::depth * buffer_ld<Sum<E>>(size);
}
template <class E>
SK_INLINE Rows<E> from_row(Rows<E> x, long row) {
    return {x.p + row / Factor<E>::depth * x.ld, x.ld};
}
template <class S>
SK_INLINE Rows<bfloat> pair_rows(bfloat* to, const S* from, long ld, long rows, long size) {
    const long ld_to = right_ld<bfloat>(size);
    for (long r = 0; r < rows; r += 2)
        pack_pair(to + r / 2 * ld_to, padded<float>(size), from + r * ld,
                  r + 1 < rows ? from + (r + 1) * ld : nullptr, size);
    return {to, ld_to};
}

// The rows of a panel of x as such rows, zeros for lanes without a query.
template <class E, class S>
SK_INLINE void panel_right(E* to, const Operand& x, const Sequence& s, const Panel<Sum<E>>& panel,
                           long size) {
    constexpr long W = Panel<Sum<E>>::W, step = Factor<E>::depth;
    const long ld = right_ld<E>(size);
    const auto row = [&](long lane) -> const S* {
        return lane < panel.count ? row_of<S>(x, s, panel.h[lane], s.from_q + panel.i[lane]) : nullptr;
    };
    const long there = x.p ? ceil_div(panel.count, step) * step : 0;
    for (long lane = 0; lane < there; lane += step) {
        if constexpr (IN_PAIRS<E>)
            pack_pair(to + lane / step * ld, padded<Sum<E>>(size), row(lane), row(lane + 1), size);
        else
            copy_scaled<E, S>(to + lane * ld, row(lane), size, 1);
    }
    for (long at = there / step * ld; at < W / step * ld; ++at) to[at] = E{};
}

// o[row][0..N) (+)= sum over k of left[k][row] right[k][0..N), of `rows` along k (pairs: left[k /
// 2][row][2]). What stands beside the last of an odd number of rows is not multiplied; `last` has room for a
// row.
template <class E>
SK_INLINE void multiply_along(long M, const E* left, long lda, Rows<E> right, long N, long rows, Sum<E>* o,
                              long ldo, bool accumulate, E* last, const Ahead* ask = nullptr) {
    constexpr long step = Factor<E>::depth;
    const long whole = rows / step * step;
    if (whole || !rows)
        multiply_rows<E, true>(M, left, lda, right.p, right.ld, N, whole, o, ldo, accumulate, ask);
    if constexpr (IN_PAIRS<E>) {
        if (whole == rows) return;
        const E* from = right.p + whole / step * right.ld;
        for (long at = 0; at < N * step; ++at) last[at] = at % step ? E{} : from[at];
        multiply_rows<E, true>(M, left + whole / step * lda, lda, last, right.ld, N, step, o, ldo,
                               accumulate || whole);
    }
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
