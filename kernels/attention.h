// Attention of a few queries over the KV cache: softmax(scale * q k^T) v by the online softmax, block by block of
// positions (Milakov and Gimelshein, 2018), where the positions are split between threads as in Flash-Decoding.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>
#include "linear.h"
#include "tensors.h"

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Keys and values [B, K, T, D] of all positions so far, in the model's type, or in int8 with a scale each, fp32 [B, K,
// T, 1]: k = scale * q
struct KVCache {
    Tensor k, v, k_scales, v_scales;
    KVCache(const Tensor& k, const Tensor& v, at::TensorList scales, at::ScalarType dtype) : k(k), v(v) {
        bool fits = k.dim() == 4 && k.sizes() == v.sizes() && k.numel() > 0 && k.size(3) % 16 == 0 &&
                    k.size(3) <= MAX_HEAD && (scales.empty() || scales.size() == 2);
        if (!scales.empty()) dtype = at::kChar;
        for (const auto& t : {k, v}) fits = fits && t.scalar_type() == dtype && t.is_contiguous();
        for (const auto& t : scales)
            fits = fits && t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() * k.size(3) == k.numel();
        TORCH_CHECK(fits, "caches of ", k.sizes(), " ", k.scalar_type(), " and ", v.sizes(), " ", v.scalar_type(),
                    " with ", scales.size(), " scales for ", dtype);
        if (!scales.empty()) k_scales = scales[0], v_scales = scales[1];
    }
    bool is_int8() const { return k_scales.defined(); }
};

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

// out[r, i] = scale * q[r] . k[i] for NR queries and sixteen keys of D values: C registers, or any number if C is 0
template <typename T, int NR, int C> INLINE void dot16(const T* q, const T* k, i64 D, float scale, float* out) {
    using L = Lanes<T>;
    typename L::Reg query[NR][C + 1];
    UNROLL2(r, NR, c, C) query[r][c] = L::load(q + r * D + c * L::N);
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
                UNROLL(r, NR) acc[r][i] = L::dot(acc[r][i], key, load_up_to(q + r * D + d, n));
            }
            k += D;
        }
        UNROLL(r, NR) sums[r][j] = sums4(acc[r]);
    }
    UNROLL(r, NR) store16(out + r * BLOCK, sums16(sums[r][0], sums[r][1], sums[r][2], sums[r][3]) * scale);
}

template <typename T, int NR> INLINE void dot16(const T* q, const T* k, i64 D, float scale, float* out) {
    constexpr int N = Lanes<T>::N;
    if (D == 4 * N) dot16<T, NR, 4>(q, k, 4 * N, scale, out);
    else if (D == 2 * N) dot16<T, NR, 2>(q, k, 2 * N, scale, out);
    else dot16<T, NR, 0>(q, k, D, scale, out);
}

template <typename T> INLINE float dot(const T* a, const T* b, i64 D) {
    using L = Lanes<T>;
    f32x16 acc[2] = {};
    i64 d = 0;
    for (; d + 2 * L::N <= D; d += 2 * L::N)
        for (int u = 0; u < 2; u++) acc[u] = L::dot(acc[u], L::load(a + d + u * L::N), L::load(b + d + u * L::N));
    for (; d < D; d += L::N) {
        const int n = std::min<i64>(L::N, D - d);
        acc[0] = L::dot(acc[0], load_up_to(a + d, n), load_up_to(b + d, n));
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

// The scores of all R queries for n keys from k, out[r * BLOCK + j] = scale * q[r] . k[j]. scaled: scale * q in the
// order of Lanes<E>, if NARROW; q otherwise, and E = T. next: what to prefetch meanwhile, or null
template <typename T, typename E>
INLINE void score_block(const T* q, const float* scaled, const E* k, const E* next, i64 R, i64 n, i64 D, float scale,
                        float* out) {
    if constexpr (NARROW) {
        tiles(R, [&](i64 r, auto queries) INLINE_LAMBDA {
            constexpr int KEYS = queries <= 2 ? 4 : 2;
            const auto some = [&](i64 j, auto keys) INLINE_LAMBDA {
                const E* ahead = next && r == 0 ? next + j * D : nullptr;
                dot_keys<E, queries, keys>(k + j * D, ahead, scaled + r * D, D, out + r * BLOCK + j);
            };
            i64 j = 0;
            for (; j + KEYS <= n; j += KEYS) some(j, std::integral_constant<int, KEYS>());
            for (; j < n; j++) some(j, std::integral_constant<int, 1>());
        });
    } else {
        i64 j = 0;
        for (; j + 16 <= n; j += 16) {
            i64 r = 0;
            for (; r + 2 <= R; r += 2) dot16<T, 2>(q + r * D, k + j * D, D, scale, out + r * BLOCK + j);
            for (; r < R; r++) dot16<T, 1>(q + r * D, k + j * D, D, scale, out + r * BLOCK + j);
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

// n values of a cache of type C as numbers of type E: where they are, or converted in a buffer
template <typename E, typename C> INLINE const E* as_type(const C* from, i64 n, std::vector<E>& buffer) {
    if constexpr (std::is_same_v<E, C>) return from;
    else {
        convert(from, buffer.data(), n);
        return buffer.data();
    }
}

// The keys and values of one KV head, [T, D], with a scale for each position if they are in int8
template <typename C> struct Head {
    const C *keys, *values;
    const float *k_scales, *v_scales;
    Head(const KVCache& cache, i64 head)
        : keys(cache.k.const_data_ptr<C>() + head * cache.k.stride(1)),
          values(cache.v.const_data_ptr<C>() + head * cache.v.stride(1)) {
        k_scales = cache.is_int8() ? cache.k_scales.const_data_ptr<float>() + head * cache.k.size(2) : nullptr;
        v_scales = cache.is_int8() ? cache.v_scales.const_data_ptr<float>() + head * cache.k.size(2) : nullptr;
    }
};

// s[r * BLOCK + j] *= scales[j], for R queries and n positions
INLINE void scale_columns(float* s, const float* scales, i64 R, i64 n) {
    for (i64 r = 0; r < R; r++)
        for (i64 j = 0; j < n; j++) s[r * BLOCK + j] *= scales[j];
}

// Attention over positions begin .. end of one KV head, whose numbers are multiplied as type E. q [R, D], scratch
// scores [R, BLOCK]. What is in int8 is multiplied without its scales: those of the keys go to the scores, those of the
// values to the weights.
template <typename E, typename T, typename C>
void attend_as(const Queries& a, const T* q, const Head<C>& head, i64 begin, i64 end, float* scores, Partial out) {
    const i64 R = a.R, D = a.D;
    const float scale = 1.0f / std::sqrt((float)D);
    std::fill_n(out.max, R, -INFINITE);
    std::fill_n(out.total, R, 0.0f);
    std::fill_n(out.acc, R * D, 0.0f);
    std::vector<float> scaled(NARROW ? R * D : 0);
    std::vector<E> buffer(std::is_same_v<E, C> ? 0 : BLOCK_IN_CACHE * D);
    for (i64 i = 0; NARROW && i < R * D; i += 16) {
        if constexpr (NARROW && std::is_same_v<E, T>) store16(scaled.data() + i, Lanes<T>::load(q + i) * scale);
        else store16(scaled.data() + i, load16(q + i) * scale);
    }
    for (i64 t = begin; t < end; t += BLOCK) {
        const i64 n = std::min<i64>(BLOCK, end - t);
        const auto each_part = [&](const C* rows, auto f) INLINE_LAMBDA {
            for (i64 j = 0; j < n; j += BLOCK_IN_CACHE) {
                const i64 count = std::min(BLOCK_IN_CACHE, n - j);
                const C* after = rows + (t + j + count) * D;
                const E* next = nullptr;
                if constexpr (NARROW && std::is_same_v<E, C>) next = after;
                else prefetch(after, std::min(BLOCK_IN_CACHE, end - t - j - count) * D);
                f(as_type<E>(rows + (t + j) * D, count * D, buffer), next, scores + j, count);
            }
        };
        each_part(head.keys, [&](const E* k, const E* next, float* s, i64 count) INLINE_LAMBDA {
            score_block(q, scaled.data(), k, next, R, count, D, scale, s);
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
void attend_range(const Queries& a, const T* q, const Head<T>& head, i64 begin, i64 end, float* scores, Partial out) {
    attend_as<T>(a, q, head, begin, end, scores, out);
}

// int8 for a few queries is converted in registers, else once for all of them.
template <typename T>
void attend_range(const Queries& a, const T* q, const Head<int8_t>& head, i64 begin, i64 end, float* scores,
                  Partial out) {
    if constexpr (NARROW)
        if (a.R <= 4) return attend_as<int8_t>(a, q, head, begin, end, scores, out);
    attend_as<T>(a, q, head, begin, end, scores, out);
}

// How attention is shared out between threads: a job is one KV head of one row of the batch with a tile of its tokens.
// Where there are too few jobs for threads to share evenly, late ones too, each job's positions are split as well.
struct Schedule {
    struct Job {
        i64 head, b, first, tokens;  // head: b * K + the KV head
    };
    i64 H, K, D, G, S, tile, tiles, jobs, splits = 1;
    Schedule(const Tensor& keys, i64 H, i64 S, i64 longest, i64 threads)
        : H(H), K(keys.size(1)), D(keys.size(3)), G(H / K), S(S),
          tile(std::min(S, std::max<i64>(1, TILE_QUERIES / G))), tiles((S + tile - 1) / tile),
          jobs(keys.size(0) * K * tiles) {
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

// q [B, S, H, D], a cache of numbers of type C, pos from positions() -> y [B, S, H, D]
template <typename C, typename T, typename Y>
void attend_heads_of(const T* q, const KVCache& cache, i64 H, const Tensor& pos, i64 window, Y* y) {
    const i64 S = pos.numel() / cache.k.size(0), *p = pos.const_data_ptr<i64>();
    const i64 longest = *std::max_element(p, p + pos.numel()) + 1;
    const Schedule plan(cache.k, H, S, longest, at::get_num_threads());  // not threads(): it decides how sums are split
    const i64 D = plan.D, G = plan.G, R = plan.tile * G, splits = plan.splits, partial_size = Partial::size(R, D);
    const std::unique_ptr<float[]> partials(new float[plan.jobs * splits * partial_size]);
    const auto partial = [&](i64 i) { return Partial(partials.get() + i * partial_size, R); };
    const i64 work = longest * pos.numel() * H * D;
#pragma omp parallel num_threads(threads()) if (work > ONE_THREAD)
    {
        std::vector<float> scores(R * BLOCK);
        std::vector<T> queries(R * D);
#pragma omp for schedule(dynamic)
        for (i64 i = 0; i < plan.jobs * splits; i++) {
            const auto j = plan.job(i / splits);
            const Queries a{G, j.tokens * G, D, window, p + j.b * S + j.first};
            const auto [low, high] = std::minmax_element(a.pos, a.pos + j.tokens);
            const i64 least = window > 0 ? std::max<i64>(0, *low - window + 1) : 0;
            const i64 length = (*high + splits - least) / splits;
            const i64 begin = least + i % splits * length, end = std::min(*high + 1, begin + length);
            for (i64 r = 0; r < a.R; r += G) std::copy_n(q + plan.row(j, r), G * D, queries.data() + r * D);
            attend_range(a, queries.data(), Head<C>(cache, j.head), begin, end, scores.data(), partial(i));
        }
#pragma omp for schedule(static)
        for (i64 i = 0; i < plan.jobs; i++) {
            const auto j = plan.job(i);
            const auto of_job = [&](i64 split) { return partial(i * splits + split); };
            for (i64 r = 0; r < j.tokens * G; r++) merge_splits(of_job, splits, r, D, y + plan.row(j, r));
        }
    }
}

template <typename T, typename Y>
void attend_heads(const T* q, const KVCache& cache, i64 H, const Tensor& pos, i64 window, Y* y) {
    if (cache.is_int8()) attend_heads_of<int8_t>(q, cache, H, pos, window, y);
    else attend_heads_of<T>(q, cache, H, pos, window, y);
}

// input_pos int64 [S] or [B, S], checked -> B * S of them, one after another
Tensor positions(const Tensor& input_pos, i64 B, i64 S, i64 slots) {
    TORCH_CHECK(input_pos.scalar_type() == at::kLong, "input_pos of ", input_pos.scalar_type());
    const bool all = input_pos.dim() <= 2 && input_pos.size(-1) == S && input_pos.numel() == B * S;
    const auto pos = (all ? input_pos : input_pos.expand({B, S})).contiguous();
    const i64* p = pos.const_data_ptr<i64>();
    for (i64 i = 0; i < B * S; i++)
        TORCH_CHECK(p[i] >= 0 && p[i] < slots, "position ", p[i], " is outside the cache of ", slots);
    return pos;
}

// q [B, S, H, D], a KVCache, input_pos int64 [S] or [B, S], window 0 = none -> [B, S, H * D]
Tensor attend(const Tensor& q_, const Tensor& k_cache, const Tensor& v_cache, const Tensor& input_pos, i64 window,
              at::TensorList scales) {
    const KVCache cache(k_cache, v_cache, scales, q_.scalar_type());
    const bool fits = q_.dim() == 4 && q_.size(0) == k_cache.size(0) && q_.size(3) == k_cache.size(3);
    TORCH_CHECK(fits && q_.size(2) % k_cache.size(1) == 0, "attend: q ", q_.sizes(), ", cache ", k_cache.sizes());
    const i64 B = q_.size(0), S = q_.size(1), H = q_.size(2);
    const auto q = q_.contiguous(), pos = positions(input_pos, B, S, k_cache.size(2));
    auto out = at::empty({B, S, H * q.size(3)}, q.options());
    if (!out.numel()) return out;
    by_dtype(q, [&](auto zero) {
        using T = decltype(zero);
        attend_heads(q.const_data_ptr<T>(), cache, H, pos, window, out.mutable_data_ptr<T>());
    });
    return out;
}

}  // namespace
