// Few rows times a matrix that is read once, as it lies: every output is a dot product along a row of it.
#pragma once

#include "gemv.h"
#include "linear_call.h"
#include "linear_dense.h"
#include "norm.h"
#include "parallel.h"

namespace seqkern {
namespace SEQKERN_ISA {

// Whether the input is copied: into the type of the sums, or apart.
template <class A, class S>
SK_INLINE bool linear_copies(const LinearCall& c) {
    return !__is_same(A, S) || c.rows > 1;
}

template <class A, class S>
unsigned long linear_bytes(const LinearCall& c) {
    return linear_copies<A, S>(c) ? sizeof(A) * c.rows * buffer_ld<A>(c.K) : 0;
}

template <class A, class S>
void linear_run(const LinearCall& c, char* shared, const Team& team) {
    const A* x = static_cast<const A*>(c.x);
    long ld = c.K;
    if (linear_copies<A, S>(c)) {
        ld = buffer_ld<A>(c.K);
        A* copy = reinterpret_cast<A*>(shared);
        const Range mine = share(c.rows, team.thread, team.threads);
        for (long r = mine.begin; r < mine.end; ++r)
            copy_row<A>(copy + r * ld, static_cast<const S*>(c.x) + r * c.K, c.K);
        barrier(&team.barriers[team.threads], team.threads);
        x = copy;
    }
    const auto put = [&](long row, long j, long count, Vec<A> out) {
        if (c.bias) out += load_n<A>(static_cast<const S*>(c.bias) + j, count);
        store_n<A>(static_cast<S*>(c.y) + row * c.N + j, activated<A>(c.activation, out), count);
    };
    few_rows<A>(static_cast<const S*>(c.w), c.ld_w, c.K, c.N, x, ld, c.rows, team.thread, team.threads, put);
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

static void ending(const Ending& c, char*, const Team& team) {
#define SK_CALL(A, S) return ending_run<A, S>(c, team)
    SK_FOR_STORAGE(c.dtype, SK_CALL)
#undef SK_CALL
}

static const LinearTable linear_table = {linear_shared, linear, product, ending};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
