// y[m, n] = sum_k x[m, k] w[n, k] for many tokens in bf16 by AMX: products of tiles, sixteen rows of 64 bytes each.
//
// Weights of any kind become panels in bf16 of 32 rows and TILE_DEPTH columns, which stay in the first-level cache
// while all tokens of a chunk are multiplied with them. The chunk's activations at these columns and its sums for
// TILE_GROUP rows stay in the second-level cache.
#pragma once
#include "amx.h"
#include "quantized.h"

namespace {

#ifdef AMX
// x [M, K] as tiles [M / 32, K / 32, 2, 16, 32], with zeros up to whole ones
inline std::vector<f32x16> tiles_of(const BFloat16* x, i64 M, i64 K) {
    const i64 columns = (K + TILE_K - 1) / TILE_K, rows = whole_tiles(M) / TILE_ROWS;
    std::vector<f32x16> out(rows * columns * ROWS);
    for_each(M * K > ONE_THREAD, M, [&](i64 m) {
        for (i64 k = 0; k < columns; k++) {
            f32x16* to = out.data() + (m / TWO_TILES * columns + k) * TWO_TILES + m % TWO_TILES;
            std::memcpy(to, x + m * K + k * TILE_K, std::min(TILE_K, K - k * TILE_K) * sizeof(BFloat16));
        }
    });
    return out;
}

// Lines of memory to prefetch one after another in the midst of other work: `width` bytes of several rows
struct Ahead {
    const char* row;
    i64 rows, stride, width, at = 0;
    i64 lines() const { return rows * ((width + 63) / 64); }
    INLINE void prefetch() {
        if (!rows) return;
        __builtin_prefetch(row + at, 0, 2);
        if ((at += 64) >= width) at = 0, row += stride, rows--;
    }
};

// Weights [N, K] as panels: bf16, or int8 whose scales [N] go to the sums
template <typename W> struct PanelsOfRows {
    const W* w;
    const float* scales;
    i64 N, K;
    // Rows n .. n + 32 and columns k .. k + count: tiles [count / 32, 2]
    void fill(i64 n, i64 k, i64 count, BFloat16* panel) const {
        for (i64 i = 0; i < count; i += TILE_K)
            for (i64 half = 0; half < 2; half++, panel += TILE) {
                __m512i rows[ROWS];
                UNROLL(r, ROWS) rows[r] = bf16_of(w + std::min(n + half * ROWS + r, N - 1) * K + k + i, K - k - i);
                store_tile(panel, rows);
            }
    }
    Ahead ahead(i64 n, i64 k, i64 count) const {
        const i64 rows = count > 0 ? std::min(TWO_TILES, N - n) : 0;
        return {(const char*)(w + n * K + k), rows, K * (i64)sizeof(W), count * (i64)sizeof(W)};
    }
    float scale(i64 n) const { return scales ? scales[n] : 1.0f; }
};

struct PanelsOfInt4 {
    Int4 w;
    i64 N;
    void fill(i64 n, i64 k, i64 count, BFloat16* panel) const {
        const i64 blocks = (N + ROWS - 1) / ROWS;
        for (i64 half = 0; half < 2; half++) {
            const i64 block = std::min(n / ROWS + half, blocks - 1);
            for (i64 unit = k / G4; unit < std::min((k + count) / G4, w.units()); unit++) {
                const i64 g = (block * w.groups + unit / w.per) * ROWS;
                const f32x16 scale = load16(w.scales + g), zero = load16(w.zeros + g) * (1.0f / 16);
                const uint8_t* p = w.packed + (block * w.units() + unit) * UNIT;
                BFloat16* to = panel + ((unit - k / G4) * 2 + half) * TILE;
                UNROLL(j, 4) {
                    f32x16 v[8];
                    each_of_eight(p + REGISTER * j, [&](int i, f32x16 q) INLINE_LAMBDA { v[i] = scale * (q - zero); });
                    UNROLL(i, 4) _mm512_store_si512(to + (4 * j + i) * TILE_K, column_pairs(v[2 * i], v[2 * i + 1]));
                }
            }
        }
    }
    Ahead ahead(i64 n, i64 k, i64 count) const {
        const i64 stride = w.units() * UNIT, blocks = count == 0 ? 0 : n + ROWS < N ? 2 : 1;
        return {(const char*)w.packed + n / ROWS * stride + k / G4 * UNIT, blocks, stride, count / G4 * UNIT};
    }
    float scale(i64) const { return 1.0f; }
};

// x as tiles_of makes it -> y [M, N] for rows begin .. end of the weights
template <typename P>
void multiply_panels(const P& w, const f32x16* x, BFloat16* y, i64 M, i64 N, i64 K, i64 begin, i64 end) {
    const UseTiles use;
    const i64 columns = (K + TILE_K - 1) / TILE_K, depth = std::min(columns, TILE_DEPTH / TILE_K);
    const i64 tokens = std::min(whole_tiles(M), TILE_TOKENS);
    std::vector<f32x16> panels(depth * TWO_TILES), sums(tokens * 2 * (TILE_GROUP / TWO_TILES));
    BFloat16* const panel = (BFloat16*)panels.data();
    float scales[TILE_GROUP + TWO_TILES];
    // Sums of 32 tokens and rows: four tiles
    const auto sums_of = [&](i64 row, i64 token) {
        return (float*)(sums.data() + (row / TWO_TILES * (tokens / TWO_TILES) + token / TWO_TILES) * 4 * ROWS);
    };
    for (i64 m = 0; m < M; m += tokens)
        for (i64 first = begin; first < end; first += TILE_GROUP) {
            const i64 last = std::min(end, first + TILE_GROUP), count = std::min(tokens, M - m);
            for (i64 k = 0; k < columns; k += depth)
                for (i64 n = first; n < last; n += TWO_TILES) {
                    const i64 here = std::min(depth, columns - k);
                    w.fill(n, k * TILE_K, here * TILE_K, panel);
                    // The panel after this one
                    const bool same_k = n + TWO_TILES < last;
                    const i64 next_k = same_k ? k : k + depth, there = std::min(depth, columns - next_k);
                    const i64 next_n = same_k ? n + TWO_TILES : first;
                    Ahead ahead = w.ahead(next_n, next_k * TILE_K, std::max<i64>(0, there) * TILE_K);
                    const i64 lines = ahead.lines() / (here * whole_tiles(count) / TWO_TILES) + 1;
                    for (i64 i = 0; i < count; i += TWO_TILES) {
                        const f32x16* from = x + ((m + i) / TWO_TILES * columns + k) * TWO_TILES;
                        const auto prefetch = [&]() INLINE_LAMBDA {
                            for (i64 line = 0; line < lines; line++) ahead.prefetch();
                        };
                        multiply_tiles({from, 64, 2 * TILE, 4 * TILE}, {panel, 64, 2 * TILE, 4 * TILE}, here, k > 0,
                                       sums_of(n - first, i), prefetch);
                    }
                }
            for (i64 n = first; n < last; n++) scales[n - first] = w.scale(std::min(n, N - 1));
            for (i64 i = 0; i < count; i++)
                for (i64 n = 0; n < last - first; n += TWO_TILES) {
                    const float* sum = sums_of(n, i) + (i % TWO_TILES / ROWS * 2 * ROWS + i % ROWS) * ROWS;
                    const f32x16 low = load16(sum) * load16(scales + n);
                    const f32x16 high = load16(sum + ROWS * ROWS) * load16(scales + n + ROWS);
                    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
                    BFloat16* to = y + (m + i) * N + first + n;
                    _mm512_mask_storeu_epi16(to, first_of_32(N - first - n), (__m512i)both);
                }
        }
}

// x [M, K] -> y [M, N]. False where there are no tiles.
template <typename P> bool multiply_panels(const P& w, const BFloat16* x, BFloat16* y, i64 M, i64 N, i64 K) {
    if (!tiles_allowed()) return false;
    const auto tiles = tiles_of(x, M, K);
    share(N, TWO_TILES, K, [&](i64 n, i64 end) { multiply_panels(w, tiles.data(), y, M, N, K, n, end); });
    return true;
}
#endif

}  // namespace
