// Linears with int8 and int4 weights.
// Up to 16 tokens: with VNNI or AVX2 the activations are rounded to integers in groups along k, each with a scale of
// its own. Without, or where activations shall keep their precision, the weights are converted to fp32 on their way.
// More tokens: on in integers where those are faster even then (INT4_INTEGERS_FOR_ALL), else AMX (amx_prefill.h),
// multiply_many or PyTorch (prefill.h).
#pragma once
#include <vector>
#include "linear.h"
#include "products.h"

namespace {

using qwen_fast::Int4;

// M tokens of x in fp32, each padded with zeros, and rounded to integers of type Q: x[k] ~ scale[g] * q[k], g = k / G.
template <typename Q> struct Activations {
    i64 padded, groups;                    // lengths of one token's rows
    std::vector<float> copy, scale, sums;  // copy: if there is padding; sums: of the (rounded) x over each group
    const float* x;
    std::vector<Q> q;

    Activations(const float* source, i64 M, i64 K, i64 padded_, i64 G, bool quantize)
        : padded(padded_), groups(padded / G), copy(padded > K ? M * padded : 0), scale(M * groups, 1.0f),
          sums(M * groups), x(padded > K ? copy.data() : source), q(quantize ? M * padded : 0) {
        for (i64 m = 0; m < M && padded > K; m++) std::copy_n(source + m * K, K, copy.data() + m * padded);
        i64 done = 0;
        if constexpr (sizeof(Q) == 1 && !NARROW)
            if (quantize && G == 32) {
                done = M * groups / 16 * 16;
                for_each(M * padded > ONE_THREAD / 4, done / 16, [&](i64 i) { round_groups(16 * i); });
            }
        for_each(M * padded > ONE_THREAD && !done, M * groups - done, [&](i64 group) {
            const i64 i = done + group;
            const float* from = x + i * G;
            f32x16 high = {}, total = {};
            for (i64 j = 0; j < G; j += 16) {
                const f32x16 v = load16(from + j);
                high = max16(high, max16(v, -v));
                total += v;
            }
            if (quantize) total = round_group(from, highest(high), G, q.data() + i * G, scale[i]);
            sums[i] = sum(total) * scale[i];
        });
    }

    Activations(Activations&&) = default;  // x stays valid: a vector that is moved keeps its memory

    // Sixteen groups of 32 at once
    INLINE void round_groups(i64 i) {
        const float* from = x + i * 32;
        const auto of_sixteen = [](const f32x16* v, auto op) INLINE_LAMBDA {
            return sums16(sums4(v, op), sums4(v + 4, op), sums4(v + 8, op), sums4(v + 12, op), op);
        };
        f32x16 v[16];
        UNROLL(g, 16) {
            const f32x16 a = load16(from + 32 * g), b = load16(from + 32 * g + 16);
            v[g] = max16(max16(a, -a), max16(b, -b));
        }
        const f32x16 high = of_sixteen(v, [](f32x16 a, f32x16 b) INLINE_LAMBDA { return max16(a, b); });
        const f32x16 steps = high / 127.0f, factors = select(splat(1e-30f) < high, 127.0f / high, f32x16{});
        float inverse[16];
        store16(inverse, factors);
        UNROLL(g, 16) {
            const f32x16 a = load16(from + 32 * g) * inverse[g] + ROUND;
            const f32x16 b = load16(from + 32 * g + 16) * inverse[g] + ROUND;
            narrow16(q.data() + (i + g) * 32, bits<i32x16>(a));
            narrow16(q.data() + (i + g) * 32 + 16, bits<i32x16>(b));
            v[g] = (a - ROUND) + (b - ROUND);
        }
        store16(scale.data() + i, steps);
        store16(sums.data() + i, of_sixteen(v, add) * steps);
    }

    // Returns the sum of the integers.
    static INLINE f32x16 round_group(const float* from, float high, i64 G, Q* to, float& scale) {
        constexpr float most = sizeof(Q) == 1 ? 127.0f : 32639.0f;  // whose upper byte is 127 and lower byte 127
        const float inverse = high > 1e-30f ? most / high : 0.0f;   // less is rounded to 0
        f32x16 total = {};
        for (i64 j = 0; j < G; j += 16) {
            const f32x16 shifted = load16(from + j) * inverse + ROUND;
            narrow16(to + j, bits<i32x16>(shifted));  // the bits that are the integer
            total += shifted - ROUND;
        }
        scale = high / most;
        return total;
    }
};

// ---- int8: w [N, K] as stored
//
// The activations are rounded to 16 bits, so that next to nothing of them is lost. Where w + OFFSET stands in for w,
// OFFSET * sum(x) is taken off again.
//   y[n] = scale[n] * (sum_g s[g] * sum_{k in g} (w + OFFSET) q - OFFSET * sum_k x[k])
constexpr int G8 = 256;  // activations to a scale

// out[r * M + m] for R rows, `apart` rows from one another: as integers, still with w + OFFSET for w
template <int R, int M>
INLINE void int8_rows_quantized(const int8_t* w, i64 apart, const Activations<int16_t>& a, const int16_t* x, i64 first,
                                i64 K, float* out) {
    f32x16 acc[R * M] = {};
    x += first * a.padded;
    for (i64 g = 0; g * G8 < K; g++) {
        WordSums sums[R * M];
        const auto add = [&](auto pointer, i64 k) INLINE_LAMBDA {
            UNROLL(r, R) {
                const int8_t* from = w + r * apart * K + k;
                __builtin_prefetch(from + (M <= 2 ? AHEAD : FAR_AHEAD), 0, 2);
                const Weights64 weights(pointer(from));
                UNROLL(m, M) sums[r * M + m].add(weights, x + m * a.padded + k);
            }
        };
        if (g * G8 + G8 <= K)
            UNROLL(i, G8 / 64) add([](const int8_t* from) { return from; }, g * G8 + 64 * i);
        else
            for (i64 k = g * G8; k < K; k += 64) {
                int8_t padded[64] = {};
                const auto copy = [&](const int8_t* from) {
                    std::copy_n(from, std::min<i64>(64, K - k), padded);
                    return padded;
                };
                add(copy, k);
            }
        UNROLL(i, R * M) acc[i] += to_float(sums[i].total()) * a.scale[(first + i % M) * a.groups + g];
    }
    UNROLL(i, R * M) out[i] = sum(acc[i]);
}

// The same in fp32, with w itself
template <int R, int M>
INLINE void int8_rows_fp32(const int8_t* w, i64 apart, const Activations<int16_t>& a, i64 first, i64 K, float* out) {
    f32x16 acc[R * M] = {};
    i64 k = 0;
    for (; k + 16 <= K; k += 16)
        UNROLL(r, R) {
            const f32x16 wv = load16(w + r * apart * K + k);
            UNROLL(m, M) acc[r * M + m] += wv * load16(a.x + (first + m) * a.padded + k);
        }
    UNROLL(i, R * M) {
        out[i] = sum(acc[i]);
        for (i64 j = k; j < K; j++) out[i] += w[i / M * apart * K + j] * a.x[(first + i % M) * a.padded + j];
    }
}

template <bool quantize> struct Int8Rows {
    const int8_t* w;
    const float *scales, *x;
    float* y;
    i64 M, N, K;
    bool in_panels = M > MAX_TOKENS && !(quantize && INT8_INTEGERS_FOR_ALL);
    Activations<int16_t> a;
    std::vector<int16_t> arranged_q = arranged(a.q);
    std::vector<float> offset = std::vector<float>(M);

    Int8Rows(const int8_t* w, const float* scales, const float* x, float* y, i64 M, i64 N, i64 K)
        : w(w), scales(scales), x(x), y(y), M(M), N(N), K(K),
          a(x, in_panels ? 0 : M, K, (K + G8 - 1) / G8 * G8, G8, quantize) {
        if (quantize)
            for (size_t i = 0; i < a.sums.size(); i++) offset[i / a.groups] += OFFSET * a.sums[i];
    }
    i64 count() const { return N; }
    i64 unit() const { return 16; }
    i64 bytes() const { return K; }
    void operator()(i64 begin, i64 end) const {
        if (in_panels) return multiply_many(panels_of(w, scales, N, K), x, y, M, N, K, begin, end);
        for (i64 m = 0; m < M; m += MAX_TOKENS) some(Halves(begin, end, M <= 2), m, std::min<i64>(M - m, MAX_TOKENS));
    }
    // Tokens m .. m + count, which stay in the cache
    void some(const Halves& rows, i64 m, i64 count) const {
        rows.each([&](i64 n, auto R) INLINE_LAMBDA {
            tiles<R == 2 ? 2 : MOST_TOKENS>(count, [&](i64 tile, auto tokens) INLINE_LAMBDA {
                const i64 first = m + tile;
                float out[R * tokens];
                const int8_t* from = w + n * K;
                if constexpr (quantize)
                    int8_rows_quantized<R, tokens>(from, rows.apart, a, arranged_q.data(), first, K, out);
                else int8_rows_fp32<R, tokens>(from, rows.apart, a, first, K, out);
                UNROLL(i, R * tokens) {
                    const i64 row = n + i / tokens * rows.apart, m = first + i % tokens;
                    y[m * N + row] = (out[i] - offset[m]) * scales[row];
                }
            });
        });
    }
};

// ---- int4: w[n, k] = scale[n, g] * (q[n, k] - zero[n, g] / 16), g = k / G, packed in blocks of 16 rows
//
// packed [N / 16, K / 32, 4, 16, 4]: for 32 values of k (a unit) four registers, each of which holds 8 of them for 16
// rows. A byte is two values of q: register j, row r, byte b holds k = 8 j + b in its lower half and k = 8 j + 4 + b in
// its upper half. scales, zeros [N / 16, K / G, 16]. Sixteen lanes are sixteen rows throughout:
//   y[n] = sum_g scale[n, g] * (sum_{k in g} q[n, k] x[k] - zero[n, g] / 16 * sum_{k in g} x[k])
constexpr int G4 = 32;                    // activations to a scale
constexpr int REGISTER = 64, UNIT = 256;  // bytes

// f(i, q[.., 8 j + i]) for the eight values of k in register j
template <typename F> INLINE void each_of_eight(const uint8_t* p, F f) {
    const auto eight = load64<u32x16>(p);
    UNROLL(i, 8) f(i, to_float(bits<i32x16>((eight >> (i < 4 ? 8 * i : 8 * (i - 4) + 4)) & 15)));
}

// out[i * stride + r] = w[r, k + i] for the sixteen rows of a block, and i < count rounded up to whole units
template <typename T> void convert_int4(const Int4& w, i64 block, i64 k, i64 count, T* out, i64 stride) {
    for (i64 unit = k / G4; unit * G4 < k + count; unit++) {
        const i64 g = block * w.groups + unit / w.per;
        const f32x16 scale = load16(w.scales + g * ROWS), zero = load16(w.zeros + g * ROWS) * (1.0f / 16);
        const uint8_t* p = w.packed + (block * w.units() + unit) * UNIT;
        for (int j = 0; j < 4; j++, out += 8 * stride)
            each_of_eight(p + REGISTER * j, [&](int i, f32x16 q) INLINE_LAMBDA {
                store16(out + i * stride, scale * (q - zero));
            });
    }
}

// dots[r * M + m] = sum over a unit's k of q[r, k] * x[m, k] in integers. p, q: weights and rounded x of the unit
template <int R, int M>
INLINE void int4_unit_quantized(const uint8_t* p, i64 stride, const int8_t* q, i64 padded, f32x16* dots) {
    ByteSums lower_sums[R * M] = {}, upper_sums[R * M] = {};
    UNROLL2(j, 4, r, R) {
        const uint8_t* from = p + r * stride + REGISTER * j;
        __builtin_prefetch(from + (M <= 2 ? AHEAD : FAR_AHEAD), 0, 2);
        const auto both = load64<u8x64>(from), lower = both & 15, upper = bits<u8x64>(bits<u16x32>(both) >> 4) & 15;
        UNROLL(m, M) {
            const int i = r * M + m;
            lower_sums[i] = add_bytes(lower_sums[i], lower, splat4(q + m * padded + 8 * j));
            upper_sums[i] = add_bytes(upper_sums[i], upper, splat4(q + m * padded + 8 * j + 4));
        }
    }
    UNROLL(i, R * M) dots[i] = to_float(total(lower_sums[i] + upper_sums[i]));
}

// The same in fp32
template <int R, int M>
INLINE void int4_unit_fp32(const uint8_t* p, i64 stride, const float* x, i64 padded, f32x16* dots) {
    UNROLL(i, R * M) dots[i] = f32x16{};
    for (int j = 0; j < 4; j++)
        UNROLL(r, R) {
            each_of_eight(p + r * stride + REGISTER * j, [&](int i, f32x16 q) INLINE_LAMBDA {
                UNROLL(m, M) dots[r * M + m] += q * x[m * padded + 8 * j + i];
            });
        }
}

// R blocks of sixteen rows, `apart` blocks from one another, against M tokens: out[r * M + m]
template <int R, int M, bool quantize>
INLINE void int4_blocks(const Int4& w, i64 block, i64 apart, const Activations<int8_t>& a, i64 first, f32x16* out) {
    const uint8_t* p = w.packed + block * w.units() * UNIT;
    const i64 stride = apart * w.units() * UNIT;
    const float *steps = a.scale.data() + first * a.groups, *sums = a.sums.data() + first * a.groups;
    f32x16 acc[R * M] = {};
    for (i64 g = 0; g < w.groups; g++) {
        f32x16 scale[R], zero[R];
        UNROLL(r, R) {
            const i64 at = ((block + r * apart) * w.groups + g) * ROWS;
            scale[r] = load16(w.scales + at);
            zero[r] = load16(w.zeros + at) * (1.0f / 16);
        }
        for (i64 unit = g * w.per; unit < (g + 1) * w.per; unit++, p += UNIT) {
            f32x16 dots[R * M];
            const i64 k = first * a.padded + unit * G4;
            if constexpr (quantize) int4_unit_quantized<R, M>(p, stride, a.q.data() + k, a.padded, dots);
            else int4_unit_fp32<R, M>(p, stride, a.x + k, a.padded, dots);
            UNROLL(i, R * M) {
                const i64 at = i % M * a.groups + unit;
                acc[i] += scale[i / M] * (dots[i] * steps[at] - zero[i / M] * sums[at]);
            }
        }
    }
    UNROLL(i, R * M) out[i] = acc[i];
}

template <bool quantize> struct Int4Rows {
    Int4 w;
    const float* x;
    float* y;
    i64 M, N, K;
    bool in_panels = M > MAX_TOKENS && !(quantize && INT4_INTEGERS_FOR_ALL);
    Activations<int8_t> a;

    Int4Rows(const Int4& w, const float* x, float* y, i64 M, i64 N, i64 K)
        : w(w), x(x), y(y), M(M), N(N), K(K), a(x, in_panels ? 0 : M, K, w.units() * G4, G4, quantize) {}
    i64 count() const { return (N + ROWS - 1) / ROWS; }  // in blocks
    i64 unit() const { return 2; }
    i64 bytes() const { return w.units() * UNIT; }
    void operator()(i64 begin, i64 end) const {
        if (in_panels) {
            const auto fill = [&](i64 n, i64 k, i64 count, float* panel) {
                convert_int4(w, n / ROWS, k, count, panel, ROWS);
            };
            return multiply_many(fill, x, y, M, N, K, begin * ROWS, std::min(N, end * ROWS));
        }
        const Halves halves(begin, end, M <= 2);
        for (i64 m = 0; m < M; m += MAX_TOKENS) some(halves, m, std::min<i64>(M - m, MAX_TOKENS));
    }
    // Tokens m .. m + count, which stay in the cache
    void some(const Halves& halves, i64 m, i64 count) const {
        halves.each([&](i64 block, auto R) INLINE_LAMBDA {
            tiles<R == 2 ? 2 : MOST_TOKENS>(count, [&](i64 tile, auto tokens) INLINE_LAMBDA {
                const i64 first = m + tile;
                f32x16 out[R * tokens];
                int4_blocks<R, tokens, quantize>(w, block, halves.apart, a, first, out);
                UNROLL(i, R * tokens)
                    store(first + i % tokens, (block + i / tokens * halves.apart) * ROWS, out[i]);
            });
        });
    }
    INLINE void store(i64 m, i64 n, f32x16 out) const {
        float* to = y + m * N + n;
        if (n + ROWS <= N) return store16(to, out);
        for (i64 row = 0; row < N - n; row++) to[row] = out[row];
    }
};

}  // namespace
