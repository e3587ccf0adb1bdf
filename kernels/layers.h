// Linears of every kind, and whole layers: between their matrices there is too little work to be worth operators of its
// own. Up to 16 tokens go through the decoding kernels, and what passes between the matrices stays in fp32; more go
// through PyTorch's products, in the model's own dtype.
#pragma once
#include <ATen/ops/from_blob.h>
#include <variant>
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

    // Rows e * N / E to (e + 1) * N / E: one of E experts. An int4 block of rows must not belong to two of them.
    Linear expert(i64 e, i64 E) const {
        Linear one = *this;
        one.N = N / E;
        for (Tensor* t : {&one.weight, &one.scales, &one.zeros})
            if (t->defined()) *t = t->narrow(0, e * (t->size(0) / E), t->size(0) / E);
        return one;
    }

    // One of the products that decode() computes: x [M, K] -> y [M, N], at most 16 tokens, with the weights of expert e
    struct Product {
        i64 e, M;
        const float* x;
        float* y;
    };
    template <bool quantize> void decode_quantized(const std::vector<Product>& products, i64 E) const {
        const i64 n = N / E;
        if (zeros.defined()) {
            std::vector<Int4Rows<quantize>> rows;
            for (const auto& p : products) {
                Int4 w = int4();
                const i64 block = p.e * (n / ROWS);
                w.packed += block * w.units() * UNIT, w.scales += block * w.groups * ROWS;
                w.zeros += block * w.groups * ROWS;
                rows.emplace_back(w, p.x, p.y, p.M, n, K);
            }
            return share_all(rows);
        }
        std::vector<Int8Rows<quantize>> rows;
        const auto* w = weight.const_data_ptr<int8_t>();
        const float* s = scales.const_data_ptr<float>();
        for (const auto& p : products) rows.emplace_back(w + p.e * n * K, s + p.e * n, p.x, p.y, p.M, n, K);
        share_all(rows);
    }
    template <typename T> void decode_plain(const std::vector<Product>& products, i64 E) const {
        const i64 n = N / E;
        std::vector<Rows<T>> rows;
        std::vector<std::vector<T>> rounded(products.size());
        for (size_t i = 0; i < products.size(); i++) {
            const auto& p = products[i];
            const T* x = (const T*)p.x;
            if (!std::is_same_v<T, float>) {
                rounded[i].resize(p.M * K);
                convert(p.x, rounded[i].data(), p.M * K);
                x = rounded[i].data();
            }
            rows.push_back({weight.const_data_ptr<T>() + p.e * n * K, x, p.y, p.M, n, K});
        }
        share_all(rows);
    }
    void decode(const std::vector<Product>& products, i64 E, bool quantize_activations) const {
        if (scales.defined() && quantize_activations) decode_quantized<HAVE_VNNI>(products, E);
        else if (scales.defined()) decode_quantized<false>(products, E);
        else if (is(weight, at::kFloat)) decode_plain<float>(products, E);
        else decode_plain<BFloat16>(products, E);
    }

    // x [M, K] -> y [M, N], at most 16 tokens
    void decode(const float* x, float* y, i64 M, bool quantize_activations) const {
        decode({{0, M, x, y}}, 1, quantize_activations);
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

struct Layer {
    Tensor attention_norm, q_norm, k_norm, ffn_norm, k_cache, v_cache;  // q_norm and k_norm: both or neither
    Linear wqkv, wo;
    std::variant<FeedForward, Experts> feed_forward;
    i64 window;
};

// All layers, checked once. They live in the memory of a tensor, which the program holds and hands to every call: so
// torch.compile sees one tensor instead of the hundreds in it, and takes that much less time.
struct FusedLayers {
    i64 n_head;
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

// silu(gate) * up [F] of gate_up [2 F]
template <typename U> INLINE void silu_times(const U* gate_up, U* to, i64 F) {
    const U *gate = gate_up, *up = gate + F;
    i64 f = 0;
    for (; f + 16 <= F; f += 16) {
        const f32x16 g = load16(gate + f), e = exp16(-max16(g, -g));  // exp(-|g|) does not overflow
        store16(to + f, (g < f32x16{} ? g * e : g) / (e + 1.0f) * load16(up + f));
    }
    for (; f < F; f++) to[f] = (float)gate[f] / (1.0f + std::exp(-(float)gate[f])) * (float)up[f];
}

// [rows, 2 F] -> [rows, F]
template <typename U> Tensor silu_times(const Tensor& gate_up) {
    const i64 rows = gate_up.size(0), F = gate_up.size(1) / 2;
    Tensor y = at::empty({rows, F}, gate_up.options());
    const U* from = gate_up.const_data_ptr<U>();
    U* to = y.mutable_data_ptr<U>();
#pragma omp parallel for num_threads(at::get_num_threads()) if (rows * F > ONE_THREAD)
    for (i64 i = 0; i < rows; i++) silu_times(from + i * 2 * F, to + i * F, F);
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
template <typename U> Tensor by_expert(const Linear& w, const Routing& routing, const Tensor& x, bool quantize_activations) {
    const i64 E = routing.first.size() - 1, n = w.N / E, K = w.K;
    Tensor y = at::empty({x.size(0), n}, x.options());
    const Tensor x32 = x.to(at::kFloat), y32 = is(y, at::kFloat) ? y : at::empty(y.sizes(), x32.options());
    std::vector<Linear::Product> products;
    for (i64 e = 0; e < E; e++) {
        const i64 begin = routing.first[e], count = routing.first[e + 1] - begin;
        if (count > MAX_TOKENS)
            y.narrow(0, begin, count).copy_(w.expert(e, E).multiply(x.narrow(0, begin, count), quantize_activations));
        else if (count)
            products.push_back({e, count, x32.const_data_ptr<float>() + begin * K, y32.mutable_data_ptr<float>() + begin * n});
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
template <typename U> Tensor run(const FeedForward& experts, const Routing& routing, const Tensor& h, bool quantize_activations) {
    const i64 C = h.size(1), pairs = routing.token.size();
    Tensor x = at::empty({pairs, C}, h.options()), y = at::empty(h.sizes(), h.options().dtype(at::kFloat));
    const U* from = h.const_data_ptr<U>();
    U* to = x.mutable_data_ptr<U>();
    for (i64 p = 0; p < pairs; p++) std::copy_n(from + routing.token[p] * C, C, to + p * C);
    const Tensor hidden = silu_times<U>(by_expert<U>(experts.w13, routing, x, quantize_activations));
    const Tensor out = by_expert<U>(experts.w2, routing, hidden, quantize_activations);
    const U* outs = out.const_data_ptr<U>();
    float* sums = y.mutable_data_ptr<float>();
#pragma omp parallel for num_threads(at::get_num_threads()) if (pairs * C > ONE_THREAD)
    for (i64 m = 0; m < routing.M; m++)
        for (i64 c = 0; c < C; c++) {
            float sum = 0;
            for (i64 i = m * routing.k; i < (m + 1) * routing.k; i++)
                sum += routing.weight[i] * (float)outs[routing.pair[i] * C + c];
            sums[m * C + c] = sum;
        }
    return y;
}

// x += feed_forward(norm(x))
template <typename T, typename U> void feed_forward(const Step<T, U>& step, const Layer& layer) {
    const Tensor h = step.normed(layer.ffn_norm);
    const bool quantize_activations = step.fused.quantize_activations;
    if (const auto* dense = std::get_if<FeedForward>(&layer.feed_forward))
        return step.add(run<U>(*dense, h, quantize_activations));
    const auto& experts = std::get<Experts>(layer.feed_forward);
    const Tensor logits = step.multiply(experts.router, h);
    const auto routing = Routing::best(logits.const_data_ptr<U>(), step.M, experts.k, experts.E, experts.normalize);
    Tensor y = run<U>(experts.all, routing, h, quantize_activations);
    if (experts.shared) {
        const Tensor gate = step.multiply(*experts.shared_gate, h).to(at::kFloat).sigmoid();
        y.addcmul_(gate, run<U>(*experts.shared, h, quantize_activations).to(at::kFloat));
    }
    step.add(y.to(h.scalar_type()));
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
    const Tensor chosen_ = chosen.contiguous(), weights_ = weights.contiguous();
    const auto *c = chosen_.const_data_ptr<i64>();
    const float* w = weights_.const_data_ptr<float>();
    for (i64 i = 0; i < M * k; i++) TORCH_CHECK(c[i] >= 0 && c[i] < n_expert, "experts: expert ", c[i]);
    const Routing routing({c, c + M * k}, {w, w + M * k}, M, k, n_expert);
    Tensor y;
    by_dtype(x, [&](auto zero) {
        if (M > MAX_TOKENS) y = run<decltype(zero)>(all, routing, x, quantize_activations);
        else y = run<float>(all, routing, x.to(at::kFloat), quantize_activations);
    });
    return y.to(dtype);
}

// -> uint8 [sizeof(FusedLayers)], to which add_layer adds the layers one by one
Tensor fuse_layers(i64 n_head, double eps, bool quantize_activations) {
    TORCH_CHECK(n_head > 0, "fuse_layers: ", n_head, " heads");
    auto* const fused = new FusedLayers{n_head, (float)eps, quantize_activations};
    return at::from_blob(fused, {(i64)sizeof(FusedLayers)}, [](void* p) { delete (FusedLayers*)p; }, at::kByte);
}

void add_layer(const Tensor& handle, const Tensor& attention_norm, at::TensorList wqkv, const MaybeTensor& q_norm,
               const MaybeTensor& k_norm, at::TensorList wo, const Tensor& ffn_norm, at::TensorList w13,
               at::TensorList w2, i64 ffn_size, at::TensorList router, at::TensorList shared_gate,
               at::TensorList shared_w13, at::TensorList shared_w2, i64 shared_size, i64 n_expert, i64 n_chosen,
               bool normalize, const Tensor& k_cache, const Tensor& v_cache, i64 window) {
    auto* fused = FusedLayers::of(handle);
    const auto dtype = k_cache.scalar_type();
    check_caches(k_cache, v_cache, dtype);
    const auto& first_cache = fused->layers.empty() ? k_cache : fused->layers[0].k_cache;
    const i64 C = fused->layers.empty() ? attention_norm.numel() : fused->layers[0].wo.N;
    const i64 H = fused->n_head, K = k_cache.size(1), D = k_cache.size(3), F = ffn_size, E = std::max<i64>(n_expert, 1);
    TORCH_CHECK(k_cache.sizes() == first_cache.sizes() && is(first_cache, dtype) && C > 0 && H % K == 0,
                "add_layer: caches ", k_cache.sizes(), " ", dtype, " for ", H, " heads");
    TORCH_CHECK(q_norm.has_value() == k_norm.has_value(), "add_layer: norms of both queries and keys, or of neither");
    const auto norm = [&](const MaybeTensor& norm, i64 size) {
        if (!norm) return Tensor();
        const bool fits = is(*norm, dtype) && norm->is_contiguous() && norm->numel() == size;
        TORCH_CHECK(fits, "add_layer: a norm ", norm->sizes(), " ", norm->scalar_type(), " for ", size, " ", dtype);
        return *norm;
    };
    const auto feed_forward = [&](at::TensorList w13, at::TensorList w2, i64 E, i64 F) {
        TORCH_CHECK(F > 0, "add_layer: a feed-forward of ", F);
        return FeedForward{Linear(w13, E * 2 * F, C, dtype), Linear(w2, E * C, F, dtype)};
    };
    std::variant<FeedForward, Experts> ff = feed_forward(w13, w2, E, F);
    if (n_expert) {
        TORCH_CHECK(0 < n_chosen && n_chosen <= E && 2 * F % ROWS == 0 && C % ROWS == 0, "add_layer: ", n_chosen,
                    " of ", E, " experts [", F, ", ", C, "]");
        Experts experts{std::get<FeedForward>(ff), E, n_chosen, normalize, Linear(router, E, C, dtype), {}, {}};
        if (shared_size) {
            experts.shared = feed_forward(shared_w13, shared_w2, 1, shared_size);
            experts.shared_gate = Linear(shared_gate, 1, C, dtype);
        }
        ff = std::move(experts);
    }
    fused->layers.push_back({norm(attention_norm, C), norm(q_norm, D), norm(k_norm, D), norm(ffn_norm, C), k_cache,
                             v_cache, Linear(wqkv, (H + 2 * K) * D, C, dtype), Linear(wo, C, H * D, dtype),
                             std::move(ff), window});
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
    const i64 D = cache.size(3), C = fused->layers[0].wo.N;
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
