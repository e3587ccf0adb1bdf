// Gated DeltaNet: deltanet.py has the formulas, and the rules by which tokens become part of the memory. A pass goes
// through a text in chunks. Memory is read once for each, and written at most once: what it takes up, the chunk before
// or what was pending, and what is read from it meet in one sweep over its rows, some of which stay in the first-level
// cache in between. Keys, queries and all sums are in fp32.
#pragma once
#include <memory>
#include "linear.h"
#include "states.h"

namespace {

using qwen_fast::DeltaState, qwen_fast::DeltaTokens, qwen_fast::Emit;

// ---- products of small matrices in fp32

// Elements (r, j) of a matrix at p[r * row + j * step]
struct Strided {
    const float* p;
    i64 row, step;
};

// c[r, i] = scale c[r, i] + sum over j < n of a(r, j) b[j, i], for NR rows and NC registers of columns. A scale of 0
// stands for a c that was not there.
template <int NR, int NC>
INLINE void add_tile(float* c, i64 c_row, float scale, Strided a, const float* b, i64 b_row, i64 n) {
    f32xL sums[NR][NC] = {};
    if (scale != 0)
        UNROLL2(r, NR, i, NC) sums[r][i] = load_lanes(c + r * c_row + LANES * i) * scale;
    for (i64 j = 0; j < n; j++) {
        f32xL bj[NC];
        UNROLL(i, NC) bj[i] = load_lanes(b + j * b_row + LANES * i);
        UNROLL(r, NR) {
            const f32xL factor = a.p[r * a.row + j * a.step] - f32xL{};
            UNROLL(i, NC) sums[r][i] += factor * bj[i];
        }
    }
    UNROLL2(r, NR, i, NC) store_lanes(c + r * c_row + LANES * i, sums[r][i]);
}

// The same for c [m, columns]: a [m, n], b [n, columns], columns a multiple of 16. Eight sums hide the latency of the
// multiply-add.
inline void add_product(float* c, i64 c_row, i64 m, i64 columns, float scale, Strided a, const float* b, i64 b_row,
                        i64 n) {
    tiles(m, [&](i64 r, auto rows) INLINE_LAMBDA {
        constexpr int NC = rows <= 2 ? 4 : 2, ONE = 16 / LANES;
        float* to = c + r * c_row;
        const Strided from{a.p + r * a.row, a.row, a.step};
        i64 i = 0;
        for (; i + NC * LANES <= columns; i += NC * LANES)
            add_tile<rows, NC>(to + i, c_row, scale, from, b + i, b_row, n);
        for (; i < columns; i += 16) add_tile<rows, ONE>(to + i, c_row, scale, from, b + i, b_row, n);
    });
}

// x / |x|, times scale
INLINE void normalize(const float* x, float* y, i64 n, float scale) {
    f32xL squares = {};
    for (i64 i = 0; i < n; i += LANES) squares += load_lanes(x + i) * load_lanes(x + i);
    float total = 1e-6f;
    UNROLL(i, LANES) total += squares[i];
    scale /= std::sqrt(total);
    for (i64 i = 0; i < n; i += LANES) store_lanes(y + i, load_lanes(x + i) * scale);
}

// e^x for x <= 0. What is less than e^-60 is 0: next to what the others add it is nothing, and numbers near the end of
// the range are slow.
INLINE f32xL decay(f32xL x) { return x < -60.0f - f32xL{} ? f32xL{} : exp_below_0(x); }
INLINE float decay(float x) { return x < -60.0f ? 0.0f : std::exp(x); }

// ---- memory

// What memory takes up: n tokens of these keys, each times its decay up to the last, and updates. keys and updates are
// nothing but places to write to. (n = 0, decay 0) makes it forget everything, (n = 0, decay 1) leaves it as it was.
struct Taken {
    i64 n = 0;
    float decay = 1.0f;
    float *keys, *updates;  // [_, K], [_, V]

    // Of the keys [n] in steps of k_row, and the sums of the tokens' decays
    void weigh(const float* k, i64 k_row, const float* sums, i64 count, i64 K) {
        n = count;
        decay = ::decay(sums[n - 1]);
        for (i64 i = 0; i < n; i++) {
            const float factor = ::decay(sums[n - 1] - sums[i]);
            for (i64 d = 0; d < K; d += LANES) store_lanes(keys + i * K + d, load_lanes(k + i * k_row + d) * factor);
        }
    }
};

// memory [K, V] takes up `taken`; y [count, V] = x [count, K] memory
inline void sweep(float* memory, const Taken& taken, const float* x, i64 count, float* y, i64 K, i64 V) {
    for (i64 k = 0; k < K; k += MEMORY_ROWS) {
        const i64 rows = std::min<i64>(MEMORY_ROWS, K - k);
        float* m = memory + k * V;
        if (count <= 2 * MAX_TOKENS)  // else there is more to compute than to load
            for (i64 i = 0; i < rows * V; i += 16) __builtin_prefetch(m + rows * V + i, 1, 2);
        if (taken.n || taken.decay != 1)
            add_product(m, V, rows, V, taken.decay, {taken.keys + k, 1, K}, taken.updates, V, taken.n);
        add_product(y, V, count, V, k ? 1.0f : 0.0f, {x + k, K, 1}, m, V, rows);
    }
}

// How a row's tokens are remembered: `kept` of those pending, then the new ones, of which memory takes up `taken`, and
// `left` are pending from then on. What follows them is padding.
struct DeltaRow {
    i64 length, kept, taken, left;  // length: before the new ones
    bool again;                     // from position 0 on
};

// The memory of one thread, for `most` tokens at once of one key head and its `ratio` value heads
template <typename T> struct DeltaScratch {
    i64 padded;                   // most, in whole vectors
    std::unique_ptr<T[]> inputs;  // of the convolution, [size - 1 + most, width]
    std::unique_ptr<float[]> block;
    float *x, *keys, *keys_t, *products, *lower, *upto, *sums, *y;
    std::vector<Taken> taken;

    DeltaScratch(const DeltaState& s, i64 most, i64 width)
        : padded((most + 15) / 16 * 16), inputs(new T[(s.size - 1 + most) * width]), taken(s.Hv / s.Hk) {
        std::vector<std::pair<float**, i64>> parts = {{&x, most * width},  // after the convolution: query, key, values
                                                      {&keys, 2 * most * s.K},         // of length 1, then the queries
                                                      {&keys_t, s.K * padded},         // transposed
                                                      {&products, 2 * most * padded},  // k_i . k_j, then q_i . k_j
                                                      {&lower, most * padded},         // -A
                                                      {&upto, most * padded},          // (Q K^T) L
                                                      {&sums, padded},                 // G
                                                      {&y, 2 * most * s.V}};           // K M, then Q M, which becomes O
        for (auto& t : taken) parts.insert(parts.end(), {{&t.keys, most * s.K}, {&t.updates, most * s.V}});
        i64 size = 0;
        for (const auto& [_, n] : parts) size += n;
        block.reset(new float[size]);
        float* next = block.get();
        for (auto& [pointer, n] : parts) *pointer = next, next += n;
    }
};

template <typename T> struct DeltaPass {
    const DeltaState& s;
    const DeltaTokens<T>& in;
    i64 S = in.S, ratio = s.Hv / s.Hk, width = 2 * s.K + ratio * s.V;

    void run(const Emit& emit) const {
        std::vector<DeltaRow> rows;
        i64 most = 1;
        for (i64 row = 0; row < s.B; row++) {
            rows.push_back(follow(row, in.pos + row * S));
            most = std::max({most, rows.back().kept, rows.back().left, std::min<i64>(rows.back().taken, DELTA_CHUNK)});
        }
        const i64 work = s.B * S * s.Hv * s.K * s.V, jobs = s.B * s.Hk;
        Parts parts(jobs);
        together(work > ONE_THREAD, [&](i64) {
            DeltaScratch<T> scratch(s, most, width);
            parts.each([&](i64 i) { run_head(rows[i / s.Hk], i / s.Hk, i % s.Hk, scratch, emit); });
        });
        for (i64 row = 0; row < s.B; row++) {
            s.length[row] = rows[row].length + rows[row].taken;
            s.pending[row] = rows[row].left;
        }
    }

    DeltaRow follow(i64 row, const i64* pos) const {
        const i64 length = s.length[row], pending = s.pending[row];
        const bool again = pos[0] == 0;
        const i64 kept = again ? 0 : std::clamp<i64>(pos[0] - length, 0, std::clamp<i64>(pending, 0, s.P));
        DeltaRow out{again ? 0 : length + kept, kept, 0, 0, again};
        i64 real = 0;
        while (real < S && pos[real] == out.length + real) real++;
        out.taken = std::min(real, std::max<i64>(0, S - s.P));
        out.left = real - out.taken;
        return out;
    }

    // f(first channel, how many, where they are in a scratch row) for those of key head h
    template <typename F> void channels(i64 h, F f) const {
        f(h * s.K, s.K, 0);
        f((s.Hk + h) * s.K, s.K, s.K);
        f(2 * s.Hk * s.K + h * ratio * s.V, ratio * s.V, 2 * s.K);
    }

    void run_head(const DeltaRow& row, i64 r, i64 h, DeltaScratch<T>& scratch, const Emit& emit) const {
        T* kept = (T*)s.inputs + r * (s.size - 1 + s.P) * s.N;
        channels(h, [&](i64 first, i64 count, i64 to) {
            for (i64 i = 0; i < s.size - 1; i++) {
                T* into = scratch.inputs.get() + i * width + to;
                if (row.length > 0) std::copy_n(kept + (row.kept + i) * s.N + first, count, into);
                else std::fill_n(into, count, T(0));
            }
        });
        for (i64 i = 0; i < ratio; i++) recall(row, r, h, h * ratio + i, scratch.taken[i], scratch.sums);
        for (i64 t = 0; t < row.taken; t += DELTA_CHUNK)
            run_chunk(r, h, t, std::min<i64>(DELTA_CHUNK, row.taken - t), false, scratch, emit);
        run_chunk(r, h, row.taken, row.left, true, scratch, emit);
        channels(h, [&](i64 first, i64 count, i64 from) {
            for (i64 i = 0; i < s.size - 1 + row.left; i++)
                std::copy_n(scratch.inputs.get() + i * width + from, count, kept + i * s.N + first);
        });
        std::fill_n(scratch.y, s.V, 0.0f);
        for (i64 t = row.taken + row.left; t < S; t++)
            for (i64 i = 0; i < ratio; i++) emit(r * S + t, h * ratio + i, scratch.y);
    }

    // What is kept of value head hv's pending tokens
    void recall(const DeltaRow& row, i64 r, i64 h, i64 hv, Taken& taken, float* sums) const {
        taken.n = 0, taken.decay = row.again ? 0.0f : 1.0f;
        if (!row.kept) return;
        const i64 first = r * s.P;
        float sum = 0;
        for (i64 i = 0; i < row.kept; i++) {
            sums[i] = sum += s.decays[(first + i) * s.Hv + hv];
            std::copy_n(s.updates + ((first + i) * s.Hv + hv) * s.V, s.V, taken.updates + i * s.V);
        }
        taken.weigh(s.keys + (first * s.Hk + h) * s.K, s.Hk * s.K, sums, row.kept, s.K);
    }

    // n tokens from t on. last: they stay pending; else memory takes them up next time
    void run_chunk(i64 r, i64 h, i64 t, i64 n, bool last, DeltaScratch<T>& scratch, const Emit& emit) const {
        const i64 m = r * S + t, K = s.K, padded = scratch.padded;
        convolve(h, m, n, scratch);
        for (i64 i = 0; i < n; i++) {
            normalize(scratch.x + i * width, scratch.keys + (n + i) * K, K, 1 / std::sqrt((float)K));
            normalize(scratch.x + i * width + K, scratch.keys + i * K, K, 1);
        }
        for (i64 d = 0; d < K; d++) {
            for (i64 i = 0; i < n; i++) scratch.keys_t[d * padded + i] = scratch.keys[i * K + d];
            std::fill(scratch.keys_t + d * padded + n, scratch.keys_t + (n + 15) / 16 * 16 + d * padded, 0.0f);
        }
        for (i64 half = 0; half < 2; half++)  // up to the diagonal
            for (i64 i = 0; i < n; i += 16)
                add_product(scratch.products + (half * n + i) * padded, padded, std::min<i64>(16, n - i), i + 16, 0,
                            {scratch.keys + (half * n + i) * K, K, 1}, scratch.keys_t, padded, K);
        for (i64 i = 0; i < ratio; i++) {
            Taken& taken = scratch.taken[i];
            const i64 hv = h * ratio + i;
            sweep(s.memory + (r * s.Hv + hv) * K * s.V, taken, scratch.keys, 2 * n, scratch.y, K, s.V);
            if (!n) continue;
            attend_and_update(m, hv, n, scratch.x + 2 * K + i * s.V, taken.updates, scratch);
            for (i64 j = 0; j < n; j++) emit(m + j, hv, scratch.y + (n + j) * s.V);
            if (last) {
                for (i64 j = 0; j < n; j++) {
                    const i64 at = (r * s.P + j) * s.Hv + hv;
                    std::copy_n(taken.updates + j * s.V, s.V, s.updates + at * s.V);
                    s.decays[at] = in.g[(m + j) * s.Hv + hv];
                }
            } else taken.weigh(scratch.keys, K, scratch.sums, n, K);
        }
        if (last)
            for (i64 j = 0; j < n; j++)
                std::copy_n(scratch.keys + j * K, K, s.keys + ((r * s.P + j) * s.Hk + h) * K);
        else std::copy_n(scratch.inputs.get() + n * width, (s.size - 1) * width, scratch.inputs.get());
    }

    // x = silu(the convolution of n tokens from m on) of key head h's channels
    void convolve(i64 h, i64 m, i64 n, DeltaScratch<T>& scratch) const {
        T* inputs = scratch.inputs.get();
        channels(h, [&](i64 first, i64 count, i64 to) {
            const T* conv = in.conv + first;
            for (i64 i = 0; i < n; i++) {
                const auto read = [&](const auto* from) {
                    convert(from + (m + i) * in.qkv_row + first, inputs + (s.size - 1 + i) * width + to, count);
                };
                in.in_fp32 ? read((const float*)in.qkv) : read((const T*)in.qkv);
                for (i64 c = 0; c < count; c += LANES) {
                    f32xL y = {};
                    for (i64 tap = 0; tap < s.size; tap++)
                        y += load_lanes(inputs + (i + tap) * width + to + c) * load_lanes(conv + tap * s.N + c);
                    store_lanes(scratch.x + i * width + to + c, silu(y));
                }
            }
        });
    }

    // From v [n], in steps of a scratch row, and K M and Q M in y: D -> d [n, V], and O in the place of Q M.
    void attend_and_update(i64 m, i64 hv, i64 n, const float* v, float* d, DeltaScratch<T>& scratch) const {
        const i64 V = s.V, padded = scratch.padded;
        float *sums = scratch.sums, *y = scratch.y, *o = y + n * V;
        float sum = 0;
        for (i64 i = 0; i < n; i++) sums[i] = sum += in.g[(m + i) * s.Hv + hv];
        std::fill(sums + n, sums + (n + 15) / 16 * 16, sum);
        for (i64 i = 0; i < n; i++) {
            const float strength = in.b[(m + i) * s.Hv + hv], decayed = decay(sums[i]);
            for (i64 j = 0; j <= (i | 3); j += LANES) {  // four rows are multiplied at once: zeros after the diagonal
                i32xL column;
                UNROLL(lane, LANES) column[lane] = j + lane;
                const f32xL L = column > (int)i ? f32xL{} : decay(sums[i] - load_lanes(sums + j));
                const i64 at = i * padded + j;
                store_lanes(scratch.lower + at, L * load_lanes(scratch.products + at) * -strength);
                store_lanes(scratch.upto + at, L * load_lanes(scratch.products + n * padded + at));
            }
            for (i64 c = 0; c < V; c += LANES) {
                const f32xL read = load_lanes(y + i * V + c) * decayed;
                store_lanes(d + i * V + c, (load_lanes(v + i * width + c) - read) * strength);
                store_lanes(o + i * V + c, load_lanes(o + i * V + c) * decayed);
            }
        }
        for (i64 i = 0; i < n; i += 4) {
            const i64 rows = std::min<i64>(4, n - i);
            const float* lower = scratch.lower + i * padded;
            if (i) add_product(d + i * V, V, rows, V, 1, {lower, padded, 1}, d, V, i);
            for (i64 j = 1; j < rows; j++)
                add_product(d + (i + j) * V, V, 1, V, 1, {lower + j * padded + i, padded, 1}, d + i * V, V, j);
            add_product(o + i * V, V, rows, V, 1, {scratch.upto + i * padded, padded, 1}, d, V, i + rows);
        }
    }
};

}  // namespace
