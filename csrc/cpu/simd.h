// Vector types of one ISA, loads, stores and conversions. Included once per isa_*.cpp, inside its own
// namespace: nothing here may be shared between ISAs, or the linker would merge code that older machines
// cannot run. Expects SEQKERN_ISA (namespace name), SEQKERN_VECTOR_BYTES and SEQKERN_ACCUMULATORS.
#pragma once

#define SK_INLINE inline __attribute__((always_inline))
#define SK_UNROLL _Pragma("GCC unroll 32")

namespace seqkern {
namespace SEQKERN_ISA {

typedef _Float16 half;
struct bfloat {
    unsigned short bits;
};

template <class A>
struct Simd;

template <>
struct Simd<float> {
    static constexpr int n = SEQKERN_VECTOR_BYTES / 4;
    typedef float V __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));
    typedef float Unaligned __attribute__((vector_size(SEQKERN_VECTOR_BYTES), aligned(4), may_alias));
    typedef int I __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));
    typedef unsigned int U __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
    static constexpr int n = SEQKERN_VECTOR_BYTES / 8;
    typedef double V __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(SEQKERN_VECTOR_BYTES), aligned(8), may_alias));
    typedef long I __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));
    typedef unsigned long U __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));
};

template <class A>
using Vec = typename Simd<A>::V;

template <class A>
SK_INLINE Vec<A> load(const A* p) {
    return *reinterpret_cast<const typename Simd<A>::Unaligned*>(p);
}

template <class A>
SK_INLINE void store(A* p, Vec<A> v) {
    *reinterpret_cast<typename Simd<A>::Unaligned*>(p) = v;
}

SK_INLINE float widen(float v) { return v; }
SK_INLINE double widen(double v) { return v; }
SK_INLINE float widen(half v) { return static_cast<float>(v); }
SK_INLINE float widen(bfloat v) {
    unsigned int u = static_cast<unsigned int>(v.bits) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
}

SK_INLINE void narrow(float* p, float v) { *p = v; }
SK_INLINE void narrow(double* p, double v) { *p = v; }
SK_INLINE void narrow(half* p, float v) { *p = static_cast<half>(v); }
// Round to nearest even; a NaN keeps its quiet bit so that it cannot round into an infinity.
SK_INLINE void narrow(bfloat* p, float v) {
    unsigned int u;
    __builtin_memcpy(&u, &v, 4);
    unsigned int rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    p->bits = static_cast<unsigned short>(v != v ? (u >> 16) | 0x40u : rounded);
}

// The first n lanes of p, zeros behind them.
template <class A, class S>
SK_INLINE Vec<A> load_n(const S* p, long n) {
    if constexpr (__is_same(A, S)) {
        if (n >= Simd<A>::n) return load<A>(p);
    }
    A lanes[Simd<A>::n] __attribute__((aligned(SEQKERN_VECTOR_BYTES))) = {};
    if (n >= Simd<A>::n) {
        for (int i = 0; i < Simd<A>::n; ++i) lanes[i] = widen(p[i]);
    } else {
        for (long i = 0; i < n; ++i) lanes[i] = widen(p[i]);
    }
    return load<A>(lanes);
}

template <class A, class S>
SK_INLINE void store_n(S* p, Vec<A> v, long n) {
    if constexpr (__is_same(A, S)) {
        if (n >= Simd<A>::n) {
            store<A>(p, v);
            return;
        }
    }
    A lanes[Simd<A>::n] __attribute__((aligned(SEQKERN_VECTOR_BYTES)));
    store<A>(lanes, v);
    if (n >= Simd<A>::n) {
        for (int i = 0; i < Simd<A>::n; ++i) narrow(p + i, lanes[i]);
    } else {
        for (long i = 0; i < n; ++i) narrow(p + i, lanes[i]);
    }
}

template <class A, class S>
SK_INLINE void copy_row(A* to, const S* from, long n) {
    for (long i = 0; i < n; i += Simd<A>::n) {
        long left = n - i;
        store_n<A>(to + i, load_n<A>(from + i, left), left);
    }
}

SK_INLINE long min_of(long a, long b) { return a < b ? a : b; }
SK_INLINE long max_of(long a, long b) { return a > b ? a : b; }
SK_INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }

}  // namespace SEQKERN_ISA
}  // namespace seqkern
