// y[m, n] = sum_k x[m, k] w[n, k] for many tokens by AMX: products of tiles, sixteen rows of 64 bytes each.
//
// Weights of any kind become panels of 32 rows, which stay in the first-level cache while all tokens of a chunk are
// multiplied with them. The chunk's activations at these columns and its sums for TILE_GROUP rows stay in the
// second-level cache. While one panel is multiplied, the next one is made and the one after that is fetched.
//
// Panels are of bf16, or of int8 where activations may be rounded: in blocks of columns, each with a scale of its own.
// Such tiles hold twice as many columns. int4 is rounded once more for them, with a scale for a row of the block.
#pragma once
#include "amx.h"
#include "quantized.h"

namespace {

#ifdef AMX
constexpr i64 PANEL_TILES = PANEL_BYTES / TILE_BYTES;  // along the columns of a block

// Activations x [M, K] as tiles, with zeros up to whole ones: of every block [M / 32, columns / WIDTH, 2, 16, WIDTH]
struct TiledTokens {
    i64 M, columns;  // the latter in tiles
    std::vector<__m512i> tiles;
    std::vector<float> steps;  // [blocks, M] if rounded: x ~ step * integer

    TiledTokens(const BFloat16* x, i64 M, i64 K, bool rounded)
        : M(M), columns((K * (rounded ? 1 : 2) + TILE_BYTES - 1) / TILE_BYTES), tiles(whole_tiles(M) * columns),
          steps(rounded ? M * ((columns + PANEL_TILES - 1) / PANEL_TILES) : 0) {
        const i64 width = TILE_BYTES / (rounded ? 1 : 2);
        for_each(M * K > ONE_THREAD, M, [&](i64 m) {
            for (i64 k = 0; k < columns; k += PANEL_TILES) {
                const BFloat16* from = x + m * K + k * width;
                const i64 count = std::min(PANEL_TILES * width, K - k * width);
                __m512i* to = const_cast<__m512i*>(row(m, k));
                if (rounded) steps[k / PANEL_TILES * M + m] = round(from, count, to);
                else
                    for (i64 i = 0; i < count; i += width) to[i / width * TWO_TILES] = bf16_of(from + i, count - i);
            }
        });
    }
    // Of the block at column k, in tiles
    i64 depth(i64 k) const { return std::min(PANEL_TILES, columns - k); }
    // Of token m in this block; what comes next in the row is 32 rows later
    const __m512i* row(i64 m, i64 k) const {
        return tiles.data() + k * whole_tiles(M) + m / TWO_TILES * depth(k) * TWO_TILES + m % TWO_TILES;
    }
    // Returns the step: NaN where x has one, or an infinity.
    static float round(const BFloat16* x, i64 count, __m512i* to) {
        const auto load = [&](i64 i) INLINE_LAMBDA { return bf16_of(x + i, std::max<i64>(0, count - i)); };
        const __m512i upper = _mm512_set1_epi32(0xFFFF0000);
        __m512i high = {};
        for (i64 i = 0; i < count; i += 32)
            high = _mm512_max_epu16(high, _mm512_and_si512(load(i), _mm512_set1_epi16(0x7FFF)));
        high = _mm512_max_epu32(_mm512_slli_epi32(high, 16), _mm512_and_si512(high, upper));
        const float most = BFloat16(_mm512_reduce_max_epu32(high) >> 16, BFloat16::from_bits());
        const float inverse = most > 1e-30f && std::isfinite(most) ? 127 / most : 0;
        const auto two_in_each = [&](i64 i) INLINE_LAMBDA {  // integers in the lower bytes of 32-bit lanes
            const __m512i v = load(i);
            const auto even = bits<f32x16>(_mm512_slli_epi32(v, 16)) * inverse + ROUND;
            const auto odd = bits<f32x16>(_mm512_and_si512(v, upper)) * inverse + ROUND;
            return _mm512_mask_blend_epi8(0x2222222222222222, bits<__m512i>(even),
                                          _mm512_slli_epi32(bits<__m512i>(odd), 8));
        };
        for (i64 i = 0; i < count; i += TILE_BYTES, to += TWO_TILES)
            *to = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(two_in_each(i))),
                                     _mm512_cvtepi32_epi16(two_in_each(i + 32)), 1);
        return std::isfinite(most) ? most / 127 : NAN;
    }
};

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

// Weights [N, K] in E, which is bf16 or int8; int8 weights have scales [N], which go to the sums.
template <typename E, typename W> struct PanelsOfRows {
    using Element = E;
    static constexpr bool SCALED_BLOCKS = false;
    const W* w;
    const float* scales;
    i64 N, K;
    // Sixteen rows from n on, columns from k on
    INLINE void fill(i64 n, i64 k, const float*, __m512i* tile) const {
        __m512i rows[TILE_ROWS];
        UNROLL(r, TILE_ROWS) {
            const W* from = w + std::min(n + r, N - 1) * K + k;
            if constexpr (sizeof(E) == 1) rows[r] = bytes_of(from, K - k);
            else rows[r] = bf16_of(from, K - k);
        }
        store_tile(tile, rows);
    }
    void scale_block(i64, i64, i64, float*) const {}
    Ahead ahead(i64 n, i64 k, i64 count) const {
        const i64 rows = count > 0 ? std::min(TWO_TILES, N - n) : 0;
        return {(const char*)(w + n * K + k), rows, K * (i64)sizeof(W), std::min(count, K - k) * (i64)sizeof(W)};
    }
    float scale(i64 n) const { return scales ? scales[n] : 1.0f; }
};

template <typename E> struct PanelsOfInt4 {
    using Element = E;
    static constexpr bool SCALED_BLOCKS = sizeof(E) == 1;
    Int4 w;
    i64 N;
    i64 block(i64 n) const { return std::min(n, N - 1) / ROWS; }
    // Scales and zeros of sixteen rows
    struct Group {
        f32x16 scale, zero;
    };
    INLINE Group group(i64 n, i64 unit) const {
        const i64 at = (block(n) * w.groups + unit / w.per) * ROWS;
        return {load16(w.scales + at), load16(w.zeros + at) * (1.0f / 16)};
    }
    INLINE void fill(i64 n, i64 k, const float* steps, __m512i* tile) const {
        constexpr i64 REGISTERS = G4 * sizeof(E) / 4;  // of a unit
        for (i64 unit = k / G4; unit < (k * (i64)sizeof(E) + TILE_BYTES) / (G4 * (i64)sizeof(E)); unit++) {
            if (unit >= w.units()) std::fill_n(tile, REGISTERS, __m512i{});
            else convert(group(n, unit), w.packed + (block(n) * w.units() + unit) * UNIT, steps, tile);
            tile += REGISTERS;
        }
    }
    INLINE static void convert(Group g, const uint8_t* p, const float* steps, __m512i* to) {
        if constexpr (sizeof(E) == 2)
            UNROLL(j, 4) {
                f32x16 v[8];
                each_of_eight(p + REGISTER * j,
                              [&](int i, f32x16 q) INLINE_LAMBDA { v[i] = g.scale * (q - g.zero); });
                UNROLL(i, 4) to[4 * j + i] = column_pairs(v[2 * i], v[2 * i + 1]);
            }
        else {
            // Integers of 16 bits, half of which are the fraction: q * factor + start. To round is to take the other.
            const f32x16 step = load16(steps), factor = select(splat(0) < step, 256.0f * g.scale / step, f32x16{});
            const auto twice = [](f32x16 v) INLINE_LAMBDA {  // in every lane
                const __m512i i = _mm512_cvtps_epi32((__m512)v);
                return _mm512_mask_blend_epi16(0xAAAAAAAA, i, _mm512_slli_epi32(i, 16));
            };
            const __m512i factors = twice(factor), start = twice(128 - g.zero * factor);
            const __m512i lower = _mm512_set1_epi16(0x00FF), nibble = _mm512_set1_epi8(15);
            const auto scaled = [&](__m512i q) INLINE_LAMBDA {
                return _mm512_add_epi16(_mm512_mullo_epi16(q, factors), start);
            };
            const auto rounded = [&](__m512i q) INLINE_LAMBDA {
                return _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA,
                                              _mm512_srli_epi16(scaled(_mm512_and_si512(q, lower)), 8),
                                              scaled(_mm512_srli_epi16(q, 8)));
            };
            UNROLL(j, 4) {
                const __m512i both = _mm512_loadu_si512(p + REGISTER * j);
                to[2 * j] = rounded(_mm512_and_si512(both, nibble));
                to[2 * j + 1] = rounded(_mm512_and_si512(_mm512_srli_epi16(both, 4), nibble));
            }
        }
    }
    // Steps [32] of rows from n on, of which no weight in the block is more than 127
    void scale_block(i64 n, i64 k, i64 count, float* steps) const {
        for (i64 half = 0; half < 2; half++) {
            f32x16 most = {};
            for (i64 unit = k / G4; unit < std::min((k + count) / G4, w.units()); unit++) {
                const Group g = group(n + half * ROWS, unit);
                most = max16(most, max16(g.scale, -g.scale) * max16(g.zero, 15 - g.zero));
            }
            store16(steps + half * ROWS, most * (1 / 127.0f));
        }
    }
    Ahead ahead(i64 n, i64 k, i64 count) const {
        const i64 stride = w.units() * UNIT, blocks = count == 0 ? 0 : n + ROWS < N ? 2 : 1;
        return {(const char*)w.packed + n / ROWS * stride + k / G4 * UNIT, blocks, stride, count / G4 * UNIT};
    }
    float scale(i64) const { return 1.0f; }
};

// One thread's part of the product: y [M, N] for rows begin .. end of the weights
template <typename P> struct PanelProduct {
    static constexpr bool INTEGERS = sizeof(typename P::Element) == 1;
    static constexpr i64 WIDTH = TILE_BYTES / sizeof(typename P::Element), QUAD = 4 * TILE_ROWS;
    const P& w;
    const TiledTokens& x;
    BFloat16* y;
    i64 N, begin, end;

    // A panel: rows from n on, of a group that begins at `first`, and columns from k on, in tiles; for tokens from m on
    struct Place {
        i64 m, first, k, n;
    };
    struct Panel {
        __m512i tiles[PANEL_TILES * TWO_TILES];
        float steps[TWO_TILES];
    } panels[2];
    i64 tokens = std::min(whole_tiles(x.M), TILE_TOKENS);
    // Of 32 tokens and rows [2, 2, 16 tokens, 16 rows]
    std::vector<f32x16> sums = std::vector<f32x16>(tokens * 2 * (TILE_GROUP / TWO_TILES));
    i32x16 dots[2][QUAD];  // of the tokens that are being multiplied, and of those before them

    f32x16* sums_of(i64 row, i64 token) {
        return sums.data() + (row / TWO_TILES * (tokens / TWO_TILES) + token / TWO_TILES) * QUAD;
    }
    i64 last(Place p) const { return std::min(end, p.first + TILE_GROUP); }
    i64 count(Place p) const { return std::min(tokens, x.M - p.m); }
    Place after(Place p) const {
        if ((p.n += TWO_TILES) < last(p)) return p;
        p.n = p.first;
        if ((p.k += PANEL_TILES) < x.columns) return p;
        p.k = 0, p.n = p.first += TILE_GROUP;
        if (p.first < end) return p;
        return {p.m + tokens, begin, 0, begin};
    }
    INLINE void fill(Place p, i64 i, Panel& panel) const {  // one of the tiles [depth, 2]
        const i64 half = i % 2 * TILE_ROWS;
        w.fill(p.n + half, (p.k + i / 2) * WIDTH, panel.steps + half, panel.tiles + i * TILE_ROWS);
    }
    i64 begin_panel(Place p, Panel& panel) const {  // returns the number of its tiles
        if (p.m >= x.M) return 0;
        w.scale_block(p.n, p.k * WIDTH, x.depth(p.k) * WIDTH, panel.steps);
        return 2 * x.depth(p.k);
    }
    // Rows i .. until of 32 tokens' integers, to their sums
    INLINE void add(const i32x16* from, i64 i, i64 until, Place p, i64 token, const Panel& panel) {
        f32x16* to = sums_of(p.n - p.first, token);
        const float* steps = x.steps.data() + p.k / PANEL_TILES * x.M + p.m + token;
        for (; i < until; i++) {
            const i64 row = i / (2 * TILE_ROWS) * TILE_ROWS + i % TILE_ROWS;
            if (p.m + token + row >= x.M) continue;
            f32x16 v = to_float(from[i]) * steps[row];
            if constexpr (P::SCALED_BLOCKS) v = v * load16(panel.steps + i / TILE_ROWS % 2 * TILE_ROWS);
            to[i] = p.k > 0 ? to[i] + v : v;
        }
    }
    // One panel's; meanwhile the next one is made, and `ahead` fetched.
    void multiply(Place p, const Panel& panel, Place next, Panel& next_panel, Ahead ahead) {
        const i64 depth = x.depth(p.k), steps = depth * whole_tiles(count(p)) / TWO_TILES;
        const i64 tiles = begin_panel(next, next_panel), lines = ahead.lines() / steps + 1;
        i64 step = 0, filled = 0;
        for (i64 token = 0; token < count(p); token += TWO_TILES) {
            const i64 which = token / TWO_TILES % 2;
            i64 added = 0;
            const auto meanwhile = [&]() INLINE_LAMBDA {
                for (i64 line = 0; line < lines; line++) ahead.prefetch();
                if (filled < tiles && filled * steps <= step++ * tiles) fill(next, filled++, next_panel);
                if (INTEGERS && token > 0) {
                    const i64 until = std::min(QUAD, added + (QUAD + depth - 1) / depth);
                    add(dots[1 - which], added, until, p, token - TWO_TILES, panel);
                    added = until;
                }
            };
            const Tiles a{x.row(p.m + token, p.k), 64, 2 * TILE, 4 * TILE}, b{panel.tiles, 64, 2 * TILE, 4 * TILE};
            if constexpr (INTEGERS) multiply_tiles<true>(a, b, depth, false, dots[which], meanwhile);
            else multiply_tiles<false>(a, b, depth, p.k > 0, sums_of(p.n - p.first, token), meanwhile);
        }
        const i64 before = (count(p) - 1) / TWO_TILES;
        if (INTEGERS) add(dots[before % 2], 0, QUAD, p, before * TWO_TILES, panel);
        while (filled < tiles) fill(next, filled++, next_panel);
    }
    void write_group(Place p) {
        float scales[TILE_GROUP + TWO_TILES];
        for (i64 n = p.first; n < last(p); n++) scales[n - p.first] = w.scale(n);
        for (i64 i = 0; i < count(p); i++)
            for (i64 n = 0; n < last(p) - p.first; n += TWO_TILES) {
                const f32x16* sum = sums_of(n, i) + i % TWO_TILES / TILE_ROWS * TWO_TILES + i % TILE_ROWS;
                const f32x16 low = sum[0] * load16(scales + n), high = sum[TILE_ROWS] * load16(scales + n + TILE_ROWS);
                const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
                BFloat16* to = y + (p.m + i) * N + p.first + n;
                _mm512_mask_storeu_epi16(to, first_of_32(N - p.first - n), (__m512i)both);
            }
    }
    void run() {
        const UseTiles use;
        Place p{0, begin, 0, begin};
        for (i64 i = 0, tiles = begin_panel(p, panels[0]); i < tiles; i++) fill(p, i, panels[0]);
        for (i64 which = 0; p.m < x.M; which = 1 - which) {
            const Place next = after(p), later = after(next);
            const i64 columns = later.m < x.M ? x.depth(later.k) * WIDTH : 0;
            multiply(p, panels[which], next, panels[1 - which], w.ahead(later.n, later.k * WIDTH, columns));
            if (next.m != p.m || next.first != p.first) write_group(p);
            p = next;
        }
    }
};

// x [M, K] -> y [M, N]. False where there are no tiles.
template <typename P> bool multiply_panels(const P& w, const BFloat16* x, BFloat16* y, i64 M, i64 N, i64 K) {
    if (!tiles_allowed()) return false;
    const TiledTokens tokens(x, M, K, sizeof(typename P::Element) == 1);
    share(N, TWO_TILES, K, [&](i64 n, i64 end) { PanelProduct<P>{w, tokens, y, N, n, end}.run(); });
    return true;
}
#endif

}  // namespace
