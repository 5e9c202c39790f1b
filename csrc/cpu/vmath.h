// exp, 2^x, sigmoid and tanh on vectors, for float and double. NaN stays NaN; the whole range is finite and
// monotone at its ends.
#pragma once

#include "simd.h"

namespace seqkern {
namespace SEQKERN_ISA {

// Interpolants of (e^r - 1 - r) / r^2 at the Chebyshev nodes of |r| <= ln(2)/2, lowest power first.
// Relative error against e^r: float 1.1e-8, double 2.3e-19.
template <class A>
struct ExpTable;

template <>
struct ExpTable<float> {
    static constexpr int terms = 5;
    static constexpr float c[terms] = {0.5f, 0.16666576666119928f, 0.04166655421298415f,
                                       0.008363232883682618f, 0.0013926250831497612f};
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float round_magic = 12582912.0f;
    static constexpr float lowest = -87.3365f, highest = 88.7228317f, overflow = 88.9f, tanh_limit = 20.0f;
    static constexpr int mantissa_bits = 23;
};

template <>
struct ExpTable<double> {
    static constexpr int terms = 11;
    static constexpr double c[terms] = {0.5,
                                        0.1666666666666667103,
                                        0.041666666666666669783,
                                        0.0083333333333260831202,
                                        0.0013888888888883711167,
                                        0.00019841269875002278793,
                                        0.0000248015873256774619,
                                        2.7557255170000887438e-6,
                                        2.7557273478718580474e-7,
                                        2.5105312729622101787e-8,
                                        2.09147553258932022e-9};
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
    static constexpr double round_magic = 6755399441055744.0;
    static constexpr double lowest = -708.3964, highest = 709.782712893384, overflow = 709.9,
                            tanh_limit = 40.0;
    static constexpr int mantissa_bits = 52;
};

// c[0] + c[1] r + ...
template <class A, int N, int terms>
SK_INLINE Several<A, N> polynomial(const Several<A, N>& r, const A (&c)[terms]) {
    Several<A, N> q = r * c[terms - 1] + c[terms - 2];
    SK_UNROLL
    for (int term = terms - 3; term >= 0; --term) q = q * r + c[term];
    return q;
}

// 2^n of x = n + round_magic, times a unit that is a power of two.
template <class A, int N>
SK_INLINE Several<A, N> power(const Several<A, N>& x, const Several<A, N>& unit) {
    using U = typename Simd<A>::U;  // wraps where a lane holds a NaN
    Several<A, N> found;
    SK_UNROLL
    for (int i = 0; i < N; ++i)
        found.v[i] = (Vec<A>)(((U)x.v[i] << ExpTable<A>::mantissa_bits) + (U)unit.v[i]);
    return found;
}
template <class A, int N>
SK_INLINE Several<A, N> ones() {
    Several<A, N> found;
    SK_UNROLL
    for (int i = 0; i < N; ++i) found.v[i] = Vec<A>{} + 1;
    return found;
}

// x = n ln 2 + r: scale = 2^n unit, poly = e^r - 1, for x >= lowest; unit is a power of two.
template <class A, int N>
SK_INLINE void exp_parts(const Several<A, N>& x, Several<A, N>& scale, Several<A, N>& poly,
                         const Several<A, N>& unit = ones<A, N>()) {
    using T = ExpTable<A>;
    const Several<A, N> shifted = x * static_cast<A>(1.44269504088896340736) + T::round_magic,
                        n = shifted - T::round_magic;
    Several<A, N> r = x - n * T::ln2_high;
    r = r - n * T::ln2_low;
    poly = (r * r) * polynomial<A, N>(r, T::c) + r;
    scale = power<A, N>(shifted, unit);
}

// Interpolants of (2^r - 1) / r at the Chebyshev nodes of |r| <= 1/2. Relative error against 2^r:
// float 5.1e-9, double 8.5e-18.
template <class A>
struct Exp2Table;

template <>
struct Exp2Table<float> {
    static constexpr int terms = 6;
    static constexpr float c[terms] = {0.693147188026228781f,  0.240226507605681269f,
                                       0.0555035711421907782f, 0.00961808255727785f,
                                       0.00133908633646712f,   0.000154531629451206902f};
    static constexpr float lowest = -127.0f;
};

template <>
struct Exp2Table<double> {
    static constexpr int terms = 11;
    static constexpr double c[terms] = {
        0.693147180559945309417,     0.2402265069591009822,       0.0555041086648215943387,
        0.00961812910760688852728,   0.00133335581464169353104,   0.000154035304417360501549,
        0.0000152527338298361183944, 0.0000013215442587921689653, 1.01780624458457735207e-7,
        7.07258594926922369986e-9,   4.45496059818651839378e-10};
    static constexpr double lowest = -1023.0;
};

template <class A>
SK_INLINE Vec<A> at_least(Vec<A> x, A low) {
    return larger(Vec<A>{} + low, x);
}

// A result below the smallest normal number is 0.
template <class A>
SK_INLINE Vec<A> exp(Vec<A> x) {
    using T = ExpTable<A>;
    const Vec<A> one = Vec<A>{} + 1, zero{};
    Several<A, 1> scale, poly;
    // 2^128 is no float, though e^88.7 is one: large powers are made a quarter as large first.
    exp_parts<A, 1>(at_most(at_least(Several<A, 1>{{x}}, T::lowest), T::highest), scale, poly,
                    {{x > 0 ? one / 4 : one}});
    Vec<A> e = (scale * poly + scale).v[0] * (x > 0 ? one * 4 : one);
    e = x < T::lowest ? zero : e;
    return x > T::highest ? zero + static_cast<A>(__builtin_inf()) : e;
}

#if SEQKERN_VECTOR_BYTES == 64
// x less the whole number nearest to it, and y 2^n of a whole n, or 0 where x is below `lowest`.
SK_INLINE Vec<float> beside_whole(Vec<float> x) {
    return __builtin_ia32_reduceps512_mask(x, 8, Vec<float>{}, 0xffff);
}
SK_INLINE Vec<double> beside_whole(Vec<double> x) {
    return __builtin_ia32_reducepd512_mask(x, 8, Vec<double>{}, 0xff);
}
SK_INLINE Vec<float> scaled(Vec<float> y, Vec<float> n, Vec<float> x, float lowest) {
    const unsigned short normal = __builtin_ia32_cmpps512_mask(x, Vec<float>{} + lowest, 5, 0xffff, 4);
    return __builtin_ia32_scalefps512_mask(y, n, Vec<float>{}, normal, 4);
}
SK_INLINE Vec<double> scaled(Vec<double> y, Vec<double> n, Vec<double> x, double lowest) {
    const unsigned char normal = __builtin_ia32_cmppd512_mask(x, Vec<double>{} + lowest, 5, 0xff, 4);
    return __builtin_ia32_scalefpd512_mask(y, n, Vec<double>{}, normal, 4);
}
#endif

// 2^x for x up to 0 or a little above; exactly 1 at 0. Below 2^-126 (-1022) it is 0, or fades to it.
template <class A, int N>
SK_INLINE Several<A, N> exp2_below(Several<A, N> x) {
#if SEQKERN_VECTOR_BYTES == 64
    Several<A, N> r;
    SK_UNROLL
    for (int i = 0; i < N; ++i) r.v[i] = beside_whole(x.v[i]);
    const Several<A, N> whole = x - r;
    Several<A, N> y = polynomial<A, N>(r, Exp2Table<A>::c) * r + static_cast<A>(1);
    SK_UNROLL
    for (int i = 0; i < N; ++i) y.v[i] = scaled(y.v[i], whole.v[i], x.v[i], Exp2Table<A>::lowest + 1);
    return y;
#else
    x = at_least(x, Exp2Table<A>::lowest);
    const Several<A, N> shifted = x + ExpTable<A>::round_magic, r = x - (shifted - ExpTable<A>::round_magic);
    const Several<A, N> q = polynomial<A, N>(r, Exp2Table<A>::c), scale = power<A, N>(shifted, ones<A, N>());
    return (q * r) * scale + scale;
#endif
}
template <class A>
SK_INLINE Vec<A> exp2_below(Vec<A> x) {
    return exp2_below<A, 1>({{x}}).v[0];
}

// The upper clamp lies where the scale is infinite, and so the result 0.
template <class A, int N>
SK_INLINE Several<A, N> sigmoid(const Several<A, N>& x) {
    using T = ExpTable<A>;
    const A one = 1;
    Several<A, N> scale, poly;
    exp_parts<A, N>(at_most(at_least(x * -one, T::lowest), T::overflow), scale, poly);
    return one / (scale * (poly + one) + one);
}
template <class A>
SK_INLINE Vec<A> sigmoid(Vec<A> x) {
    return sigmoid<A, 1>({{x}}).v[0];
}

// With e = expm1(-2|x|): |tanh| = -e / (e + 2), which keeps its relative accuracy near zero, and its slope is
// 4 (e + 1) / (e + 2)^2, which keeps it far from there, where 1 - tanh^2 would cancel. The sign is x's.
template <class A, int N>
SK_INLINE Several<A, N> tanh(const Several<A, N>& x, Several<A, N>* slope = nullptr) {
    using T = ExpTable<A>;
    using I = typename Simd<A>::I;
    const I sign = (I)(-Vec<A>{});
    Several<A, N> y, scale, poly;
    SK_UNROLL
    for (int i = 0; i < N; ++i) y.v[i] = (Vec<A>)((I)x.v[i] | sign);
    exp_parts<A, N>(at_least(y + y, slope ? T::lowest : -T::tanh_limit), scale, poly);
    const Several<A, N> e = scale * poly + (scale - static_cast<A>(1)), below = e + static_cast<A>(2);
    Several<A, N> t = e / below;
    if (slope) *slope = (scale * poly + scale) * static_cast<A>(4) / (below * below);
    SK_UNROLL
    for (int i = 0; i < N; ++i) t.v[i] = (Vec<A>)(((I)t.v[i] & ~sign) | ((I)x.v[i] & sign));
    return t;
}
template <class A>
SK_INLINE Vec<A> tanh(Vec<A> x) {
    return tanh<A, 1>({{x}}).v[0];
}

// x Phi(x), Phi the normal distribution. With t = 1 / (1 + 0.3 |x|), Phi(-|x|) = exp(-x^2 / 2) q(t): q
// interpolates at the Chebyshev nodes of |x| <= 14, relative error 1.1e-8, so the left tail keeps its digits.
SK_INLINE Vec<float> gelu(Vec<float> x) {
    using I = typename Simd<float>::I;
    constexpr float c[] = {3.09725587558e-6f, 0.119614674214f,  0.120296067368f,   0.106084910313f,
                           0.0934148060575f,  0.0602013707128f, -0.0217170247379f, 0.130326833757f,
                           -0.186560016396f,  0.0961785535013f, -0.017843272619f};
    constexpr int terms = sizeof c / sizeof *c;
    const Vec<float> size = (Vec<float>)((I)x & 0x7fffffff), t = 1.0f / (size * 0.3f + 1.0f);
    Vec<float> q = Vec<float>{} + c[terms - 1];
    SK_UNROLL
    for (int i = terms - 2; i >= 0; --i) q = q * t + c[i];
    const Vec<float> below = q * exp<float>(size * size * -0.5f);
    return x * (x > 0 ? 1.0f - below : below);
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
