// The interface between the dispatcher and the attention kernels: plain data only. The meaning of the options
// stands in python/seqkern/spec/attention.py.
#pragma once

#include "linear_call.h"

namespace seqkern {

// A [B, H, rows, size] tensor whose last stride is 1, or a packed [total, H, size] one with batch stride 0.
struct Operand {
    const void* p;
    long b, h, i;
};

struct Result {
    void* p;
    long b, h, i;
};

// A [B, H, L, S] tensor; the stride of a broadcast dimension is 0, that of keys 0 or 1. p is null where the
// call has none.
struct Plane {
    const void* p;
    long b, h, i, j;
};

// Sizes: B batch, Hq heads of queries, Hkv of keys and values, L queries, S keys, D head size, Dv of values.
struct AttentionCall {
    Dtype dtype;
    long B, Hq, Hkv, L, S, D, Dv;   // packed: L and S of the longest sequence
    const long *start_q, *start_k;  // packed: [B + 1], where each sequence begins; null: dense
    long total_q;                   // rows of queries in all: B L, or those that are packed
    Operand q, k, v;
    Plane mask;  // of bool
    Plane bias;  // of the dtype, or of the wide one (double for f64, else float)
    bool bias_is_wide;
    const double *slopes, *sinks;  // [B, Hq], [Hq]; null: none
    double scale, softcap;         // softcap 0: none
    long left, right;              // of the window; -1: no limit
    bool bottom_right;
    double dropout_p;
    unsigned int drop_below;  // of 24 random bits: those that are smaller drop the weight
    unsigned long seed;
};

struct AttentionForward : AttentionCall {
    Result output;
    Result lse;      // wide, size 1; null: not wanted, which it is with the weights
    Result weights;  // [B, Hq, L, S], or for the mean [B, L, S] with a head stride of 0; null: not wanted
    bool mean;
    int threads;    // of the team at most; set by the dispatcher, as
    bool in_order;  // memory is read best in the order of addresses, not from several places by turns
};

struct AttentionBackward : AttentionCall {
    Operand output, grad_output;  // grad_output null: zero
    Operand lse, grad_lse;        // wide, size 1; grad_lse null: zero
    Plane grad_weights;           // of the dtype; null: zero
    bool mean;                    // grad_weights is that of the mean over the heads
    Result d_q;                   // wide, zeros before the call; null: not wanted
    Result d_k, d_v;              // null: not wanted (they go together)
    Result d_bias;                // wide, zeros before the call; 0 for the stride of a size of 1
    long d_bias_j;                // 1, or 0 where the bias has one number for all keys
    double *d_slopes, *d_sinks;   // [B, Hq] each; null: not wanted
};

// y = x W^T + b, of few rows. w: [N, K], a row in one piece, rows ld apart. b: [N] or null.
struct Weights {
    const void* w;
    long ld;
    const void* b;
};

// One new position of each sequence through a layer of a transformer. Sizes: B sequences, E features, F of
// the feed-forward.
struct StepCall {
    Dtype dtype;
    long B, E, F;
    bool norm_first;
    Activation activation;
    const void* x;  // [B, E]
    void* y;        // [B, E]
    // What the positions so far are, the new one included, and the memory of a layer that remembers one,
    // which may be empty: both without query, output and log-sum-exp.
    AttentionForward own, memory;
    bool remembers;
    Result new_k, new_v;  // where the new position's keys and values go, [B, H, D]
    Weights own_in, own_out, memory_in, memory_out, up, down;  // own_in: [3 E, E]; memory_in: [E, E]
    LayerNorm norms[3];                                        // behind or before each part that there is
};

struct AttentionTable {
    unsigned long (*forward_shared_bytes)(const AttentionForward&);
    void (*forward)(const AttentionForward&, char* shared, const Team&);
    unsigned long (*backward_shared_bytes)(const AttentionBackward&);
    void (*backward)(const AttentionBackward&, char* shared, const Team&);
    unsigned long (*step_shared_bytes)(const StepCall&);
    void (*step)(const StepCall&, char* shared, const Team&);
};

const AttentionTable* attention_baseline_table();
const AttentionTable* attention_avx2_table();
const AttentionTable* attention_avx512_table();
const AttentionTable* attention_avx512bf16_table();

}  // namespace seqkern
