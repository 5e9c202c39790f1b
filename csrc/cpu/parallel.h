// Splitting and joining threads inside a team. No standard library here: this file is compiled into every
// ISA.
#pragma once

#include <sched.h>
#include <time.h>

#include "scan_call.h"
#include "simd.h"
#include "team.h"

namespace seqkern {

namespace SEQKERN_ISA {

// Spins for some microseconds, then yields, then sleeps: a thread that lost its core must not be waited for
// at full heat. Returns the phase that it opened. counted: what a long wait takes is another's turn on a
// core, and not work that was shared out unevenly.
SK_INLINE int barrier(Barrier* b, int threads, bool counted = false) {
    constexpr int SPINS = 4000, YIELDS = 200;
    if (threads == 1) return 0;
    const int phase = __atomic_load_n(&b->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&b->waiting, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&b->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->phase, phase + 1, __ATOMIC_RELEASE);
        return phase + 1;
    }
    long since = 0;
    for (int spins = 0; __atomic_load_n(&b->phase, __ATOMIC_ACQUIRE) == phase; ++spins) {
        if (spins < SPINS) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        } else if (spins < SPINS + YIELDS) {
            if (spins == SPINS) since = nanoseconds();
            sched_yield();
        } else {
            const timespec nap = {0, 50000};
            nanosleep(&nap, nullptr);
        }
    }
    if (since && counted)
        __atomic_add_fetch(&b->waited, (nanoseconds() - since) / (threads - 1), __ATOMIC_RELAXED);
    return phase + 1;
}

// The first barrier of a call. False where a thread of the team came without its memory. Who waits long waits
// for a thread that found no core to start on.
SK_INLINE bool all_ready(const Team& team, const void* scratch) {
    if (!scratch) __atomic_store_n(team.failed, 1, __ATOMIC_RELAXED);
    barrier(&team.barriers[team.threads], team.threads, true);
    return !__atomic_load_n(team.failed, __ATOMIC_RELAXED);
}

// What a member that left does until member 0 is done: at the end of a parallel region it would be waited for
// at full heat, on a core that other work holds as it is.
SK_INLINE void sleep_until_done(const Barrier* b) {
    const timespec nap = {0, 50000};
    while (!__atomic_load_n(&b->done, __ATOMIC_ACQUIRE)) nanosleep(&nap, nullptr);
}

// Hands out 64-byte aligned pieces; with base null it only counts.
struct Arena {
    char* base;
    unsigned long used = 0;

    template <class A>
    A* take(long n) {
        A* p = base ? reinterpret_cast<A*>(base + used) : nullptr;
        used += (static_cast<unsigned long>(n) * sizeof(A) + 63) / 64 * 64;
        return p;
    }
};

struct Range {
    long begin, end;
};

SK_INLINE Range share(long items, long part, long parts) {
    return {items * part / parts, items * (part + 1) / parts};
}

// Threads are first given whole directions, then rows of the batch (no barrier between them), and only then
// hidden units (a barrier each step). The results do not depend on the split, so it may depend on the number
// of threads.
struct Group {
    long direction, rows_begin, rows_end;
    int index, member, members;
    bool patient;  // steps are long: nobody leaves for a wait
};

// Where there are rows for all, but W_hh is read from far in every step, or in the only one: each thread
// reads its part of it for all rows rather than all of it for its rows.
SK_INLINE bool parts_weights(const Layer& c, long per_direction) {
    constexpr long FAR = 8L << 20, FAR_FOR_A_STEP = 1L << 20,
                   MOST_ROWS = 64;  // bytes, bytes; rows of a thread
    const long gates = c.cell == Cell::lstm ? 4 : c.cell == Cell::gru ? 3 : 1;
    const long bytes = gates * c.H * c.P * (c.dtype == Dtype::f64 ? 8 : 4);
    if (SEQKERN_VECTOR_BYTES == 64 && c.T == 1)
        return bytes >= FAR_FOR_A_STEP && c.B <= per_direction * MOST_ROWS;
    return SEQKERN_VECTOR_BYTES == 32 && bytes >= FAR && c.B >= per_direction * ROWS_WORTH_A_THREAD &&
           c.B <= per_direction * MOST_ROWS;
}

SK_INLINE long groups_per_direction(const Layer& c, int threads) {
    const long per_direction = max_of(1, threads / c.D);
    if (parts_weights(c, per_direction)) return 1;
    return min_of(per_direction, max_of(1, c.B / ROWS_WORTH_A_THREAD));
}

// The first row b such that rows [0, b) hold at least this share of all (t, b) pairs: packed batches split by
// length.
SK_INLINE long row_boundary(const Layer& c, long part, long parts) {
    if (!c.packed || part == 0 || part == parts) return c.B * part / parts;
    long done = 0, t = c.T;
    for (long b = 0; b < c.B; ++b) {
        while (t > 0 && c.row_start[t] - c.row_start[t - 1] <= b) --t;
        if (done * parts >= c.N * part) return b;
        done += t;
    }
    return c.B;
}

// Whether other work holds the cores so often that the members had better not meet in every step. Member 0
// asks.
SK_INLINE bool crowded(Barrier* b) {
    const long waited = __atomic_exchange_n(&b->waited, 0, __ATOMIC_RELAXED);
    if (waited) b->settle(waited, nanoseconds());
    return b->lost > Barrier::CROWD;
}

// A barrier of a step.
SK_INLINE int meet(Barrier* b, const Group& g, bool counted = true) {
    return barrier(b, g.members, counted && !g.patient);
}

// The barrier that ends a step. Where each would cost a turn of the scheduler all but member 0 leave, and
// false tells them so.
SK_INLINE bool end_step(Barrier* b, const Group& g, bool counted = true) {
    if (g.members == 1) return true;
    if (g.member == 0 && !g.patient && !b->alone_from && crowded(b))
        __atomic_store_n(&b->alone_from, __atomic_load_n(&b->phase, __ATOMIC_RELAXED) + 1, __ATOMIC_RELAXED);
    const int phase = meet(b, g, counted), from = __atomic_load_n(&b->alone_from, __ATOMIC_RELAXED);
    return !from || phase < from;
}

// The group as this thread finds it once members may have left. False: this one has.
SK_INLINE bool still_there(const Barrier* b, Group& g) {
    const int from = __atomic_load_n(&b->alone_from, __ATOMIC_RELAXED);
    if (g.members == 1 || !from || __atomic_load_n(&b->phase, __ATOMIC_RELAXED) < from) return true;
    g.members = 1;
    return g.member == 0;
}

// The k-th group this thread works in; false when there is none left.
SK_INLINE bool group_of(const Layer& c, const Team& team, long k, Group& g) {
    long split = groups_per_direction(c, team.threads), groups = split * c.D;
    long index, member, members;
    if (team.threads <= groups) {
        index = team.thread + k * team.threads;
        if (index >= groups) return false;
        member = 0, members = 1;
    } else {
        if (k > 0) return false;
        members = team.threads / groups;
        long larger = team.threads % groups;  // the first groups get one thread more
        long cut = larger * (members + 1);
        if (team.thread < cut) {
            index = team.thread / (members + 1), member = team.thread % (members + 1), ++members;
        } else {
            index = larger + (team.thread - cut) / members, member = (team.thread - cut) % members;
        }
    }
    g.index = index, g.member = member, g.members = members;
    g.patient = parts_weights(c, max_of(1, team.threads / c.D));
    g.direction = index / split;
    g.rows_begin = row_boundary(c, index % split, split);
    g.rows_end = row_boundary(c, index % split + 1, split);
    return true;
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
