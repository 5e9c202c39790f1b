// seqkern::transformer_step on the CPU. The schema stands in python/seqkern/ops/transformer.py.
#include <cmath>

#include "tensors.h"

namespace {

using namespace seqkern;

// The tensors of a call, checked, and the plain copies that its pointers point into.
class Arguments {
  public:
    StepCall call{};

    Arguments(const Tensor& x, const Tensor& own, int64_t length, const Maybe& own_mask, const Maybe& keys,
              const Maybe& values, const Maybe& memory_mask, const Maybe& memory_bias,
              const std::vector<Maybe>& weights, const std::vector<double>& eps)
        : x_(x) {
        call.dtype = dtype_of(x);
        SK_REQUIRE(x.dim() == 2 && x.is_cpu(), "x has sizes ", written(x.sizes()),
                   ", expected [B, E] on the CPU");
        call.B = x.size(0), call.E = x.size(1);
        SK_REQUIRE(call.B <= FEW_ROWS, "x has ", call.B, " rows, expected at most ", FEW_ROWS);
        of_own(own, length, own_mask);
        const bool remembers = call.remembers = keys.has_value();
        if (remembers) of_memory(*keys, values, memory_mask, memory_bias);
        const size_t parts = remembers ? 3 : 2;
        SK_REQUIRE(weights.size() == 6 * parts && eps.size() == parts, "there are ", weights.size(),
                   " weights and ", eps.size(), " eps, expected ", 6 * parts, " and ", parts);
        const Maybe* next = weights.data();
        call.own_in = matrix(*next, next[1], 3 * call.E, call.E), next += 2;
        call.own_out = matrix(*next, next[1], call.E, call.E), next += 2;
        call.norms[0] = norm(*next, next[1], eps[0]), next += 2;
        if (remembers) {
            call.memory_in = matrix(*next, next[1], 3 * call.E, call.E), next += 2;
            call.memory_out = matrix(*next, next[1], call.E, call.E), next += 2;
            call.norms[1] = norm(*next, next[1], eps[1]), next += 2;
        }
        SK_REQUIRE(*next && (*next)->dim() == 2 && (*next)->size(0) > 0, "the feed-forward has no weight");
        call.F = (*next)->size(0);
        call.up = matrix(*next, next[1], call.F, call.E), next += 2;
        call.down = matrix(*next, next[1], call.E, call.F), next += 2;
        call.norms[parts - 1] = norm(*next, next[1], eps[parts - 1]);
        call.x = data_of(plain(x));
    }

  private:
    const Tensor& x_;
    std::vector<Tensor> kept_;

    void alike(const Tensor& t, const char* name) const {
        SK_REQUIRE(t.is_cpu() && t.scalar_type() == x_.scalar_type(), name,
                   " has another dtype or device than x");
    }
    const Tensor& plain(const Tensor& t) {
        return lies_plain(t) ? t : kept_.emplace_back(torch::stable::contiguous(t));
    }
    const void* vector(const Maybe& t, int64_t size, const char* name) {
        if (!t) return nullptr;
        alike(*t, name), require_sizes(*t, name, {size});
        return data_of(plain(*t));
    }
    Weights matrix(const Maybe& w, const Maybe& b, int64_t rows, int64_t columns) {
        SK_REQUIRE(w, "a weight is missing");
        alike(*w, "a weight"), require_sizes(*w, "a weight", {rows, columns});
        const bool in_one_piece = w->stride(1) == 1 || columns == 1;
        const Tensor& lies = in_one_piece ? *w : kept_.emplace_back(torch::stable::contiguous(*w));
        return {data_of(lies), lies.stride(0), vector(b, rows, "a bias")};
    }
    LayerNorm norm(const Maybe& w, const Maybe& b, double eps) {
        return {vector(w, call.E, "the weight of a norm"), vector(b, call.E, "the bias of a norm"), eps};
    }

    // One query in each head.
    AttentionForward attention(long heads, long head_size, long keys) const {
        AttentionForward a{};
        a.dtype = call.dtype;
        a.B = call.B, a.Hq = a.Hkv = heads, a.L = 1, a.S = keys, a.D = a.Dv = head_size;
        a.total_q = call.B;
        a.scale = 1 / std::sqrt(static_cast<double>(head_size));
        a.left = a.right = -1;
        return a;
    }
    // One number for each key of a sequence: [B, 1, 1, S].
    Plane plane(const Tensor& t, const char* name, long keys) {
        require_sizes(t, name, {call.B, 1, 1, keys});
        SK_REQUIRE(t.is_cpu(), name, " is not on the CPU");
        const Tensor& lies = t.stride(3) == 1 ? t : kept_.emplace_back(torch::stable::contiguous(t));
        return {data_of(lies), lies.stride(0), 0, 0, 1};
    }
    void add_mask(AttentionForward& a, const Maybe& mask, const char* name) {
        if (!mask) return;
        SK_REQUIRE(mask->scalar_type() == ScalarType::Bool, name, " is not of bool");
        a.mask = plane(*mask, name, a.S);
    }

    void of_own(const Tensor& own, int64_t length, const Maybe& mask) {
        alike(own, "own");
        SK_REQUIRE(own.dim() == 5 && own.size(0) == call.B && own.size(1) == 2 && own.stride(4) == 1 &&
                       own.size(2) * own.size(4) == call.E && own.size(2) > 0,
                   "own has sizes ", written(own.sizes()), ", expected [", call.B,
                   ", 2, heads, capacity, head size] of ", call.E, " features, the last ones side by side");
        SK_REQUIRE(length >= 0 && length < own.size(3), "length is ", length,
                   ", expected less than own's capacity ", own.size(3));
        call.own = attention(own.size(2), own.size(4), length + 1);
        const Tensor keys = torch::stable::select(own, 1, 0), values = torch::stable::select(own, 1, 1);
        call.own.k = {data_of(keys), keys.stride(0), keys.stride(1), keys.stride(2)};
        call.own.v = {data_of(values), values.stride(0), values.stride(1), values.stride(2)};
        const Tensor new_keys = torch::stable::select(keys, 2, length),
                     new_values = torch::stable::select(values, 2, length);
        call.new_k = {new_keys.mutable_data_ptr(), keys.stride(0), keys.stride(1), keys.stride(2)};
        call.new_v = {new_values.mutable_data_ptr(), values.stride(0), values.stride(1), values.stride(2)};
        add_mask(call.own, mask, "own_mask");
    }

    void of_memory(const Tensor& keys, const Maybe& values, const Maybe& mask, const Maybe& bias) {
        SK_REQUIRE(values, "memory_keys come without memory_values");
        for (const Tensor* t : {&keys, &*values}) {
            alike(*t, "the memory");
            SK_REQUIRE(t->dim() == 4 && t->stride(3) == 1, "the memory has sizes ", written(t->sizes()),
                       ", expected [B, heads, S, head size], the last ones side by side");
            require_sizes(*t, "the memory", {call.B, call.own.Hq, keys.size(2), call.own.D});
        }
        call.memory = attention(call.own.Hq, call.own.D, keys.size(2));
        call.memory.k = {data_of(keys), keys.stride(0), keys.stride(1), keys.stride(2)};
        call.memory.v = {data_of(*values), values->stride(0), values->stride(1), values->stride(2)};
        add_mask(call.memory, mask, "memory_mask");
        if (!bias) return;
        const auto wide = call.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
        SK_REQUIRE(bias->scalar_type() == x_.scalar_type() || bias->scalar_type() == wide,
                   "memory_bias has another dtype than expected");
        call.memory.bias = plane(*bias, "memory_bias", call.memory.S);
        call.memory.bias_is_wide = bias->scalar_type() == wide;
    }
};

Tensor step_op(Tensor x, Tensor own, int64_t length, Maybe own_mask, Maybe memory_keys, Maybe memory_values,
               Maybe memory_mask, Maybe memory_bias, std::vector<Maybe> weights, bool norm_first,
               int64_t activation, std::vector<double> eps) {
    Arguments arguments(x, own, length, own_mask, memory_keys, memory_values, memory_mask, memory_bias,
                        weights, eps);
    StepCall& call = arguments.call;
    call.norm_first = norm_first;
    call.activation = static_cast<Activation>(activation);
    SK_REQUIRE(call.activation == Activation::relu ||
                   (call.activation == Activation::gelu && call.dtype != Dtype::f64),
               "activation is ", activation, ", expected 1 (relu) or, not for float64, 2 (gelu)");
    Tensor y = empty(x, {call.B, call.E});
    if (y.numel() == 0) return y;
    call.y = y.mutable_data_ptr();
    transformer_step(call);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) { m.impl("transformer_step", TORCH_BOX(&step_op)); }
