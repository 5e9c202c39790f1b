// How the backward of attention is shared out, and what its units leave for one another.
#pragma once

#include "attention_weights.h"

namespace seqkern {
namespace SEQKERN_ISA {

constexpr int ALL_DONE = 0x7fffffff;

// How far a unit has come: blocks of queries that it has passed.
SK_INLINE void wait_for(const int* done, int least) {
    for (long spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < least; ++spins) {
        if (spins < 4000) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        } else {
            sched_yield();
        }
    }
}

template <class A>
struct BackwardPlan {
    static constexpr long W = Panel<A>::W, n = Simd<A>::n, ROWS = 64, TOGETHER = ROWS / W;
    long chunk, chunks, groups, G, Nd, Nv;
    bool columns, rows;  // a bias that is one for all queries, or for all keys

    explicit BackwardPlan(const AttentionBackward& c)
        : chunk(max_of(c.D, c.Dv) <= 128 ? 256 : 128),
          chunks(ceil_div(c.S, chunk)),
          groups(c.B * c.Hkv),
          G(c.Hq / c.Hkv),
          Nd(padded<A>(c.D)),
          Nv(padded<A>(c.Dv)),
          columns(c.d_bias.p && c.d_bias.i == 0),
          rows(c.d_bias.p && c.d_bias.i != 0 && c.d_bias_j == 0) {}

    long units() const { return groups * chunks; }
    // What the units share, each part on a line of its own.
    struct Shared {
        long* next;      // tickets
        int* done;       // [units]
        A* delta;        // [total_q][Hq]: what the softmax takes back of a row, less what lse is asked for
        double* slopes;  // [units][G]
        A* columns;      // [B][Hq][S]: sums of d_bias over the queries
        A* rows;         // [total_q][Hq]: and over the keys
    };
    Shared shared(const AttentionBackward& c, char* base, unsigned long* bytes = nullptr) const {
        Shared found;
        unsigned long used = 0;
        auto take = [&](unsigned long size) {
            char* p = base ? base + used : nullptr;
            used += (size + 63) / 64 * 64;
            return p;
        };
        const unsigned long lines = c.total_q * c.Hq;
        found.next = reinterpret_cast<long*>(take(64));
        found.done = reinterpret_cast<int*>(take(sizeof(int) * units()));
        found.delta = reinterpret_cast<A*>(take(sizeof(A) * lines));
        found.slopes = reinterpret_cast<double*>(take(c.d_slopes ? sizeof(double) * units() * G : 0));
        found.columns = reinterpret_cast<A*>(take(columns ? sizeof(A) * c.B * c.Hq * c.S : 0));
        found.rows = reinterpret_cast<A*>(take(rows ? sizeof(A) * lines : 0));
        if (bytes) *bytes = used;
        return found;
    }
};

// Row of a query among all, for what is kept per query and head.
SK_INLINE long line_of(const AttentionCall& c, const Sequence& s, long h, long i) {
    return ((c.start_q ? s.from_q : s.b * c.L) + i) * c.Hq + h;
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
