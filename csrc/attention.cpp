// seqkern::attention and seqkern::attention_backward on the CPU: tensors checked and laid out as calls of the
// kernels. The schemas and the results' layouts stand in python/seqkern/ops/attention.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <tuple>

#include "cpu/attention_call.h"
#include "tensors.h"

namespace {

using namespace seqkern;

// Memory for dense [B, H, rows, size] that lies as [B, rows, H, size].
Tensor empty_heads(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
    const int64_t size = std::max<int64_t>(sizes[3], 1), row = std::max<int64_t>(sizes[1], 1) * size;
    return empty_strided(like, sizes, {std::max<int64_t>(sizes[2], 1) * row, size, row, 1}, dtype);
}

long stride_of(const Tensor& t, int64_t at) { return t.size(at) == 1 ? 0 : t.stride(at); }

// The tensors of a call, checked, and the copies that its pointers point into.
class Attention {
  public:
    AttentionCall call{};
    Tensor query, key, value;
    bool packed;

    Attention(Tensor q, Tensor k, Tensor v, const Maybe& mask, const Maybe& bias, const Maybe& slopes,
              const Maybe& sinks, const Maybe& seed, const Maybe& cu_q, const Maybe& cu_k, double scale,
              double softcap, double dropout_p, int64_t left, int64_t right, bool bottom_right,
              int64_t longest_q, int64_t longest_k)
        : query(std::move(q)), key(std::move(k)), value(std::move(v)), packed(cu_q.has_value()) {
        call.dtype = dtype_of(query);
        wide = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
        sizes(cu_q, cu_k, longest_q, longest_k);
        call.q = operand(query, "query", query.scalar_type());
        call.k = operand(key, "key", query.scalar_type());
        call.v = operand(value, "value", query.scalar_type());
        if (mask) call.mask = plane(*mask, "mask", ScalarType::Bool);
        if (bias) {
            Tensor b = *bias;
            if (b.scalar_type() != query.scalar_type() && b.scalar_type() != wide)
                b = kept_.emplace_back(in_dtype(b, wide));
            call.bias = plane(b, "bias", b.scalar_type());
            call.bias_is_wide = b.scalar_type() == wide;
        }
        if (slopes) {
            SK_REQUIRE(slopes->dim() == 1 || slopes->dim() == 2, "alibi_slopes must be [Hq] or [B, Hq]");
            slopes_ = numbers(*slopes, "alibi_slopes", slopes->dim() == 2 ? call.B : 1);
            if (slopes->dim() == 1)
                for (long b = 1; b < call.B; ++b)
                    for (long h = 0; h < call.Hq; ++h) slopes_.push_back(slopes_[h]);
            call.slopes = slopes_.data();
        }
        if (sinks) {
            sinks_ = numbers(*sinks, "sinks", 1);
            call.sinks = sinks_.data();
        }
        call.scale = scale, call.dropout_p = dropout_p;
        // Beyond these, which are as good as 0 and none, factors of float32 would overflow.
        call.softcap = softcap > 0 ? std::clamp(softcap, 1e-30, 1e38) : 0;
        call.left = left, call.right = right, call.bottom_right = bottom_right;
        if (dropout_p > 0) {
            SK_REQUIRE(dropout_p <= 1, "dropout_p is ", dropout_p, ", expected a probability");
            SK_REQUIRE(
                seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long && seed->is_cpu(),
                "dropout needs a seed of one int64 on the CPU");
            call.seed = static_cast<unsigned long>(*static_cast<const int64_t*>(data_of(*seed)));
            call.drop_below = static_cast<unsigned int>(std::nearbyint(dropout_p * (1 << 24)));
        }
    }

    // A [B, H, rows, size] or packed [total, H, size] tensor as the kernels take it.
    Operand operand(Tensor t, const char* name, ScalarType dtype) {
        SK_REQUIRE(t.is_cpu(), name, " is not on the CPU");
        SK_REQUIRE(t.scalar_type() == dtype, name, " has another dtype than expected");
        if (t.size(-1) > 1 && t.stride(-1) != 1) t = kept_.emplace_back(torch::stable::contiguous(t));
        if (packed) return {data_of(t), 0, t.stride(1), t.stride(0)};
        return {data_of(t), t.stride(0), t.stride(1), t.stride(2)};
    }

    // Log-sum-exp or its gradient: [B, Hq, L] or packed [Hq, total].
    Operand of_rows(const Tensor& t, const char* name) {
        SK_REQUIRE(t.is_cpu() && t.scalar_type() == wide, name, " has another dtype or device than expected");
        SK_REQUIRE(t.numel() == call.total_q * call.Hq, name, " has sizes ", written(t.sizes()));
        if (packed) return {data_of(t), 0, t.stride(0), t.stride(1)};
        return {data_of(t), t.stride(0), t.stride(1), t.stride(2)};
    }

    Plane plane(Tensor t, const char* name, ScalarType dtype) {
        SK_REQUIRE(t.is_cpu() && t.scalar_type() == dtype, name,
                   " has another dtype or device than expected");
        const std::array<int64_t, 4> full = {call.B, call.Hq, call.L, call.S};
        bool fits = t.dim() == 4;
        for (int d = 0; fits && d < 4; ++d) fits = t.size(d) == 1 || t.size(d) == full[d];
        SK_REQUIRE(fits, name, " has sizes ", written(t.sizes()), ", which do not broadcast to [", call.B,
                   ", ", call.Hq, ", ", call.L, ", ", call.S, "]");
        if (stride_of(t, 3) > 1) t = kept_.emplace_back(torch::stable::contiguous(t));
        return {data_of(t), stride_of(t, 0), stride_of(t, 1), stride_of(t, 2), stride_of(t, 3)};
    }

    Sizes sizes_like(const Tensor& t) const { return Sizes(t.sizes().begin(), t.sizes().end()); }

    Tensor new_heads(const Sizes& sizes) const {
        return packed ? empty(query, sizes) : empty_heads(query, sizes);
    }
    Result result(const Tensor& t) const {
        if (packed) return {t.mutable_data_ptr(), 0, t.stride(1), t.stride(0)};
        return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
    }
    Tensor new_rows() const {
        return empty(query, packed ? Sizes{call.Hq, call.total_q} : Sizes{call.B, call.Hq, call.L}, wide);
    }

    ScalarType wide;

  private:
    std::vector<long> start_q_, start_k_;
    std::vector<double> slopes_, sinks_;
    std::vector<Tensor> kept_;

    static Tensor in_dtype(const Tensor& t, ScalarType dtype) { return torch::stable::to(t, dtype); }

    std::vector<double> numbers(const Tensor& t, const char* name, long rows) {
        SK_REQUIRE(t.is_cpu() && serves(t.scalar_type()), name, " must be floating-point numbers on the CPU");
        SK_REQUIRE(t.numel() == rows * call.Hq, name, " has sizes ", written(t.sizes()), ", expected ", rows,
                   " times ", call.Hq, " numbers");
        const Tensor plain = torch::stable::contiguous(in_dtype(t, ScalarType::Double));
        const auto* p = static_cast<const double*>(data_of(plain));
        return {p, p + rows * call.Hq};
    }

    void sizes(const Maybe& cu_q, const Maybe& cu_k, int64_t longest_q, int64_t longest_k) {
        const int rank = packed ? 3 : 4;
        SK_REQUIRE(query.dim() == rank && key.dim() == rank && value.dim() == rank,
                   "query, key and value must be ", rank, "-D");
        const int heads = 1;
        call.Hq = query.size(heads), call.Hkv = key.size(heads), call.D = query.size(-1),
        call.Dv = value.size(-1);
        SK_REQUIRE(key.size(-1) == call.D, "key has head size ", key.size(-1), ", query ", call.D);
        SK_REQUIRE(call.Hkv > 0 && call.Hq % call.Hkv == 0 && value.size(heads) == call.Hkv, "query has ",
                   call.Hq, " heads, key ", call.Hkv, ", value ", value.size(heads));
        if (packed) {
            SK_REQUIRE(cu_k, "cu_seqlens_q and cu_seqlens_k go together");
            call.B = cu_q->size(0) - 1, call.L = longest_q, call.S = longest_k, call.total_q = query.size(0);
            SK_REQUIRE(value.size(0) == key.size(0), "key and value have different rows");
            start_q_ = starts(*cu_q, "cu_seqlens_q", query.size(0), longest_q);
            start_k_ = starts(*cu_k, "cu_seqlens_k", key.size(0), longest_k);
            call.start_q = start_q_.data(), call.start_k = start_k_.data();
        } else {
            call.B = query.size(0), call.L = query.size(2), call.S = key.size(2),
            call.total_q = call.B * call.L;
            SK_REQUIRE(key.size(0) == call.B && value.size(0) == call.B && value.size(2) == call.S,
                       "the sizes of query, key and value do not agree");
        }
    }

    std::vector<long> starts(const Tensor& cu, const char* name, int64_t total, int64_t longest) {
        SK_REQUIRE(cu.is_cpu() && cu.dim() == 1 && cu.size(0) == call.B + 1, name, " must be [", call.B + 1,
                   "] on the CPU");
        const Tensor plain = torch::stable::contiguous(in_dtype(cu, ScalarType::Long));
        const auto* p = static_cast<const int64_t*>(data_of(plain));
        for (long b = 0; b < call.B; ++b)
            SK_REQUIRE(p[b] <= p[b + 1] && p[b + 1] - p[b] <= longest, name,
                       " descends, or has a sequence of ", p[b + 1] - p[b], " rows, where max_seqlen is ",
                       longest);
        SK_REQUIRE(p[0] == 0 && p[call.B] == total, name, " must begin at 0 and end at the ", total, " rows");
        return {p, p + call.B + 1};
    }
};

std::tuple<Tensor, Tensor, Tensor> forward_op(Tensor query, Tensor key, Tensor value, Maybe mask, Maybe bias,
                                              Maybe slopes, Maybe sinks, Maybe seed, Maybe cu_q, Maybe cu_k,
                                              double scale, double softcap, double dropout_p, int64_t left,
                                              int64_t right, bool bottom_right, int64_t longest_q,
                                              int64_t longest_k, std::string weights) {
    Attention args(query, key, value, mask, bias, slopes, sinks, seed, cu_q, cu_k, scale, softcap, dropout_p,
                   left, right, bottom_right, longest_q, longest_k);
    AttentionForward call{};
    static_cast<AttentionCall&>(call) = args.call;
    Sizes sizes = args.sizes_like(query);
    sizes.back() = call.Dv;
    Tensor output = args.new_heads(sizes), lse = args.new_rows();
    SK_REQUIRE(weights.empty() || (!args.packed && (weights == "heads" || weights == "mean")), "weights is '",
               weights, "', expected '', 'heads' or 'mean', of dense input");
    Tensor shares = empty(query, weights.empty()     ? Sizes{0}
                                 : weights == "mean" ? Sizes{call.B, call.L, call.S}
                                                     : Sizes{call.B, call.Hq, call.L, call.S});
    if (lse.numel() == 0) return {output, lse, shares};
    call.output = args.result(output);
    call.lse = args.packed ? Result{lse.mutable_data_ptr(), 0, lse.stride(0), lse.stride(1)}
                           : Result{lse.mutable_data_ptr(), lse.stride(0), lse.stride(1), lse.stride(2)};
    if (shares.numel()) {
        call.mean = weights == "mean";
        call.weights = {shares.mutable_data_ptr(), shares.stride(0), call.mean ? 0 : shares.stride(1),
                        call.S};
    }
    attention_forward(call);
    return {output, lse, shares};
}

// torch's scaled_dot_product_attention without dropout, for calls so short that the way to the kernel counts.
// Nothing where the arguments are not for this kernel: then the way by all checks finds out why.
class Sdpa {
  public:
    AttentionForward call{};

    Sdpa(const Tensor& q, const Tensor& k, const Tensor& v) : dtype_(q.scalar_type()) {
        rank_ = q.dim();
        fits_ = serves(q.scalar_type()) && rank_ >= 2 && rank_ <= 4;
        fits_ = fits_ && operand(q, call.q, kept_[0]) && operand(k, call.k, kept_[1]) &&
                operand(v, call.v, kept_[2]);
        if (!fits_) return;
        call.dtype = dtype_of(q);
        call.B = size(q, 0), call.Hq = size(q, 1), call.L = size(q, 2), call.D = size(q, 3);
        call.Hkv = size(k, 1), call.S = size(k, 2), call.Dv = size(v, 3);
        call.total_q = call.B * call.L;
        call.left = call.right = -1;
        fits_ = size(k, 0) == call.B && size(v, 0) == call.B && size(v, 1) == call.Hkv &&
                size(v, 2) == call.S && size(k, 3) == call.D && call.Hkv > 0 && call.Hq > 0 &&
                call.Hq % call.Hkv == 0 && call.S > 0 && call.D > 0 && call.Dv > 0;
    }

    bool fits() const { return fits_; }

    // Whether a mask of torch's is one of the kernel's planes.
    bool add(const Tensor& mask) {
        const auto dtype = mask.scalar_type();
        const bool shows = dtype == ScalarType::Bool;
        const auto wide = dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
        if (!mask.is_cpu() || mask.dim() > rank_ || !(shows || dtype == dtype_ || dtype == wide))
            return false;
        const long full[] = {call.B, call.Hq, call.L, call.S};
        long strides[4] = {};
        for (int64_t at = 0; at < mask.dim(); ++at) {
            const int64_t to = 4 - mask.dim() + at;
            if (mask.size(at) == 1) continue;
            if (mask.size(at) != full[to]) return false;
            strides[to] = mask.stride(at);
        }
        if (strides[3] > 1) return false;
        (shows ? call.mask : call.bias) = {data_of(mask), strides[0], strides[1], strides[2], strides[3]};
        call.bias_is_wide = dtype == wide;
        return true;
    }

    // The output lies as torch's: heads within a row where the queries' do, else plain.
    Tensor run(const Tensor& q) {
        const bool within = rank_ == 4 && call.Hq > 1 && call.L > 1 && call.q.h < call.q.i;
        const Sizes sizes = {call.B, call.Hq, call.L, call.Dv};
        const long h = within ? call.Dv : call.L * call.Dv, i = within ? call.Hq * call.Dv : call.Dv;
        const Sizes strides = {call.L * call.Hq * call.Dv, h, i, 1};
        Tensor output =
            empty_strided(q, {sizes.end() - rank_, sizes.end()}, {strides.end() - rank_, strides.end()});
        if (call.total_q == 0) return output;
        call.output = {output.mutable_data_ptr(), strides[0], h, i};
        attention_forward(call);
        return output;
    }

  private:
    // Of the last four dimensions, of which the first may be absent.
    int64_t size(const Tensor& t, int64_t at) const { return at + rank_ < 4 ? 1 : t.size(at + rank_ - 4); }

    bool operand(const Tensor& t, Operand& to, Maybe& copy) const {
        if (!t.is_cpu() || t.dim() != rank_ || t.scalar_type() != dtype_) return false;
        const Tensor* x = &t;
        if (t.size(-1) > 1 && t.stride(-1) != 1) x = &copy.emplace(torch::stable::contiguous(t));
        to = {data_of(*x), rank_ > 3 ? x->stride(0) : 0, rank_ > 2 ? x->stride(rank_ - 3) : 0,
              x->stride(rank_ - 2)};
        return true;
    }

    ScalarType dtype_;
    int64_t rank_;
    bool fits_;
    Maybe kept_[3];
};

Maybe sdpa_op(Tensor query, Tensor key, Tensor value, Maybe mask, bool causal, std::optional<double> scale,
              bool gqa) {
    Sdpa args(query, key, value);
    if (!args.fits() || (args.call.Hq != args.call.Hkv && !gqa)) return std::nullopt;
    if (mask && (causal || !args.add(*mask))) return std::nullopt;
    args.call.scale = scale.value_or(std::pow(static_cast<double>(args.call.D), -0.5));
    if (causal) args.call.right = 0;
    return args.run(query);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
    return torch::stable::new_zeros(like, {sizes.data(), sizes.size()}, dtype);
}

// [B, Hq] sums in double -> a tensor like t, [Hq] or [B, Hq].
Tensor summed(const std::vector<double>& sums, const Tensor& t, long B, long Hq) {
    const bool each = t.dim() == 2;
    Tensor found = zeros(t, {t.numel()}, ScalarType::Double);
    auto* p = static_cast<double*>(found.mutable_data_ptr());
    for (long b = 0; b < B; ++b)
        for (long h = 0; h < Hq; ++h) p[each ? b * Hq + h : h] += sums[b * Hq + h];
    const auto sizes = t.sizes();
    return torch::stable::to(torch::stable::reshape(found, sizes), t.scalar_type());
}

Gradients backward_op(Maybe grad_output, Maybe grad_lse, Maybe grad_weights, Tensor output, Tensor lse,
                      Tensor query, Tensor key, Tensor value, Maybe mask, Maybe bias, Maybe slopes,
                      Maybe sinks, Maybe seed, Maybe cu_q, Maybe cu_k, double scale, double softcap,
                      double dropout_p, int64_t left, int64_t right, bool bottom_right, int64_t longest_q,
                      int64_t longest_k, std::string weights, bool need_query, bool need_key_value,
                      bool need_bias, bool need_slopes, bool need_sinks) {
    Attention args(query, key, value, mask, bias, slopes, sinks, seed, cu_q, cu_k, scale, softcap, dropout_p,
                   left, right, bottom_right, longest_q, longest_k);
    AttentionBackward call{};
    static_cast<AttentionCall&>(call) = args.call;
    const auto dtype = query.scalar_type();
    call.output = args.operand(output, "output", dtype);
    call.lse = args.of_rows(lse, "lse");
    if (grad_output) call.grad_output = args.operand(*grad_output, "grad_output", dtype);
    if (grad_lse) call.grad_lse = args.of_rows(*grad_lse, "grad_lse");
    if (grad_weights) {
        SK_REQUIRE(!args.packed && (weights == "heads" || weights == "mean"), "grad_weights without weights");
        call.mean = weights == "mean";
        call.grad_weights = args.plane(call.mean ? torch::stable::unsqueeze(*grad_weights, 1) : *grad_weights,
                                       "grad_weights", dtype);
    }
    auto nothing = [&] { return empty(query, {0}); };  // no two results share memory
    const Sizes sizes_q = args.sizes_like(query), sizes_k = args.sizes_like(key),
                sizes_v = args.sizes_like(value);
    // Added to chunk by chunk, so in the wide type, and zero at first.
    Tensor d_q = nothing();
    if (need_query) {
        d_q = args.packed ? empty(query, sizes_q, args.wide) : empty_heads(query, sizes_q, args.wide);
        const int64_t bytes = d_q.numel() * (args.wide == ScalarType::Double ? 8 : 4);
        if (bytes > 0 && bytes < (1 << 16))  // torch fills by several threads, from behind its dispatcher
            std::memset(d_q.mutable_data_ptr(), 0, bytes);
        else
            torch::stable::zero_(d_q);
        call.d_q = args.result(d_q);
    }
    Tensor d_k = need_key_value ? args.new_heads(sizes_k) : nothing();
    Tensor d_v = need_key_value ? args.new_heads(sizes_v) : nothing();
    if (need_key_value) call.d_k = args.result(d_k), call.d_v = args.result(d_v);
    Tensor d_bias = nothing(), d_slopes = nothing(), d_sinks = nothing();
    if (need_bias && bias) {
        d_bias = zeros(query, args.sizes_like(*bias), args.wide);
        auto stride = [&](int64_t at) { return d_bias.size(at) == 1 ? 0 : d_bias.stride(at); };
        call.d_bias = {d_bias.mutable_data_ptr(), stride(0), stride(1), stride(2)};
        call.d_bias_j = stride(3);
    }
    std::vector<double> sums_slopes(need_slopes && slopes ? call.B * call.Hq : 0);
    std::vector<double> sums_sinks(need_sinks && sinks ? call.B * call.Hq : 0);
    call.d_slopes = sums_slopes.empty() ? nullptr : sums_slopes.data();
    call.d_sinks = sums_sinks.empty() ? nullptr : sums_sinks.data();
    if (call.total_q * call.Hq > 0 && call.S > 0) {
        attention_backward(call);
    } else {  // no query, or no key: nothing but a sink without a rival can have a gradient
        if (need_key_value) torch::stable::zero_(d_k), torch::stable::zero_(d_v);
        if (call.d_sinks && call.total_q > 0) attention_backward(call);
    }
    if (need_slopes && slopes) d_slopes = summed(sums_slopes, *slopes, call.B, call.Hq);
    if (need_sinks && sinks) d_sinks = summed(sums_sinks, *sinks, call.B, call.Hq);
    if (need_query && dtype != args.wide) d_q = torch::stable::to(d_q, dtype);
    if (need_bias && bias && bias->scalar_type() != args.wide)
        d_bias = torch::stable::to(d_bias, bias->scalar_type());
    auto or_nothing = [&](const Tensor& found, const Maybe& like, bool wanted) {
        return like && !wanted ? empty(*like, {0}) : found;
    };
    return {d_q,
            d_k,
            d_v,
            or_nothing(d_bias, bias, need_bias),
            or_nothing(d_slopes, slopes, need_slopes),
            or_nothing(d_sinks, sinks, need_sinks)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
    m.impl("attention", TORCH_BOX(&forward_op));
    m.impl("sdpa", TORCH_BOX(&sdpa_op));
    m.impl("attention_backward", TORCH_BOX(&backward_op));
}
