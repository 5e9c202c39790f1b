// Which queries are computed together, which keys they see, and blocks of operands as the matmuls read them.
#pragma once

#include "attention_call.h"
#include "gemm.h"
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

template <class A>
struct Rows {
    const A* p;
    long ld;
};

// Rows that a matmul can read where they lie. Rows a large power of two apart would share a few cache sets:
// of tiles with few registers, which read a row more often, fewer apart than of others.
template <class A, class S>
SK_INLINE bool lies_well(long ld) {
    constexpr long apart = SEQKERN_ACCUMULATORS < 16 ? 1024 : 4096;
    return __is_same(A, S) && ld * static_cast<long>(sizeof(A)) % apart != 0;
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
template <class A, class S>
SK_INLINE Rows<A> block(const Operand& x, const Sequence& s, long h, Span rows, long size, A* buffer,
                        bool once = false, Reads reads = Reads::vectors) {
    const S* from = row_of<S>(x, s, h, rows.begin);
    const long most = reads == Reads::vectors ? padded<A>(size) : size;
    // What lies behind a row may be read up to the end of the last one.
    const bool there = most == size || most - size <= (s.from_k + s.S - rows.end) * x.i;
    if (there && lies_well<A, S>(once ? 1 : x.i)) return {reinterpret_cast<const A*>(from), x.i};
    const long ld = buffer_ld<A>(size);
    for (long r = 0; r < rows.end - rows.begin; ++r)
        copy_scaled<A, S>(buffer + r * ld, from + r * x.i, size, 1);
    return {buffer, ld};
}

// Rows of x that a product before theirs asks for.
template <class S>
SK_INLINE Ahead rows_ahead(const Operand& x, const Sequence& s, long h, long first, long end, long size) {
    const long row_bytes = x.i * static_cast<long>(sizeof(S));
    return {reinterpret_cast<const char*>(row_of<S>(x, s, h, s.from_k + first)), row_bytes,
            min_of(KEYS, end - first), max_of(1, ceil_div(size * static_cast<long>(sizeof(S)), 64))};
}

// The rows of a panel of x, times a factor, row-major: [count][buffer_ld].
template <class A, class S>
SK_INLINE void panel_rows(A* to, const Operand& x, const Sequence& s, const Panel<A>& panel, long size,
                          A factor) {
    const long ld = buffer_ld<A>(size);
    for (long lane = 0; lane < panel.count; ++lane)
        copy_scaled<A, S>(to + lane * ld, row_of<S>(x, s, panel.h[lane], s.from_q + panel.i[lane]), size,
                          factor);
}

// The same as a panel of the matmul: [size][W], zeros in lanes without a query.
template <class A>
SK_INLINE void panel_columns(A* to, const A* rows, long count, long size) {
    constexpr long n = Simd<A>::n, W = 2 * n;
    for (long half = 0; half < 2; ++half)
        pack_transposed<A>(to + half * n, W, rows + half * n * buffer_ld<A>(size), buffer_ld<A>(size),
                           count - half * n, size);
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
