// y[m, n] = sum_k x[m, k] w[n, k] for many tokens in bf16 by AMX: products of tiles, sixteen rows of 64 bytes each.
//
// Weights of any kind become panels in bf16 of 32 rows and TILE_DEPTH columns, which stay in the first-level cache
// while all tokens of a chunk are multiplied with them. The chunk's activations at these columns and its sums for
// TILE_GROUP rows stay in the second-level cache.
#pragma once
#include "quantized.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef __AMX_BF16__
constexpr i64 PAIR = 2 * ROWS;              // rows of weights, or tokens, that are multiplied at once
constexpr i64 TILE_K = 32, TILE_SIZE = 512;  // columns of a tile, numbers in it

// Linux keeps a process from using tiles until it asks.
inline bool tiles_allowed() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
}

// While it lives, this thread's eight tiles have sixteen rows of 64 bytes.
struct UseTiles {
    struct alignas(64) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };
    UseTiles() {
        Configuration c;
        std::fill_n(c.bytes, 8, 64), std::fill_n(c.rows, 8, 16);
        _tile_loadconfig(&c);
    }
    ~UseTiles() { _tile_release(); }
};

// x [M, K] as tiles [M / 32, K / 32, 2, 16, 32], with zeros up to whole ones
inline std::vector<f32x16> tiles_of(const BFloat16* x, i64 M, i64 K) {
    const i64 columns = (K + TILE_K - 1) / TILE_K, rows = (M + PAIR - 1) / PAIR * 2;
    std::vector<f32x16> out(rows * columns * ROWS);
#pragma omp parallel for num_threads(threads()) if (M * K > ONE_THREAD)
    for (i64 m = 0; m < M; m++)
        for (i64 k = 0; k < columns; k++) {
            f32x16* to = out.data() + (m / PAIR * columns + k) * PAIR + m % PAIR;
            std::memcpy(to, x + m * K + k * TILE_K, std::min(TILE_K, K - k * TILE_K) * sizeof(BFloat16));
        }
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

// A panel's tile: sixteen pairs of neighbouring columns, of sixteen rows each. Transposes rows [16] of such pairs.
INLINE void store_tile(BFloat16* to, const __m512i rows[ROWS]) {
    __m512i a[ROWS], b[ROWS];
    UNROLL(i, 8) {
        a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    UNROLL2(i, 4, j, 2) {
        b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
        b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
    UNROLL2(i, 2, j, 4) {
        a[8 * i + j] = _mm512_shuffle_i32x4(b[8 * i + j], b[8 * i + 4 + j], 0x88);
        a[8 * i + 4 + j] = _mm512_shuffle_i32x4(b[8 * i + j], b[8 * i + 4 + j], 0xDD);
    }
    UNROLL(j, 8) {
        _mm512_store_si512(to + j * TILE_K, _mm512_shuffle_i32x4(a[j], a[8 + j], 0x88));
        _mm512_store_si512(to + (8 + j) * TILE_K, _mm512_shuffle_i32x4(a[j], a[8 + j], 0xDD));
    }
}

INLINE __mmask32 first_of_32(i64 n) { return n < 32 ? (1u << n) - 1 : ~0u; }

// 32 numbers in bf16, zeros where there are fewer
INLINE __m512i bf16_of(const BFloat16* from, i64 n) { return _mm512_maskz_loadu_epi16(first_of_32(n), from); }
INLINE __m512i bf16_of(const int8_t* from, i64 n) {
    const __m256i bytes = _mm256_maskz_loadu_epi8(first_of_32(n), from);
    const auto floats = [](__m128i b) INLINE_LAMBDA { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)); };
    return (__m512i)_mm512_cvtne2ps_pbh(floats(_mm256_extracti128_si256(bytes, 1)),
                                        floats(_mm256_castsi256_si128(bytes)));
}

// Weights [N, K] as panels: bf16, or int8 whose scales [N] go to the sums
template <typename W> struct PanelsOfRows {
    const W* w;
    const float* scales;
    i64 N, K;
    // Rows n .. n + 32 and columns k .. k + count: tiles [count / 32, 2]
    void fill(i64 n, i64 k, i64 count, BFloat16* panel) const {
        for (i64 i = 0; i < count; i += TILE_K)
            for (i64 half = 0; half < 2; half++, panel += TILE_SIZE) {
                __m512i rows[ROWS];
                UNROLL(r, ROWS) rows[r] = bf16_of(w + std::min(n + half * ROWS + r, N - 1) * K + k + i, K - k - i);
                store_tile(panel, rows);
            }
    }
    Ahead ahead(i64 n, i64 k, i64 count) const {
        const i64 rows = count > 0 ? std::min(PAIR, N - n) : 0;
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
                BFloat16* to = panel + ((unit - k / G4) * 2 + half) * TILE_SIZE;
                UNROLL(j, 4) {
                    f32x16 v[8];
                    each_of_eight(p + REGISTER * j, [&](int i, f32x16 q) INLINE_LAMBDA { v[i] = scale * (q - zero); });
                    UNROLL(i, 4) store_column_pairs(to + (4 * j + i) * TILE_K, v[2 * i], v[2 * i + 1]);
                }
            }
        }
    }
    // (even[r], odd[r]) for sixteen rows
    static INLINE void store_column_pairs(BFloat16* to, f32x16 even, f32x16 odd) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        _mm512_store_si512(to, _mm512_permutexvar_epi16(order, both));
    }
    Ahead ahead(i64 n, i64 k, i64 count) const {
        const i64 stride = w.units() * UNIT, blocks = count == 0 ? 0 : n + ROWS < N ? 2 : 1;
        return {(const char*)w.packed + n / ROWS * stride + k / G4 * UNIT, blocks, stride, count / G4 * UNIT};
    }
    float scale(i64) const { return 1.0f; }
};

// sums [2 tiles of tokens, 2 of rows] += x times a panel, for 32 tokens and `columns` tiles along k
INLINE void multiply_tiles(const f32x16* x, const BFloat16* panel, i64 columns, bool add, float* sums,
                           Ahead& ahead, i64 lines) {
    if (add) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (i64 k = 0; k < columns; k++, x += PAIR, panel += 2 * TILE_SIZE) {
        for (i64 i = 0; i < lines; i++) ahead.prefetch();
        _tile_loadd(4, x, 64);
        _tile_loadd(6, panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + TILE_SIZE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x + ROWS, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

// x as tiles_of makes it -> y [M, N] for rows begin .. end of the weights
template <typename P>
void multiply_panels(const P& w, const f32x16* x, BFloat16* y, i64 M, i64 N, i64 K, i64 begin, i64 end) {
    const UseTiles use;
    const i64 columns = (K + TILE_K - 1) / TILE_K, depth = std::min(columns, TILE_DEPTH / TILE_K);
    const i64 tokens = std::min((M + PAIR - 1) / PAIR * PAIR, TILE_TOKENS);
    std::vector<f32x16> panels(depth * PAIR), sums(tokens * 2 * (TILE_GROUP / PAIR));
    BFloat16* const panel = (BFloat16*)panels.data();
    float scales[TILE_GROUP + PAIR];
    // Sums of 32 tokens and rows: four tiles
    const auto sums_of = [&](i64 row, i64 token) {
        return sums.data() + (row / PAIR * (tokens / PAIR) + token / PAIR) * 4 * ROWS;
    };
    for (i64 m = 0; m < M; m += tokens)
        for (i64 first = begin; first < end; first += TILE_GROUP) {
            const i64 last = std::min(end, first + TILE_GROUP), count = std::min(tokens, M - m);
            for (i64 k = 0; k < columns; k += depth)
                for (i64 n = first; n < last; n += PAIR) {
                    const i64 here = std::min(depth, columns - k);
                    w.fill(n, k * TILE_K, here * TILE_K, panel);
                    // The panel after this one
                    const bool same_k = n + PAIR < last;
                    const i64 next_k = same_k ? k : k + depth, there = std::min(depth, columns - next_k);
                    Ahead ahead = w.ahead(same_k ? n + PAIR : first, next_k * TILE_K, std::max<i64>(0, there) * TILE_K);
                    const i64 lines = ahead.lines() / (here * ((count + PAIR - 1) / PAIR)) + 1;
                    for (i64 i = 0; i < count; i += PAIR) {
                        const f32x16* from = x + ((m + i) / PAIR * columns + k) * PAIR;
                        multiply_tiles(from, panel, here, k > 0, (float*)sums_of(n - first, i), ahead, lines);
                    }
                }
            for (i64 n = first; n < last; n++) scales[n - first] = w.scale(std::min(n, N - 1));
            for (i64 i = 0; i < count; i++)
                for (i64 n = 0; n < last - first; n += PAIR) {
                    const f32x16* sum = sums_of(n, i) + i % PAIR / ROWS * 2 * ROWS + i % ROWS;
                    const f32x16 low = sum[0] * load16(scales + n), high = sum[ROWS] * load16(scales + n + ROWS);
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
    share(N, PAIR, K, [&](i64 n, i64 end) { multiply_panels(w, tiles.data(), y, M, N, K, n, end); });
    return true;
}
#endif

}  // namespace
