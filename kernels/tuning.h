// Limits and tuned numbers of all kernels in one place, each with its reason.
#pragma once
#include <cstdint>

namespace {

using i64 = int64_t;

// Limits, which kernels/__init__.py knows too
constexpr int MAX_TOKENS = 16;  // of a product limited by the memory; more tokens take other ways (quantized.h)
constexpr int MAX_HEAD = 512;   // dimensions of a head

// Linears. One core waits less for the memory if it reads from two places in turn and asks early for what comes next.
// So every thread walks through the two halves of its rows at once: up to a quarter faster than one row after the
// other (two neighbours took half as long again). A prefetch to the first-level cache, not the second, cost 10 %.
constexpr i64 AHEAD = 1024, FAR_AHEAD = 8192;  // bytes; the latter where there is more to compute in between
// In longer rows, loading the activations for every two rows takes longer than loading the weights, and four neighbours
// share those loads.
constexpr i64 TWO_ROWS_MAX_K = 6144, TWO_ROWS_TWO_TOKENS_MAX_K = 2048;
constexpr i64 FOUR_ROWS_AHEAD = 4096;  // elements, at least
constexpr i64 LEAST_SHARE = 1 << 16;   // bytes of weights a thread takes at once: enough to hide the atomic counter
constexpr i64 ROWS_IN_CACHE = 32;      // of weights in bf16 without AVX512, multiplied with all tokens before the next
constexpr i64 AMX_BF16 = 3, AMX_INT8 = 5, AMX_INT4 = 12;  // fewest tokens for which tiles of AMX are faster
#ifdef __AVX512F__
constexpr int MOST_TOKENS = 8;         // that share a pass over quantized weights: their sums fill the registers
#else
constexpr int MOST_TOKENS = 4;
#endif
constexpr i64 PANEL_DEPTH = 1024;      // of sixteen rows in fp32, which many tokens are multiplied with
constexpr i64 PANEL_BYTES = 512;       // of each of the 32 rows of a panel for AMX: 16 KB in all
constexpr i64 TILE_GROUP = 128, TILE_TOKENS = 256;  // rows whose sums with so many tokens stay in the cache: 128 KB
constexpr i64 CHUNK = 1 << 20;         // weights converted at a time for many tokens: they stay in the cache

// Attention
constexpr int BLOCK = 256;           // cache positions per turn of the online softmax
constexpr i64 BLOCK_IN_CACHE = 32;   // of these, whose keys or values stay in the first-level cache for all queries
constexpr i64 TILE_QUERIES = 64;     // queries of one KV head that share a pass over its keys and values
constexpr i64 AMX_QUERIES = 256;     // the same for AMX, which rearranges values for them
constexpr i64 FEW_QUERIES = 8;       // up to which tiles of AMX take longer
constexpr i64 LEAST_SPLIT = 128;     // positions that are worth a thread of their own
constexpr i64 ONE_THREAD = 1 << 15;  // multiply-adds up to which waking the other threads takes longer

// Threads, in seconds
constexpr double SPIN = 50e-6;  // before one without work sleeps; twice as long was no faster, nor half
constexpr double LATE = 10e-6;  // in which one that has a core computes

// Gated DeltaNet
constexpr i64 DELTA_CHUNK = 64;  // tokens at once
constexpr i64 MEMORY_ROWS = 32;  // that stay in the first-level cache between being changed and being read

}  // namespace
