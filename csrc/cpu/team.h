// What the threads of a team share besides their work. Included by every ISA: inlined always, so that none of
// it is merged across them by the linker.
#pragma once

#include <time.h>

namespace seqkern {

inline __attribute__((always_inline)) long nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

// Threads that meet in every step need all their cores at once. What they lose by waiting for a core, less
// what they gain, adds up over the calls of a process; beyond CROWD the cores are held to be others'. One
// turn of the scheduler, some milliseconds, is soon made up for.
struct alignas(64) Barrier {
    static constexpr long CROWD = 20'000'000, GAIN = 4;  // nanoseconds; time over what meeting gains in it

    int waiting = 0;
    int phase = 0;
    int alone_from = 0;  // the phase from which member 0 does all the work; 0: never
    int done = 0;        // member 0 has done it
    long waited = 0;     // a member's nanoseconds in long waits, since they were last added up
    long since = 0;      // when that was, by the monotonic clock
    long lost = 0;       // the sum

    inline __attribute__((always_inline)) void settle(long wait, long now) {
        const long sum = lost + wait - (now - since) / GAIN;
        lost = sum < 0 ? 0 : sum, since = now;
    }
};

// Memory on a cache line that the calling thread has used before, if some of it is large enough; null where
// there is none left. It is given back by the thread that took it.
void* take_scratch(unsigned long bytes);
void give_scratch(void* p);

// Memory for one call. Null where there is none left.
struct Scratch {
    void* p;
    inline __attribute__((always_inline)) explicit Scratch(unsigned long bytes) : p(take_scratch(bytes)) {}
    inline __attribute__((always_inline)) ~Scratch() { give_scratch(p); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

}  // namespace seqkern
