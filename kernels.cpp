// Kernels for CPUs: matrix-vector products and attention that run at the speed of the memory, and whole stacks of layers made of them, which
// leave matrix-matrix products to PyTorch. kernels.py builds and registers this file, and holds a plain PyTorch twin of every kernel.
// AVX512-BF16 and VNNI have their own inner loops; everything else (AVX512, AVX2, NEON) comes out of the compiler's vector types, for whatever
// -march=native finds.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")           // so that arrays of registers stay registers

namespace {

using at::BFloat16;
using at::Tensor;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

constexpr int MAX_TOKENS = 16;
constexpr int MAX_HEAD = 512;                              // dimensions

INLINE f32x16 splat(float value) { return value - f32x16{}; }

INLINE float sum(f32x16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

// Sixteen sums over lanes at once: lane i of sums16(sums4(v), sums4(v + 4), ...) is the sum of v[i]'s lanes.
#ifdef __AVX512F__
INLINE f32x16 sums4(const f32x16 v[4]) {                   // four to every 128 bits, each over that many of its lanes
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return (f32x16)_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
}
INLINE f32x16 sums16(f32x16 v0, f32x16 v1, f32x16 v2, f32x16 v3) {
    const auto halves = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE)); };
    const __m512 low = halves((__m512)v0, (__m512)v1), high = halves((__m512)v2, (__m512)v3);
    return (f32x16)_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
}
#else
INLINE f32x16 sums4(const f32x16 v[4]) { return f32x16{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])}; }
INLINE f32x16 sums16(f32x16 v0, f32x16 v1, f32x16 v2, f32x16 v3) {
    f32x16 out;
    for (int i = 0; i < 4; i++) out[i] = v0[i], out[4 + i] = v1[i], out[8 + i] = v2[i], out[12 + i] = v3[i];
    return out;
}
#endif

INLINE f32x16 max16(f32x16 a, f32x16 b) { return a > b ? a : b; }

INLINE float highest(f32x16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    float high = v[0];
    for (int i = 1; i < 16; i++) high = std::max(high, v[i]);
    return high;
#endif
}

INLINE f32x16 load16(const float* p) {
    f32x16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE f32x16 load16(const BFloat16* p) {          // a bf16 is the upper half of an fp32
    u16x16 v;
    std::memcpy(&v, p, sizeof v);
#ifdef __AVX512F__                                 // GCC 12 takes six instructions for the two
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#else
    return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
#endif
}

INLINE f32x16 load16(const int8_t* p) {
    i8x16 v;
    std::memcpy(&v, p, sizeof v);
#ifdef __AVX512F__
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v));
#else
    return __builtin_convertvector(__builtin_convertvector(v, i32x16), f32x16);
#endif
}

INLINE f32x16 load16(const uint8_t* p) {
    u8x16 v;
    std::memcpy(&v, p, sizeof v);
#ifdef __AVX512F__
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)v));
#else
    return __builtin_convertvector(__builtin_convertvector(v, i32x16), f32x16);
#endif
}

INLINE void store16(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }

INLINE void store16(BFloat16* p, f32x16 v) {       // to nearest, ties to even
#ifdef __AVX512BF16__
    const __m256bh upper = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &upper, sizeof upper);
#else
    const u32x16 bits = (u32x16)v;
    const u16x16 upper = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16x16);
    std::memcpy(p, &upper, sizeof upper);
#endif
}

template <typename From, typename To>
INLINE void convert(const From* from, To* to, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store16(to + i, load16(from + i));
    for (; i < n; i++) to[i] = (float)from[i];
}

// f(BFloat16()) or f(0.0f)
template <typename F>
void by_dtype(const Tensor& t, F f) {
    if (t.scalar_type() == at::kBFloat16) f(BFloat16());
    else if (t.scalar_type() == at::kFloat) f(0.0f);
    else TORCH_CHECK(false, "kernels.cpp: dtype ", t.scalar_type(), " (bfloat16 and float are supported)");
}

// A register of weights or activations of type T, and its product with another, added to fp32 sums.
template <typename T>
struct Lanes {
    static constexpr int N = 16;
    using Reg = f32x16;
    static INLINE Reg load(const T* p) { return load16(p); }
    static INLINE Reg load_first(const T* p, int n) {
        T padded[N] = {};
        std::memcpy(padded, p, n * sizeof(T));
        return load16(padded);
    }
    static INLINE f32x16 dot(f32x16 acc, Reg a, Reg b) { return acc + a * b; }
};

#ifdef __AVX512BF16__
template <>
struct Lanes<BFloat16> {
    static constexpr int N = 32;
    using Reg = __m512bh;
    static INLINE Reg load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static INLINE Reg load_first(const BFloat16* p, int n) { return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
    static INLINE f32x16 dot(f32x16 acc, Reg a, Reg b) { return (f32x16)_mm512_dpbf16_ps((__m512)acc, a, b); }
};
#endif

// ---- linear: y[m, n] = sum_k x[m, k] w[n, k]

// One core waits for the memory less if it reads from two places in turn and asks for what comes next early, into the second cache (into the first
// it lost a tenth). So each thread goes through the two halves of its rows at once: where the memory has it to give that saves up to a quarter of the
// time of rows one after the other. Two neighbouring rows took half as long again.
constexpr int64_t AHEAD = 1024, FAR_AHEAD = 8192;          // bytes; the latter where there is more to compute in between

// Shares out 0 .. n: f(begin, end) for a part of what is left, smaller and smaller ones, so that no thread waits long for another at the end. All
// borders are multiples of `unit`, so that which thread takes what does not matter to the result. row: bytes of one.
template <typename F>
void share(int64_t n, int64_t unit, int64_t row, F f) {
    constexpr int64_t LEAST = 1 << 16;                     // bytes
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(at::get_num_threads())
    {
        const int64_t threads = omp_get_num_threads();
        for (int64_t begin = next; begin < n;) {
            const int64_t size = std::max((n - begin) / (2 * threads), LEAST / row), end = std::min(n, begin + (size / unit + 1) * unit);
            if (next.compare_exchange_weak(begin, end)) {
                f(begin, end);
                begin = next;
            }
        }
    }
}

// each: f(n, 2) for rows n and n + apart, f(n, 1) for a row by itself: what is left over, or all if there is too much to compute for two at once.
struct Halves {
    int64_t begin, end, apart;
    Halves(int64_t begin, int64_t end, bool two) : begin(begin), end(end), apart(two ? (end - begin) / 2 : 0) {}
    template <typename F>
    INLINE void each(F f) const {
        for (int64_t n = begin; n < begin + apart; n++) f(n, std::integral_constant<int, 2>());
        for (int64_t n = begin + 2 * apart; n < end; n++) f(n, std::integral_constant<int, 1>());
    }
};

// R rows of w, `apart` rows from one another, against M tokens. U independent sums per product hide the latency of the multiply-add.
// next: how far ahead to prefetch in the order of the addresses, where the rows are neighbours.
template <typename T, int R, int M>
INLINE void dot_rows(const T* w, int64_t apart, const T* x, float* y, int64_t K, int64_t N, int64_t next = 0) {
    using L = Lanes<T>;
    constexpr int U = R * M >= 4 ? 1 : 4 / (R * M);
    f32x16 acc[U][16] = {};                                // [u][r * M + m]
    int64_t k = 0;
    for (; k + U * L::N <= K; k += U * L::N)
        UNROLL for (int u = 0; u < U; u++) {
            typename L::Reg wv[R];
            UNROLL for (int r = 0; r < R; r++) {
                const T* from = w + r * apart * K + k + u * L::N;
                if (R <= 2) __builtin_prefetch((const char*)from + AHEAD, 0, 2);
                else if (next) __builtin_prefetch(w + next + R * k + r * L::N, 0, 2);
                wv[r] = L::load(from);
            }
            UNROLL for (int m = 0; m < M; m++) {
                const auto xv = L::load(x + m * K + k + u * L::N);
                UNROLL for (int r = 0; r < R; r++) acc[u][r * M + m] = L::dot(acc[u][r * M + m], wv[r], xv);
            }
        }
    for (; k < K; k += L::N) {
        const int n = std::min<int64_t>(L::N, K - k);
        UNROLL for (int r = 0; r < R; r++) {
            const T* from = w + r * apart * K + k;
            const auto wv = n == L::N ? L::load(from) : L::load_first(from, n);
            UNROLL for (int m = 0; m < M; m++)
                acc[0][r * M + m] = L::dot(acc[0][r * M + m], wv, n == L::N ? L::load(x + m * K + k) : L::load_first(x + m * K + k, n));
        }
    }
    UNROLL for (int u = 1; u < U; u++)
        UNROLL for (int i = 0; i < R * M; i++) acc[0][i] += acc[u][i];
    float sums[16];
    if (R > 2) store16(sums, sums16(sums4(acc[0]), sums4(acc[0] + 4), sums4(acc[0] + 8), sums4(acc[0] + 12)));
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int m = 0; m < M; m++) y[m * N + r * apart] = R > 2 ? sums[r * M + m] : sum(acc[0][r * M + m]);
}

// Four tokens share one pass over the weights: f(first, how many) for 0 .. M.
template <typename F>
INLINE void tiles(int64_t M, F f) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) f(m, std::integral_constant<int, 4>());
    if (M - m == 3) f(m, std::integral_constant<int, 3>());
    else if (M - m == 2) f(m, std::integral_constant<int, 2>());
    else if (M - m == 1) f(m, std::integral_constant<int, 1>());
}

// R neighbouring rows against M tokens
template <typename T, int R>
void dot_tokens(const T* w, const T* x, float* y, int64_t M, int64_t K, int64_t N) {
    tiles(M, [&](int64_t m, auto tokens) __attribute__((always_inline)) {          // the rows are in the cache for the later ones
        dot_rows<T, R, tokens>(w, 1, x + m * K, y + m * N, K, N, m ? 0 : std::max<int64_t>(R * K, 4096));
    });
}

// w [N, K], x [M, K] -> y [M, N], at most 16 tokens. Where x is not small, loading x would take longer than loading w: four neighbouring rows share
// those loads, four tokens at a time, and stay in the cache for the next four.
template <typename T>
void linear_decode(const T* w, const T* x, float* y, int64_t M, int64_t N, int64_t K) {
    share(N, 16, K * sizeof(T), [&](int64_t n, int64_t end) {
        if (M == 1 ? K <= 6144 : M == 2 && K <= 2048) {
            const Halves rows(n, end, true);
            rows.each([&](int64_t n, auto R) __attribute__((always_inline)) {
                if (M == 1) dot_rows<T, R, 1>(w + n * K, rows.apart, x, y + n, K, N);
                else dot_rows<T, R, 2>(w + n * K, rows.apart, x, y + n, K, N);
            });
            n = end;
        }
        for (; n + 4 <= end; n += 4) dot_tokens<T, 4>(w + n * K, x, y + n, M, K, N);
        for (; n < end; n++) dot_tokens<T, 1>(w + n * K, x, y + n, M, K, N);
    });
}

// ---- attention of a few queries over the KV cache

// exp(x) for x <= 0, within 2 ulp: 2^n * polynomial(f), n + f = x * log2(e), |f| <= 1/2.
INLINE f32x16 exp16(f32x16 x) {
    const float round = 12582912.0f;                       // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    f32x16 shifted = x * 1.44269504f + round, n = shifted - round;
    f32x16 f = x - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    f32x16 p = splat(1.98756915e-4f);
    p = p * f + 1.39819995e-3f;
    p = p * f + 8.33345191e-3f;
    p = p * f + 4.16657962e-2f;
    p = p * f + 1.66666657e-1f;
    p = p * f + 0.5f;
    p = p * f * f + f + 1.0f;
    return (f32x16)((i32x16)p + ((i32x16)shifted << 23));
}

constexpr int BLOCK = 256;                                  // cache positions per turn of the online softmax

// The G query heads that share one KV head, S tokens each: R = S * G queries in all, query r belongs to token r / G.
struct Queries {
    int64_t S, G, R, D;
    const int64_t* pos;                                    // [S]
    int64_t window;
    int64_t first(int64_t r) const { return window > 0 ? std::max<int64_t>(0, pos[r / G] - window + 1) : 0; }
    int64_t last(int64_t r) const { return pos[r / G] + 1; }
};

// What is known of the softmax over the positions seen so far: maximum, sum and weighted sum of V for each query.
struct Partial {
    float *max, *total, *acc;                              // [R], [R], [R, D]
    static int64_t size(int64_t R, int64_t D) { return R * (D + 2); }
    Partial(float* p, int64_t R) : max(p), total(p + R), acc(p + 2 * R) {}
};

// out[r, i] = scale * q[r] . k[i] for NR queries and sixteen keys, each D long: in C registers, or in any number of them if C is 0.
template <typename T, int NR, int C>
INLINE void dot16(const T* q, const T* k, int64_t D, float scale, float* out) {
    using L = Lanes<T>;
    typename L::Reg query[NR][C + 1];
    UNROLL for (int r = 0; r < NR; r++)
        UNROLL for (int c = 0; c < C; c++) query[r][c] = L::load(q + r * D + c * L::N);
    f32x16 sums[NR][4];
    UNROLL for (int j = 0; j < 4; j++) {
        f32x16 acc[NR][4] = {};
        UNROLL for (int i = 0; i < 4; i++, k += D) {
            UNROLL for (int c = 0; c < C; c++) {
                const auto key = L::load(k + c * L::N);
                UNROLL for (int r = 0; r < NR; r++) acc[r][i] = L::dot(acc[r][i], key, query[r][c]);
            }
            for (int64_t d = C * L::N; d < D; d += L::N) {
                const int n = std::min<int64_t>(L::N, D - d);
                const auto key = n == L::N ? L::load(k + d) : L::load_first(k + d, n);
                UNROLL for (int r = 0; r < NR; r++)
                    acc[r][i] = L::dot(acc[r][i], key, n == L::N ? L::load(q + r * D + d) : L::load_first(q + r * D + d, n));
            }
        }
        UNROLL for (int r = 0; r < NR; r++) sums[r][j] = sums4(acc[r]);
    }
    UNROLL for (int r = 0; r < NR; r++) store16(out + r * BLOCK, sums16(sums[r][0], sums[r][1], sums[r][2], sums[r][3]) * scale);
}

template <typename T, int NR>
INLINE void dot16(const T* q, const T* k, int64_t D, float scale, float* out) {
    constexpr int N = Lanes<T>::N;
    if (D == 4 * N) dot16<T, NR, 4>(q, k, 4 * N, scale, out);
    else if (D == 2 * N) dot16<T, NR, 2>(q, k, 2 * N, scale, out);
    else dot16<T, NR, 0>(q, k, D, scale, out);
}

template <typename T>
INLINE float dot(const T* a, const T* b, int64_t D) {
    using L = Lanes<T>;
    f32x16 acc[2] = {};
    int64_t d = 0;
    for (; d + 2 * L::N <= D; d += 2 * L::N)
        for (int u = 0; u < 2; u++) acc[u] = L::dot(acc[u], L::load(a + d + u * L::N), L::load(b + d + u * L::N));
    for (; d < D; d += L::N) {
        int n = std::min<int64_t>(L::N, D - d);
        acc[0] = n == L::N ? L::dot(acc[0], L::load(a + d), L::load(b + d)) : L::dot(acc[0], L::load_first(a + d, n), L::load_first(b + d, n));
    }
    return sum(acc[0] + acc[1]);
}

// acc[r, d .. d + 16 * C) = acc * correction[r] + sum over j < n of p[r, j] v[j, d ..], for NR queries
template <typename T, int NR, int C>
INLINE void add_values(float* acc, const float* correction, const float* p, const T* v, int64_t n, int64_t d, int64_t D) {
    f32x16 a[NR][C] = {};
    for (int64_t j = 0; j < n; j++) {
        f32x16 vj[C];
        UNROLL for (int c = 0; c < C; c++) vj[c] = load16(v + j * D + d + 16 * c);
        UNROLL for (int r = 0; r < NR; r++) {
            const f32x16 weight = splat(p[r * BLOCK + j]);
            UNROLL for (int c = 0; c < C; c++) a[r][c] += weight * vj[c];
        }
    }
    UNROLL for (int r = 0; r < NR; r++)
        UNROLL for (int c = 0; c < C; c++) {
            float* to = acc + r * D + d + 16 * c;
            store16(to, load16(to) * correction[r] + a[r][c]);
        }
}

#ifdef __AVX512BF16__
// The same for an even C, two positions in one product: their values are interleaved, their weights are rounded to bf16.
template <int NR, int C>
INLINE void add_values(float* acc, const float* correction, const float* p, const BFloat16* v, int64_t n, int64_t d, int64_t D) {
    static_assert(C % 2 == 0);
    uint32_t weights[NR][BLOCK / 2];
    UNROLL for (int r = 0; r < NR; r++)
        for (int64_t j = 0; j < n; j += 32) {
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + r * BLOCK + j + 16), _mm512_loadu_ps(p + r * BLOCK + j));
            std::memcpy(weights[r] + j / 2, &both, sizeof both);
        }
    f32x16 a[NR][C] = {};
    for (int64_t j = 0; j < n; j += 2) {
        const BFloat16 *one = v + j * D + d, *other = j + 1 < n ? one + D : one;             // whose weight is 0 then
        UNROLL for (int c = 0; c < C; c += 2) {
            const __m512i x = _mm512_loadu_si512(one + 16 * c), y = _mm512_loadu_si512(other + 16 * c);
            const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
            UNROLL for (int r = 0; r < NR; r++) {
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[r][j / 2]);
                a[r][c] = (f32x16)_mm512_dpbf16_ps((__m512)a[r][c], (__m512bh)low, weight);
                a[r][c + 1] = (f32x16)_mm512_dpbf16_ps((__m512)a[r][c + 1], (__m512bh)high, weight);
            }
        }
    }
    // low holds the values 0 .. 3 of every eight, high the others
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    UNROLL for (int r = 0; r < NR; r++)
        UNROLL for (int c = 0; c < C; c += 2) {
            float* to = acc + r * D + d + 16 * c;
            const auto low = (__m512)a[r][c], high = (__m512)a[r][c + 1];
            store16(to, load16(to) * correction[r] + (f32x16)_mm512_permutex2var_ps(low, first, high));
            store16(to + 16, load16(to + 16) * correction[r] + (f32x16)_mm512_permutex2var_ps(low, second, high));
        }
}
#endif

template <typename T, int NR>
INLINE void add_values(float* acc, const float* correction, const float* p, const T* v, int64_t n, int64_t D) {
    constexpr int C = NR > 2 ? 4 : 8;                      // so that the sums stay in registers
    int64_t d = 0;
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, BFloat16>) {
        for (; d + 16 * C <= D; d += 16 * C) add_values<NR, C>(acc, correction, p, v, n, d, D);
        for (; d + 32 <= D; d += 32) add_values<NR, 2>(acc, correction, p, v, n, d, D);
    }
#endif
    for (; d + 64 <= D; d += 64) add_values<T, NR, 4>(acc, correction, p, v, n, d, D);
    for (; d < D; d += 16) add_values<T, NR, 1>(acc, correction, p, v, n, d, D);
}

// Attention over positions begin .. end of one KV head. q [R, D], keys and values [T, D], scores: scratch [R, BLOCK + 1].
template <typename T>
void attend_range(const Queries& a, const T* q, const T* keys, const T* values, int64_t begin, int64_t end, float* scores, Partial out) {
    const int64_t R = a.R, D = a.D;
    const float scale = 1.0f / std::sqrt((float)D);
    float* correction = scores + R * BLOCK;
    std::fill_n(out.max, R, -std::numeric_limits<float>::infinity());
    std::fill_n(out.total, R, 0.0f);
    std::fill_n(out.acc, R * D, 0.0f);
    for (int64_t t = begin; t < end; t += BLOCK) {
        const int64_t n = std::min<int64_t>(BLOCK, end - t);
        const T *k = keys + t * D, *v = values + t * D;
        int64_t j = 0, r = 0;
        for (; j + 16 <= n; j += 16) {
            for (r = 0; r + 2 <= R; r += 2) dot16<T, 2>(q + r * D, k + j * D, D, scale, scores + r * BLOCK + j);
            for (; r < R; r++) dot16<T, 1>(q + r * D, k + j * D, D, scale, scores + r * BLOCK + j);
        }
        for (; j < n; j++)
            for (r = 0; r < R; r++) scores[r * BLOCK + j] = dot(q + r * D, k + j * D, D) * scale;
        for (r = 0; r < R; r++) {
            float* s = scores + r * BLOCK;
            const int64_t from = std::clamp<int64_t>(a.first(r) - t, 0, n), to = std::clamp<int64_t>(a.last(r) - t, from, n);
            std::fill(s, s + from, -std::numeric_limits<float>::infinity());
            std::fill(s + to, s + (n + 31) / 32 * 32, -std::numeric_limits<float>::infinity());
            correction[r] = 1.0f;
            if (from == to) {
                std::fill_n(s, (n + 31) / 32 * 32, 0.0f);
                continue;
            }
            f32x16 highs = load16(s), total = {};
            for (int64_t i = 16; i < n; i += 16) highs = max16(highs, load16(s + i));
            const float high = std::max(out.max[r], highest(highs));
            for (int64_t i = 0; i < n; i += 16) {
                f32x16 x = load16(s + i) - high, e = exp16(x);
                e = x < splat(-87.0f) ? f32x16{} : e;
                total += e;
                store16(s + i, e);
            }
            correction[r] = std::exp(out.max[r] - high);
            out.total[r] = out.total[r] * correction[r] + sum(total);
            out.max[r] = high;
        }
        for (r = 0; r + 4 <= R; r += 4) add_values<T, 4>(out.acc + r * D, correction + r, scores + r * BLOCK, v, n, D);
        for (; r + 2 <= R; r += 2) add_values<T, 2>(out.acc + r * D, correction + r, scores + r * BLOCK, v, n, D);
        for (; r < R; r++) add_values<T, 1>(out.acc + r * D, correction + r, scores + r * BLOCK, v, n, D);
    }
}

// Positions of S tokens in B rows: int64 [B, S], or [S] for all rows.
struct Positions {
    const int64_t* first;
    int64_t S, rows, stride;
    explicit Positions(const Tensor& t)
        : first(t.const_data_ptr<int64_t>()), S(t.size(-1)), rows(t.numel() / std::max<int64_t>(S, 1)), stride(rows > 1 ? S : 0) {}
    const int64_t* row(int64_t b) const { return first + b * stride; }
    void check(int64_t B, int64_t slots) const {
        TORCH_CHECK(rows == 1 || rows == B, "positions of ", rows, " rows for ", B);
        for (int64_t b = 0; b < B; b++)
            for (int64_t s = 0; s < S; s++)
                TORCH_CHECK(row(b)[s] >= 0 && row(b)[s] < slots, "position ", row(b)[s], " is outside the cache of ", slots);
    }
};

void check_caches(const Tensor& k_cache, const Tensor& v_cache, at::ScalarType dtype) {
    TORCH_CHECK(k_cache.dim() == 4 && k_cache.sizes() == v_cache.sizes() && k_cache.is_contiguous() && v_cache.is_contiguous() &&
                k_cache.size(3) % 16 == 0 && k_cache.size(3) <= MAX_HEAD && k_cache.scalar_type() == dtype && v_cache.scalar_type() == dtype,
                "caches of ", k_cache.sizes(), " ", k_cache.scalar_type(), " and ", v_cache.sizes(), " ", v_cache.scalar_type(), " for ", dtype);
}

// q [B, S, H, D], caches [B, K, T, D] -> y [B, S, H, D]
template <typename T, typename Y>
void attend_heads(const T* q, const Tensor& k_cache, const Tensor& v_cache, int64_t H, const Positions& pos, int64_t window, Y* y) {
    const int64_t B = k_cache.size(0), S = pos.S, D = k_cache.size(3), K = k_cache.size(1), G = H / K, threads = at::get_num_threads();
    const T *kp = k_cache.const_data_ptr<T>(), *vp = v_cache.const_data_ptr<T>();
    // A job is a KV head with a tile of tokens. When there are fewer jobs than threads can share evenly, the positions are split as well.
    const int64_t tile = std::min(S, std::max<int64_t>(1, 64 / G)), tiles = (S + tile - 1) / tile, R = tile * G, jobs = B * K * tiles;
    const int64_t longest = *std::max_element(pos.first, pos.first + (pos.stride ? B * S : S)) + 1;
    const int64_t splits = jobs % threads == 0 || jobs >= 8 * threads ? 1
        : std::clamp<int64_t>((4 * threads + jobs - 1) / jobs, 1, std::max<int64_t>(1, longest / 128));
    const int64_t partial_size = Partial::size(R, D);
    const std::unique_ptr<float[]> partials(new float[jobs * splits * partial_size]);
    struct Job {
        int64_t head, b, first, tokens;
    };
    const auto job = [&](int64_t i) { return Job{i / tiles, i / tiles / K, i % tiles * tile, std::min(tile, S - i % tiles * tile)}; };
    const auto row = [&](const Job& j, int64_t r) { return ((j.b * S + j.first + r / G) * H + j.head % K * G + r % G) * D; };      // in q and y
    const auto part = [&](int64_t i, int64_t split) { return Partial(partials.get() + (i * splits + split) * partial_size, R); };
#pragma omp parallel num_threads(threads) if (longest * B * K * S * G * D > (1 << 15))
    {
        std::vector<float> scores(R * (BLOCK + 1));
        std::vector<T> queries(R * D);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < jobs * splits; unit++) {
            const Job j = job(unit / splits);
            const Queries a{j.tokens, G, j.tokens * G, D, pos.row(j.b) + j.first, window};
            const auto [low, high] = std::minmax_element(a.pos, a.pos + a.S);
            const int64_t least = window > 0 ? std::max<int64_t>(0, *low - window + 1) : 0, length = (*high + splits - least) / splits;
            const int64_t begin = least + unit % splits * length, end = std::min(*high + 1, begin + length);
            for (int64_t r = 0; r < a.R; r += G) std::copy_n(q + row(j, r), G * D, queries.data() + r * D);
            attend_range<T>(a, queries.data(), kp + j.head * k_cache.stride(1), vp + j.head * v_cache.stride(1), begin, end, scores.data(),
                            part(unit / splits, unit % splits));
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < jobs; i++) {
            const Job j = job(i);
            for (int64_t r = 0; r < j.tokens * G; r++) {
                float high = -std::numeric_limits<float>::infinity(), total = 0;
                for (int64_t split = 0; split < splits; split++) high = std::max(high, part(i, split).max[r]);
                float* sum = part(i, 0).acc + r * D;
                for (int64_t split = 0; split < splits; split++) {
                    const Partial p = part(i, split);
                    const float weight = std::exp(p.max[r] - high);
                    total += p.total[r] * weight;
                    for (int64_t d = 0; d < D; d++) sum[d] = p.acc[r * D + d] * weight + (split ? sum[d] : 0.0f);
                }
                for (int64_t d = 0; d < D; d += 16) store16(y + row(j, r) + d, load16(sum + d) * (1 / total));
            }
        }
    }
}

// q [B, S, H, D], caches [B, K, T, D], input_pos int64 [S] or [B, S], window 0 = none -> [B, S, H * D]
Tensor attend(const Tensor& q_, const Tensor& k_cache, const Tensor& v_cache, const Tensor& input_pos_, int64_t window) {
    check_caches(k_cache, v_cache, q_.scalar_type());
    TORCH_CHECK(q_.dim() == 4 && q_.size(0) == k_cache.size(0) && q_.size(3) == k_cache.size(3) && q_.size(2) % k_cache.size(1) == 0 &&
                input_pos_.scalar_type() == at::kLong && input_pos_.size(-1) == q_.size(1),
                "attend: q ", q_.sizes(), ", cache ", k_cache.sizes(), ", input_pos ", input_pos_.sizes());
    const auto q = q_.contiguous(), input_pos = input_pos_.contiguous();
    const Positions pos(input_pos);
    pos.check(q.size(0), k_cache.size(2));
    auto out = at::empty({q.size(0), q.size(1), q.size(2) * q.size(3)}, q.options());
    by_dtype(q, [&](auto zero) {
        using T = decltype(zero);
        attend_heads<T>(q.const_data_ptr<T>(), k_cache, v_cache, q.size(2), pos, window, out.mutable_data_ptr<T>());
    });
    return out;
}

// ---- int8 and int4 weights
//
// With VNNI the activations are rounded to int8 in groups along k, each with a scale of its own, and the products are summed as integers.
// Without it, or where `exact` is asked for, the weights are converted to fp32 on their way.

#ifdef __AVX512VNNI__
constexpr bool HAVE_VNNI = true;
#else
constexpr bool HAVE_VNNI = false;
#endif

// M tokens of x in fp32, each padded with zeros, and rounded to integers of type Q: x[k] ~ scale * q[k], one scale per G values of k.
template <typename Q>
struct Activations {
    int64_t padded, groups;                                // lengths of one token's rows
    std::vector<float> x, scale, sums;                     // sums: of the (rounded) x over each group
    std::vector<Q> q;

    Activations(const float* source, int64_t M, int64_t K, int64_t padded_, int64_t G, bool round)
        : padded(padded_), groups(padded / G), x(M * padded), scale(M * groups, 1.0f), sums(M * groups), q(round ? M * padded : 0) {
        typedef Q Q16 __attribute__((vector_size(16 * sizeof(Q))));
        constexpr float most = sizeof(Q) == 1 ? 127.0f : 32639.0f;         // whose upper byte is 127 and lower byte 127
        for (int64_t m = 0; m < M; m++) std::copy_n(source + m * K, K, x.data() + m * padded);
        for (int64_t i = 0; i < M * groups; i++) {
            const float* from = x.data() + i * G;
            f32x16 high = {}, total = {};
            for (int64_t j = 0; j < G; j += 16) {
                const f32x16 v = load16(from + j);
                high = max16(high, max16(v, -v));
                total += v;
            }
            if (round) {
                const float magic = 12582912.0f;           // 1.5 * 2^23: adding it rounds to an integer
                const float top = highest(high), inverse = top > 1e-30f ? most / top : 0.0f;          // less is rounded to 0
                total = f32x16{};
                for (int64_t j = 0; j < G; j += 16) {
                    const f32x16 shifted = load16(from + j) * inverse + magic;
                    const Q16 low = __builtin_convertvector((i32x16)shifted, Q16);                  // the bits that are the integer
                    std::memcpy(q.data() + i * G + j, &low, sizeof low);
                    total += shifted - magic;
                }
                scale[i] = top / most;
            }
            sums[i] = sum(total) * scale[i];
        }
    }
};

// ---- int8: w [N, K] as stored, y[m, n] = scale[n] * sum_k w[n, k] x[m, k]

// The activations are rounded to 16 bits, so that next to nothing of them is lost, and each is multiplied as two bytes, 256 * upper + lower.
// dpbusd wants one side unsigned: w + 128 stands in for w, and the caller takes 128 * sum(x) off again.
constexpr int G8 = 256;                                    // activations to a scale

// For every 64 activations their upper, then their lower bytes, each from -128 to 127
inline std::vector<int8_t> in_bytes(const std::vector<int16_t>& q) {
    std::vector<int8_t> bytes(2 * q.size());
    for (size_t i = 0; i < q.size(); i++) {
        const int upper = (q[i] + 128) >> 8;
        int8_t* to = bytes.data() + i / 64 * 128 + i % 64;
        to[0] = upper, to[64] = q[i] - 256 * upper;
    }
    return bytes;
}

// out[r * M + m] for R rows, `apart` rows from one another
template <int R, int M, bool exact>
INLINE void int8_rows(const int8_t* w, int64_t apart, const Activations<int16_t>& a, const int8_t* bytes, int64_t first, int64_t K, float* out) {
    f32x16 acc[R * M] = {};
    int64_t k = 0;
#ifdef __AVX512VNNI__
    if constexpr (!exact) {
        const __m512i flip = _mm512_set1_epi8((char)0x80);
        const int8_t* q = bytes + first * 2 * a.padded;
        for (int64_t g = 0; k < K; g++) {
            __m512i upper[R * M] = {}, lower[R * M] = {};
            const auto add = [&](auto load, int64_t at) __attribute__((always_inline)) {
                UNROLL for (int r = 0; r < R; r++) {
                    const int8_t* from = w + r * apart * K + at;
                    __builtin_prefetch(from + (M <= 2 ? AHEAD : FAR_AHEAD), 0, 2);
                    const __m512i wv = _mm512_xor_si512(load(from), flip);
                    UNROLL for (int m = 0; m < M; m++) {
                        const int i = r * M + m;
                        upper[i] = _mm512_dpbusd_epi32(upper[i], wv, _mm512_loadu_si512(q + 2 * (m * a.padded + at)));
                        lower[i] = _mm512_dpbusd_epi32(lower[i], wv, _mm512_loadu_si512(q + 2 * (m * a.padded + at) + 64));
                    }
                }
            };
            if (k + G8 <= K)
                UNROLL for (int i = 0; i < G8; i += 64) add([](const int8_t* from) { return _mm512_loadu_si512(from); }, k + i);
            else
                for (int64_t i = k; i < K; i += 64)
                    add([&](const int8_t* from) { return _mm512_maskz_loadu_epi8(i + 64 <= K ? ~0ull : (1ull << (K - i)) - 1, from); }, i);
            k = std::min<int64_t>(K, k + G8);
            UNROLL for (int i = 0; i < R * M; i++) {
                const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(upper[i], 8), lower[i]);
                acc[i] += (f32x16)_mm512_cvtepi32_ps(both) * a.scale[(first + i % M) * a.groups + g];
            }
        }
    }
#endif
    for (; k + 16 <= K; k += 16)
        UNROLL for (int r = 0; r < R; r++) {
            const f32x16 wv = load16(w + r * apart * K + k);
            UNROLL for (int m = 0; m < M; m++) acc[r * M + m] += wv * load16(a.x.data() + (first + m) * a.padded + k);
        }
    UNROLL for (int i = 0; i < R * M; i++) {
        out[i] = sum(acc[i]);
        for (int64_t j = k; j < K; j++) out[i] += w[i / M * apart * K + j] * a.x[(first + i % M) * a.padded + j];
    }
}

template <bool exact>
void int8_decode(const int8_t* w, const float* scales, const float* x, float* y, int64_t M, int64_t N, int64_t K) {
    const Activations<int16_t> a(x, M, K, (K + G8 - 1) / G8 * G8, G8, !exact);
    const auto bytes = in_bytes(a.q);
    float offset[MAX_TOKENS] = {};
    if (!exact)
        for (int64_t i = 0; i < M * a.groups; i++) offset[i / a.groups] += 128.0f * a.sums[i];
    share(N, 16, K, [&](int64_t begin, int64_t end) {
        const Halves rows(begin, end, M <= 2 || M > 4);    // a second tile finds them in the cache
        rows.each([&](int64_t n, auto R) __attribute__((always_inline)) {
            tiles(M, [&](int64_t first, auto tokens) __attribute__((always_inline)) {
                float out[R * tokens];
                int8_rows<R, tokens, exact>(w + n * K, rows.apart, a, bytes.data(), first, K, out);
                UNROLL for (int i = 0; i < R * tokens; i++) {
                    const int64_t row = n + i / tokens * rows.apart, m = first + i % tokens;
                    y[m * N + row] = (out[i] - offset[m]) * scales[row];
                }
            });
        });
    });
}

// Many tokens: a part of the weights at a time is converted, small enough for the cache, and multiplied by PyTorch.
constexpr int64_t PART = 1 << 21;

// x [M, K], weight int8 [N, K] -> y [M, N]
template <typename T>
void int8_prefill(const Tensor& x, const Tensor& weight, const Tensor& scale, Tensor& y) {
    const int64_t M = x.size(0), N = weight.size(0), K = weight.size(1), step = std::max<int64_t>(64, PART / std::max<int64_t>(K, 1));
    const int8_t* w = weight.const_data_ptr<int8_t>();
    const float* scales = scale.const_data_ptr<float>();
    auto part = at::empty({std::min(step, N), K}, x.options());
    T *to = part.mutable_data_ptr<T>(), *yp = y.mutable_data_ptr<T>();
    for (int64_t n = 0; n < N; n += step) {
        const int64_t rows = std::min(step, N - n);
#pragma omp parallel for num_threads(at::get_num_threads())
        for (int64_t i = 0; i < rows; i++) convert(w + (n + i) * K, to + i * K, K);
        const auto products = at::mm(x, part.narrow(0, 0, rows).t());
        const T* p = products.const_data_ptr<T>();
#pragma omp parallel for num_threads(at::get_num_threads())
        for (int64_t m = 0; m < M; m++) {
            int64_t i = 0;
            for (; i + 16 <= rows; i += 16) store16(yp + m * N + n + i, load16(p + m * rows + i) * load16(scales + n + i));
            for (; i < rows; i++) yp[m * N + n + i] = (float)p[m * rows + i] * scales[n + i];
        }
    }
}

// ---- int4: w[n, k] = scale[n, k / G] * (q[n, k] - zero[n, k / G] / 16), packed in blocks of 16 rows
//
// packed [N / 16, K / 32, 4, 16, 4]: for 32 values of k four registers, each of which holds 8 of them for 16 rows. A byte is two values of q:
// register j, row r, byte b holds k = 8 j + b in its lower half and k = 8 j + 4 + b in its upper half. scales, zeros [N / 16, K / G, 16].

constexpr int G4 = 32;                                     // activations to a scale
constexpr int ROWS = 16;

struct Int4 {
    const uint8_t* packed;
    const BFloat16* scales;
    const uint8_t* zeros;
    int64_t groups, per;                                   // groups of G along k, and how many times 32 values are in one
    int64_t units() const { return groups * per; }
};

// R blocks of sixteen rows, `apart` blocks from one another, against M tokens: out[r * M + m]
template <int R, int M, bool exact>
INLINE void int4_blocks(const Int4& w, int64_t block, int64_t apart, const Activations<int8_t>& a, int64_t first, f32x16* out) {
    const uint8_t* p = w.packed + block * w.units() * 256;
    const int64_t stride = apart * w.units() * 256;
    typedef int32_t Four __attribute__((may_alias));       // four int8 in one
    const Four* fours = (const Four*)(a.q.data() + first * a.padded);
    const float *steps = a.scale.data() + first * a.groups, *sums = a.sums.data() + first * a.groups;
    f32x16 acc[R * M] = {};
    for (int64_t g = 0; g < w.groups; g++) {
        f32x16 scale[R], zero[R];
        UNROLL for (int r = 0; r < R; r++) {
            const int64_t at = ((block + r * apart) * w.groups + g) * ROWS;
            scale[r] = load16(w.scales + at);
            zero[r] = load16(w.zeros + at) * (1.0f / 16);
        }
        for (int64_t unit = g * w.per; unit < (g + 1) * w.per; unit++, p += 256) {
            f32x16 dots[R * M] = {};
#ifdef __AVX512VNNI__
            if constexpr (!exact) {
                const __m512i low = _mm512_set1_epi8(15);
                __m512i whole[R * M][2];
                UNROLL for (int i = 0; i < R * M; i++) whole[i][0] = whole[i][1] = _mm512_setzero_si512();
                UNROLL for (int j = 0; j < 4; j++)
                    UNROLL for (int r = 0; r < R; r++) {
                        const uint8_t* from = p + r * stride + 64 * j;
                        __builtin_prefetch(from + (M <= 2 ? AHEAD : FAR_AHEAD), 0, 2);
                        const __m512i both = _mm512_loadu_si512(from);
                        const __m512i lower = _mm512_and_si512(both, low), upper = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
                        UNROLL for (int m = 0; m < M; m++) {
                            const Four* q = fours + m * (a.padded / 4) + unit * (G4 / 4) + 2 * j;
                            whole[r * M + m][0] = _mm512_dpbusd_epi32(whole[r * M + m][0], lower, _mm512_set1_epi32(q[0]));
                            whole[r * M + m][1] = _mm512_dpbusd_epi32(whole[r * M + m][1], upper, _mm512_set1_epi32(q[1]));
                        }
                    }
                UNROLL for (int i = 0; i < R * M; i++) dots[i] = (f32x16)_mm512_cvtepi32_ps(_mm512_add_epi32(whole[i][0], whole[i][1]));
            }
#endif
            if constexpr (exact)
                for (int j = 0; j < 4; j++)
                    UNROLL for (int r = 0; r < R; r++) {
                        u32x16 eight;
                        std::memcpy(&eight, p + r * stride + 64 * j, sizeof eight);
                        UNROLL for (int i = 0; i < 8; i++) {       // lower halves of bytes 0 .. 3, then the upper ones
                            const f32x16 q = __builtin_convertvector((i32x16)((eight >> (i < 4 ? 8 * i : 8 * (i - 4) + 4)) & 15), f32x16);
                            UNROLL for (int m = 0; m < M; m++) dots[r * M + m] += q * a.x[(first + m) * a.padded + unit * G4 + 8 * j + i];
                        }
                    }
            UNROLL for (int i = 0; i < R * M; i++) {
                const int64_t at = i % M * a.groups + unit;
                acc[i] += scale[i / M] * (dots[i] * steps[at] - zero[i / M] * sums[at]);
            }
        }
    }
    UNROLL for (int i = 0; i < R * M; i++) out[i] = acc[i];
}

template <bool exact>
void int4_decode(const Int4& w, const float* x, float* y, int64_t M, int64_t N, int64_t K) {
    const int64_t blocks = (N + ROWS - 1) / ROWS;
    const Activations<int8_t> a(x, M, K, w.units() * G4, G4, !exact);
    share(blocks, 2, w.units() * 256, [&](int64_t begin, int64_t end) {
        const Halves halves(begin, end, M <= 2);
        halves.each([&](int64_t block, auto R) __attribute__((always_inline)) {
            tiles(M, [&](int64_t first, auto tokens) __attribute__((always_inline)) {
                f32x16 out[R * tokens];
                int4_blocks<R, tokens, exact>(w, block, halves.apart, a, first, out);
                UNROLL for (int i = 0; i < R * tokens; i++) {
                    const int64_t n = (block + i / tokens * halves.apart) * ROWS;
                    float* to = y + (first + i % tokens) * N + n;
                    if (n + ROWS <= N) store16(to, out[i]);
                    else
                        for (int64_t row = 0; row < N - n; row++) to[row] = out[i][row];
                }
            });
        });
    });
}

// Many tokens, as for int8. The part is written as [K, rows]: the sixteen rows of a block lie side by side.
template <typename T>
void int4_prefill(const Tensor& x_, const Int4& w, Tensor& y) {
    const int64_t N = y.size(1), K = x_.size(1), padded = w.units() * G4;
    const int64_t step = std::max<int64_t>(64, PART / padded / 64 * 64);
    auto part = at::empty({padded, std::min(step, (N + ROWS - 1) / ROWS * ROWS)}, x_.options());
    const int64_t width = part.size(1);
    for (int64_t n = 0; n < N; n += step) {
        const int64_t rows = std::min(step, N - n);
        T* to = part.mutable_data_ptr<T>();
#pragma omp parallel for num_threads(at::get_num_threads())
        for (int64_t r = 0; r < rows; r += ROWS) {
            const int64_t block = (n + r) / ROWS;
            for (int64_t unit = 0; unit < w.units(); unit++) {
                const int64_t g = block * w.groups + unit / w.per;
                const f32x16 scale = load16(w.scales + g * ROWS), zero = load16(w.zeros + g * ROWS) * (1.0f / 16);
                for (int j = 0; j < 4; j++) {
                    u32x16 eight;
                    std::memcpy(&eight, w.packed + (block * w.units() + unit) * 256 + 64 * j, sizeof eight);
                    UNROLL for (int i = 0; i < 8; i++) {
                        const f32x16 q = __builtin_convertvector((i32x16)((eight >> (i < 4 ? 8 * i : 8 * (i - 4) + 4)) & 15), f32x16);
                        store16(to + (unit * G4 + 8 * j + i) * width + r, scale * (q - zero));
                    }
                }
            }
        }
        y.narrow(1, n, rows).copy_(at::mm(x_, part.narrow(0, 0, K).narrow(1, 0, rows)));
    }
}

// ---- linears of every kind
//
// The tensors of one linear stand in a list: [weight], int8 [weight, scales fp32] or int4 [packed, scales, zeros]; then its bias, if it has one.

struct Linear {
    Tensor weight, scales, zeros, bias;
    int64_t N, K;

    // dtype: of the activations, and of weights that are not quantized
    Linear(at::TensorList parts, int64_t N_, int64_t K_, at::ScalarType dtype) : N(N_), K(K_) {
        const size_t own = parts.empty() ? 0 : is(parts[0], at::kByte) ? 3 : is(parts[0], at::kChar) ? 2 : 1;
        TORCH_CHECK(own && (parts.size() == own || parts.size() == own + 1), "a linear of ", parts.size(), " tensors");
        weight = parts[0];
        if (own > 1) scales = parts[1];
        if (own > 2) zeros = parts[2];
        if (parts.size() > own) bias = parts[own];
        bool fits = !bias.defined() || (is(bias, dtype) && bias.numel() == N);
        for (const auto& part : parts) fits = fits && part.is_contiguous();
        if (own == 1) fits = fits && weight.dim() == 2 && is(weight, dtype) && weight.size(0) == N && weight.size(1) == K;
        if (own == 2) fits = fits && weight.dim() == 2 && is(scales, at::kFloat) && scales.numel() == N && weight.size(0) == N && weight.size(1) == K;
        if (own == 3)                                      // G = 32 * (K / 32) / (K / G), with K padded to a multiple of G
            fits = fits && weight.dim() == 5 && scales.dim() == 3 && is(scales, at::kBFloat16) && is(zeros, at::kByte) &&
                   zeros.sizes() == scales.sizes() && weight.size(0) == (N + ROWS - 1) / ROWS && scales.size(0) == weight.size(0) && scales.size(1) > 0 &&
                   weight.size(1) % scales.size(1) == 0 && K <= weight.size(1) * G4 && K > weight.size(1) * G4 - weight.size(1) / scales.size(1) * G4;
        TORCH_CHECK(fits, "linear [", N, ", ", K, "] for ", dtype, ": weight ", weight.sizes(), " ", weight.scalar_type());
    }
    static bool is(const Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype; }
    Int4 int4() const {
        return {weight.const_data_ptr<uint8_t>(), scales.const_data_ptr<BFloat16>(), zeros.const_data_ptr<uint8_t>(), scales.size(1),
                weight.size(1) / scales.size(1)};
    }

    // x [M, K] -> y [M, N], at most 16 tokens
    void decode(const float* x, float* y, int64_t M, bool exact) const {
        exact = exact || !HAVE_VNNI;
        if (is(weight, at::kByte)) (exact ? int4_decode<true> : int4_decode<false>)(int4(), x, y, M, N, K);
        else if (is(weight, at::kChar))
            (exact ? int8_decode<true> : int8_decode<false>)(weight.const_data_ptr<int8_t>(), scales.const_data_ptr<float>(), x, y, M, N, K);
        else if (is(weight, at::kFloat)) linear_decode(weight.const_data_ptr<float>(), x, y, M, N, K);
        else {
            std::vector<BFloat16> rounded(M * K);
            convert(x, rounded.data(), M * K);
            linear_decode(weight.const_data_ptr<BFloat16>(), rounded.data(), y, M, N, K);
        }
        if (bias.defined())
            by_dtype(bias, [&](auto zero) {
                const auto* b = bias.const_data_ptr<decltype(zero)>();
                for (int64_t m = 0; m < M; m++)
                    for (int64_t n = 0; n < N; n++) y[m * N + n] += (float)b[n];
            });
    }

    // The same for any number of tokens, by PyTorch's products
    template <typename T>
    Tensor prefill(const Tensor& x) const {
        auto y = scales.defined() ? at::empty({x.size(0), N}, x.options()) : at::mm(x, weight.t());
        if (zeros.defined()) int4_prefill<T>(x, int4(), y);
        else if (scales.defined()) int8_prefill<T>(x, weight, scales, y);
        return bias.defined() ? y.add_(bias) : y;
    }
};

// x [..., K] -> [..., N]
Tensor linear(const Tensor& x_, at::TensorList parts, int64_t N, bool exact) {
    const int64_t K = x_.size(-1);
    const Linear linear(parts, N, K, x_.scalar_type());
    auto sizes = x_.sizes().vec();
    sizes.back() = N;
    const auto x = x_.reshape({-1, K}).contiguous();
    const int64_t M = x.size(0);
    Tensor y;
    by_dtype(x, [&](auto zero) {
        using T = decltype(zero);
        if (M > MAX_TOKENS) y = linear.prefill<T>(x);
        else {
            std::vector<float> from(M * K);
            convert(x.const_data_ptr<T>(), from.data(), M * K);
            y = at::empty({M, N}, x.options().dtype(at::kFloat));
            if (M > 0) linear.decode(from.data(), y.mutable_data_ptr<float>(), M, exact);
            y = y.to(x.scalar_type());
        }
    });
    return y.view(sizes);
}

// ---- a stack of transformer blocks: between the matrices there is too little work to be worth operators of its own
//
// Up to 16 tokens go through the decoding kernels, and what passes between the matrices stays in fp32 (type U); more go through PyTorch's
// products, in the model's own type T.

// x [C] -> x / RMS(x) * weight
template <typename X, typename T, typename U>
INLINE void rms_norm(const X* x, const T* weight, U* y, int64_t C, float eps) {
    float squares = 0;
    int64_t c = 0;
    f32x16 sums = {};
    for (; c + 16 <= C; c += 16) sums += load16(x + c) * load16(x + c);
    for (; c < C; c++) squares += (float)x[c] * (float)x[c];
    const float scale = 1.0f / std::sqrt((squares + sum(sums)) / C + eps);
    for (c = 0; c + 16 <= C; c += 16) store16(y + c, load16(x + c) * scale * load16(weight + c));
    for (; c < C; c++) y[c] = (float)x[c] * scale * (float)weight[c];
}

// One head x [D] of one token: norm, if there is one, and half-split RoPE by cos, sin [D]. -> out, times scale
template <typename U, typename T>
INLINE void finish_head(const U* x, const T* norm, float eps, const float* cos, const float* sin, float scale, T* out, int64_t D) {
    float even[MAX_HEAD], turned[MAX_HEAD];
    if (norm) rms_norm(x, norm, even, D, eps);
    else convert(x, even, D);
    const int64_t half = D / 2;
    for (int64_t d = 0; d < half; d++) {
        turned[d] = (even[d] * cos[d] - even[half + d] * sin[d]) * scale;
        turned[half + d] = (even[half + d] * cos[half + d] + even[d] * sin[half + d]) * scale;
    }
    convert(turned, out, D);
}

struct Block {
    Tensor attention_norm, q_norm, k_norm, ffn_norm, k_cache, v_cache;     // q_norm and k_norm: both or neither
    Linear wqkv, wo, w13, w2;
    int64_t window;
};

// All blocks, checked once. It lives in the memory of a tensor, which the program holds and hands to every call: so torch.compile sees one tensor
// instead of the hundreds in it, and takes that much less time.
struct Stack {
    const Stack* self = this;                              // is not, in a copy of that tensor
    std::vector<Block> blocks;
    at::ScalarType dtype;
    int64_t H;
    float eps;
    bool exact;
};

// What all layers of one call share. cos, sin [M, D]; logn [M] or null.
template <typename T, typename U>
struct Step {
    const Stack& stack;
    int64_t S, C, M;
    const float *cos, *sin, *logn;
    Positions pos;
    T* x;                                                  // [M, C], in and out

    // f(m) for every token
    template <typename F_>
    void each(F_ f) const {
#pragma omp parallel for num_threads(at::get_num_threads()) if (M > MAX_TOKENS)
        for (int64_t m = 0; m < M; m++) f(m);
    }
    Tensor empty(int64_t width) const { return at::empty({M, width}, at::TensorOptions().dtype(c10::CppTypeToScalarType<U>::value)); }
    Tensor multiply(const Linear& linear, const Tensor& h) const {
        if (M > MAX_TOKENS) return linear.prefill<T>(h);
        Tensor y = empty(linear.N);
        if constexpr (std::is_same_v<U, float>) linear.decode(h.const_data_ptr<float>(), y.mutable_data_ptr<float>(), M, stack.exact);
        return y;
    }
    Tensor normed(const Tensor& norm) const {
        Tensor h = empty(C);
        U* to = h.mutable_data_ptr<U>();
        const T* weight = norm.const_data_ptr<T>();
        each([&](int64_t m) { rms_norm(x + m * C, weight, to + m * C, C, stack.eps); });
        return h;
    }
    void add(const Tensor& y) const {
        const U* from = y.const_data_ptr<U>();
        each([&](int64_t m) {
            int64_t i = m * C;
            for (; i + 16 <= (m + 1) * C; i += 16) store16(x + i, load16(x + i) + load16(from + i));
            for (; i < (m + 1) * C; i++) x[i] = (float)x[i] + (float)from[i];
        });
    }
};

template <typename T>
const T* values(const Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; }

// x += wo(attention(wqkv(norm(x)))); keys and values are written to the caches.
template <typename T, typename U>
void attention(const Step<T, U>& step, const Block& block) {
    const float eps = step.stack.eps;
    const int64_t H = step.stack.H, K = block.k_cache.size(1), slots = block.k_cache.size(2), D = block.k_cache.size(3);
    const Tensor qkv = step.multiply(block.wqkv, step.normed(block.attention_norm));
    Tensor queries = at::empty({step.M, H * D}, block.k_cache.options()), y = step.empty(H * D);
    const U* from = qkv.const_data_ptr<U>();
    const T *q_norm = values<T>(block.q_norm), *k_norm = values<T>(block.k_norm);
    T *q = queries.mutable_data_ptr<T>(), *k = block.k_cache.mutable_data_ptr<T>(), *v = block.v_cache.mutable_data_ptr<T>();
    step.each([&](int64_t m) {
        const int64_t b = m / step.S, slot = step.pos.row(b)[m % step.S];
        const float *cos = step.cos + m * D, *sin = step.sin + m * D;
        const U* head = from + m * block.wqkv.N;
        for (int64_t i = 0; i < H; i++, head += D)
            finish_head(head, q_norm, eps, cos, sin, step.logn ? step.logn[m] : 1.0f, q + (m * H + i) * D, D);
        for (int64_t i = 0; i < K; i++, head += D) finish_head(head, k_norm, eps, cos, sin, 1.0f, k + ((b * K + i) * slots + slot) * D, D);
        for (int64_t i = 0; i < K; i++, head += D) convert(head, v + ((b * K + i) * slots + slot) * D, D);
    });
    attend_heads<T>(q, block.k_cache, block.v_cache, H, step.pos, block.window, y.mutable_data_ptr<U>());
    step.add(step.multiply(block.wo, y));
}

// x += w2(silu(gate) * up), where gate and up [F] are w13(norm(x))
template <typename T, typename U>
void feed_forward(const Step<T, U>& step, const Block& block) {
    const int64_t F = block.w2.K;
    const Tensor both = step.multiply(block.w13, step.normed(block.ffn_norm));
    Tensor y = step.empty(F);
    const U* from = both.const_data_ptr<U>();
    U* yp = y.mutable_data_ptr<U>();
    step.each([&](int64_t m) {
        const U *gate = from + m * 2 * F, *up = gate + F;
        U* to = yp + m * F;
        int64_t f = 0;
        for (; f + 16 <= F; f += 16) {
            const f32x16 g = load16(gate + f), e = exp16(-max16(g, -g));                     // so that it does not overflow
            store16(to + f, (g < f32x16{} ? g * e : g) / (e + 1.0f) * load16(up + f));
        }
        for (; f < F; f++) to[f] = (float)gate[f] / (1.0f + std::exp(-(float)gate[f])) * (float)up[f];
    });
    step.add(step.multiply(block.w2, y));
}

// weights: of each block in turn its attention_norm, wqkv, q_norm and k_norm (if it has them), wo, ffn_norm, w13 and w2. table, 8 a block: of how
// many tensors each of these seven is, and the attention's window. H: query heads, F: w2's inputs. -> uint8 [sizeof(Stack)]
Tensor stack(at::TensorList weights, at::IntArrayRef table, double eps, at::TensorList k_caches, at::TensorList v_caches, int64_t H, int64_t F,
             bool exact) {
    TORCH_CHECK(!k_caches.empty() && k_caches.size() == v_caches.size() && table.size() == 8 * k_caches.size() && !weights.empty() && H > 0,
                "stack: ", weights.size(), " weights, ", table.size(), " numbers and ", k_caches.size(), " caches");
    auto stack = std::make_unique<Stack>();
    stack->dtype = k_caches[0].scalar_type(), stack->H = H, stack->eps = eps, stack->exact = exact;
    size_t used = 0;
    for (size_t i = 0; i < k_caches.size(); i++) {
        const auto* row = table.data() + 8 * i;
        const auto take = [&](int part) {
            TORCH_CHECK(row[part] >= 0 && used + row[part] <= weights.size(), "stack: ", weights.size(), " weights are too few");
            used += row[part];
            return weights.slice(used - row[part], row[part]);
        };
        const auto norm = [&](at::TensorList list, size_t i, int64_t size) {
            TORCH_CHECK(i < list.size() && Linear::is(list[i], stack->dtype) && list[i].is_contiguous() && list[i].numel() == size,
                        "stack: a norm of ", size);
            return list[i];
        };
        check_caches(k_caches[i], v_caches[i], stack->dtype);
        const int64_t C = weights[0].numel(), K = k_caches[i].size(1), D = k_caches[i].size(3);
        TORCH_CHECK(k_caches[i].sizes() == k_caches[0].sizes() && k_caches[i].numel() > 0 && C > 0 && H % K == 0,
                    "stack: caches ", k_caches[i].sizes(), " for ", H, " heads");
        const auto attention_norm = norm(take(0), 0, C);
        const Linear wqkv(take(1), (H + 2 * K) * D, C, stack->dtype);
        const auto head_norms = take(2);
        const auto q_norm = head_norms.empty() ? Tensor() : norm(head_norms, 0, D);
        const auto k_norm = head_norms.empty() ? Tensor() : norm(head_norms, 1, D);
        const Linear wo(take(3), C, H * D, stack->dtype);
        const auto ffn_norm = norm(take(4), 0, C);
        const Linear w13(take(5), 2 * F, C, stack->dtype), w2(take(6), C, F, stack->dtype);
        stack->blocks.push_back({attention_norm, q_norm, k_norm, ffn_norm, k_caches[i], v_caches[i], wqkv, wo, w13, w2, row[7]});
    }
    Stack* const memory = stack.release();
    return at::from_blob(memory, {(int64_t)sizeof(Stack)}, [](void* p) { delete (Stack*)p; }, at::kByte);
}

// x [B, S, C] through all blocks of a stack, at input_pos [B, S] or [S]. cos, sin fp32 [B, S, 1, D], logn fp32 [B, S, 1, 1] or none.
Tensor layers(const Tensor& x, const Tensor& stack_, const Tensor& cos_, const Tensor& sin_, const std::optional<Tensor>& logn_,
              const Tensor& input_pos_) {
    const auto* stack = (const Stack*)stack_.const_data_ptr();
    TORCH_CHECK(stack_.nbytes() == sizeof(Stack) && stack->self == stack, "layers: a copy of a model needs setup_caches of its own");
    const auto cos = cos_.contiguous(), sin = sin_.contiguous(), input_pos = input_pos_.contiguous();
    const auto logn = logn_ ? logn_->contiguous() : Tensor();
    const auto& cache = stack->blocks[0].k_cache;
    const int64_t B = cache.size(0), D = cache.size(3), C = stack->blocks[0].w2.N, S = x.numel() / (B * C), M = B * S;
    TORCH_CHECK(M > 0 && Linear::is(x, stack->dtype) && x.dim() == 3 && x.size(0) == B && x.size(1) == S && x.size(2) == C &&
                Linear::is(cos, at::kFloat) && cos.numel() == M * D && Linear::is(sin, at::kFloat) && sin.numel() == M * D &&
                Linear::is(input_pos, at::kLong) && input_pos.size(-1) == S && (!logn.defined() || (Linear::is(logn, at::kFloat) && logn.numel() == M)),
                "layers: x ", x.sizes(), ", cos ", cos.sizes(), ", input_pos ", input_pos.sizes(), ", caches ", cache.sizes());
    const Positions pos(input_pos);
    pos.check(B, cache.size(2));
    auto out = x.clone(at::MemoryFormat::Contiguous);
    const auto run = [&](auto t, auto u) {
        using T = decltype(t);
        const Step<T, decltype(u)> step{*stack, S, C, M, cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), values<float>(logn), pos,
                                        out.mutable_data_ptr<T>()};
        for (const auto& block : stack->blocks) {
            attention(step, block);
            feed_forward(step, block);
        }
    };
    by_dtype(x, [&](auto zero) {
        if (M > MAX_TOKENS) run(zero, zero);
        else run(zero, 0.0f);
    });
    return out;
}

}  // namespace

TORCH_LIBRARY(qwen_fast, m) {
    m.def("linear(Tensor x, Tensor[] parts, int out_features, bool exact) -> Tensor", {at::Tag::pt2_compliant_tag});
    m.def("attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor input_pos, int window) -> Tensor", {at::Tag::pt2_compliant_tag});
    m.def("stack(Tensor[] weights, int[] table, float eps, Tensor[] k_caches, Tensor[] v_caches, int n_head, int intermediate_size, bool exact) "
          "-> Tensor");
    m.def("layers(Tensor x, Tensor(a!) stack, Tensor cos, Tensor sin, Tensor? logn, Tensor input_pos) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(qwen_fast, CPU, m) {
    m.impl("linear", &linear);
    m.impl("attend", &attend);
    m.impl("stack", &stack);
    m.impl("layers", &layers);
}
