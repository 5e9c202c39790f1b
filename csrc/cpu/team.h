// What the threads of a team share besides their work. Included by every ISA: inlined always, so that none of
// it is merged across them by the linker.
#pragma once

namespace seqkern {

struct alignas(64) Barrier {
    int waiting = 0;
    int phase = 0;
    int long_waits = 0;  // longer than an idle core would need
    int alone_from = 0;  // the phase from which member 0 does all the work; 0: never
    int done = 0;        // member 0 has done it
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
