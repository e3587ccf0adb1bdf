// Linears of every kind, and whole layers: between their matrices there is too little work to be worth operators of its
// own. Up to 16 tokens go through the decoding kernels, and what passes between the matrices stays in fp32; more are
// multiplied in the model's own dtype, or in fp32 where the CPU has no products of bf16 (see Linear::multiply).
#pragma once
#include <ATen/ops/from_blob.h>
#include <variant>
#include "prefill.h"

namespace {

using qwen_fast::DeltaTokens, qwen_fast::Int8, qwen_fast::Product;

using MaybeTensor = std::optional<Tensor>;

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
    Int8 int8() const { return {weight.const_data_ptr<int8_t>(), scales.const_data_ptr<float>()}; }
    Int4 int4() const {
        return {weight.const_data_ptr<uint8_t>(), scales.const_data_ptr<BFloat16>(), zeros.const_data_ptr<uint8_t>(),
                scales.size(1), weight.size(1) / scales.size(1)};
    }

    // Rows e * N / E to (e + 1) * N / E: one of E experts. An int4 block of rows must not belong to two of them.
    Linear expert(i64 e, i64 E) const {
        Linear one = *this;
        one.N = N / E;
        for (Tensor* t : {&one.weight, &one.scales, &one.zeros})
            if (t->defined()) *t = t->narrow(0, e * (t->size(0) / E), t->size(0) / E);
        return one;
    }

    void decode(const std::vector<Product>& products, i64 E, bool quantize_activations) const {
        const i64 n = N / E;
        if (zeros.defined()) return qwen_fast::multiply(int4(), products, n, K, quantize_activations);
        if (scales.defined()) return qwen_fast::multiply(int8(), products, n, K, quantize_activations);
        if (is(weight, at::kFloat)) qwen_fast::multiply(weight.const_data_ptr<float>(), products, n, K);
        else qwen_fast::multiply(weight.const_data_ptr<BFloat16>(), products, n, K);
    }

    // Whether so many tokens go through decode()
    bool decodes(i64 M, bool quantize_activations) const {
        const bool in_integers = zeros.defined() ? INT4_INTEGERS_FOR_ALL : scales.defined() && INT8_INTEGERS_FOR_ALL;
        return M <= MAX_TOKENS || FP32_PRODUCTS || (quantize_activations && in_integers);
    }

    // x [M, K] -> y [M, N]
    void decode(const float* x, float* y, i64 M, bool quantize_activations) const {
        decode({{0, M, x, y}}, 1, quantize_activations);
        if (!bias.defined()) return;
        const float* b = bias.const_data_ptr<float>();
        for_each(M * N > ONE_THREAD, M, [&](i64 m) {
            for (i64 n = 0; n < N; n++) y[m * N + n] += b[n];
        });
    }

    // x [M, K] -> y [M, N] in bf16, or false
    bool multiply_by_tiles(const Tensor& x, Tensor& y, bool quantize) const {
        const i64 M = x.size(0);
        const auto* from = x.const_data_ptr<BFloat16>();
        auto* to = y.mutable_data_ptr<BFloat16>();
        if (zeros.defined()) return qwen_fast::multiply_by_tiles(int4(), from, to, M, N, K, quantize);
        if (scales.defined()) return qwen_fast::multiply_by_tiles(int8(), from, to, M, N, K, quantize);
        return qwen_fast::multiply_by_tiles(weight.const_data_ptr<BFloat16>(), from, to, M, N, K);
    }

    // x [M, K] -> [M, N] in x's dtype
    Tensor multiply(const Tensor& x, bool quantize_activations) const {
        const i64 M = x.size(0);
        if (decodes(M, quantize_activations)) {
            const auto x32 = is(x, at::kFloat) ? x : x.to(at::kFloat);
            auto y = empty({M, N}, at::kFloat);
            if (M > 0) decode(x32.const_data_ptr<float>(), y.mutable_data_ptr<float>(), M, quantize_activations);
            return y.to(x.scalar_type());
        }
        auto y = empty({M, N}, x.scalar_type());
        if (is(x, at::kBFloat16) && multiply_by_tiles(x, y, quantize_activations))
            return bias.defined() ? y.add_(bias) : y;
        if (zeros.defined()) by_dtype(x, [&](auto zero) { int4_prefill<decltype(zero)>(x, int4(), y); });
        else if (is(weight, x.scalar_type())) y = x.mm(weight.t());
        else converted_prefill(x, weight, scales, y);
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
    const auto rows = x.reshape({-1, linear.K}).contiguous();
    return linear.multiply(BF16_PRODUCTS ? rows : rows.to(at::kFloat), quantize_activations).to(dtype).view(sizes);
}

// What an RMS norm has besides its weights: x / sqrt(mean(x^2) + eps) * (weight + offset)
struct Norm {
    float eps, offset;
};

// x [C] -> y [C]
template <typename X, typename T, typename U>
INLINE void rms_norm(const X* x, const T* weight, U* y, i64 C, Norm norm) {
    float squares = 0;
    i64 c = 0;
    f32x16 sums = {};
    for (; c + 16 <= C; c += 16) sums += load16(x + c) * load16(x + c);
    for (; c < C; c++) squares += (float)x[c] * (float)x[c];
    const float scale = 1.0f / std::sqrt((squares + sum(sums)) / C + norm.eps);
    for (c = 0; c + 16 <= C; c += 16) store16(y + c, load16(x + c) * scale * (load16(weight + c) + norm.offset));
    for (; c < C; c++) y[c] = (float)x[c] * scale * ((float)weight[c] + norm.offset);
}

// One head x [D] of one token: norm, if there is one, half-split RoPE of the first R dimensions by cos, sin [R], times
// scale -> out [D]
template <typename U, typename T>
INLINE void finish_head(const U* x, const T* weight, Norm norm, const float* cos, const float* sin, i64 R, float scale,
                        float* out, i64 D) {
    float even[MAX_HEAD];
    if (weight) rms_norm(x, weight, even, D, norm);
    else convert(x, even, D);
    const i64 half = R / 2;
    for (i64 d = 0; d < half; d++) {
        out[d] = (even[d] * cos[d] - even[half + d] * sin[d]) * scale;
        out[half + d] = (even[half + d] * cos[half + d] + even[d] * sin[half + d]) * scale;
    }
    for (i64 d = R; d < D; d++) out[d] = even[d] * scale;
}

// Where one layer's keys or values are written to: rows [D] in the model's type or in int8
template <typename T> struct CacheRows {
    T* rows = nullptr;
    int8_t* int8_rows = nullptr;
    float* scales;
    CacheRows(void* cache, float* scales) : scales(scales) {
        if (!scales) rows = (T*)cache;
        else int8_rows = (int8_t*)cache;
    }
    INLINE void write(i64 row, const float* x, i64 D) const {
        if (rows) return convert(x, rows + row * D, D);
        f32x16 high = {};
        for (i64 d = 0; d < D; d += 16) high = max16(high, max16(load16(x + d), -load16(x + d)));
        Activations<int8_t>::round_group(x, highest(high), D, int8_rows + row * D, scales[row]);
    }
};

struct Attention {
    Linear wqkv, wo;        // queries, keys, values; the output's gate if any
    Tensor q_norm, k_norm;  // both or neither
    KVTensors cache;
    i64 window;
    bool output_gate;
};

struct DeltaNet {
    Linear wqkv, wba, wo;           // queries, keys, values, the output's gate; writing strengths, decays
    Tensor conv, A, dt_bias, norm;  // [size, N] of the model's type; fp32 [Hv], -exp(A_log); [Hv]; [V]
    DeltaTensors state;
};

struct FeedForward {
    Linear w13, w2;  // gate, then up; down
};

// E feed-forwards, expert after expert in the rows of w13 and w2, of which the router chooses k for a token
struct Experts {
    FeedForward all;
    i64 E, k;
    bool normalize;  // the weights of those chosen sum up to 1
    Linear router;
    std::optional<FeedForward> shared;  // an expert of all tokens, times sigmoid(shared_gate(x))
    std::optional<Linear> shared_gate;
};

// x += f(norm(x)): half a layer
struct Residual {
    Tensor norm;
    std::variant<Attention, DeltaNet, FeedForward, Experts> f;
};

// All layers, checked once. They live in the memory of a tensor, which the program holds and hands to every call: so
// torch.compile sees one tensor instead of the hundreds in it, and takes that much less time.
struct FusedLayers {
    i64 n_head;
    Norm norm;
    bool quantize_activations;
    const FusedLayers* self = this;  // is not, in a copy of that tensor
    std::vector<Residual> parts;
    // Of the first part: the model's type and dimension; as soon as they are known: rows of a batch, and the caches'
    at::ScalarType dtype = at::kFloat;
    i64 C = 0, B = 0;
    Tensor cache;

    static FusedLayers* of(const Tensor& handle) {
        auto* fused = (FusedLayers*)handle.const_data_ptr();
        TORCH_CHECK(handle.is_cpu() && is(handle, at::kByte) && handle.numel() == sizeof(FusedLayers) &&
                        handle.is_contiguous() && fused->self == fused,
                    "fused layers: this is a copy, fuse the layers again");
        return fused;
    }
    void add(const Tensor& norm, decltype(Residual::f) f) { parts.push_back({norm, std::move(f)}); }
};

// What all layers of one call share, for M = B * S tokens. T: the model's type, U: the one between the matrices
template <typename T, typename U> struct Step {
    const FusedLayers& fused;
    i64 S, C, R;
    Tensor pos;                     // [M]
    const float *cos, *sin, *logn;  // [M, R], [M, R], [M] or null
    T* x;                           // [M, C], in and out
    i64 M = pos.numel();

    // f(m) for every token
    template <typename F> void each(F f) const { for_each(M > MAX_TOKENS, M, f); }
    Tensor empty(i64 width) const { return ::empty({M, width}, c10::CppTypeToScalarType<U>::value); }
    Tensor multiply(const Linear& linear, const Tensor& h) const {
        return linear.multiply(h, fused.quantize_activations);
    }
    Tensor normed(const Tensor& norm) const {
        Tensor h = empty(C);
        U* to = h.mutable_data_ptr<U>();
        const T* weight = norm.const_data_ptr<T>();
        each([&](i64 m) { rms_norm(x + m * C, weight, to + m * C, C, fused.norm); });
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

// wo(attention(wqkv(h))); keys and values are written to the caches.
template <typename T, typename U> Tensor run(const Step<T, U>& step, const Attention& layer, const Tensor& h) {
    const KVCache cache = layer.cache.cache();
    const i64 H = step.fused.n_head, K = cache.K, D = cache.D, R = step.R;
    const Tensor qkv = step.multiply(layer.wqkv, h);
    Tensor queries = empty({step.M, H * D}, c10::CppTypeToScalarType<T>::value), y = step.empty(H * D);
    const U* from = qkv.const_data_ptr<U>();
    const T *q_norm = values<T>(layer.q_norm), *k_norm = values<T>(layer.k_norm);
    T* q = queries.mutable_data_ptr<T>();
    const CacheRows<T> k_rows(cache.k, cache.k_scales), v_rows(cache.v, cache.v_scales);
    U* out = y.mutable_data_ptr<U>();
    const i64* positions = step.pos.template const_data_ptr<i64>();
    step.each([&](i64 m) {
        const i64 b = m / step.S, slot = positions[m];
        const float *cos = step.cos + m * R, *sin = step.sin + m * R;
        const float scale = step.logn ? step.logn[m] : 1.0f;
        const Norm norm = step.fused.norm;
        const U* head = from + m * layer.wqkv.N;
        const auto row = [&](i64 i) { return (b * K + i) * cache.T + slot; };  // of KV head i in the caches
        float finished[MAX_HEAD];
        for (i64 i = 0; i < H; i++, head += D) {
            finish_head(head, q_norm, norm, cos, sin, R, scale, finished, D);
            convert(finished, q + (m * H + i) * D, D);
        }
        for (i64 i = 0; i < K; i++, head += D) {
            finish_head(head, k_norm, norm, cos, sin, R, 1.0f, finished, D);
            k_rows.write(row(i), finished, D);
        }
        for (i64 i = 0; i < K; i++, head += D) {
            convert(head, finished, D);
            v_rows.write(row(i), finished, D);
        }
    });
    qwen_fast::attend_heads(q, cache, H, step.S, positions, layer.window, out);
    if (layer.output_gate)
        step.each([&](i64 m) {
            const U* gate = from + m * layer.wqkv.N + (H + 2 * K) * D;
            for (i64 i = 0; i < H * D; i += LANES) {
                U* to = out + m * H * D + i;
                store_lanes(to, load_lanes(to) * sigmoid(load_lanes(gate + i)));
            }
        });
    return step.multiply(layer.wo, y);
}

// wo(norm(o) * silu(gate)), where o is what the heads read from memory
template <typename T, typename U> Tensor run(const Step<T, U>& step, const DeltaNet& layer, const Tensor& h) {
    const DeltaState state = layer.state.state();
    const i64 Hv = state.Hv, V = state.V;
    const Tensor qkv = step.multiply(layer.wqkv, h), ba = step.multiply(layer.wba, h);
    Tensor y = step.empty(Hv * V), gates = empty({2, step.M, Hv}, at::kFloat);
    const U *from = qkv.const_data_ptr<U>(), *strengths = ba.const_data_ptr<U>();
    const float *A = layer.A.const_data_ptr<float>(), *dt_bias = layer.dt_bias.const_data_ptr<float>();
    const float* norm = layer.norm.const_data_ptr<float>();
    float *g = gates.mutable_data_ptr<float>(), *b = g + step.M * Hv;
    U* out = y.mutable_data_ptr<U>();
    step.each([&](i64 m) {
        for (i64 i = 0; i < Hv; i++) {
            const float a = (float)strengths[(2 * m + 1) * Hv + i] + dt_bias[i];
            g[m * Hv + i] = A[i] * (a > 20 ? a : std::log1p(std::exp(a)));
            b[m * Hv + i] = 1 / (1 + std::exp(-(float)strengths[2 * m * Hv + i]));
        }
    });
    const DeltaTokens<T> tokens{values<T>(layer.conv), from, std::is_same_v<U, float>, layer.wqkv.N, step.S, g, b,
                                step.pos.template const_data_ptr<i64>()};
    qwen_fast::run_delta_net<T>(state, tokens, [&](i64 m, i64 i, float* o) {
        const U* gate = from + m * layer.wqkv.N + state.N + i * V;
        rms_norm(o, norm, o, V, Norm{step.fused.norm.eps, 0});
        U* to = out + (m * Hv + i) * V;
        for (i64 v = 0; v < V; v += LANES) store_lanes(to + v, load_lanes(o + v) * silu(load_lanes(gate + v)));
    });
    return step.multiply(layer.wo, y);
}

// silu(gate) * up [F] of gate_up [2 F]
template <typename U> INLINE void silu_times(const U* gate_up, U* to, i64 F) {
    const U *gate = gate_up, *up = gate + F;
    i64 f = 0;
    for (; f + LANES <= F; f += LANES) store_lanes(to + f, silu(load_lanes(gate + f)) * load_lanes(up + f));
    for (; f < F; f++) to[f] = (float)gate[f] / (1.0f + std::exp(-(float)gate[f])) * (float)up[f];
}

// [rows, 2 F] -> [rows, F]
template <typename U> Tensor silu_times(const Tensor& gate_up) {
    const i64 rows = gate_up.size(0), F = gate_up.size(1) / 2;
    Tensor y = empty({rows, F}, gate_up.scalar_type());
    const U* from = gate_up.const_data_ptr<U>();
    U* to = y.mutable_data_ptr<U>();
    for_each(rows * F > ONE_THREAD, rows, [&](i64 i) { silu_times(from + i * 2 * F, to + i * F, F); });
    return y;
}

// w2(silu(gate) * up) of x [M, C], where gate and up are w13(x)
template <typename U> Tensor run(const FeedForward& ff, const Tensor& x, bool quantize_activations) {
    return ff.w2.multiply(silu_times<U>(ff.w13.multiply(x, quantize_activations)), quantize_activations);
}

// Which experts the tokens go to. A pair is a token and one of its experts; pairs are in the experts' order.
struct Routing {
    i64 M, k;
    std::vector<i64> first;        // [E + 1]: of an expert's pairs
    std::vector<i64> token, pair;  // of a pair; of token m's j-th expert, [M * k]
    std::vector<float> weight;     // [M * k]

    // chosen: expert of token m's j-th choice, [M * k]
    Routing(const std::vector<i64>& chosen, std::vector<float> weight, i64 M, i64 k, i64 E)
        : M(M), k(k), first(E + 1), token(M * k), pair(M * k), weight(std::move(weight)) {
        for (const i64 e : chosen) first[e + 1]++;
        for (i64 e = 0; e < E; e++) first[e + 1] += first[e];
        std::vector<i64> next(first.begin(), first.end() - 1);
        for (i64 i = 0; i < M * k; i++) token[pair[i] = next[chosen[i]]++] = i / k;
    }

    // The k most probable of logits [M, E], the first among equals
    template <typename U> static Routing best(const U* logits, i64 M, i64 k, i64 E, bool normalize) {
        std::vector<i64> chosen(M * k);
        std::vector<float> weight(M * k), p(E);
        for (i64 m = 0; m < M; m++) {
            const U* from = logits + m * E;
            const float most = *std::max_element(from, from + E);
            float all = 0, sum = 0;
            for (i64 e = 0; e < E; e++) all += p[e] = std::exp((float)from[e] - most);
            for (i64 j = 0; j < k; j++) {
                const i64 e = std::max_element(p.begin(), p.end()) - p.begin();
                chosen[m * k + j] = e;
                sum += weight[m * k + j] = p[e];
                p[e] = -1;
            }
            for (i64 j = 0; j < k; j++) weight[m * k + j] /= normalize ? sum : all;
        }
        return Routing(chosen, std::move(weight), M, k, E);
    }
};

// x [pairs, K] -> [pairs, N / E], each pair by its expert's rows of w, which are read once
template <typename U> Tensor by_expert(const Linear& w, const Routing& routing, const Tensor& x,
                                       bool quantize_activations) {
    const i64 E = routing.first.size() - 1, n = w.N / E, K = w.K;
    Tensor y = empty({x.size(0), n}, x.scalar_type());
    const Tensor x32 = x.to(at::kFloat), y32 = is(y, at::kFloat) ? y : empty(y.sizes(), at::kFloat);
    std::vector<Product> products;
    for (i64 e = 0; e < E; e++) {
        const i64 begin = routing.first[e], count = routing.first[e + 1] - begin;
        if (!w.decodes(count, quantize_activations))
            y.narrow(0, begin, count).copy_(w.expert(e, E).multiply(x.narrow(0, begin, count), quantize_activations));
        else if (count)
            products.push_back(
                {e, count, x32.const_data_ptr<float>() + begin * K, y32.mutable_data_ptr<float>() + begin * n});
    }
    w.decode(products, E, quantize_activations);
    if (!y.is_same(y32))
        for (const auto& p : products) {
            const i64 begin = routing.first[p.e] * n;
            convert(y32.const_data_ptr<float>() + begin, y.mutable_data_ptr<U>() + begin, p.M * n);
        }
    return y;
}

// The weighted sum of what the experts make of h [M, C], in fp32
template <typename U> Tensor run(const FeedForward& experts, const Routing& routing, const Tensor& h,
                                 bool quantize_activations) {
    const i64 C = h.size(1), pairs = routing.token.size();
    Tensor x = empty({pairs, C}, h.scalar_type()), y = empty(h.sizes(), at::kFloat);
    const U* from = h.const_data_ptr<U>();
    U* to = x.mutable_data_ptr<U>();
    for (i64 p = 0; p < pairs; p++) std::copy_n(from + routing.token[p] * C, C, to + p * C);
    const Tensor hidden = silu_times<U>(by_expert<U>(experts.w13, routing, x, quantize_activations));
    const Tensor out = by_expert<U>(experts.w2, routing, hidden, quantize_activations);
    const U* outs = out.const_data_ptr<U>();
    float* sums = y.mutable_data_ptr<float>();
    for_each(pairs * C > ONE_THREAD, routing.M, [&](i64 m) {
        for (i64 c = 0; c < C; c++) {
            float sum = 0;
            for (i64 i = m * routing.k; i < (m + 1) * routing.k; i++)
                sum += routing.weight[i] * (float)outs[routing.pair[i] * C + c];
            sums[m * C + c] = sum;
        }
    });
    return y;
}

template <typename T, typename U> Tensor run(const Step<T, U>& step, const FeedForward& layer, const Tensor& h) {
    return run<U>(layer, h, step.fused.quantize_activations);
}

template <typename T, typename U> Tensor run(const Step<T, U>& step, const Experts& experts, const Tensor& h) {
    const bool quantize_activations = step.fused.quantize_activations;
    const Tensor logits = step.multiply(experts.router, h);
    const auto routing = Routing::best(logits.const_data_ptr<U>(), step.M, experts.k, experts.E, experts.normalize);
    Tensor y = run<U>(experts.all, routing, h, quantize_activations);
    if (experts.shared) {
        const Tensor gate = step.multiply(*experts.shared_gate, h).to(at::kFloat).sigmoid();
        y.addcmul_(gate, run<U>(*experts.shared, h, quantize_activations).to(at::kFloat));
    }
    return y.to(h.scalar_type());
}

// What the experts chosen [M, k], times their weights fp32 [M, k], make of x [M, C] -> [M, C]
Tensor experts(const Tensor& x, const Tensor& chosen, const Tensor& weights, at::TensorList w13, at::TensorList w2,
               i64 n_expert, i64 size, bool quantize_activations) {
    const auto dtype = x.scalar_type();
    const i64 M = x.size(0), C = x.size(1), k = chosen.size(1);
    TORCH_CHECK(M > 0 && k > 0 && is(chosen, at::kLong) && is(weights, at::kFloat) && chosen.numel() == M * k &&
                    weights.numel() == M * k && x.is_contiguous(),
                "experts: x ", x.sizes(), ", chosen ", chosen.sizes(), ", weights ", weights.sizes());
    const FeedForward all{Linear(w13, n_expert * 2 * size, C, dtype), Linear(w2, n_expert * C, size, dtype)};
    for (const Linear* w : {&all.w13, &all.w2}) {
        const bool whole = !w->zeros.defined() || n_expert == 1 || w->N / n_expert % ROWS == 0;
        TORCH_CHECK(whole, "experts: int4 of ", w->N / n_expert, " rows, not whole blocks");
    }
    const Tensor chosen_ = chosen.contiguous(), weights_ = weights.contiguous();
    const auto* c = chosen_.const_data_ptr<i64>();
    const float* w = weights_.const_data_ptr<float>();
    for (i64 i = 0; i < M * k; i++) TORCH_CHECK(c[i] >= 0 && c[i] < n_expert, "experts: expert ", c[i]);
    const Routing routing({c, c + M * k}, {w, w + M * k}, M, k, n_expert);
    Tensor y;
    by_dtype(x, [&](auto zero) {
        using U = std::conditional_t<BF16_PRODUCTS, decltype(zero), float>;
        if (M > MAX_TOKENS) y = run<U>(all, routing, x.to(c10::CppTypeToScalarType<U>::value), quantize_activations);
        else y = run<float>(all, routing, x.to(at::kFloat), quantize_activations);
    });
    return y.to(dtype);
}

// -> uint8 [sizeof(FusedLayers)], to which what follows adds the layers, half by half
Tensor fuse_layers(i64 n_head, double eps, double norm_offset, bool quantize_activations) {
    TORCH_CHECK(n_head > 0, "fuse_layers: ", n_head, " heads");
    auto* const fused = new FusedLayers{n_head, {(float)eps, (float)norm_offset}, quantize_activations};
    return at::from_blob(fused, {(i64)sizeof(FusedLayers)}, [](void* p) { delete (FusedLayers*)p; }, at::kByte);
}

// A norm's weight, checked
Tensor norm_of(const MaybeTensor& weight, i64 size, at::ScalarType dtype) {
    if (!weight) return Tensor();
    const bool fits = is(*weight, dtype) && weight->is_contiguous() && weight->numel() == size;
    TORCH_CHECK(fits, "fused layers: a norm ", weight->sizes(), " ", weight->scalar_type(), " for ", size, " ", dtype);
    return *weight;
}

// The layers that tensor stands for; the first norm says what the model's type and dimension are.
FusedLayers* extend(const Tensor& handle, const Tensor& norm) {
    auto* fused = FusedLayers::of(handle);
    if (fused->parts.empty()) fused->dtype = norm.scalar_type(), fused->C = norm.numel();
    TORCH_CHECK(fused->C > 0, "fused layers: a norm of nothing");
    norm_of(norm, fused->C, fused->dtype);
    return fused;
}

void check_batch(FusedLayers* fused, i64 B) {
    if (!fused->B) fused->B = B;
    TORCH_CHECK(fused->B == B, "fused layers: ", B, " rows after ", fused->B);
}

void add_attention(const Tensor& handle, const Tensor& norm, at::TensorList wqkv, const MaybeTensor& q_norm,
                   const MaybeTensor& k_norm, at::TensorList wo, const Tensor& k_cache, const Tensor& v_cache,
                   i64 window, bool output_gate, at::TensorList scales) {
    auto* fused = extend(handle, norm);
    const auto dtype = fused->dtype;
    const KVTensors kv_cache(k_cache, v_cache, scales, dtype);
    const auto& cache = fused->cache.defined() ? fused->cache : k_cache;
    const i64 C = fused->C, H = fused->n_head, K = k_cache.size(1), D = k_cache.size(3);
    TORCH_CHECK(k_cache.sizes() == cache.sizes() && H % K == 0, "add_attention: caches ", k_cache.sizes(), " for ", H,
                " heads");
    TORCH_CHECK(q_norm.has_value() == k_norm.has_value(), "add_attention: norms of queries and keys, or of neither");
    Attention layer{Linear(wqkv, (H * (1 + output_gate) + 2 * K) * D, C, dtype),
                    Linear(wo, C, H * D, dtype),
                    norm_of(q_norm, D, dtype),
                    norm_of(k_norm, D, dtype),
                    kv_cache,
                    window,
                    output_gate};
    check_batch(fused, k_cache.size(0));
    fused->cache = cache;
    fused->add(norm, std::move(layer));
}

// conv [N, size]; state: the tensors of a deltanet.DeltaState
void add_deltanet(const Tensor& handle, const Tensor& norm, at::TensorList wqkv, at::TensorList wba, const Tensor& conv,
                  const Tensor& A_log, const Tensor& dt_bias, const Tensor& output_norm, at::TensorList wo,
                  at::TensorList state) {
    auto* fused = extend(handle, norm);
    const auto dtype = fused->dtype;
    const DeltaTensors s(state);
    const i64 C = fused->C, values = s.Hv * s.V;
    TORCH_CHECK(is(conv, dtype) && is(s.inputs, dtype) && conv.sizes() == at::IntArrayRef({s.N, s.size}) &&
                    A_log.numel() == s.Hv && dt_bias.numel() == s.Hv && output_norm.numel() == s.V,
                "add_deltanet: convolution ", conv.sizes(), ", A_log ", A_log.sizes(), ", dt_bias ", dt_bias.sizes(),
                ", norm ", output_norm.sizes(), " for memory ", s.memory.sizes(), " and ", dtype);
    DeltaNet layer{Linear(wqkv, s.N + values, C, dtype),
                   Linear(wba, 2 * s.Hv, C, dtype),
                   Linear(wo, C, values, dtype),
                   conv.t().contiguous(),
                   A_log.to(at::kFloat).exp().neg(),
                   dt_bias.to(at::kFloat).contiguous(),
                   output_norm.to(at::kFloat).contiguous(),
                   s};
    check_batch(fused, s.B);
    fused->add(norm, std::move(layer));
}

void add_feed_forward(const Tensor& handle, const Tensor& norm, at::TensorList w13, at::TensorList w2, i64 size,
                      at::TensorList router, at::TensorList shared_gate, at::TensorList shared_w13,
                      at::TensorList shared_w2, i64 shared_size, i64 n_expert, i64 n_chosen, bool normalize) {
    auto* fused = extend(handle, norm);
    const auto dtype = fused->dtype;
    const i64 C = fused->C, E = std::max<i64>(n_expert, 1);
    const auto feed_forward = [&](at::TensorList w13, at::TensorList w2, i64 E, i64 F) {
        TORCH_CHECK(F > 0, "add_feed_forward: of ", F);
        return FeedForward{Linear(w13, E * 2 * F, C, dtype), Linear(w2, E * C, F, dtype)};
    };
    auto all = feed_forward(w13, w2, E, size);
    if (!n_expert) return fused->add(norm, std::move(all));
    TORCH_CHECK(0 < n_chosen && n_chosen <= E && 2 * size % ROWS == 0 && C % ROWS == 0, "add_feed_forward: ", n_chosen,
                " of ", E, " experts [", size, ", ", C, "]");
    Experts experts{std::move(all), E, n_chosen, normalize, Linear(router, E, C, dtype), {}, {}};
    if (shared_size) {
        experts.shared = feed_forward(shared_w13, shared_w2, 1, shared_size);
        experts.shared_gate = Linear(shared_gate, 1, C, dtype);
    }
    fused->add(norm, std::move(experts));
}

// x [B, S, C] through all layers, at input_pos [B, S] or [S]. cos, sin fp32 [B, S, 1, R], logn none or fp32 [B, S, 1,
// 1]
Tensor run_fused(const Tensor& x, const Tensor& handle, const Tensor& cos_, const Tensor& sin_,
                 const MaybeTensor& logn_, const Tensor& input_pos) {
    const auto* fused = FusedLayers::of(handle);
    TORCH_CHECK(!fused->parts.empty() && fused->cache.defined(), "run_fused: no layers, or none with attention");
    const auto cos = cos_.contiguous(), sin = sin_.contiguous(), logn = logn_ ? logn_->contiguous() : Tensor();
    const auto& cache = fused->cache;
    const i64 B = fused->B, S = x.dim() == 3 ? x.size(1) : 0, M = B * S;
    const i64 C = fused->C, R = M > 0 ? cos.numel() / M : 0;
    const auto fp32 = [](const Tensor& t, i64 size) { return is(t, at::kFloat) && t.numel() == size; };
    TORCH_CHECK(M > 0 && is(x, fused->dtype) && x.size(0) == B && x.size(2) == C && R % 2 == 0 && R <= cache.size(3) &&
                    cos.size(-1) == R && fp32(cos, M * R) && fp32(sin, M * R) && (!logn.defined() || fp32(logn, M)),
                "run_fused: x ", x.sizes(), ", cos ", cos.sizes(), ", caches ", cache.sizes());
    const auto pos = positions(input_pos, B, S, cache.size(2));
    auto out = x.clone(at::MemoryFormat::Contiguous);
    const auto run_all = [&](auto t, auto u) {
        using T = decltype(t);
        const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
        const Step<T, decltype(u)> step{*fused, S, C, R, pos, c, s, values<float>(logn), out.mutable_data_ptr<T>()};
        for (const auto& [norm, f] : fused->parts) {
            const Tensor h = step.normed(norm);
            step.add(std::visit([&](const auto& part) { return run(step, part, h); }, f));
        }
    };
    by_dtype(x, [&](auto zero) {
        if constexpr (BF16_PRODUCTS)
            if (M > MAX_TOKENS) return run_all(zero, zero);
        if (M > MAX_TOKENS) run_all(zero, 0.0f);
        else run_all(zero, 0.0f);
    });
    return out;
}

}  // namespace
