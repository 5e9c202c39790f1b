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

// Keys and values of more bytes than this come from memory.
constexpr long FAR_BYTES = 40000000;

// Rows that will be read soon, into L2: they are too short for the processor to run ahead by itself.
template <class S>
SK_INLINE void fetch_rows(const S* from, long ld, long rows, long size) {
    constexpr long line = 64 / static_cast<long>(sizeof(S));
    for (long r = 0; r < rows; ++r)
        for (long at = 0; at < size; at += line) __builtin_prefetch(from + r * ld + at, 0, 2);
}

// One panel of at most a vector of queries against some keys. q: [count][buffer_ld(D)], tile: [count][KEYS],
// v: room for a block of values. Returns whether there was a key.
template <class A, class S>
bool few_queries(const AttentionForward& c, const Sequence& s, long kv_head, const Panel<A>& panel, Span keys,
                 const A* q, A* tile, A* v, const Running<A>& run) {
    constexpr long n = Simd<A>::n;
    const long ld_q = buffer_ld<A>(c.D), Nv = padded<A>(c.Dv);
    const Scores<A> scores(c, s, panel);
    const bool changed = !scores.untouched(keys);
    const bool far = c.B * c.Hkv * c.S * (c.D + c.Dv) * static_cast<long>(sizeof(S)) > FAR_BYTES;
    bool begun = false;
    for (long from = keys.begin; from < keys.end; from += KEYS) {
        const Span here{from, min_of(from + KEYS, keys.end)};
        const long size = here.end - here.begin;
        const S* k = row_of<S>(c.k, s, kv_head, s.from_k + here.begin);
        const S* values = row_of<S>(c.v, s, kv_head, s.from_k + here.begin);
        for (long at = 0; at < size; at += n) {
            const long count = min_of(n, size - at), ahead = min_of(count, keys.end - here.begin - at - KEYS);
            if (far) {
                fetch_rows(values + at * c.v.i, c.v.i, count, c.Dv);
                fetch_rows(k + (at + KEYS) * c.k.i, c.k.i, ahead, c.D);
            }
            rows_as_they_lie<A>(k + at * c.k.i, c.k.i, c.D, count, panel.count, q, ld_q, tile + at, KEYS,
                                false);
            if (!changed && count == n) continue;
            for (long r = 0; r < panel.count; ++r) {
                Vec<A> x = load<A>(tile + r * KEYS + at);
                if (changed) x = scores.template apply_along_keys<S>(x, r, here.begin + at, count);
                const auto there = lanes<A>([](int lane) { return lane; }) < static_cast<int>(count);
                store<A>(tile + r * KEYS + at, there ? x : Vec<A>{} - static_cast<A>(__builtin_inf()));
            }
        }
        for (long r = 0; r < panel.count; ++r) {
            A* out = begun ? run.out + r * (Nv + n) : nullptr;
            join_softmax_along_keys<A>(tile + r * KEYS, size, run.m + r, run.l + r, out, Nv);
        }
        if (c.dropout_p > 0) {
            const Dropout<A> dropout(c, s, panel);
            for (long r = 0; r < panel.count; ++r)
                for (long at = 0; at < size; at += n) {
                    A* p = tile + r * KEYS + at;
                    store<A>(p, load<A>(p) * dropout.along_keys(r, here.begin + at));
                }
        }
        const Span there{s.from_k + here.begin, s.from_k + here.end};
        const Rows<A> vr = without_unseen<A>(
            c, s, &panel, 1, block<A, S>(c.v, s, kv_head, there, c.Dv, v, true), here, c.Dv, v);
        multiply_rows<A>(panel.count, tile, KEYS, vr.p, vr.ld, Nv, size, run.out, Nv + n, begun);
        begun = true;
    }
    return begun;
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
