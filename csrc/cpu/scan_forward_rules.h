// What a forward scan packs, how much of it it computes at a time, and what it stores past the caches.
#pragma once

#include "scan_common.h"

namespace seqkern {
namespace SEQKERN_ISA {

// What one pass over W_ih computes: rows that amortise it, and bytes of pre-activations, unless one step
// needs more. With AVX2 a W_ih that no cache of a core holds serves more rows at a time.
struct ForwardChunk {
    long rows, bytes;
};
constexpr ForwardChunk FORWARD_CHUNK = {128, 1L << 20}, FORWARD_CHUNK_OF_FAR_WEIGHTS = {512, 4L << 20};
constexpr long FAR_WEIGHTS = SEQKERN_VECTOR_BYTES == 32 ? 2L << 20 : __LONG_MAX__;  // bytes
// With fewer rows weights are read as they lie. One step reads them once, and packs them for itself alone.
constexpr long ROWS_WORTH_PACKING = 64;
constexpr long ROWS_OF_A_STEP_WORTH_PACKING = SEQKERN_VECTOR_BYTES == 64 ? 97 : ROWS_WORTH_PACKING;
// What a forward saves beyond this is out of the caches before the backward reads it.
constexpr long RESERVE_PAST_CACHES = SEQKERN_VECTOR_BYTES == 64 ? 16L << 20 : __LONG_MAX__;  // bytes
constexpr long PANELS_OF_A_ROW = 32;  // 4 to 16 KB of pre-activations
// With AVX2 a tile of 128 steps spends a tenth of its time on its ends. Rows of a call, and steps of the
// panels of both weights in 32 KB.
constexpr long ROWS_AT_ONCE = 16, DEPTH_AT_ONCE = 512;

template <class CellT, class A>
bool goes_past_caches(const ForwardCall& c) {
    using Sh = Shape<CellT, A>;
    constexpr unsigned long LINE = Sh::n * sizeof(A);
    const bool aligned = reinterpret_cast<unsigned long>(c.reserve) % LINE == 0 && c.H % Sh::n == 0;
    const long numbers = c.D * c.N * Sh::RESERVE * c.H;
    return aligned && numbers * static_cast<long>(sizeof(A)) > RESERVE_PAST_CACHES;
}

// A single sequence is bound by reading W_hh, and reads packed weights a quarter faster, which pays unless
// half of them stay in L1. With AVX-512 what the L2 of two cores does not hold gains less, in more steps; for
// any number of threads, since packed weights are summed in another order. Rounded ones always pay.
template <class CellT, class E>
bool worth_packing(const ForwardCall& c) {
    constexpr unsigned long BYTES = 128u << 10, FAR = 2u << 20;
    constexpr long STEPS_WORTH_FAR = 128;
    const unsigned long bytes = CellT::G * c.H * c.P * sizeof(E);
    const bool far = SEQKERN_VECTOR_BYTES == 64 && bytes > FAR, rounded = !__is_same(E, Sum<E>);
    return rounded || (bytes >= BYTES && (!far || c.T >= STEPS_WORTH_FAR));
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
