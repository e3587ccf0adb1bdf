// Products that products.cpp computes: by itself, because PyTorch's headers take so long to compile.
#pragma once
#include <c10/util/BFloat16.h>
#include <vector>
#include "tuning.h"

namespace qwen_fast {

// y [M, N] = x [M, K] w^T with the weights w [N, K] of expert e, one of several in the rows of a matrix
struct Product {
    i64 e, M;
    const float* x;
    float* y;
};

// Weights [_, K] with scales [_]
struct Int8 {
    const int8_t* w;
    const float* scales;
};

// See quantized.h
struct Int4 {
    const uint8_t* packed;
    const c10::BFloat16* scales;
    const uint8_t* zeros;
    i64 groups, per;  // groups of G along k, and units in one
    i64 units() const { return groups * per; }
};

// All of these products at once. quantize: whether activations may be rounded
void multiply(const float* w, const std::vector<Product>& products, i64 N, i64 K);
void multiply(const c10::BFloat16* w, const std::vector<Product>& products, i64 N, i64 K);
void multiply(const Int8& w, const std::vector<Product>& products, i64 N, i64 K, bool quantize);
void multiply(const Int4& w, const std::vector<Product>& products, i64 N, i64 K, bool quantize);

// y [M, N] = x [M, K] w^T for many tokens, if the CPU has tiles for it (AMX), which the result tells
bool multiply_by_tiles(const c10::BFloat16* w, const c10::BFloat16* x, c10::BFloat16* y, i64 M, i64 N, i64 K);
bool multiply_by_tiles(const Int8& w, const c10::BFloat16* x, c10::BFloat16* y, i64 M, i64 N, i64 K, bool quantize);
bool multiply_by_tiles(const Int4& w, const c10::BFloat16* x, c10::BFloat16* y, i64 M, i64 N, i64 K, bool quantize);

}  // namespace qwen_fast
