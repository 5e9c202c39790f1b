// The interface between the dispatcher and the kernel of few rows by a matrix: plain data only.
#pragma once

#include "scan_call.h"

namespace seqkern {

enum class Activation { none, relu, gelu };  // gelu: the exact one, not of doubles

// Rows for which weights are read once and as they lie rather than packed.
constexpr long FEW_ROWS = 16, FEW_ROWS_OF_16_BITS = 4;

// y[r][j] = activation(bias[j] + sum_k x[r][k] w[j][k]). x and y are plain; a row of w is in one piece.
struct LinearCall {
    Dtype dtype;
    long rows, K, N;    // rows: FEW_ROWS at most
    const void *x, *w;  // [rows, K], [N, K]
    long ld_w;
    const void* bias;  // [N] or null
    Activation activation;
    void* y;  // [rows, N]
};

// out[r][c] = activation(bias[c] + sum_k a(r, k) b(k, c)).
struct Product {
    Dtype dtype;
    long rows, columns, depth;
    const void* a;  // a(r, k) at r ld_a + k, or by depth at k ld_a + r
    long ld_a;
    bool a_by_depth;
    const void* b;  // b(k, c) at c ld_b + k, or by depth at k ld_b + c
    long ld_b;
    bool b_by_depth;
    const void* bias;  // [columns] or null
    Activation activation;
    void* out;  // [rows, columns]
};

// y = (x - mean) / sqrt(variance + eps) w + b. w, b: [E] or null.
struct LayerNorm {
    const void *w, *b;
    double eps;
};

// y[r] = norm(x[r] + activation(y[r] + bias)), in place: what stands behind a product. y, x: [rows, columns],
// plain.
struct Ending {
    Dtype dtype;
    long rows, columns;
    void* y;
    const void *bias, *x;  // [columns], [rows, columns]; null: none
    Activation activation;
    bool normed;
    LayerNorm norm;
};

struct LinearTable {
    unsigned long (*shared_bytes)(const LinearCall&);
    void (*run)(const LinearCall&, char* shared, const Team&);
    void (*product)(const Product&, char*, const Team&);
    void (*ending)(const Ending&, char*, const Team&);
};

const LinearTable* linear_baseline_table();
const LinearTable* linear_avx2_table();
const LinearTable* linear_avx512_table();
const LinearTable* linear_avx512bf16_table();

}  // namespace seqkern
