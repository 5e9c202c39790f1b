// What the threads of a team share besides their work. Included by every ISA: inlined always, so that none of
// it is merged across them by the linker.
#pragma once

#include <stdlib.h>

namespace seqkern {

struct alignas(64) Barrier {
    int waiting = 0;
    int phase = 0;
    int long_waits = 0;  // longer than an idle core would need
    int alone_from = 0;  // the phase from which member 0 does all the work; 0: never
};

// Memory for one call, on a cache line. Null where there is none left.
struct Scratch {
    void* p = nullptr;
    inline __attribute__((always_inline)) explicit Scratch(unsigned long bytes) {
        if (posix_memalign(&p, 64, bytes + 64)) p = nullptr;
    }
    inline __attribute__((always_inline)) ~Scratch() { free(p); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

}  // namespace seqkern
