"""A checkpoint's configuration: ModelArgs from its config.json, and RoPE's frequencies.

Every key that is read has its type, range and default here, the default that transformers has; what is out of range, or
what the models here do not carry, is refused by name, never ignored.
"""
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from cli import UserError
from schema import Checked, checked
from shapes import PUBLISHED


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
    # Mixture of experts; 0 and () in dense models, where intermediate_size is the feed-forward's width in every layer
    n_expert: int = 0
    n_expert_per_token: int = 0
    expert_size: int = 0                 # feed-forward width of one expert
    shared_expert_size: int = 0          # of the expert that every token passes through, 0 for none
    normalize_experts: bool = False      # whether the chosen experts' weights are scaled to sum up to 1
    dense_layers: tuple[int, ...] = ()   # layers with a plain feed-forward all the same
    # Hybrids of attention and Gated DeltaNet; 0 and () elsewhere
    delta_layers: tuple[int, ...] = ()   # layers with a Gated DeltaNet in the place of attention
    delta_key_heads: int = 0
    delta_value_heads: int = 0
    delta_key_dim: int = 0               # of a head
    delta_value_dim: int = 0
    conv_size: int = 0                   # positions that the DeltaNet's convolution spans
    rotary_dim: int = 0                  # how much of a head RoPE turns, from its first dimension on; 0 for all
    output_gate: bool = False            # attention times the sigmoid of a gate
    norm_offset: float = 0.0             # what RMS norms add to their weights
    has_mtp: bool = False                # whether the checkpoint has a head for multi-token prediction
    windows: tuple[int, ...] = ()        # per layer: how many positions attention looks back, 0 = all
    seq_length: int = 0                  # Qwen v1: the training length, from which logn and dynamic NTK count
    logn: bool = False
    dynamic_ntk: bool = False

    def with_heads_of(self, names: Collection[str]) -> "ModelArgs":
        """For a checkpoint of tensors with these names. Of hybrids they say what heads there are: whether there is one
        for multi-token prediction, and one for tokens, as their config.json may tell of the vision model's."""
        if not self.delta_layers:
            return self
        tied = not any(name.startswith(("lm_head.", "output.")) for name in names)
        return replace(self, has_mtp="mtp.norm.weight" in names, tie_word_embeddings=tied)

    def has_experts(self, layer: int) -> bool:
        return self.n_expert > 0 and layer not in self.dense_layers

    @property
    def delta_channels(self) -> int:
        """Of a DeltaNet's convolution: queries, keys and values."""
        return 2 * self.delta_key_heads * self.delta_key_dim + self.delta_value_heads * self.delta_value_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelArgs":
        """From the contents of a Hugging Face config.json. Errors: UserError, for a value that is not supported."""
        if isinstance(text := config.get("text_config"), dict):          # a language model with a vision tower
            tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            config = {**text, "tie_word_embeddings": tied}
        model_type = config.get("model_type")
        if isinstance(model_type, str) and model_type.startswith("qwen4_exp"):
            raise UserError("config.json: model_type qwen4_exp (Qwen3.8-Flash-Next) is not supported: it is no Gated "
                            "DeltaNet hybrid alone, but has hyper-connections, indexed attention and n-gram embeddings")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UserError(f"config.json: model_type {model_type!r:.80} is not supported (supported: "
                            f"{', '.join(FAMILIES)})")
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            if config.get(key) and not issubclass(FAMILIES[model_type], MoEConfig):
                raise UserError(f"config.json: {key} {config[key]!r:.80}: {model_type} has no experts")
        args = checked(FAMILIES[model_type], config, "config.json").model_args()
        args.check()
        return args

    @classmethod
    def from_name(cls, name: str) -> "ModelArgs":
        """A published shape by its name, e.g. "Qwen3-0.6B": see PUBLISHED."""
        if name not in PUBLISHED:
            raise UserError(f"unknown model name {name!r} (known: {', '.join(PUBLISHED)})")
        return cls.from_hf(PUBLISHED[name])

    def check(self) -> None:
        """Errors: UserError, for a shape that cannot run."""
        heads = f"{self.n_head} attention heads of {self.head_dim}"
        if self.head_dim % 2 or self.head_dim < 4 or self.n_head * self.head_dim > 1 << 20:
            raise UserError(f"config.json: {heads}: head_dim is odd or too small, or they are too many")
        if self.n_head % self.n_local_heads:
            raise UserError(f"config.json: {heads} are no multiple of num_key_value_heads {self.n_local_heads}")
        if self.intermediate_size < 1:
            raise UserError("config.json: intermediate_size leaves nothing to gate and up")
        if self.delta_layers and self.delta_value_heads % self.delta_key_heads:
            raise UserError(f"config.json: linear_num_value_heads {self.delta_value_heads} are no multiple of "
                            f"linear_num_key_heads {self.delta_key_heads}")
        if self.delta_channels > 1 << 20 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise UserError(f"config.json: {self.delta_channels} channels of linear attention are too many, or RoPE "
                            f"cannot turn {self.rotary_dim} of {self.head_dim} dimensions")
        if self.n_expert_per_token > self.n_expert:
            raise UserError(f"config.json: num_experts_per_tok {self.n_expert_per_token} of {self.n_expert} experts")


# ---- config.json

Size = Annotated[int, Field(ge=1, le=1 << 20)]           # so that no product of two overflows
Factor = Annotated[float, Field(ge=1e-6, le=1e6)]
Experts = Annotated[int, Field(ge=1, le=1 << 12)]        # each has tensors of its own
One = Annotated[float, Field(ge=1, le=1)]                # another value is not supported
Rotated = Annotated[float, Field(gt=0, le=1)]            # the part of a head that RoPE turns


class QwenV1Config(Checked):
    """Two generations of key names; the feed-forward width counts gate and up together."""
    model_type: Literal["qwen"]
    vocab_size: int = Field(ge=1, le=1 << 24)
    hidden_size: Size = Field(validation_alias=AliasChoices("hidden_size", "n_embd"))
    num_hidden_layers: Size = Field(validation_alias=AliasChoices("num_hidden_layers", "n_layer"))
    num_attention_heads: Size = Field(validation_alias=AliasChoices("num_attention_heads", "n_head"))
    intermediate_size: Size = Field(validation_alias=AliasChoices("intermediate_size", "ffn_hidden_size"))
    kv_channels: Size | None = None
    seq_length: int = Field(2048, ge=2, le=1 << 31, validation_alias=AliasChoices("seq_length", "n_positions"))
    max_position_embeddings: int = Field(
        1, ge=1, le=1 << 31, validation_alias=AliasChoices("max_position_embeddings", "n_positions"))
    layer_norm_epsilon: float = Field(1e-6, gt=0, lt=1)
    rotary_emb_base: float = Field(10000.0, gt=1, le=1e12)
    rotary_pct: One = 1.0
    use_logn_attn: bool = True
    use_dynamic_ntk: bool = True
    no_bias: Literal[True] = True
    tie_word_embeddings: bool = False

    def model_args(self) -> ModelArgs:
        return ModelArgs(
            model_type="qwen", dim=self.hidden_size, n_layer=self.num_hidden_layers, n_head=self.num_attention_heads,
            n_local_heads=self.num_attention_heads,
            head_dim=self.kv_channels or self.hidden_size // self.num_attention_heads,
            intermediate_size=self.intermediate_size // 2, vocab_size=self.vocab_size,
            max_position=max(self.max_position_embeddings, self.seq_length), norm_eps=self.layer_norm_epsilon,
            rope_base=self.rotary_emb_base, qkv_bias=True, tie_word_embeddings=self.tie_word_embeddings,
            seq_length=self.seq_length, logn=self.use_logn_attn, dynamic_ntk=self.use_dynamic_ntk)


class LlamaConfig(Checked):
    """What the other families share. Sizes have no default: a file without them is damaged."""
    model_type: str
    vocab_size: int = Field(ge=1, le=1 << 24)
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None              # None: as many as query heads
    head_dim: Size | None = None
    max_position_embeddings: int = Field(ge=1, le=1 << 31)
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm_eps: float = Field(1e-6, gt=0, lt=1)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    partial_rotary_factor: One = 1.0
    rope_theta: float = Field(10000.0, gt=1, le=1e12)
    rope_scaling: dict[str, Any] | None = None           # older files
    rope_parameters: dict[str, Any] | None = None        # newer ones, with rope_theta among them
    original_max_position_embeddings: int | None = Field(None, ge=1, le=1 << 31)

    def windows(self) -> tuple[int, ...]:
        """Per layer, see ModelArgs."""
        return (0,) * self.num_hidden_layers

    def rope(self) -> "RopeConfig":
        return checked(RopeConfig, self.rope_scaling or self.rope_parameters or {}, "config.json: RoPE parameters")

    def model_args(self) -> ModelArgs:
        rope = self.rope()
        rope_base, max_position = rope.rope_theta or self.rope_theta, self.max_position_embeddings
        scaling = rope.scaling(self.original_max_position_embeddings or rope.original_max_position_embeddings
                               or max_position, max_position)
        if scaling and scaling.rope_type == "yarn":
            max_position = max(max_position, int(scaling.original_max_position * scaling.factor))
        return ModelArgs(
            model_type=self.model_type, dim=self.hidden_size, n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads, n_local_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            intermediate_size=self.intermediate_size, vocab_size=self.vocab_size, max_position=max_position,
            norm_eps=self.rms_norm_eps, rope_base=rope_base, rope=scaling,
            qkv_bias=self.attention_bias or self.model_type in ("qwen2", "qwen2_moe"), o_bias=self.attention_bias,
            mlp_bias=self.mlp_bias, qk_norm=self.model_type in ("qwen3", "qwen3_moe"),
            tie_word_embeddings=self.tie_word_embeddings, windows=self.windows())


class MistralConfig(LlamaConfig):
    num_key_value_heads: Size | None = 8
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    sliding_window: Size | None = 4096
    layer_types: None = None                             # transformers does not follow it

    def windows(self) -> tuple[int, ...]:
        return (self.sliding_window or 0,) * self.num_hidden_layers


class Qwen2Config(LlamaConfig):
    num_key_value_heads: Size | None = 32
    attention_bias: Literal[False] = False               # of transformers' qwen2, whose queries, keys and values have
    mlp_bias: Literal[False] = False                     # one all the same
    use_sliding_window: bool = False
    sliding_window: Size | None = 4096
    max_window_layers: int = Field(28, ge=0, le=1 << 20)
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    def windows(self) -> tuple[int, ...]:
        layers, window = self.num_hidden_layers, self.sliding_window or 0 if self.use_sliding_window else 0
        if self.layer_types is None:
            return tuple(window if layer >= self.max_window_layers else 0 for layer in range(layers))
        if len(self.layer_types) != layers:
            raise UserError(f"config.json: layer_types has {len(self.layer_types)} entries, and there are {layers} "
                            "layers")
        return tuple(window if kind == "sliding_attention" else 0 for kind in self.layer_types)


class Qwen3Config(Qwen2Config):
    head_dim: Size = 128
    attention_bias: bool = False


class MoEConfig(LlamaConfig):
    """What the families with experts share; as for the sizes, what has no default must be there."""
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    num_experts: Experts = Field(validation_alias=AliasChoices("num_experts", "num_local_experts"))
    num_experts_per_tok: Size
    use_sliding_window: Literal[False] = False           # no release has one
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[int] | None = None
    norm_topk_prob: bool = False

    def model_args(self) -> ModelArgs:
        plain = self.mlp_only_layers or []
        dense = (i for i in range(self.num_hidden_layers) if i in plain or (i + 1) % self.decoder_sparse_step)
        return replace(super().model_args(), n_expert=self.num_experts, n_expert_per_token=self.num_experts_per_tok,
                       normalize_experts=self.norm_topk_prob, dense_layers=tuple(dense))


class Qwen2MoeConfig(MoEConfig):
    num_key_value_heads: Size | None = 16
    qkv_bias: Literal[True] = True
    moe_intermediate_size: Size
    shared_expert_intermediate_size: Size

    def model_args(self) -> ModelArgs:
        return replace(super().model_args(), expert_size=self.moe_intermediate_size,
                       shared_expert_size=self.shared_expert_intermediate_size)


class Qwen3MoeConfig(MoEConfig):
    num_key_value_heads: Size | None = 4
    attention_bias: bool = False
    moe_intermediate_size: Size

    def model_args(self) -> ModelArgs:
        return replace(super().model_args(), expert_size=self.moe_intermediate_size)


class MixtralConfig(MoEConfig):
    num_key_value_heads: Size | None = 8
    rms_norm_eps: float = Field(1e-5, gt=0, lt=1)
    rope_theta: float = Field(1e6, gt=1, le=1e12)
    sliding_window: Size | None = None
    norm_topk_prob: Literal[True] = True                 # what the model does; its files do not say so
    mlp_only_layers: None = None
    decoder_sparse_step: Literal[1] = 1

    def windows(self) -> tuple[int, ...]:
        return (self.sliding_window or 0,) * self.num_hidden_layers

    def model_args(self) -> ModelArgs:
        return replace(super().model_args(), expert_size=self.intermediate_size)


class HybridConfig(LlamaConfig):
    """What the families with Gated DeltaNet layers share."""
    head_dim: Size = 256
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    sliding_window: None = None
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention", "linear_attention"]] | None = None
    full_attention_interval: Size = 4
    linear_num_key_heads: Size = 16
    linear_num_value_heads: Size = 32
    linear_key_head_dim: Annotated[int, Field(ge=1, le=1 << 10)] = 128
    linear_value_head_dim: Annotated[int, Field(ge=1, le=1 << 10)] = 128
    linear_conv_kernel_dim: Annotated[int, Field(ge=2, le=64)] = 4
    partial_rotary_factor: Rotated | None = None
    attn_output_gate: Literal[True] = True
    output_gate_type: Literal["swish", "silu"] = "silu"
    mtp_num_hidden_layers: Annotated[int, Field(ge=0, le=1)] = 0
    mtp_use_dedicated_embeddings: Literal[False] = False

    def rope(self) -> "RopeConfig":
        return checked(PartialRopeConfig, self.rope_scaling or self.rope_parameters or {},
                       "config.json: RoPE parameters")

    def model_args(self) -> ModelArgs:
        layers, kinds = range(self.num_hidden_layers), self.layer_types
        if kinds is None:
            kinds = ["linear_attention" if (layer + 1) % self.full_attention_interval else "full_attention"
                     for layer in layers]
        if len(kinds) != len(layers) or "full_attention" not in kinds:
            raise UserError(f"config.json: layer_types has {kinds.count('full_attention')} full_attention in "
                            f"{len(kinds)} entries, and there are {len(layers)} layers")
        factor = self.rope().partial_rotary_factor or self.partial_rotary_factor or 0.25
        return replace(
            super().model_args(), delta_layers=tuple(i for i in layers if kinds[i] == "linear_attention"),
            delta_key_heads=self.linear_num_key_heads, delta_value_heads=self.linear_num_value_heads,
            delta_key_dim=self.linear_key_head_dim, delta_value_dim=self.linear_value_head_dim,
            conv_size=self.linear_conv_kernel_dim, rotary_dim=int(self.head_dim * factor), output_gate=True,
            norm_offset=1.0, qk_norm=True)


class Qwen35Config(HybridConfig):
    num_key_value_heads: Size | None = 4


class Qwen3NextConfig(HybridConfig, Qwen3MoeConfig):
    num_key_value_heads: Size | None = 2
    attention_bias: Literal[False] = False
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: Size

    def model_args(self) -> ModelArgs:
        return replace(super().model_args(), shared_expert_size=self.shared_expert_intermediate_size)


class Qwen35MoeConfig(Qwen3NextConfig):
    intermediate_size: Size = 1                          # no layer has a plain feed-forward
    norm_topk_prob: Literal[True] = True
    mlp_only_layers: None = None
    decoder_sparse_step: Literal[1] = 1


class RopeConfig(Checked):
    """rope_scaling or rope_parameters."""
    rope_type: Literal["default", "linear", "llama3", "yarn"] = Field(
        "default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: float | None = Field(None, gt=1, le=1e12)
    partial_rotary_factor: One | None = None
    factor: float | None = Field(None, ge=1, le=1e6)
    original_max_position_embeddings: int | None = Field(None, ge=1, le=1 << 31)
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    beta_fast: Factor | None = None
    beta_slow: Factor | None = None
    truncate: bool = True
    attention_factor: Factor | None = None
    mscale: float | None = Field(None, ge=0, le=1e6)
    mscale_all_dim: float | None = Field(None, ge=0, le=1e6)
    full_attention: None = None                          # parameters for each kind of layer are not supported
    sliding_attention: None = None

    def scaling(self, original_max_position: int, max_position: int) -> RopeScaling | None:
        if self.rope_type == "default":
            return None
        needed = ("factor", "low_freq_factor", "high_freq_factor") if self.rope_type == "llama3" else ("factor",)
        for key in needed if self.rope_type != "yarn" else ():
            if getattr(self, key) is None:
                raise UserError(f"config.json: RoPE parameters of type {self.rope_type} need a {key}")
        factor, attention_factor = self.factor or max(max_position / original_max_position, 1.0), 1.0
        if self.rope_type == "yarn":
            attention_factor = self.attention_factor or self.yarn_attention_factor(factor)
        low, high = self.low_freq_factor or 1.0, self.high_freq_factor or 4.0
        beta_fast, beta_slow = self.beta_fast or 32.0, self.beta_slow or 1.0
        if low >= high or beta_fast < beta_slow:
            raise UserError("config.json: RoPE parameters: high_freq_factor must exceed low_freq_factor, and beta_fast "
                            "beta_slow")
        return RopeScaling(self.rope_type, factor, original_max_position, low, high, beta_fast, beta_slow,
                           self.truncate, attention_factor)

    def yarn_attention_factor(self, factor: float) -> float:
        """YaRN (Peng et al. 2023), section 3.4."""
        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0
        if self.mscale and self.mscale_all_dim:
            return mscale(self.mscale) / mscale(self.mscale_all_dim)
        return mscale(1.0)


class PartialRopeConfig(RopeConfig):
    partial_rotary_factor: Rotated | None = None


FAMILIES: dict[str, type[QwenV1Config] | type[LlamaConfig]] = {
    "qwen": QwenV1Config, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig,
    "qwen2_moe": Qwen2MoeConfig, "qwen3_moe": Qwen3MoeConfig, "mixtral": MixtralConfig, "qwen3_next": Qwen3NextConfig,
    "qwen3_5": Qwen35Config, "qwen3_5_text": Qwen35Config, "qwen3_5_moe": Qwen35MoeConfig,
    "qwen3_5_moe_text": Qwen35MoeConfig}


# ---- RoPE

def ntk_alpha(args: ModelArgs, prompt_length: int) -> int:
    """Qwen v1's dynamic NTK: by how much a prompt beyond the training length stretches RoPE, for its text's whole life.
    1 for all other models."""
    if not args.dynamic_ntk or prompt_length <= args.seq_length:
        return 1
    return 2 ** math.ceil(math.log2(prompt_length / args.seq_length) + 1) - 1


def rope_frequencies(args: ModelArgs, prompt_length: int = 0) -> Tensor:
    """Angle per position of each rotated pair, fp32 [D/2]: base^(-2i/D), scaled as the checkpoint says. D: how many
    dimensions of a head are rotated.

    prompt_length: see ntk_alpha."""
    D, base, rope = args.rotary_dim or args.head_dim, args.rope_base, args.rope
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
