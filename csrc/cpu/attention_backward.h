// Attention backward: a unit holds a chunk of the keys and meets all queries, so that d_k and d_v are its
// own. What several units add to, d_q and a broadcast d_bias, they add to in the order of the units,
// whichever threads run them.
#pragma once

#include "attention_backward_plan.h"

namespace seqkern {
namespace SEQKERN_ISA {

template <class A, class S>
struct BackwardUnit {
    using E = FactorOf<A, S>;
    static constexpr long n = Simd<A>::n, W = 2 * n, TOGETHER = BackwardPlan<A>::TOGETHER,
                          ROWS = TOGETHER * W, STEP = Factor<E>::depth;
    static constexpr long LD = IN_PAIRS<E> ? W : ROWS;  // of tiles, which then stay for one panel only
    const AttentionBackward& c;
    const BackwardPlan<A> plan;
    const typename BackwardPlan<A>::Shared shared;
    const Operand lse;
    const long ld_k, ld_v;
    E *q, *g, *rows, *columns_q, *columns_g, *k, *v;
    E *k_right, *p_left, *ds_left, *ds_along, *last_pair;  // in pairs only
    A *k_wide, *lse_rows, *delta, *p, *ds, *cap_slope, *dk, *dv, *dq;

    Arena arena;

    static unsigned long bytes(const AttentionBackward& c) {
        return BackwardUnit(c, nullptr, nullptr).arena.used;
    }

    BackwardUnit(const AttentionBackward& c, char* memory, char* shared_base)
        : c(c),
          plan(c),
          shared(plan.shared(c, shared_base)),
          lse(c.lse),
          ld_k(buffer_ld<A>(c.D)),
          ld_v(buffer_ld<A>(c.Dv)),
          arena{memory} {
        const auto paired = [&](long count) { return IN_PAIRS<E> ? arena.take<E>(count) : nullptr; };
        q = arena.take<E>(ROWS * ld_k), g = arena.take<E>(ROWS * ld_v);
        rows = arena.take<E>(W * max_of(ld_k, ld_v));
        columns_q = arena.take<E>(columns_size<E>(c.D)), columns_g = arena.take<E>(columns_size<E>(c.Dv));
        k = arena.take<E>(plan.chunk * ld_k), v = arena.take<E>(plan.chunk * ld_v);
        k_right = paired(plan.chunk * ld_k), last_pair = paired(right_ld<E>(c.D));
        p_left = paired(plan.chunk * ROWS), ds_left = paired(plan.chunk * ROWS),
        ds_along = paired(plan.chunk * ROWS);
        k_wide = IN_PAIRS<E> ? arena.take<A>(plan.chunk * ld_k) : reinterpret_cast<A*>(k);
        lse_rows = arena.take<A>(W), delta = arena.take<A>(ROWS);
        p = arena.take<A>(plan.chunk * LD), ds = arena.take<A>(plan.chunk * LD);
        cap_slope = c.softcap > 0 ? arena.take<A>(plan.chunk * LD) : nullptr;
        dk = arena.take<A>(plan.chunk * ld_k), dv = arena.take<A>(plan.chunk * ld_v);
        dq = arena.take<A>(ROWS * ld_k);
    }

    // delta and the sinks' gradient of one head; clears what is added to.
    void prepare(long b, long h) {
        const Sequence s = sequence(c, b);
        const A hidden = -static_cast<A>(__builtin_inf());
        double sink = 0;
        for (long i = 0; i < s.L; ++i) {
            const long row = s.from_q + i;
            const A found = *row_of<A>(lse, s, h, row);
            A total = 0;
            if (c.grad_output.p) {
                const S *o = row_of<S>(c.output, s, h, row), *go = row_of<S>(c.grad_output, s, h, row);
                Vec<A> sum{};
                for (long at = 0; at < c.Dv; at += n)
                    sum += load_n<A>(o + at, c.Dv - at) * load_n<A>(go + at, c.Dv - at);
                for (long lane = 0; lane < n; ++lane) total += sum[lane];
            }
            if (c.grad_lse.p) total -= *row_of<A>(c.grad_lse, s, h, row);
            if (found == hidden) total = 0;
            shared.delta[line_of(c, s, h, i)] = total;
            if (plan.rows) shared.rows[line_of(c, s, h, i)] = 0;
            if (c.d_sinks && !c.grad_weights.p) sink -= share_of_sink(h, found) * total;
        }
        if (c.d_sinks && !c.grad_weights.p) c.d_sinks[b * c.Hq + h] = sink;
        if (plan.columns)
            for (long j = 0; j < c.S; ++j) shared.columns[(b * c.Hq + h) * c.S + j] = 0;
    }

    double share_of_sink(long h, A found) const {
        return c.sinks[h] == -__builtin_inf() ? 0 : __builtin_exp(c.sinks[h] - static_cast<double>(found));
    }

    // The part of delta that the weights' gradient brings, of one head.
    void prepare_weights(long b, long h) {
        const Sequence s = sequence(c, b);
        double sink = 0;
        const Again<E> again{columns_q, lse_rows};
        for (long first = 0; first < s.L; first += W) {
            const Panel<A> panel = panel_of_head<A>(h, first, s.L);
            prepare_again<E, S>(c, s, panel, lse, rows, again);
            const Scores<A> scores(c, s, panel);
            const PlaneRows<A> given(c.grad_weights, s, panel);
            const Span seen = seen_by_some<A>(c, s, panel.first, panel.last);
            Vec<A> sum[2] = {};
            for (long from = seen.begin; from < seen.end; from += KEYS) {
                const Span keys{from, min_of(from + KEYS, seen.end)};
                const Rows<E> kr = block<E, S>(c.k, s, h / plan.G, keys, c.D, k, false, Reads::numbers);
                weights_again<E, S>(scores, again, kr, keys, p, W, nullptr);
                if (c.dropout_p > 0) drop_weights<A>(Dropout<A>(c, s, panel), p, keys);
                for (long at = keys.begin; at < keys.end; at += n)
                    for (long half = 0; half < 2; ++half) {
                        Vec<A> dw[n];
                        const long count = min_of(n, keys.end - at);
                        given.template keys<S>(half, at, count, dw);
                        for (long j = 0; j < count; ++j)
                            sum[half] += load<A>(p + (at - keys.begin + j) * W + half * n) * dw[j];
                    }
            }
            for (long lane = 0; lane < panel.count; ++lane) {
                A& total = shared.delta[line_of(c, s, h, panel.i[lane])];
                total += sum[lane / n][lane % n] * weight_share();
                if (c.d_sinks)
                    sink -=
                        share_of_sink(h, *row_of<A>(lse, s, h, panel.i[lane])) * static_cast<double>(total);
            }
        }
        if (c.d_sinks) c.d_sinks[b * c.Hq + h] = sink;
    }

    A weight_share() const { return c.mean ? static_cast<A>(1) / static_cast<A>(c.Hq) : 1; }

    // All queries of a group against one chunk of its keys.
    void run(long unit) {
        const long bh = unit % plan.groups, chunk = unit / plan.groups, kv_head = bh % c.Hkv;
        const Sequence s = sequence(c, bh / c.Hkv);
        const Span keys{chunk * plan.chunk, min_of((chunk + 1) * plan.chunk, s.S)};
        if (c.d_slopes)
            for (long g_ = 0; g_ < plan.G; ++g_) shared.slopes[unit * plan.G + g_] = 0;
        if (!keys.empty()) {
            const HeadGroup<A> group(c, s, kv_head);
            for (long at = 0; at < keys.end - keys.begin; ++at) {
                for (long j = 0; j < ld_k; ++j) dk[at * ld_k + j] = 0;
                for (long j = 0; j < ld_v; ++j) dv[at * ld_v + j] = 0;
            }
            const Span there{s.from_k + keys.begin, s.from_k + keys.end};
            const Rows<E> vr = block<E, S>(c.v, s, kv_head, there, c.Dv, v, false, Reads::numbers);
            Keys kr{};
            const long panels = group.panels();
            for (long t = 0; t * TOGETHER < panels; ++t) {
                Panel<A> some[TOGETHER];
                const long count = min_of(TOGETHER, panels - t * TOGETHER);
                Span seen{s.S, 0};
                for (long at = 0; at < count; ++at) {
                    some[at] = group.panel(t * TOGETHER + at);
                    const Span own = overlap(seen_by_some<A>(c, s, some[at].first, some[at].last), keys);
                    if (!own.empty()) seen = {min_of(seen.begin, own.begin), max_of(seen.end, own.end)};
                }
                if (!seen.empty()) {
                    if (!kr.left.p) kr = read_keys(s, group, kv_head, keys, there);
                    tiles(s, some, count, seen, keys, kr, vr, unit, t);
                }
                __atomic_store_n(&shared.done[unit], static_cast<int>(t + 1), __ATOMIC_RELEASE);
            }
            if (c.d_k.p) write(c.d_k, s, kv_head, there, dk, ld_k, c.D);
            if (c.d_v.p) write(c.d_v, s, kv_head, there, dv, ld_v, c.Dv);
        }
        __atomic_store_n(&shared.done[unit], ALL_DONE, __ATOMIC_RELEASE);
    }

    // The sums over the batch, the heads and the keys that a broadcast bias or slope stands for.
    void reduce(long thread, long threads) {
        if (c.d_slopes) {
            const Range own = SEQKERN_ISA::share(c.B * c.Hq, thread, threads);
            for (long at = own.begin; at < own.end; ++at) {
                const long bh = at / c.Hq * c.Hkv + at % c.Hq / plan.G;
                double sum = 0;
                for (long chunk = 0; chunk < plan.chunks; ++chunk)
                    sum += shared.slopes[(chunk * plan.groups + bh) * plan.G + at % plan.G];
                c.d_slopes[at] = sum;
            }
        }
        if ((!plan.columns && !plan.rows) || thread > 0) return;
        A* to = static_cast<A*>(c.d_bias.p);
        for (long b = 0; b < c.B; ++b) {
            const Sequence s = sequence(c, b);
            for (long h = 0; h < c.Hq; ++h) {
                A* at = to + b * c.d_bias.b + h * c.d_bias.h;
                if (plan.columns) {
                    for (long j = 0; j < s.S; ++j)
                        at[j * c.d_bias_j] += shared.columns[(b * c.Hq + h) * c.S + j];
                } else {
                    for (long i = 0; i < s.L; ++i) at[i * c.d_bias.i] += shared.rows[line_of(c, s, h, i)];
                }
            }
        }
    }

  private:
    // Keys as left rows, for scores, and as right rows, for d_q.
    struct Keys {
        Rows<E> left, right;
    };
    Keys read_keys(const Sequence& s, const HeadGroup<A>& group, long kv_head, Span keys, Span there) {
        const bool unseen = c.mask.p || (c.left >= 0 && keys.begin < s.d - c.left);
        if constexpr (IN_PAIRS<E>) {
            const long size = keys.end - keys.begin;
            if (!unseen)
                return {block<E, S>(c.k, s, kv_head, there, c.D, k, false, Reads::numbers),
                        pair_rows(k_right, row_of<S>(c.k, s, kv_head, there.begin), c.k.i, size, c.D)};
            const Rows<A> found =
                without_unseen_by_all(s, group, block<A, S>(c.k, s, kv_head, there, c.D, k_wide), keys);
            for (long r = 0; r < size; ++r) factor_row(k + r * ld_k, found.p + r * found.ld, c.D);
            return {{k, ld_k}, pair_rows(k_right, found.p, found.ld, size, c.D)};
        } else {
            Rows<A> found = block<A, S>(c.k, s, kv_head, there, c.D, k);
            if (unseen) found = without_unseen_by_all(s, group, found, keys);
            return {found, found};
        }
    }

    // Keys that no query of the group sees: their NaN must not meet the zeros of ds.
    Rows<A> without_unseen_by_all(const Sequence& s, const HeadGroup<A>& group, Rows<A> from, Span keys) {
        bool finite = true;
        for (long r = 0; r < keys.end - keys.begin; ++r)
            finite = finite && is_finite(from.p + r * from.ld, c.D);
        if (finite) return from;
        for (long r = 0; r < keys.end - keys.begin; ++r) {
            if (from.p != k_wide) copy_scaled<A, A>(k_wide + r * ld_k, from.p + r * from.ld, c.D, 1);
            if (is_finite(k_wide + r * ld_k, c.D)) continue;
            bool seen = false;
            for (long at = 0; at < group.panels() && !seen; ++at) {
                const Panel<A> panel = group.panel(at);
                const Scores<A> scores(c, s, panel);
                for (long lane = 0; lane < panel.count; ++lane)
                    seen = seen || scores.sees(lane, keys.begin + r);
            }
            if (!seen)
                for (long j = 0; j < ld_k; ++j) k_wide[r * ld_k + j] = 0;
        }
        return {k_wide, ld_k};
    }

    void tiles(const Sequence& s, const Panel<A>* some, long count, Span seen, Span keys, const Keys& kr,
               Rows<E> vr, long unit, long t) {
        const long size = seen.end - seen.begin, skip = seen.begin - keys.begin, depth = count * W;
        const Rows<E> k_seen{kr.left.p + skip * kr.left.ld, kr.left.ld}, v_seen{vr.p + skip * vr.ld, vr.ld};
        for (long at = 0; at < count; ++at) {
            const Panel<A>& panel = some[at];
            E* const g_rows = g + at * W * ld_v;
            A *tile = p + at * W % LD, *d_tile = ds + at * W % LD;
            panel_right<E, S>(q + at * W * ld_k, c.q, s, panel, c.D);
            panel_right<E, S>(g_rows, c.grad_output, s, panel, c.Dv);
            if (IN_PAIRS<E> && c.grad_output.p) panel_rows<E, S>(rows, c.grad_output, s, panel, c.Dv, 1);
            panel_columns(columns_g, IN_PAIRS<E> ? rows : g_rows, c.grad_output.p ? panel.count : 0, c.Dv);
            const Again<E> again{columns_q, lse_rows};
            prepare_again<E, S>(c, s, panel, lse, rows, again);
            for (long lane = 0; lane < W; ++lane)
                delta[at * W + lane] =
                    lane < panel.count ? shared.delta[line_of(c, s, panel.h[lane], panel.i[lane])] : 0;
            const Scores<A> scores(c, s, panel);
            weights_again<E, S>(scores, again, k_seen, seen, tile, LD,
                                cap_slope ? cap_slope + at * W % LD : nullptr);
            const Ahead ask = ask_for_d_bias(s, panel, seen);
            gemm<E, 2>(size, v_seen.p, v_seen.ld, panel_of_columns(columns_g), 1, c.Dv, d_tile, LD, 0, false,
                       nullptr, &ask);
            if (c.dropout_p > 0 || c.grad_weights.p)
                weights_back(s, panel, tile, d_tile, at, seen);
            else
                scores_back(tile, d_tile, at, size);
            after_scores(s, scores, panel, d_tile, at, seen, unit, t);
            make_factors(tile, d_tile, at, size);
        }
        const E *p_rows = p_left, *ds_rows = ds_left, *ds_columns = ds_along;
        if constexpr (!IN_PAIRS<E>) p_rows = p, ds_rows = ds_columns = ds;
        const long ld_q = right_ld<E>(c.D), ld_g = right_ld<E>(c.Dv);
        if (c.d_v.p && c.grad_output.p)
            multiply_rows<E>(size, p_rows, ROWS, g, ld_g, plan.Nv, depth, dv + skip * ld_v, ld_v, true);
        if (c.d_k.p)
            multiply_rows<E>(size, ds_rows, ROWS, q, ld_q, plan.Nd, depth, dk + skip * ld_k, ld_k, true);
        if (c.d_q.p)
            multiply_along(depth, ds_columns, ROWS * STEP, from_row(kr.right, skip), plan.Nd, size, dq, ld_k,
                           false, last_pair);
        if (!c.d_q.p && !plan.rows) return;
        if (unit >= plan.groups) wait_for(&shared.done[unit - plan.groups], static_cast<int>(t + 1));
        for (long at = 0; at < count && c.d_q.p; ++at)
            for (long lane = 0; lane < some[at].count; ++lane) {
                A* to = row_of<A>(c.d_q, s, some[at].h[lane], s.from_q + some[at].i[lane]);
                const A* from = dq + (at * W + lane) * ld_k;
                for (long j = 0; j < c.D; j += n) {
                    const long left = c.D - j;
                    store_n<A>(to + j, load_n<A>(to + j, left) + load<A>(from + j), left);
                }
            }
        if (plan.rows)
            for (long at = 0; at < count; ++at)
                for (long lane = 0; lane < some[at].count; ++lane) {
                    const Panel<A>& panel = some[at];
                    shared.rows[line_of(c, s, panel.h[lane], panel.i[lane])] += row_sums[at * W + lane];
                }
    }

    // The weights and the gradients of the scores of a panel, as the products multiply them.
    SK_INLINE void make_factors(const A* tile, const A* d_tile, long at, long size) {
        if constexpr (IN_PAIRS<E>) {
            for (long key = 0; key < size; ++key) {
                const A *w = tile + key * LD, *d = d_tile + key * LD;
                store_both(p_left + key * ROWS + at * W, load<A>(w), load<A>(w + n));
                store_both(ds_left + key * ROWS + at * W, load<A>(d), load<A>(d + n));
            }
            for (long key = 0; key < size; key += STEP) SK_UNROLL
            for (int half = 0; half < 2; ++half) {
                const A* d = d_tile + key * LD + half * n;
                const Vec<A> odd = key + 1 < size ? load<A>(d + LD) : Vec<A>{};
                store_pairs(ds_along + key * ROWS + STEP * (at * W + half * n), load<A>(d), odd);
            }
        }
    }

    A row_sums[ROWS];

    // ds = p (dp - delta), in place of dp. A weight of 0 takes no gradient, not even that of a NaN.
    SK_INLINE void scores_back(A* tile, A* d_tile, long at, long size) {
        const Vec<A> taken[2] = {load<A>(delta + at * W), load<A>(delta + at * W + n)};
        const A scale = factor_of_scores();
        for (long key = 0; key < size; ++key) SK_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Vec<A> w = load<A>(tile + key * LD + half * n);
            A* to = d_tile + key * LD + half * n;
            const Vec<A> d = w * (load<A>(to) - taken[half]) * scale;
            store<A>(to, w == 0 ? Vec<A>{} : d);
        }
    }

    // The same where weights are dropped or have a gradient of their own; p becomes the dropped weights.
    void weights_back(const Sequence& s, const Panel<A>& panel, A* tile, A* d_tile, long at, Span seen) {
        const Vec<A> taken[2] = {load<A>(delta + at * W), load<A>(delta + at * W + n)};
        const A scale = factor_of_scores();
        const Dropout<A> dropout(c, s, panel);
        const PlaneRows<A> given(c.grad_weights, s, panel);
        for (long first = seen.begin; first < seen.end; first += 4) {
            const long count = min_of(4, seen.end - first);
            Vec<A> kept[2][4];
            SK_UNROLL
            for (int weight = 0; weight < 8; ++weight) kept[weight / 4][weight % 4] = Vec<A>{} + 1;
            if (c.dropout_p > 0) dropout.factors(first, kept);
            for (long half = 0; half < 2; ++half) {
                Vec<A> dw[n] = {};
                if (c.grad_weights.p) given.template keys<S>(half, first, min_of(count, n), dw);
                for (long j = 0; j < count; ++j) {
                    // a vector of two lanes is filled two keys at a time
                    if (n < 4 && j == n && c.grad_weights.p)
                        given.template keys<S>(half, first + n, count - n, dw);
                    A* p_at = tile + (first - seen.begin + j) * LD + half * n;
                    A* d_at = d_tile + (first - seen.begin + j) * LD + half * n;
                    const Vec<A> w = load<A>(p_at),
                                 dp = (load<A>(d_at) + dw[j % n] * weight_share()) * kept[half][j];
                    store<A>(p_at, w * kept[half][j]);
                    store<A>(d_at, w == 0 ? Vec<A>{} : w * (dp - taken[half]) * scale);
                }
            }
        }
    }

    // Without a cap or what takes the gradient of the scores themselves, their factor goes in at once.
    bool scores_matter() const { return c.softcap > 0 || c.d_bias.p || c.d_slopes; }
    A factor_of_scores() const { return scores_matter() ? 1 : static_cast<A>(c.scale); }

    // What the panel's queries add to the gradients of slopes, and of a bias that is one for all keys.
    void sums_of_rows(const Scores<A>& scores, const Panel<A>& panel, const A* d_tile, long at, Span seen,
                      long unit) {
        using I = typename Simd<A>::I;
        using Lane = __typeof__(I{}[0]);
        Vec<A> slope[2] = {}, row[2] = {};
        for (long key = 0; key < seen.end - seen.begin; ++key) SK_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Vec<A> d = load<A>(d_tile + key * LD + half * n);
            const I from = static_cast<Lane>(seen.begin + key) - scores.place[half];
            slope[half] -= d * __builtin_convertvector(from < 0 ? -from : from, Vec<A>);
            row[half] += d;
        }
        for (long lane = 0; lane < panel.count; ++lane) {
            row_sums[at * W + lane] = row[lane / n][lane % n];
            if (c.d_slopes)
                shared.slopes[unit * plan.G + panel.h[lane] % plan.G] +=
                    static_cast<double>(slope[lane / n][lane % n]);
        }
    }

    // The gradient of the scores goes to bias and slopes, then through the cap and the scale.
    void after_scores(const Sequence& s, const Scores<A>& scores, const Panel<A>& panel, A* d_tile, long at,
                      Span seen, long unit, long t) {
        if (!scores_matter()) return;
        const long size = seen.end - seen.begin;
        if (c.d_slopes || plan.rows) sums_of_rows(scores, panel, d_tile, at, seen, unit);
        if (plan.columns) {
            const bool one = panel.count < 2 || panel.h[0] == panel.h[1];  // heads side by side alternate
            for (long key = 0; key < size; ++key)
                for (long lane = 0; lane < panel.count; ++lane)
                    shared.columns[(s.b * c.Hq + panel.h[one ? 0 : lane]) * c.S + seen.begin + key] +=
                        d_tile[key * LD + lane];
        } else if (c.d_bias.p && !plan.rows) {
            const long before = unit_before(unit);
            if (before >= 0) wait_for(&shared.done[before], past_queries(s, panel, t * TOGETHER + at));
            long offsets[W];
            for (long lane = 0; lane < W; ++lane) offsets[lane] = place_in_d_bias(s, panel, lane, seen);
            tile_to_rows<A, true>(d_tile, LD, size, panel.count, static_cast<A*>(c.d_bias.p), offsets);
        }
        const A scale = static_cast<A>(c.scale);
        for (long key = 0; key < size; ++key) SK_UNROLL
        for (int half = 0; half < 2; ++half) {
            A* to = d_tile + key * LD + half * n;
            Vec<A> d = load<A>(to) * scale;
            if (cap_slope) d *= load<A>(cap_slope + key * LD + at * W % LD + half * n);
            store<A>(to, d);
        }
    }

    long place_in_d_bias(const Sequence& s, const Panel<A>& panel, long lane, Span seen) const {
        return s.b * c.d_bias.b + panel.h[lane] * c.d_bias.h + panel.i[lane] * c.d_bias.i + seen.begin;
    }
    // What a product before its use asks for, by itself or here.
    Ahead ask_for_d_bias(const Sequence& s, const Panel<A>& panel, Span seen) const {
        asm volatile("");  // as in Scores::fetch
        if (!c.d_bias.p || plan.columns || plan.rows) return {};
        const A* const to = static_cast<const A*>(c.d_bias.p);
        const long first = place_in_d_bias(s, panel, 0, seen), size = seen.end - seen.begin;
        const long step = panel.count > 1 ? place_in_d_bias(s, panel, 1, seen) - first : 0;
        const bool even =
            place_in_d_bias(s, panel, panel.count - 1, seen) - first == (panel.count - 1) * step;
        if (ASKS_AHEAD && step && even) return rows_of_lines(to + first, step, panel.count, size);
        for (long lane = 0; lane < panel.count; ++lane)
            ask_for(to + place_in_d_bias(s, panel, lane, seen), size);
        return {};
    }

    // How far that unit must be to have passed all panels that add to the same rows of d_bias as this one,
    // the p-th of its group: where heads share a bias, those of the same queries, which may lie in a later
    // block.
    int past_queries(const Sequence& s, const Panel<A>& panel, long p) const {
        if (c.start_q) return ALL_DONE;
        if (c.d_bias.h == 0) p = HeadGroup<A>(c, s, 0).last_beside(panel, p);
        return static_cast<int>(p / TOGETHER + 1);
    }

    // The unit that adds to the same part of d_bias before this one; -1 for none.
    long unit_before(long unit) const {
        const long bh = unit % plan.groups, b = bh / c.Hkv;
        const bool across_b = c.d_bias.b == 0, across_h = c.d_bias.h == 0;
        if (across_b && across_h) return bh > 0 ? unit - 1 : -1;
        if (across_h) return bh % c.Hkv > 0 ? unit - 1 : -1;
        if (across_b) return b > 0 ? unit - c.Hkv : -1;
        return -1;
    }

    static SK_INLINE void write(const Result& to, const Sequence& s, long h, Span rows, const A* from,
                                long ld, long size) {
        for (long r = rows.begin; r < rows.end; ++r) {
            S* row = row_of<S>(to, s, h, r);
            for (long at = 0; at < size; at += n)
                store_n<A>(row + at, load<A>(from + (r - rows.begin) * ld + at), size - at);
        }
    }
};

template <class A, class S>
unsigned long attention_backward_bytes(const AttentionBackward& c) {
    unsigned long bytes;
    BackwardPlan<A>(c).shared(c, nullptr, &bytes);
    return bytes;
}

template <class A, class S>
void attention_backward_run(const AttentionBackward& c, char* shared_base, const Team& team) {
    Scratch scratch(BackwardUnit<A, S>::bytes(c));
    char* memory = static_cast<char*>(scratch.p);
    const BackwardPlan<A> plan(c);
    const auto shared = plan.shared(c, shared_base);
    if (team.thread == 0) {
        for (int at = 0; at < 3; ++at) shared.next[at] = 0;
        for (long at = 0; at < plan.units(); ++at) shared.done[at] = 0;
    }
    if (!all_ready(team, memory)) return;
    Barrier* all = &team.barriers[team.threads];
    BackwardUnit<A, S> unit(c, memory, shared_base);
    for (long at; (at = take_ticket(shared.next)) < c.B * c.Hq;) {
        unit.prepare(at / c.Hq, at % c.Hq);
        if (c.grad_weights.p) unit.prepare_weights(at / c.Hq, at % c.Hq);
    }
    barrier(all, team.threads);
    for (long at; (at = take_ticket(shared.next + 1)) < plan.units();) unit.run(at);
    if (!c.d_slopes && !plan.columns && !plan.rows) return;
    barrier(all, team.threads);
    unit.reduce(team.thread, team.threads);
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
