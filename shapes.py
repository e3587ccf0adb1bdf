"""The shapes of published models, as their config.json has them: for --list_models, and to measure speed with random
weights."""

def _shape(model_type: str, layers: int, dim: int, heads: int, kv: int, head_dim: int, ffn: int, vocab: int,
           theta: float, context: int, **more) -> dict:
    return dict(model_type=model_type, num_hidden_layers=layers, hidden_size=dim, num_attention_heads=heads,
                num_key_value_heads=kv, head_dim=head_dim, intermediate_size=ffn, vocab_size=vocab, rope_theta=theta,
                max_position_embeddings=context, **more)


def _qwen_v1(layers: int, dim: int, heads: int, ffn: int, vocab: int, theta: float = 10000.0, context: int = 8192,
             extended: bool = True) -> dict:
    return dict(model_type="qwen", num_hidden_layers=layers, hidden_size=dim, num_attention_heads=heads,
                intermediate_size=2 * ffn, vocab_size=vocab, rotary_emb_base=theta, seq_length=context,
                max_position_embeddings=context, use_logn_attn=extended, use_dynamic_ntk=extended)


def _experts(number: int, per_token: int, size: int, **more) -> dict:
    return dict(num_experts=number, num_experts_per_tok=per_token, moe_intermediate_size=size, **more)


def _hybrid(model_type: str, layers: int, dim: int, heads: int, kv: int, ffn: int, value_heads: int,
            theta: float = 1e7, vocab: int = 248320, **more) -> dict:
    rope = dict(rope_type="default", rope_theta=theta, partial_rotary_factor=0.25)
    shape = _shape(model_type, layers, dim, heads, kv, 256, ffn, vocab, theta, 262144, **more)
    return shape | dict(linear_num_value_heads=value_heads, rope_parameters=rope)


_LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
_LLAMA31 = dict(rope_scaling=dict(factor=8.0, **_LLAMA3))
_LLAMA32 = dict(rope_scaling=dict(factor=32.0, **_LLAMA3), tie_word_embeddings=True)
_TIED = dict(tie_word_embeddings=True)
PUBLISHED = {
    "Qwen-1.8B": _qwen_v1(24, 2048, 16, 5504, 151936),
    "Qwen-7B": _qwen_v1(32, 4096, 32, 11008, 151936),
    "Qwen-14B": _qwen_v1(40, 5120, 40, 13696, 152064),
    "Qwen-72B": _qwen_v1(80, 8192, 64, 24576, 152064, 1e6, 32768, extended=False),
    "Qwen1.5-0.5B": _shape("qwen2", 24, 1024, 16, 16, 64, 2816, 151936, 1e6, 32768, **_TIED),
    "Qwen1.5-1.8B": _shape("qwen2", 24, 2048, 16, 16, 128, 5504, 151936, 1e6, 32768),
    "Qwen1.5-4B": _shape("qwen2", 40, 2560, 20, 20, 128, 6912, 151936, 5e6, 32768),
    "Qwen1.5-7B": _shape("qwen2", 32, 4096, 32, 32, 128, 11008, 151936, 1e6, 32768),
    "Qwen1.5-14B": _shape("qwen2", 40, 5120, 40, 40, 128, 13696, 152064, 1e6, 32768),
    "Qwen1.5-32B": _shape("qwen2", 64, 5120, 40, 8, 128, 27392, 152064, 1e6, 32768),
    "Qwen1.5-72B": _shape("qwen2", 80, 8192, 64, 64, 128, 24576, 152064, 1e6, 32768),
    "Qwen2-0.5B": _shape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, 1e6, 131072, **_TIED),
    "Qwen2-1.5B": _shape("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, 1e6, 131072, **_TIED),
    "Qwen2-7B": _shape("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, 1e6, 131072),
    "Qwen2-72B": _shape("qwen2", 80, 8192, 64, 8, 128, 29568, 152064, 1e6, 131072),
    "Qwen2.5-0.5B": _shape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, 1e6, 32768, **_TIED),
    "Qwen2.5-1.5B": _shape("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, 1e6, 131072, **_TIED),
    "Qwen2.5-3B": _shape("qwen2", 36, 2048, 16, 2, 128, 11008, 151936, 1e6, 32768, **_TIED),
    "Qwen2.5-7B": _shape("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, 1e6, 131072),
    "Qwen2.5-14B": _shape("qwen2", 48, 5120, 40, 8, 128, 13824, 152064, 1e6, 131072),
    "Qwen2.5-32B": _shape("qwen2", 64, 5120, 40, 8, 128, 27648, 152064, 1e6, 131072),
    "Qwen2.5-72B": _shape("qwen2", 80, 8192, 64, 8, 128, 29568, 152064, 1e6, 131072),
    "Qwen3-0.6B": _shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 1e6, 40960, **_TIED),
    "Qwen3-1.7B": _shape("qwen3", 28, 2048, 16, 8, 128, 6144, 151936, 1e6, 40960, **_TIED),
    "Qwen3-4B": _shape("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, 1e6, 40960, **_TIED),
    "Qwen3-8B": _shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 1e6, 40960),
    "Qwen3-14B": _shape("qwen3", 40, 5120, 40, 8, 128, 17408, 151936, 1e6, 40960),
    "Qwen3-32B": _shape("qwen3", 64, 5120, 64, 8, 128, 25600, 151936, 1e6, 40960),
    "Qwen1.5-MoE-A2.7B": _shape("qwen2_moe", 24, 2048, 16, 16, 128, 5632, 151936, 1e6, 8192,
                                **_experts(60, 4, 1408, shared_expert_intermediate_size=5632)),
    "Qwen2-57B-A14B": _shape("qwen2_moe", 28, 3584, 28, 4, 128, 18944, 151936, 1e6, 131072,
                             **_experts(64, 8, 2560, shared_expert_intermediate_size=20480)),
    "Qwen3-30B-A3B": _shape("qwen3_moe", 48, 2048, 32, 4, 128, 6144, 151936, 1e6, 40960,
                            **_experts(128, 8, 768, norm_topk_prob=True)),
    "Qwen3-Coder-30B-A3B": _shape("qwen3_moe", 48, 2048, 32, 4, 128, 6144, 151936, 1e7, 262144,
                                  **_experts(128, 8, 768, norm_topk_prob=True)),
    "Qwen3-235B-A22B": _shape("qwen3_moe", 94, 4096, 64, 4, 128, 12288, 151936, 1e6, 40960,
                              **_experts(128, 8, 1536, norm_topk_prob=True)),
    "Qwen3-Coder-480B-A35B": _shape("qwen3_moe", 62, 6144, 96, 8, 128, 8192, 151936, 1e7, 262144,
                                    **_experts(160, 8, 2560, norm_topk_prob=True)),
    "Llama-2-7B": _shape("llama", 32, 4096, 32, 32, 128, 11008, 32000, 1e4, 4096, rms_norm_eps=1e-5),
    "Llama-2-13B": _shape("llama", 40, 5120, 40, 40, 128, 13824, 32000, 1e4, 4096, rms_norm_eps=1e-5),
    "Llama-2-70B": _shape("llama", 80, 8192, 64, 8, 128, 28672, 32000, 1e4, 4096, rms_norm_eps=1e-5),
    "Llama-3.1-8B": _shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 5e5, 131072, rms_norm_eps=1e-5, **_LLAMA31),
    "Llama-3.2-1B": _shape("llama", 16, 2048, 32, 8, 64, 8192, 128256, 5e5, 131072, rms_norm_eps=1e-5, **_LLAMA32),
    "Llama-3.2-3B": _shape("llama", 28, 3072, 24, 8, 128, 8192, 128256, 5e5, 131072, rms_norm_eps=1e-5, **_LLAMA32),
    "Mixtral-8x7B": _shape("mixtral", 32, 4096, 32, 8, 128, 14336, 32000, 1e6, 32768, rms_norm_eps=1e-5,
                           num_local_experts=8, num_experts_per_tok=2),
    "Qwen3-Next-80B-A3B": _hybrid("qwen3_next", 48, 2048, 16, 2, 5120, 32, 1e7, vocab=151936,
                                  **_experts(512, 10, 512, shared_expert_intermediate_size=512)),
    "Qwen3-Coder-Next": _hybrid("qwen3_next", 48, 2048, 16, 2, 5120, 32, 5e6, vocab=151936,
                                **_experts(512, 10, 512, shared_expert_intermediate_size=512)),
    "Qwen3.5-0.8B": _hybrid("qwen3_5_text", 24, 1024, 8, 2, 3584, 16, **_TIED),
    "Qwen3.5-2B": _hybrid("qwen3_5_text", 24, 2048, 8, 2, 6144, 16, **_TIED),
    "Qwen3.5-4B": _hybrid("qwen3_5_text", 32, 2560, 16, 4, 9216, 32, **_TIED),
    "Qwen3.5-9B": _hybrid("qwen3_5_text", 32, 4096, 16, 4, 12288, 32),
    "Qwen3.5-27B": _hybrid("qwen3_5_text", 64, 5120, 24, 4, 17408, 48),
    "Qwen3.6-27B": _hybrid("qwen3_5_text", 64, 5120, 24, 4, 17408, 48),
    "Qwen3.8-27B": _hybrid("qwen3_5_text", 64, 5120, 24, 4, 17408, 48),
    "Qwen3.5-35B-A3B": _hybrid("qwen3_5_moe_text", 40, 2048, 16, 2, 1, 32,
                               **_experts(256, 8, 512, shared_expert_intermediate_size=512)),
    "Qwen3.6-35B-A3B": _hybrid("qwen3_5_moe_text", 40, 2048, 16, 2, 1, 32,
                               **_experts(256, 8, 512, shared_expert_intermediate_size=512)),
    "Qwen3.5-122B-A10B": _hybrid("qwen3_5_moe_text", 48, 3072, 32, 2, 1, 64,
                                 **_experts(256, 8, 1024, shared_expert_intermediate_size=1024)),
    "Qwen3.5-397B-A17B": _hybrid("qwen3_5_moe_text", 60, 4096, 32, 2, 1, 64,
                                 **_experts(512, 10, 1024, shared_expert_intermediate_size=1024)),
    "CodeLlama-7B-Python": _shape("llama", 32, 4096, 32, 32, 128, 11008, 32000, 1e6, 16384, rms_norm_eps=1e-5),
    "CodeLlama-34B": _shape("llama", 48, 8192, 64, 8, 128, 22016, 32000, 1e6, 16384, rms_norm_eps=1e-5),
}
