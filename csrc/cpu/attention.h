// All attention kernels of one ISA and their table. Included last in attention_*.cpp.
#include "attention_backward.h"
#include "attention_run.h"
#include "transformer_step.h"

namespace seqkern {
namespace SEQKERN_ISA {

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

static unsigned long attention_forward_shared(const AttentionForward& c) {
#define SK_CALL(A, S) attention_forward_bytes<A, S>(c)
    SK_FOR_DTYPE(c.dtype, SK_CALL)
#undef SK_CALL
    return 0;
}

static void attention_forward(const AttentionForward& c, char* shared, const Team& team) {
#define SK_CALL(A, S) attention_forward_run<A, S>(c, shared, team)
    SK_FOR_DTYPE(c.dtype, SK_CALL)
#undef SK_CALL
}

static unsigned long attention_backward_shared(const AttentionBackward& c) {
#define SK_CALL(A, S) attention_backward_bytes<A, S>(c)
    SK_FOR_DTYPE(c.dtype, SK_CALL)
#undef SK_CALL
    return 0;
}

static void attention_backward(const AttentionBackward& c, char* shared, const Team& team) {
#define SK_CALL(A, S) attention_backward_run<A, S>(c, shared, team)
    SK_FOR_DTYPE(c.dtype, SK_CALL)
#undef SK_CALL
}

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

}  // namespace SEQKERN_ISA
}  // namespace seqkern
