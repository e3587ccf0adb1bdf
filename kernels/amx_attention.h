// Attention of many queries by AMX. Scores stand in columns, a query in each, so that keys need not be rearranged and
// the softmax is computed for sixteen queries at once; only the weights are transposed, as they are rounded to bf16.
#pragma once
#include "amx.h"

namespace {

#ifdef AMX
constexpr i64 BLOCK_TILES = BLOCK / TILE_K;  // along the positions of a block
constexpr float LEAST_SCORE = -1e30f;        // finite, so that differences are, too

// A block of keys or values, `n` rows [D] of T, as rows in bf16 up to whole tiles: where they are, or copied
template <typename T> const BFloat16* rows_in_tiles(const T* from, i64 n, i64 D, BFloat16* copy) {
    if constexpr (std::is_same_v<T, BFloat16>)
        if (n % TWO_TILES == 0) return from;
    convert(from, copy, n * D);
    std::fill(copy + n * D, copy + whole_tiles(n) * D, BFloat16(0.0f));
    return copy;
}

// rows [n, D], n a multiple of 32 -> tiles [D / 32, BLOCK_TILES, 2, 16, 16, 2] of pairs of positions. The first of two
// tiles has the dimensions that `interleave` puts first.
inline void pair_positions(const BFloat16* rows, i64 n, i64 D, BFloat16* out) {
    using L = Lanes<BFloat16>;
    for (i64 j = 0; j < n; j += 2)
        for (i64 c = 0; c < D / TILE_K; c++) {
            L::Reg low, high;
            L::interleave(L::load(rows + j * D + c * TILE_K), L::load(rows + (j + 1) * D + c * TILE_K), low, high);
            BFloat16* to = out + (c * BLOCK_TILES + j / TILE_K) * 2 * TILE + j % TILE_K / 2 * TILE_K;
            _mm512_store_si512(to, (__m512i)low);
            _mm512_store_si512(to + TILE, (__m512i)high);
        }
}

// Sixteen queries' turn of the online softmax
struct SoftmaxTile {
    f32x16 high = splat(LEAST_SCORE), total = {};
    i32x16 first = {}, last = {};  // the positions that they see

    // Scores of each for positions t .. end and some more, up to n, which are whole tiles, `apart` floats from one tile
    // of sixteen to the next -> weights as tiles [n / 32, 16, 32] in bf16. Scales, of positions t ..., may be null.
    // masked: unless all of the queries see all of the n. Returns exp(old high - high).
    template <bool masked>
    INLINE f32x16 turn(float* scores, i64 apart, i64 t, i64 end, i64 n, float scale, const float* k_scales,
                       const float* v_scales, BFloat16* weights) {
        const i32x16 ends = (int32_t)end - i32x16{}, before_end = last < ends ? last : ends;
        const auto row = [&](i64 j) INLINE_LAMBDA { return scores + j / 16 * apart + j % 16 * 16; };
        f32x16 most = splat(-INFINITY);
        for (i64 j = 0; j < n; j++) {
            f32x16 s = load16(row(j));
            if (k_scales) s *= k_scales[j];
            if (masked) {
                const i32x16 position = (int32_t)(t + j) - i32x16{};
                s = select((first <= position) & (position < before_end), s, splat(-INFINITY));
            }
            if (masked || k_scales) store16(row(j), s);
            most = max16(most, s);
        }
        const f32x16 before = high;
        high = max16(high, most * scale);
        f32x16 sums = {};
        for (i64 j = 0; j < n; j += TILE_K, weights += TILE) {
            __m512i pairs[TILE_ROWS];
            for (i64 i = 0; i < TILE_ROWS; i++) {
                f32x16 e[2];
                UNROLL(h, 2) {
                    const f32x16 x = load16(row(j + 2 * i + h)) * scale - high;
                    e[h] = exp16(x);
                    if (masked) e[h] = select(x < splat(-87.0f), f32x16{}, e[h]);
                    sums += e[h];
                    if (v_scales) e[h] *= v_scales[j + 2 * i + h];
                }
                pairs[i] = column_pairs(e[0], e[1]);
            }
            store_tile((__m512i*)weights, pairs);
        }
        const f32x16 correction = exp16(before - high);
        total = total * correction + sums;
        return correction;
    }
};

// Attention of up to R queries [D], where D is a multiple of 32, with the buffers that one thread needs
class TileAttention {
    using Buffer = std::vector<f32x16>;  // of tiles
    i64 D, columns;
    Buffer queries;  // [R / 16, D / 32], transposed pairs
    Buffer copy;     // [BLOCK, D] in bf16, of keys or values that are not in whole tiles of bf16
    Buffer values;   // [D / 32, BLOCK_TILES, 2], see pair_positions
    Buffer scores;   // [BLOCK / 16, 2], 16 positions of 16 queries each
    Buffer weights;  // [2, BLOCK_TILES]
    Buffer sums;     // [R / 32, D / 32, 2, 2], 16 queries and 16 dimensions each
    std::vector<SoftmaxTile> softmax;
    float k_scales[BLOCK] = {}, v_scales[BLOCK] = {};

    static BFloat16* tile(Buffer& buffer, i64 i) { return (BFloat16*)(buffer.data() + i * TILE_ROWS); }

    // Scores of half a pair's queries at positions t .. end, n with padding -> weights; rescales the sums so far
    template <bool masked>
    void weigh(i64 half, SoftmaxTile& queries, i64 t, i64 end, i64 n, const float* k_scales, i64 pair) {
        float* const from = (float*)tile(scores, half);
        const float scale = 1.0f / std::sqrt((float)D);
        const f32x16 correction =
            queries.turn<masked>(from, 2 * TILE_ROWS * TILE_ROWS, t, end, n, scale, k_scales,
                                 k_scales ? v_scales : nullptr, tile(weights, half * BLOCK_TILES));
        for (i64 c = 0; c < columns; c++)
            for (i64 i = 0; i < 2 * TILE_ROWS; i++)
                sums[((pair * columns + c) * 4 + 2 * half) * TILE_ROWS + i] *= correction[i % TILE_ROWS];
    }

public:
    TileAttention(i64 R, i64 D)
        : D(D), columns(D / TILE_K), queries(whole_tiles(R) * columns), copy(BLOCK * columns),
          values(BLOCK * columns), scores(2 * BLOCK), weights(BLOCK), sums(whole_tiles(R) * 2 * columns) {}

    // Positions begin .. end of one KV head. q [a.R, D] in bf16
    template <typename T>
    void attend(const Queries& a, const T* q, const Head& head, i64 begin, i64 end, Partial out) {
        const UseTiles use;
        start(a, (const BFloat16*)q);
        for (i64 t = begin; t < end; t += BLOCK) {
            const i64 n = std::min<i64>(BLOCK, end - t);
            if (head.k_scales) {
                copy_scales(head.k_scales + t, n, k_scales), copy_scales(head.v_scales + t, n, v_scales);
                blocks(a, (const int8_t*)head.keys + t * D, (const int8_t*)head.values + t * D, k_scales, t, n);
            } else blocks(a, (const BFloat16*)head.keys + t * D, (const BFloat16*)head.values + t * D, nullptr, t, n);
        }
        for (i64 r = 0; r < a.R; r++) {
            out.max[r] = softmax[r / TILE_ROWS].high[r % TILE_ROWS];
            out.total[r] = softmax[r / TILE_ROWS].total[r % TILE_ROWS];
            for (i64 c = 0; c < columns; c++) {
                const i64 pair = r / TWO_TILES, half = r % TWO_TILES / TILE_ROWS;
                const i64 at = ((pair * columns + c) * 4 + half * 2) * TILE_ROWS + r % TILE_ROWS;
                f32x16 low = sums[at], high = sums[at + TILE_ROWS];
                Lanes<BFloat16>::reorder(low, high);
                float* to = out.acc + r * D + c * TILE_K;
                store16(to, low), store16(to + 16, high);
            }
        }
    }

private:
    // Zeros after them: what is left of another row of the batch may be NaN, which even times 0 remains.
    static void copy_scales(const float* from, i64 n, float* to) { std::fill(std::copy_n(from, n, to), to + BLOCK, 0); }

    void start(const Queries& a, const BFloat16* q) {
        std::fill(sums.begin(), sums.end(), f32x16{});
        softmax.assign(whole_tiles(a.R) / TILE_ROWS, {});
        for (i64 first = 0; first < a.R; first += TILE_ROWS) {
            auto& tile_of = softmax[first / TILE_ROWS];
            const i64 count = std::min(TILE_ROWS, a.R - first);
            for (i64 r = 0; r < count; r++) tile_of.first[r] = a.first(first + r), tile_of.last[r] = a.last(first + r);
            for (i64 c = 0; c < columns; c++) {
                __m512i rows[TILE_ROWS] = {};
                for (i64 r = 0; r < count; r++) rows[r] = bf16_of(q + (first + r) * D + c * TILE_K, TILE_K);
                store_tile((__m512i*)tile(queries, first / TILE_ROWS * columns + c), rows);
            }
        }
    }

    // All queries and n positions from t on
    template <typename C>
    void blocks(const Queries& a, const C* keys, const C* values, const float* k_scales, i64 t, i64 n) {
        BFloat16* const buffer = tile(copy, 0);
        pair_positions(rows_in_tiles(values, n, D, buffer), whole_tiles(n), D, tile(this->values, 0));
        const BFloat16* rows = rows_in_tiles(keys, n, D, buffer);
        for (i64 r = 0; r < a.R; r += TWO_TILES) block(a, r, t, n, rows, k_scales);
    }

    // Queries r .. r + 32 and n positions from t on
    void block(const Queries& a, i64 r, i64 t, i64 n, const BFloat16* keys, const float* k_scales) {
        i64 first_least = INT64_MAX, first_most = 0, last_least = INT64_MAX, last_most = 0;  // of these queries
        for (i64 i = r; i < std::min(a.R, r + TWO_TILES); i++) {
            first_least = std::min(first_least, a.first(i)), first_most = std::max(first_most, a.first(i));
            last_least = std::min(last_least, a.last(i)), last_most = std::max(last_most, a.last(i));
        }
        n = std::min(n, last_most - t);
        if (n <= 0 || t + n <= first_least) return;
        const i64 end = t + n;
        n = whole_tiles(n);
        const i64 bytes = TILE * sizeof(BFloat16), pair = r / TWO_TILES, row = D * sizeof(BFloat16);
        const Tiles these_queries{tile(queries, pair * 2 * columns), 64, columns * bytes, bytes};
        for (i64 j = 0; j < n; j += TWO_TILES)
            multiply_tiles<false>({keys + j * D, row, TILE_ROWS * row, 64}, these_queries, columns, false,
                           (float*)tile(scores, j / TILE_ROWS * 2), [] {});
        const bool all_seen = t >= first_most && t + n <= std::min(end, last_least);
        for (i64 half = 0; half < 2; half++) {
            auto& queries = softmax[2 * pair + half];
            if (all_seen) weigh<false>(half, queries, t, end, n, k_scales, pair);
            else weigh<true>(half, queries, t, end, n, k_scales, pair);
        }
        for (i64 c = 0; c < columns; c++)
            multiply_tiles<false>({tile(weights, 0), 64, BLOCK_TILES * bytes, bytes},
                           {tile(values, c * BLOCK_TILES * 2), 64, bytes, 2 * bytes}, n / TILE_K, true,
                           (float*)tile(sums, (pair * columns + c) * 4), [] {});
    }
};

inline bool attends_by_tiles(i64 D) { return D % TILE_K == 0 && tiles_allowed(); }
#else
struct TileAttention {
    TileAttention(i64, i64) {}
    template <typename T> void attend(const Queries&, const T*, const Head&, i64, i64, Partial) {}
};
inline bool attends_by_tiles(i64) { return false; }
#endif

}  // namespace
