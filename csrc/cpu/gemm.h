// One packed matmul. B lies in panels of W = NV vectors: packed [panel][k][W] and zero-padded, or whole ones
// as they lie in a row-major matrix. A is row-major with a leading dimension (or, KMAJOR, packed as
// [k][rows]). Every output element is one chain of fused multiply-adds over each block of k, whatever the
// tile it falls in, so no split of the work among threads or tiles changes a bit of the result. Only
// `row_times` is for products that no split changes.
#pragma once

#include "simd.h"

namespace seqkern {
namespace SEQKERN_ISA {

// What one step along k takes from factors with elements E: `depth` of them for each element of the sum.
template <class E>
struct Factor {
    static constexpr int depth = 1, width = Simd<E>::n;  // width: numbers in a vector
    using Sum = E;
    using Each = Vec<E>;

    static SK_INLINE E spread(const E* a) { return *a; }  // to every lane
    template <class S>
    static SK_INLINE Each load(const S* p) {
        return load_whole<E>(p);
    }
    template <class S>
    static SK_INLINE Each load(const S* p, long n) {
        return load_n<E>(p, n);
    }
    template <class B>
    static SK_INLINE void add(Vec<E>& sum, B a, Each b) {
        sum += a * b;
    }

    using Mask = typename Simd<E>::I;
    static SK_INLINE Mask last(int count) {
        return lanes<E>([](int i) { return i; }) >= width - count;
    }
    static SK_INLINE Each masked(Each x, Mask mask) { return (Each)((Mask)x & mask); }
};
template <class E>
using Sum = typename Factor<E>::Sum;

// A number of elements along k, up to whole steps.
template <class E>
SK_INLINE constexpr long whole_steps(long K) {
    return ceil_div(K, Factor<E>::depth) * Factor<E>::depth;
}

// Numbers as a row of A: to[0..K) = from[0..K), zeros behind them to a whole step.
template <class E, class S>
SK_INLINE void factor_row(E* to, const S* from, long K) {
    if constexpr (__is_same(E, S)) {
        __builtin_memcpy(to, from, static_cast<unsigned long>(K) * sizeof(E));
    } else {
        constexpr int n = Simd<Sum<E>>::n;
        for (long k = 0; k < K; k += n) store_n<Sum<E>>(to + k, load_n<Sum<E>>(from + k, K - k), K - k);
    }
    for (long k = K; k < whole_steps<E>(K); ++k) to[k] = E{};
}

template <int NV>
constexpr int max_rows() {
    return SEQKERN_ACCUMULATORS / NV;
}

// Panels done at once when there are few rows: enough independent chains to hide the latency of the
// multiply-add.
template <int NV>
constexpr int max_panels(long rows) {
    return rows == 1 ? (NV == 2 ? 4 : 2) : rows <= max_rows<NV>() / 2 ? 2 : 1;
}

template <class E>
struct Panels {
    const E* first;
    long ld, stride;  // from one step along k to the next, from one panel to the next

    SK_INLINE const E* at(long panel, long k = 0) const {
        return first + panel * stride + k / Factor<E>::depth * ld;
    }
    SK_INLINE Panels from(long panel, long k = 0) const { return {at(panel, k), ld, stride}; }
};

// Four steps along k to a round: what counts and jumps takes the place of multiply-adds, and the end of 32
// rounds is foreseen where that of 128 is not.
#if SEQKERN_VECTOR_BYTES == 32
#define SK_UNROLL_STEPS _Pragma("GCC unroll 4")
#else
#define SK_UNROLL_STEPS
#endif

// A product that a chain of multiply-adds begins with: rows of A, and the panel of B that belongs to the
// tile.
template <class E>
struct Lead {
    const E* a;
    long lda;
    const E* b;
    long K;
};

// Whether a tile asks for a line with each step along k, into the second-level cache: what the third level
// gives by itself to machines with AVX-512 can be less than half of what a tile takes.
constexpr bool ASKS_AHEAD = SEQKERN_VECTOR_BYTES == 64;

// Tiles of few sums use a line sooner, and ask for two.
template <int NV>
constexpr long lines_asked(long rows) {
    return NV == 1 || rows <= max_rows<NV>() / 2 ? 2 : 1;
}

// What the tiles of a product ask for: `columns` of lines, `rows` in each, column after column for as many
// rows as a tile has steps. Packed numbers are one column of neighbouring lines.
struct Ahead {
    const char* first = nullptr;
    long row_bytes = 64, rows = 0, columns = 1;

    // The first line for a tile that asks for `lines` at once, or null, and from there to the next.
    struct Line {
        const char* p;
        long bytes;
    };
    SK_INLINE Line of_tile(long tile, long steps, long lines) const {
        if (row_bytes == 64) {
            const long row = tile * steps * lines;
            return {row < rows ? first + row * 64 : nullptr, lines * 64};
        }
        const long together = ceil_div(columns, lines), row = tile / together * steps;
        return {row < rows ? first + row * row_bytes + tile % together * lines * 64 : nullptr, row_bytes};
    }
};

// line: the first that is asked for, the next ones line_bytes apart.
// Numbers one by one: a struct of them would be written in parts and read as a whole, which no processor
// forwards, so that each tile would wait until the one before it has left the pipeline.
template <class E, int MR, int NV, int NP, bool KMAJOR, bool LED = false>
void tile(const E* __restrict a, long lda, const E* __restrict b, long ldb, long b_stride, long K, Sum<E>* o,
          long ldo, long o_stride, bool accumulate, const Lead<E>* lead, const char* line, long line_bytes) {
    using F = Factor<E>;
    using A = Sum<E>;
    constexpr int n = Simd<A>::n;
    // Vectors of B that are held in registers; one that would be the 33rd is read for each row, where a
    // multiply-add takes it from memory.
    constexpr bool FITS = (MR + 1) * NV + 1 <= 32;
    constexpr int HELD = SEQKERN_VECTOR_BYTES != 64 || NP > 1 || F::depth > 1 || FITS ? NV : NV - 1;
    Vec<A> acc[NP][MR][NV];
    SK_UNROLL
    for (int p = 0; p < NP; ++p) SK_UNROLL
    for (int m = 0; m < MR; ++m) SK_UNROLL
    for (int v = 0; v < NV; ++v) acc[p][m][v] = Vec<A>{};
    const Lead<E> last = {a, lda, b, K};
    for (int product = LED ? 0 : 1; product < 2; ++product) {
        if constexpr (LED) {
            const Lead<E>& now = product ? last : *lead;
            a = now.a, lda = now.lda, b = now.b, K = now.K;
        }
        // One pointer for three rows: row pointers of their own would not fit the general registers.
        const E* rows[(MR + 2) / 3];
        SK_UNROLL
        for (int g = 0; g < (MR + 2) / 3; ++g) rows[g] = a + (KMAJOR ? 0 : g * 3 * lda);
        SK_UNROLL_STEPS
        for (long k = 0; k < K; k += F::depth) {
            typename F::Each bv[NP][NV];
            SK_UNROLL
            for (int p = 0; p < NP; ++p) SK_UNROLL
            for (int v = 0; v < HELD; ++v) bv[p][v] = F::load(b + p * b_stride + v * n * F::depth);
            SK_UNROLL
            for (int m = 0; m < MR; ++m) {
                const auto s = F::spread(KMAJOR ? a + m * F::depth : rows[m / 3] + (m % 3) * lda);
                SK_UNROLL
                for (int p = 0; p < NP; ++p) SK_UNROLL
                for (int v = 0; v < HELD; ++v) F::add(acc[p][m][v], s, bv[p][v]);
                if constexpr (HELD < NV) {
                    asm("" : "+r"(b));  // else it is read once, and a sum is spilled for it
                    F::add(acc[0][m][HELD], s, F::load(b + HELD * n * F::depth));
                }
            }
            b += ldb;
            if constexpr (ASKS_AHEAD) {
                __builtin_prefetch(line, 0, 2);
                if constexpr (lines_asked<NV>(MR) == 2) __builtin_prefetch(line + 64, 0, 2);
                line += line_bytes;
            }
            if (KMAJOR) {
                a += lda;
            } else {
                SK_UNROLL
                for (int g = 0; g < (MR + 2) / 3; ++g) rows[g] += F::depth;
            }
        }
    }
    SK_UNROLL
    for (int p = 0; p < NP; ++p) SK_UNROLL
    for (int m = 0; m < MR; ++m) SK_UNROLL
    for (int v = 0; v < NV; ++v) {
        A* to = o + p * o_stride + m * ldo + v * n;
        store<A>(to, accumulate ? load<A>(to) + acc[p][m][v] : acc[p][m][v]);
    }
}

template <class E>
using TileFn = void (*)(const E*, long, const E*, long, long, long, Sum<E>*, long, long, bool, const Lead<E>*,
                        const char*, long);

template <class E, int NV, int NP, bool KMAJOR, bool LED = false, int MR = max_rows<NV>()>
SK_INLINE TileFn<E> find_tile(long rows) {
    if constexpr (MR == 0) {
        return nullptr;
    } else if constexpr (NP > max_panels<NV>(MR)) {
        return find_tile<E, NV, NP, KMAJOR, LED, MR - 1>(rows);
    } else {
        return rows == MR ? tile<E, MR, NV, NP, KMAJOR, LED>
                          : find_tile<E, NV, NP, KMAJOR, LED, MR - 1>(rows);
    }
}

template <class E, int NV, bool KMAJOR>
SK_APART TileFn<E> tile_for(long rows, long panels) {
    return panels == 4   ? find_tile<E, NV, 4, KMAJOR>(rows)
           : panels == 2 ? find_tile<E, NV, 2, KMAJOR>(rows)
                         : find_tile<E, NV, 1, KMAJOR>(rows);
}

// Tiles of two vectors are compiled with the recurrent kernels, for the others too.
#define SK_TILES(E, ...)                                              \
    __VA_ARGS__ template TileFn<E> tile_for<E, 2, false>(long, long); \
    __VA_ARGS__ template TileFn<E> tile_for<E, 2, true>(long, long);
#ifndef SEQKERN_BF16_DOT
SK_TILES(float, extern)
SK_TILES(double, extern)
#endif

// A panel block of 1024 x 64 floats is 256 KB: it stays in L2 under the row tiles.
template <class E>
constexpr long K_BLOCK = 1024 * Factor<E>::depth;

// o[panel][row][W] (+)= a[row][k] b[panel][k][W]; KMAJOR: a[k][row]. Packed panels are asked for ahead:
// `next` is the one that a later call begins with, or null. With `ask` that is asked for instead.
template <class E, int NV, bool KMAJOR = false>
void gemm(long M, const E* a, long lda, const Panels<E>& b, long panels, long K, Sum<E>* o, long ldo,
          long o_stride, bool accumulate, const E* next = nullptr, const Ahead* ask = nullptr) {
    if (M <= 0) return;
    constexpr int STEP = Factor<E>::depth;
    constexpr long W = NV * Simd<Sum<E>>::n * STEP;  // numbers in a step
    long tiles = ceil_div(M, max_rows<NV>()), base = M / tiles, longer = M % tiles, asked = 0;
    for (long k0 = 0; k0 == 0 || k0 < K; k0 += K_BLOCK<E>) {
        long depth = min_of(K_BLOCK<E>, K - k0);
        const E* from = a + (KMAJOR ? k0 / STEP * lda : k0);
        for (long p = 0; p < panels;) {
            long group = min_of(max_panels<NV>(longer ? base + 1 : base), panels - p);
            if (group == 3) group = 2;
            TileFn<E> small = tile_for<E, NV, KMAJOR>(base, group);
            TileFn<E> large = longer ? tile_for<E, NV, KMAJOR>(base + 1, group) : small;
            const E* after = p + group < panels ? b.at(p + group, k0)
                             : k0 + depth < K   ? b.at(0, k0 + depth)
                                                : next;
            const long bytes =
                (depth == K ? group : 1) * (b.at(0, depth) - b.at(0)) * static_cast<long>(sizeof(E));
            const Ahead panel{reinterpret_cast<const char*>(after), 64,
                              after && b.ld == W ? ceil_div(bytes, 64) : 0};
            const long steps = depth / STEP;
            for (long i = 0, row = 0; i < tiles; ++i) {
                const long rows = base + (i < longer);
                const long lines = lines_asked<NV>(rows);
                const Ahead::Line line =
                    ask ? ask->of_tile(asked++, steps, lines) : panel.of_tile(i, steps, lines);
                (i < longer ? large : small)(
                    from + row * (KMAJOR ? STEP : lda), lda, b.at(p, k0), b.ld, b.stride, depth,
                    o + p * o_stride + row * ldo, ldo, o_stride, accumulate || k0 > 0, nullptr,
                    line.p ? line.p : reinterpret_cast<const char*>(a), line.p ? line.bytes : 0);
                row += rows;
            }
            p += group;
        }
    }
}

// Chains of one row of sums: as many as a line of the second-level cache in each cycle needs. And bytes ahead
// that are asked for, which the third level takes.
template <class E>
constexpr int CHAINS_OF_A_ROW = Factor<E>::depth == 1 ? 4 : 8;
constexpr long AHEAD_OF_A_ROW = 4096;

// o[panel][W] (+)= a[K] b[panel][K][W], packed panels one after the other: a single stream, which comes twice
// as fast as several that are read by turns (docs/decisions.md). With few vectors steps along k go by turns
// to several sets of sums, joined at the end of a block, so this is for products of one row whatever the
// split: a tile's sums join in another order.
template <class E, int NV>
SK_APART void row_times(const E* a, const Panels<E>& b, long panels, long K, Sum<E>* o, long o_stride,
                        bool accumulate) {
    using F = Factor<E>;
    using A = Sum<E>;
    constexpr int n = Simd<A>::n, STEP = F::depth, APART = (CHAINS_OF_A_ROW<E> + NV - 1) / NV;
    for (long p = 0; p < panels; ++p) {
        for (long k0 = 0; k0 == 0 || k0 < K; k0 += K_BLOCK<E>) {
            const long end = min_of(K, k0 + K_BLOCK<E>), whole = end - (end - k0) % (APART * STEP);
            const E* at = b.at(p, k0);
            Vec<A> sums[APART][NV] = {};
            long k = k0;
            for (; k < whole; k += APART * STEP) SK_UNROLL
            for (int i = 0; i < APART; ++i, at += b.ld) {
                const auto s = F::spread(a + k + i * STEP);
                SK_UNROLL
                for (int v = 0; v < NV; ++v) {
                    const E* line = at + v * n * STEP;
                    F::add(sums[i][v], s, F::load(line));
                    __builtin_prefetch(reinterpret_cast<const char*>(line) + AHEAD_OF_A_ROW);
                }
            }
            for (; k < end; k += STEP, at += b.ld) {
                const auto s = F::spread(a + k);
                SK_UNROLL
                for (int v = 0; v < NV; ++v) F::add(sums[0][v], s, F::load(at + v * n * STEP));
            }
            SK_UNROLL
            for (int i = 1; i < APART; ++i) SK_UNROLL
            for (int v = 0; v < NV; ++v) sums[0][v] += sums[i][v];
            SK_UNROLL
            for (int v = 0; v < NV; ++v) {
                A* to = o + p * o_stride + v * n;
                store<A>(to, accumulate || k0 ? load<A>(to) + sums[0][v] : sums[0][v]);
            }
        }
    }
}

// o[row][W] = lead.a lead.b + a b of one panel, each sum one chain through both. Neither K may exceed
// K_BLOCK.
template <class E, int NV>
SK_INLINE void gemm_led(long M, Lead<E> lead, const E* a, long lda, const E* b, long ldb, long K, Sum<E>* o,
                        long ldo) {
    const long tiles = ceil_div(M, max_rows<NV>());
    for (long i = 0; i < tiles; ++i) {
        const long row = M * i / tiles, rows = M * (i + 1) / tiles - row;
        find_tile<E, NV, 1, false, true>(rows)(a + row * lda, lda, b, ldb, 0, K, o + row * ldo, ldo, 0, false,
                                               &lead, reinterpret_cast<const char*>(b), 0);
        lead.a += rows * lead.lda;
    }
}

// o[row][0..N) (+)= sum over k of a[row][k] (KMAJOR: a[k][row]) b[k][0..N), all row-major, ldb from one step
// along k to the next; N is a whole number of vectors.
template <class E, bool KMAJOR = false>
void multiply_rows(long M, const E* a, long lda, const E* b, long ldb, long N, long K, Sum<E>* o, long ldo,
                   bool accumulate, const Ahead* ask = nullptr) {
    constexpr long n = Simd<Sum<E>>::n, W = 2 * n, STEP = Factor<E>::depth;
    const long whole = N / W;
    if (whole)
        gemm<E, 2, KMAJOR>(M, a, lda, {b, ldb, W * STEP}, whole, K, o, ldo, W, accumulate, nullptr, ask);
    if (N % W)
        gemm<E, 1, KMAJOR>(M, a, lda, {b + whole * W * STEP, ldb, n * STEP}, 1, K, o + whole * W, ldo, n,
                           accumulate);
}

// n x n transpose in log2(n) rounds of interleaving.
template <class A>
SK_INLINE void transpose(Vec<A>* rows) {
    constexpr int n = Simd<A>::n;
    using I = typename Simd<A>::I;
#if SEQKERN_VECTOR_BYTES == 32
    // Within halves of 16 bytes an interleaving is one instruction; the halves change places last.
    if constexpr (n == 8) {
        constexpr I low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
        constexpr I pairs_low = {0, 1, 8, 9, 4, 5, 12, 13}, pairs_high = {2, 3, 10, 11, 6, 7, 14, 15};
        constexpr I first = {0, 1, 2, 3, 8, 9, 10, 11}, second = {4, 5, 6, 7, 12, 13, 14, 15};
        Vec<A> two[n], four[n];
        SK_UNROLL
        for (int i = 0; i < n; i += 2) {
            two[i] = __builtin_shuffle(rows[i], rows[i + 1], low);
            two[i + 1] = __builtin_shuffle(rows[i], rows[i + 1], high);
        }
        SK_UNROLL
        for (int i = 0; i < n; ++i) {
            const int from = i / 4 * 4 + i % 4 / 2;
            four[i] = __builtin_shuffle(two[from], two[from + 2], i % 2 ? pairs_high : pairs_low);
        }
        SK_UNROLL
        for (int i = 0; i < n / 2; ++i) {
            rows[i] = __builtin_shuffle(four[i], four[i + 4], first);
            rows[i + 4] = __builtin_shuffle(four[i], four[i + 4], second);
        }
        return;
    }
#endif
    constexpr I low = lanes<A>([](int i) { return i / 2 + (i % 2) * n; });
    constexpr I high = lanes<A>([](int i) { return i / 2 + n / 2 + (i % 2) * n; });
    SK_UNROLL
    for (int round = 1; round < n; round *= 2) {
        Vec<A> next[n];
        SK_UNROLL
        for (int i = 0; i < n / 2; ++i) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + n / 2], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + n / 2], high);
        }
        SK_UNROLL
        for (int i = 0; i < n; ++i) rows[i] = next[i];
    }
}

// Panel column block: to[k][0..n) (row stride W) = w[0..lanes)[k] for k < K; w has K contiguous per row
// (stride ldw).
template <class A, class S>
void pack_transposed(A* to, long W, const S* w, long ldw, long lanes, long K) {
    constexpr int n = Simd<A>::n;
    for (long k = 0; k < K; k += n) {
        Vec<A> block[n];
        long left = K - k;
        SK_UNROLL
        for (int i = 0; i < n; ++i) block[i] = i < lanes ? load_n<A>(w + i * ldw + k, left) : Vec<A>{};
        transpose<A>(block);
        if (left >= n) {
            SK_UNROLL
            for (int i = 0; i < n; ++i) store<A>(to + (k + i) * W, block[i]);
        } else {
            for (int i = 0; i < left; ++i) store<A>(to + (k + i) * W, block[i]);
        }
    }
}

// Panel: to[k][0..W) = w[k][0..columns), zeros behind.
template <class A, class S>
SK_INLINE void pack_row(A* to, long W, const S* w, long columns) {
    for (long j = 0; j < W; j += Simd<A>::n)
        store<A>(to + j, columns > j ? load_n<A>(w + j, columns - j) : Vec<A>{});
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
