// Attention forward: panels of queries against blocks of keys, softmax on the way, both products as matmuls.
// Online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; blocks: Dao 2023, arXiv:2307.08691.
#pragma once

#include "attention_few.h"

namespace seqkern {
namespace SEQKERN_ISA {

// Hands out 0, 1, ... to the threads of a team. Which thread takes what changes no result.
SK_INLINE long take_ticket(long* next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

// The first `count` rows of an output, at most a vector of them, times the lanes of `fade`.
template <class A>
SK_INLINE void fade_output(const Running<A>& run, Vec<A> fade, long count, long Nv) {
    constexpr long n = Simd<A>::n;
    A factors[n] __attribute__((aligned(SEQKERN_VECTOR_BYTES)));
    store<A>(factors, fade);
    for (long lane = 0; lane < count; ++lane) {
        if (factors[lane] == 1) continue;
        A* row = run.out + lane * (Nv + n);
        for (long c = 0; c < Nv; c += n) store<A>(row + c, load<A>(row + c) * factors[lane]);
    }
}

// A tile of scores joins the softmax of its panel and becomes weights, relative to the new maximum.
template <class A, int HALVES>
SK_INLINE void join_softmax(A* tile, long keys, const Running<A>& run, long count, long Nv) {
    constexpr long n = Simd<A>::n, W = 2 * n;
    const Vec<A> hidden = Vec<A>{} - static_cast<A>(__builtin_inf());
    Vec<A> top[2][2] = {{hidden, hidden}, {hidden, hidden}}, shift[2], fade[2], sum[2 * HALVES] = {};
    for (long k = 0; k < keys; k += 2) SK_UNROLL
    for (int half = 0; half < HALVES; ++half) {
        const long next = min_of(k + 1, keys - 1);
        const Vec<A> a = load<A>(tile + k * W + half * n), b = load<A>(tile + next * W + half * n);
        top[half][0] = larger(a, top[half][0]);
        top[half][1] = larger(b, top[half][1]);
    }
    SK_UNROLL
    for (int half = 0; half < HALVES; ++half) {
        const Vec<A> before = load<A>(run.m + half * n);
        Vec<A> m = larger(top[half][0], top[half][1]);
        m = larger(m, before);
        shift[half] = m == hidden ? Vec<A>{} : m;
        fade[half] = exp2_below<A>(before - shift[half]);
        store<A>(run.m + half * n, m);
        store<A>(run.l + half * n, load<A>(run.l + half * n) * fade[half]);
    }
    exponentials<A, HALVES, 2>(tile, W, keys, shift, sum);
    SK_UNROLL
    for (int half = 0; half < HALVES; ++half)
        store<A>(run.l + half * n, load<A>(run.l + half * n) + (sum[half] + sum[HALVES + half]));
    SK_UNROLL
    for (int half = 0; half < HALVES; ++half)
        fade_output<A>({run.m, run.l, run.out + half * n * (Nv + n)}, fade[half], min_of(count - half * n, n),
                       Nv);
}

// The same for a panel of at most half a vector of queries, two keys to a vector: the weights are left as
// [key][n / 2]. The upper lanes of the running values repeat the lower ones.
template <class A>
SK_INLINE void join_softmax_of_pairs(A* tile, long keys, const Running<A>& run, long count, long Nv) {
    constexpr long n = Simd<A>::n, W = 2 * n, pair = n / 2;
    using I = typename Simd<A>::I;
    constexpr I lower = lanes<A>([](int i) { return i % pair + i / pair * n; });
    constexpr I swapped = lanes<A>([](int i) { return (i + pair) % n; });
    const Vec<A> hidden = Vec<A>{} - static_cast<A>(__builtin_inf());
    Vec<A> top = hidden, sum{};
    for (long k = 0; k < keys; k += 2) {
        const Vec<A> b = k + 1 < keys ? load<A>(tile + (k + 1) * W) : hidden,
                     both = __builtin_shuffle(load<A>(tile + k * W), b, lower);
        top = larger(both, top);
        store<A>(tile + k * pair, both);
    }
    top = larger(top, Vec<A>(__builtin_shuffle(top, swapped)));
    const Vec<A> before = load<A>(run.m), m = larger(top, before), shift = m == hidden ? Vec<A>{} : m;
    const Vec<A> fade = exp2_below<A>(before - shift);
    store<A>(run.m, m);
    store<A>(run.l, load<A>(run.l) * fade);
    exponentials<A, 1>(tile, n, ceil_div(keys, 2), &shift, &sum);
    store<A>(run.l, load<A>(run.l) + (sum + __builtin_shuffle(sum, swapped)));
    fade_output<A>(run, fade, count, Nv);
}

// Weights [key][n / 2] as [key][W], of which the first n / 2 count.
template <class A>
SK_INLINE void part_pairs(A* tile, long keys) {
    constexpr long n = Simd<A>::n, W = 2 * n;
    for (long k = keys - 1; k > 0; --k) store<A>(tile + k * W, load<A>(tile + k * (n / 2)));
}

template <class A>
SK_APART void drop_weights(const Dropout<A>& dropout, A* tile, Span keys) {
    constexpr long n = Simd<A>::n, W = 2 * n;
    for (long k = keys.begin; k < keys.end; k += 4) {
        Vec<A> factor[2][4];
        dropout.factors(k, factor);
        for (long at = 0; at < 2 * min_of(4, keys.end - k); ++at) {
            A* to = tile + (k - keys.begin) * W + at * n;
            store<A>(to, load<A>(to) * factor[at % 2][at / 2]);
        }
    }
}

// How the rows of a call are shared out. Into how many parts the keys are split follows from its sizes alone,
// for it changes the last bits; how many panels share a block of keys changes none, and follows the threads:
// as many as leave each thread some units to choose from.
template <class A>
struct ForwardPlan {
    static constexpr long n = Simd<A>::n, W = Panel<A>::W, ROWS = 128, MOST = ROWS / W, UNITS = 32,
                          UNITS_OF_A_THREAD = 4;
    static constexpr long FAR = 16L << 20;  // bytes: more than caches hold
    // With more queries a panel, of which half is computed and two keys share a softmax's vector, is quicker
    // than lanes of keys: their sums are joined across lanes, which a few multiply-adds each do not pay for.
    static long few_of(long width) {
        if (SEQKERN_ACCUMULATORS < 16) return n / 2;
        return width <= 64 ? n / 8 : width <= 128 ? n / 4 : n;
    }
    // Keys of a part: all of them where there is enough else to share out.
    static long part_of(long units, long S, long multiplied) {
        if (units < UNITS && S >= 2048) return 1024;
        if (units == 1 && S > KEYS && multiplied >= 1L << 17) return ceil_div(S, 4 * KEYS) * KEYS;
        return max_of(S, 1);
    }
    long together, blocks, splits, part, Nv;  // panels of a unit, units of a group, parts of the keys, of one
    long bytes;                               // of all keys and values
    bool few;                                 // queries of a group fit in one vector

    explicit ForwardPlan(const AttentionForward& c)
        : Nv(padded<A>(c.Dv)), few(c.Hq / c.Hkv * c.L <= few_of(c.D + c.Dv)) {
        const long panels = HeadGroup<A>::panels_for(c.Hq / c.Hkv, c.L), groups = c.B * c.Hkv;
        bytes = groups * c.S * (c.D + c.Dv) * (c.dtype == Dtype::f64 ? 8 : c.dtype == Dtype::f32 ? 4 : 2);
        part = part_of(groups * panels, c.S, c.L * c.S * (c.D + c.Dv));
        splits = max_of(1, ceil_div(c.S, part));
        const long wanted = c.threads == 1 ? 1 : c.threads * UNITS_OF_A_THREAD;
        together = splits > 1 ? 1 : MOST;
        while (together > 1 && groups * ceil_div(panels, together) < wanted) together /= 2;
        together = max_of(1, min_of(together, panels));
        blocks = ceil_div(panels, together);
    }
    long units(const AttentionForward& c) const { return c.B * c.Hkv * blocks * splits; }
    long panel_size() const { return W * (Nv + Simd<A>::n) + 2 * W; }  // of a Running

    Running<A> running(A* base) const { return {base, base + W, base + 2 * W}; }
};

// The panel's softmax is complete: sinks join it, output and log-sum-exp are written.
template <class A, class S>
void finish_panel(const AttentionForward& c, const Sequence& s, const Panel<A>& panel, const Running<A>& run,
                  long Nv) {
    constexpr long n = Simd<A>::n;
    for (long lane = 0; lane < panel.count; ++lane) {
        const long h = panel.h[lane], i = s.from_q + panel.i[lane];
        A m = run.m[lane], l = run.l[lane], factor = 1;
        const A hidden = -static_cast<A>(__builtin_inf());
        if (c.sinks) {
            const A sink = finite<A>(c.sinks[h] * LOG2E), top = m > sink ? m : sink;
            const A shift = top == hidden ? A{} : top;
            const Vec<A> grown = exp2_below<A>(Vec<A>{m - shift, sink - shift});
            factor = grown[0], run.l[lane] = l = l * grown[0] + grown[1], run.m[lane] = m = top;
        }
        const bool empty = l == 0;
        factor = empty ? A{} : factor / l;
        S* to = row_of<S>(c.output, s, h, i);
        const A* from = run.out + lane * (Nv + n);
        for (long at = 0; at < c.Dv; at += n) {
            store_n<A>(to + at, load<A>(from + at) * factor, c.Dv - at);
        }
        if (!c.lse.p) continue;
        const A log2 =
            sizeof(A) == 4 ? __builtin_log2f(static_cast<float>(l)) : static_cast<A>(__builtin_log2(l));
        *row_of<A>(c.lse, s, h, i) = empty ? hidden : (m + log2) * static_cast<A>(LN2);
    }
}

template <class A, class S>
struct ForwardUnit {
    using E = FactorOf<A, S>;
    static constexpr long n = Simd<A>::n, W = 2 * n, MOST = ForwardPlan<A>::MOST;
    const AttentionForward& c;
    const ForwardPlan<A> plan;
    A *rows, *tile, *v, *own;
    E *columns, *k, *left, *right, *last_pair;  // the last three: weights and values in pairs
    Panel<A> panels[MOST];
    Arena arena;

    static unsigned long bytes(const AttentionForward& c) { return ForwardUnit(c, nullptr).arena.used; }

    ForwardUnit(const AttentionForward& c, char* memory) : c(c), plan(c), arena{memory} {
        const long ld_k = buffer_ld<A>(c.D), ld_v = buffer_ld<A>(c.Dv);
        columns = arena.take<E>(MOST * columns_size<E>(c.D));
        rows = arena.take<A>(W * ld_k), tile = arena.take<A>(KEYS * W);
        k = arena.take<E>(KEYS * ld_k), v = arena.take<A>(KEYS * ld_v);
        left = IN_PAIRS<E> ? arena.take<E>(KEYS * W) : nullptr;
        right = IN_PAIRS<E> ? arena.take<E>(KEYS * ld_v) : nullptr;
        last_pair = IN_PAIRS<E> ? arena.take<E>(right_ld<E>(c.Dv)) : nullptr;
        own = arena.take<A>(MOST * plan.panel_size());
    }

    // What the last block of a unit asks for: the first keys and values of another one.
    struct First {
        Ahead k, v;
    };
    First first_of(long unit) const {
        if (!ASKS_AHEAD || unit >= plan.units(c)) return {};
        const long group = unit / plan.splits / plan.blocks, from = unit % plan.splits * plan.part;
        return first_keys(sequence(c, group / c.Hkv), group % c.Hkv, from);
    }
    First first_keys(const Sequence& s, long kv_head, long from) const {
        return {rows_ahead<S>(c.k, s, kv_head, from, s.S, c.D),
                rows_ahead<S>(c.v, s, kv_head, from, s.S, c.Dv)};
    }

    // Panels first.. of a group against a part of the keys. Parts are left in `parts` [panel][split].
    void run(const Sequence& s, long kv_head, long block_index, long split, A* parts, const First& after) {
        const HeadGroup<A> group(c, s, kv_head);
        const long first = block_index * plan.together;
        const long count = min_of(plan.together, group.panels() - first);
        if (count <= 0) return;
        Running<A> running[MOST];
        for (long p = 0; p < count; ++p) {
            panels[p] = group.panel(first + p);
            running[p] = plan.running(plan.splits > 1 ? parts + (p * plan.splits + split) * plan.panel_size()
                                                      : own + p * plan.panel_size());
        }
        meet_keys(s, kv_head, count, split, running, after, nullptr);
        if (plan.splits == 1) finish(s, count, running);
    }

    void finish(const Sequence& s, long count, const Running<A>* running) const {
        for (long p = 0; p < count; ++p) finish_panel<A, S>(c, s, panels[p], running[p], plan.Nv);
    }

    // Where the weights of panels stay: those of a panel by [key][W], and what those of each block of keys
    // are relative to, [block][W].
    struct Kept {
        A *weights, *tops;
        long of_panel, tops_of_panel;  // numbers from a panel to the next
    };

    // The first `count` of `panels` against a part of the keys of a head.
    void meet_keys(const Sequence& s, long kv_head, long count, long split, const Running<A>* running,
                   const First& after, const Kept* kept) {
        Span some{s.S, 0};
        Span spans[MOST];
        for (long p = 0; p < count; ++p) {
            spans[p] = seen_by_some<A>(c, s, panels[p].first, panels[p].last);
            if (plan.splits > 1) spans[p] = overlap(spans[p], {split * plan.part, (split + 1) * plan.part});
            if (!spans[p].empty())
                some = {min_of(some.begin, spans[p].begin), max_of(some.end, spans[p].end)};
            for (long lane = 0; lane < W; ++lane)
                running[p].m[lane] = -static_cast<A>(__builtin_inf()), running[p].l[lane] = 0;
            if (plan.few) {
                panel_rows<A, S>(rows, c.q, s, panels[p], c.D, query_factor<A>(c));
            } else {
                E* const own_rows = reinterpret_cast<E*>(rows);
                panel_rows<E, S>(own_rows, c.q, s, panels[p], c.D, query_factor<A>(c));
                panel_columns(columns + p * columns_size<E>(c.D), own_rows, panels[p].count, c.D);
            }
        }
        bool begun[MOST] = {};
        // One panel or two do not earn a copy back where tiles have few rows.
        const bool once = SEQKERN_ACCUMULATORS < 16 && count <= 2;
        if (plan.few) {
            const bool in_order = c.in_order && can_be_in_order<A>(c, panels[0].count, plan.bytes);
            const auto meet = [&]<int T>() {
                return few_queries<A, S, T>(c, s, kv_head, panels[0], some, rows, tile, v, running[0],
                                            plan.bytes > plan.FAR);
            };
            if constexpr (SEQKERN_VECTOR_BYTES == 64)
                begun[0] = in_order ? meet.template operator()<1>() : meet.template operator()<STREAMS>();
            else
                begun[0] = meet.template operator()<STREAMS>();
            some.end = some.begin;
        }
        for (long from = some.begin / KEYS * KEYS; from < some.end; from += KEYS) {
            const Span keys{max_of(from, some.begin), min_of(from + KEYS, some.end)};
            const Span there{s.from_k + keys.begin, s.from_k + keys.end};
            const Rows<E> kr = block<E, S>(c.k, s, kv_head, there, c.D, k, once, Reads::numbers);
            const Values all = values(s, kv_head, panels, count, keys, there, once);
            const bool last = keys.end == some.end;
            const Ahead next_k = last ? after.k : rows_ahead<S>(c.k, s, kv_head, keys.end, some.end, c.D),
                        next_v = last ? after.v : rows_ahead<S>(c.v, s, kv_head, keys.end, some.end, c.Dv);
            bool asks_k = ASKS_AHEAD, asks_v = ASKS_AHEAD;  // a product of a block does, if nothing else
            for (long p = 0; p < count; ++p) {
                const Span here = overlap(spans[p], keys);
                if (here.empty()) continue;
                const long size = here.end - here.begin, skip = here.begin - keys.begin;
                const bool half = panels[p].count <= n;
                A* const weights = kept ? kept->weights + p * kept->of_panel + here.begin * W : tile;
                const auto multiply = [&](const Ahead* ask) {
                    (half ? gemm<E, 1> : gemm<E, 2>)(size, kr.p + skip * kr.ld, kr.ld,
                                                     panel_of_columns(columns + p * columns_size<E>(c.D)), 1,
                                                     c.D, weights, W, 0, false, nullptr, ask);
                    scale_behind<E>(c, weights, W, size, half ? 1 : 2);
                };
                const bool plain = Scores<A>::untouched(c, s, panels[p]).holds(here);
                const bool first = asks_k && (plain || count == 1);
                if (plain) {
                    multiply(first ? &next_k : nullptr);
                } else {
                    const Scores<A> scores(c, s, panels[p]);
                    const Ahead own = scores.template fetch<S>(here, !first);
                    multiply(first ? &next_k : &own);
                    scores.template apply<S>(weights, W, here, nullptr);
                }
                if (first) asks_k = false;
                const long fading = begun[p] ? panels[p].count : 0;
                const bool paired = c.dropout_p == 0 && panels[p].count <= n / 2;
                if (paired) {
                    join_softmax_of_pairs<A>(weights, size, running[p], fading, plan.Nv);
                } else if (half) {
                    join_softmax<A, 1>(weights, size, running[p], fading, plan.Nv);
                } else {
                    join_softmax<A, 2>(weights, size, running[p], fading, plan.Nv);
                }
                for (long half = 0; kept && half < 2; ++half)
                    store<A>(kept->tops + p * kept->tops_of_panel + from / KEYS * W + half * n,
                             load<A>(running[p].m + half * n));
                if (c.dropout_p > 0) drop_weights<A>(Dropout<A>(c, s, panels[p]), weights, here);
                const Rows<E> vr =
                    all.apart ? values(s, kv_head, panels + p, 1, keys, there, once).rows : all.rows;
                E* const room = IN_PAIRS<E> && !kept ? reinterpret_cast<E*>(weights) : left;
                const E* const factors = paired ? factors_of_pairs<E>(weights, size, room)
                                                : factors_of_tile<E>(weights, W, size, half ? 1 : 2, room);
                multiply_along(panels[p].count, factors, (paired ? n / 2 : W) * Factor<E>::depth,
                               from_row(vr, skip), plan.Nv, size, running[p].out, plan.Nv + n, begun[p],
                               last_pair,
                               asks_v   ? &next_v
                               : asks_k ? &next_k
                                        : nullptr);
                if (kept && paired) part_pairs<A>(weights, size);
                if (!asks_v) asks_k = false;
                asks_v = false;
                begun[p] = true;
            }
        }
        for (long p = 0; p < count && plan.splits == 1; ++p)
            for (long at = 0; !begun[p] && at < W * (plan.Nv + n); at += n)
                store<A>(running[p].out + at, Vec<A>{});
    }

    // Values for the matmul, as the first `count` of `of` see them; apart: each panel must ask for its own.
    struct Values {
        Rows<E> rows;
        bool apart;
    };
    Values values(const Sequence& s, long kv_head, const Panel<A>* of, long count, Span keys, Span there,
                  bool once) {
        const long size = there.end - there.begin;
        const long unseen = may_be_unseen(c, s, of[count - 1], keys);
        if constexpr (IN_PAIRS<E>)
            if (!unseen)
                return {pair_rows(right, row_of<S>(c.v, s, kv_head, there.begin), c.v.i, size, c.Dv), false};
        Rows<A> found = block<A, S>(c.v, s, kv_head, there, c.Dv, v, once);
        const bool apart = unseen && !all_finite(found, unseen, c.Dv);
        if (apart && count > 1) return {{}, true};
        if (apart) found = without_unseen<A>(c, s, *of, found, keys, c.Dv, v);
        if constexpr (IN_PAIRS<E>)
            return {pair_rows(right, found.p, found.ld, size, c.Dv), false};
        else
            return {found, false};
    }

    // The parts of one panel, in the order of the keys.
    void combine(const Sequence& s, const Panel<A>& panel, A* parts) {
        const Running<A> whole = plan.running(own);
        const A hidden = -static_cast<A>(__builtin_inf());
        for (long lane = 0; lane < panel.count; ++lane) {
            A m = hidden, l = 0;
            for (long t = 0; t < plan.splits; ++t) {
                const A found = plan.running(parts + t * plan.panel_size()).m[lane];
                m = found > m ? found : m;
            }
            A* to = whole.out + lane * (plan.Nv + n);
            for (long at = 0; at < plan.Nv; at += n) store<A>(to + at, Vec<A>{});
            for (long t = 0; t < plan.splits; ++t) {
                const Running<A> part = plan.running(parts + t * plan.panel_size());
                if (part.l[lane] == 0) continue;  // no key: its output was never written
                const A f = exp2_below<A>(Vec<A>{} + (part.m[lane] - (m == hidden ? A{} : m)))[0];
                l += part.l[lane] * f;
                const A* from = part.out + lane * (plan.Nv + n);
                for (long at = 0; at < plan.Nv; at += n)
                    store<A>(to + at, load<A>(to + at) + load<A>(from + at) * f);
            }
            whole.m[lane] = m, whole.l[lane] = l;
        }
        finish_panel<A, S>(c, s, panel, whole, plan.Nv);
    }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
