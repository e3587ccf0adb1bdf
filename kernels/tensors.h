// What the operators share that take tensors. The products (products.h) do without: PyTorch's headers take longer to
// compile than they do.
#pragma once
#include <ATen/core/Tensor.h>

namespace {

using at::Tensor;

// Calls f with a BFloat16 or a float, the type of t's values.
template <typename F> void by_dtype(const Tensor& t, F f) {
    if (t.scalar_type() == at::kBFloat16) f(BFloat16());
    else if (t.scalar_type() == at::kFloat) f(0.0f);
    else TORCH_CHECK(false, "kernels: dtype ", t.scalar_type(), " (bfloat16 and float are supported)");
}

}  // namespace
