// What stands between q k and the softmax: cap, bias, ALiBi, window, mask, and the weights that dropout
// keeps. A tile holds [key][W]: a lane is a query, so no step of the softmax crosses lanes.
#pragma once

#include "attention_rows.h"
#include "philox.h"
#include "vmath.h"

namespace seqkern {
namespace SEQKERN_ISA {

// What q is multiplied with before it meets the keys, or its products with them (`scale_behind`): scores come
// out in units of log 2, or as the cap takes them.
template <class A>
SK_INLINE A query_factor(const AttentionCall& c) {
    return finite<A>(c.softcap > 0 ? c.scale / c.softcap : c.scale * LOG2E);
}

// The rows of a plane [B, H, L, S] for the lanes of a panel. The bytes of a mask come as integers in the
// lanes' bits.
template <class A>
struct PlaneRows {
    using I = typename Simd<A>::I;
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
            for (long k = 0; k < count; ++k) out[k] = filled(from[at[0] + (first + k) * j]);
        } else if (j == 0) {
            Vec<A> row;
            for (long lane = 0; lane < n; ++lane) row[lane] = filled(from[at[half * n + lane]])[0];
            for (long k = 0; k < count; ++k) out[k] = row;
        } else if constexpr (BY_BITS<T>) {
            unsigned short shown[n] __attribute__((aligned(SEQKERN_VECTOR_BYTES)));
            SK_UNROLL
            for (long lane = 0; lane < n; ++lane)
                shown[lane] = bits_of(from + at[half * n + lane] + first, count);
            const I rows =
                __builtin_convertvector(*reinterpret_cast<const typename Simd<A>::Shorts*>(shown), I);
            for (long k = 0; k < count; ++k) out[k] = (Vec<A>)(rows & (1 << k));
        } else {
            SK_UNROLL
            for (long lane = 0; lane < n; ++lane)
                out[lane] = values(from + at[half * n + lane] + first, count);
            transpose<A>(out);
        }
    }

    // Asks for the rows' elements of these keys, ahead of their use.
    template <class T>
    SK_INLINE void fetch(long rows, Span keys) const {
        if (!p || j != 1) return;
        for (long lane = 0; lane < (same ? 1 : rows); ++lane) {
            const char* from = reinterpret_cast<const char*>(static_cast<const T*>(p) + at[lane]);
            const long end = keys.end * static_cast<long>(sizeof(T));
            for (long byte = keys.begin * static_cast<long>(sizeof(T)); byte < end; byte += 64)
                __builtin_prefetch(from + byte, 0, 2);
        }
    }

    // The same for a product to ask for, step by step; none where rows do not follow one another.
    template <class T>
    SK_INLINE Ahead ahead(long rows, Span keys) const {
        if (!ASKS_AHEAD || !p || j != 1 || rows < 2 || at[1] == at[0]) return {};
        if (at[rows - 1] - at[0] != (rows - 1) * (at[1] - at[0])) return {};
        return rows_of_lines(static_cast<const T*>(p) + at[0] + keys.begin, at[1] - at[0], rows,
                             keys.end - keys.begin);
    }

    // Lane: element of key first + lane in the row of one query, for lane < count.
    template <class T>
    SK_INLINE Vec<A> row(long query, long first, long count) const {
        const T* from = static_cast<const T*>(p) + at[query];
        return j == 0 ? filled(*from) : values(from + first, count);
    }

  private:
    // A mask's rows of sixteen keys as bits: a transpose would take four times as many shuffles as there are
    // keys.
    template <class T>
    static constexpr bool BY_BITS = __is_same(T, unsigned char) && SEQKERN_VECTOR_BYTES == 64 && n == 16;
    static SK_INLINE unsigned short bits_of(const unsigned char* from, long count) {
        unsigned short found = 0;
#if SEQKERN_VECTOR_BYTES == 64
        typedef char Row __attribute__((vector_size(16)));
        if (count >= 16) {
            Row bytes;
            __builtin_memcpy(&bytes, from, sizeof bytes);
            return __builtin_ia32_ptestmb128(bytes, bytes, 0xffff);
        }
#endif
        for (long k = 0; k < count; ++k) found |= static_cast<unsigned short>((from[k] != 0) << k);
        return found;
    }
    template <class T>
    static SK_INLINE Vec<A> filled(T x) {
        return Vec<A>{} + static_cast<A>(widen(x));
    }
    static SK_INLINE Vec<A> filled(unsigned char x) {
        return (Vec<A>)(I{} + static_cast<__typeof__(I{}[0])>(x));
    }
    template <class T>
    static SK_INLINE Vec<A> values(const T* from, long count) {
        return load_n<A>(from, count);
    }
    static SK_INLINE Vec<A> values(const unsigned char* from, long count) {
        if (count >= n) return (Vec<A>)load_bytes<A>(from);
        unsigned char bytes[n] = {};
        for (long k = 0; k < count; ++k) bytes[k] = from[k];
        return (Vec<A>)load_bytes<A>(bytes);
    }
};

// A panel's share of all that changes scores.
template <class A>
struct Scores {
    using I = typename Simd<A>::I;
    using Lane = __typeof__(I{}[0]);
    static constexpr long n = Simd<A>::n, W = 2 * n;
    static constexpr long LINE = n < 16 ? 16 : n;  // keys whose float biases are a line of the cache
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
                c.slopes ? finite<A>(c.slopes[s.b * c.Hq + panel.h[lane]] * LOG2E) : A{};
        }
    }

    // Keys whose scores stay as the matmul gave them.
    static SK_INLINE Span untouched(const AttentionCall& c, const Sequence& s, const Panel<A>& panel) {
        if (c.mask.p || c.bias.p || c.slopes || c.softcap > 0) return {0, 0};
        return seen_by_all(c, s, panel.first, panel.last);
    }
    SK_INLINE Span untouched() const { return untouched(c, s, panel); }

    // tile[key][ld] of these keys: products -> scores in units of log 2, -inf where hidden. If cap_slope is
    // given, d cap(x) / dx is left there, in the same layout.
    template <class S>
    SK_APART void apply(A* tile, long ld, Span keys, A* cap_slope) const {
        const Span plain = untouched();
        for (long line = keys.begin; line < keys.end; line += LINE) {
            const long end = min_of(line + LINE, keys.end);
            if (plain.holds({line, end})) continue;
            for (long half = 0; half < 2; ++half)
                for (long first = line; first < end; first += n) {
                    const long count = min_of(n, end - first);
                    const long at = (first - keys.begin) * ld + half * n;
                    chunk<S>(tile + at, cap_slope ? cap_slope + at : nullptr, ld, half, first, count);
                }
        }
    }

    // The same for one query, x of the keys first + lane: lanes are keys here.
    template <class S>
    SK_INLINE Vec<A> apply_along_keys(Vec<A> x, long query, long first, long count) const {
        const I from =
            lanes<A>([](int lane) { return lane; }) + static_cast<Lane>(first - panel.i[query] - s.d);
        if (c.softcap > 0) x = capped<1>({{x}}).v[0];
        if (c.bias.p)
            x = biased(x, c.bias_is_wide ? bias.template row<A>(query, first, count)
                                         : bias.template row<S>(query, first, count));
        x = placed(x, from, Vec<A>{} + slope[query / n][query % n]);
        return c.mask.p ? masked(x, mask.template row<unsigned char>(query, first, count)) : x;
    }

    // What comes from memory, masks and biases, is asked for before the matmul whose scores it changes, or by
    // it: what is returned.
    template <class S>
    SK_APART Ahead fetch(Span keys, bool by_product) const {
        asm volatile("");  // a function that only asks would be found to do nothing, and its calls left out
        Ahead found = !by_product      ? Ahead{}
                      : c.bias_is_wide ? bias.template ahead<A>(panel.count, keys)
                                       : bias.template ahead<S>(panel.count, keys);
        if (!found.rows) {
            if (c.bias_is_wide)
                bias.template fetch<A>(panel.count, keys);
            else
                bias.template fetch<S>(panel.count, keys);
            if (by_product) found = mask.template ahead<unsigned char>(panel.count, keys);
            if (found.rows) return found;
        }
        mask.template fetch<unsigned char>(panel.count, keys);
        return found;
    }

    // Whether the query of a lane sees a key.
    SK_INLINE bool sees(long lane, long key) const {
        const long at = key - (panel.i[lane] + s.d);
        if ((c.left >= 0 && at < -c.left) || (c.right >= 0 && at > c.right)) return false;
        return !c.mask.p || static_cast<const unsigned char*>(c.mask.p)[mask.at[lane] + key * mask.j];
    }

  private:
    // Each change takes its turn over all keys of the chunk, for what a call asks for is then looked up once.
    template <class S>
    SK_INLINE void chunk(A* x, A* cap_slope, long ld, long half, long first, long count) const {
        Vec<A> given[n];
        if (c.softcap > 0) cap(x, cap_slope, ld, count);
        if (c.bias.p) {
            if (c.bias_is_wide)
                bias.template keys<A>(half, first, count, given);
            else
                bias.template keys<S>(half, first, count, given);
            for (long k = 0; k < count; ++k) store<A>(x + k * ld, biased(load<A>(x + k * ld), given[k]));
        }
        if (c.slopes || windowed())
            for (long k = 0; k < count; ++k) {
                const I from = static_cast<Lane>(first + k) - place[half];
                store<A>(x + k * ld, placed(load<A>(x + k * ld), from, slope[half]));
            }
        if (c.mask.p) {
            mask.template keys<unsigned char>(half, first, count, given);
            for (long k = 0; k < count; ++k) store<A>(x + k * ld, masked(load<A>(x + k * ld), given[k]));
        }
    }

    static SK_INLINE Vec<A> hidden() { return Vec<A>{} - static_cast<A>(__builtin_inf()); }
    SK_INLINE bool windowed() const { return c.left >= 0 || c.right >= 0; }

    // d cap(x) / dx goes to `slope`, if that is given.
    template <int N>
    SK_INLINE Several<A, N> capped(const Several<A, N>& x, Several<A, N>* slope = nullptr) const {
        return tanh<A, N>(x, slope) * finite<A>(c.softcap * LOG2E);
    }
    SK_INLINE void cap(A* x, A* slopes, long ld, long count) const {
        constexpr int together = n < 4 ? n : 4;
        for (long k = 0; k < count; k += together) {
            const int most = static_cast<int>(min_of(together, count - k));
            Several<A, together> v, slope;
            SK_UNROLL
            for (int i = 0; i < together; ++i) v.v[i] = i < most ? load<A>(x + (k + i) * ld) : Vec<A>{};
            v = capped<together>(v, slopes ? &slope : nullptr);
            for (int i = 0; i < most; ++i) store<A>(x + (k + i) * ld, v.v[i]);
            for (int i = 0; slopes && i < most; ++i) store<A>(slopes + (k + i) * ld, slope.v[i]);
        }
    }
    // A finite bias leaves a finite score finite, also where it overflows in units of log 2: masks made of
    // the lowest number are common.
    static SK_INLINE Vec<A> biased(Vec<A> v, Vec<A> added) {
        const Vec<A> most = Vec<A>{} + static_cast<A>(sizeof(A) == 4 ? __FLT_MAX__ : __DBL_MAX__);
        const Vec<A> least = smaller(smaller(added, -most), v), highest = larger(larger(added, most), v);
        return smaller(highest, larger(least, v + added * static_cast<A>(LOG2E)));
    }
    static SK_INLINE Vec<A> masked(Vec<A> v, Vec<A> shown) { return (I)shown != 0 ? v : hidden(); }
    // from: j - i - d of each lane
    SK_INLINE Vec<A> placed(Vec<A> v, I from, Vec<A> slope) const {
        if (c.slopes) v -= slope * __builtin_convertvector(from < 0 ? -from : from, Vec<A>);
        if (!windowed()) return v;
        const long left = c.left < 0 ? FAR : c.left, right = c.right < 0 ? FAR : c.right;
        return (from >= static_cast<Lane>(-left)) & (from <= static_cast<Lane>(right)) ? v : hidden();
    }

    static constexpr long FAR = 1L << 30;
};

// tile[key][ld] becomes 2^(tile - shift), lane by lane, and is added to `sum`, if given: CHAINS keys by turns
// to sums of their own, [chain][half]. Weights made AGAIN from a rounded log-sum-exp are at most 1: around
// 1e9 one place is 128.
template <class A, int HALVES, int CHAINS = 1, bool AGAIN = false>
SK_INLINE void exponentials(A* tile, long ld, long keys, const Vec<A>* shift, Vec<A>* sum) {
    constexpr long n = Simd<A>::n;
    constexpr int together = 4;
    long k = 0;
    for (; k + together / HALVES <= keys; k += together / HALVES) {
        Several<A, together> x;
        SK_UNROLL
        for (int i = 0; i < together; ++i)
            x.v[i] = load<A>(tile + (k + i / HALVES) * ld + i % HALVES * n) - shift[i % HALVES];
        if (AGAIN) x = at_most(x, static_cast<A>(0));
        x = exp2_below<A, together>(x);
        SK_UNROLL
        for (int i = 0; i < together; ++i) {
            if (sum) sum[i / HALVES % CHAINS * HALVES + i % HALVES] += x.v[i];
            store<A>(tile + (k + i / HALVES) * ld + i % HALVES * n, x.v[i]);
        }
    }
    for (; k < keys; ++k) SK_UNROLL
    for (int half = 0; half < HALVES; ++half) {
        A* at = tile + k * ld + half * n;
        Several<A, 1> x{{load<A>(at) - shift[half]}};
        if (AGAIN) x = at_most(x, static_cast<A>(0));
        x = exp2_below<A, 1>(x);
        if (sum) sum[k % CHAINS * HALVES + half] += x.v[0];
        store<A>(at, x.v[0]);
    }
}

// tile[key][vectors of ld] times the factor of the scores, where q has met the keys without it.
template <class E, class A>
SK_INLINE void scale_behind(const AttentionCall& c, A* tile, long ld, long keys, long vectors) {
    if constexpr (IN_PAIRS<E>) {
        const A factor = query_factor<A>(c);
        for (long k = 0; k < keys; ++k)
            for (A* at = tile + k * ld; at < tile + k * ld + vectors * Simd<A>::n; at += Simd<A>::n)
                store<A>(at, load<A>(at) * factor);
    }
}

// tile[key][vectors of ld] as the left factor of `multiply_along`: for numbers of A itself, else pairs of
// keys in `to`, which may be the tile.
template <class E, class A>
SK_INLINE const E* factors_of_tile(const A* tile, long ld, long keys, long vectors, E* to) {
    if constexpr (IN_PAIRS<E>) {
        constexpr long n = Simd<A>::n;
        for (long k = 0; k < keys; k += 2) {
            Vec<A> even, odd;
            for (long v = 0; v < vectors; ++v) {
                even = load<A>(tile + k * ld + v * n);
                odd = k + 1 < keys ? load<A>(tile + (k + 1) * ld + v * n) : Vec<A>{};
                store_pairs(to + k * ld + 2 * v * n, even, odd);
            }
        }
        return to;
    } else {
        return tile;
    }
}

// The same for two keys to a vector, [key][n / 2].
template <class E, class A>
SK_INLINE const E* factors_of_pairs(const A* tile, long keys, E* to) {
    if constexpr (IN_PAIRS<E>) {
        constexpr long n = Simd<A>::n, pair = n / 2;
        constexpr auto swapped = lanes<A>([](int i) { return (i + pair) % n; });
        for (long k = 0; k < keys; k += 2) {
            const Vec<A> both = load<A>(tile + k * pair);
            store_pairs(to + k * pair, both, __builtin_shuffle(both, swapped));
        }
        return to;
    } else {
        return tile;
    }
}

template <class A>
SK_INLINE bool is_finite(const A* row, long size) {
    bool finite = true;
    for (long c = 0; c < size; ++c) finite = finite && row[c] - row[c] == 0;
    return finite;
}

// How many of the first of these keys a panel, or one before it, may meet without seeing them: all where a
// mask is given, and those before a window, whose first keys are those of a whole vector.
template <class A>
SK_INLINE long may_be_unseen(const AttentionCall& c, const Sequence& s, const Panel<A>& last, Span keys) {
    if (c.mask.p) return keys.end - keys.begin;
    return c.left < 0 ? 0 : max_of(0, min_of(keys.end, last.first + s.d - c.left) - keys.begin);
}

template <class A>
SK_INLINE bool all_finite(Rows<A> rows, long count, long size) {
    constexpr long n = Simd<A>::n;
    constexpr int together = 4;  // sums that need not wait for one another
    Vec<A> probe[together] = {};
    for (long r = 0; r < count; r += together)
        for (long at = 0; at < padded<A>(size); at += n) SK_UNROLL
    for (int i = 0; i < together; ++i)
        probe[i] += load<A>(rows.p + min_of(r + i, count - 1) * rows.ld + at) * A{};
    const Vec<A> all = (probe[0] + probe[1]) + (probe[2] + probe[3]);
    bool finite = true;
    for (long lane = 0; lane < n; ++lane) finite = finite && all[lane] == 0;
    return finite;
}

// Values, of which those that a panel does not see and that are not finite are zeroed in a copy, for a weight
// of 0 times NaN would be NaN. Panel by panel: which of them share a block of keys follows the threads.
template <class A>
SK_APART Rows<A> without_unseen(const AttentionCall& c, const Sequence& s, const Panel<A>& panel,
                                Rows<A> rows, Span keys, long size, A* buffer) {
    const Scores<A> scores(c, s, panel);
    const long ld = buffer_ld<A>(size);
    for (long r = 0; r < keys.end - keys.begin; ++r) {
        if (rows.p != buffer) copy_scaled<A, A>(buffer + r * ld, rows.p + r * rows.ld, size, 1);
        if (is_finite(buffer + r * ld, size)) continue;
        bool seen = false;
        for (long lane = 0; lane < panel.count && !seen; ++lane) seen = scores.sees(lane, keys.begin + r);
        if (!seen)
            for (long at = 0; at < padded<A>(size); ++at) buffer[r * ld + at] = 0;
    }
    return {buffer, ld};
}

// Which weights dropout keeps, for keys from a multiple of 4 on.
template <class A>
struct Dropout {
    using I = typename Simd<A>::I;
    static constexpr long n = Simd<A>::n, W = 2 * n;
    unsigned int below, b;
    A kept_factor;
    Words h[2], i[2];
    unsigned long seed;
    PhiloxLanes counters[2];

    SK_INLINE Dropout(const AttentionCall& c, const Sequence& s, const Panel<A>& panel)
        : below(c.drop_below),
          b(static_cast<unsigned int>(s.b)),
          kept_factor(static_cast<A>(c.dropout_p < 1 ? 1 / (1 - c.dropout_p) : 0)),
          h{of_half(panel.h, 0), of_half(panel.h, 1)},
          i{of_half(panel.i, 0), of_half(panel.i, 1)},
          seed(c.seed),
          counters{{seed, b, h[0], i[0]}, {seed, b, h[1], i[1]}} {}

    // Of one query and the keys first + lane.
    SK_INLINE Vec<A> along_keys(long query, long first) const {
        Words words[1][4] = {
            {Words{} + b, Words{} + h[query / n][query % n], Words{} + i[query / n][query % n]}};
        for (long lane = 0; lane < n; ++lane)
            words[0][3][lane] = static_cast<unsigned int>((first + lane) / 4);
        philox<1>(seed, words);
        Vec<A> found{};
        for (long lane = 0; lane < n; ++lane)
            if (words[0][(first + lane) % 4][lane] >> 8 >= below) found[lane] = kept_factor;
        return found;
    }

    // Of four keys and both halves of a panel: the factor of each weight, 0 or 1 / (1 - p).
    SK_INLINE void factors(long first, Vec<A> (*out)[4]) const {
        Words words[2][4];
        for (int half = 0; half < 2; ++half)
            counters[half].start(static_cast<unsigned int>(first / 4), words[half]);
        philox<2>(seed, words, 2);
        SK_UNROLL
        for (int at = 0; at < 8; ++at) {
            const Words& word = words[at / 4][at % 4];
            I bits;
            if constexpr (sizeof(A) == 4) {
                bits = (I)(word >> 8);
            } else {
                for (long lane = 0; lane < n; ++lane) bits[lane] = word[lane] >> 8;
            }
            out[at / 4][at % 4] =
                bits >= static_cast<__typeof__(I{}[0])>(below) ? Vec<A>{} + kept_factor : Vec<A>{};
        }
    }

  private:
    static SK_INLINE Words of_half(const long* from, long half) {
        Words found{};
        for (long lane = 0; lane < n; ++lane) found[lane] = static_cast<unsigned int>(from[half * n + lane]);
        return found;
    }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
