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

constexpr unsigned int PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u, PHILOX_W0 = 0x9E3779B9u,
                       PHILOX_W1 = 0xBB67AE85u;
constexpr int PHILOX_ROUNDS = 10;

// Four words of each lane's counter, of `count` vectors together, from round `first` on. Even and odd lanes
// go their own ways in the lower halves of 64 bits, as the products take them; what the upper halves hold is
// never looked at. One way alone would wait for its products.
template <int count>
SK_INLINE void philox(unsigned long seed, Words (*c)[4], int first = 0) {
    Longs x[2 * count][4];
    SK_UNROLL
    for (int at = 0; at < count; ++at) SK_UNROLL
    for (int word = 0; word < 4; ++word) {
        x[2 * at][word] = (Longs)c[at][word];
        x[2 * at + 1][word] = (Longs)c[at][word] >> 32;
    }
    const Longs m0 = Longs{} + PHILOX_M0, m1 = Longs{} + PHILOX_M1;
    Longs k0 = Longs{} + (seed + static_cast<unsigned long>(first) * PHILOX_W0);
    Longs k1 = Longs{} + ((seed >> 32) + static_cast<unsigned long>(first) * PHILOX_W1);
    for (; first < PHILOX_ROUNDS; ++first) {
        SK_UNROLL
        for (int at = 0; at < 2 * count; ++at) {
            const Longs p0 = product_of_lower(x[at][0], m0), p1 = product_of_lower(x[at][2], m1);
            x[at][0] = (p1 >> 32) ^ (x[at][1] ^ k0), x[at][1] = p1;
            x[at][2] = (p0 >> 32) ^ (x[at][3] ^ k1), x[at][3] = p0;
        }
        k0 += PHILOX_W0, k1 += PHILOX_W1;
    }
    SK_UNROLL
    for (int at = 0; at < count; ++at) SK_UNROLL
    for (int word = 0; word < 4; ++word)
        c[at][word] = (Words)((x[2 * at][word] & 0xffffffffUL) | (x[2 * at + 1][word] << 32));
}

// The words of counters (b, h, i, x) with h and i of each lane. Only two numbers of the first two rounds
// depend on x, and they are the same in all lanes.
struct PhiloxLanes {
    unsigned int high_b;           // of the first round's word 2, without x
    Words word_0, word_2, word_3;  // after two rounds, word 0 without what x brings

    SK_INLINE PhiloxLanes(unsigned long seed, unsigned int b, const Words& h, const Words& i) {
        const unsigned int k0 = static_cast<unsigned int>(seed), k1 = static_cast<unsigned int>(seed >> 32);
        const unsigned long of_b = static_cast<unsigned long>(b) * PHILOX_M0;
        high_b = static_cast<unsigned int>(of_b >> 32) ^ k1;
        for (unsigned lane = 0; lane < sizeof(Words) / 4; ++lane) {
            const unsigned long p1 = static_cast<unsigned long>(i[lane]) * PHILOX_M1;
            const unsigned int first = static_cast<unsigned int>(p1 >> 32) ^ h[lane] ^ k0;
            const unsigned long p0 = static_cast<unsigned long>(first) * PHILOX_M0;
            word_0[lane] = static_cast<unsigned int>(p1) ^ (k0 + PHILOX_W0);
            word_2[lane] =
                static_cast<unsigned int>(p0 >> 32) ^ static_cast<unsigned int>(of_b) ^ (k1 + PHILOX_W1);
            word_3[lane] = static_cast<unsigned int>(p0);
        }
    }
    SK_INLINE void start(unsigned int x, Words c[4]) const {  // before round 2
        const unsigned long p = static_cast<unsigned long>(high_b ^ x) * PHILOX_M1;
        c[0] = word_0 ^ static_cast<unsigned int>(p >> 32), c[1] = Words{} + static_cast<unsigned int>(p);
        c[2] = word_2, c[3] = word_3;
    }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
