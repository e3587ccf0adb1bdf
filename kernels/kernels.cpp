// The CPU kernels as operators: matrix-vector products (products.cpp), attention (attention.cpp) and DeltaNet
// (deltanet.cpp) that run at the speed of the memory, and whole layers made of them (layers.h), which without AMX leave
// matrix-matrix products to PyTorch. build.py builds them on first use; __init__.py holds a plain PyTorch twin of every
// operator.
#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace {

// q [B, S, H, D], a KV cache, input_pos int64 [S] or [B, S], window 0 = none -> [B, S, H * D]
Tensor attend(const Tensor& q_, const Tensor& k_cache, const Tensor& v_cache, const Tensor& input_pos, i64 window,
              at::TensorList scales) {
    const KVTensors cache(k_cache, v_cache, scales, q_.scalar_type());
    const bool fits = q_.dim() == 4 && q_.size(0) == k_cache.size(0) && q_.size(3) == k_cache.size(3);
    TORCH_CHECK(fits && q_.size(2) % k_cache.size(1) == 0, "attend: q ", q_.sizes(), ", cache ", k_cache.sizes());
    const i64 B = q_.size(0), S = q_.size(1), H = q_.size(2);
    const auto q = q_.contiguous(), pos = positions(input_pos, B, S, k_cache.size(2));
    auto out = empty({B, S, H * q.size(3)}, q.scalar_type());
    if (!out.numel()) return out;
    by_dtype(q, [&](auto zero) {
        using T = decltype(zero);
        const i64* p = pos.const_data_ptr<i64>();
        qwen_fast::attend_heads(q.const_data_ptr<T>(), cache.cache(), H, S, p, window, out.mutable_data_ptr<T>());
    });
    return out;
}

// DeltaState.run: qkv [B, S, N], g and b fp32 [B, S, Hv], conv [N, size], input_pos [B, S] -> o, fp32 [B, S, Hv, V]
Tensor delta_net(const Tensor& qkv_, const Tensor& g_, const Tensor& b_, const Tensor& conv, const Tensor& input_pos,
                 at::TensorList tensors) {
    const DeltaTensors state(tensors);
    const auto qkv = qkv_.contiguous(), g = g_.contiguous(), b = b_.contiguous(), pos = input_pos.contiguous();
    const i64 S = qkv.dim() == 3 ? qkv.size(1) : 0;
    const auto fp32 = [](const Tensor& t, i64 size) { return is(t, at::kFloat) && t.numel() == size; };
    const i64 gates = state.B * S * state.Hv;
    const auto dtype = qkv.scalar_type();
    TORCH_CHECK(S > 0 && qkv.size(0) == state.B && qkv.size(2) == state.N && fp32(g, gates) && fp32(b, gates) &&
                    is(state.inputs, dtype) && is(conv, dtype) &&
                    conv.sizes() == at::IntArrayRef({state.N, state.size}) && is(pos, at::kLong) &&
                    pos.numel() == state.B * S,
                "delta_net: qkv ", qkv.sizes(), " ", dtype, ", convolution ", conv.sizes(), " for memory ",
                state.memory.sizes());
    const auto taps = conv.t().contiguous();
    auto out = empty({state.B, S, state.Hv, state.V}, at::kFloat);
    float* o = out.mutable_data_ptr<float>();
    by_dtype(qkv, [&](auto zero) {
        using T = decltype(zero);
        const DeltaTokens<T> tokens{values<T>(taps),  qkv.const_data_ptr(), false, state.N, S,
                                    values<float>(g), values<float>(b),     values<i64>(pos)};
        qwen_fast::run_delta_net<T>(state.state(), tokens, [&](i64 m, i64 h, const float* from) {
            std::copy_n(from, state.V, o + (m * state.Hv + h) * state.V);
        });
    });
    return out;
}

}  // namespace

// Registration goes through PyTorch's stable interface, whose header is read four seconds sooner than torch/library.h.
// For a tensor it hands over a pointer to an at::Tensor, which belongs to whom it is handed to.
namespace torch::stable::detail {

template <> struct ToImpl<at::Tensor> {
    static at::Tensor call(StableIValue value, uint64_t, bool) {
        return std::move(*std::unique_ptr<at::Tensor>((at::Tensor*)detail::to<AtenTensorHandle>(value)));
    }
};
template <> struct FromImpl<at::Tensor> {
    static StableIValue call(at::Tensor tensor, uint64_t, bool) {
        return detail::from((AtenTensorHandle) new at::Tensor(std::move(tensor)));
    }
};
template <> struct UnboxType<at::TensorList> {
    using type = std::vector<at::Tensor>;
};

}  // namespace torch::stable::detail

STABLE_TORCH_LIBRARY(qwen_fast, m) {
    m.def("linear(Tensor x, Tensor[] tensors, int out_features, bool quantize_activations) -> Tensor");
    m.def("pack_int4(Tensor stored, Tensor(a!) packed) -> ()");
    // clang-format off
    m.def("experts(Tensor x, Tensor chosen, Tensor weights, Tensor[] w13, Tensor[] w2, int n_expert, int size, "
          "bool quantize_activations) -> Tensor");
    m.def("attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor input_pos, int window, Tensor[] scales) -> "
          "Tensor");
    // The state is written to, which the compiler must not know: it cannot copy it, and refuses in a nested region.
    m.def("delta_net(Tensor qkv, Tensor g, Tensor b, Tensor conv, Tensor input_pos, Tensor[] state) -> Tensor");
    m.def("fuse_layers(int n_head, float eps, float norm_offset, bool quantize_activations) -> Tensor");
    m.def("add_attention(Tensor(a!) handle, Tensor norm, Tensor[] wqkv, Tensor? q_norm, Tensor? k_norm, Tensor[] wo, "
          "Tensor k_cache, Tensor v_cache, int window, bool output_gate, Tensor[] scales) -> ()");
    m.def("add_deltanet(Tensor(a!) handle, Tensor norm, Tensor[] wqkv, Tensor[] wba, Tensor conv, Tensor A_log, "
          "Tensor dt_bias, Tensor output_norm, Tensor[] wo, Tensor[] state) -> ()");
    m.def("add_feed_forward(Tensor(a!) handle, Tensor norm, Tensor[] w13, Tensor[] w2, int size, Tensor[] router, "
          "Tensor[] shared_gate, Tensor[] shared_w13, Tensor[] shared_w2, int shared_size, int n_expert, "
          "int n_chosen, bool normalize) -> ()");
    m.def("run_fused(Tensor x, Tensor(a!) handle, Tensor cos, Tensor sin, Tensor? logn, Tensor input_pos) -> Tensor");
    // clang-format on
}

STABLE_TORCH_LIBRARY_IMPL(qwen_fast, CompositeExplicitAutograd, m) { m.impl("fuse_layers", TORCH_BOX(&fuse_layers)); }

STABLE_TORCH_LIBRARY_IMPL(qwen_fast, CPU, m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("pack_int4", TORCH_BOX(&pack_int4));
    m.impl("experts", TORCH_BOX(&experts));
    m.impl("attend", TORCH_BOX(&attend));
    m.impl("delta_net", TORCH_BOX(&delta_net));
    m.impl("add_attention", TORCH_BOX(&add_attention));
    m.impl("add_deltanet", TORCH_BOX(&add_deltanet));
    m.impl("add_feed_forward", TORCH_BOX(&add_feed_forward));
    m.impl("run_fused", TORCH_BOX(&run_fused));
}
