// What the ops share at the border to torch: dtypes, cells, sizes, new tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace seqkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

#define SK_REQUIRE(condition, ...) STD_TORCH_CHECK(condition, "seqkern: ", __VA_ARGS__)

inline bool serves(ScalarType dtype) {
    return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
           dtype == ScalarType::Half;
}

inline unsigned long bytes_of(ScalarType dtype) {
    return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

inline Cell cell_named(const std::string& name) {
    if (name == "lstm") return Cell::lstm;
    if (name == "gru") return Cell::gru;
    if (name == "rnn_tanh") return Cell::rnn_tanh;
    SK_REQUIRE(name == "rnn_relu", "cell is '", name, "', expected lstm, gru, rnn_tanh or rnn_relu");
    return Cell::rnn_relu;
}

inline long gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

inline Dtype dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return Dtype::f32;
        case ScalarType::Double:
            return Dtype::f64;
        case ScalarType::BFloat16:
            return Dtype::bf16;
        case ScalarType::Half:
            return Dtype::f16;
        default:
            SK_REQUIRE(false, "the tensors must be float32, float64, bfloat16 or float16");
    }
    return Dtype::f32;
}

inline std::string written(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    std::string text = "[";
    for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + "]";
}

inline void require_sizes(const Tensor& t, const char* name, const Sizes& sizes) {
    const torch::headeronly::IntHeaderOnlyArrayRef got = t.sizes(), want(sizes.data(), sizes.size());
    bool same = got.size() == want.size();
    for (size_t i = 0; same && i < got.size(); ++i) same = got[i] == want[i];
    SK_REQUIRE(same, name, " has sizes ", written(got), ", expected ", written(want));
}

// Where a tensor's numbers are; those of a freed storage would be read through a null pointer.
inline const void* data_of(const Tensor& t) {
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
    SK_REQUIRE(
        bytes > 0 || t.numel() == 0, "a tensor of sizes ", written(t.sizes()),
        " has no memory: its storage was freed (untyped_storage().resize_(0)) and must be filled again");
    return t.const_data_ptr();
}

// Whether a tensor is one of these sizes, in this dtype, on the CPU.
inline bool is_of(const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
    if (!t.is_cpu() || t.scalar_type() != dtype) return false;
    const auto got = t.sizes();
    return std::equal(got.begin(), got.end(), sizes.begin(), sizes.end());
}

inline bool lies_plain(const Tensor& t) {
    auto sizes = t.sizes(), strides = t.strides();
    int64_t want = 1;
    for (size_t i = sizes.size(); i-- > 0; want *= sizes[i]) {
        if (sizes[i] == 0) return true;
        if (sizes[i] != 1 && strides[i] != want) return false;
    }
    return true;
}

// Memory on the CPU for a tensor of these sizes and strides; past the dispatcher, which would take as long as
// a short call.
inline Tensor empty_strided(const Tensor& like, const Sizes& sizes, const Sizes& strides,
                            std::optional<ScalarType> dtype = std::nullopt) {
    const ScalarType wanted = dtype.value_or(like.scalar_type());
    AtenTensorHandle made = nullptr;
    if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 torch::stable::detail::to<int32_t>(torch::stable::detail::from(wanted)),
                                 aoti_torch_device_type_cpu(), 0, &made) != AOTI_TORCH_SUCCESS)
        no_memory("a tensor of sizes " + written(sizes));  // torch keeps its own words to itself here
    Tensor found(made);
    unsigned long bytes = bytes_of(wanted);
    for (int64_t size : sizes) bytes *= static_cast<unsigned long>(size);
    if (bytes >= WORTH_HUGE_PAGES) prefer_huge_pages(found.mutable_data_ptr(), bytes);
    return found;
}

inline Tensor empty(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
    Sizes strides(sizes.size());
    int64_t next = 1;
    for (size_t i = sizes.size(); i-- > 0; next *= std::max<int64_t>(sizes[i], 1)) strides[i] = next;
    return empty_strided(like, sizes, strides, dtype);
}

}  // namespace seqkern
