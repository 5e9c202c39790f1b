// Products with weights as they lie in memory, row-major and unpacked: for the few rows that do not amortise
// a packing. Every output is a sum of n chains along k, joined by a fixed tree.
#pragma once

#include "gemm_bf16.h"
#include "linear_call.h"

namespace seqkern {
namespace SEQKERN_ISA {

// Two vectors added into one: lanes whose number has the bit come from the second, and every lane meets the
// one that differs from it in that bit.
template <class A, int bit>
SK_INLINE Vec<A> joined(Vec<A> first, Vec<A> second) {
    constexpr int n = Simd<A>::n;
    constexpr auto keep = lanes<A>([](int i) { return i & bit ? n + i : i; });
    constexpr auto other = lanes<A>([](int i) { return i & bit ? n + (i ^ bit) : i ^ bit; });
    return __builtin_shuffle(first, second, keep) + __builtin_shuffle(first, second, other);
}

// Lane j: the sum of the lanes of v[j].
template <class A, int bit = 1>
SK_INLINE Vec<A> lane_sums(Vec<A>* v) {
    if constexpr (bit == Simd<A>::n) {
        return v[0];
    } else {
        SK_UNROLL
        for (int r = 0; r < Simd<A>::n / bit; r += 2) v[r / 2] = joined<A, bit>(v[r], v[r + 1]);
        return lane_sums<A, 2 * bit>(v);
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

// part[m][r]: the chains of rows[r][0..K) . by[m].x. The rows ahead[0..ASKED) are asked for.
template <class E, int M, int T, int ASKED = 0, class S>
SK_INLINE void dot_chains(const S* const* rows, const Multiplied<E>* by, Vec<Sum<E>> (*part)[T],
                          const S* const* ahead = nullptr) {
    using F = Factor<E>;
    const long K = by[0].K, whole = by[0].whole;
    Vec<Sum<E>> sums[M][T] = {};
    for (long k = 0; k < whole; k += F::width) {
        SK_UNROLL
        for (int r = 0; r < T; ++r) {
            auto v = F::load(rows[r] + k);
#if defined(__x86_64__)
            if constexpr (M > 1) asm("" : "+v"(v));  // else it is read anew for each of its products
#endif
            SK_UNROLL
            for (int m = 0; m < M; ++m) F::add(sums[m][r], v, F::load(by[m].x + k));
        }
        SK_UNROLL
        for (int i = 0; i < ASKED; ++i) __builtin_prefetch(ahead[i] + k, 0, 2);
    }
    // Two loops, not one with a choice in it: a product and its sum must stay in one block of code, or the
    // compiler does not fuse them for every M, and the last bit would depend on how rows are shared out.
    if (K < F::width) {
        SK_UNROLL
        for (int r = 0; r < T; ++r) {
            const auto v = F::load(rows[r], K);
            SK_UNROLL
            for (int m = 0; m < M; ++m) F::add(sums[m][r], v, by[m].last);
        }
    } else if (whole < K) {
        SK_UNROLL
        for (int r = 0; r < T; ++r) {
            const auto v = F::masked(F::load(rows[r] + K - F::width), by[0].counted);
            SK_UNROLL
            for (int m = 0; m < M; ++m) F::add(sums[m][r], v, by[m].last);
        }
    }
    SK_UNROLL
    for (int m = 0; m < M; ++m) SK_UNROLL
    for (int r = 0; r < T; ++r) part[m][r] = sums[m][r];
}

// out[m], lane j: w[j][0..K) . by[m].x for j < count; what lies in the other lanes is some row's value.
template <class E, int M, class S>
SK_INLINE void dot_rows(const S* w, long ldw, long count, const Multiplied<E>* by, Vec<Sum<E>>* out) {
    using A = Sum<E>;
    constexpr int n = Simd<A>::n, T = n < 4 ? n : 4;
    Vec<A> sums[M][n];
    SK_UNROLL
    for (int j = 0; j < n; j += T) {
        const S* rows[T];
        Vec<A> part[M][T] = {};
        SK_UNROLL
        for (int r = 0; r < T; ++r) rows[r] = w + min_of(j + r, count - 1) * ldw;
        if (j < count) dot_chains<E, M, T>(rows, by, part);
        SK_UNROLL
        for (int m = 0; m < M; ++m) SK_UNROLL
        for (int r = 0; r < T; ++r) sums[m][j + r] = part[m][r];
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

// The places of w that few_rows reads from by turns: the processor runs ahead of each by itself, and farther
// with several than with one. Neighbouring rows would not do: two in a page look like one that jumps.
constexpr int STREAMS = 4;
constexpr long BYTES_AHEAD = 2048;  // of a stream, at least, in whole rows

// The same for vectors that come one after the other, `count` before this one: a pair is joined as soon as it
// is there, so that few of them wait, and the sums are left in the last level.
template <class A>
using Waiting = Vec<A> (*)[FEW_ROWS][STREAMS];  // [level][row of x][stream]

template <class A, int M, int bit = 1>
SK_INLINE void settle(Vec<A> (*v)[STREAMS], Waiting<A> waiting, long row, long count) {
    if constexpr (bit < Simd<A>::n)
        if (count % 2) {
            SK_UNROLL
            for (int m = 0; m < M; ++m) SK_UNROLL
            for (int s = 0; s < STREAMS; ++s) v[m][s] = joined<A, bit>((*waiting)[row + m][s], v[m][s]);
            return settle<A, M, 2 * bit>(v, waiting + 1, row, count / 2);
        }
    SK_UNROLL
    for (int m = 0; m < M; ++m) SK_UNROLL
    for (int s = 0; s < STREAMS; ++s) (*waiting)[row + m][s] = v[m][s];
}

// The r-th row of weights from each stream times GROUPS times M rows of x. What is ahead in the streams is
// asked for in equal parts.
template <class A, int M, int GROUPS = 1, bool ASKS = false, class S>
SK_INLINE void few_rows_chains(const S* const* w, long K, const A* x, long ldx, long row, long r,
                               Waiting<A> waiting, const S* const* ahead = nullptr) {
    constexpr int ASKED = ASKS ? STREAMS / GROUPS : 0;
    for (long g = 0; g < GROUPS; ++g, row += M) {
        Multiplied<A> by[M];
        SK_UNROLL
        for (int m = 0; m < M; ++m) by[m] = Multiplied<A>(x + (row + m) * ldx, K);
        Vec<A> part[M][STREAMS];
        dot_chains<A, M, STREAMS, ASKED>(w, by, part, ahead + g * ASKED);
        settle<A, M>(part, waiting, row, r);
    }
}

// A thread's share of x[rows][K] times the N rows of w: put(row, j, count, sums) gets a vector of them for
// each row, of which the first `count` count.
template <class A, class S, class Put>
void few_rows(const S* w, long ldw, long K, long N, const A* x, long ldx, long rows, long thread,
              long threads, const Put& put) {
    constexpr long n = Simd<A>::n, M = ROWS_TOGETHER, LEVELS = __builtin_ctzl(n) + 1;
    const long blocks = ceil_div(N, n), end = blocks * (thread + 1) / threads;
    long block = blocks * thread / threads;
    const long each = (min_of(end, N / n) - block) / STREAMS;  // whole blocks of a stream
    const long rows_ahead = ceil_div(BYTES_AHEAD, K * static_cast<long>(sizeof(S)));
    for (long i = 0; i < each; ++i, ++block) {
        Vec<A> waiting[LEVELS][FEW_ROWS][STREAMS];
        for (long r = 0; r < n; ++r) {
            const S *from[STREAMS], *ahead[STREAMS];
            SK_UNROLL
            for (int s = 0; s < STREAMS; ++s) {
                from[s] = w + ((block + s * each) * n + r) * ldw;
                ahead[s] = from[s] + rows_ahead * ldw;
            }
            long row = 0;
            if constexpr (ASKS_AHEAD) {
                if (rows >= 4 * M) {
                    few_rows_chains<A, M, 4, true>(from, K, x, ldx, 0, r, waiting, ahead), row = 4 * M;
                } else if (rows >= 2 * M) {
                    few_rows_chains<A, M, 2, true>(from, K, x, ldx, 0, r, waiting, ahead), row = 2 * M;
                } else if (rows >= M) {
                    few_rows_chains<A, M, 1, true>(from, K, x, ldx, 0, r, waiting, ahead), row = M;
                } else {
                    few_rows_chains<A, 1, 1, true>(from, K, x, ldx, 0, r, waiting, ahead), row = 1;
                }
            }
            for (; row + M <= rows; row += M) few_rows_chains<A, M>(from, K, x, ldx, row, r, waiting);
            for (; row < rows; ++row) few_rows_chains<A, 1>(from, K, x, ldx, row, r, waiting);
        }
        for (long row = 0; row < rows; ++row)
            for (int s = 0; s < STREAMS; ++s)
                put(row, (block + s * each) * n, n, waiting[LEVELS - 1][row][s]);
    }
    for (block += (STREAMS - 1) * max_of(each, 0); block < end; ++block) {
        const long j = block * n, count = min_of(n, N - j);
        A sums[FEW_ROWS * n];
        rows_as_they_lie<A>(w + j * ldw, ldw, K, count, rows, x, ldx, sums, n, false);
        for (long row = 0; row < rows; ++row) put(row, j, count, load<A>(sums + row * n));
    }
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
