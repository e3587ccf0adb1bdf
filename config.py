"""A checkpoint's configuration: ModelArgs from its config.json, RoPE's frequencies, the shapes of published models.

A value that the models here do not carry is refused by name when config.json is read, never ignored.
"""
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cli import UserError


@dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches RoPE past the length it was first trained on."""
    rope_type: str                       # linear, llama3 or yarn
    factor: float
    original_max_position: int = 8192
    low_freq_factor: float = 1.0         # llama3: wavelengths longer than original / low are divided by factor,
    high_freq_factor: float = 4.0        # shorter than original / high are kept
    beta_fast: float = 32.0              # yarn: dimensions that turn more often than this are kept,
    beta_slow: float = 1.0               # less often than this are divided by factor
    truncate: bool = True
    attention_factor: float = 1.0        # multiplies cos and sin


@dataclass(frozen=True)
class ModelArgs:
    model_type: str
    dim: int
    n_layer: int
    n_head: int
    n_local_heads: int                   # KV heads
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    windows: tuple[int, ...] = ()        # per layer: how many positions attention looks back, 0 = all
    seq_length: int = 0                  # Qwen v1: the training length, from which logn and dynamic NTK count
    logn: bool = False
    dynamic_ntk: bool = False

    @classmethod
    def from_hf(cls, config: dict) -> "ModelArgs":
        """From the contents of a Hugging Face config.json. Errors: UserError, for a value that is not supported."""
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise not_supported("model_type", model_type, FAMILIES)
        try:
            return _from_qwen_v1(config) if model_type == "qwen" else _from_llama_like(config)
        except KeyError as error:
            raise UserError(f"config.json has no {error.args[0]!r}") from None

    @classmethod
    def from_name(cls, name: str) -> "ModelArgs":
        """A published shape by its name, e.g. "Qwen3-0.6B": see PUBLISHED."""
        if name not in PUBLISHED:
            raise UserError(f"unknown model name {name!r} (known: {', '.join(PUBLISHED)})")
        return cls.from_hf(PUBLISHED[name])


FAMILIES = ("qwen", "qwen2", "qwen3", "llama", "mistral")


def not_supported(key: str, value: Any, supported: Iterable) -> UserError:
    return UserError(f"config.json: {key} {value!r} is not supported (supported: {', '.join(map(str, supported))})")


def _from_qwen_v1(config: dict) -> ModelArgs:
    """Two generations of key names; the feed-forward width counts gate and up together."""
    def get(*names: str) -> Any:
        return next((config[n] for n in names if n in config), None)

    def need(*names: str) -> Any:
        if not get(*names):
            raise KeyError(names[0])
        return get(*names)
    if config.get("no_bias") not in (None, True):
        raise not_supported("no_bias", config["no_bias"], (True,))
    n_head, dim = need("num_attention_heads", "n_head"), need("hidden_size", "n_embd")
    seq_length = get("seq_length", "n_positions") or 2048
    return ModelArgs(
        model_type="qwen", dim=dim, n_layer=need("num_hidden_layers", "n_layer"), n_head=n_head, n_local_heads=n_head,
        head_dim=get("kv_channels") or dim // n_head,
        intermediate_size=need("intermediate_size", "ffn_hidden_size") // 2, vocab_size=config["vocab_size"],
        max_position=max(get("max_position_embeddings", "n_positions") or 0, seq_length),
        norm_eps=config.get("layer_norm_epsilon", 1e-6), rope_base=config.get("rotary_emb_base", 10000.0),
        qkv_bias=True, tie_word_embeddings=config.get("tie_word_embeddings", False), seq_length=seq_length,
        logn=config.get("use_logn_attn", True), dynamic_ntk=config.get("use_dynamic_ntk", True))


def _from_llama_like(config: dict) -> ModelArgs:
    if config.get("hidden_act") not in (None, "silu", "swish"):
        raise not_supported("hidden_act", config["hidden_act"], ("silu", "swish"))
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise UserError(f"config.json: {key} {config[key]}: mixture-of-experts layers are not supported yet")
    model_type, n_layer, n_head = config["model_type"], config["num_hidden_layers"], config["num_attention_heads"]
    attention_bias = config.get("attention_bias", False)
    rope_base, rope = _rope_from(config)
    max_position = config["max_position_embeddings"]
    if rope and rope.rope_type == "yarn":
        max_position = max(max_position, int(rope.original_max_position * rope.factor))
    return ModelArgs(
        model_type=model_type, dim=config["hidden_size"], n_layer=n_layer, n_head=n_head,
        n_local_heads=config.get("num_key_value_heads") or n_head,
        head_dim=config.get("head_dim") or config["hidden_size"] // n_head,
        intermediate_size=config["intermediate_size"], vocab_size=config["vocab_size"], max_position=max_position,
        norm_eps=config.get("rms_norm_eps", 1e-6), rope_base=rope_base, rope=rope,
        qkv_bias=attention_bias or model_type == "qwen2", o_bias=attention_bias and model_type != "qwen2",
        mlp_bias=config.get("mlp_bias", False), qk_norm=model_type == "qwen3",
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        windows=_windows_from(config, model_type, n_layer))


def _windows_from(config: dict, model_type: str, n_layer: int) -> tuple[int, ...]:
    window, layer_types = config.get("sliding_window"), config.get("layer_types")
    if not window or model_type == "llama" or (model_type != "mistral" and not config.get("use_sliding_window", False)):
        return (0,) * n_layer
    if layer_types:
        for kind in set(layer_types) - {"full_attention", "sliding_attention"}:
            raise not_supported("layer_types", kind, ("full_attention", "sliding_attention"))
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    first = 0 if model_type == "mistral" else config.get("max_window_layers", 0)
    return tuple(window if layer >= first else 0 for layer in range(n_layer))


def _rope_from(config: dict) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling, from rope_theta + rope_scaling (older files) or rope_parameters (newer ones)."""
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    for holder in (config, scaling):
        if holder.get("partial_rotary_factor", 1.0) != 1.0:
            raise not_supported("partial_rotary_factor", holder["partial_rotary_factor"], (1.0,))
    if rope_type == "default":
        return base, None
    if rope_type not in ("linear", "llama3", "yarn"):
        raise not_supported("rope type", rope_type, ("default", "linear", "llama3", "yarn"))
    factor, attention_factor = float(scaling["factor"]), scaling.get("attention_factor")
    if rope_type != "yarn":
        attention_factor = 1.0
    elif attention_factor is None:       # YaRN (Peng et al. 2023), section 3.4
        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
        both = scaling.get("mscale") and scaling.get("mscale_all_dim")
        attention_factor = mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"]) if both else mscale(1.0)
    return base, RopeScaling(
        rope_type, factor, scaling.get("original_max_position_embeddings") or config["max_position_embeddings"],
        scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0),
        scaling.get("beta_fast") or 32.0, scaling.get("beta_slow") or 1.0, scaling.get("truncate", True),
        attention_factor)


def ntk_alpha(args: ModelArgs, prompt_length: int) -> int:
    """Qwen v1's dynamic NTK: by how much a prompt beyond the training length stretches RoPE, for its text's whole life.
    1 for all other models."""
    if not args.dynamic_ntk or prompt_length <= args.seq_length:
        return 1
    return 2 ** math.ceil(math.log2(prompt_length / args.seq_length) + 1) - 1


def rope_frequencies(args: ModelArgs, prompt_length: int = 0) -> Tensor:
    """Angle per position of each rotated pair, fp32 [D/2]: base^(-2i/D), scaled as the checkpoint says.

    prompt_length: see ntk_alpha."""
    D, base, rope = args.head_dim, args.rope_base, args.rope
    if (alpha := ntk_alpha(args, prompt_length)) > 1:
        base *= alpha ** (D / (D - 2))
    freqs = 1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    if rope is None:
        return freqs
    if rope.rope_type == "linear":
        return freqs / rope.factor
    if rope.rope_type == "llama3":
        rotations = rope.original_max_position * freqs / (2 * math.pi)               # over the original context
        keep = ((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return keep * freqs + (1 - keep) * freqs / rope.factor

    def pair_with(rotations: float) -> float:
        """YaRN: the index i of the pair that turns so often over the original context."""
        return D * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(base))
    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    ramp = ((torch.arange(D // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)
    return freqs * (1 - ramp) + freqs / rope.factor * ramp


# ---- published shapes, as their config.json has them

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


_LLAMA31 = dict(rope_scaling=dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192))
_LLAMA32 = dict(rope_scaling=dict(rope_type="llama3", factor=32.0, original_max_position_embeddings=8192),
                tie_word_embeddings=True)
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
    "Llama-2-7B": _shape("llama", 32, 4096, 32, 32, 128, 11008, 32000, 1e4, 4096, rms_norm_eps=1e-5),
    "Llama-2-13B": _shape("llama", 40, 5120, 40, 40, 128, 13824, 32000, 1e4, 4096, rms_norm_eps=1e-5),
    "Llama-2-70B": _shape("llama", 80, 8192, 64, 8, 128, 28672, 32000, 1e4, 4096, rms_norm_eps=1e-5),
    "Llama-3.1-8B": _shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 5e5, 131072, rms_norm_eps=1e-5, **_LLAMA31),
    "Llama-3.2-1B": _shape("llama", 16, 2048, 32, 8, 64, 8192, 128256, 5e5, 131072, rms_norm_eps=1e-5, **_LLAMA32),
    "Llama-3.2-3B": _shape("llama", 28, 3072, 24, 8, 128, 8192, 128256, 5e5, 131072, rms_norm_eps=1e-5, **_LLAMA32),
    "CodeLlama-7B-Python": _shape("llama", 32, 4096, 32, 32, 128, 11008, 32000, 1e6, 16384, rms_norm_eps=1e-5),
    "CodeLlama-34B": _shape("llama", 48, 8192, 64, 8, 128, 22016, 32000, 1e6, 16384, rms_norm_eps=1e-5),
}
