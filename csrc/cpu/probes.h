// What tests and benchmarks ask of one ISA beside its kernels: functions of numbers, products, and the limits
// of the machine.
#pragma once

#include "gemm.h"
#include "gemm_bf16.h"
#include "parallel.h"
#include "vmath.h"

namespace seqkern {
namespace SEQKERN_ISA {

// c[M][N] = a[M][K] b[K][N], row-major, or with `transposed` b[N][K]; the factors rounded to bfloat.
template <class S>
static bool multiply_bf16(bool transposed, long M, long N, long K, const float* a, const S* b, float* c) {
    constexpr int n = Simd<float>::n;
    constexpr long W = 2 * n;
    const long panels = ceil_div(N, W), depth = whole_steps<bfloat>(K);
    Scratch scratch(sizeof(bfloat) * (panels * depth * W + M * depth) + sizeof(float) * panels * M * W + 128);
    if (!scratch.p) return false;
    Arena arena{static_cast<char*>(scratch.p)};
    bfloat *packed = arena.take<bfloat>(panels * depth * W), *rows = arena.take<bfloat>(M * depth);
    float* out = arena.take<float>(panels * M * W);
    for (long m = 0; m < M; ++m) factor_row(rows + m * depth, a + m * K, K);
    for (long p = 0; p < panels; ++p) {
        bfloat* to = packed + p * depth * W;
        for (long j = 0; transposed && j < W; j += n)
            pack_transposed<bfloat>(to + 2 * j, W, b + (p * W + j) * K, K, N - p * W - j, K);
        for (long k = 0; !transposed && k < K; k += 2) {
            const S* even = b + k * N + p * W;
            pack_pair(to + k * W, W, even, k + 1 < K ? even + N : nullptr, N - p * W);
        }
    }
    gemm<bfloat, 2>(M, rows, depth, {packed, 2 * W, depth * W}, panels, K, out, W, M * W, false);
    for (long m = 0; m < M; ++m)
        for (long p = 0; p < panels; ++p)
            copy_row<float>(c + m * N + p * W, out + (p * M + m) * W, min_of(W, N - p * W));
    return true;
}

static bool probe_gemm_bf16(bool rounded, bool transposed, long M, long N, long K, const float* a,
                            const void* b, float* c) {
    if (rounded) return multiply_bf16(transposed, M, N, K, a, static_cast<const bfloat*>(b), c);
    return multiply_bf16(transposed, M, N, K, a, static_cast<const float*>(b), c);
}

#ifndef SEQKERN_BF16_DOT
template <class A>
static void map(int function, const A* x, A* y, long count) {
    for (long i = 0; i < count; i += Simd<A>::n) {
        const long left = count - i;
        Vec<A> v = load_n<A>(x + i, left);
        v = function == 0   ? exp<A>(v)
            : function == 1 ? sigmoid<A>(v)
            : function == 2 ? tanh<A>(v)
                            : exp2_below<A>(v);
        store_n<A>(y + i, v, left);
    }
}

static void probe_vmath(int function, bool is_double, const void* x, void* y, long count) {
    if (is_double) {
        map<double>(function, static_cast<const double*>(x), static_cast<double*>(y), count);
    } else {
        map<float>(function, static_cast<const float*>(x), static_cast<float*>(y), count);
    }
}

// c[M][N] = a[M][K] b[K][N], row-major.
template <class A>
static bool multiply(long M, long N, long K, const A* a, const A* b, A* c) {
    constexpr long PW = 2 * Simd<A>::n;
    const long panels = ceil_div(N, PW);
    Scratch scratch(sizeof(A) * (panels * K * PW + panels * M * PW));
    if (!scratch.p) return false;
    A *packed = static_cast<A*>(scratch.p), *out = packed + panels * K * PW;
    for (long k = 0; k < K; ++k)
        for (long p = 0; p < panels; ++p)
            pack_row<A>(packed + (p * K + k) * PW, PW, b + k * N + p * PW, N - p * PW);
    gemm<A, 2>(M, a, K, {packed, PW, K * PW}, panels, K, out, PW, M * PW, false);
    for (long m = 0; m < M; ++m)
        for (long p = 0; p < panels; ++p)
            copy_row<A>(c + m * N + p * PW, out + (p * M + m) * PW, min_of(PW, N - p * PW));
    return true;
}

static bool probe_gemm(bool is_double, long M, long N, long K, const void* a, const void* b, void* c) {
    if (is_double)
        return multiply(M, N, K, static_cast<const double*>(a), static_cast<const double*>(b),
                        static_cast<double*>(c));
    return multiply(M, N, K, static_cast<const float*>(a), static_cast<const float*>(b),
                    static_cast<float*>(c));
}

constexpr int CHAINS = 12;  // independent ones: two multiply-adds a cycle, a latency of up to five cycles

static double probe_fma(long rounds) {
    Vec<float> x[CHAINS], scale = Vec<float>{} + 0.999f, shift = Vec<float>{} + 0.001f;
    SK_UNROLL
    for (int i = 0; i < CHAINS; ++i) x[i] = Vec<float>{} + static_cast<float>(i);
    for (long r = 0; r < rounds; ++r) {
        SK_UNROLL
        for (int i = 0; i < CHAINS; ++i) {
            x[i] = x[i] * scale + shift;
            asm volatile("" : "+x"(x[i]));
        }
    }
    Vec<float> sum{};
    SK_UNROLL
    for (int i = 0; i < CHAINS; ++i) sum += x[i];
    return sum[0];
}

static double probe_read(const float* p, long count) {
    constexpr int n = Simd<float>::n, W = 8;
    Vec<float> x[W] = {};
    for (long i = 0; i + W * n <= count; i += W * n) SK_UNROLL
    for (int j = 0; j < W; ++j) x[j] += load<float>(p + i + j * n);
    Vec<float> sum{};
    SK_UNROLL
    for (int j = 0; j < W; ++j) sum += x[j];
    return sum[0];
}
#endif

}  // namespace SEQKERN_ISA
}  // namespace seqkern
