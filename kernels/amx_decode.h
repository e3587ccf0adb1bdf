// y[m, n] = sum_k x[m, k] w[n, k] for a few tokens by AMX: hardly slower than for one, because a tile of weights is
// multiplied with up to sixteen tokens at once. Sixteen rows are read side by side; in bf16 nothing is prefetched,
// because every way to prefetch made it slower. Products of integers are added up in groups, each with a scale.
#pragma once
#include "amx.h"
#include <cmath>
#include <optional>
#include "quantized.h"

namespace {

#ifdef AMX
using Tile = f32x16[TILE_ROWS];

// M tokens as tiles whose columns are tokens, zeros up to sixteen: [bytes / 64, 16, 16, 4]. x [M, bytes], a multiple of
// 64
inline std::vector<f32x16> tokens_in_columns(const void* x, i64 M, i64 bytes) {
    std::vector<f32x16> out(bytes / 64 * TILE_ROWS);
    for (i64 k = 0; k < bytes / 64; k++) {
        __m512i rows[TILE_ROWS] = {};
        for (i64 m = 0; m < M; m++) rows[m] = _mm512_loadu_si512((const char*)x + m * bytes + 64 * k);
        store_tile((__m512i*)(out.data() + k * TILE_ROWS), rows);
    }
    return out;
}

// y[m, n + r] = sums[r, m] * scales[r], if there are scales
INLINE void write_columns(const Tile& sums, const float* scales, float* y, i64 M, i64 N) {
    for (i64 m = 0; m < M; m++)
        for (i64 r = 0; r < TILE_ROWS; r++) y[m * N + r] = sums[r][m] * (scales ? scales[r] : 1.0f);
}

// Rows n .. end of w [N, K], sixteen at a time; returns the first of those left over. K: a multiple of 32
inline i64 few_tokens(const BFloat16* w, const std::vector<f32x16>& x, float* y, i64 M, i64 N, i64 K, i64 n, i64 end) {
    const UseTiles use;
    for (; n + TILE_ROWS <= end; n += TILE_ROWS) {
        _tile_zero(0);
        for (i64 k = 0; k < K; k += TILE_K) {
            _tile_loadd(4, w + n * K + k, K * sizeof(BFloat16));
            _tile_loadd(6, x.data() + k / TILE_K * TILE_ROWS, 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        Tile sums;
        _tile_stored(0, sums, 64);
        write_columns(sums, nullptr, y + n, M, N);
    }
    return n;
}

// The same for int8, K a multiple of 64, and activations of 16 bits: of every 64 their upper, then their lower bytes.
// steps [K / G8, 16 tokens]
inline i64 few_tokens(const int8_t* w, const float* scales, const std::vector<f32x16>& x, const f32x16* steps, float* y,
                      i64 M, i64 N, i64 K, i64 n, i64 end) {
    const UseTiles use;
    for (; n + TILE_ROWS <= end; n += TILE_ROWS) {
        Tile sums = {};
        i32x16 dots[2][2][TILE_ROWS];  // of a group and the one before it: upper, lower
        const auto add = [&](i64 g) INLINE_LAMBDA {
            const auto& [upper, lower] = dots[g % 2];
            UNROLL(r, TILE_ROWS) sums[r] += to_float((upper[r] << 8) + lower[r]) * steps[g];
        };
        const i64 groups = (K + G8 - 1) / G8;
        for (i64 g = 0; g < groups; g++) {
            _tile_zero(0);
            _tile_zero(1);
            for (i64 k = g * G8; k < std::min(K, (g + 1) * G8); k += 64) {
                const f32x16* both = x.data() + k / 64 * 2 * TILE_ROWS;
                UNROLL(i, TILE_ROWS) __builtin_prefetch(w + (n + TILE_ROWS) * K + TILE_ROWS * k + 64 * i, 0, 2);
                _tile_loadd(4, w + n * K + k, K);
                _tile_loadd(6, both, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(7, both + TILE_ROWS, 64);
                _tile_dpbssd(1, 4, 7);
            }
            if (g > 0) add(g - 1);
            _tile_stored(0, dots[g % 2][0], 64);
            _tile_stored(1, dots[g % 2][1], 64);
        }
        add(groups - 1);
        write_columns(sums, scales + n, y + n, M, N);
    }
    return n;
}

// Up to T tokens at units of 32 values: q [units, T, 32], scales and sums (of the rounded values) [units, T]
struct TokensInUnits {
    static constexpr int T = TILE_ROWS;
    std::vector<int8_t> q;
    std::vector<float> scale, sums;
    TokensInUnits(const Activations<int8_t>& a, i64 M)
        : q(a.groups * T * G4), scale(a.groups * T), sums(a.groups * T) {
        for_each(M * a.padded > ONE_THREAD / 4, M, [&](i64 m) {
            for (i64 g = 0; g < a.groups; g++) {
                std::copy_n(a.q.data() + m * a.padded + g * G4, G4, q.data() + (g * T + m) * G4);
                scale[g * T + m] = a.scale[m * a.groups + g], sums[g * T + m] = a.sums[m * a.groups + g];
            }
        });
    }
};

// A block of sixteen rows in int4 -> out [T], in each lane a row. While some units are multiplied, the next ones are
// unpacked and the last ones added up: what a tile writes, or reads, is in the cache by then.
INLINE void few_tokens(const Int4& w, i64 block, const TokensInUnits& x, f32x16* out) {
    constexpr int T = TokensInUnits::T;
    constexpr i64 SOME = 4;
    alignas(64) uint8_t bytes[2][SOME][2 * UNIT];  // [8, 16 rows, 4]
    i32x16 dots[2][SOME][T];
    f32x16 acc[T] = {};
    const uint8_t* p = w.packed + block * w.units() * UNIT;
    for (i64 u = 0; u < w.units() + 2 * SOME; u += SOME) {
        const i64 now = u / SOME % 2, before = 1 - now;
        for (i64 i = 0; i < SOME && u - 2 * SOME + i < w.units() && u >= 2 * SOME; i++) {
            const i64 unit = u - 2 * SOME + i, at = (block * w.groups + unit / w.per) * ROWS;
            const f32x16 scale = load16(w.scales + at), zero = load16(w.zeros + at) * (scale * (1.0f / 16));
            UNROLL(m, T) {
                acc[m] += to_float(dots[now][i][m]) * (scale * x.scale[unit * T + m]);
                acc[m] -= zero * x.sums[unit * T + m];
            }
        }
        finish_writing();
        for (i64 i = 0; i < SOME && u - SOME + i < w.units() && u >= SOME; i++) {
            _tile_zero(0);
            _tile_loadd(4, x.q.data() + (u - SOME + i) * T * G4, G4);
            _tile_loadd(6, bytes[before][i], 64);
            _tile_dpbsud(0, 4, 6);
            _tile_stored(0, dots[before][i], 64);
        }
        for (i64 i = 0; i < SOME && u + i < w.units(); i++)
            UNROLL(j, 4) {
                __builtin_prefetch(p + (u + i) * UNIT + REGISTER * j + 4 * AHEAD, 0, 2);
                const auto both = load64<u8x64>(p + (u + i) * UNIT + REGISTER * j);
                store64(bytes[now][i] + 128 * j, both & 15);
                store64(bytes[now][i] + 128 * j + 64, bits<u8x64>(bits<u16x32>(both) >> 4) & 15);
            }
    }
    UNROLL(m, T) out[m] = acc[m];
}

// The rows of linear.h and quantized.h, by tiles where that is faster and the sizes fit
inline bool tiles_fit(i64 M, i64 least, i64 K, i64 whole) {
    return least <= M && M <= MAX_TOKENS && K % whole == 0 && tiles_allowed();
}

template <typename T> struct TiledRows : Rows<T> {
    std::vector<f32x16> tokens;
    TiledRows(const Rows<T>& rows) : Rows<T>(rows) {
        if (std::is_same_v<T, BFloat16> && tiles_fit(this->M, AMX_BF16, this->K, TILE_K))
            tokens = tokens_in_columns(this->x, this->M, this->K * sizeof(T));
    }
    void operator()(i64 n, i64 end) const {
        if constexpr (std::is_same_v<T, BFloat16>)
            if (!tokens.empty()) n = few_tokens(this->w, tokens, this->y, this->M, this->N, this->K, n, end);
        if (n < end) Rows<T>::operator()(n, end);
    }
};

template <bool quantize> struct TiledInt8Rows : Int8Rows<quantize> {
    std::vector<f32x16> tokens, steps;
    TiledInt8Rows(const int8_t* w, const float* scales, const float* x, float* y, i64 M, i64 N, i64 K)
        : Int8Rows<quantize>(w, scales, x, y, M, N, K) {
        if (!quantize || !tiles_fit(M, AMX_INT8, K, 64)) return;
        const auto& a = this->a;
        tokens = tokens_in_columns(this->arranged_q.data(), M, 2 * a.padded);
        steps.resize(a.groups);
        for (i64 m = 0; m < M; m++)
            for (i64 g = 0; g < a.groups; g++) {
                const i64 i = m * a.groups + g;
                steps[g][m] = std::isnan(a.sums[i]) ? a.sums[i] : a.scale[i];  // NaN became the integer 0
            }
    }
    void operator()(i64 n, i64 end) const {
        if (!tokens.empty())
            n = few_tokens(this->w, this->scales, tokens, steps.data(), this->y, this->M, this->N, this->K, n, end);
        if (n < end) Int8Rows<quantize>::operator()(n, end);
    }
};

template <bool quantize> struct TiledInt4Rows : Int4Rows<quantize> {
    std::optional<TokensInUnits> tokens;
    TiledInt4Rows(const Int4& w, const float* x, float* y, i64 M, i64 N, i64 K) : Int4Rows<quantize>(w, x, y, M, N, K) {
        if (quantize && tiles_fit(M, AMX_INT4, K, 1)) tokens.emplace(this->a, M);
    }
    void operator()(i64 begin, i64 end) const {
        if (!tokens) return Int4Rows<quantize>::operator()(begin, end);
        const UseTiles use(TokensInUnits::T, G4);
        for (i64 block = begin; block < end; block++) {
            f32x16 out[TokensInUnits::T];
            few_tokens(this->w, block, *tokens, out);
            for (i64 m = 0; m < this->M; m++) this->store(m, block * ROWS, out[m]);
        }
    }
};
#else
template <typename T> using TiledRows = Rows<T>;
template <bool quantize> using TiledInt8Rows = Int8Rows<quantize>;
template <bool quantize> using TiledInt4Rows = Int4Rows<quantize>;
#endif

}  // namespace
