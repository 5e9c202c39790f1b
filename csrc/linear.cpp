// seqkern::linear and seqkern::mm on the CPU. The schemas stand in python/seqkern/ops/linear.py.
#include <algorithm>

#include "tensors.h"

namespace {

using namespace seqkern;

// A matrix whose rows or, `by_column`, columns are in one piece; a copy where it is neither.
struct Matrix {
    Tensor kept;
    bool by_column;

    explicit Matrix(const Tensor& t) : kept(t), by_column(false) {
        if (t.stride(1) == 1 || t.size(1) <= 1) return;
        by_column = t.stride(0) == 1 || t.size(0) <= 1;
        if (!by_column) kept = torch::stable::contiguous(t);
    }
    const void* data() const { return data_of(kept); }
    int64_t ld() const { return kept.stride(by_column ? 1 : 0); }  // 0 where it was expanded
};

Tensor linear_op(Tensor input, Tensor weight, Maybe bias, int64_t activation) {
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
    const auto act = static_cast<Activation>(activation);
    SK_REQUIRE(act == Activation::none || act == Activation::relu ||
                   (act == Activation::gelu && call.dtype != Dtype::f64),
               "activation is ", activation, ", expected 0, 1 (relu) or, not for float64, 2 (gelu)");
    const Tensor x = lies_plain(input) ? input : torch::stable::contiguous(input);
    Maybe b = bias;
    if (b && !lies_plain(*b)) b = torch::stable::contiguous(*b);
    Sizes sizes;
    for (int64_t size : input.sizes()) sizes.push_back(size);
    sizes.back() = call.N;
    Tensor output = empty(input, sizes);
    call.rows = input.numel() / call.K;
    if (output.numel() == 0) return output;
    const bool narrow = call.dtype == Dtype::bf16 || call.dtype == Dtype::f16;
    if (call.rows <= (narrow ? FEW_ROWS_OF_16_BITS : FEW_ROWS)) {
        const bool in_one_piece = weight.stride(1) == 1 || call.K == 1;
        const Tensor w = in_one_piece ? weight : torch::stable::contiguous(weight);
        call.x = data_of(x);
        call.w = data_of(w);
        call.ld_w = w.stride(0);
        call.bias = b ? data_of(*b) : nullptr;
        call.activation = act;
        call.y = output.mutable_data_ptr();
        seqkern::linear(call);
        return output;
    }
    const Matrix w(weight);
    Product product{};
    product.dtype = call.dtype;
    product.rows = call.rows, product.columns = call.N, product.depth = call.K;
    product.a = data_of(x), product.ld_a = call.K;
    product.b = w.data(), product.ld_b = w.ld(), product.b_by_depth = w.by_column;
    product.bias = b ? data_of(*b) : nullptr;
    product.activation = act;
    product.out = output.mutable_data_ptr();
    seqkern::product(product);
    return output;
}

Tensor mm_op(Tensor a, Tensor b) {
    SK_REQUIRE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && a.size(1) > 0, "a has sizes ",
               written(a.sizes()), " and b ", written(b.sizes()),
               ", expected [R, K] and [K, C] with K above 0");
    SK_REQUIRE(a.is_cpu() && b.is_cpu() && a.scalar_type() == b.scalar_type(),
               "a and b must be on the CPU and of one dtype");
    Tensor output = empty(a, {a.size(0), b.size(1)});
    if (output.numel() == 0) return output;
    const Matrix of_a(a), of_b(b);
    Product product{};
    product.dtype = dtype_of(a);
    product.rows = a.size(0), product.columns = b.size(1), product.depth = a.size(1);
    product.a = of_a.data(), product.ld_a = of_a.ld(), product.a_by_depth = of_a.by_column;
    product.b = of_b.data(), product.ld_b = of_b.ld(), product.b_by_depth = !of_b.by_column;
    product.out = output.mutable_data_ptr();
    seqkern::product(product);
    return output;
}

void ending_op(Tensor y, Maybe bias, int64_t activation, Maybe x, Maybe weight, Maybe norm_bias,
               std::optional<double> eps) {
    SK_REQUIRE(y.dim() >= 1 && lies_plain(y), "y must be contiguous and have a dimension");
    Ending call{};
    call.dtype = dtype_of(y);
    call.columns = y.size(-1);
    const auto act = static_cast<Activation>(activation);
    SK_REQUIRE(act == Activation::none || act == Activation::relu ||
                   (act == Activation::gelu && call.dtype != Dtype::f64),
               "activation is ", activation, ", expected 0, 1 (relu) or, not for float64, 2 (gelu)");
    call.activation = act;
    Maybe kept[4] = {bias, x, weight, norm_bias};
    const void* data[4] = {};
    const char* names[4] = {"bias", "x", "weight", "norm_bias"};
    for (int i = 0; i < 4; ++i) {
        if (!kept[i]) continue;
        SK_REQUIRE(kept[i]->is_cpu() && kept[i]->scalar_type() == y.scalar_type(), names[i],
                   " must be on the CPU and of y's dtype");
        Sizes sizes{call.columns};
        if (i == 1) sizes.assign(y.sizes().begin(), y.sizes().end());
        require_sizes(*kept[i], names[i], sizes);
        if (!lies_plain(*kept[i])) kept[i] = torch::stable::contiguous(*kept[i]);
        data[i] = data_of(*kept[i]);
    }
    if (y.numel() == 0) return;
    call.rows = y.numel() / call.columns;
    call.y = y.mutable_data_ptr();
    call.bias = data[0], call.x = data[1];
    call.normed = eps.has_value();
    if (eps) call.norm = {data[2], data[3], *eps};
    seqkern::ending(call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
    m.impl("linear", TORCH_BOX(&linear_op));
    m.impl("mm", TORCH_BOX(&mm_op));
    m.impl("ending_", TORCH_BOX(&ending_op));
}
