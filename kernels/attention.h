// Attention over the KV cache (of many queries, with AMX: amx_attention.h): softmax(scale * q k^T) v by the online
// softmax, block by block of positions (Milakov and Gimelshein, 2018), where the positions are split between threads as
// in Flash-Decoding.
#pragma once
#include <ATen/Parallel.h>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>
#include "linear.h"
#include "states.h"

namespace {

using qwen_fast::KVCache;

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// The G query heads that share one KV head, at a few tokens: R queries in all, query r belongs to token r / G.
struct Queries {
    i64 G, R, D, window;
    const i64* pos;  // [R / G]
    // Query r sees the positions first .. last - 1.
    i64 first(i64 r) const { return window > 0 ? std::max<i64>(0, pos[r / G] - window + 1) : 0; }
    i64 last(i64 r) const { return pos[r / G] + 1; }
};

// What is known of the softmax over the positions seen so far: maximum, sum and weighted sum of V for each query.
struct Partial {
    float *max, *total, *acc;  // [R], [R], [R, D]
    static i64 size(i64 R, i64 D) { return R * (D + 2); }
    Partial(float* p, i64 R) : max(p), total(p + R), acc(p + 2 * R) {}
};

// A register of a query in type T or in fp32, to be multiplied with keys of type T
template <typename T, typename Q> INLINE typename Lanes<T>::Reg load_query(const Q* q, i64 n) {
    if constexpr (std::is_same_v<T, Q>) return load_up_to(q, n);
    else return load16(q);
}

// out[r, i] = scale * q[r] . k[i] for NR queries and sixteen keys of D values: C registers, or any number if C is 0
template <typename T, int NR, int C, typename Q>
INLINE void dot16(const Q* q, const T* k, i64 D, float scale, float* out) {
    using L = Lanes<T>;
    typename L::Reg query[NR][C + 1];
    UNROLL2(r, NR, c, C) query[r][c] = load_query<T>(q + r * D + c * L::N, L::N);
    f32x16 sums[NR][4];
    UNROLL(j, 4) {
        f32x16 acc[NR][4] = {};
        UNROLL(i, 4) {
            UNROLL(c, C) {
                const auto key = L::load(k + c * L::N);
                UNROLL(r, NR) acc[r][i] = L::dot(acc[r][i], key, query[r][c]);
            }
            for (i64 d = C * L::N; d < D; d += L::N) {
                const int n = std::min<i64>(L::N, D - d);
                const auto key = load_up_to(k + d, n);
                UNROLL(r, NR) acc[r][i] = L::dot(acc[r][i], key, load_query<T>(q + r * D + d, n));
            }
            k += D;
        }
        UNROLL(r, NR) sums[r][j] = sums4(acc[r]);
    }
    UNROLL(r, NR) store16(out + r * BLOCK, sums16(sums[r][0], sums[r][1], sums[r][2], sums[r][3]) * scale);
}

template <typename T, int NR, typename Q> INLINE void dot16(const Q* q, const T* k, i64 D, float scale, float* out) {
    constexpr int N = Lanes<T>::N;
    if (std::is_same_v<T, int8_t> && D == 8 * N) dot16<T, NR, 8>(q, k, 8 * N, scale, out);
    else if (D == 4 * N) dot16<T, NR, 4>(q, k, 4 * N, scale, out);
    else if (D == 2 * N) dot16<T, NR, 2>(q, k, 2 * N, scale, out);
    else dot16<T, NR, 0>(q, k, D, scale, out);
}

template <typename T, typename Q> INLINE float dot(const Q* q, const T* k, i64 D) {
    using L = Lanes<T>;
    f32x16 acc[2] = {};
    i64 d = 0;
    for (; d + 2 * L::N <= D; d += 2 * L::N)
        for (int u = 0; u < 2; u++)
            acc[u] = L::dot(acc[u], load_query<T>(q + d + u * L::N, L::N), L::load(k + d + u * L::N));
    for (; d < D; d += L::N) {
        const int n = std::min<i64>(L::N, D - d);
        acc[0] = L::dot(acc[0], load_query<T>(q + d, n), load_up_to(k + d, n));
    }
    return sum(acc[0] + acc[1]);
}

// Prefetches n numbers at once.
template <typename C> INLINE void prefetch(const C* from, i64 n) {
    for (i64 i = 0; i < n * (i64)sizeof(C); i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}

// Prefetches N numbers from next + at, a multiple of N, in the midst of other work, unless next is null. A burst stalls
// the core; spread evenly, and in the order of addresses whatever the order of use, prefetches take half as long.
template <int N, typename E> INLINE void prefetch_in_turn(const E* next, i64 at) {
    constexpr int LINE = 64 / sizeof(E);
    if (next && at % LINE == 0) UNROLL(i, (N + LINE - 1) / LINE) __builtin_prefetch(next + at + i * LINE, 0, 2);
}

// out[r * BLOCK + i] = q[r] . k[i] for NR queries, in the order of Lanes<E>, and KEYS keys; prefetches as many from
// next
template <typename E, int NR, int KEYS>
INLINE void dot_keys(const E* k, const E* next, const float* q, i64 D, float* out) {
    f32xL acc[NR * KEYS] = {};
    for (i64 d = 0; d < D; d += 16) {
        prefetch_in_turn<16 * KEYS>(next, KEYS * d);
        typename Lanes<E>::Reg key[KEYS];
        UNROLL(i, KEYS) key[i] = Lanes<E>::load(k + i * D + d);
        UNROLL2(p, 16 / LANES, r, NR) {
            const auto x = load<f32xL>(q + r * D + d + p * LANES);
            UNROLL(i, KEYS) acc[r * KEYS + i] += key[i].part[p] * x;
        }
    }
    UNROLL(r, NR) store_sums<KEYS>(out + r * BLOCK, acc + r * KEYS);
}

// The scores of all R queries for n keys from k, out[r * BLOCK + j] = scale * q[r] . k[j]. q: of type E or, if that is
// int8, in fp32; if NARROW, scale * q in fp32 in the order of Lanes<E>. next: what to prefetch meanwhile, or null
template <typename E, typename Q>
INLINE void score_block(const Q* q, const E* k, const E* next, i64 R, i64 n, i64 D, float scale, float* out) {
    if constexpr (NARROW) {
        tiles(R, [&](i64 r, auto queries) INLINE_LAMBDA {
            constexpr int KEYS = queries <= 2 ? 4 : 2;
            const auto some = [&](i64 j, auto keys) INLINE_LAMBDA {
                const E* ahead = next && r == 0 ? next + j * D : nullptr;
                dot_keys<E, queries, keys>(k + j * D, ahead, q + r * D, D, out + r * BLOCK + j);
            };
            i64 j = 0;
            for (; j + KEYS <= n; j += KEYS) some(j, std::integral_constant<int, KEYS>());
            for (; j < n; j++) some(j, std::integral_constant<int, 1>());
        });
    } else {
        i64 j = 0;
        for (; j + 16 <= n; j += 16) {
            i64 r = 0;
            for (; r + 2 <= R; r += 2) dot16<E, 2>(q + r * D, k + j * D, D, scale, out + r * BLOCK + j);
            for (; r < R; r++) dot16<E, 1>(q + r * D, k + j * D, D, scale, out + r * BLOCK + j);
        }
        for (; j < n; j++)
            for (i64 r = 0; r < R; r++) out[r * BLOCK + j] = dot(q + r * D, k + j * D, D) * scale;
    }
}

// One query's turn of the online softmax: of its n scores s those in from .. to become exp(s - max), all others, up to
// a multiple of 32, become 0. Returns exp(old max - max), the factor of what was summed up over earlier blocks.
INLINE float softmax_block(float* s, i64 n, i64 from, i64 to, float& max, float& total) {
    const i64 padded = (n + 31) / 32 * 32;
    if (from == to) {
        std::fill_n(s, padded, 0.0f);
        return 1.0f;
    }
    std::fill(s, s + from, -INFINITE);
    std::fill(s + to, s + padded, -INFINITE);
    f32x16 highs = load16(s), sums = {};
    for (i64 i = 16; i < n; i += 16) highs = max16(highs, load16(s + i));
    const float high = std::max(max, highest(highs));
    for (i64 i = 0; i < n; i += 16) {
        f32x16 x = load16(s + i) - high, e = exp16(x);
        e = select(x < splat(-87.0f), f32x16{}, e);
        sums += e;
        store16(s + i, e);
    }
    const float correction = std::exp(max - high);
    total = total * correction + sum(sums);
    max = high;
    return correction;
}

// acc[r, d .. d + 16 * C) += sum over j < n of p[r, j] v[j, d ..], for NR queries; prefetches as many from next
template <typename T, int NR, int C>
INLINE void add_values(float* acc, const float* p, const T* v, const T* next, i64 n, i64 d, i64 D) {
    f32x16 a[NR][C] = {};
    for (i64 j = 0; j < n; j++) {
        prefetch_in_turn<16 * C>(next, d * n + 16 * C * j);
        f32x16 vj[C];
        UNROLL(c, C) vj[c] = load16(v + j * D + d + 16 * c);
        UNROLL(r, NR) {
            const f32x16 weight = splat(p[r * BLOCK + j]);
            UNROLL(c, C) a[r][c] += weight * vj[c];
        }
    }
    UNROLL2(r, NR, c, C) {
        float* to = acc + r * D + d + 16 * c;
        store16(to, load16(to) + a[r][c]);
    }
}

// The same for 32 * C values, two positions in one product: values interleaved, weights rounded to bf16
template <typename T, int NR, int C>
INLINE void add_value_pairs(float* acc, const float* p, const T* v, i64 n, i64 d, i64 D) {
    using L = Lanes<T>;
    uint32_t weights[NR][BLOCK_IN_CACHE / 2];
    UNROLL(r, NR)
        for (i64 j = 0; j < n; j += 32) L::store_pairs(weights[r] + j / 2, p + r * BLOCK + j);
    f32x16 a[NR][2 * C] = {};
    for (i64 j = 0; j < n; j += 2) {
        const T *one = v + j * D + d, *other = j + 1 < n ? one + D : one;  // whose weight is 0 then
        UNROLL(c, C) {
            typename L::Reg low, high;
            L::interleave(L::load(one + 32 * c), L::load(other + 32 * c), low, high);
            UNROLL(r, NR) {
                const auto weight = L::splat_pair(weights[r][j / 2]);
                a[r][2 * c] = L::dot(a[r][2 * c], low, weight);
                a[r][2 * c + 1] = L::dot(a[r][2 * c + 1], high, weight);
            }
        }
    }
    UNROLL2(r, NR, c, C) {
        float* to = acc + r * D + d + 32 * c;
        L::reorder(a[r][2 * c], a[r][2 * c + 1]);
        store16(to, load16(to) + a[r][2 * c]);
        store16(to + 16, load16(to + 16) + a[r][2 * c + 1]);
    }
}

template <typename T, int NR>
INLINE void add_values(float* acc, const float* p, const T* v, const T* next, i64 n, i64 D) {
    i64 d = 0;
    if constexpr (Lanes<T>::PAIRS) {
        constexpr int C = NR > 2 ? 2 : 4;  // so that the sums stay in registers
        for (; d + 32 * C <= D; d += 32 * C) add_value_pairs<T, NR, C>(acc, p, v, n, d, D);
        for (; d + 32 <= D; d += 32) add_value_pairs<T, NR, 1>(acc, p, v, n, d, D);
    }
    constexpr int C = NARROW ? 4 / NR : 4;
    for (; d + 16 * C <= D; d += 16 * C) add_values<T, NR, C>(acc, p, v, next, n, d, D);
    for (; d < D; d += 16) add_values<T, NR, 1>(acc, p, v, next, n, d, D);
}

// acc[r] += sum over j < n of p[r, j] v[j], for R queries. next: what to prefetch meanwhile, or null
template <typename T>
INLINE void add_values(float* acc, const float* p, const T* v, const T* next, i64 R, i64 n, i64 D) {
    const auto some = [&](i64 r, auto queries) INLINE_LAMBDA {
        add_values<T, queries>(acc + r * D, p + r * BLOCK, v, r ? nullptr : next, n, D);
    };
    i64 r = 0;
    for (; r + 4 <= R; r += 4) some(r, std::integral_constant<int, 4>());
    for (; r + 2 <= R; r += 2) some(r, std::integral_constant<int, 2>());
    for (; r < R; r++) some(r, std::integral_constant<int, 1>());
}

// The keys and values of one KV head, [T, D], with a scale for each position if they are in int8
struct Head {
    const void *keys, *values;
    const float *k_scales = nullptr, *v_scales = nullptr;
    // bytes: of a number that is not in int8
    Head(const KVCache& cache, i64 head, i64 bytes) {
        const i64 first = head * cache.T, at = first * cache.D * (cache.is_int8() ? 1 : bytes);
        keys = (const char*)cache.k + at, values = (const char*)cache.v + at;
        if (cache.is_int8()) k_scales = cache.k_scales + first, v_scales = cache.v_scales + first;
    }
};

// s[r * BLOCK + j] *= scales[j], for R queries and n positions
INLINE void scale_columns(float* s, const float* scales, i64 R, i64 n) {
    for (i64 r = 0; r < R; r++)
        for (i64 j = 0; j < n; j++) s[r * BLOCK + j] *= scales[j];
}

// Attention over positions begin .. end of one KV head, whose numbers are multiplied as type E. q [R, D] as score_block
// takes it, scratch scores [R, BLOCK]. What is in int8 is multiplied without its scales: those of the keys go to the
// scores, those of the values to the weights.
template <typename E, typename Q>
void attend_as(const Queries& a, const Q* q, const Head& head, i64 begin, i64 end, float* scores, Partial out) {
    const i64 R = a.R, D = a.D;
    const float scale = 1.0f / std::sqrt((float)D);
    std::fill_n(out.max, R, -INFINITE);
    std::fill_n(out.total, R, 0.0f);
    std::fill_n(out.acc, R * D, 0.0f);
    std::vector<E> buffer(head.k_scales && !std::is_same_v<E, int8_t> ? BLOCK_IN_CACHE * D : 0);  // of what was int8
    for (i64 t = begin; t < end; t += BLOCK) {
        const i64 n = std::min<i64>(BLOCK, end - t);
        const auto each_part = [&](const void* rows, auto f) INLINE_LAMBDA {
            for (i64 j = 0; j < n; j += BLOCK_IN_CACHE) {
                const i64 first = (t + j) * D, count = std::min(BLOCK_IN_CACHE, n - j);
                const i64 after = std::min(BLOCK_IN_CACHE, end - t - j - count) * D;  // is prefetched
                const E *part = (const E*)rows + first, *next = NARROW ? part + count * D : nullptr;
                if constexpr (!std::is_same_v<E, int8_t>)
                    if (head.k_scales) {
                        const int8_t* stored = (const int8_t*)rows + first;
                        prefetch(stored + count * D, after);
                        convert(stored, buffer.data(), count * D);
                        part = buffer.data(), next = nullptr;
                    }
                if (!NARROW && (!head.k_scales || std::is_same_v<E, int8_t>)) prefetch(part + count * D, after);
                f(part, next, scores + j, count);
            }
        };
        each_part(head.keys, [&](const E* k, const E* next, float* s, i64 count) INLINE_LAMBDA {
            score_block<E>(q, k, next, R, count, D, scale, s);
        });
        if (head.k_scales) scale_columns(scores, head.k_scales + t, R, n);
        for (i64 r = 0; r < R; r++) {
            const i64 from = std::clamp<i64>(a.first(r) - t, 0, n), to = std::clamp<i64>(a.last(r) - t, from, n);
            const float correction = softmax_block(scores + r * BLOCK, n, from, to, out.max[r], out.total[r]);
            float* acc = out.acc + r * D;
            if (correction != 1.0f)
                for (i64 d = 0; d < D; d++) acc[d] *= correction;
        }
        if (head.v_scales) scale_columns(scores, head.v_scales + t, R, n);
        each_part(head.values, [&](const E* v, const E* next, float* p, i64 count) INLINE_LAMBDA {
            add_values(out.acc, p, v, next, R, count, D);
        });
    }
}

template <typename T>
void attend_range(const Queries& a, const T* q, const Head& head, i64 begin, i64 end, float* scores, Partial out) {
    // int8 for a few queries is converted in registers, else once for all of them.
    const bool in_registers = head.k_scales && a.R <= 4;
    if constexpr (!NARROW)
        if (!in_registers) return attend_as<T>(a, q, head, begin, end, scores, out);
    const float scale = NARROW ? 1.0f / std::sqrt((float)a.D) : 1.0f;
    std::vector<float> queries(a.R * a.D);
    for (size_t i = 0; i < queries.size(); i += 16) {
        f32x16 some = load16(q + i);
        if constexpr (NARROW)
            if (!in_registers) some = Lanes<T>::load(q + i);  // in another order
        store16(queries.data() + i, some * scale);
    }
    if (in_registers) attend_as<int8_t>(a, queries.data(), head, begin, end, scores, out);
    else if constexpr (NARROW) attend_as<T>(a, queries.data(), head, begin, end, scores, out);
}

}  // namespace

#include "amx_attention.h"

namespace {

// How attention is shared out between threads: a job is one KV head of one row of the batch with a tile of its tokens.
// Where there are too few jobs for threads to share evenly, late ones too, each job's positions are split as well.
struct Schedule {
    struct Job {
        i64 head, b, first, tokens;  // head: b * K + the KV head
    };
    i64 H, K, D, G, S, tile, tiles, jobs, splits = 1;
    Schedule(const KVCache& cache, i64 H, i64 S, i64 longest, i64 threads, i64 queries)
        : H(H), K(cache.K), D(cache.D), G(H / K), S(S), tile(std::min(S, std::max<i64>(1, queries / G))),
          tiles((S + tile - 1) / tile), jobs(cache.B * K * tiles) {
        if (jobs < 4 * threads || (jobs % threads && jobs < 8 * threads))
            splits = std::clamp<i64>((4 * threads + jobs - 1) / jobs, 1, std::max<i64>(1, longest / LEAST_SPLIT));
    }
    Job job(i64 i) const { return {i / tiles, i / tiles / K, i % tiles * tile, std::min(tile, S - i % tiles * tile)}; }
    // Where query r of a job stands in q and y [B, S, H, D]
    i64 row(const Job& j, i64 r) const { return ((j.b * S + j.first + r / G) * H + j.head % K * G + r % G) * D; }
};

// y [D] of query r from its splits: sum of acc exp(max - highest) / sum of total exp(max - highest)
template <typename P, typename Y> INLINE void merge_splits(const P& partial, i64 splits, i64 r, i64 D, Y* y) {
    float high = -INFINITE, total = 0;
    for (i64 split = 0; split < splits; split++) high = std::max(high, partial(split).max[r]);
    float* sum = partial(0).acc + r * D;
    for (i64 split = 0; split < splits; split++) {
        const Partial p = partial(split);
        const float weight = std::exp(p.max[r] - high);
        total += p.total[r] * weight;
        for (i64 d = 0; d < D; d++) sum[d] = p.acc[r * D + d] * weight + (split ? sum[d] : 0.0f);
    }
    for (i64 d = 0; d < D; d += 16) store16(y + d, load16(sum + d) * (1 / total));
}

}  // namespace

// See states.h
template <typename T, typename Y>
void qwen_fast::attend_heads(const T* q, const KVCache& cache, i64 H, i64 S, const i64* pos, i64 window, Y* y) {
    const i64 count = cache.B * S, longest = *std::max_element(pos, pos + count) + 1;
    const bool by_tiles = std::is_same_v<T, BFloat16> && S * H / cache.K > FEW_QUERIES && attends_by_tiles(cache.D);
    const Schedule plan(cache, H, S, longest, threads(), by_tiles ? AMX_QUERIES : TILE_QUERIES);
    const i64 D = plan.D, G = plan.G, R = plan.tile * G, splits = plan.splits, partial_size = Partial::size(R, D);
    // Of every part if there are several to a job, else of each thread's present one
    const i64 kept = splits > 1 ? plan.jobs * splits : threads();
    const std::unique_ptr<float[]> partials(new float[kept * partial_size]);
    const auto partial = [&](i64 i) { return Partial(partials.get() + i * partial_size, R); };
    const auto finish = [&](i64 i, i64 first) {
        const auto j = plan.job(i);
        const auto of_job = [&](i64 split) { return partial(first + split); };
        for (i64 r = 0; r < j.tokens * G; r++) merge_splits(of_job, splits, r, D, y + plan.row(j, r));
    };
    const i64 work = longest * count * H * D;
    Parts parts(plan.jobs * splits);
    together(work > ONE_THREAD, [&](i64 thread) {
        std::vector<float> scores(by_tiles ? 0 : R * BLOCK);
        std::vector<T> queries(R * D);
        std::optional<TileAttention> tiles;
        if (by_tiles) tiles.emplace(R, D);
        parts.each([&](i64 i) {
            const auto j = plan.job(i / splits);
            const Queries a{G, j.tokens * G, D, window, pos + j.b * S + j.first};
            const auto [low, high] = std::minmax_element(a.pos, a.pos + j.tokens);
            const i64 least = window > 0 ? std::max<i64>(0, *low - window + 1) : 0;
            const i64 length = (*high + splits - least) / splits;
            const i64 begin = least + i % splits * length, end = std::min(*high + 1, begin + length);
            const i64 at = splits > 1 ? i : thread;
            for (i64 r = 0; r < a.R; r += G) std::copy_n(q + plan.row(j, r), G * D, queries.data() + r * D);
            const Head head(cache, j.head, sizeof(T));
            if (tiles) tiles->attend(a, queries.data(), head, begin, end, partial(at));
            else attend_range(a, queries.data(), head, begin, end, scores.data(), partial(at));
            if (splits == 1) finish(i, at);
        });
    });
    if (splits > 1) for_each(work > ONE_THREAD, plan.jobs, [&](i64 i) { finish(i, i * splits); });
}
