// The CPU kernels: matrix-vector products (products.cpp) and attention that run at the speed of the memory, and whole
// layers made of them, which leave matrix-matrix products to PyTorch. build.py builds them on first use; __init__.py
// holds a plain PyTorch twin of every operator.
#include <torch/library.h>

#include "layers.h"

TORCH_LIBRARY(qwen_fast, m) {
    const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
    m.def("linear(Tensor x, Tensor[] tensors, int out_features, bool quantize_activations) -> Tensor", tags);
    m.def("pack_int4(Tensor stored, Tensor(a!) packed) -> ()");
    // clang-format off
    m.def("experts(Tensor x, Tensor chosen, Tensor weights, Tensor[] w13, Tensor[] w2, int n_expert, int size, "
          "bool quantize_activations) -> Tensor", tags);
    m.def("attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor input_pos, int window, Tensor[] scales) -> "
          "Tensor", tags);
    // The state is written to, which the compiler must not know: it cannot copy it, and refuses in a nested region.
    m.def("delta_net(Tensor qkv, Tensor g, Tensor b, Tensor conv, Tensor input_pos, Tensor[] state) -> Tensor", tags);
    m.def("fuse_layers(int n_head, float eps, float norm_offset, bool quantize_activations) -> Tensor", fuse_layers);
    m.def("add_attention(Tensor(a!) handle, Tensor norm, Tensor[] wqkv, Tensor? q_norm, Tensor? k_norm, Tensor[] wo, "
          "Tensor k_cache, Tensor v_cache, int window, bool output_gate, Tensor[] scales) -> ()");
    m.def("add_deltanet(Tensor(a!) handle, Tensor norm, Tensor[] wqkv, Tensor[] wba, Tensor conv, Tensor A_log, "
          "Tensor dt_bias, Tensor output_norm, Tensor[] wo, Tensor[] state) -> ()");
    m.def("add_feed_forward(Tensor(a!) handle, Tensor norm, Tensor[] w13, Tensor[] w2, int size, Tensor[] router, "
          "Tensor[] shared_gate, Tensor[] shared_w13, Tensor[] shared_w2, int shared_size, int n_expert, "
          "int n_chosen, bool normalize) -> ()");
    // clang-format on
    m.def("run_fused(Tensor x, Tensor(a!) handle, Tensor cos, Tensor sin, Tensor? logn, Tensor input_pos) -> Tensor",
          tags);
}

TORCH_LIBRARY_IMPL(qwen_fast, CPU, m) {
    m.impl("linear", &linear);
    m.impl("pack_int4", &pack_int4);
    m.impl("experts", &experts);
    m.impl("attend", &attend);
    m.impl("delta_net", &delta_net);
    m.impl("add_attention", &add_attention);
    m.impl("add_deltanet", &add_deltanet);
    m.impl("add_feed_forward", &add_feed_forward);
    m.impl("run_fused", &run_fused);
}
