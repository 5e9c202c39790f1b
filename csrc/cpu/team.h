// What the threads of a team share besides their work. Included by every ISA: inlined always, so that none of
// it is merged across them by the linker.
#pragma once

namespace seqkern {

struct alignas(64) Barrier {
    int waiting = 0;
    int phase = 0;
    int alone_from = 0;  // the phase from which member 0 does all the work; 0: never
    int done = 0;        // member 0 has done it
    long waited = 0;     // a member's nanoseconds in waits longer than an idle core needs
    long since = 0;      // when the call began, by the monotonic clock
    long lost = 0;       // `Crowd::lost` then
};

// Two threads that meet in every step need both cores at once. What they lose by waiting, less what they
// gain, adds up over the calls of a process; beyond `MOST` the cores are held to be others'. One turn of the
// scheduler, some milliseconds, is soon made up for.
struct Crowd {
    static constexpr long MOST = 10'000'000, GAIN = 4;  // nanoseconds; a call's time over what meeting gains
    static inline __attribute__((always_inline)) long lost(const Barrier& b, long waited, long now) {
        const long sum = b.lost + waited - (now - b.since) / GAIN;
        return sum < 0 ? 0 : sum;
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
