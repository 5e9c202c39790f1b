// seqkern::rnn_layers on the CPU: a stack of recurrent layers without a gradient, from torch's arguments to
// its results in one call. What it does not take it leaves to the way that checks, chooses and calls layer by
// layer.
#include <cstring>
#include <tuple>

#include "tensors.h"

namespace {

using namespace seqkern;
using Weights = std::vector<Tensor>;

class Stack {
  public:
    // Of the first layer, but for its memory.
    ForwardCall call{};

    Stack(const Tensor& input, const Maybe& hx, const Maybe& cx, const Weights& weights, int64_t layers,
          bool bidirectional, bool batch_first, const std::string& cell)
        : layers_(layers), batch_first_(batch_first) {
        call.cell = cell_named(cell);
        call.D = bidirectional ? 2 : 1;
        fits_ = measure(input, weights) && every_weight(weights) && states(hx, cx);
    }

    bool fits() const { return fits_; }

    std::tuple<Maybe, Maybe, Maybe> run(const Tensor& input, const Maybe& hx, const Maybe& cx,
                                        const Weights& weights) {
        std::vector<long> row_start(call.T + 1);
        for (long t = 0; t <= call.T; ++t) row_start[t] = t * call.B;
        call.row_start = row_start.data();
        const long sets = layers_ * call.D, width = call.D * call.P;
        const bool lstm = call.cell == Cell::lstm;
        Tensor h_n = empty(input, {sets, call.B, call.P});
        Maybe c_n = lstm ? Maybe(empty(input, {sets, call.B, call.H})) : Maybe();
        Maybe zero;
        if (!hx) {
            zero = empty(input, {call.D, call.B, std::max(call.P, call.H)});
            std::memset(zero->mutable_data_ptr(), 0, zero->numel() * bytes_of(scalar_));
        }
        auto state = [&](const Maybe& given, long layer, long size) {
            if (!given) return data_of(*zero);
            return static_cast<const void*>(static_cast<const char*>(data_of(*given)) + part(layer, size));
        };
        call.input = data_of(input);
        Maybe from, to;
        for (long layer = 0; layer < layers_; ++layer) {
            const bool last = layer + 1 == layers_;
            to = last && batch_first_
                     ? empty_strided(input, {call.B, call.T, width}, {width, call.B * width, 1})
                     : empty(input, {call.T, call.B, width});
            call.output = to->mutable_data_ptr();
            call.hx = state(hx, layer, call.P);
            call.h_n = static_cast<char*>(h_n.mutable_data_ptr()) + part(layer, call.P);
            if (lstm) {
                call.cx = state(cx, layer, call.H);
                call.c_n = static_cast<char*>(c_n->mutable_data_ptr()) + part(layer, call.H);
            }
            for (long d = 0; d < call.D; ++d) {
                const Tensor* w = &weights[(layer * call.D + d) * kinds_];
                auto& at = call.weights[d];
                at.w_ih = data_of(w[0]), at.w_hh = data_of(w[1]);
                if (biased()) at.b_ih = data_of(w[2]), at.b_hh = data_of(w[3]);
                if (projected()) at.w_hr = data_of(w[kinds_ - 1]);
            }
            scan_forward(call);
            from = to;  // which the next layer reads
            call.input = call.output, call.I = width;
            call.input_b = width, call.input_t = call.B * width;
        }
        return {to, h_n, c_n};
    }

  private:
    long part(long layer, long size) const {
        return layer * call.D * call.B * size * static_cast<long>(bytes_of(scalar_));
    }
    bool biased() const { return kinds_ >= 4; }
    bool projected() const { return kinds_ % 2; }

    bool measure(const Tensor& input, const Weights& weights) {
        if (!serves(input.scalar_type()) || !input.is_cpu() || input.dim() != 3 || layers_ < 1) return false;
        scalar_ = input.scalar_type();
        call.dtype = dtype_of(input);
        call.T = input.size(batch_first_ ? 1 : 0), call.B = input.size(batch_first_ ? 0 : 1);
        call.input_t = input.stride(batch_first_ ? 1 : 0), call.input_b = input.stride(batch_first_ ? 0 : 1);
        call.I = input.size(2), call.N = call.T * call.B;
        if (call.N == 0 || call.I == 0 || (call.I > 1 && input.stride(2) != 1)) return false;
        const long sets = layers_ * call.D, given = static_cast<long>(weights.size());
        if (given == 0 || given % sets) return false;
        kinds_ = given / sets;
        const bool lstm = call.cell == Cell::lstm;
        if (kinds_ != 2 && kinds_ != 4 && !(lstm && (kinds_ == 3 || kinds_ == 5))) return false;
        if (weights[1].dim() != 2) return false;
        call.H = weights[1].size(0) / gates_of(call.cell), call.P = weights[1].size(1);
        return call.H > 0 && call.P > 0 && (projected() || call.P == call.H);
    }

    bool is(const Tensor& t, std::initializer_list<int64_t> sizes) const {
        return is_of(t, scalar_, sizes) && lies_plain(t);
    }

    bool every_weight(const Weights& weights) const {
        const long rows = gates_of(call.cell) * call.H;
        for (long at = 0; at < static_cast<long>(weights.size()); at += kinds_) {
            const Tensor* w = &weights[at];
            if (!is(w[0], {rows, at < call.D * kinds_ ? call.I : call.D * call.P}) ||
                !is(w[1], {rows, call.P}) || (biased() && !(is(w[2], {rows}) && is(w[3], {rows}))) ||
                (projected() && !is(w[kinds_ - 1], {call.P, call.H})))
                return false;
        }
        return true;
    }

    bool states(const Maybe& hx, const Maybe& cx) const {
        const long sets = layers_ * call.D;
        if (cx.has_value() != (hx.has_value() && call.cell == Cell::lstm)) return false;
        return !hx || (is(*hx, {sets, call.B, call.P}) && (!cx || is(*cx, {sets, call.B, call.H})));
    }

    const long layers_;
    const bool batch_first_;
    bool fits_;
    long kinds_ = 0;  // weights of a layer in a direction
    ScalarType scalar_{};
};

std::tuple<Maybe, Maybe, Maybe> rnn_layers(Tensor input, Maybe hx, Maybe cx, Weights weights, int64_t layers,
                                           bool bidirectional, bool batch_first, std::string cell) {
    Stack stack(input, hx, cx, weights, layers, bidirectional, batch_first, cell);
    if (!stack.fits()) return {};
    return stack.run(input, hx, cx, weights);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) { m.impl("rnn_layers", TORCH_BOX(&rnn_layers)); }
