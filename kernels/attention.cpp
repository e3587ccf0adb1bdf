// A translation unit of its own, without PyTorch's headers: attention over KV caches.
#include "attention.h"

namespace qwen_fast {

template void attend_heads(const float*, const KVCache&, i64, i64, const i64*, i64, float*);
template void attend_heads(const BFloat16*, const KVCache&, i64, i64, const i64*, i64, float*);
template void attend_heads(const BFloat16*, const KVCache&, i64, i64, const i64*, i64, BFloat16*);

}  // namespace qwen_fast
