// A translation unit of its own, without PyTorch's headers: products of weights of every kind.
#include "products.h"
#include "amx_decode.h"
#include "amx_prefill.h"

namespace qwen_fast {

template <typename T> void multiply_plain(const T* w, const std::vector<Product>& products, i64 N, i64 K) {
    std::vector<TiledRows<T>> rows;
    std::vector<std::vector<T>> rounded(products.size());
    std::vector<std::vector<float>> x32(products.size());
    for (size_t i = 0; i < products.size(); i++) {
        const auto& p = products[i];
        const T* x = (const T*)p.x;
        const bool many = p.M > MAX_TOKENS;
        if (NARROW && p.M > 2 && !many) x32[i] = arranged<T>(p.x, p.M, K);
        else if (!std::is_same_v<T, float> && !many) {
            rounded[i].resize(p.M * K);
            convert(p.x, rounded[i].data(), p.M * K);
            x = rounded[i].data();
        }
        const float* floats = many ? p.x : x32[i].empty() ? nullptr : x32[i].data();
        rows.push_back(Rows<T>{w + p.e * N * K, x, floats, p.y, p.M, N, K});
    }
    share_all(rows);
}

template <bool quantize> void multiply_int8(const Int8& w, const std::vector<Product>& products, i64 N, i64 K) {
    std::vector<TiledInt8Rows<quantize>> rows;
    for (const auto& p : products) rows.emplace_back(w.w + p.e * N * K, w.scales + p.e * N, p.x, p.y, p.M, N, K);
    share_all(rows);
}

template <bool quantize> void multiply_int4(const Int4& w, const std::vector<Product>& products, i64 N, i64 K) {
    std::vector<TiledInt4Rows<quantize>> rows;
    for (const auto& p : products) {
        const i64 block = p.e * (N / ROWS), at = block * w.groups * ROWS;
        const Int4 own{w.packed + block * w.units() * UNIT, w.scales + at, w.zeros + at, w.groups, w.per};
        rows.emplace_back(own, p.x, p.y, p.M, N, K);
    }
    share_all(rows);
}

void multiply(const float* w, const std::vector<Product>& products, i64 N, i64 K) {
    multiply_plain(w, products, N, K);
}
void multiply(const BFloat16* w, const std::vector<Product>& products, i64 N, i64 K) {
    multiply_plain(w, products, N, K);
}
void multiply(const Int8& w, const std::vector<Product>& products, i64 N, i64 K, bool quantize) {
    quantize ? multiply_int8<INTEGERS>(w, products, N, K) : multiply_int8<false>(w, products, N, K);
}
void multiply(const Int4& w, const std::vector<Product>& products, i64 N, i64 K, bool quantize) {
    quantize ? multiply_int4<INTEGERS>(w, products, N, K) : multiply_int4<false>(w, products, N, K);
}

#ifdef AMX
bool multiply_by_tiles(const BFloat16* w, const BFloat16* x, BFloat16* y, i64 M, i64 N, i64 K) {
    return multiply_panels(PanelsOfRows<BFloat16, BFloat16>{w, nullptr, N, K}, x, y, M, N, K);
}
bool multiply_by_tiles(const Int8& w, const BFloat16* x, BFloat16* y, i64 M, i64 N, i64 K, bool quantize) {
    if (quantize) return multiply_panels(PanelsOfRows<int8_t, int8_t>{w.w, w.scales, N, K}, x, y, M, N, K);
    return multiply_panels(PanelsOfRows<BFloat16, int8_t>{w.w, w.scales, N, K}, x, y, M, N, K);
}
bool multiply_by_tiles(const Int4& w, const BFloat16* x, BFloat16* y, i64 M, i64 N, i64 K, bool quantize) {
    if (quantize) return multiply_panels(PanelsOfInt4<int8_t>{w, N}, x, y, M, N, K);
    return multiply_panels(PanelsOfInt4<BFloat16>{w, N}, x, y, M, N, K);
}
#else
bool multiply_by_tiles(const BFloat16*, const BFloat16*, BFloat16*, i64, i64, i64) { return false; }
bool multiply_by_tiles(const Int8&, const BFloat16*, BFloat16*, i64, i64, i64, bool) { return false; }
bool multiply_by_tiles(const Int4&, const BFloat16*, BFloat16*, i64, i64, i64, bool) { return false; }
#endif

}  // namespace qwen_fast
