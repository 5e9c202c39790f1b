// The interface between the dispatcher and the kernel of few rows by a matrix: plain data only.
#pragma once

#include "kernels.h"

namespace seqkern {

// y[r][j] = bias[j] + sum_k x[r][k] w[j][k]. x and y are plain; a row of w is in one piece.
struct LinearCall {
    Dtype dtype;
    long rows, K, N;
    const void *x, *w;  // [rows, K], [N, K]
    long ld_w;
    const void* bias;  // [N] or null
    void* y;           // [rows, N]
};

struct LinearTable {
    unsigned long (*shared_bytes)(const LinearCall&);
    void (*run)(const LinearCall&, char* shared, const Team&);
};

const LinearTable* linear_baseline_table();
const LinearTable* linear_avx2_table();
const LinearTable* linear_avx512_table();

}  // namespace seqkern
