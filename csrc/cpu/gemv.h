// Products with weights as they lie in memory, row-major and unpacked: for the few rows that do not amortise
// a packing. Every output is a sum of n chains along k, joined by a fixed tree.
#pragma once

#include "gemm_bf16.h"

namespace seqkern {
namespace SEQKERN_ISA {

// Lane j: the sum of the lanes of v[j]. A round adds two vectors into one: lanes whose number has the bit
// come from the second, and every lane meets the one that differs from it in that bit.
template <class A, int bit = Simd<A>::n / 2>
SK_INLINE Vec<A> lane_sums(Vec<A>* v) {
    if constexpr (bit == 0) {
        return v[0];
    } else {
        constexpr int n = Simd<A>::n;
        constexpr auto keep = lanes<A>([](int i) { return i & bit ? n + i : i; });
        constexpr auto other = lanes<A>([](int i) { return i & bit ? n + (i ^ bit) : i ^ bit; });
        SK_UNROLL
        for (int r = 0; r < bit; ++r)
            v[r] = __builtin_shuffle(v[r], v[r + bit], keep) + __builtin_shuffle(v[r], v[r + bit], other);
        return lane_sums<A, bit / 2>(v);
    }
}

// Vectors x that are multiplied with a vector of weights while it is in a register. Each has four sums, and
// of sixteen registers one must be left for a factor.
constexpr int ROWS_TOGETHER = SEQKERN_ACCUMULATORS < 16 ? 3 : 4;

// One vector x[K] that many rows are multiplied with.
template <class E>
struct Multiplied {
    using F = Factor<E>;
    const E* x;
    long K, whole;             // numbers in whole vectors
    typename F::Each last;     // x[K - width, K), zero where a whole vector counts already
    typename F::Mask counted;  // lanes of `last` that are not

    Multiplied() = default;
    SK_INLINE Multiplied(const E* x, long K) : x(x), K(K), whole(K - K % F::width), last{}, counted{} {
        if (whole == K) return;
        if (K < F::width) {
            last = F::load(x, K);
            return;
        }
        counted = F::last(static_cast<int>(K % F::width));
        last = F::masked(F::load(x + K - F::width), counted);
    }
};

// out[m], lane j: w[j][0..K) . by[m].x for j < count; what lies in the other lanes is some row's value.
// AHEAD: w comes from memory, and its row so many rows further on is asked for meanwhile, into L2; short rows
// end before the processor would do so by itself.
template <class E, int M, int AHEAD = 0, class S>
SK_INLINE void dot_rows(const S* w, long ldw, long count, const Multiplied<E>* by, Vec<Sum<E>>* out) {
    using F = Factor<E>;
    using A = Sum<E>;
    constexpr int n = Simd<A>::n, TOGETHER = n < 4 ? n : 4;
    const long K = by[0].K, whole = by[0].whole;
    Vec<A> sums[M][n];
    SK_UNROLL
    for (int j = 0; j < n; j += TOGETHER) {
        const S* rows[TOGETHER];
        Vec<A> part[M][TOGETHER] = {};
        SK_UNROLL
        for (int r = 0; r < TOGETHER; ++r) rows[r] = w + min_of(j + r, count - 1) * ldw;
        for (long k = 0; k < whole && j < count; k += F::width) {
            SK_UNROLL
            for (int r = 0; r < TOGETHER; ++r) {
                const auto v = F::load(rows[r] + k);
                if constexpr (AHEAD > 0) __builtin_prefetch(rows[r] + AHEAD * ldw + k, 0, 2);
                SK_UNROLL
                for (int m = 0; m < M; ++m) F::add(part[m][r], v, F::load(by[m].x + k));
            }
        }
        // Two loops, not one with a choice in it: a product and its sum must stay in one block of code, or
        // the compiler does not fuse them for every M, and the last bit would depend on how rows are shared
        // out.
        if (K < F::width && j < count) {
            SK_UNROLL
            for (int r = 0; r < TOGETHER; ++r) {
                const auto v = F::load(rows[r], K);
                SK_UNROLL
                for (int m = 0; m < M; ++m) F::add(part[m][r], v, by[m].last);
            }
        } else if (whole < K && j < count) {
            SK_UNROLL
            for (int r = 0; r < TOGETHER; ++r) {
                const auto v = F::masked(F::load(rows[r] + K - F::width), by[0].counted);
                SK_UNROLL
                for (int m = 0; m < M; ++m) F::add(part[m][r], v, by[m].last);
            }
        }
        SK_UNROLL
        for (int m = 0; m < M; ++m) SK_UNROLL
        for (int r = 0; r < TOGETHER; ++r) sums[m][j + r] = part[m][r];
    }
    SK_UNROLL
    for (int m = 0; m < M; ++m) out[m] = lane_sums<A>(sums[m]);
}

// o[row][0..n) (row stride ldo) (+)= the first `count` rows of w times each of a[row][K].
template <class E, int M = ROWS_TOGETHER, class S>
void rows_as_they_lie(const S* w, long ldw, long K, long count, long rows, const E* a, long lda, Sum<E>* o,
                      long ldo, bool accumulate) {
    using A = Sum<E>;
    while (rows >= M) {
        Vec<A> out[M];
        Multiplied<E> by[M];
        SK_UNROLL
        for (int m = 0; m < M; ++m) by[m] = Multiplied<E>(a + m * lda, K);
        dot_rows<E, M>(w, ldw, count, by, out);
        SK_UNROLL
        for (int m = 0; m < M; ++m) {
            A* to = o + m * ldo;
            store<A>(to, accumulate ? load<A>(to) + out[m] : out[m]);
        }
        rows -= M, a += M * lda, o += M * ldo;
    }
    if constexpr (M > 1)
        if (rows > 0) rows_as_they_lie<E, (M + 1) / 2>(w, ldw, K, count, rows, a, lda, o, ldo, accumulate);
}

constexpr int ROWS_AHEAD = 8;  // of w, which comes from memory

template <class A, int M, int AHEAD, class S, class Put>
SK_INLINE void few_rows_tile(const S* w, long ldw, long K, long count, const A* x, long ldx, const Put& put) {
    Multiplied<A> by[M];
    Vec<A> out[M];
    SK_UNROLL
    for (int m = 0; m < M; ++m) by[m] = Multiplied<A>(x + m * ldx, K);
    dot_rows<A, M, AHEAD>(w, ldw, count, by, out);
    SK_UNROLL
    for (int m = 0; m < M; ++m) put(m, out[m]);
}

// A thread's share of x[rows][K] times the N rows of w: put(row, j, count, sums) gets a vector of them for
// each row, of which the first `count` count.
template <class A, class S, class Put>
SK_INLINE void few_rows(const S* w, long ldw, long K, long N, const A* x, long ldx, long rows, long thread,
                        long threads, const Put& put) {
    constexpr long n = Simd<A>::n, M = ROWS_TOGETHER;
    const long blocks = ceil_div(N, n), end = blocks * (thread + 1) / threads * n;
    for (long j = blocks * thread / threads * n; j < end; j += n) {
        const long count = min_of(n, N - j);
        const S* here = w + j * ldw;
        long row = 0;
        const auto put_here = [&](int m, Vec<A> sums) { put(row + m, j, count, sums); };
        // The first rows fetch the weights, the others find them in a cache.
        if (rows >= M) {
            few_rows_tile<A, M, ROWS_AHEAD>(here, ldw, K, count, x, ldx, put_here);
            row = M;
        } else {
            few_rows_tile<A, 1, ROWS_AHEAD>(here, ldw, K, count, x, ldx, put_here);
            row = 1;
        }
        for (; row + M <= rows; row += M)
            few_rows_tile<A, M, 0>(here, ldw, K, count, x + row * ldx, ldx, put_here);
        for (; row < rows; ++row) few_rows_tile<A, 1, 0>(here, ldw, K, count, x + row * ldx, ldx, put_here);
    }
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
