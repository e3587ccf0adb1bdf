// Vectors of sixteen fp32 numbers. GCC's and Clang's vector types turn into AVX512, AVX2 or NEON, whatever
// -march=native finds; where the compiler misses an instruction, or has none (the products of AVX512-BF16 and VNNI), it
// is named here, so that the kernels themselves need no #ifdef.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "tuning.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
// A loop of a constant number of turns, unrolled so that arrays of registers stay registers
#define UNROLL(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
// clang-format off
#define UNROLL2(i, n, j, m) UNROLL(i, n) UNROLL(j, m)
// clang-format on

namespace {

using at::BFloat16;
using at::Tensor;
typedef float f32x16 __attribute__((vector_size(64)));
// What one register holds: sums that live through a loop without AVX512 are best of this type, because compilers keep a
// f32x16 in memory there.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float f32xL __attribute__((vector_size(4 * LANES)));
typedef int32_t i32xL __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32xL __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16xL __attribute__((vector_size(2 * LANES)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef int8_t i8x64 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

template <typename V> INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// ---- loads and stores with conversion from and to fp32

INLINE f32x16 load16(const float* p) { return load<f32x16>(p); }

INLINE f32x16 load16(const BFloat16* p) {  // a bf16 is the upper half of an fp32
    const auto v = load<u16x16>(p);
#ifdef __AVX512F__  // GCC 12 takes six instructions for the two
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#else
    return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
#endif
}

template <typename Byte> INLINE std::enable_if_t<sizeof(Byte) == 1, f32x16> load16(const Byte* p) {
    typedef Byte Bytes __attribute__((vector_size(16)));
    const auto v = load<Bytes>(p);
#ifdef __AVX512F__
    constexpr bool is_signed = std::is_signed_v<Byte>;
    return (f32x16)_mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32((__m128i)v) : _mm512_cvtepu8_epi32((__m128i)v));
#else
    return __builtin_convertvector(__builtin_convertvector(v, i32x16), f32x16);
#endif
}

INLINE void store16(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }

INLINE void store16(BFloat16* p, f32x16 v) {  // to nearest, ties to even
#ifdef __AVX512BF16__
    const __m256bh upper = _mm512_cvtneps_pbh((__m512)v);
#else
    const u32x16 bits = (u32x16)v;
    const u16x16 upper = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16x16);
#endif
    std::memcpy(p, &upper, sizeof upper);
}

// The same for one register
INLINE f32xL load_lanes(const float* p) { return load<f32xL>(p); }
INLINE void store_lanes(float* p, f32xL v) { std::memcpy(p, &v, sizeof v); }
#ifdef __AVX512F__
INLINE f32xL load_lanes(const BFloat16* p) { return load16(p); }
INLINE void store_lanes(BFloat16* p, f32xL v) { store16(p, v); }
#else
INLINE f32xL load_lanes(const BFloat16* p) { return (f32xL)(__builtin_convertvector(load<u16xL>(p), u32xL) << 16); }
INLINE void store_lanes(BFloat16* p, f32xL v) {
    const u32xL bits = (u32xL)v;
    const u16xL upper = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16xL);
    std::memcpy(p, &upper, sizeof upper);
}
#endif

template <typename From, typename To> INLINE void convert(const From* from, To* to, i64 n) {
    i64 i = 0;
    for (; i + 16 <= n; i += 16) store16(to + i, load16(from + i));
    for (; i < n; i++) to[i] = (float)from[i];
}

// ---- arithmetic

INLINE f32x16 splat(float value) { return value - f32x16{}; }
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
INLINE f32x16 sums4(const f32x16 v[4]) {  // four to every 128 bits, each over that many of its lanes
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return (f32x16)_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
}
INLINE __m512 halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
}
INLINE f32x16 sums16(f32x16 v0, f32x16 v1, f32x16 v2, f32x16 v3) {
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

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

// exp(x) for x <= 0, within 2 ulp: 2^n * polynomial(f), n + f = x * log2(e), |f| <= 1/2 (Cephes' expf)
template <typename F> INLINE F exp_below_0(F x) {
    typedef int32_t Int __attribute__((vector_size(sizeof(F))));
    constexpr float COEFFICIENTS[5] = {1.39819995e-3f, 8.33345191e-3f, 4.16657962e-2f, 1.66666657e-1f, 0.5f};
    const F least = -87.0f - F{};
    x = x < least ? least : x;
    F shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
    F f = x - n * 0.693359375f + n * 2.12194440e-4f;
    F p = 1.98756915e-4f - F{};
    UNROLL(i, 5) p = p * f + COEFFICIENTS[i];
    p = p * f * f + f + 1.0f;
    return (F)((Int)p + ((Int)shifted << 23));
}
INLINE f32x16 exp16(f32x16 x) { return exp_below_0(x); }

// 1 / (1 + exp(-x)), and x times it; exp(-|x|) does not overflow
INLINE f32xL sigmoid(f32xL x) {
    const f32xL e = exp_below_0(x < f32xL{} ? x : -x);
    return (x < f32xL{} ? e : 1.0f - f32xL{}) / (e + 1.0f);
}
INLINE f32xL silu(f32xL x) {
    const f32xL e = exp_below_0(x < f32xL{} ? x : -x);
    return (x < f32xL{} ? x * e : x) / (e + 1.0f);
}

// ---- products

// dot_u8s8: acc[i] + the sum of the four products of bytes 4 i .. 4 i + 3. load_first64: n bytes, then zeros.
#ifdef __AVX512VNNI__
constexpr bool HAVE_VNNI = true;  // without it, integer activations are not worth while
INLINE i32x16 dot_u8s8(i32x16 acc, u8x64 a, i8x64 b) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
INLINE i8x64 load_first64(const int8_t* p, int n) {
    return (i8x64)_mm512_maskz_loadu_epi8(n < 64 ? (1ull << n) - 1 : ~0ull, p);
}
#else
#ifdef EMULATE_VNNI  // a test of the integer path on other CPUs
constexpr bool HAVE_VNNI = true;
#else
constexpr bool HAVE_VNNI = false;
#endif
INLINE i32x16 dot_u8s8(i32x16 acc, u8x64 a, i8x64 b) {
    for (int i = 0; i < 64; i++) acc[i / 4] += a[i] * b[i];
    return acc;
}
INLINE i8x64 load_first64(const int8_t* p, int n) {
    i8x64 v = {};
    std::memcpy(&v, p, n);
    return v;
}
#endif

// The same four bytes sixteen times
INLINE i8x64 splat4(const int8_t* p) { return (i8x64)(load<int32_t>(p) - i32x16{}); }

// A register of weights or activations of type T, and its product with another, added to sixteen sums in fp32.
template <typename T> struct Lanes {
    static constexpr int N = 16;
    static constexpr bool PAIRS = false;  // whether the product adds up pairs of neighbours
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
INLINE f32x16 dot_bf16(f32x16 acc, __m512bh a, __m512bh b) { return (f32x16)_mm512_dpbf16_ps((__m512)acc, a, b); }

template <> struct Lanes<BFloat16> {
    static constexpr int N = 32;
    static constexpr bool PAIRS = true;
    using Reg = __m512bh;
    static INLINE Reg load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static INLINE Reg load_first(const BFloat16* p, int n) {
        return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
    }
    static INLINE f32x16 dot(f32x16 acc, Reg a, Reg b) { return dot_bf16(acc, a, b); }

    // 32 fp32 numbers as sixteen pairs of bf16
    static INLINE void store_pairs(uint32_t* to, const float* from) {
        const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
        std::memcpy(to, &pairs, sizeof pairs);
    }
    static INLINE Reg splat_pair(uint32_t pair) { return (__m512bh)_mm512_set1_epi32(pair); }
    // x and y as pairs (x[i], y[i]): low of i = 0 .. 3 of every eight, high of the others
    static INLINE void interleave(Reg x, Reg y, Reg& low, Reg& high) {
        low = (Reg)_mm512_unpacklo_epi16((__m512i)x, (__m512i)y);
        high = (Reg)_mm512_unpackhi_epi16((__m512i)x, (__m512i)y);
    }
    // Sums over such pairs back in the order of i: 0 .. 15 and 16 .. 31
    static INLINE void reorder(f32x16& low, f32x16& high) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        const auto a = (__m512)low, b = (__m512)high;
        low = (f32x16)_mm512_permutex2var_ps(a, first, b), high = (f32x16)_mm512_permutex2var_ps(a, second, b);
    }
};
#endif

template <typename T> INLINE typename Lanes<T>::Reg load_up_to(const T* p, int n) {
    return n < Lanes<T>::N ? Lanes<T>::load_first(p, n) : Lanes<T>::load(p);
}

// Calls f with a BFloat16 or a float, the type of t's values.
template <typename F> void by_dtype(const Tensor& t, F f) {
    if (t.scalar_type() == at::kBFloat16) f(BFloat16());
    else if (t.scalar_type() == at::kFloat) f(0.0f);
    else TORCH_CHECK(false, "kernels: dtype ", t.scalar_type(), " (bfloat16 and float are supported)");
}

}  // namespace
