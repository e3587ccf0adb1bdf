// Tiles of AMX, sixteen rows of 64 bytes each, and their products in bf16 (those of integers: amx_decode.h):
// sums[i, j] += sum over k < 32 of a[i, k] b[k, j], where b stands as pairs: [16, 16, 2], k = 0 and 1 of every j first.
#pragma once
#include "vec.h"

#ifdef AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef AMX
constexpr i64 TILE_ROWS = 16, TILE_K = 32, TILE = TILE_ROWS * TILE_K;  // of a tile: rows, columns and numbers
constexpr i64 TILE_BYTES = 64;                                         // of a row
constexpr i64 TWO_TILES = 2 * TILE_ROWS;                               // two tiles are multiplied with two
constexpr i64 whole_tiles(i64 n) { return (n + TWO_TILES - 1) / TWO_TILES * TWO_TILES; }

// Linux keeps a process from using tiles until it asks.
inline bool tiles_allowed() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
}

// GCC's intrinsics do not say that tiles, and their configuration, are loaded from memory: after this, what has been
// written there is.
INLINE void finish_writing() { asm volatile("" ::: "memory"); }

// While it lives, this thread's tiles are 0 to 3 for sums, 4 and 5 for the first operand, with so many rows of so many
// bytes, 6 and 7 for the second.
struct UseTiles {
    struct alignas(64) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };
    explicit UseTiles(i64 rows = 16, i64 bytes = 64) {
        Configuration c;
        for (int i = 0; i < 8; i++) {
            c.rows[i] = i < 6 ? rows : bytes / 4;
            c.bytes[i] = i == 4 || i == 5 ? bytes : 64;
        }
        finish_writing();
        _tile_loadconfig(&c);
    }
    ~UseTiles() { _tile_release(); }
};

// Sixteen rows of pairs -> a tile [16, 16, 2] of them in columns
INLINE void store_tile(__m512i* to, const __m512i rows[TILE_ROWS]) {
    __m512i a[TILE_ROWS], b[TILE_ROWS];
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
        to[j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0x88);
        to[8 + j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0xDD);
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

// 64 bytes, zeros where there are fewer
INLINE __m512i bytes_of(const int8_t* from, i64 n) {
    return _mm512_maskz_loadu_epi8(n < 64 ? (1ull << n) - 1 : ~0ull, from);
}

// (even[i], odd[i]) for sixteen i
INLINE __m512i column_pairs(f32x16 even, f32x16 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

// Where tiles of one operand are, in bytes: rows, the other of two tiles, and the next ones along k
struct Tiles {
    const void* at;
    i64 row, other, next;
};

// sums [2, 2, 16, 16] = a[0], a[1] times b[0], b[1], n tiles along k: fp32 of bf16, added to what is there, if add; or
// int32 of int8. Meanwhile f() is called n times.
template <bool INTEGERS, typename F> INLINE void multiply_tiles(Tiles a, Tiles b, i64 n, bool add, void* out, F f) {
    const char *pa = (const char*)a.at, *pb = (const char*)b.at;
    float* sums = (float*)out;
    finish_writing();
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
#define MULTIPLY(sum, x, y)                          \
    if constexpr (INTEGERS) _tile_dpbssd(sum, x, y); \
    else _tile_dpbf16ps(sum, x, y)
    for (; n > 0; n--, pa += a.next, pb += b.next) {
        f();
        _tile_loadd(4, pa, a.row);
        _tile_loadd(6, pb, b.row);
        MULTIPLY(0, 4, 6);
        _tile_loadd(7, pb + b.other, b.row);
        MULTIPLY(1, 4, 7);
        _tile_loadd(5, pa + a.other, a.row);
        MULTIPLY(2, 5, 6);
        MULTIPLY(3, 5, 7);
    }
#undef MULTIPLY
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}
#endif

}  // namespace
