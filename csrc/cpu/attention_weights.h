// The weights themselves: of each head, or their mean over the heads. They are kept from the softmax of some
// panels; or, with few queries or parts of keys, made again from the log-sum-exp, a tile of each head at a
// time.
#pragma once

#include "attention_forward.h"

namespace seqkern {
namespace SEQKERN_ISA {

// Queries of one head side by side.
template <class A>
SK_INLINE Panel<A> panel_of_head(long head, long first, long L) {
    Panel<A> found;
    found.count = min_of(Panel<A>::W, L - first);
    for (long lane = 0; lane < Panel<A>::W; ++lane)
        found.i[lane] = first + (lane < found.count ? lane : 0), found.h[lane] = head;
    found.first = first, found.last = first + found.count - 1;
    return found;
}

// Lane by lane, a row of a tile [keys][ld] is written, or added, to to[at[lane]..].
template <class A, bool ADD, class T>
SK_INLINE void tile_to_rows(const A* tile, long ld, long keys, long count, T* to, const long* at) {
    constexpr long n = Simd<A>::n;
    for (long half = 0; half * n < count; ++half)
        for (long first = 0; first < keys; first += n) {
            const long left = min_of(n, keys - first);
            Vec<A> block[n];
            SK_UNROLL
            for (long k = 0; k < n; ++k)
                block[k] = k < left ? load<A>(tile + (first + k) * ld + half * n) : Vec<A>{};
            transpose<A>(block);
            for (long lane = 0; lane < min_of(n, count - half * n); ++lane) {
                T* row = to + at[half * n + lane] + first;
                Vec<A> v = block[lane];
                if constexpr (ADD) v += load_n<A>(row, left);
                store_n<A>(row, v, left);
            }
        }
}

// What makes a panel's weights again: its queries as a matmul reads them, and what its scores are measured
// against.
template <class E>
struct Again {
    E* columns;   // [D][W]
    Sum<E>* lse;  // [W], in units of log 2; +inf in lanes without a query or a key
};

template <class E, class S>
SK_INLINE void prepare_again(const AttentionCall& c, const Sequence& s, const Panel<Sum<E>>& panel,
                             const Operand& lse, E* rows, const Again<E>& again) {
    using A = Sum<E>;
    panel_rows<E, S>(rows, c.q, s, panel, c.D, query_factor<A>(c));
    panel_columns(again.columns, rows, panel.count, c.D);
    const A nothing = static_cast<A>(__builtin_inf());
    for (long lane = 0; lane < Panel<A>::W; ++lane) {
        const A found =
            lane < panel.count ? *row_of<A>(lse, s, panel.h[lane], s.from_q + panel.i[lane]) : -nothing;
        again.lse[lane] = found == -nothing ? nothing : found * static_cast<A>(LOG2E);
    }
}

// tile[key][ld] of these keys: the weights before dropout. keys_from is the row of the first of them.
template <class E, class S>
SK_INLINE void weights_again(const Scores<Sum<E>>& scores, const Again<E>& again, Rows<E> keys_from,
                             Span keys, Sum<E>* tile, long ld, Sum<E>* cap_slope) {
    using A = Sum<E>;
    const long count = keys.end - keys.begin;
    const Ahead ask = scores.template fetch<S>(keys, true);
    gemm<E, 2>(count, keys_from.p, keys_from.ld, panel_of_columns(again.columns), 1, scores.c.D, tile, ld, 0,
               false, nullptr, &ask);
    scale_behind<E>(scores.c, tile, ld, count, 2);
    scores.template apply<S>(tile, ld, keys, cap_slope);
    const Vec<A> lse[2] = {load<A>(again.lse), load<A>(again.lse + Simd<A>::n)};
    exponentials<A, 2, 1, true>(tile, ld, count, lse, nullptr);
}

template <class A, class S>
struct WeightsUnit {
    using E = FactorOf<A, S>;
    static constexpr long n = Simd<A>::n, W = 2 * n;
    const AttentionForward& c;
    E *rows, *k, *columns;  // columns, lse: of each head that is added up
    A *tile, *sum, *lse_rows;
    Arena arena;

    static unsigned long bytes(const AttentionForward& c) { return WeightsUnit(c, nullptr).arena.used; }
    WeightsUnit(const AttentionForward& c, char* memory) : c(c), arena{memory} {
        const long heads = c.mean ? c.Hq : 1, ld = buffer_ld<A>(c.D);
        rows = arena.take<E>(W * ld), tile = arena.take<A>(KEYS * W), sum = arena.take<A>(KEYS * W);
        k = arena.take<E>(KEYS * ld);
        columns = arena.take<E>(heads * columns_size<E>(c.D)), lse_rows = arena.take<A>(heads * W);
    }

    // The queries first.. of heads [from, to), their weights added up.
    void run(long b, long from, long to, long first) {
        const Sequence s = sequence(c, b);
        const Operand lse{c.lse.p, c.lse.b, c.lse.h, c.lse.i};
        const A share = static_cast<A>(1) / static_cast<A>(to - from);
        const auto again = [&](long h) {
            return Again<E>{columns + (h - from) * columns_size<E>(c.D), lse_rows + (h - from) * W};
        };
        for (long h = from; h < to; ++h)
            prepare_again<E, S>(c, s, panel_of_head<A>(h, first, s.L), lse, rows, again(h));
        for (long begin = 0; begin < s.S; begin += KEYS) {
            const Span keys{begin, min_of(begin + KEYS, s.S)};
            for (long at = 0; at < KEYS * W; at += n) store<A>(sum + at, Vec<A>{});
            Panel<A> panel = panel_of_head<A>(from, first, s.L);
            const Span here = overlap(seen_by_some<A>(c, s, panel.first, panel.last), keys);
            for (long h = from; h < to && !here.empty(); ++h) {
                panel = panel_of_head<A>(h, first, s.L);
                const Rows<E> kr =
                    block<E, S>(c.k, s, h / (c.Hq / c.Hkv), here, c.D, k, false, Reads::numbers);
                weights_again<E, S>(Scores<A>(c, s, panel), again(h), kr, here, tile, W, nullptr);
                if (c.dropout_p > 0) drop_weights<A>(Dropout<A>(c, s, panel), tile, here);
                A* to_sum = sum + (here.begin - keys.begin) * W;
                for (long at = 0; at < (here.end - here.begin) * W; at += n)
                    store<A>(to_sum + at, load<A>(to_sum + at) + load<A>(tile + at) * share);
            }
            long at[W];
            for (long lane = 0; lane < W; ++lane) at[lane] = panel.i[lane] * c.weights.i + begin;
            S* out = static_cast<S*>(c.weights.p) + b * c.weights.b + from * c.weights.h;
            tile_to_rows<A, false>(sum, W, keys.end - keys.begin, panel.count, out, at);
        }
    }
};

// The forward of a call that wants the weights: a unit is some panels of queries, against all heads whose
// weights are added up.
template <class A, class S>
struct KeptWeights {
    static constexpr long n = Simd<A>::n, W = 2 * n, MOST = ForwardPlan<A>::MOST;
    static constexpr long BYTES = 512L << 10;  // of weights that are kept, so that they stay near
    const AttentionForward& c;
    long panels, together, blocks, heads, key_blocks, of_panel;
    A *kept, *tops, *sums;

    KeptWeights(const AttentionForward& c, A* memory) : c(c) {
        panels = ceil_div(c.L, W), heads = c.mean ? 1 : c.Hq;
        key_blocks = ceil_div(c.S, KEYS), of_panel = c.S * W;
        const long bytes = (c.mean ? 2 : 1) * of_panel * static_cast<long>(sizeof(A));
        together = max_of(1, min_of(min_of(MOST, panels), BYTES / max_of(1, bytes)));
        const long wanted = c.threads == 1 ? 1 : c.threads * ForwardPlan<A>::UNITS_OF_A_THREAD;
        while (together > 1 && c.B * heads * ceil_div(panels, together) < wanted) together /= 2;
        blocks = ceil_div(panels, together);
        kept = memory;
        tops = memory ? kept + together * of_panel : nullptr;
        sums = memory ? tops + together * key_blocks * W : nullptr;
    }
    static bool serves(const AttentionForward& c) {
        const ForwardPlan<A> plan(c);
        return c.weights.p && !c.start_q && !plan.few && plan.splits == 1 && c.S > 0;
    }
    unsigned long numbers() const {
        return static_cast<unsigned long>(together * (of_panel * (c.mean ? 2 : 1) + key_blocks * W));
    }
    long units() const { return c.B * heads * blocks; }

    void run(long u, ForwardUnit<A, S>& unit) const {
        const long b = u / blocks / heads, from = c.mean ? 0 : u / blocks % heads,
                   to = c.mean ? c.Hq : from + 1;
        const long first = u % blocks * together, count = min_of(together, panels - first), G = c.Hq / c.Hkv;
        const Sequence s = sequence(c, b);
        Running<A> running[MOST];
        for (long p = 0; p < count; ++p)
            running[p] = unit.plan.running(unit.own + p * unit.plan.panel_size());
        const typename ForwardUnit<A, S>::Kept keep{kept, tops, of_panel, key_blocks * W};
        A* const added = c.mean ? sums : kept;
        for (long h = from; h < to; ++h) {
            for (long p = 0; p < count; ++p) unit.panels[p] = panel_of_head<A>(h, (first + p) * W, s.L);
            unit.meet_keys(s, h / G, count, 0, running, unit.first_keys(s, min_of(h + 1, c.Hq - 1) / G, 0),
                           &keep);
            unit.finish(s, count, running);
            for (long p = 0; p < count; ++p)
                add(s, unit.panels[p], running[p], p, added + p * of_panel, h == from,
                    static_cast<A>(1) / static_cast<A>(to - from));
        }
        for (long p = 0; p < count; ++p) {
            const Panel<A>& panel = unit.panels[p];
            long at[W];
            for (long lane = 0; lane < W; ++lane) at[lane] = panel.i[lane] * c.weights.i;
            S* out = static_cast<S*>(c.weights.p) + b * c.weights.b + from * c.weights.h;
            tile_to_rows<A, false>(added + p * of_panel, W, s.S, panel.count, out, at);
        }
    }

  private:
    static SK_INLINE void clear(A* to, Span keys) {
        for (long at = keys.begin * W; at < keys.end * W; at += n) store<A>(to + at, Vec<A>{});
    }

    // What a panel's softmax ended with makes weights of what was kept; the first head's clear what no query
    // sees.
    void add(const Sequence& s, const Panel<A>& panel, const Running<A>& run, long p, A* to, bool begin,
             A share) const {
        const Vec<A> hidden = Vec<A>{} - static_cast<A>(__builtin_inf());
        const Span seen = seen_by_some<A>(c, s, panel.first, panel.last);
        if (begin) {
            clear(to, {0, seen.empty() ? s.S : seen.begin});
            if (!seen.empty()) clear(to, {seen.end, s.S});
        }
        for (long half = 0; half * n < panel.count; ++half) {
            const Vec<A> top = load<A>(run.m + half * n), total = load<A>(run.l + half * n);
            const Vec<A> shift = top == hidden ? Vec<A>{} : top, part = total == 0 ? Vec<A>{} : share / total;
            for (long key = seen.begin; key < seen.end;) {
                const long block = key / KEYS, end = min_of(seen.end, (block + 1) * KEYS);
                const Vec<A> factor =
                    exp2_below<A>(load<A>(tops + (p * key_blocks + block) * W + half * n) - shift) * part;
                for (; key < end; ++key) {
                    const Vec<A> w = load<A>(kept + p * of_panel + key * W + half * n) * factor;
                    A* at = to + key * W + half * n;
                    store<A>(at, begin ? w : load<A>(at) + w);
                }
            }
        }
    }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
