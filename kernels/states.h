// What layers remember of a text, and the passes over it that attention.cpp and deltanet.cpp compute: by themselves,
// because PyTorch's headers take so long to compile.
#pragma once
#include <c10/util/BFloat16.h>
#include <functional>
#include "tuning.h"

namespace qwen_fast {

// Keys and values [B, K, T, D] of all positions so far, in the model's type, or in int8 with a scale each, fp32 [B, K,
// T]: k = scale * q
struct KVCache {
    void *k, *v;
    float *k_scales, *v_scales;  // null if not in int8
    i64 B, K, T, D;
    bool is_int8() const { return k_scales != nullptr; }
};

// q [B, S, H, D], pos [B, S] within the cache, window 0 = none -> y [B, S, H, D]. T: the model's type
template <typename T, typename Y>
void attend_heads(const T* q, const KVCache& cache, i64 H, i64 S, const i64* pos, i64 window, Y* y);

// deltanet.DeltaState
struct DeltaState {
    float* memory;  // [B, Hv, K, V]
    i64* length;    // [B]
    void* inputs;   // [B, size - 1 + P, N], of the model's type
    i64* pending;   // [B]
    float *keys, *updates, *decays;  // [B, P, Hk, K], [B, P, Hv, V], [B, P, Hv]
    i64 B, Hv, K, V, P, Hk, N, size;  // N = 2 Hk K + Hv V; size: positions of the convolution
};

// S new tokens of each row
template <typename T> struct DeltaTokens {
    const T* conv;       // [size, N]
    const void* qkv;     // [B * S, N] before the convolution
    bool in_fp32;        // qkv, else of type T
    i64 qkv_row, S;      // elements from one token to the next
    const float *g, *b;  // [B * S, Hv]
    const i64* pos;      // [B * S]
};

// Takes o [V] of token m and value head h; it is a place to write to.
using Emit = std::function<void(i64 m, i64 h, float* o)>;

// emit for every token and value head, zeros for padding. T: the model's type
template <typename T> void run_delta_net(const DeltaState& state, const DeltaTokens<T>& tokens, const Emit& emit);

}  // namespace qwen_fast
