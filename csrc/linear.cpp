// seqkern::linear on the CPU. The schema stands in python/seqkern/ops/linear.py.
#include "tensors.h"

namespace {

using namespace seqkern;

Tensor linear_op(Tensor input, Tensor weight, Maybe bias) {
    SK_REQUIRE(input.dim() >= 1 && weight.dim() == 2, "input has ", input.dim(), " dimensions and weight ",
               weight.dim(), ", expected at least 1, and 2");
    LinearCall call{};
    call.dtype = dtype_of(input);
    call.K = weight.size(1), call.N = weight.size(0);
    SK_REQUIRE(call.K > 0 && input.size(-1) == call.K, "input has sizes ", written(input.sizes()),
               " and weight ", written(weight.sizes()), ", expected one number of features, above 0");
    for (const Tensor* t : {&input, &weight, bias ? &*bias : &input})
        SK_REQUIRE(t->is_cpu() && t->scalar_type() == input.scalar_type(),
                   "input, weight and bias must be on the CPU and of one dtype");
    if (bias)
        SK_REQUIRE(bias->dim() == 1 && bias->size(0) == call.N, "bias has sizes ", written(bias->sizes()),
                   ", expected [", call.N, "]");
    const Tensor x = lies_plain(input) ? input : torch::stable::contiguous(input);
    const bool in_one_piece = weight.stride(1) == 1 || call.K == 1;
    const Tensor w = in_one_piece ? weight : torch::stable::contiguous(weight);
    const Maybe b = !bias || lies_plain(*bias) ? bias : Maybe(torch::stable::contiguous(*bias));
    Sizes sizes;
    for (int64_t size : input.sizes()) sizes.push_back(size);
    sizes.back() = call.N;
    Tensor output = empty(input, sizes);
    call.rows = input.numel() / call.K;
    if (output.numel() == 0) return output;
    call.x = x.const_data_ptr();
    call.w = w.const_data_ptr();
    call.ld_w = w.stride(0);
    call.bias = b ? b->const_data_ptr() : nullptr;
    call.y = output.mutable_data_ptr();
    seqkern::linear(call);
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) { m.impl("linear", TORCH_BOX(&linear_op)); }
