// Few rows times a matrix that is read once, as it lies: every output is a dot product along a row of it.
#pragma once

#include "gemv.h"
#include "linear_call.h"
#include "linear_dense.h"
#include "parallel.h"

namespace seqkern {
namespace SEQKERN_ISA {

// Rows that are multiplied with a vector of weights while it is in a register.
constexpr long LINEAR_TOGETHER = 4;
constexpr int LINEAR_AHEAD = 8;  // rows of w

template <class A, class S>
constexpr bool linear_converts = !__is_same(A, S);

// The input in the type of the sums, where that is not its own.
template <class A, class S>
unsigned long linear_bytes(const LinearCall& c) {
    return linear_converts<A, S> ? sizeof(A) * c.rows * c.K : 0;
}

// y[row][j0..j0+count) for M rows: out lanes behind `count` are some other row's.
template <class A, class S>
SK_INLINE void linear_put(const LinearCall& c, long row, long j0, long count, Vec<A> out) {
    if (c.bias) out += load_n<A>(static_cast<const S*>(c.bias) + j0, count);
    store_n<A>(static_cast<S*>(c.y) + row * c.N + j0, activated<A>(c.activation, out), count);
}

template <class A, class S, int M, int AHEAD>
SK_INLINE void linear_rows(const LinearCall& c, const A* x, long row, long j0, long count) {
    Multiplied<A> by[M];
    Vec<A> out[M];
    SK_UNROLL
    for (int m = 0; m < M; ++m) by[m] = Multiplied<A>(x + (row + m) * c.K, c.K);
    dot_rows<A, M, AHEAD>(static_cast<const S*>(c.w) + j0 * c.ld_w, c.ld_w, count, by, out);
    SK_UNROLL
    for (int m = 0; m < M; ++m) linear_put<A, S>(c, row + m, j0, count, out[m]);
}

template <class A, class S>
void linear_run(const LinearCall& c, char* shared, const Team& team) {
    constexpr long n = Simd<A>::n, M = LINEAR_TOGETHER;
    const A* x;
    if constexpr (linear_converts<A, S>) {
        A* wide = reinterpret_cast<A*>(shared);
        const Range mine = share(c.rows, team.thread, team.threads);
        for (long r = mine.begin; r < mine.end; ++r)
            copy_row<A>(wide + r * c.K, static_cast<const S*>(c.x) + r * c.K, c.K);
        barrier(&team.barriers[team.threads], team.threads);
        x = wide;
    } else {
        x = static_cast<const A*>(c.x);
    }
    const Range blocks = share(ceil_div(c.N, n), team.thread, team.threads);
    for (long j0 = blocks.begin * n; j0 < blocks.end * n; j0 += n) {
        const long count = min_of(n, c.N - j0);
        long row = c.rows < M ? 1 : M;  // the first rows fetch the block, the others find it in L2
        if (c.rows < M)
            linear_rows<A, S, 1, LINEAR_AHEAD>(c, x, 0, j0, count);
        else
            linear_rows<A, S, M, LINEAR_AHEAD>(c, x, 0, j0, count);
        for (; row + M <= c.rows; row += M) linear_rows<A, S, M, 0>(c, x, row, j0, count);
        for (; row < c.rows; ++row) linear_rows<A, S, 1, 0>(c, x, row, j0, count);
    }
}

#define SK_FOR_STORAGE(dtype, CALL) \
    switch (dtype) {                \
        case Dtype::f32:            \
            CALL(float, float);     \
        case Dtype::f64:            \
            CALL(double, double);   \
        case Dtype::bf16:           \
            CALL(float, bfloat);    \
        case Dtype::f16:            \
            CALL(float, half);      \
    }

static unsigned long linear_shared(const LinearCall& c) {
#define SK_CALL(A, S) return linear_bytes<A, S>(c)
    SK_FOR_STORAGE(c.dtype, SK_CALL)
#undef SK_CALL
    return 0;
}

static void linear(const LinearCall& c, char* shared, const Team& team) {
#define SK_CALL(A, S) return linear_run<A, S>(c, shared, team)
    SK_FOR_STORAGE(c.dtype, SK_CALL)
#undef SK_CALL
}

static void product(const Product& c, char*, const Team& team) {
#define SK_CALL(A, S) return dense_run<A, S>(c, team)
    SK_FOR_STORAGE(c.dtype, SK_CALL)
#undef SK_CALL
}

static const LinearTable linear_table = {linear_shared, linear, product};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
