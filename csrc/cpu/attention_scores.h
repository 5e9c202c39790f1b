// What stands between q k and the softmax: cap, bias, ALiBi, window, mask, and the weights that dropout
// keeps. A tile holds [key][W]: a lane is a query, so no step of the softmax crosses lanes.
#pragma once

#include "attention_rows.h"
#include "philox.h"
#include "vmath.h"

namespace seqkern {
namespace SEQKERN_ISA {

// What q is multiplied with before it meets the keys: scores come out in units of log 2, or as the cap takes
// them.
template <class A>
SK_INLINE A query_factor(const AttentionCall& c) {
    return static_cast<A>(c.softcap > 0 ? c.scale / c.softcap : c.scale * LOG2E);
}

// The rows of a plane [B, H, L, S] for the lanes of a panel.
template <class A>
struct PlaneRows {
    static constexpr long n = Simd<A>::n, W = 2 * n;
    const void* p;
    long at[W] = {}, j;
    bool same = false;  // one row for all lanes

    SK_INLINE PlaneRows(const Plane& plane, const Sequence& s, const Panel<A>& panel)
        : p(plane.p), j(plane.j) {
        if (!p) return;
        same = true;
        for (long lane = 0; lane < W; ++lane) {
            at[lane] = s.b * plane.b + panel.h[lane] * plane.h + panel.i[lane] * plane.i;
            same = same && at[lane] == at[0];
        }
    }

    // out[k], lane: element of key first + k, for k < count <= n.
    template <class T>
    SK_INLINE void keys(long half, long first, long count, Vec<A>* out) const {
        const T* from = static_cast<const T*>(p);
        if (same) {
            for (long k = 0; k < count; ++k) out[k] = Vec<A>{} + value(from[at[0] + (first + k) * j]);
        } else if (j == 0) {
            Vec<A> row;
            for (long lane = 0; lane < n; ++lane) row[lane] = value(from[at[half * n + lane]]);
            for (long k = 0; k < count; ++k) out[k] = row;
        } else {
            SK_UNROLL
            for (long lane = 0; lane < n; ++lane)
                out[lane] = values(from + at[half * n + lane] + first, count);
            transpose<A>(out);
        }
    }

  private:
    template <class T>
    static SK_INLINE A value(T x) {
        return static_cast<A>(widen(x));
    }
    static SK_INLINE A value(unsigned char x) { return x; }
    template <class T>
    static SK_INLINE Vec<A> values(const T* from, long count) {
        return load_n<A>(from, count);
    }
    static SK_INLINE Vec<A> values(const unsigned char* from, long count) {
        typename Simd<A>::Bytes bytes{};
        if (count >= n) {
            __builtin_memcpy(&bytes, from, n);
        } else {
            for (long k = 0; k < count; ++k) bytes[k] = from[k];
        }
        return __builtin_convertvector(bytes, Vec<A>);
    }
};

// A panel's share of all that changes scores.
template <class A>
struct Scores {
    using I = typename Simd<A>::I;
    static constexpr long n = Simd<A>::n, W = 2 * n;
    const AttentionCall& c;
    const Sequence& s;
    const Panel<A>& panel;
    PlaneRows<A> mask, bias;
    I place[2];       // i + d
    Vec<A> slope[2];  // in units of log 2

    SK_INLINE Scores(const AttentionCall& c, const Sequence& s, const Panel<A>& panel)
        : c(c), s(s), panel(panel), mask(c.mask, s, panel), bias(c.bias, s, panel) {
        for (long lane = 0; lane < W; ++lane) {
            place[lane / n][lane % n] = panel.i[lane] + s.d;
            slope[lane / n][lane % n] =
                c.slopes ? static_cast<A>(c.slopes[s.b * c.Hq + panel.h[lane]] * LOG2E) : A{};
        }
    }

    // Whether scores of these keys stay as the matmul gave them.
    SK_INLINE bool untouched(Span keys) const {
        if (c.mask.p || c.bias.p || c.slopes || c.softcap > 0) return false;
        const Span all = seen_by_all(c, s, panel.first, panel.last);
        return all.begin <= keys.begin && keys.end <= all.end;
    }

    // tile[key][ld] of these keys: products -> scores in units of log 2, -inf where hidden. If cap_slope is
    // given, d cap(x) / dx is left there, in the same layout.
    template <class S>
    SK_INLINE void apply(A* tile, long ld, Span keys, A* cap_slope) const {
        if (untouched(keys)) return;
        for (long first = keys.begin; first < keys.end; first += n)
            for (long half = 0; half < 2; ++half) {
                const long count = min_of(n, keys.end - first), at = (first - keys.begin) * ld + half * n;
                chunk<S>(tile + at, cap_slope ? cap_slope + at : nullptr, ld, half, first, count);
            }
    }

    // Whether the query of a lane sees a key.
    SK_INLINE bool sees(long lane, long key) const {
        const long at = key - (panel.i[lane] + s.d);
        if ((c.left >= 0 && at < -c.left) || (c.right >= 0 && at > c.right)) return false;
        return !c.mask.p || static_cast<const unsigned char*>(c.mask.p)[mask.at[lane] + key * mask.j];
    }

  private:
    template <class S>
    SK_INLINE void chunk(A* x, A* cap_slope, long ld, long half, long first, long count) const {
        const Vec<A> hidden = Vec<A>{} - static_cast<A>(__builtin_inf());
        Vec<A> added[n], shown[n];
        if (c.bias.p) {
            if (c.bias_is_wide)
                bias.template keys<A>(half, first, count, added);
            else
                bias.template keys<S>(half, first, count, added);
        }
        if (c.mask.p) mask.template keys<unsigned char>(half, first, count, shown);
        const A cap = static_cast<A>(c.softcap * LOG2E);
        const long left = c.left < 0 ? far() : c.left, right = c.right < 0 ? far() : c.right;
        const bool banded = c.left >= 0 || c.right >= 0;
        for (long k = 0; k < count; ++k) {
            Vec<A> v = load<A>(x + k * ld);
            const I from = static_cast<Lane>(first + k) - place[half];
            if (c.softcap > 0) {
                const Vec<A> t = tanh<A>(v);
                if (cap_slope) store<A>(cap_slope + k * ld, 1 - t * t);
                v = t * cap;
            }
            if (c.bias.p) v += added[k] * static_cast<A>(LOG2E);
            if (c.slopes) {
                const Vec<A> distance = __builtin_convertvector(from < 0 ? -from : from, Vec<A>);
                v -= slope[half] * distance;
            }
            if (banded)
                v = (from >= static_cast<Lane>(-left)) & (from <= static_cast<Lane>(right)) ? v : hidden;
            if (c.mask.p) v = shown[k] != 0 ? v : hidden;
            store<A>(x + k * ld, v);
        }
    }

    using Lane = __typeof__(I{}[0]);
    static constexpr long far() { return 1L << 30; }
};

// Which weights dropout keeps: for keys first..first + 3 (first a multiple of 4) one vector each, -1 where
// kept.
template <class A>
struct Dropout {
    using I = typename Simd<A>::I;
    static constexpr long n = Simd<A>::n, W = 2 * n;
    static constexpr long WORDS = SEQKERN_VECTOR_BYTES / 4;
    unsigned long seed;
    unsigned int below, b;
    A kept_factor;
    unsigned int h[W], i[W];

    SK_INLINE Dropout(const AttentionCall& c, const Sequence& s, const Panel<A>& panel)
        : seed(c.seed),
          below(c.drop_below),
          b(static_cast<unsigned int>(s.b)),
          kept_factor(static_cast<A>(c.dropout_p < 1 ? 1 / (1 - c.dropout_p) : 0)) {
        for (long lane = 0; lane < W; ++lane)
            h[lane] = static_cast<unsigned int>(panel.h[lane]),
            i[lane] = static_cast<unsigned int>(panel.i[lane]);
    }

    // Of four keys: the factor of each weight, 0 or 1 / (1 - p).
    SK_INLINE void factors(long half, long first, Vec<A>* out) const {
        Words counter[4] = {};
        for (long lane = 0; lane < n; ++lane)
            counter[1][lane] = h[half * n + lane], counter[2][lane] = i[half * n + lane];
        counter[0] += b;
        counter[3] += static_cast<unsigned int>(first / 4);
        philox(seed, counter);
        SK_UNROLL
        for (int word = 0; word < 4; ++word) {
            I bits;
            if constexpr (sizeof(A) == 4) {
                bits = (I)(counter[word] >> 8);
            } else {
                for (long lane = 0; lane < n; ++lane) bits[lane] = counter[word][lane] >> 8;
            }
            out[word] = bits >= static_cast<__typeof__(I{}[0])>(below) ? Vec<A>{} + kept_factor : Vec<A>{};
        }
    }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
