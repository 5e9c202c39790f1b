// Philox4x32 with ten rounds, one counter to a 32-bit lane: the twin of python/seqkern/spec/dropout.py.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace seqkern {
namespace SEQKERN_ISA {

typedef unsigned int Words __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));
typedef unsigned long Longs __attribute__((vector_size(SEQKERN_VECTOR_BYTES)));

// 64-bit products of the lower halves of the lanes. One instruction, which compilers do not find by
// themselves.
SK_INLINE Longs product_of_lower(Longs a, Longs b) {
#if defined(__x86_64__) && SEQKERN_VECTOR_BYTES == 64
    return (Longs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__x86_64__) && SEQKERN_VECTOR_BYTES == 32
    return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__) && SEQKERN_VECTOR_BYTES == 16
    return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffUL) * (b & 0xffffffffUL);
#endif
}

SK_INLINE void wide_product(Words a, unsigned int by, Words& high, Words& low) {
    const Longs factor = Longs{} + by;
    const Longs even = product_of_lower((Longs)a, factor), odd = product_of_lower((Longs)a >> 32, factor);
    high = (Words)((even >> 32) | (odd & 0xffffffff00000000UL));
    low = (Words)((even & 0xffffffffUL) | (odd << 32));
}

// Four words of each lane's counter c.
SK_INLINE void philox(unsigned long seed, Words c[4]) {
    unsigned int k0 = static_cast<unsigned int>(seed), k1 = static_cast<unsigned int>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        Words high_0, low_0, high_1, low_1;
        wide_product(c[0], 0xD2511F53u, high_0, low_0);
        wide_product(c[2], 0xCD9E8D57u, high_1, low_1);
        c[0] = high_1 ^ c[1] ^ k0, c[1] = low_1, c[2] = high_0 ^ c[3] ^ k1, c[3] = low_0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
