"""Kernels, each beside its plain PyTorch twin, x_reference for x: here those in C++ for CPUs, and the choice between
them, those in Triton for GPUs (gpu.py) and PyTorch's operators. Imports nothing of this project.

B batch, S sequence, T cache length, H query heads, K KV heads, D head dim, C model dim; N rows and K_in columns of a
weight, in groups of G. For up to 16 tokens reading the weights takes the time, and the C++ does it at the memory's
speed. More are multiplied by the C++, too, where the CPU has AMX, AVX2 alone or, for int8 and int4, VNNI; else by
PyTorch.
"""
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build
from .build import available, built_library, cpu_has_bf16, unavailable_reason  # noqa: F401 (re-exported)
from .memory import copy_to, huge_zeros, keep_freed_memory, release_mapped, trim_memory  # noqa: F401

gpu_layers: Any = None
if (torch.version.cuda or torch.version.hip) and importlib.util.find_spec("triton"):
    gpu_layers = importlib.import_module(".gpu_layers", __name__)

GPU_KERNELS = ("auto", "triton", "plain")
chosen = {"gpu": "auto"}          # of GPU_KERNELS: auto times candidates, triton takes the first, plain is PyTorch
MAX_TOKENS, MAX_HEAD = 16, 512    # tokens of a matrix-vector product, dimensions of a head: as in tuning.h


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)


def on_gpu(device: torch.device) -> bool:
    """Whether the Triton kernels are to run there."""
    return device.type == "cuda" and gpu_layers is not None and chosen["gpu"] != "plain"


def describe(device: torch.device | str = "cpu") -> str:
    """Which kernels run on a device, in one line for the user."""
    return "Triton kernels" if on_gpu(torch.device(device)) else build.describe(device)


def few_on_gpu(x: Tensor, tensors: list[Tensor]) -> bool:
    """Whether a Triton kernel computes a linear of x: in a compiled step, because a launch by itself is slow."""
    return (torch.compiler.is_compiling() and 0 < x.numel() <= MAX_TOKENS * x.size(-1) and on_gpu(x.device)
            and gpu_layers.fits(tensors))


# ---- linears

def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K_in], weight [N, K_in] -> [..., N], summed in fp32."""
    if on_cpu(x) and x.numel() and weight.dtype == x.dtype and weight.is_contiguous() and available():
        return torch.ops.qwen_fast.linear(x, [weight], weight.size(0), False)
    if weight.dtype == x.dtype and few_on_gpu(x, [weight]):
        return torch.ops.qwen_fast.few_tokens_linear(x, [weight])
    return linear_reference(x, weight)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor, quantize_activations: bool = True) -> Tensor:
    """x [..., K_in], weight int8 [N, K_in], scales fp32 [N] -> [..., N]; w = scale * q.

    quantize_activations: may round up to 16 tokens (with VNNI and no AMX any number) to int16, in groups of 256 with a
    scale each; with AMX more of them, in bf16, to int8, in blocks of 512.
    """
    if on_cpu(x) and weight.is_contiguous() and available():
        return torch.ops.qwen_fast.linear(x, [weight, scales], weight.size(0), quantize_activations)
    if few_on_gpu(x, [weight, scales]):
        return torch.ops.qwen_fast.few_tokens_linear(x, [weight, scales])
    return int8_linear_reference(x, weight, scales)


def int8_linear_reference(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    if x.dtype == torch.float16:       # in which sums over q overflow
        return F.linear(x, (weight * scales[:, None]).to(x.dtype))
    # Scaled in fp32: for bf16 scales the compiler has a kernel of its own, which fails on CUDA.
    return (F.linear(x, weight.to(x.dtype)).float() * scales).to(x.dtype)


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, out_features: int,
                quantize_activations: bool = True) -> Tensor:
    """x [..., K_in] and weights from pack_int4 -> [..., N].

    quantize_activations: may round up to 16 tokens (with AVX2 or VNNI, unless there is AMX, any number) to int8, in
    groups of 32 with a scale each; with AMX more of them, in bf16, as int8_linear does, and the weights to int8.
    """
    if on_cpu(x) and available():
        return torch.ops.qwen_fast.linear(x, [packed, scales, zeros], out_features, quantize_activations)
    return int4_linear_reference(x, packed, scales, zeros, out_features)


def int4_linear_reference(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, out_features: int) -> Tensor:
    return F.linear(x, dequantize_packed_int4(packed, scales, zeros, out_features, x.size(-1), x.dtype))


def stored_int4_linear(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The same from the stored form, which GPUs use."""
    tensors, whole = [weight, scales, zeros], x.size(-1) % groupsize_of(x.size(-1), zeros.size(1)) == 0
    if whole and few_on_gpu(x, tensors):
        return torch.ops.qwen_fast.few_tokens_linear(x, tensors)
    if whole and on_gpu(x.device) and gpu_layers.fits(tensors):
        return F.linear(x, torch.ops.qwen_fast.dequantize(tensors, x.dtype))
    return F.linear(x, dequantize_int4(weight, scales, zeros, x.size(-1), x.dtype))


def quantize_activations_reference(x: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """x [..., K_in] as the kernels round it, in fp32: int16 by 256 beside int8 weights, int8 by 32 beside int4, for
    AMX's tiles int8 by 512 beside both."""
    most = 127 if dtype == torch.int8 else 127 * 257    # the latter is multiplied as two bytes, each up to 127
    padded = F.pad(x.float(), (0, -x.size(-1) % group)).unflatten(-1, (-1, group))
    high = padded.abs().amax(-1, keepdim=True)
    rounded = torch.where(high > 1e-30, (padded.double() * (most / high)).round().float() * (high / most), 0.0)
    return rounded.flatten(-2)[..., :x.size(-1)]


def int4_to_int8_reference(w: Tensor, scales: Tensor, zeros: Tensor, groupsize: int) -> Tensor:
    """int4 weights w [N, K_in], with scales and zeros [N, K_in / G], as they are rounded for AMX's tiles of int8: by a
    step for a row of a block of 512 columns, of which none can be more than 127; fp64."""
    scale, zero, groups = scales.float(), zeros.float() / 16, 512 // groupsize           # of a block
    most = F.pad(scale.abs() * torch.maximum(zero, 15 - zero), (0, -scale.size(1) % groups))
    step = most.unflatten(1, (-1, groups)).amax(2) / 127

    def by_column(t: Tensor, columns: int) -> Tensor:
        return t.repeat_interleave(columns, dim=1)[:, :w.size(1)].double()
    factor = 256 * scale / step.repeat_interleave(groups, dim=1)[:, :scale.size(1)]
    q = (w / by_column(scale, groupsize) + by_column(zero, groupsize)).round()
    parts = q * by_column(factor.round(), groupsize) + by_column((128 - zero * factor).round(), groupsize)
    return (parts / 256).floor() * by_column(step, 512)


# ---- int4 weights: w = scale * (q - zero / 16), scale and zero per row and group of G columns
#
# As stored: nibbles uint8 [N, K_in / 2], scales [N, K_in / G], zeros uint8 [N, K_in / G].
# Packed for the CPU: blocks of 16 rows, [N / 16, K_in / 32, 4, 16, 4] (quantized.h says what goes where), scales bf16
# and zeros [N / 16, K_in / G, 16]. K_in is padded to whole groups and N to whole blocks.

def pack_nibbles(q: Tensor) -> Tensor:
    """uint8 [N, K_in] of 0 .. 15 -> [N, ceil(K_in / 2)]: even columns in the lower halves, odd ones in the upper."""
    q = F.pad(q, (0, q.size(1) % 2))
    return q[:, ::2] | q[:, 1::2] << 4


def unpack_nibbles(weight: Tensor, in_features: int | None = None) -> Tensor:
    """The inverse of pack_nibbles: uint8 [N, in_features], by default two columns a byte."""
    return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1)[:, :in_features]


def dequantize_int4(weight: Tensor, scales: Tensor, zeros: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weights [N, in_features] that the stored form stands for."""
    padding = zeros.size(1) * groupsize_of(in_features, zeros.size(1)) - in_features
    q = F.pad(unpack_nibbles(weight, in_features), (0, padding)).view(*zeros.shape, -1)
    w = (q - zeros[:, :, None].float() / 16) * scales[:, :, None].float()
    return w.flatten(1)[:, :in_features].to(dtype)


def groupsize_of(in_features: int, groups: int) -> int:
    """Of the stored form. Sizes are powers of 2, of which only one makes several groups of so many columns."""
    return in_features if groups == 1 else 1 << (-(-in_features // groups) - 1).bit_length()


def pack_int4(weight: Tensor, scales: Tensor, zeros: Tensor, groupsize: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stored form to the CPU's packed form. groupsize: a multiple of 32."""
    (N, groups), width = scales.shape, scales.size(1) * groupsize // 2
    packed = huge_zeros((-(-N // 16), width // 16, 4, 16, 4), torch.uint8)
    padding = width - weight.size(1)
    weight = F.pad(weight, (0, padding)) if padding else weight
    pack = torch.ops.qwen_fast.pack_int4 if available() else pack_int4_reference
    pack(weight.contiguous(), packed)

    def in_blocks(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, -N % 16)).view(-1, 16, groups).transpose(1, 2)
    return packed, copy_to(in_blocks(scales), "cpu", torch.bfloat16), copy_to(in_blocks(zeros), "cpu", torch.uint8)


def pack_int4_reference(weight: Tensor, packed: Tensor) -> None:
    """The nibbles of whole groups, uint8 [N, K_in / 2], into packed."""
    words = interleave_halves(F.pad(weight, (0, 0, 0, -len(weight) % 16)).view(torch.int32))
    words = words.view(len(packed), 16, packed.size(1), 4)
    packed.view(torch.int32).squeeze(4).copy_(words.permute(0, 2, 3, 1))           # block, unit, register, row


def interleave_halves(words: Tensor) -> Tensor:
    """Of int32 words of eight columns each, nibbles 0 1 2 3 4 5 6 7 -> 0 4 1 5 2 6 3 7."""
    for shift, low in ((8, 0x0000ff00), (4, 0x00f000f0)):       # swaps middle bytes, then middle nibbles
        swapped = (words ^ words >> shift) & low
        words = words ^ swapped ^ swapped << shift
    return words


def dequantize_packed_int4(packed: Tensor, scales: Tensor, zeros: Tensor, out_features: int, in_features: int,
                           dtype: torch.dtype) -> Tensor:
    """The weights [N, K_in] that the packed form stands for."""
    q = torch.stack((packed & 15, packed >> 4), dim=3)          # block, unit, register, half, row, byte
    q = q.permute(0, 4, 1, 2, 3, 5).reshape(len(packed), 16, scales.size(1), -1).to(dtype)
    w = (q - zeros.to(dtype).transpose(1, 2)[..., None] / 16) * scales.to(dtype).transpose(1, 2)[..., None]
    return w.flatten(2).flatten(0, 1)[:out_features, :in_features]


# ---- experts

def experts(x: Tensor, chosen: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor], n_expert: int, size: int,
            quantize_activations: bool = True) -> Tensor:
    """The weighted sum of what experts make of x [M, C] -> [M, C].

    chosen: int64 [M, k], of each token; weights: fp32 [M, k]. w13, w2: see FeedForwardTensors; int4 is packed.
    """
    fits = all(weight.is_contiguous() and (rest or weight.dtype == x.dtype) for weight, *rest in (w13, w2))
    if on_cpu(x) and fits and available():
        return torch.ops.qwen_fast.experts(x.contiguous(), chosen, weights, w13, w2, n_expert, size,
                                           quantize_activations)
    if chosen.numel() <= FEW_PAIRS:
        return experts_gathered(x, chosen, weights, w13, w2, n_expert, size)
    return experts_one_by_one(x, chosen, weights, w13, w2, n_expert, size)


FEW_PAIRS = 64    # of a token and an expert, up to which gathering their weights is worth the memory it takes


def experts_gathered(x: Tensor, chosen: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor], n_expert: int,
                     size: int) -> Tensor:
    """The same by copies of the chosen experts' weights: no size depends on the choice."""
    C, k = x.size(1), chosen.size(1)
    gate_up = expert_weights(w13, chosen.flatten(), n_expert, 2 * size, C, x.dtype)                # [M k, 2 F, C]
    gate, up = torch.bmm(gate_up, x.repeat_interleave(k, dim=0)[:, :, None]).chunk(2, dim=1)
    down = expert_weights(w2, chosen.flatten(), n_expert, C, size, x.dtype)
    y = torch.bmm(down, F.silu(gate) * up).view(-1, k, C)
    return (y.float() * weights[:, :, None]).sum(1).to(x.dtype)


@torch.library.custom_op("qwen_fast::experts_one_by_one", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def experts_one_by_one(x: Tensor, chosen: Tensor, weights: Tensor, w13: list[Tensor], w2: list[Tensor], n_expert: int,
                       size: int) -> Tensor:
    """The same expert by expert, each over its tokens. Opaque to the compiler: the loop follows the choice's values."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in chosen.unique():
        token, slot = (chosen == e).nonzero(as_tuple=True)
        gate_up = expert_weights(w13, e[None], n_expert, 2 * size, x.size(1), x.dtype)[0]
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
        down = expert_weights(w2, e[None], n_expert, x.size(1), size, x.dtype)[0]
        y.index_add_(0, token, F.linear(F.silu(gate) * up, down).float() * weights[token, slot][:, None])
    return y.to(x.dtype)


@experts_one_by_one.register_fake
def _(x: Tensor, *others) -> Tensor:
    return torch.empty_like(x)


def expert_weights(tensors: list[Tensor], which: Tensor, n_expert: int, N: int, K_in: int,
                   dtype: torch.dtype) -> Tensor:
    """The weights of some experts, int64 [n] -> [n, N, K_in]."""
    weight, *params = (tensor.unflatten(0, (n_expert, -1))[which] for tensor in tensors)
    if len(params) == 2 and weight.dim() == 3:                  # the stored form
        q, scales, zeros = (part.flatten(0, 1) for part in (weight, *params))
        return dequantize_int4(q, scales, zeros, K_in, dtype).unflatten(0, (-1, N))
    if len(params) == 2:
        packed, scales, zeros = (part.flatten(0, 1) for part in (weight, *params))
        return dequantize_packed_int4(packed, scales, zeros, N * len(which), K_in, dtype).unflatten(0, (-1, N))
    return weight.to(dtype) * params[0].to(dtype)[:, :, None] if params else weight


# ---- whole layers; their twin is the loop over model.TransformerBlock
#
# A linear's list is [weight], int8 [weight, scales] or int4 [packed, scales, zeros], then its bias if any.

class AttentionTensors(NamedTuple):
    wqkv: list[Tensor]                # [(H + 2 K) * D, C]: queries, keys, values; then [H * D, C], the gates if any
    q_norm: Tensor | None             # [D], both or neither
    k_norm: Tensor | None
    wo: list[Tensor]                  # [C, H * D]
    k_cache: Tensor                   # [B, K, T, D]
    v_cache: Tensor
    window: int                       # 0 for none
    output_gate: bool
    scales: list[Tensor] = []         # [B, K, T, 1] of k_cache and v_cache in int8, see quantize_heads

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether the C++ computes it, for activations of a dtype."""
        D, cached = self.k_cache.size(3), torch.int8 if self.scales else dtype
        same = self.k_cache.dtype == self.v_cache.dtype == cached and dtype in (torch.bfloat16, torch.float32)
        return self.k_cache.device.type == "cpu" and same and D % 16 == 0 and D <= MAX_HEAD


class DeltaNetTensors(NamedTuple):
    """See deltanet.py. Hv value heads, N channels of the convolution."""
    wqkv: list[Tensor]                # [N + Hv * V, C]: queries, keys, values; gates
    wba: list[Tensor]                 # [2 * Hv, C]: writing strengths, decays
    conv: Tensor                      # [N, size]
    A_log: Tensor                     # [Hv]
    dt_bias: Tensor                   # [Hv]
    norm: Tensor                      # [V]
    wo: list[Tensor]                  # [C, Hv * V]
    state: list[Tensor]               # deltanet.BUFFERS of its DeltaState

    def fits(self, dtype: torch.dtype) -> bool:
        return fits_delta_net(self.conv, self.state, dtype)


class FeedForwardTensors(NamedTuple):
    """w2(silu(gate) * up), or experts of this kind, one after another in the rows of w13 and w2."""
    w13: list[Tensor]                 # [E * 2 * size, C]: gate, up
    w2: list[Tensor]                  # [E * C, size]
    size: int
    router: list[Tensor] = []         # [E, C]
    shared_gate: list[Tensor] = []    # [1, C], if any
    shared_w13: list[Tensor] = []
    shared_w2: list[Tensor] = []
    shared_size: int = 0
    n_expert: int = 0                 # 0: a single feed-forward, no experts
    n_chosen: int = 0
    normalize: bool = False           # whether the chosen experts' weights are scaled to sum up to 1


class LayerTensors(NamedTuple):
    attention_norm: Tensor            # [C]
    attention: AttentionTensors | DeltaNetTensors
    ffn_norm: Tensor
    feed_forward: FeedForwardTensors


class FusedLayers(NamedTuple):
    """Layers whose tensors are kept behind a single one: torch.compile would take seconds over hundreds."""
    handle: Tensor
    dtype: torch.dtype
    max_tokens: int = 1 << 62          # of all rows together


def fuse(layers: Sequence[LayerTensors], n_head: int, eps: float, norm_offset: float,
         quantize_activations: bool) -> FusedLayers | None:
    """For run_fused, which uses these very tensors from then on; None where the kernels cannot stand in for the layers.

    eps, norm_offset: of the RMS norms, the latter added to their weights. quantize_activations: as in int8_linear and
    int4_linear. Errors: RuntimeError (shapes).
    """
    if not layers or not any(isinstance(layer.attention, AttentionTensors) for layer in layers):
        return None
    dtype = layers[0].attention_norm.dtype
    if on_gpu(layers[0].attention_norm.device):
        handle = gpu_layers.fuse(layers, n_head, eps, norm_offset)
        few = any(layer.feed_forward.n_expert or isinstance(layer.attention, DeltaNetTensors) for layer in layers)
        return None if handle is None else FusedLayers(handle, dtype, MAX_TOKENS if few else 1 << 62)

    def supported(layer: LayerTensors) -> bool:
        return layer.attention_norm.dtype == layer.ffn_norm.dtype == dtype and layer.attention.fits(dtype)
    if not all(map(supported, layers)) or not available():
        return None
    handle = torch.ops.qwen_fast.fuse_layers(n_head, eps, norm_offset, quantize_activations)
    for layer in layers:
        add_layer(handle, layer)
    return FusedLayers(handle, dtype)


def add_layer(handle: Tensor, layer: LayerTensors) -> None:
    ops = torch.ops.qwen_fast
    add_attention = ops.add_attention if isinstance(layer.attention, AttentionTensors) else ops.add_deltanet
    add_attention(handle, layer.attention_norm, *layer.attention)
    ops.add_feed_forward(handle, layer.ffn_norm, *layer.feed_forward)


def key_of(fused: FusedLayers) -> int:
    """On a GPU: equal for layers of the same tensors."""
    return gpu_layers.fused[int(fused.handle)].key


def fused_alive() -> set[int]:
    """On a GPU: the keys of all fused layers that are in use."""
    return {layers.key for layers in gpu_layers.fused.values()}


def tune(fused: FusedLayers | None, linears: list[list[Tensor]], tokens: int, dtype: torch.dtype) -> None:
    """On a GPU: finds the fastest kernels for steps of so many tokens, where they are not known: for fused layers, and
    for linears by themselves, whose activations are of a dtype."""
    if gpu_layers is not None and chosen["gpu"] == "auto" and tokens <= MAX_TOKENS and linears:
        calls = [] if fused is None else list(gpu_layers.fused[int(fused.handle)].calls(tokens))
        gpu_layers.tune([*calls, *gpu_layers.calls_of(linears, tokens, dtype)], linears[0][0].device, tokens)


def accepts(fused: FusedLayers | None, x: Tensor) -> bool:
    """Whether run_fused computes x [B, S, C]."""
    if fused is None:
        return False
    dtype = torch.float32 if x.is_cuda and fused.dtype == torch.float16 else fused.dtype
    return x.dtype == dtype and 0 < x.size(0) * x.size(1) <= fused.max_tokens


def run_fused(fused: FusedLayers, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None,
              input_pos: Tensor) -> Tensor:
    """x [B, S, C] through all layers in one operator: what lies between their matrices is not worth a call of its own.

    cos, sin fp32 [B, S, 1, R], for a head's first R dimensions; logn fp32 [B, S, 1, 1], factors of the queries;
    input_pos int64 [B, S] or [S]. Keys and values are written to the caches, and DeltaNets remember x. Errors:
    RuntimeError, also for a copied handle, whose caches are the original's.
    """
    if x.is_cuda:
        return torch.ops.qwen_fast.run_layers(x, fused.handle, cos, sin, logn, input_pos)
    return torch.ops.qwen_fast.run_fused(x, fused.handle, cos, sin, logn, input_pos)


# ---- Gated DeltaNet; the twin is deltanet.DeltaState.run_reference

def delta_net(qkv: Tensor, g: Tensor, b: Tensor, conv: Tensor, input_pos: Tensor, state: list[Tensor]) -> Tensor | None:
    """As DeltaState.run, whose tensors `state` holds; None where none of the kernels computes it."""
    if fits_delta_net(conv, state, qkv.dtype) and available():
        return torch.ops.qwen_fast.delta_net(qkv, g, b, conv, input_pos, state)
    if on_gpu(qkv.device) and gpu_layers.fits_delta_net(conv, state, qkv.dtype, qkv.size(1)):
        return torch.ops.qwen_fast.delta_net_gpu(qkv, g, b, conv, input_pos, state)
    return None


def fits_delta_net(conv: Tensor, state: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether the C++ computes the recurrence of a DeltaNetTensors, for activations of a dtype."""
    memory, _, inputs, *_ = state
    whole = memory.size(2) % 16 == 0 and memory.size(3) % 16 == 0 and all(t.is_contiguous() for t in state)
    return on_cpu(inputs) and inputs.dtype == conv.dtype == dtype and whole


# ---- attention over the KV cache

def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values x [..., D] -> int8 [..., D] and a scale for each head and position, fp32 [..., 1]: x ~ scale q."""
    x = x.float()
    high = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(high > 1e-30, 127 / high, 0.0)
    return (x * inverse).round().to(torch.int8), high / 127


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int = 0,
           scales: Sequence[Tensor] = ()) -> Tensor:
    """Causal attention of q [B, S, H, D] at input_pos ([S] or [B, S]) over caches [B, K, T, D] -> [B, S, H * D].

    A query at position p sees slots <= p, with a window only those > p - window. On a CPU the cost follows p, not T.
    scales: of keys and of values, fp32 [B, K, T, 1], where the caches are in int8.
    """
    same = k_cache.dtype == v_cache.dtype == (torch.int8 if scales else q.dtype)
    if on_gpu(q.device) and same and q.size(3) <= gpu_layers.MAX_HEAD:
        return torch.ops.qwen_fast.attend_gpu(q, k_cache, v_cache, input_pos, window, list(scales))
    if q.device.type != "cpu":
        return attend_reference(q, k_cache, v_cache, input_pos, window, scales)
    fits = same and q.size(3) % 16 == 0 and q.size(3) <= MAX_HEAD
    if on_cpu(q) and fits and all(t.is_contiguous() for t in (k_cache, v_cache, *scales)) and available():
        return torch.ops.qwen_fast.attend(q, k_cache, v_cache, input_pos, window, list(scales))
    return attend_sliced(q, k_cache, v_cache, input_pos, window, list(scales))


def dequantize_caches(caches: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Keys and values as numbers of a dtype."""
    if not scales:
        return [cache.to(dtype) for cache in caches]
    return [(cache * scale).to(dtype) for cache, scale in zip(caches, scales, strict=True)]


def visible(input_pos: Tensor, slots: int, window: int) -> Tensor:
    """Which cache slots each query sees: bool [S, slots] or [B, 1, S, slots]."""
    slot = torch.arange(slots, device=input_pos.device)
    mask = slot <= input_pos[..., None]
    if window > 0:
        mask = mask & (slot > input_pos[..., None] - window)
    return mask[:, None] if mask.dim() == 3 else mask


def attend_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int = 0,
                     scales: Sequence[Tensor] = ()) -> Tensor:
    """The same over the whole cache under a mask: no size depends on the positions' values."""
    (k, v), mask = dequantize_caches((k_cache, v_cache), scales, q.dtype), visible(input_pos, k_cache.size(2), window)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


@torch.library.custom_op("qwen_fast::attend_sliced", mutates_args=())
def attend_sliced(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int,
                  scales: list[Tensor]) -> Tensor:
    """The same up to the last position. Opaque to the compiler, because the slice depends on the positions' values."""
    S, end = q.size(1), int(input_pos.max()) + 1
    k, v = dequantize_caches((k_cache[:, :, :end], v_cache[:, :, :end]), [t[:, :, :end] for t in scales], q.dtype)
    from_start = end == S and (window <= 0 or window >= end) and bool((input_pos == torch.arange(S)).all())
    mask = None if from_start else visible(input_pos, end, window)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=from_start, enable_gqa=True)
    return y.transpose(1, 2).flatten(2).contiguous()


@attend_sliced.register_fake
def _(q: Tensor, *others) -> Tensor:
    return q.new_empty(*q.shape[:2], q.size(2) * q.size(3))
