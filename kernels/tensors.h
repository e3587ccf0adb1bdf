// What the operators share that take tensors. Products, attention and DeltaNet (products.h, states.h) do without, and
// these use few of PyTorch's headers: together those take longer to compile than all kernels.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include "states.h"

namespace {

using at::Tensor, c10::BFloat16, qwen_fast::KVCache, qwen_fast::DeltaState;

bool is(const Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype; }

// at::empty, whose header takes two seconds
Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) { return Tensor(at::detail::empty_cpu(sizes, dtype)); }

// Calls f with a BFloat16 or a float, the type of t's values.
template <typename F> void by_dtype(const Tensor& t, F f) {
    if (t.scalar_type() == at::kBFloat16) f(BFloat16());
    else if (t.scalar_type() == at::kFloat) f(0.0f);
    else TORCH_CHECK(false, "kernels: dtype ", t.scalar_type(), " (bfloat16 and float are supported)");
}

// The tensors of a KV cache, checked: k, v and, in int8, their scales
struct KVTensors {
    Tensor k, v, k_scales, v_scales;
    KVTensors(const Tensor& k, const Tensor& v, at::TensorList scales, at::ScalarType dtype) : k(k), v(v) {
        bool fits = k.dim() == 4 && k.sizes() == v.sizes() && k.numel() > 0 && k.size(3) % 16 == 0 &&
                    k.size(3) <= MAX_HEAD && (scales.empty() || scales.size() == 2);
        if (!scales.empty()) dtype = at::kChar;
        for (const auto& t : {k, v}) fits = fits && is(t, dtype) && t.is_contiguous();
        for (const auto& t : scales)
            fits = fits && is(t, at::kFloat) && t.is_contiguous() && t.numel() * k.size(3) == k.numel();
        TORCH_CHECK(fits, "caches of ", k.sizes(), " ", k.scalar_type(), " and ", v.sizes(), " ", v.scalar_type(),
                    " with ", scales.size(), " scales for ", dtype);
        if (!scales.empty()) k_scales = scales[0], v_scales = scales[1];
    }
    KVCache cache() const {
        const auto scales = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; };
        return {k.mutable_data_ptr(), v.mutable_data_ptr(), scales(k_scales), scales(v_scales),
                k.size(0),            k.size(1),            k.size(2),        k.size(3)};
    }
};

// input_pos int64 [S] or [B, S], checked -> B * S of them, one after another
Tensor positions(const Tensor& input_pos, i64 B, i64 S, i64 slots) {
    TORCH_CHECK(is(input_pos, at::kLong), "input_pos of ", input_pos.scalar_type());
    const bool all = input_pos.dim() <= 2 && input_pos.size(-1) == S && input_pos.numel() == B * S;
    const auto pos = (all ? input_pos : input_pos.expand({B, S})).contiguous();
    const i64* p = pos.const_data_ptr<i64>();
    for (i64 i = 0; i < B * S; i++)
        TORCH_CHECK(p[i] >= 0 && p[i] < slots, "position ", p[i], " is outside the cache of ", slots);
    return pos;
}

// The tensors of a deltanet.DeltaState, checked
struct DeltaTensors {
    Tensor memory, length, inputs, pending, keys, updates, decays;
    i64 B = memory.size(0), Hv = memory.size(1), K = memory.size(2), V = memory.size(3), P = keys.size(1);
    i64 Hk = keys.size(2), N = 2 * Hk * K + Hv * V, size = inputs.size(1) - P + 1;  // positions of the convolution

    explicit DeltaTensors(at::TensorList t)
        : memory(at(t, 0, 4)), length(at(t, 1, 1)), inputs(at(t, 2, 3)), pending(at(t, 3, 1)), keys(at(t, 4, 4)),
          updates(at(t, 5, 4)), decays(at(t, 6, 3)) {
        const auto is = [&](const Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype) {
            return t.sizes() == sizes && t.scalar_type() == dtype && t.is_contiguous() && t.is_cpu();
        };
        const auto f = at::kFloat;
        TORCH_CHECK(B > 0 && P > 0 && Hk > 0 && Hv % Hk == 0 && K > 0 && K % 16 == 0 && V > 0 && V % 16 == 0 &&
                        size > 1 && is(memory, {B, Hv, K, V}, f) && is(length, {B}, at::kLong) &&
                        is(inputs, {B, size - 1 + P, N}, inputs.scalar_type()) && is(pending, {B}, at::kLong) &&
                        is(keys, {B, P, Hk, K}, f) && is(updates, {B, P, Hv, V}, f) && is(decays, {B, P, Hv}, f),
                    "deltanet: memory ", memory.sizes(), ", inputs ", inputs.sizes(), ", keys ", keys.sizes(),
                    ", updates ", updates.sizes());
    }
    DeltaState state() const {
        const auto floats = [](const Tensor& t) { return t.mutable_data_ptr<float>(); };
        return {floats(memory), length.mutable_data_ptr<i64>(), inputs.mutable_data_ptr(),
                pending.mutable_data_ptr<i64>(), floats(keys), floats(updates), floats(decays), B, Hv, K, V, P, Hk, N,
                size};
    }
    static Tensor at(at::TensorList t, size_t i, i64 dims) {
        TORCH_CHECK(t.size() == 7 && t[i].dim() == dims, "deltanet: the tensors of a state");
        return t[i];
    }
};

}  // namespace
