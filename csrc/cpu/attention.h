// All attention kernels of one ISA and their table. Included last in attention_*.cpp. With SEQKERN_BF16_DOT
// only what it changes is compiled, the rest is avx512's.
#include "attention_backward.h"
#include "attention_run.h"
#include "transformer_step.h"

namespace seqkern {
namespace SEQKERN_ISA {

#ifdef SEQKERN_BF16_DOT
#define SK_FOR_DTYPE(dtype, CALL) return CALL(float, bfloat);
#define SK_UNLESS_BF16(call, c, ...) \
    if (c.dtype != Dtype::bf16) return attention_avx512_table()->call(c __VA_OPT__(, ) __VA_ARGS__)
#else
#define SK_UNLESS_BF16(...)
// CALL(A, S): arithmetic and storage of a dtype.
#define SK_FOR_DTYPE(dtype, CALL)        \
    switch (dtype) {                     \
        case Dtype::f32:                 \
            return CALL(float, float);   \
        case Dtype::f64:                 \
            return CALL(double, double); \
        case Dtype::bf16:                \
            return CALL(float, bfloat);  \
        case Dtype::f16:                 \
            return CALL(float, half);    \
    }
#endif

static unsigned long attention_forward_shared(const AttentionForward& c) {
    SK_UNLESS_BF16(forward_shared_bytes, c);
#define SK_CALL(A, S) attention_forward_bytes<A, S>(c)
    SK_FOR_DTYPE(c.dtype, SK_CALL)
#undef SK_CALL
    return 0;
}

static void attention_forward(const AttentionForward& c, char* shared, const Team& team) {
    SK_UNLESS_BF16(forward, c, shared, team);
#define SK_CALL(A, S) attention_forward_run<A, S>(c, shared, team)
    SK_FOR_DTYPE(c.dtype, SK_CALL)
#undef SK_CALL
}

static unsigned long attention_backward_shared(const AttentionBackward& c) {
    SK_UNLESS_BF16(backward_shared_bytes, c);
#define SK_CALL(A, S) attention_backward_bytes<A, S>(c)
    SK_FOR_DTYPE(c.dtype, SK_CALL)
#undef SK_CALL
    return 0;
}

static void attention_backward(const AttentionBackward& c, char* shared, const Team& team) {
    SK_UNLESS_BF16(backward, c, shared, team);
#define SK_CALL(A, S) attention_backward_run<A, S>(c, shared, team)
    SK_FOR_DTYPE(c.dtype, SK_CALL)
#undef SK_CALL
}

#ifndef SEQKERN_BF16_DOT
static unsigned long transformer_step_shared(const StepCall& c) {
#define SK_CALL(A, S) step_bytes<A, S>(c)
    SK_FOR_DTYPE(c.dtype, SK_CALL)
#undef SK_CALL
    return 0;
}

static void transformer_step(const StepCall& c, char* shared, const Team& team) {
#define SK_CALL(A, S) step_run<A, S>(c, shared, team)
    SK_FOR_DTYPE(c.dtype, SK_CALL)
#undef SK_CALL
}

static const AttentionTable attention_table = {attention_forward_shared,  attention_forward,
                                               attention_backward_shared, attention_backward,
                                               transformer_step_shared,   transformer_step};

#else
static AttentionTable over(AttentionTable table) {
    table.forward_shared_bytes = attention_forward_shared, table.forward = attention_forward;
    table.backward_shared_bytes = attention_backward_shared, table.backward = attention_backward;
    return table;
}
#endif

}  // namespace SEQKERN_ISA
}  // namespace seqkern
