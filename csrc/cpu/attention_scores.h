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

    // Lane: element of key first + lane in the row of one query, for lane < count.
    template <class T>
    SK_INLINE Vec<A> row(long query, long first, long count) const {
        const T* from = static_cast<const T*>(p) + at[query];
        return j == 0 ? Vec<A>{} + value(*from) : values(from + first, count);
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
    using Lane = __typeof__(I{}[0]);
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

    // The same for one query, x of the keys first + lane: lanes are keys here.
    template <class S>
    SK_INLINE Vec<A> apply_along_keys(Vec<A> x, long query, long first, long count) const {
        const I from =
            lanes<A>([](int lane) { return lane; }) + static_cast<Lane>(first - panel.i[query] - s.d);
        Vec<A> added{}, shown{};
        if (c.bias.p)
            added = c.bias_is_wide ? bias.template row<A>(query, first, count)
                                   : bias.template row<S>(query, first, count);
        if (c.mask.p) shown = mask.template row<unsigned char>(query, first, count);
        return changed(x, from, added, Vec<A>{} + slope[query / n][query % n], shown, nullptr);
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
        Vec<A> added[n], shown[n];
        if (c.bias.p) {
            if (c.bias_is_wide)
                bias.template keys<A>(half, first, count, added);
            else
                bias.template keys<S>(half, first, count, added);
        }
        if (c.mask.p) mask.template keys<unsigned char>(half, first, count, shown);
        for (long k = 0; k < count; ++k) {
            const I from = static_cast<Lane>(first + k) - place[half];
            const Vec<A> add = c.bias.p ? added[k] : Vec<A>{}, show = c.mask.p ? shown[k] : Vec<A>{};
            A* to_slope = cap_slope ? cap_slope + k * ld : nullptr;
            store<A>(x + k * ld, changed(load<A>(x + k * ld), from, add, slope[half], show, to_slope));
        }
    }

    // from: j - i - d of each lane; added and shown: of bias and mask, where the call has them.
    SK_INLINE Vec<A> changed(Vec<A> v, I from, Vec<A> added, Vec<A> slope, Vec<A> shown, A* cap_slope) const {
        const Vec<A> hidden = Vec<A>{} - static_cast<A>(__builtin_inf());
        if (c.softcap > 0) {
            Vec<A> of_cap;
            const Vec<A> t = tanh<A>(v, cap_slope ? &of_cap : nullptr);
            if (cap_slope) store<A>(cap_slope, of_cap);
            v = t * static_cast<A>(c.softcap * LOG2E);
        }
        if (c.bias.p) v += added * static_cast<A>(LOG2E);
        if (c.slopes) v -= slope * __builtin_convertvector(from < 0 ? -from : from, Vec<A>);
        if (c.left >= 0 || c.right >= 0) {
            const long left = c.left < 0 ? FAR : c.left, right = c.right < 0 ? FAR : c.right;
            v = (from >= static_cast<Lane>(-left)) & (from <= static_cast<Lane>(right)) ? v : hidden;
        }
        return c.mask.p ? (shown != 0 ? v : hidden) : v;
    }

    static constexpr long FAR = 1L << 30;
};

template <class A>
SK_INLINE bool is_finite(const A* row, long size) {
    bool finite = true;
    for (long c = 0; c < size; ++c) finite = finite && row[c] - row[c] == 0;
    return finite;
}

// A row that no query of these panels sees and that is not finite is zeroed in a copy, for a weight of 0
// times NaN would be NaN. There are such rows where a mask is given, and before a window, whose first keys
// are those of a whole vector.
template <class A>
SK_INLINE Rows<A> without_unseen(const AttentionCall& c, const Sequence& s, const Panel<A>* panels,
                                 long count, Rows<A> rows, Span keys, long size, A* buffer) {
    if (!c.mask.p && (c.left < 0 || keys.begin >= panels[0].first + s.d - c.left)) return rows;
    constexpr long n = Simd<A>::n;
    Vec<A> probe{};
    for (long r = 0; r < keys.end - keys.begin; ++r)
        for (long at = 0; at < padded<A>(size); at += n) probe += load<A>(rows.p + r * rows.ld + at) * A{};
    bool finite = true;
    for (long lane = 0; lane < n; ++lane) finite = finite && probe[lane] == 0;
    if (finite) return rows;
    const long ld = buffer_ld<A>(size);
    for (long r = 0; r < keys.end - keys.begin; ++r) {
        if (rows.p != buffer) copy_scaled<A, A>(buffer + r * ld, rows.p + r * rows.ld, size, 1);
        if (is_finite(buffer + r * ld, size)) continue;
        bool seen = false;
        for (long p = 0; p < count && !seen; ++p) {
            const Scores<A> scores(c, s, panels[p]);
            for (long lane = 0; lane < panels[p].count; ++lane)
                seen = seen || scores.sees(lane, keys.begin + r);
        }
        if (!seen)
            for (long at = 0; at < padded<A>(size); ++at) buffer[r * ld + at] = 0;
    }
    return {buffer, ld};
}

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

    // Of one query and the keys first + lane.
    SK_INLINE Vec<A> along_keys(long query, long first) const {
        Words counter[4] = {Words{} + b, Words{} + h[query], Words{} + i[query], Words{}};
        for (long lane = 0; lane < n; ++lane)
            counter[3][lane] = static_cast<unsigned int>((first + lane) / 4);
        philox(seed, counter);
        Vec<A> found{};
        for (long lane = 0; lane < n; ++lane)
            if (counter[(first + lane) % 4][lane] >> 8 >= below) found[lane] = kept_factor;
        return found;
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
