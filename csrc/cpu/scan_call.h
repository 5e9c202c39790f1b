// The interface between the dispatcher (compiled once, baseline) and the kernels (compiled per ISA). Plain
// data only.
#pragma once

namespace seqkern {

enum class Cell { lstm, gru, rnn_tanh, rnn_relu };
enum class Dtype { f32, f64, bf16, f16 };

// One layer with one (D = 1) or two (D = 2) directions over T steps. Rows are (t, b) pairs, time-major: step
// t has active(t) rows, the first of them is row row_start[t]. Sizes: I input, H hidden, P = H or the
// projection, B batch.
struct Layer {
    Cell cell;
    Dtype dtype;
    long T, B, I, H, P, D, N;  // N: rows in all
    const long* row_start;     // [T + 1]
    const void* input;         // element (t, b, i) at t * input_t + b * input_b + i; packed: input_t unused
    long input_t, input_b;
    bool packed;
    const void *hx, *cx;  // [D, B, P], [D, B, H]
    struct {
        const void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;  // [G H, I], [G H, P], [G H], [G H], [P, H]
    } weights[2];
};

struct ForwardCall : Layer {
    void *output, *h_n, *c_n,
        *reserve;  // [N, D P], [D, B, P] or null, [D, B, H] or null, [D, N, R H] or null
};

struct BackwardCall : Layer {
    const void *grad_output, *grad_h_n, *grad_c_n;  // as the outputs; null: zero
    const void *output, *reserve;
    void *d_input, *d_hx, *d_cx;  // [N, I] or null, [D, B, P], [D, B, H] or null
    struct {
        void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;  // null: not wanted
    } d_weights[2];
};

// Sequences of a batch that are worth a thread of their own, which meets no barrier inside the scan.
constexpr long ROWS_WORTH_A_THREAD = 4;

// One thread's view of the threads that share a call.
struct Barrier;
struct Team {
    int thread, threads;
    Barrier* barriers;  // [threads + 1]: the last joins all, the others serve groups
    int* failed;        // set where a thread found no memory: all give up at their first barrier
};

struct KernelTable {
    const char* name;
    unsigned long (*forward_shared_bytes)(const ForwardCall&);
    void (*forward)(const ForwardCall&, char* shared, const Team&);
    unsigned long (*backward_shared_bytes)(const BackwardCall&);
    void (*backward)(const BackwardCall&, char* shared, const Team&);
    void (*vmath)(int function, bool is_double, const void* x, void* y, long n);
    bool (*gemm)(bool is_double, long M, long N, long K, const void* a, const void* b,
                 void* c);  // false: no memory
    // b is [K, N], or with `transposed` [N, K], of bfloats where it is `rounded`, else of floats.
    bool (*gemm_bf16)(bool rounded, bool transposed, long M, long N, long K, const float* a, const void* b,
                      float* c);
    double (*fma_chain)(
        long rounds);  // runs rounds * flops_per_round() fused multiply-adds; returns a value to keep
    long flops_per_round;
    double (*read_sum)(const float* p, long n);
};

const KernelTable* isa_baseline_table();
const KernelTable* isa_avx2_table();
const KernelTable* isa_avx512_table();
const KernelTable* isa_avx512bf16_table();

}  // namespace seqkern
