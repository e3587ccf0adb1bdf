// Vectors of sixteen fp32 numbers. GCC's and Clang's vector types turn into AVX512, AVX2 or NEON, whatever
// -march=native finds; where the compiler misses an instruction, or has none (the products of AVX512-BF16, VNNI and
// AVX2), it is named here, so that the kernels themselves need no #ifdef.
#pragma once
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "tuning.h"

// All that the kernels with tiles need
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define AMX
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
// A loop of a constant number of turns, unrolled so that arrays of registers stay registers
#define UNROLL(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
// clang-format off
#define UNROLL2(i, n, j, m) UNROLL(i, n) UNROLL(j, m)
// clang-format on

namespace {

using c10::BFloat16;
#ifdef __AVX512F__
constexpr bool NARROW = false;  // whether registers hold fewer than sixteen numbers, and there are few of them
#else
constexpr bool NARROW = true;
#endif
// What one register holds: sums that live through a loop without AVX512 are best of this type, because a f32x16 takes
// several.
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

template <typename V> INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

#ifdef __AVX512F__
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef int8_t i8x64 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

template <typename To, typename V> INLINE To bits(V v) { return (To)v; }
template <typename V> INLINE f32x16 to_float(V v) { return __builtin_convertvector(v, f32x16); }
template <typename Mask, typename V> INLINE V select(Mask mask, V a, V b) { return mask ? a : b; }
template <typename V> INLINE V load64(const void* p) { return load<V>(p); }
template <typename V> INLINE void store64(void* p, V v) { std::memcpy(p, &v, sizeof v); }

// As many narrower numbers
template <typename To, typename From> INLINE To widen(const From* p) {
    typedef From Narrow __attribute__((vector_size(sizeof(To) / sizeof(To{}[0]) * sizeof(From))));
    return __builtin_convertvector(load<Narrow>(p), To);
}
template <typename To> INLINE void narrow16(To* p, i32x16 v) {
    typedef To Narrow __attribute__((vector_size(16 * sizeof(To))));
    const Narrow narrow = __builtin_convertvector(v, Narrow);
    std::memcpy(p, &narrow, sizeof narrow);
}
#else
// GCC sends a vector wider than the registers through memory at every step, which took most of the time: so here it is
// made of as many as it needs. EACH_PART spells a statement out for every one of them, which compiles faster than loops
// that GCC unrolls late.
#ifdef __AVX2__
#define EACH_PART(...) { constexpr int i = 0; __VA_ARGS__; } { constexpr int i = 1; __VA_ARGS__; }
#else
#define EACH_PART(...) \
    { constexpr int i = 0; __VA_ARGS__; } { constexpr int i = 1; __VA_ARGS__; } \
    { constexpr int i = 2; __VA_ARGS__; } { constexpr int i = 3; __VA_ARGS__; }
#endif
template <typename T> struct Wide {
#ifdef __AVX2__
    static constexpr int BYTES = 32;
#else
    static constexpr int BYTES = 16;
#endif
    static constexpr int PARTS = 64 / BYTES, LANES = BYTES / sizeof(T);
    typedef T Part __attribute__((vector_size(BYTES)));
    Part part[PARTS];

    Wide() = default;
    INLINE Wide(T value) { UNROLL(i, PARTS) part[i] = value - Part{}; }
    INLINE T operator[](int i) const { return part[i / LANES][i % LANES]; }
#define OPERATOR(op)                                  \
    friend INLINE Wide operator op(Wide a, Wide b) {  \
        EACH_PART(a.part[i] = a.part[i] op b.part[i]) \
        return a;                                     \
    }
    OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(&) OPERATOR(|) OPERATOR(^)
#undef OPERATOR
    friend INLINE Wide operator>>(Wide a, int n) {
        EACH_PART(a.part[i] = a.part[i] >> n)
        return a;
    }
    friend INLINE Wide operator<<(Wide a, int n) {
        EACH_PART(a.part[i] = a.part[i] << n)
        return a;
    }
    friend INLINE Wide<int32_t> operator<(Wide a, Wide b) {
        Wide<int32_t> mask;
        EACH_PART(mask.part[i] = a.part[i] < b.part[i])
        return mask;
    }
    INLINE Wide operator-() const { return Wide() - *this; }
    INLINE Wide& operator+=(Wide b) { return *this = *this + b; }
};
using f32x16 = Wide<float>;
using i32x16 = Wide<int32_t>;
using u32x16 = Wide<uint32_t>;
using i16x32 = Wide<int16_t>;
using u16x32 = Wide<uint16_t>;
using i8x64 = Wide<int8_t>;
using u8x64 = Wide<uint8_t>;

template <typename To, typename V> INLINE To bits(V v) {
    To to;
    EACH_PART(to.part[i] = (typename To::Part)v.part[i])
    return to;
}
template <typename V> INLINE f32x16 to_float(V v) {
    f32x16 to;
    EACH_PART(to.part[i] = __builtin_convertvector(v.part[i], f32x16::Part))
    return to;
}
template <typename V> INLINE V select(i32x16 mask, V a, V b) {
    EACH_PART(a.part[i] = mask.part[i] ? a.part[i] : b.part[i])
    return a;
}
template <typename V> INLINE V load64(const void* p) {
    V v;
    EACH_PART(v.part[i] = load<typename V::Part>((const char*)p + i * V::BYTES))
    return v;
}
template <typename V> INLINE void store64(void* p, V v) {
    EACH_PART(std::memcpy((char*)p + i * V::BYTES, &v.part[i], V::BYTES))
}

template <typename To, typename From> INLINE typename To::Part widen_part(const From* p) {
    typedef From Narrow __attribute__((vector_size(To::LANES * sizeof(From))));
    return __builtin_convertvector(load<Narrow>(p), typename To::Part);
}
#ifdef __AVX2__  // GCC 12 takes four instructions for one
template <> INLINE u32x16::Part widen_part<u32x16>(const uint16_t* p) {
    return (u32x16::Part)_mm256_cvtepu16_epi32(load<__m128i>(p));
}
template <> INLINE i32x16::Part widen_part<i32x16>(const uint8_t* p) {
    return (i32x16::Part)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
template <> INLINE i32x16::Part widen_part<i32x16>(const int8_t* p) {
    return (i32x16::Part)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
template <> INLINE i16x32::Part widen_part<i16x32>(const int8_t* p) {
    return (i16x32::Part)_mm256_cvtepi8_epi16(load<__m128i>(p));
}
#endif
template <typename To, typename From> INLINE To widen(const From* p) {
    To to;
    EACH_PART(to.part[i] = widen_part<To>(p + i * To::LANES))
    return to;
}
template <typename To> INLINE void narrow16(To* p, i32x16 v) {
    typedef To Narrow __attribute__((vector_size(i32x16::LANES * sizeof(To))));
    EACH_PART(const Narrow narrow = __builtin_convertvector(v.part[i], Narrow);
              std::memcpy(p + i * i32x16::LANES, &narrow, sizeof narrow))
}
#endif

// ---- loads and stores with conversion from and to fp32

INLINE f32x16 load16(const float* p) { return load64<f32x16>(p); }

INLINE f32x16 load16(const BFloat16* p) {  // a bf16 is the upper half of an fp32
#ifdef __AVX512F__  // GCC 12 takes six instructions for the two
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
#else
    return bits<f32x16>(widen<u32x16>((const uint16_t*)p) << 16);
#endif
}

template <typename Byte> INLINE std::enable_if_t<sizeof(Byte) == 1, f32x16> load16(const Byte* p) {
#ifdef __AVX512F__
    constexpr bool is_signed = std::is_signed_v<Byte>;
    const auto v = load<__m128i>(p);
    return (f32x16)_mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(v) : _mm512_cvtepu8_epi32(v));
#else
    return to_float(widen<i32x16>(p));
#endif
}

INLINE void store16(float* p, f32x16 v) { store64(p, v); }

INLINE void store16(BFloat16* p, f32x16 v) {  // to nearest, ties to even
#ifdef __AVX512BF16__
    const __m256bh upper = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &upper, sizeof upper);
#else
    const auto b = bits<u32x16>(v);
    narrow16((uint16_t*)p, bits<i32x16>((b + 0x7fff + ((b >> 16) & 1)) >> 16));
#endif
}

// The same for one register
INLINE f32xL load_lanes(const float* p) { return load<f32xL>(p); }
INLINE f32xL load_lanes(const int8_t* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return __builtin_convertvector(widen_part<i32x16>(p), f32xL);
#else
    typedef int8_t i8xL __attribute__((vector_size(LANES)));
    return __builtin_convertvector(load<i8xL>(p), f32xL);
#endif
}
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
INLINE f32x16 max16(f32x16 a, f32x16 b) { return select(b < a, a, b); }

INLINE float highest(f32x16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    float high = v[0];
    for (int i = 1; i < 16; i++) high = std::max(high, v[i]);
    return high;
#endif
}

#ifdef __AVX512F__
INLINE float sum(f32x16 v) { return _mm512_reduce_add_ps((__m512)v); }
#else
INLINE float sum(f32xL v) {
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x4 four = load<f32x4>(&v);
    if (LANES == 8) four += load<f32x4>((const float*)&v + LANES / 2);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
INLINE float sum(f32x16 v) {
    f32xL all = v.part[0];
    EACH_PART(if (i > 0) all += v.part[i])
    return sum(all);
}
#endif

// to[i] = the sum of v[i]'s lanes
template <int N> INLINE void store_sums(float* to, const f32xL* v) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // two and four at a time, in a third of the instructions
    if constexpr (N == 2 || N == 4) {
        const auto pair = [](f32xL a, f32xL b) INLINE_LAMBDA {
            return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        };
        const __m256 ab = pair(v[0], v[1]), cd = N == 4 ? pair(v[2], v[3]) : ab;
        const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
        const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
        return void(std::memcpy(to, &sums, N * sizeof(float)));
    }
#endif
    UNROLL(i, N) to[i] = sum(v[i]);
}

// v[i] lane j <-> v[j] lane i
INLINE void transpose(f32xL v[LANES]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    f32xL pairs[8], fours[8];
    UNROLL(i, 4) {
        pairs[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    UNROLL2(i, 2, j, 2) {
        fours[4 * i + 2 * j] = _mm256_shuffle_ps(pairs[4 * i + j], pairs[4 * i + 2 + j], 0x44);
        fours[4 * i + 2 * j + 1] = _mm256_shuffle_ps(pairs[4 * i + j], pairs[4 * i + 2 + j], 0xEE);
    }
    UNROLL(i, 4) {
        v[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
        v[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
    }
#else
    UNROLL(i, LANES)
        for (int j = 0; j < i; j++) {
            const float other = v[i][j];
            v[i][j] = v[j][i], v[j][i] = other;
        }
#endif
}

// Sixteen sums over lanes at once: lane i of sums16(sums4(v), sums4(v + 4), ...) is the sum of v[i]'s lanes. With
// another operation on two registers in the place of `add`, what it makes of the lanes.
constexpr auto add = [](auto a, auto b) INLINE_LAMBDA { return a + b; };
#ifdef __AVX512F__
// four to every 128 bits, each over that many of its lanes
template <typename Op = decltype(add)> INLINE f32x16 sums4(const f32x16 v[4], Op op = add) {
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const auto ab = (__m512)op((f32x16)_mm512_unpacklo_ps(a, b), (f32x16)_mm512_unpackhi_ps(a, b));
    const auto cd = (__m512)op((f32x16)_mm512_unpacklo_ps(c, d), (f32x16)_mm512_unpackhi_ps(c, d));
    return op((f32x16)_mm512_shuffle_ps(ab, cd, 0x44), (f32x16)_mm512_shuffle_ps(ab, cd, 0xEE));
}
template <typename Op = decltype(add)> INLINE f32x16 sums16(f32x16 v0, f32x16 v1, f32x16 v2, f32x16 v3, Op op = add) {
    const auto halves = [&](f32x16 a, f32x16 b) INLINE_LAMBDA {
        return (__m512)op((f32x16)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44),
                          (f32x16)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xEE));
    };
    const __m512 low = halves(v0, v1), high = halves(v2, v3);
    return op((f32x16)_mm512_shuffle_f32x4(low, high, 0x88), (f32x16)_mm512_shuffle_f32x4(low, high, 0xDD));
}
#else
INLINE f32x16 sums4(const f32x16 v[4]) {
    float sums[16] = {sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])};
    return load16(sums);
}
INLINE f32x16 sums16(f32x16 v0, f32x16 v1, f32x16 v2, f32x16 v3) {
    float out[16];
    for (int i = 0; i < 4; i++) out[i] = v0[i], out[4 + i] = v1[i], out[8 + i] = v2[i], out[12 + i] = v3[i];
    return load16(out);
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
INLINE f32x16 exp16(f32x16 x) {
#ifdef __AVX512F__
    return exp_below_0(x);
#else
    EACH_PART(x.part[i] = exp_below_0(x.part[i]))
    return x;
#endif
}

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

// Whether PyTorch multiplies matrices in bf16 at full speed; without AVX512 it takes six times as long as in fp32.
#if defined(__AVX512BW__) || defined(__ARM_FEATURE_BF16)
constexpr bool BF16_PRODUCTS = true;
#else
constexpr bool BF16_PRODUCTS = false;
#endif

// Whether many tokens are multiplied by our own product in fp32, whatever the weights are.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool FP32_PRODUCTS = true;
#else
constexpr bool FP32_PRODUCTS = false;
#endif

// ByteSums: sums of u8 * s8 over bytes 4 i .. 4 i + 3, by add_bytes. AVX2 adds up neighbours in sixteen bits, where
// eight products of numbers below 16 fit. total: as sixteen integers.
// Weights64, WordSums: the same of 64 int8 weights, of which each stands for w + OFFSET, and int16 activations.
#ifdef __AVX512VNNI__
constexpr bool INTEGERS = true;  // whether activations in integers are worth while
INLINE i32x16 dot_bytes(i32x16 acc, u8x64 a, i8x64 b) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
#elif defined(EMULATE_VNNI)  // a test of this path on other CPUs
constexpr bool INTEGERS = true;
INLINE i32x16 dot_bytes(i32x16 acc, u8x64 a, i8x64 b) {
    int32_t sums[16];
    store64(sums, acc);
    for (int i = 0; i < 64; i++) sums[i / 4] += a[i] * b[i];
    return load64<i32x16>(sums);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define PAIRS_OF_WORDS
constexpr bool INTEGERS = true;
#else
constexpr bool INTEGERS = false;
INLINE i32x16 dot_bytes(i32x16 acc, u8x64, i8x64) { return acc; }
#endif

// Whether integers are worth while for any number of tokens, with int4 weights and with int8, which take twice as many
// instructions
#if defined(__AVX512VNNI__) && !defined(AMX)
constexpr bool INT4_INTEGERS_FOR_ALL = true, INT8_INTEGERS_FOR_ALL = true;
#elif defined(PAIRS_OF_WORDS)
constexpr bool INT4_INTEGERS_FOR_ALL = true, INT8_INTEGERS_FOR_ALL = false;
#else
constexpr bool INT4_INTEGERS_FOR_ALL = false, INT8_INTEGERS_FOR_ALL = false;
#endif

#ifdef PAIRS_OF_WORDS
using ByteSums = i16x32;
INLINE ByteSums add_bytes(ByteSums acc, u8x64 a, i8x64 b) {
    EACH_PART(acc.part[i] += (i16x32::Part)_mm256_maddubs_epi16((__m256i)a.part[i], (__m256i)b.part[i]))
    return acc;
}
INLINE i32x16 add_words(i32x16 acc, i16x32 a, i16x32 b) {
    EACH_PART(acc.part[i] += (i32x16::Part)_mm256_madd_epi16((__m256i)a.part[i], (__m256i)b.part[i]))
    return acc;
}
INLINE i32x16 total(ByteSums sums) { return add_words(i32x16(0), sums, i16x32(1)); }

constexpr int OFFSET = 0;
struct Weights64 {
    i16x32 first, second;
    INLINE Weights64(const int8_t* w) : first(widen<i16x32>(w)), second(widen<i16x32>(w + 32)) {}
};
struct WordSums {
    i32x16 sums = {};
    INLINE void add(const Weights64& w, const int16_t* x) {
        sums = add_words(add_words(sums, w.first, load64<i16x32>(x)), w.second, load64<i16x32>(x + 32));
    }
    INLINE i32x16 total() const { return sums; }
};
// The activations as add wants them
inline std::vector<int16_t> arranged(std::vector<int16_t> x) { return x; }
#else
INLINE i32x16 add_words(i32x16 acc, i16x32, i16x32) { return acc; }
using ByteSums = i32x16;
INLINE ByteSums add_bytes(ByteSums acc, u8x64 a, i8x64 b) { return dot_bytes(acc, a, b); }
INLINE i32x16 total(ByteSums sums) { return sums; }

// Activations are multiplied as two bytes each, x = 256 u + l, and weights as w + 128, because one side is unsigned.
constexpr int OFFSET = 128;
struct Weights64 {
    u8x64 w;
    INLINE Weights64(const int8_t* from) : w(load64<u8x64>(from) ^ 128) {}
};
struct WordSums {
    i32x16 upper = {}, lower = {};
    INLINE void add(const Weights64& w, const int16_t* x) {
        upper = dot_bytes(upper, w.w, load64<i8x64>(x));
        lower = dot_bytes(lower, w.w, load64<i8x64>(x + 32));
    }
    INLINE i32x16 total() const { return (upper << 8) + lower; }
};
// For every 64 activations, as many as a multiple of 64, their upper, then their lower bytes, each from -128 to 127
inline std::vector<int16_t> arranged(const std::vector<int16_t>& x) {
    std::vector<int16_t> out(x.size());
    auto* bytes = (int8_t*)out.data();
    for (size_t i = 0; i < x.size(); i += 16) {
        int8_t* to = bytes + i / 64 * 128 + i % 64;
        const auto v = widen<i32x16>(x.data() + i), upper = (v + 128) >> 8;
        narrow16(to, upper);
        narrow16(to + 64, v - (upper << 8));
    }
    return out;
}
#endif

// The same four bytes sixteen times
INLINE i8x64 splat4(const int8_t* p) { return bits<i8x64>(load<int32_t>(p) - i32x16{}); }

// A register of weights or activations of type T, and its product with another, added to sixteen sums in fp32.
template <typename T> struct Lanes {
    static constexpr int N = 16;
    static constexpr bool PAIRS = false;  // whether the product adds up pairs of neighbours
    static constexpr bool ODD_LAST = false;
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
    static constexpr bool PAIRS = true, ODD_LAST = false;
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

#if defined(__AVX2__) && !defined(__AVX512F__)
template <> struct Lanes<BFloat16> {  // the numbers in even places, then those in odd ones: two instructions, not four
    static constexpr int N = 16;
    static constexpr bool PAIRS = false, ODD_LAST = true;
    using Reg = f32x16;
    static INLINE Reg load(const BFloat16* p) {
        const auto pairs = ::load<u32x16::Part>(p);
        f32x16 v;
        v.part[0] = (f32x16::Part)(pairs << 16), v.part[1] = (f32x16::Part)(pairs & 0xffff0000);
        return v;
    }
    static INLINE Reg load_first(const BFloat16* p, int n) {
        BFloat16 padded[N] = {};
        std::memcpy(padded, p, n * sizeof(BFloat16));
        return load(padded);
    }
    static INLINE f32x16 dot(f32x16 acc, Reg a, Reg b) { return acc + a * b; }
};
#endif

template <typename T> INLINE typename Lanes<T>::Reg load_up_to(const T* p, int n) {
    return n < Lanes<T>::N ? Lanes<T>::load_first(p, n) : Lanes<T>::load(p);
}

}  // namespace
