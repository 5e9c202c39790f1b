// The activation behind a linear layer.
#pragma once

#include "linear_call.h"
#include "vmath.h"

namespace seqkern {
namespace SEQKERN_ISA {

template <class A>
SK_INLINE Vec<A> activated(Activation activation, Vec<A> x) {
    if (activation == Activation::relu) return at_least<A>(x, 0);
    if constexpr (__is_same(A, float))
        if (activation == Activation::gelu) return gelu(x);
    return x;
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
