// Few queries, as in decoding: keys and values are read once, where they lie, and lanes are keys, so that a
// query costs a vector for as many keys as it has lanes.
#pragma once

#include "attention_scores.h"
#include "gemv.h"

namespace seqkern {
namespace SEQKERN_ISA {

// The running maximum, the sum of exponentials and their mean of the values, of one panel.
template <class A>
struct Running {
    A *m, *l;  // [W]
    A* out;    // [W][buffer_ld(Dv)]
};

// The scores of one query join its softmax and become weights, relative to the new maximum; lanes past the
// last key hold -inf.
template <class A>
SK_INLINE void join_softmax_along_keys(A* scores, long keys, A* m, A* l, A* out, long Nv) {
    constexpr long n = Simd<A>::n;
    const A hidden = -static_cast<A>(__builtin_inf());
    Vec<A> most = Vec<A>{} + hidden, sum{};
    for (long k = 0; k < keys; k += n) {
        const Vec<A> v = load<A>(scores + k);
        most = larger(v, most);
    }
    A top = *m;
    for (long lane = 0; lane < n; ++lane) top = most[lane] > top ? most[lane] : top;
    const A shift = top == hidden ? A{} : top, fade = exp2_below<A>(Vec<A>{} + (*m - shift))[0];
    for (long k = 0; k < keys; k += n) {
        const Vec<A> p = exp2_below<A>(load<A>(scores + k) - shift);
        sum += p;
        store<A>(scores + k, p);
    }
    A total = 0;
    for (long lane = 0; lane < n; ++lane) total += sum[lane];
    *m = top, *l = *l * fade + total;
    if (fade == 1 || !out) return;
    for (long at = 0; at < Nv; at += n) store<A>(out + at, load<A>(out + at) * fade);
}

// Some keys as few_rows reads weights, from T places by turns: `each` to a stream, a whole number of vectors,
// of which the last streams may lack some.
template <int T>
struct KeyStreams {
    long begin, end, each;

    SK_INLINE KeyStreams(Span keys, long n)
        : begin(keys.begin), end(keys.end), each(ceil_div(keys.end - keys.begin, T * n) * n) {}
    SK_INLINE long first(int s, long i) const { return begin + s * each + i; }
    // Of `width` keys from the i-th on, those that there are.
    SK_INLINE long count(int s, long i, long width) const {
        return max_of(0, min_of(width, min_of(begin + (s + 1) * each, end) - first(s, i)));
    }
};

// out[m][0..Nv) += p[m][s width] times a row of each of T streams, for M queries.
template <class A, int M, int T>
SK_INLINE void add_values(const A* const* from, const A* p, long width, long Nv, A* out, long ldo) {
    constexpr long n = Simd<A>::n;
    const A* rows[T];
    Vec<A> weights[M][T];
    SK_UNROLL
    for (int s = 0; s < T; ++s) {
        rows[s] = from[s];  // the compiler would read it anew behind every store
        SK_UNROLL
        for (int m = 0; m < M; ++m) weights[m][s] = Vec<A>{} + p[m * KEYS + s * width];
    }
    for (long c = 0; c < Nv; c += n) {
        Vec<A> sum[M], v[T];
        SK_UNROLL
        for (int s = 0; s < T; ++s) v[s] = load<A>(rows[s] + c);
        SK_UNROLL
        for (int m = 0; m < M; ++m) {
            sum[m] = load<A>(out + m * ldo + c);
            SK_UNROLL
            for (int s = 0; s < T; ++s) sum[m] += v[s] * weights[m][s];
            store<A>(out + m * ldo + c, sum[m]);
        }
    }
}

// Rows of keys or values further on in a stream that are asked for where they come from beyond the caches.
constexpr long ROWS_AHEAD = 4;
template <class S>
SK_INLINE void ask_for_row(const S* row, long size) {
    for (long at = 0; at < size; at += 64 / static_cast<long>(sizeof(S))) __builtin_prefetch(row + at);
}

// out[m][0..Nv) (+)= the weights p[m] of `width` keys from each stream, of which `sizes` count, times their
// values. The sums stay in memory: registers for those of several queries would leave some bytes of a row at
// a time, and of rows that are read piece by piece the processor does not run ahead. far: they come from
// beyond the caches, and are asked for.
template <class A>
void few_values(const Rows<A>* from, const long* sizes, const A* p, long count, long width, long Nv, A* out,
                bool begun, bool far) {
    constexpr long n = Simd<A>::n;
    const long ldo = Nv + n, common = sizes[STREAMS - 1];
    for (long m = 0; m < count && !begun; ++m)
        for (long c = 0; c < Nv; c += n) store<A>(out + m * ldo + c, Vec<A>{});
    for (long k = 0; k < common; ++k) {
        const A* rows[STREAMS];
        SK_UNROLL
        for (int s = 0; s < STREAMS; ++s) rows[s] = from[s].p + k * from[s].ld;
        for (int s = 0; ASKS_AHEAD && far && s < STREAMS; ++s)
            ask_for_row(rows[s] + ROWS_AHEAD * from[s].ld, Nv);
        long m = 0;
        for (; m + 2 <= count; m += 2)
            add_values<A, 2, STREAMS>(rows, p + m * KEYS + k, width, Nv, out + m * ldo, ldo);
        if (m < count) add_values<A, 1, STREAMS>(rows, p + m * KEYS + k, width, Nv, out + m * ldo, ldo);
    }
    for (int s = 0; s < STREAMS; ++s)
        for (long k = common; k < sizes[s]; ++k) {
            const A* row = from[s].p + k * from[s].ld;
            for (long m = 0; m < count; ++m)
                add_values<A, 1, 1>(&row, p + m * KEYS + s * width + k, 0, Nv, out + m * ldo, ldo);
        }
}

// Keys and values in the order of addresses, which some processors read best: values, and what is far, are
// asked for BYTES_IN_ORDER ahead in whole rows, and the sums of two queries stay in registers.
constexpr long BYTES_IN_ORDER = 4096, VECTORS_IN_ORDER = 8, QUERIES_IN_ORDER = 4;
template <class S>
SK_INLINE long rows_in_order(long size) {
    return ceil_div(BYTES_IN_ORDER, size * static_cast<long>(sizeof(S)));
}
// bytes: of all keys and values. The sums of more than two queries take two turns over the values, which only
// pays for itself where those are narrow or come from memory.
template <class A>
SK_INLINE bool can_be_in_order(const AttentionCall& c, long queries, long bytes) {
    constexpr long narrow = VECTORS_IN_ORDER * Simd<A>::n / 2, memory = 32L << 20;
    return SEQKERN_VECTOR_BYTES == 64 && c.D > 0 && c.Dv > 0 && c.Dv <= 2 * narrow &&
           queries <= QUERIES_IN_ORDER && (queries <= 2 || c.Dv <= narrow || bytes > memory);
}

// How many keys of a block: so many that a stream is a long one, but values that several pairs of queries
// read stay in the first-level cache, and those that are copied fit the room for a block.
template <class A>
SK_INLINE long keys_in_order(long queries, long Nv, bool copied) {
    constexpr long most = 1024, values = 32768 / static_cast<long>(sizeof(A));
    static_assert(SEQKERN_VECTOR_BYTES < 64 || 2 * most <= KEYS * Panel<A>::W, "scores fit a tile");
    return queries > 2 ? max_of(Simd<A>::n, min_of(KEYS, values / Nv / Simd<A>::n * Simd<A>::n))
           : copied    ? KEYS
                       : most;
}

// out[m][0..NV vectors) (+)= the weights p[m] of `count` keys times their values, for M queries.
template <class A, int M, int NV>
SK_APART void values_in_order(Rows<A> from, long count, const A* p, long ldp, A* out, long ldo, bool begun) {
    constexpr long n = Simd<A>::n;
    constexpr int APART = M * NV <= 4 ? 4 : M * NV <= 8 ? 2 : 1;  // keys by turns, so that sums need not wait
    const long ahead = rows_in_order<A>(NV * n) * from.ld, whole = count / APART * APART;
    Vec<A> sums[APART][M][NV] = {};
    if (begun) SK_UNROLL
    for (int m = 0; m < M; ++m) SK_UNROLL
    for (int v = 0; v < NV; ++v) sums[0][m][v] = load<A>(out + m * ldo + v * n);
    const A* row = from.p;
    const auto add = [&](Vec<A>(*to)[NV], long k) {
        SK_UNROLL
        for (int v = 0; v < NV; ++v) {
            const Vec<A> value = load<A>(row + v * n);
            __builtin_prefetch(row + ahead + v * n);
            SK_UNROLL
            for (int m = 0; m < M; ++m) to[m][v] += value * p[m * ldp + k];
        }
        row += from.ld;
    };
    for (long k = 0; k < whole; k += APART) SK_UNROLL
    for (int i = 0; i < APART; ++i) add(sums[i], k + i);
    for (long k = whole; k < count; ++k) add(sums[0], k);
    SK_UNROLL
    for (int m = 0; m < M; ++m) SK_UNROLL
    for (int v = 0; v < NV; ++v) {
        SK_UNROLL
        for (int i = 1; i < APART; ++i) sums[0][m][v] += sums[i][m][v];
        store<A>(out + m * ldo + v * n, sums[0][m][v]);
    }
}
template <class A, int NV = VECTORS_IN_ORDER>
SK_INLINE void values_in_order(Rows<A> from, long keys, const A* p, long ldp, long queries, long Nv, A* out,
                               bool begun) {
    constexpr long n = Simd<A>::n;
    const long ldo = Nv + n;
    if constexpr (NV > 1)
        if (Nv < NV * n) return values_in_order<A, NV - 1>(from, keys, p, ldp, queries, Nv, out, begun);
    long m = 0;
    for (; m + 2 <= queries; m += 2)
        values_in_order<A, 2, NV>(from, keys, p + m * ldp, ldp, out + m * ldo, ldo, begun);
    if (m < queries) values_in_order<A, 1, NV>(from, keys, p + m * ldp, ldp, out + m * ldo, ldo, begun);
}

// How many of the queries that are left: where three are the most, two times two rather than three and one,
// which would wait for its sums.
SK_INLINE long queries_together(long left) {
    constexpr long M = ROWS_TOGETHER;
    return left == 2 || (M == 3 && left == 4) ? 2 : left >= M ? M : 1;
}

// What dot_chains does for a row of any size, without a loop: out[m] has lanes that add up to row . q[m], of
// NV vectors.
template <class A, int M, int NV>
SK_INLINE void dots_of_row(const A* row, const A* q, Vec<A> (*out)[1]) {
    constexpr long n = Simd<A>::n, ld = NV * n + n;  // as buffer_ld
    SK_UNROLL
    for (int v = 0; v < NV; ++v) {
        Vec<A> key = load<A>(row + v * n);
#if defined(__x86_64__)
        if constexpr (M > 1) asm("" : "+v"(key));  // else it is read anew for each of its products
#endif
        SK_UNROLL
        for (int m = 0; m < M; ++m) {
            const Vec<A> product = key * load<A>(q + m * ld + v * n);
            out[m][0] = v ? out[m][0] + product : product;
        }
    }
}

// The scores of M queries and a vector of keys of each stream, the `at`-th of `width` and of those from i on:
// to tile[m][s width + at], [m] ldt apart. Keys that there are not get -inf. Rows `ahead` are asked for, if
// not 0.
template <class A, class S, int M, int T>
void few_scores(const Scores<A>& scores, bool changed, const KeyStreams<T>& keys, const S* k, long ld, long D,
                const A* q, long query, long i, long width, long at, A* tile, long ldt, long ahead) {
    constexpr long n = Simd<A>::n;
    Multiplied<A> by[M];
    SK_UNROLL
    for (int m = 0; m < M; ++m) by[m] = Multiplied<A>(q + m * buffer_ld<A>(D), D);
    Vec<A> chains[n][M][T];
    for (long r = 0; r < n; ++r) {
        const S* from[T];
        SK_UNROLL
        for (int s = 0; s < T; ++s) from[s] = k + min_of(keys.first(s, i + at) + r, keys.end - 1) * ld;
        for (int s = 0; ASKS_AHEAD && ahead && s < T; ++s) ask_for_row(from[s] + ahead * ld, D);
        if constexpr (T == 1 && __is_same(A, S)) {
            if (D == 4 * n)
                dots_of_row<A, M, 4>(from[0], q, chains[r]);
            else if (D == 8 * n)
                dots_of_row<A, M, 8>(from[0], q, chains[r]);
            else
                dot_chains<A, M, T>(from, by, chains[r]);
        } else {
            dot_chains<A, M, T>(from, by, chains[r]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int s = 0; s < T; ++s) {
            const long count = keys.count(s, i + at, n);
            Vec<A> sums[n];
            SK_UNROLL
            for (int r = 0; r < n; ++r) sums[r] = chains[r][m][s];
            Vec<A> x = lane_sums<A>(sums);
            if (changed && count > 0)
                x = scores.template apply_along_keys<S>(x, query + m, keys.first(s, i + at), count);
            if (count < n) {
                const auto there = lanes<A>([](int lane) { return lane; }) < static_cast<int>(count);
                x = there ? x : Vec<A>{} - static_cast<A>(__builtin_inf());
            }
            store<A>(tile + m * ldt + s * width + at, x);
        }
}

// One panel of at most a vector of queries against some keys, from T places: STREAMS, or 1, in order.
// q: [count][buffer_ld(D)], tile: room for [KEYS][W], v: for a block of values. far: keys and values come
// from beyond the caches, and are asked for. Returns whether there was a key.
template <class A, class S, int T>
bool few_queries(const AttentionForward& c, const Sequence& s, long kv_head, const Panel<A>& panel, Span keys,
                 const A* q, A* tile, A* v, const Running<A>& run, bool far) {
    constexpr long n = Simd<A>::n, M = ROWS_TOGETHER;
    const long ld_q = buffer_ld<A>(c.D), Nv = padded<A>(c.Dv);
    const Scores<A> scores(c, s, panel);
    const bool changed = !scores.untouched().holds(keys);
    const KeyStreams<T> streams(keys, n);
    const S* k = row_of<S>(c.k, s, kv_head, s.from_k);
    const bool copied = !__is_same(A, S) || Nv != c.Dv || may_be_unseen(c, s, panel, keys);
    const long most = T == 1 ? keys_in_order<A>(panel.count, Nv, copied) : KEYS / T, ldt = T * most;
    const long ahead = !far ? 0 : T == 1 ? rows_in_order<S>(c.D) : ROWS_AHEAD;
    bool begun = false;
    for (long i = 0; i < streams.each; i += most) {
        const long width = min_of(most, streams.each - i);
        for (long at = 0; at < width; at += n) {
            for (long r = 0; r < panel.count;) {
                const long rows = queries_together(panel.count - r);
                (rows == M   ? few_scores<A, S, M, T>
                 : rows == 2 ? few_scores<A, S, 2, T>
                             : few_scores<A, S, 1, T>)(scores, changed, streams, k, c.k.i, c.D, q + r * ld_q,
                                                       r, i, width, at, tile + r * ldt, ldt, ahead);
                r += rows;
            }
        }
        for (long r = 0; r < panel.count; ++r) {
            A* out = begun ? run.out + r * (Nv + n) : nullptr;
            join_softmax_along_keys<A>(tile + r * ldt, T * width, run.m + r, run.l + r, out, Nv);
        }
        if (c.dropout_p > 0) {
            const Dropout<A> dropout(c, s, panel);
            for (long r = 0; r < panel.count; ++r)
                for (int stream = 0; stream < T; ++stream)
                    for (long at = 0; at < width; at += n) {
                        A* p = tile + r * ldt + stream * width + at;
                        store<A>(p, load<A>(p) * dropout.along_keys(r, streams.first(stream, i + at)));
                    }
        }
        Rows<A> values[T];
        long sizes[T];
        for (int stream = 0; stream < T; ++stream) {
            const long first = streams.first(stream, i), size = streams.count(stream, i, width);
            const Span there{s.from_k + first, s.from_k + first + size};
            A* room = v + stream * width * buffer_ld<A>(c.Dv);
            sizes[stream] = size;
            values[stream] = block<A, S>(c.v, s, kv_head, there, c.Dv, room, true);
            const Span these{first, first + size};
            const long unseen = size ? may_be_unseen(c, s, panel, these) : 0;
            if (unseen && !all_finite(values[stream], unseen, c.Dv))
                values[stream] = without_unseen<A>(c, s, panel, values[stream], these, c.Dv, room);
        }
        if constexpr (T == 1)
            values_in_order<A>(values[0], sizes[0], tile, ldt, panel.count, Nv, run.out, begun);
        else
            few_values<A>(values, sizes, tile, panel.count, width, Nv, run.out, begun, far);
        begun = true;
    }
    return begun;
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
