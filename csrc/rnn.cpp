// seqkern::rnn_forward, rnn_backward and rnn_step on the CPU: tensors checked and laid out as calls of the
// kernels. The schemas and the meaning of each form stand in python/seqkern/ops/rnn.py.
#include <array>
#include <tuple>

#include "tensors.h"

namespace {

using namespace seqkern;

long reserve_of(Cell cell) { return cell == Cell::lstm ? 5 : cell == Cell::gru ? 4 : 0; }

// The tensors of a call, checked, and the plain copies that its pointers point into.
class Arguments {
  public:
    // In the order of the schema; index 0 is `input`.
    std::array<Maybe, 14> tensors;
    seqkern::Layer layer{};
    bool step = false;

    explicit Arguments(std::array<Maybe, 14> given, const std::string& cell) : tensors(std::move(given)) {
        layer.cell = cell_named(cell);
        layer.dtype = dtype_of(input());
        measure();
        states();
        for (int direction = 0; direction < layer.D; ++direction) weights(direction);
    }

    const Tensor& input() const { return *tensors[0]; }
    Sizes output_sizes() const {
        if (step) return {layer.B, layer.P};
        if (layer.packed) return {layer.N, layer.D * layer.P};
        return {layer.T, layer.B, layer.D * layer.P};
    }
    Sizes state_sizes(long width) const {
        return step ? Sizes{layer.B, width} : Sizes{layer.D, layer.B, width};
    }
    int64_t reserve_numel() const { return layer.D * layer.N * reserve_of(layer.cell) * layer.H; }

    // A plain view of a tensor of these sizes, in this call's dtype unless another is given.
    const void* plain(const Tensor& t, const char* name, const Sizes& sizes,
                      std::optional<ScalarType> dtype = {}) {
        check(t, name, sizes, dtype);
        return lies_plain(t) ? data_of(t) : data_of(kept_.emplace_back(torch::stable::contiguous(t)));
    }

  private:
    std::vector<long> row_start_;
    std::vector<Tensor> kept_;

    void check(const Tensor& t, const char* name, const Sizes& sizes, std::optional<ScalarType> dtype) const {
        require_sizes(t, name, sizes);
        SK_REQUIRE(t.is_cpu(), name, " is not on the CPU");
        SK_REQUIRE(t.scalar_type() == dtype.value_or(input().scalar_type()), name,
                   " has another dtype than expected");
    }

    void measure() {
        Tensor x = input();
        SK_REQUIRE(x.is_cpu(), "input is not on the CPU");
        layer.packed = tensors[1].has_value();
        step = x.dim() == 2 && !layer.packed;
        SK_REQUIRE(x.dim() == 2 || (x.dim() == 3 && !layer.packed), "input has sizes ", written(x.sizes()),
                   ", expected [T, B, I], [N, I] with batch_sizes, or [B, I]");
        layer.I = x.size(-1);
        SK_REQUIRE(layer.I > 0, "input has no features");
        if (x.stride(-1) != 1 && layer.I > 1) {
            x = torch::stable::contiguous(x);
            kept_.push_back(x);
        }
        layer.input = data_of(x);
        layer.input_b = x.stride(-2);
        if (layer.packed) {
            lengths(*tensors[1], x.size(0));
        } else {
            layer.T = step ? 1 : x.size(0);
            layer.B = x.size(-2);
            layer.input_t = step ? 0 : x.stride(0);
            layer.N = layer.T * layer.B;
            for (long t = 0; t <= layer.T; ++t) row_start_.push_back(t * layer.B);
        }
        SK_REQUIRE(layer.T > 0, "input has no time steps");
        layer.row_start = row_start_.data();
        layer.D = tensors[9] ? 2 : 1;
        SK_REQUIRE(!(step && layer.D == 2), "a single step has one direction");
    }

    void lengths(const Tensor& batch_sizes, int64_t rows) {
        SK_REQUIRE(
            batch_sizes.dim() == 1 && batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.is_cpu(),
            "batch_sizes must be a 1-D int64 tensor on the CPU");
        layer.T = batch_sizes.size(0);
        const auto* sizes =
            static_cast<const int64_t*>(plain(batch_sizes, "batch_sizes", {layer.T}, ScalarType::Long));
        layer.B = layer.T ? sizes[0] : 0;
        row_start_.push_back(0);
        for (long t = 0; t < layer.T; ++t) {
            SK_REQUIRE(sizes[t] > 0 && sizes[t] <= (t ? sizes[t - 1] : layer.B),
                       "batch_sizes must be positive and must not increase");
            row_start_.push_back(row_start_.back() + sizes[t]);
        }
        layer.N = row_start_.back();
        SK_REQUIRE(layer.N == rows, "batch_sizes add up to ", layer.N, ", but input has ", rows, " rows");
    }

    void states() {
        const Tensor &hx = *tensors[2], &w_hh = *tensors[5];
        const long gates = gates_of(layer.cell);
        SK_REQUIRE(w_hh.dim() == 2 && w_hh.size(0) > 0 && w_hh.size(0) % gates == 0, "w_hh has sizes ",
                   written(w_hh.sizes()), ", expected [", gates, " * H, P]");
        layer.H = w_hh.size(0) / gates;
        layer.P = w_hh.size(1);
        SK_REQUIRE(layer.P > 0 && (tensors[8] || layer.P == layer.H), "w_hh has sizes ",
                   written(w_hh.sizes()), ": without w_hr its columns are the hidden units");
        SK_REQUIRE(!tensors[8] || layer.cell == Cell::lstm, "only an lstm has w_hr");
        SK_REQUIRE((layer.cell == Cell::lstm) == tensors[3].has_value(),
                   "cx belongs to an lstm, and only to it");
        layer.hx = plain(hx, "hx", state_sizes(layer.P));
        if (tensors[3]) layer.cx = plain(*tensors[3], "cx", state_sizes(layer.H));
    }

    void weights(int direction) {
        const Maybe* w = &tensors[4 + 5 * direction];
        const long rows = gates_of(layer.cell) * layer.H;
        SK_REQUIRE(w[0] && w[1], "a direction lacks w_ih or w_hh");
        SK_REQUIRE(w[2].has_value() == w[3].has_value(), "b_ih and b_hh go together");
        SK_REQUIRE(w[4].has_value() == tensors[8].has_value(), "either both directions have w_hr or none");
        auto& to = layer.weights[direction];
        to.w_ih = plain(*w[0], "w_ih", {rows, layer.I});
        to.w_hh = plain(*w[1], "w_hh", {rows, layer.P});
        to.b_ih = w[2] ? plain(*w[2], "b_ih", {rows}) : nullptr;
        to.b_hh = w[3] ? plain(*w[3], "b_hh", {rows}) : nullptr;
        to.w_hr = w[4] ? plain(*w[4], "w_hr", {layer.P, layer.H}) : nullptr;
    }
};

ScalarType reserve_dtype(const Arguments& args) {
    return args.layer.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_forward(Tensor input, Maybe batch_sizes, Tensor hx, Maybe cx,
                                                       Tensor w_ih, Tensor w_hh, Maybe b_ih, Maybe b_hh,
                                                       Maybe w_hr, Maybe w_ih_reverse, Maybe w_hh_reverse,
                                                       Maybe b_ih_reverse, Maybe b_hh_reverse,
                                                       Maybe w_hr_reverse, std::string cell, bool save) {
    Arguments args({input, batch_sizes, hx, cx, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse, w_hh_reverse,
                    b_ih_reverse, b_hh_reverse, w_hr_reverse},
                   cell);
    seqkern::ForwardCall call{};
    static_cast<seqkern::Layer&>(call) = args.layer;
    Tensor output = empty(input, args.output_sizes());
    Tensor h_n = empty(input, args.step ? Sizes{0} : args.state_sizes(call.P));
    Tensor c_n = empty(input, cx ? args.state_sizes(call.H) : Sizes{0});
    Tensor reserve = empty(input, {save ? args.reserve_numel() : 0}, reserve_dtype(args));
    if (call.N > 0) {
        call.output = output.mutable_data_ptr();
        call.h_n = args.step ? nullptr : h_n.mutable_data_ptr();
        call.c_n = cx ? c_n.mutable_data_ptr() : nullptr;
        call.reserve = reserve.numel() ? reserve.mutable_data_ptr() : nullptr;
        seqkern::scan_forward(call);
    }
    return {output, h_n, c_n, reserve};
}

// Whether the tensors of a cell with a batch are what `Arguments` takes.
bool fits(const Tensor& input, const Tensor& hx, const Maybe& cx, const Tensor& w_ih, const Tensor& w_hh,
          const Maybe& b_ih, const Maybe& b_hh, Cell cell) {
    const auto dtype = input.scalar_type();
    if (!serves(dtype)) return false;
    if (input.dim() != 2 || w_hh.dim() != 2 || b_ih.has_value() != b_hh.has_value() ||
        cx.has_value() != (cell == Cell::lstm))
        return false;
    const int64_t B = input.size(0), I = input.size(1), H = w_hh.size(1), rows = gates_of(cell) * H;
    return I > 0 && H > 0 && is_of(hx, dtype, {B, H}) && (!cx || is_of(*cx, dtype, {B, H})) &&
           input.is_cpu() && is_of(w_ih, dtype, {rows, I}) && is_of(w_hh, dtype, {rows, H}) &&
           (!b_ih || (is_of(*b_ih, dtype, {rows}) && is_of(*b_hh, dtype, {rows})));
}

std::tuple<Maybe, Maybe> rnn_step(Tensor input, Tensor hx, Maybe cx, Tensor w_ih, Tensor w_hh, Maybe b_ih,
                                  Maybe b_hh, std::string cell) {
    if (!fits(input, hx, cx, w_ih, w_hh, b_ih, b_hh, cell_named(cell))) return {};
    Arguments args({input, {}, hx, cx, w_ih, w_hh, b_ih, b_hh}, cell);
    seqkern::ForwardCall call{};
    static_cast<seqkern::Layer&>(call) = args.layer;
    Tensor output = empty(input, args.output_sizes());
    Maybe c_n;
    call.output = output.mutable_data_ptr();
    if (cx) call.c_n = c_n.emplace(empty(input, args.output_sizes())).mutable_data_ptr();
    if (call.N > 0) seqkern::scan_forward(call);
    return {output, c_n};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor>;

Gradients rnn_backward(Tensor grad_output, Tensor grad_h_n, Tensor grad_c_n, Tensor output, Tensor reserve,
                       Tensor input, Maybe batch_sizes, Tensor hx, Maybe cx, Tensor w_ih, Tensor w_hh,
                       Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe w_ih_reverse, Maybe w_hh_reverse,
                       Maybe b_ih_reverse, Maybe b_hh_reverse, Maybe w_hr_reverse, std::string cell,
                       bool need_input, bool need_weights) {
    Arguments args({input, batch_sizes, hx, cx, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_reverse, w_hh_reverse,
                    b_ih_reverse, b_hh_reverse, w_hr_reverse},
                   cell);
    seqkern::BackwardCall call{};
    static_cast<seqkern::Layer&>(call) = args.layer;
    call.grad_output = args.plain(grad_output, "grad_output", args.output_sizes());
    if (!args.step) call.grad_h_n = args.plain(grad_h_n, "grad_h_n", args.state_sizes(call.P));
    if (cx) call.grad_c_n = args.plain(grad_c_n, "grad_c_n", args.state_sizes(call.H));
    call.output = args.plain(output, "output", args.output_sizes());
    call.reserve = args.plain(reserve, "reserve", {args.reserve_numel()}, reserve_dtype(args));

    const bool some = call.N > 0;
    std::array<Tensor, 13> found;
    auto give = [&](int at, const Maybe& like, bool wanted) -> void* {
        if (!like || !wanted) {
            found[at] = empty(input, {0});
            return nullptr;
        }
        const auto sizes = like->sizes();
        found[at] =
            some ? empty(*like, {sizes.begin(), sizes.end()}) : torch::stable::new_zeros(*like, sizes);
        return found[at].mutable_data_ptr();
    };
    call.d_input = give(0, args.tensors[0], need_input);
    call.d_hx = give(1, args.tensors[2], true);
    call.d_cx = give(2, args.tensors[3], true);
    for (int direction = 0; direction < 2; ++direction) {
        const int first = 5 * direction;
        auto wanted = [&](int i) { return give(3 + first + i, args.tensors[4 + first + i], need_weights); };
        auto& to = call.d_weights[direction];
        to.w_ih = wanted(0), to.w_hh = wanted(1), to.b_ih = wanted(2), to.b_hh = wanted(3),
        to.w_hr = wanted(4);
    }
    if (some) seqkern::scan_backward(call);
    return std::apply([](auto&... t) { return std::make_tuple(t...); }, found);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
    m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
    m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
    m.impl("rnn_step", TORCH_BOX(&rnn_step));
}
