"""Tiny random checkpoints of every architecture, made by transformers, the reference that the tests compare with."""
import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SIZES = dict(vocab_size=320, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=96,
             max_position_embeddings=512, initializer_range=0.15)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64, rope_theta=10000.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10000.0)
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
MOE = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, initializer_range=0.1)
DELTA = dict(head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
             linear_value_head_dim=16, full_attention_interval=2)
HYBRID = dict(**DELTA, initializer_range=0.05, rope_parameters=dict(           # larger weights: fp32 is off by 1e-4
    rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5, mrope_section=[3, 3, 2],
    mrope_interleaved=True))
FAMILIES = {
    "llama2": ("Llama", dict(num_key_value_heads=4)),
    "llama3.1": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama3.2-tied": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-linear": ("Llama", dict(rope_parameters=LINEAR)),
    "mistral-window": ("Mistral", dict(sliding_window=16, head_dim=32)),
    "qwen2": ("Qwen2", dict()),
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-yarn": ("Qwen2", dict(rope_parameters=YARN)),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "qwen3-tied": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen2-moe": ("Qwen2Moe", dict(**MOE, shared_expert_intermediate_size=80, mlp_only_layers=[1])),
    "qwen3-moe": ("Qwen3Moe", dict(**MOE, head_dim=32, norm_topk_prob=True)),
    "qwen3-moe-sparse": ("Qwen3Moe", dict(**MOE, head_dim=32, decoder_sparse_step=2)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2, initializer_range=0.1)),
    "qwen3-next": ("Qwen3Next", {**MOE, **HYBRID, "shared_expert_intermediate_size": 80, "rope_parameters": dict(
        rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25)}),
    "qwen3.5": ("Qwen3_5", dict(**HYBRID, tie_word_embeddings=True)),
    "qwen3.5-moe": ("Qwen3_5Moe", {**MOE, **HYBRID, "shared_expert_intermediate_size": 80}),
}

HYBRIDS = ("qwen3-next", "qwen3.5", "qwen3.5-moe")
QWEN_V1 = {"qwen-v1": dict(), "qwen-v1-ntk": dict(seq_length=64)}        # the latter: beyond its training length


def reference(family: str, seed: int = 0, **changes):
    """A transformers model in fp32 with eager attention; norms and biases are random too, so that a lost one shows."""
    import transformers
    name, options = FAMILIES[family]
    kind = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = kind(**{**SIZES, **copy.deepcopy(options), **changes})
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=p.mean().item(), std=0.3)
    return model.requires_grad_(False)


def add_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 tokens and <|endoftext|>: ids 257 .. 319 of the embedding are past its end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast",
                                                              "eos_token": "<|endoftext|>"}))


def save(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    add_tokenizer(folder)
    return folder


def save_qwen_v1(model, folder: Path, **config) -> Path:
    """A Qwen2 model under Qwen v1's names: within seq_length the two compute the same."""
    model.save_pretrained(folder)
    old, new = load_file(folder / "model.safetensors"), {}
    names = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
             "mlp.gate_proj": "mlp.w2", "mlp.up_proj": "mlp.w1", "mlp.down_proj": "mlp.c_proj"}
    for layer in range(model.config.num_hidden_layers):
        here, there = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            new[f"{there}attn.c_attn.{kind}"] = torch.cat([old[f"{here}self_attn.{p}_proj.{kind}"] for p in "qkv"])
        for a, b in names.items():
            new[f"{there}{b}.weight"] = old[f"{here}{a}.weight"]
    new |= {"transformer.wte.weight": old["model.embed_tokens.weight"],
            "transformer.ln_f.weight": old["model.norm.weight"],
            "lm_head.weight": old["lm_head.weight"]}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    c = model.config
    (folder / "config.json").write_text(json.dumps({
        "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads, "intermediate_size": 2 * c.intermediate_size,
        "vocab_size": c.vocab_size,
        "layer_norm_epsilon": c.rms_norm_eps, "rotary_emb_base": 10000, "seq_length": 512,
        "max_position_embeddings": 512, "kv_channels": c.head_dim if
        getattr(c, "head_dim", None) else c.hidden_size // c.num_attention_heads, "use_logn_attn": True,
        "use_dynamic_ntk": True, "no_bias": True,
        "tie_word_embeddings": False, **config}))
    add_tokenizer(folder)
    return folder


MTP_PREFIX = "mtp.layers.0."


def add_mtp_head(folder: Path, C: int = 64) -> dict[str, torch.Tensor]:
    """A random head beside a checkpoint's weights: a block like the model's first that has attention."""
    path, rng = folder / "model.safetensors", torch.Generator().manual_seed(5)
    tensors = load_file(path)
    alike = next(name for name in tensors if ".self_attn.q_proj." in name).partition("self_attn")[0]
    for name in [name for name in tensors if name.startswith(alike)]:
        shape = tensors[name].shape
        values = torch.randn(shape, generator=rng) * (0.05 if len(shape) > 1 else 1)
        tensors[MTP_PREFIX + name.removeprefix(alike)] = values
    tensors["mtp.fc.weight"] = torch.randn(C, 2 * C, generator=rng) * 0.1
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = torch.randn(C, generator=rng) * 0.2
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors
