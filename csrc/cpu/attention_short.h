// Few keys, no options and no gradient to come: the scores of a query fit in some vectors, and a row takes
// less time than to pack anything would. Not where the log-sum-exp is kept: the backward makes the scores
// again and sums them up in the order of the matmul, and from what another order left its weights would err.
#pragma once

#include "attention_few.h"

namespace seqkern {
namespace SEQKERN_ISA {

template <class A, class S>
struct ShortRows {
    static constexpr long n = Simd<A>::n, M = ROWS_TOGETHER, VECTORS = 6, VECTORS_OF_NARROW = 32;
    const AttentionForward& c;
    A* q;  // [M][buffer_ld(D)]

    static unsigned long numbers(const AttentionForward& c) { return M * buffer_ld<A>(c.D); }

    static bool serves(const AttentionForward& c) {
        const bool optional = c.start_q || c.bottom_right || c.mask.p || c.bias.p || c.slopes || c.sinks ||
                              c.softcap > 0 || c.left >= 0 || c.right > 0 || c.dropout_p > 0 || c.lse.p;
        if (optional || c.S == 0) return false;
        // Where there are more queries a matmul reads their keys for all of them.
        const long queries = c.L * (c.Hq / c.Hkv);
        return c.S == 1 || (queries == 1 && c.S <= most_keys(c)) || (queries <= n / 2 && c.S <= n);
    }
    // Of a row that fills no more than a vector the few multiply-adds do not pay for streams and panels.
    static long most_keys(const AttentionForward& c) {
        return (c.D <= n && c.Dv <= n ? VECTORS_OF_NARROW : VECTORS) * n;
    }

    // This thread's rows. Of one key in the order that the output lies in: they are little more than new
    // memory, whose pages two threads had better not share.
    void run(const Team& team) const {
        const Range mine = share(c.B * c.Hq * c.L, team.thread, team.threads);
        if (c.S == 1) {
            const bool within = c.output.h < c.output.i;  // heads within a row
            const long inner = within ? c.Hq : c.L, outer = within ? c.L : c.Hq;
            for (long row = mine.begin; row < mine.end;) {
                const Sequence s = sequence(c, row / c.L / c.Hq);
                const long at = row / inner % outer, end = min_of(mine.end, (row / inner + 1) * inner);
                for (; row < end; ++row) one_key(s, within ? row % inner : at, within ? at : row % inner);
            }
            return;
        }
        for (long row = mine.begin; row < mine.end;) {
            const Sequence s = sequence(c, row / c.L / c.Hq);
            const long h = row / c.L % c.Hq, i = row % c.L, left = min_of(c.L - i, mine.end - row);
            if (c.right < 0 && left >= M) {
                rows<M>(s, h, i);
                row += M;
            } else {
                rows<1>(s, h, i);
                row += 1;
            }
        }
    }

  private:
    // The softmax of one score is 1, unless that is not a finite number.
    void one_key(const Sequence& s, long h, long i) const {
        const long kv = h / (c.Hq / c.Hkv);
        const S *k = row_of<S>(c.k, s, kv, 0), *v = row_of<S>(c.v, s, kv, 0), *q = row_of<S>(c.q, s, h, i);
        S* to = row_of<S>(c.output, s, h, i);
        Vec<A> sums[2] = {};
        long at = 0;
        for (; at + 2 * n <= c.D; at += 2 * n) SK_UNROLL
        for (int j = 0; j < 2; ++j) sums[j] += load_whole<A>(q + at + j * n) * load_whole<A>(k + at + j * n);
        for (; at < c.D; at += n) sums[0] += load_n<A>(q + at, c.D - at) * load_n<A>(k + at, c.D - at);
        sums[0] += sums[1];
        A score = 0;
        for (long lane = 0; lane < n; ++lane) score += sums[0][lane];
        score *= query_factor<A>(c);
        const A weight = score == -static_cast<A>(__builtin_inf()) ? A{} : score - score + 1;
        for (at = 0; at < c.Dv; at += n)
            store_n<A>(to + at, load_n<A>(v + at, c.Dv - at) * weight, c.Dv - at);
    }

    // Queries that see the same keys.
    template <int R>
    void rows(const Sequence& s, long h, long i) const {
        const A hidden = -static_cast<A>(__builtin_inf());
        const long ld = buffer_ld<A>(c.D), kv = h / (c.Hq / c.Hkv);
        const long keys = c.right < 0 ? s.S : max_of(0, min_of(s.S, i + s.d + 1));
        const S *k = row_of<S>(c.k, s, kv, 0), *v = row_of<S>(c.v, s, kv, 0);
        Multiplied<A> by[R];
        SK_UNROLL
        for (int r = 0; r < R; ++r) {
            copy_scaled<A, S>(q + r * ld, row_of<S>(c.q, s, h, i + r), c.D, query_factor<A>(c));
            by[r] = Multiplied<A>(q + r * ld, c.D);
        }
        A p[R][(R == 1 ? VECTORS_OF_NARROW : VECTORS) * n] __attribute__((aligned(SEQKERN_VECTOR_BYTES)));
        Vec<A> top[R];
        SK_UNROLL
        for (int r = 0; r < R; ++r) top[r] = Vec<A>{} + hidden;
        for (long at = 0; at < keys; at += n) {
            const long count = min_of(n, keys - at);
            const auto there = lanes<A>([](int lane) { return lane; }) < static_cast<int>(count);
            Vec<A> x[R];
            dot_rows<A, R>(k + at * c.k.i, c.k.i, count, by, x);
            SK_UNROLL
            for (int r = 0; r < R; ++r) {
                x[r] = there ? x[r] : Vec<A>{} + hidden;
                top[r] = larger(x[r], top[r]);
                store<A>(p[r] + at, x[r]);
            }
        }
        A factor[R];
        for (int r = 0; r < R; ++r) {
            A m = hidden, l = 0;
            for (long lane = 0; lane < n; ++lane) m = top[r][lane] > m ? top[r][lane] : m;
            const A shift = m == hidden ? A{} : m;
            Vec<A> sum{};
            for (long at = 0; at < keys; at += n) {
                const Vec<A> e = exp2_below<A>(load<A>(p[r] + at) - shift);
                sum += e;
                store<A>(p[r] + at, e);
            }
            for (long lane = 0; lane < n; ++lane) l += sum[lane];
            factor[r] = l == 0 ? A{} : 1 / l;
        }
        // Sums that need not wait for one another; only where every split of the rows has them.
        constexpr int APART = R == 1 ? 4 : 1;
        const bool alone = R == 1 && c.L == 1;
        for (long at = 0; at < c.Dv; at += n) {
            Vec<A> out[R] = {}, apart[APART] = {};
            long key = 0;
            for (; alone && key + APART <= keys; key += APART) SK_UNROLL
            for (int i = 0; i < APART; ++i)
                apart[i] += load_n<A>(v + (key + i) * c.v.i + at, c.Dv - at) * p[0][key + i];
            for (; key < keys; ++key) {
                const Vec<A> x = load_n<A>(v + key * c.v.i + at, c.Dv - at);
                SK_UNROLL
                for (int r = 0; r < R; ++r) out[r] += x * p[r][key];
            }
            SK_UNROLL
            for (int i = 0; i < APART; ++i) out[0] += apart[i];
            SK_UNROLL
            for (int r = 0; r < R; ++r)
                store_n<A>(row_of<S>(c.output, s, h, i + r) + at, out[r] * factor[r], c.Dv - at);
        }
    }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
