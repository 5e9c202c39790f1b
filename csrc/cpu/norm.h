// The norm of a layer, and what stands behind a product in one pass over memory: bias, activation, residual
// connection, norm.
#pragma once

#include "activation.h"
#include "parallel.h"

namespace seqkern {
namespace SEQKERN_ISA {

// to[0..size) = the norm of from[0..size), which may be the same; zeros lie behind from, up to a whole
// vector, and then behind to.
template <class A, class S>
SK_INLINE void normalize_row(const LayerNorm& norm, long size, const A* from, A* to) {
    constexpr long n = Simd<A>::n;
    Vec<A> sum{};
    for (long i = 0; i < size; i += n) sum += load<A>(from + i);
    A total = 0;
    for (long lane = 0; lane < n; ++lane) total += sum[lane];
    const A mean = total / static_cast<A>(size);
    Vec<A> squares{}, rest{};  // what the rounded mean leaves, of a row of equal numbers all of it
    const auto at = lanes<A>([](int lane) { return lane; });
    for (long i = 0; i < size; i += n) {
        Vec<A> d = load<A>(from + i) - mean;
        if (size - i < n) d = at < static_cast<int>(size - i) ? d : Vec<A>{};
        squares += d * d, rest += d;
    }
    A spread = 0, left = 0;
    for (long lane = 0; lane < n; ++lane) spread += squares[lane], left += rest[lane];
    left /= static_cast<A>(size);
    const double rounded = left;
    double variance = static_cast<double>(spread) / static_cast<double>(size) - rounded * rounded;
    if (variance < 0) variance = 0;
    const A factor = static_cast<A>(1 / __builtin_sqrt(variance + norm.eps));
    for (long i = 0; i < size; i += n) {
        const long count = min_of(n, size - i);
        Vec<A> y = (load<A>(from + i) - mean - left) * factor;
        if (norm.w) y *= load_n<A>(static_cast<const S*>(norm.w) + i, count);
        if (norm.b) y += load_n<A>(static_cast<const S*>(norm.b) + i, count);
        if (count < n) y = at < static_cast<int>(count) ? y : Vec<A>{};
        store<A>(to + i, y);
    }
}

template <class A, class S>
void ending_run(const Ending& c, const Team& team) {
    constexpr long n = Simd<A>::n;
    Scratch scratch(sizeof(A) * buffer_ld<A>(c.columns));
    A* sums = static_cast<A*>(scratch.p);
    if (!sums) {
        __atomic_store_n(team.failed, 1, __ATOMIC_RELAXED);
        return;
    }
    const S* bias = static_cast<const S*>(c.bias);
    const Range mine = share(c.rows, team.thread, team.threads);
    for (long r = mine.begin; r < mine.end; ++r) {
        S* y = static_cast<S*>(c.y) + r * c.columns;
        const S* x = c.x ? static_cast<const S*>(c.x) + r * c.columns : nullptr;
        for (long i = 0; i < c.columns; i += n) {
            const long left = c.columns - i;
            Vec<A> v = load_n<A>(y + i, left);
            if (bias) v += load_n<A>(bias + i, left);
            v = activated<A>(c.activation, v);
            if (x) v += load_n<A>(x + i, left);
            if (c.normed)
                store<A>(sums + i, v);
            else
                store_n<A>(y + i, v, left);
        }
        if (!c.normed) continue;
        normalize_row<A, S>(c.norm, c.columns, sums, sums);
        for (long i = 0; i < c.columns; i += n) store_n<A>(y + i, load<A>(sums + i), c.columns - i);
    }
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
