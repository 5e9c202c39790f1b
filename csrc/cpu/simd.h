// Vector types of one ISA, loads, stores and conversions. Included once per scan_*.cpp, inside its own
// namespace: nothing here may be shared between ISAs, or the linker would merge code that older machines
// cannot run. Expects SEQKERN_ISA (namespace name), SEQKERN_VECTOR_BYTES and SEQKERN_ACCUMULATORS.
#pragma once

#ifdef __SANITIZE_ADDRESS__  // whose checks would be multiplied, and minutes of compiling
#define SK_INLINE inline
#else
#define SK_INLINE inline __attribute__((always_inline))
#endif
// What is called once for many numbers: compiled once for all its callers.
#ifdef __clang__
#define SK_APART __attribute__((noinline))
#else
#define SK_APART __attribute__((noinline, noclone))
#endif
#define SK_UNROLL _Pragma("GCC unroll 32")

namespace seqkern {
namespace SEQKERN_ISA {

struct half {
    unsigned short bits;
};
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
    typedef unsigned short Shorts
        __attribute__((vector_size(SEQKERN_VECTOR_BYTES / 2), aligned(2), may_alias));
    typedef unsigned char Bytes __attribute__((vector_size(SEQKERN_VECTOR_BYTES / 4)));
};

template <>
struct Simd<double> {
    static constexpr int n = SEQKERN_VECTOR_BYTES / 8;
    typedef double V __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(SEQKERN_VECTOR_BYTES), aligned(8), may_alias));
    typedef long I __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));
    typedef unsigned long U __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));
    typedef unsigned char Bytes __attribute__((vector_size(SEQKERN_VECTOR_BYTES / 8)));
};

template <class A>
using Vec = typename Simd<A>::V;

// The constant vector of f(0), f(1), ..., for shuffles: a loop over the lanes would be computed at run time.
template <class A, int... lane>
struct Lanes {
    template <class F>
    static SK_INLINE constexpr typename Simd<A>::I of(F f) {
        return typename Simd<A>::I{f(lane)...};
    }
};
template <class A, int count, int... lane>
struct CountedLanes : CountedLanes<A, count - 1, count - 1, lane...> {};
template <class A, int... lane>
struct CountedLanes<A, 0, lane...> : Lanes<A, lane...> {};
template <class A, class F>
SK_INLINE constexpr typename Simd<A>::I lanes(F f) {
    return CountedLanes<A, Simd<A>::n>::of(f);
}

template <class A>
SK_INLINE Vec<A> load(const A* p) {
    return *reinterpret_cast<const typename Simd<A>::Unaligned*>(p);
}

// Asks for what is written soon: the line of every 64th byte of p[0..count).
template <class A>
SK_INLINE void ask_for(const A* p, long count) {
    for (long j = 0; j < count; j += 64 / static_cast<long>(sizeof(A))) __builtin_prefetch(p + j, 1);
}

template <class A>
SK_INLINE void store(A* p, Vec<A> v) {
    *reinterpret_cast<typename Simd<A>::Unaligned*>(p) = v;
}

// Stores a vector past the caches, whose line is then neither read before nor kept; p is aligned to a vector.
// What another thread may read of it needs `stores_are_seen` first.
#if SEQKERN_VECTOR_BYTES == 64
SK_INLINE void store_past_caches(float* p, Vec<float> v) { __builtin_ia32_movntps512(p, v); }
SK_INLINE void store_past_caches(double* p, Vec<double> v) { __builtin_ia32_movntpd512(p, v); }
SK_INLINE void stores_are_seen() { __builtin_ia32_sfence(); }
#else
template <class A>
SK_INLINE void store_past_caches(A* p, Vec<A> v) {
    store<A>(p, v);
}
SK_INLINE void stores_are_seen() {}
#endif

// The second of two numbers that do not compare, as a NaN. Compilers make two instructions of the choice
// written out, or three.
#if SEQKERN_VECTOR_BYTES == 64
SK_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) {
    return __builtin_ia32_maxps512_mask(a, b, a, 0xffff, 4);
}
SK_INLINE Vec<float> smaller(Vec<float> a, Vec<float> b) {
    return __builtin_ia32_minps512_mask(a, b, a, 0xffff, 4);
}
SK_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) {
    return __builtin_ia32_maxpd512_mask(a, b, a, 0xff, 4);
}
SK_INLINE Vec<double> smaller(Vec<double> a, Vec<double> b) {
    return __builtin_ia32_minpd512_mask(a, b, a, 0xff, 4);
}
#elif SEQKERN_VECTOR_BYTES == 32
SK_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return __builtin_ia32_maxps256(a, b); }
SK_INLINE Vec<float> smaller(Vec<float> a, Vec<float> b) { return __builtin_ia32_minps256(a, b); }
SK_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return __builtin_ia32_maxpd256(a, b); }
SK_INLINE Vec<double> smaller(Vec<double> a, Vec<double> b) { return __builtin_ia32_minpd256(a, b); }
#else
template <class V>
SK_INLINE V larger(V a, V b) {
    return a > b ? a : b;
}
template <class V>
SK_INLINE V smaller(V a, V b) {
    return a < b ? a : b;
}
#endif

SK_INLINE float widen(float v) { return v; }
SK_INLINE double widen(double v) { return v; }
SK_INLINE float widen(bfloat v) {
    unsigned int u = static_cast<unsigned int>(v.bits) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
}

SK_INLINE void narrow(float* p, float v) { *p = v; }
SK_INLINE void narrow(double* p, double v) { *p = v; }
// Round to nearest even; a NaN keeps its quiet bit so that it cannot round into an infinity.
SK_INLINE void narrow(bfloat* p, float v) {
    unsigned int u;
    __builtin_memcpy(&u, &v, 4);
    unsigned int rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    p->bits = static_cast<unsigned short>(v != v ? (u >> 16) | 0x40u : rounded);
}

// Halves and floats by one instruction, to nearest even, where there is one.
#if SEQKERN_VECTOR_BYTES == 64
constexpr bool HALVES_CONVERT = true;
SK_INLINE Vec<float> wide(Simd<float>::Shorts halves) {
    typedef short In __attribute__((vector_size(32)));
    return __builtin_ia32_vcvtph2ps512_mask((In)halves, Vec<float>{}, 0xffff, 4);
}
SK_INLINE Simd<float>::Shorts narrowed(Vec<float> v) {
    typedef short Out __attribute__((vector_size(32)));
    return (Simd<float>::Shorts)__builtin_ia32_vcvtps2ph512_mask(v, 0, Out{}, 0xffff);
}
#elif SEQKERN_VECTOR_BYTES == 32
constexpr bool HALVES_CONVERT = true;
SK_INLINE Vec<float> wide(Simd<float>::Shorts halves) {
    typedef short In __attribute__((vector_size(16)));
    return __builtin_ia32_vcvtph2ps256((In)halves);
}
SK_INLINE Simd<float>::Shorts narrowed(Vec<float> v) {
    return (Simd<float>::Shorts)__builtin_ia32_vcvtps2ph256(v, 0);
}
#else
constexpr bool HALVES_CONVERT = false;
Vec<float> wide(Simd<float>::Shorts);
Simd<float>::Shorts narrowed(Vec<float>);
#endif

// Bytes to lanes, one to each. GCC 12 splits vectors of eight bytes into numbers.
template <class A>
SK_INLINE typename Simd<A>::I load_bytes(const unsigned char* p) {
    typename Simd<A>::Bytes bytes;
#if SEQKERN_VECTOR_BYTES == 32
    if constexpr (sizeof(bytes) == 8) {
        typedef long Two __attribute__((vector_size(16)));
        typedef char In __attribute__((vector_size(16)));
        long eight;
        __builtin_memcpy(&eight, p, sizeof eight);
        return (typename Simd<A>::I)__builtin_ia32_pmovzxbd256((In)Two{eight, 0});
    }
#endif
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, typename Simd<A>::I);
}

// Sixteen-bit numbers are converted in integer arithmetic: compilers split vectors of _Float16, which GCC 11
// lacks.
template <class S>
SK_INLINE Vec<float> widened(Simd<float>::Shorts found) {
    using U = typename Simd<float>::U;
    if constexpr (__is_same(S, half) && HALVES_CONVERT) return wide(found);
    const U bits = __builtin_convertvector(found, U);
    if constexpr (__is_same(S, bfloat)) {
        return (Vec<float>)(bits << 16);
    } else {
        // The exponent's bias moves by 112 in a multiplication, which also makes subnormal numbers normal.
        const U size = bits & 0x7fffu, special = (U)(size > 0x7bffu) & 0x7f800000u;
        const U scaled = (U)((Vec<float>)(size << 13) * 0x1p112f);
        return (Vec<float>)(scaled | special | (bits & 0x8000u) << 16);
    }
}

// A whole vector.
template <class A, class S>
SK_INLINE Vec<A> load_whole(const S* p) {
    if constexpr (__is_same(A, S)) {
        return load<A>(p);
    } else {
        return widened<S>(*reinterpret_cast<const Simd<float>::Shorts*>(p));
    }
}

// The bfloat of each lane, in its lower half: to nearest even, a NaN stays one.
template <class A>
SK_INLINE typename Simd<A>::U rounded_bits(Vec<A> v) {
    using U = typename Simd<A>::U;
    const U bits = (U)v, even = bits + (((bits >> 16) & 1u) + 0x7fffu);
    return (v != v ? (bits | 0x400000u) : even) >> 16;
}

template <class S>
SK_INLINE Simd<float>::Shorts shortened(Vec<float> v) {
    using U = typename Simd<float>::U;
    if constexpr (__is_same(S, half) && HALVES_CONVERT) return narrowed(v);
    U found;
    if constexpr (__is_same(S, bfloat)) {
        found = rounded_bits<float>(v);
    } else {
        // To nearest even by adding the number whose last place is the result's. Subnormal results: 2^-24.
        const U bits = (U)v, size = bits & 0x7fffffffu, exponent = size & 0x7f800000u;
        const U place = exponent < 0x38800000u ? U{} + 0x3f000000u : exponent + (13u << 23);
        const Vec<float> rounded = ((Vec<float>)size + (Vec<float>)place) - (Vec<float>)place;
        const U small = (U)((Vec<float>)size + 0.5f) - 0x3f000000u;
        const U normal = ((U)rounded - (112u << 23)) >> 13;
        found = size < 0x38800000u ? small : normal;
        found = (U)rounded >= 0x47800000u ? U{} + 0x7c00u : found;
        found = size > 0x7f800000u ? (size >> 13 & 0x3ffu) | 0x7e00u : found;
        found |= bits >> 16 & 0x8000u;
    }
    return __builtin_convertvector(found, Simd<float>::Shorts);
}

SK_INLINE float widen(half v) { return widened<half>(Simd<float>::Shorts{v.bits})[0]; }
SK_INLINE void narrow(half* p, float v) { p->bits = shortened<half>(Vec<float>{} + v)[0]; }

template <class A, class S>
SK_INLINE void store_whole(S* p, Vec<A> v) {
    if constexpr (__is_same(A, S)) {
        store<A>(p, v);
    } else {
        *reinterpret_cast<Simd<float>::Shorts*>(p) = shortened<S>(v);
    }
}

// The first n lanes, fewer than there are: what lies behind them is neither read nor written. By masks where
// the set has them, and nobody checks addresses, which would not see them.
#if SEQKERN_VECTOR_BYTES == 64 && !defined(__SANITIZE_ADDRESS__)
SK_INLINE unsigned short first_lanes(long n) { return static_cast<unsigned short>(n > 0 ? (1 << n) - 1 : 0); }
typedef short Sixteen __attribute__((vector_size(32)));

template <class A, class S>
SK_INLINE Vec<A> load_some(const S* p, long n) {
    const unsigned short mask = first_lanes(n);
    if constexpr (__is_same(S, float)) {
        return __builtin_ia32_loadups512_mask(p, Vec<float>{}, mask);
    } else if constexpr (__is_same(S, double)) {
        return __builtin_ia32_loadupd512_mask(p, Vec<double>{}, static_cast<unsigned char>(mask));
    } else {
        const auto from = reinterpret_cast<const short*>(p);
        return widened<S>((Simd<float>::Shorts)__builtin_ia32_loaddquhi256_mask(from, Sixteen{}, mask));
    }
}

template <class A, class S>
SK_INLINE void store_some(S* p, Vec<A> v, long n) {
    const unsigned short mask = first_lanes(n);
    if constexpr (__is_same(S, float)) {
        __builtin_ia32_storeups512_mask(p, v, mask);
    } else if constexpr (__is_same(S, double)) {
        __builtin_ia32_storeupd512_mask(p, v, static_cast<unsigned char>(mask));
    } else {
        __builtin_ia32_storedquhi256_mask(reinterpret_cast<short*>(p), (Sixteen)shortened<S>(v), mask);
    }
}
#else
template <class A, class S>
SK_INLINE Vec<A> load_some(const S* p, long n) {
    A lanes[Simd<A>::n] __attribute__((aligned(SEQKERN_VECTOR_BYTES))) = {};
    for (long i = 0; i < n; ++i) lanes[i] = widen(p[i]);
    return load<A>(lanes);
}

template <class A, class S>
SK_INLINE void store_some(S* p, Vec<A> v, long n) {
    A lanes[Simd<A>::n] __attribute__((aligned(SEQKERN_VECTOR_BYTES)));
    store<A>(lanes, v);
    for (long i = 0; i < n; ++i) narrow(p + i, lanes[i]);
}
#endif

// The first n lanes of p, zeros behind them.
template <class A, class S>
SK_INLINE Vec<A> load_n(const S* p, long n) {
    return n >= Simd<A>::n ? load_whole<A>(p) : load_some<A>(p, n);
}

template <class A, class S>
SK_INLINE void store_n(S* p, Vec<A> v, long n) {
    if (n >= Simd<A>::n) {
        store_whole<A>(p, v);
    } else {
        store_some<A>(p, v, n);
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

// Columns as whole vectors, and the row stride of a buffer for them: never a power of two, for the cache's
// sets.
template <class A>
SK_INLINE long padded(long size) {
    return ceil_div(size, Simd<A>::n) * Simd<A>::n;
}
template <class A>
SK_INLINE long buffer_ld(long size) {
    return padded<A>(size) + Simd<A>::n;
}

// N vectors that take each step of a computation together. One after another, long chains (an exponential, a
// sigmoid) would fill the scheduler before a second of them is under way.
template <class A, int N>
struct Several {
    Vec<A> v[N];
#define SK_OPERATOR(op)                                                        \
    friend SK_INLINE Several operator op(const Several& a, const Several& b) { \
        Several found;                                                         \
        SK_UNROLL                                                              \
        for (int i = 0; i < N; ++i) found.v[i] = a.v[i] op b.v[i];             \
        return found;                                                          \
    }                                                                          \
    friend SK_INLINE Several operator op(const Several& a, A b) {              \
        Several found;                                                         \
        SK_UNROLL                                                              \
        for (int i = 0; i < N; ++i) found.v[i] = a.v[i] op b;                  \
        return found;                                                          \
    }                                                                          \
    friend SK_INLINE Several operator op(A a, const Several& b) {              \
        Several found;                                                         \
        SK_UNROLL                                                              \
        for (int i = 0; i < N; ++i) found.v[i] = a op b.v[i];                  \
        return found;                                                          \
    }
    SK_OPERATOR(+)
    SK_OPERATOR(-)
    SK_OPERATOR(*)
    SK_OPERATOR(/)
#undef SK_OPERATOR
};

#define SK_HELD(name, chosen)                                                      \
    template <class A, int N>                                                      \
    SK_INLINE Several<A, N> name(const Several<A, N>& x, A bound) {                \
        Several<A, N> found;                                                       \
        SK_UNROLL                                                                  \
        for (int i = 0; i < N; ++i) found.v[i] = chosen(Vec<A>{} + bound, x.v[i]); \
        return found;                                                              \
    }
SK_HELD(at_least, larger)
SK_HELD(at_most, smaller)
#undef SK_HELD

}  // namespace SEQKERN_ISA
}  // namespace seqkern
