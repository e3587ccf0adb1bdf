// y[m, n] = sum_k x[m, k] w[n, k] for few tokens and weights in bf16 or fp32, for many tokens and any weights where
// PyTorch has nothing faster, and how the rows of any weight are shared out between threads.
#pragma once
#include <atomic>
#include <vector>
#include "threads.h"
#include "vec.h"

namespace {

// Shares out 0 .. n: f(begin, end). All borders are multiples of `unit`, so that which thread takes what does not
// matter to the result. row_bytes: of one of the n.
template <typename F> void share(i64 n, i64 unit, i64 row_bytes, F f) {
    Parts parts(n);
    together(true, [&](i64) { parts.shrinking(unit, LEAST_SHARE / row_bytes, f); });
}

// each: f(n, 2) for rows n and n + apart, f(n, 1) for a row by itself: what is left over, or all if there is too much
// to compute for two at once.
struct Halves {
    i64 begin, end, apart;
    Halves(i64 begin, i64 end, bool two) : begin(begin), end(end), apart(two ? (end - begin) / 2 : 0) {}
    template <typename F> INLINE void each(F f) const {
        for (i64 n = begin; n < begin + apart; n++) f(n, std::integral_constant<int, 2>());
        for (i64 n = begin + 2 * apart; n < end; n++) f(n, std::integral_constant<int, 1>());
    }
};

// Some tokens, MOST at the most, share one pass over the weights: f(first, how many) for 0 .. M.
template <int MOST = 4, typename F> INLINE void tiles(i64 M, F f) {
    i64 m = 0;
    for (; m + MOST <= M; m += MOST) f(m, std::integral_constant<int, MOST>());
    const auto rest = [&](auto count) INLINE_LAMBDA {
        if (MOST > count && M - m == count) f(m, count);
    };
    if constexpr (MOST > 4) {
        rest(std::integral_constant<int, 7>()), rest(std::integral_constant<int, 6>());
        rest(std::integral_constant<int, 5>()), rest(std::integral_constant<int, 4>());
    }
    if constexpr (MOST > 3) rest(std::integral_constant<int, 3>());
    if constexpr (MOST > 2) rest(std::integral_constant<int, 2>());
    rest(std::integral_constant<int, 1>());
}

// R rows of w, `apart` rows from one another, against M tokens. U independent sums per product hide the latency of the
// multiply-add. next: how many elements ahead to prefetch where the rows are neighbours, in the order of the addresses.
template <typename T, int R, int M>
INLINE void dot_rows(const T* w, i64 apart, const T* x, float* y, i64 K, i64 N, i64 next = 0) {
    using L = Lanes<T>;
    constexpr int U = R * M >= 4 ? 1 : 4 / (R * M);
    f32x16 acc[U][16] = {};  // [u][r * M + m]
    i64 k = 0;
    for (; k + U * L::N <= K; k += U * L::N)
        UNROLL(u, U) {
            typename L::Reg wv[R];
            UNROLL(r, R) {
                const T* from = w + r * apart * K + k + u * L::N;
                if (R <= 2) __builtin_prefetch((const char*)from + AHEAD, 0, 2);
                else if (next) __builtin_prefetch(w + next + R * k + r * L::N, 0, 2);
                wv[r] = L::load(from);
            }
            UNROLL(m, M) {
                const auto xv = L::load(x + m * K + k + u * L::N);
                UNROLL(r, R) acc[u][r * M + m] = L::dot(acc[u][r * M + m], wv[r], xv);
            }
        }
    for (; k < K; k += L::N) {
        const int n = std::min<i64>(L::N, K - k);
        UNROLL(r, R) {
            const auto wv = load_up_to(w + r * apart * K + k, n);
            UNROLL(m, M) acc[0][r * M + m] = L::dot(acc[0][r * M + m], wv, load_up_to(x + m * K + k, n));
        }
    }
    UNROLL2(u, U - 1, i, R * M) acc[0][i] += acc[u + 1][i];
    float sums[16];
    if (R > 2) store16(sums, sums16(sums4(acc[0]), sums4(acc[0] + 4), sums4(acc[0] + 8), sums4(acc[0] + 12)));
    UNROLL2(r, R, m, M) y[m * N + r * apart] = R > 2 ? sums[r * M + m] : sum(acc[0][r * M + m]);
}

// The same if NARROW: each sum takes one register, so that the sums of two rows and four tokens stay in registers.
// x in fp32, in the order in which Lanes<T> loads, each token padded with zeros to a multiple of 16.
template <typename T, int R, int M>
INLINE void dot_rows_narrow(const T* w, i64 apart, const float* x, i64 padded, float* y, i64 K, i64 N) {
    f32xL acc[R * M] = {};
    const auto add = [&](i64 k, auto load_weights) INLINE_LAMBDA {
        typename Lanes<T>::Reg wv[R];
        UNROLL(r, R) wv[r] = load_weights(w + r * apart * K + k);
        UNROLL2(i, 16 / LANES, m, M) {
            const auto xv = load<f32xL>(x + m * padded + k + i * LANES);
            UNROLL(r, R) acc[r * M + m] += wv[r].part[i] * xv;
        }
    };
    i64 k = 0;
    for (; k + 16 <= K; k += 16) add(k, [](const T* from) INLINE_LAMBDA { return Lanes<T>::load(from); });
    if (k < K) add(k, [&](const T* from) INLINE_LAMBDA { return Lanes<T>::load_first(from, K - k); });
    UNROLL2(r, R, m, M) y[m * N + r * apart] = sum(acc[r * M + m]);
}

// x [M, K] as dot_rows_narrow reads it
template <typename T> std::vector<float> arranged(const float* x, i64 M, i64 K) {
    const i64 padded = (K + 15) / 16 * 16;
    std::vector<float> out(M * padded);
    for (i64 m = 0; m < M; m++)
        for (i64 k = 0; k < K; k += 16) {
            float in[16] = {}, *to = out.data() + m * padded + k;
            std::copy_n(x + m * K + k, std::min<i64>(16, K - k), in);
            if (Lanes<T>::ODD_LAST) UNROLL(i, 8) to[i] = in[2 * i], to[8 + i] = in[2 * i + 1];
            else std::copy_n(in, 16, to);
        }
    return out;
}

// R neighbouring rows against M tokens, which find the rows in the cache after the first four. If NARROW, M <= 2: more
// go through dot_rows_narrow.
template <typename T, int R> void dot_tokens(const T* w, const T* x, float* y, i64 M, i64 K, i64 N) {
    tiles<NARROW ? 2 : 4>(M, [&](i64 m, auto tokens) INLINE_LAMBDA {
        dot_rows<T, R, tokens>(w, 1, x + m * K, y + m * N, K, N, m ? 0 : std::max<i64>(R * K, FOUR_ROWS_AHEAD));
    });
}

// ---- many tokens and weights of any kind, if FP32_PRODUCTS
//
// Sixteen rows of the weights become a panel in fp32, [k][16], which stays in the second-level cache while six tokens
// at a time are multiplied with it: their sums fill the registers. On an AMD EPYC with AVX2 it reaches 80 % of what its
// multiply-adds allow, and PyTorch's product of matrices in fp32 55 to 70 %.
constexpr int ROWS = 16, PANEL_TOKENS = 6;

// panel[k * 16 + r] = rows[r][k] for k < n
template <typename W> INLINE void fill_panel(const W* const rows[ROWS], i64 n, float* panel) {
    i64 k = 0;
    for (; k + LANES <= n; k += LANES)
        UNROLL(half, ROWS / LANES) {
            f32xL square[LANES];
            UNROLL(r, LANES) square[r] = load_lanes(rows[half * LANES + r] + k);
            transpose(square);
            UNROLL(i, LANES) store_lanes(panel + (k + i) * ROWS + half * LANES, square[i]);
        }
    for (; k < n; k++)
        for (int r = 0; r < ROWS; r++) panel[k * ROWS + r] = (float)rows[r][k];
}

// y[m * N + r] = (or +=, if add) sum over k < n of panel[k][r] x[m * K + k], for up to six tokens and sixteen rows
INLINE void multiply_panel(const float* panel, const float* x, i64 K, i64 n, i64 tokens, i64 rows, bool add, float* y,
                           i64 N) {
    constexpr int P = ROWS / LANES;
    const float* from[PANEL_TOKENS];
    UNROLL(m, PANEL_TOKENS) from[m] = x + std::min<i64>(m, tokens - 1) * K;
    f32xL sums[PANEL_TOKENS * P] = {};
    for (i64 k = 0; k < n; k++) {
        f32xL w[P];
        UNROLL(p, P) w[p] = load_lanes(panel + k * ROWS + p * LANES);
        UNROLL2(m, PANEL_TOKENS, p, P) sums[m * P + p] += w[p] * from[m][k];
    }
    for (i64 m = 0; m < tokens; m++) {
        float out[ROWS], *to = y + m * N;
        UNROLL(p, P) store_lanes(out + p * LANES, sums[m * P + p]);
        for (i64 r = 0; r < rows; r++) to[r] = out[r] + (add ? to[r] : 0.0f);
    }
}

// x [M, K] -> y [M, N] for rows begin .. end of the weights. fill(n, k, count, panel): the panel of rows n .. n + 16,
// whatever stands in those past the last, for `count` values of k.
template <typename F>
void multiply_many(F fill, const float* x, float* y, i64 M, i64 N, i64 K, i64 begin, i64 end) {
    // Of registers, so that none lies across two cache lines. int4 is converted in units of 32.
    std::vector<f32xL> registers(ROWS / LANES * (std::min(K, PANEL_DEPTH) + 32));
    float* const panel = (float*)registers.data();
    for (i64 n = begin; n < end; n += ROWS)
        for (i64 k = 0; k < K; k += PANEL_DEPTH) {
            const i64 count = std::min(PANEL_DEPTH, K - k);
            fill(n, k, count, panel);
            for (i64 m = 0; m < M; m += PANEL_TOKENS)
                multiply_panel(panel, x + m * K + k, K, count, std::min<i64>(PANEL_TOKENS, M - m),
                               std::min<i64>(ROWS, end - n), k > 0, y + m * N + n, N);
        }
}

// multiply_many's panels of w [N, K], row by row, each times its scale if there are scales
template <typename W> auto panels_of(const W* w, const float* scales, i64 N, i64 K) {
    return [=](i64 n, i64 k, i64 count, float* panel) {
        const W* rows[ROWS];
        float scale[ROWS];
        for (i64 r = 0; r < ROWS; r++) {
            const i64 row = std::min(n + r, N - 1);
            rows[r] = w + row * K + k;
            scale[r] = scales ? scales[row] : 1.0f;
        }
        fill_panel(rows, count, panel);
        if (scales)
            for (i64 i = 0; i < count * ROWS; i += ROWS) store16(panel + i, load16(panel + i) * load16(scale));
    };
}

// w [N, K], x [M, K] -> y [M, N]: two distant rows at once where x is small, else four neighbours.
// This and its like in quantized.h are what a thread computes of y for the rows it is given, 0 .. count.
template <typename T> struct Rows {
    const T *w, *x;
    const float* x32;  // in the place of x: for dot_rows_narrow arranged, for multiply_many as it is; or null
    float* y;
    i64 M, N, K;
    i64 count() const { return N; }
    i64 unit() const { return 16; }
    i64 bytes() const { return K * sizeof(T); }  // of a row
    void operator()(i64 n, i64 end) const {
        if constexpr (FP32_PRODUCTS)
            if (M > MAX_TOKENS) return multiply_many(panels_of(w, nullptr, N, K), x32, y, M, N, K, n, end);
        if constexpr (NARROW)
            if (x32) return narrow(n, end);
        if (M == 1 ? K <= TWO_ROWS_MAX_K : M == 2 && K <= TWO_ROWS_TWO_TOKENS_MAX_K) {
            const Halves rows(n, end, true);
            rows.each([&](i64 n, auto R) INLINE_LAMBDA {
                if (M == 1) dot_rows<T, R, 1>(w + n * K, rows.apart, x, y + n, K, N);
                else dot_rows<T, R, 2>(w + n * K, rows.apart, x, y + n, K, N);
            });
            n = end;
        }
        for (; n + 4 <= end; n += 4) dot_tokens<T, 4>(w + n * K, x, y + n, M, K, N);
        for (; n < end; n++) dot_tokens<T, 1>(w + n * K, x, y + n, M, K, N);
    }
    // As many rows at a time as stay in the cache
    void narrow(i64 n, i64 end) const {
        const i64 padded = (K + 15) / 16 * 16;
        for (; n < end; n += ROWS_IN_CACHE) {
            const Halves rows(n, std::min(end, n + ROWS_IN_CACHE), true);
            rows.each([&](i64 row, auto R) INLINE_LAMBDA {
                tiles(M, [&](i64 m, auto tokens) INLINE_LAMBDA {
                    float* to = y + m * N + row;
                    dot_rows_narrow<T, R, tokens>(w + row * K, rows.apart, x32 + m * padded, padded, to, K, N);
                });
            });
        }
    }
};

// The rows of several matrices of one size, as if they were one, each padded to whole units.
template <typename R> void share_all(const std::vector<R>& matrices) {
    if (matrices.empty()) return;
    const R& any = matrices[0];
    const i64 count = any.count(), padded = (count + any.unit() - 1) / any.unit() * any.unit();
    share(padded * matrices.size(), any.unit(), any.bytes(), [&](i64 n, i64 end) {
        while (n < end) {
            const i64 first = n % padded, last = std::min(padded, first + end - n);
            matrices[n / padded](first, std::min(count, last));
            n += last - first;
        }
    });
}

}  // namespace
