// The matmul of gemm.h for bfloat factors and float sums: each step along k takes two neighbours, which lie
// together. A rows hold K numbers, and a zero behind an odd K; a panel of B is [k / 2][W][2], with zeros for
// the second of an odd K. So `ld` of a panel is 2 W, and `lda` of a KMAJOR A [k / 2][rows][2] is 2 rows.
//
// With SEQKERN_BF16_DOT a step is one instruction, vdpbf16ps: two products joined to the sum, without regard
// to the rounding mode, rounded to nearest even after each. It takes subnormal numbers for zero and makes
// none: up to 2^-126 is lost for every element of a product, times the other factor where that is above one.
// Other machines widen the pairs and multiply as float.
#pragma once

#include "gemm.h"

namespace seqkern {
namespace SEQKERN_ISA {

template <>
struct Factor<bfloat> {
    static constexpr int depth = 2, width = 2 * Simd<float>::n;
    using Sum = float;
    using Each = typename Simd<float>::U;  // pairs, the number with the lower index in the lower half
    typedef unsigned int Unaligned __attribute__((vector_size(SEQKERN_VECTOR_BYTES), aligned(2), may_alias));

    static SK_INLINE Each spread(const bfloat* a) {
        unsigned int pair;
        __builtin_memcpy(&pair, a, sizeof pair);
        return Each{} + pair;
    }
    static SK_INLINE Each load(const bfloat* p) { return *reinterpret_cast<const Unaligned*>(p); }
    // The first n numbers, zeros behind them.
    template <class S>
    static SK_INLINE Each load(const S* p, long n) {
        if constexpr (__is_same(S, bfloat))
            if (n >= width) return load(p);
        bfloat near[width] = {};
        for (long i = 0; i < min_of(n, width); i += width / 2)
            store_n<float>(near + i, load_n<float>(p + i, n - i), width / 2);
        return load(near);
    }
    static SK_INLINE void store(bfloat* to, Each pairs) { *reinterpret_cast<Unaligned*>(to) = pairs; }
    static SK_INLINE void add(Vec<float>& sum, Each a, Each b) {
#ifdef SEQKERN_BF16_DOT
        sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        sum += upper(a) * upper(b);
        sum += lower(a) * lower(b);
#endif
    }
    static SK_INLINE Vec<float> lower(Each pairs) { return (Vec<float>)(pairs << 16); }
    static SK_INLINE Vec<float> upper(Each pairs) { return (Vec<float>)(pairs & 0xffff0000u); }

    using Mask = Each;
    static SK_INLINE Mask last(int count) {
        const auto at = lanes<float>([](int i) { return 2 * i; });  // of the lower number
        return ((Mask)(at >= width - count) & 0xffffu) | ((Mask)(at + 1 >= width - count) & 0xffff0000u);
    }
    static SK_INLINE Each masked(Each x, Mask mask) { return x & mask; }
};

// What the matmuls multiply: bfloats as they are where one instruction multiplies them, else A.
template <class A, class S>
struct FactorsOf {
    using E = A;
};
#ifdef SEQKERN_BF16_DOT
template <>
struct FactorsOf<float, bfloat> {
    using E = bfloat;
};
SK_TILES(bfloat, extern)
#endif

// The bfloats of n numbers, one in each lane, zeros behind them.
template <class S>
SK_INLINE typename Simd<float>::U bfloat_bits(const S* p, long n) {
    if constexpr (__is_same(S, bfloat)) {
        return (typename Simd<float>::U)load_n<float>(p, n) >> 16;
    } else {
        return rounded_bits<float>(load_n<float>(p, n));
    }
}

// Two vectors as bfloats: their numbers in pairs, or one vector behind the other.
#ifdef SEQKERN_BF16_DOT
typedef short BfloatBits __attribute__((vector_size(64)));
SK_INLINE BfloatBits bfloats_of(Vec<float> first, Vec<float> second) {
    return (BfloatBits)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
SK_INLINE void store_pairs(bfloat* to, Vec<float> even, Vec<float> odd) {
    constexpr BfloatBits by_turns = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    Factor<bfloat>::store(to, (Simd<float>::U)__builtin_shuffle(bfloats_of(even, odd), by_turns));
}
SK_INLINE void store_both(bfloat* to, Vec<float> first, Vec<float> second) {
    Factor<bfloat>::store(to, (Simd<float>::U)bfloats_of(first, second));
}
#endif

// Two rows of a panel: to[0..W)[2] = (even[j], odd[j]) for j < columns, zeros behind; no `odd` behind an odd
// K.
template <class S>
SK_INLINE void pack_pair(bfloat* to, long W, const S* even, const S* odd, long columns) {
    for (long j = 0; j < W; j += Simd<float>::n) {
        typename Simd<float>::U pairs{};
        if (columns > j) pairs = bfloat_bits(even + j, columns - j);
        if (columns > j && odd) pairs |= bfloat_bits(odd + j, columns - j) << 16;
        Factor<bfloat>::store(to + 2 * j, pairs);
    }
}

// Panel column block: to[k / 2][0..n)[2] (row stride 2 W) = w[0..lanes)[k] for k < K; w has K contiguous per
// row (stride ldw).
template <class A, class S>
    requires(__is_same(A, bfloat))
void pack_transposed(A* to, long W, const S* w, long ldw, long lanes, long K) {
    constexpr int n = Simd<float>::n;
    for (long k = 0; k < K; k += 2 * n) {
        Vec<float> block[n];
        SK_UNROLL
        for (int i = 0; i < n; ++i)
            block[i] = i < lanes ? (Vec<float>)Factor<bfloat>::load(w + i * ldw + k, K - k) : Vec<float>{};
        transpose<float>(block);
        const long steps = min_of(n, ceil_div(K - k, 2));
        SK_UNROLL
        for (int i = 0; i < n; ++i)
            if (i < steps) Factor<bfloat>::store(to + (k + 2 * i) * W, (typename Simd<float>::U)block[i]);
    }
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
