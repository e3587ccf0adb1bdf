// Linears with many tokens without AMX and FP32_PRODUCTS: a chunk of the weights at a time, in the model's dtype, for
// PyTorch.
#pragma once
#include "quantized.h"
#include "tensors.h"
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul_ops.h>

namespace {

// x [M, K], weight [N, K] in int8 with scales [N], or in another dtype than x -> y [M, N]
inline void converted_prefill(const Tensor& x, const Tensor& weight, const Tensor& scales, Tensor& y) {
    const i64 M = x.size(0), N = weight.size(0), K = weight.size(1);
    const i64 step = std::min(N, std::max<i64>(64, CHUNK / std::max<i64>(K, 1)));
    auto chunk = empty({step, K}, x.scalar_type()), product = empty({M, step}, x.scalar_type());
    for (i64 n = 0; n < N; n += step) {
        const i64 rows = std::min(step, N - n);
        const auto converted = chunk.narrow(0, 0, rows).copy_(weight.narrow(0, n, rows));
        auto of_rows = y.narrow(1, n, rows), out = product.narrow(1, 0, rows);
        at::_ops::mm_out::call(x, converted.t(), out);
        if (scales.defined()) at::_ops::mul_out::call(out, scales.view({N}).narrow(0, n, rows), of_rows);
        else of_rows.copy_(out);
    }
}

// x [M, K] -> y [M, N]. The chunk is written as [K, rows]: the sixteen rows of a block lie side by side.
template <typename T> void int4_prefill(const Tensor& x, const Int4& w, Tensor& y) {
    const i64 N = y.size(1), K = x.size(1), padded = w.units() * G4;
    const i64 step = std::max<i64>(64, CHUNK / padded / 64 * 64);
    const i64 width = std::min(step, (N + ROWS - 1) / ROWS * ROWS);
    auto chunk = empty({padded, width}, x.scalar_type());
    T* to = chunk.mutable_data_ptr<T>();
    for (i64 n = 0; n < N; n += step) {
        const i64 rows = std::min(step, N - n);
        for_each(true, (rows + ROWS - 1) / ROWS, [&](i64 i) {
            convert_int4(w, n / ROWS + i, 0, padded, to + i * ROWS, width);
        });
        y.narrow(1, n, rows).copy_(x.mm(chunk.narrow(0, 0, K).narrow(1, 0, rows)));
    }
}

// stored [N, K / 2], where a byte is two neighbouring values of q, the lower half first -> packed; K is whole groups.
void pack_int4(const Tensor& stored, const Tensor& packed) {
    const i64 N = stored.size(0), words = stored.size(1) / 4;  // of eight values
    const i64 blocks = (N + ROWS - 1) / ROWS;
    TORCH_CHECK(stored.is_contiguous() && packed.is_contiguous() && stored.size(1) % (G4 / 2) == 0 &&
                    packed.numel() == blocks * ROWS * stored.size(1),
                "pack_int4: ", stored.sizes(), " to ", packed.sizes());
    const uint8_t* from = stored.const_data_ptr<uint8_t>();
    uint8_t* to = packed.mutable_data_ptr<uint8_t>();
    for_each(true, blocks, [&](i64 block) {
        for (i64 i = 0; i < words; i++) {
            uint32_t word[ROWS] = {};
            const i64 rows = std::min<i64>(ROWS, N - block * ROWS);
            for (i64 r = 0; r < rows; r++) word[r] = load<uint32_t>(from + ((block * ROWS + r) * words + i) * 4);
            for (auto& w : word) {  // k = 0 1 2 3 4 5 6 7 -> 0 4 1 5 2 6 3 7
                const auto swap = [&](int shift, uint32_t lower) {
                    const uint32_t both = (w ^ w >> shift) & lower;
                    w ^= both ^ both << shift;
                };
                swap(8, 0x0000ff00), swap(4, 0x00f000f0);
            }
            std::memcpy(to + (block * words + i) * sizeof word, word, sizeof word);
        }
    });
}

}  // namespace
