// Linears of every kind, and whole layers: between their matrices there is too little work to be worth operators of its
// own. Up to 16 tokens go through the decoding kernels, and what passes between the matrices stays in fp32; more go
// through PyTorch's products, in the model's own dtype.
#pragma once
#include <ATen/ops/from_blob.h>
#include "attention.h"
#include "quantized.h"

namespace {

using MaybeTensor = std::optional<Tensor>;

bool is(const Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype; }

// The tensors of one linear stand in a list: [weight], int8 [weight, scales fp32] or int4 [packed, scales, zeros]; then
// its bias, if it has one.
struct Linear {
    Tensor weight, scales, zeros, bias;
    i64 N, K;

    // dtype: of the activations, and of weights that are not quantized
    Linear(at::TensorList tensors, i64 N, i64 K, at::ScalarType dtype) : N(N), K(K) {
        const size_t own = tensors.empty() ? 0 : is(tensors[0], at::kByte) ? 3 : is(tensors[0], at::kChar) ? 2 : 1;
        TORCH_CHECK(own && tensors.size() - own <= 1, "a linear of ", tensors.size(), " tensors");
        weight = tensors[0];
        if (own > 1) scales = tensors[1];
        if (own > 2) zeros = tensors[2];
        if (tensors.size() > own) bias = tensors[own].to(at::kFloat);  // of bf16 without loss
        bool fits = own == 3 ? fits_int4() : weight.dim() == 2 && weight.size(0) == N && weight.size(1) == K;
        if (own == 2) fits = fits && is(scales, at::kFloat) && scales.numel() == N;
        if (own == 1) fits = fits && is(weight, dtype);
        for (const auto& tensor : tensors) fits = fits && tensor.is_contiguous();
        TORCH_CHECK(fits && K > 0 && (!bias.defined() || bias.numel() == N), "linear [", N, ", ", K, "] for ", dtype,
                    ": weight ", weight.sizes(), " ", weight.scalar_type());
    }
    bool fits_int4() const {  // K is padded to a multiple of G = 32 * units / groups, N to one of 16
        if (weight.dim() != 5 || scales.dim() != 3 || !scales.size(1) || weight.size(1) % scales.size(1)) return false;
        const i64 padded = weight.size(1) * G4, G = padded / scales.size(1), blocks = (N + ROWS - 1) / ROWS;
        return is(scales, at::kBFloat16) && is(zeros, at::kByte) && zeros.sizes() == scales.sizes() &&
               scales.size(2) == ROWS && scales.size(0) == blocks && weight.size(0) == blocks &&
               weight.numel() == blocks * weight.size(1) * UNIT && K <= padded && K > padded - G;
    }
    Int4 int4() const {
        return {weight.const_data_ptr<uint8_t>(), scales.const_data_ptr<BFloat16>(), zeros.const_data_ptr<uint8_t>(),
                scales.size(1), weight.size(1) / scales.size(1)};
    }

    template <bool quantize> void decode_quantized(const float* x, float* y, i64 M) const {
        if (zeros.defined()) int4_decode<quantize>(int4(), x, y, M, N, K);
        else int8_decode<quantize>(weight.const_data_ptr<int8_t>(), scales.const_data_ptr<float>(), x, y, M, N, K);
    }

    // x [M, K] -> y [M, N], at most 16 tokens
    void decode(const float* x, float* y, i64 M, bool quantize_activations) const {
        if (scales.defined() && quantize_activations) decode_quantized<HAVE_VNNI>(x, y, M);
        else if (scales.defined()) decode_quantized<false>(x, y, M);
        else if (is(weight, at::kFloat)) linear_decode(weight.const_data_ptr<float>(), x, y, M, N, K);
        else {
            std::vector<BFloat16> rounded(M * K);
            convert(x, rounded.data(), M * K);
            linear_decode(weight.const_data_ptr<BFloat16>(), rounded.data(), y, M, N, K);
        }
        if (!bias.defined()) return;
        const float* b = bias.const_data_ptr<float>();
        for (i64 m = 0; m < M; m++)
            for (i64 n = 0; n < N; n++) y[m * N + n] += b[n];
    }

    // x [M, K] -> [M, N], in fp32 for up to 16 tokens, in x's dtype (the model's) for more
    Tensor multiply(const Tensor& x, bool quantize_activations) const {
        const i64 M = x.size(0);
        if (M <= MAX_TOKENS) {
            const auto x32 = is(x, at::kFloat) ? x : x.to(at::kFloat);
            auto y = at::empty({M, N}, x32.options());
            if (M > 0) decode(x32.const_data_ptr<float>(), y.mutable_data_ptr<float>(), M, quantize_activations);
            return y;
        }
        auto y = scales.defined() ? at::empty({M, N}, x.options()) : at::mm(x, weight.t());
        if (zeros.defined()) by_dtype(x, [&](auto zero) { int4_prefill<decltype(zero)>(x, int4(), y); });
        else if (scales.defined()) int8_prefill(x, weight, scales.view({N}), y);
        return bias.defined() ? y.add_(bias) : y;
    }
};

// x [..., K] -> [..., N]
Tensor linear(const Tensor& x, at::TensorList tensors, i64 N, bool quantize_activations) {
    const auto dtype = x.scalar_type();
    TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kFloat, "linear: activations of ", dtype);
    const Linear linear(tensors, N, x.size(-1), dtype);
    auto sizes = x.sizes().vec();
    sizes.back() = N;
    return linear.multiply(x.reshape({-1, linear.K}).contiguous(), quantize_activations).to(dtype).view(sizes);
}

// x [C] -> x / sqrt(mean(x^2) + eps) * weight
template <typename X, typename T, typename U>
INLINE void rms_norm(const X* x, const T* weight, U* y, i64 C, float eps) {
    float squares = 0;
    i64 c = 0;
    f32x16 sums = {};
    for (; c + 16 <= C; c += 16) sums += load16(x + c) * load16(x + c);
    for (; c < C; c++) squares += (float)x[c] * (float)x[c];
    const float scale = 1.0f / std::sqrt((squares + sum(sums)) / C + eps);
    for (c = 0; c + 16 <= C; c += 16) store16(y + c, load16(x + c) * scale * load16(weight + c));
    for (; c < C; c++) y[c] = (float)x[c] * scale * (float)weight[c];
}

// One head x [D] of one token: norm, if there is one, half-split RoPE by cos, sin [D], times scale -> out [D]
template <typename U, typename T>
INLINE void finish_head(const U* x, const T* norm, float eps, const float* cos, const float* sin, float scale, T* out,
                        i64 D) {
    float even[MAX_HEAD], turned[MAX_HEAD];
    if (norm) rms_norm(x, norm, even, D, eps);
    else convert(x, even, D);
    const i64 half = D / 2;
    for (i64 d = 0; d < half; d++) {
        turned[d] = (even[d] * cos[d] - even[half + d] * sin[d]) * scale;
        turned[half + d] = (even[half + d] * cos[half + d] + even[d] * sin[half + d]) * scale;
    }
    convert(turned, out, D);
}

struct Layer {
    Tensor attention_norm, q_norm, k_norm, ffn_norm, k_cache, v_cache;  // q_norm and k_norm: both or neither
    Linear wqkv, wo, w13, w2;
    i64 window;
};

// All layers, checked once. They live in the memory of a tensor, which the program holds and hands to every call: so
// torch.compile sees one tensor instead of the hundreds in it, and takes that much less time.
struct FusedLayers {
    i64 n_head, intermediate_size;
    float eps;
    bool quantize_activations;
    const FusedLayers* self = this;  // is not, in a copy of that tensor
    std::vector<Layer> layers;

    static FusedLayers* of(const Tensor& handle) {
        auto* fused = (FusedLayers*)handle.const_data_ptr();
        TORCH_CHECK(handle.is_cpu() && is(handle, at::kByte) && handle.numel() == sizeof(FusedLayers) &&
                        handle.is_contiguous() && fused->self == fused,
                    "fused layers: this is a copy, fuse the layers again");
        return fused;
    }
};

// What all layers of one call share, for M = B * S tokens. T: the model's type, U: the one between the matrices
template <typename T, typename U> struct Step {
    const FusedLayers& fused;
    i64 C;
    Tensor pos;                     // [M]
    const float *cos, *sin, *logn;  // [M, D], [M, D], [M] or null
    T* x;                           // [M, C], in and out
    i64 M = pos.numel();

    // f(m) for every token
    template <typename F> void each(F f) const {
#pragma omp parallel for num_threads(at::get_num_threads()) if (M > MAX_TOKENS)
        for (i64 m = 0; m < M; m++) f(m);
    }
    Tensor empty(i64 width) const { return at::empty({M, width}, c10::CppTypeToScalarType<U>::value); }
    Tensor multiply(const Linear& linear, const Tensor& h) const {
        return linear.multiply(h, fused.quantize_activations);
    }
    Tensor normed(const Tensor& norm) const {
        Tensor h = empty(C);
        U* to = h.mutable_data_ptr<U>();
        const T* weight = norm.const_data_ptr<T>();
        each([&](i64 m) { rms_norm(x + m * C, weight, to + m * C, C, fused.eps); });
        return h;
    }
    void add(const Tensor& y) const {
        const U* from = y.const_data_ptr<U>();
        each([&](i64 m) {
            i64 i = m * C;
            for (; i + 16 <= (m + 1) * C; i += 16) store16(x + i, load16(x + i) + load16(from + i));
            for (; i < (m + 1) * C; i++) x[i] = (float)x[i] + (float)from[i];
        });
    }
};

template <typename T> const T* values(const Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; }

// x += wo(attention(wqkv(norm(x)))); keys and values are written to the caches.
template <typename T, typename U> void attention(const Step<T, U>& step, const Layer& layer) {
    const auto& cache = layer.k_cache;
    const i64 H = step.fused.n_head, K = cache.size(1), slots = cache.size(2), D = cache.size(3);
    const Tensor qkv = step.multiply(layer.wqkv, step.normed(layer.attention_norm));
    Tensor queries = at::empty({step.M, H * D}, cache.options()), y = step.empty(H * D);
    const U* from = qkv.const_data_ptr<U>();
    const T *q_norm = values<T>(layer.q_norm), *k_norm = values<T>(layer.k_norm);
    T *q = queries.mutable_data_ptr<T>(), *k = cache.mutable_data_ptr<T>(), *v = layer.v_cache.mutable_data_ptr<T>();
    const Tensor& pos = step.pos;
    const i64 S = step.M / cache.size(0), *positions = pos.const_data_ptr<i64>();
    step.each([&](i64 m) {
        const i64 b = m / S, slot = positions[m];
        const float *cos = step.cos + m * D, *sin = step.sin + m * D, eps = step.fused.eps;
        const float scale = step.logn ? step.logn[m] : 1.0f;
        const U* head = from + m * layer.wqkv.N;
        const auto at = [&](i64 i) { return ((b * K + i) * slots + slot) * D; };  // of KV head i in the caches
        for (i64 i = 0; i < H; i++, head += D) finish_head(head, q_norm, eps, cos, sin, scale, q + (m * H + i) * D, D);
        for (i64 i = 0; i < K; i++, head += D) finish_head(head, k_norm, eps, cos, sin, 1.0f, k + at(i), D);
        for (i64 i = 0; i < K; i++, head += D) convert(head, v + at(i), D);
    });
    attend_heads<T>(q, layer.k_cache, layer.v_cache, H, step.pos, layer.window, y.mutable_data_ptr<U>());
    step.add(step.multiply(layer.wo, y));
}

// x += w2(silu(gate) * up), where gate and up [F] are w13(norm(x))
template <typename T, typename U> void feed_forward(const Step<T, U>& step, const Layer& layer) {
    const i64 F = layer.w2.K;
    const Tensor both = step.multiply(layer.w13, step.normed(layer.ffn_norm));
    Tensor y = step.empty(F);
    const U* from = both.const_data_ptr<U>();
    U* yp = y.mutable_data_ptr<U>();
    step.each([&](i64 m) {
        const U *gate = from + m * 2 * F, *up = gate + F;
        U* to = yp + m * F;
        i64 f = 0;
        for (; f + 16 <= F; f += 16) {
            const f32x16 g = load16(gate + f), e = exp16(-max16(g, -g));  // exp(-|g|) does not overflow
            store16(to + f, (g < f32x16{} ? g * e : g) / (e + 1.0f) * load16(up + f));
        }
        for (; f < F; f++) to[f] = (float)gate[f] / (1.0f + std::exp(-(float)gate[f])) * (float)up[f];
    });
    step.add(step.multiply(layer.w2, y));
}

// -> uint8 [sizeof(FusedLayers)], to which add_layer adds the layers one by one
Tensor fuse_layers(i64 n_head, i64 intermediate_size, double eps, bool quantize_activations) {
    TORCH_CHECK(n_head > 0 && intermediate_size > 0, "fuse_layers: ", n_head, " heads, ", intermediate_size);
    auto* const fused = new FusedLayers{n_head, intermediate_size, (float)eps, quantize_activations};
    return at::from_blob(fused, {(i64)sizeof(FusedLayers)}, [](void* p) { delete (FusedLayers*)p; }, at::kByte);
}

void add_layer(const Tensor& handle, const Tensor& attention_norm, at::TensorList wqkv, const MaybeTensor& q_norm,
               const MaybeTensor& k_norm, at::TensorList wo, const Tensor& ffn_norm, at::TensorList w13,
               at::TensorList w2, const Tensor& k_cache, const Tensor& v_cache, i64 window) {
    auto* fused = FusedLayers::of(handle);
    const auto dtype = k_cache.scalar_type();
    check_caches(k_cache, v_cache, dtype);
    const auto& first_cache = fused->layers.empty() ? k_cache : fused->layers[0].k_cache;
    const i64 C = fused->layers.empty() ? attention_norm.numel() : fused->layers[0].w2.N;
    const i64 H = fused->n_head, K = k_cache.size(1), D = k_cache.size(3), F = fused->intermediate_size;
    TORCH_CHECK(k_cache.sizes() == first_cache.sizes() && is(first_cache, dtype) && C > 0 && H % K == 0,
                "add_layer: caches ", k_cache.sizes(), " ", dtype, " for ", H, " heads");
    TORCH_CHECK(q_norm.has_value() == k_norm.has_value(), "add_layer: norms of both queries and keys, or of neither");
    const auto norm = [&](const MaybeTensor& norm, i64 size) {
        if (!norm) return Tensor();
        const bool fits = is(*norm, dtype) && norm->is_contiguous() && norm->numel() == size;
        TORCH_CHECK(fits, "add_layer: a norm ", norm->sizes(), " ", norm->scalar_type(), " for ", size, " ", dtype);
        return *norm;
    };
    fused->layers.push_back({norm(attention_norm, C), norm(q_norm, D), norm(k_norm, D), norm(ffn_norm, C), k_cache,
                             v_cache, Linear(wqkv, (H + 2 * K) * D, C, dtype), Linear(wo, C, H * D, dtype),
                             Linear(w13, 2 * F, C, dtype), Linear(w2, C, F, dtype), window});
}

// x [B, S, C] through all layers, at input_pos [B, S] or [S]. cos, sin fp32 [B, S, 1, D], logn none or fp32 [B, S, 1,
// 1]
Tensor run_fused(const Tensor& x, const Tensor& handle, const Tensor& cos_, const Tensor& sin_,
                 const MaybeTensor& logn_, const Tensor& input_pos) {
    const auto* fused = FusedLayers::of(handle);
    TORCH_CHECK(!fused->layers.empty(), "run_fused: no layers");
    const auto cos = cos_.contiguous(), sin = sin_.contiguous(), logn = logn_ ? logn_->contiguous() : Tensor();
    const auto& cache = fused->layers[0].k_cache;
    const i64 B = cache.size(0), S = x.dim() == 3 ? x.size(1) : 0, M = B * S;
    const i64 D = cache.size(3), C = fused->layers[0].w2.N;
    const auto fp32 = [](const Tensor& t, i64 size) { return is(t, at::kFloat) && t.numel() == size; };
    TORCH_CHECK(M > 0 && is(x, cache.scalar_type()) && x.size(0) == B && x.size(2) == C && fp32(cos, M * D) &&
                    fp32(sin, M * D) && (!logn.defined() || fp32(logn, M)),
                "run_fused: x ", x.sizes(), ", cos ", cos.sizes(), ", caches ", cache.sizes());
    const auto pos = positions(input_pos, B, S, cache.size(2));
    auto out = x.clone(at::MemoryFormat::Contiguous);
    const auto run = [&](auto t, auto u) {
        using T = decltype(t);
        const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
        const Step<T, decltype(u)> step{*fused, C, pos, c, s, values<float>(logn), out.mutable_data_ptr<T>()};
        for (const auto& layer : fused->layers) {
            attention(step, layer);
            feed_forward(step, layer);
        }
    };
    by_dtype(x, [&](auto zero) {
        if (M > MAX_TOKENS) run(zero, zero);
        else run(zero, 0.0f);
    });
    return out;
}

}  // namespace
