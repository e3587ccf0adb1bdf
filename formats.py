"""int8 and int4: the number formats, the linears that run them, and what a checkpoint records of them.

int8: w = scale * q, q in -127 .. 127, one fp32 scale per row (0.4 % of the bytes at K = 1024).
int4: w = scale * (q - zero / ZERO_STEPS), q in 0 .. 15, one bf16 scale and one uint8 zero per row and group of G
      columns: 4.75 bits a weight at G = 32. The last group of a row may be shorter.

Shapes: N and K the rows and columns of a weight, G the group size.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels
from cli import UserError
from model import Linear, Transformer, is_unmodified, present

MODES = ("int8", "int4")
FILE_MODES = (*MODES, "int8-fp16", "int4-fp16")      # the latter: published checkpoints as they are
GROUPSIZES = (32, 64, 128, 256)
LM_HEADS = (*MODES, "none")              # none: not quantized
ZERO_STEPS = 16                          # steps of an int4 zero to one scale, in the kernels too
SHRINK = (1.0, 0.92, 0.84, 0.76)         # of a group's range: what is lost at its ends may be won between them
CHUNK_WEIGHTS = 1 << 20                  # quantized at a time: each takes some tens of bytes of work space


# ---- int4's scales and zeros

def int4_params(weight: Tensor, groupsize: int, importance: Tensor | None = None,
                symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scales s (bf16) and zeros z (uint8, in steps of s / ZERO_STEPS), [N, ceil(K / G)], for weights x. In each group,
    they minimize the weighted error

        E = sum w (x - s (q - z))^2,    q = round(x / s + z) in 0 .. 15,    w the importance [K] of columns (or 1),

    over all candidates visited: starting from levels that span the group's range, or a little less (SHRINK), q and the
    least-squares fit of s and z to it alternate. With W = sum w, the fit is

        s = (sum wqx - sum wq sum wx / W) / (sum wqq - (sum wq)^2 / W),    z = (sum wq - sum wx / s) / W,

    and after rounding z, s = sum wdx / sum wdd with d = q - z. The levels' range always includes zero.
    symmetric: whether z is 8 in all groups.
    """
    groups = in_groups(weight.float(), groupsize, mode="replicate")                        # [N, K / G, G]
    w = groups.new_ones(1, groupsize) if importance is None else (importance / importance.mean())[None]
    w = in_groups(w, groupsize)
    lowest, highest = groups.amin(dim=2), groups.amax(dim=2)
    unit = highest.clamp(min=0) / 15 - lowest.clamp(max=0) / 15
    x = groups / divisor(unit)[:, :, None]             # so that squares neither overflow nor vanish; s is in units, too
    middle = (lowest + highest) / 2 / divisor(unit)
    widest = torch.maximum(-lowest / 8, highest / 7) / divisor(unit) if symmetric else torch.ones_like(unit)
    sum_w, sum_wx = w.sum(dim=2), (w * x).sum(dim=2)
    least, scales, zeros = torch.full_like(unit, torch.inf), unit.bfloat16(), torch.zeros_like(unit)
    for shrink in SHRINK:
        s = shrink * widest
        z = round_zeros(7.5 - middle / s, symmetric)
        for _ in range(2):
            stored = (s * unit).bfloat16()
            s = divisor(stored) / divisor(unit)
            q = (x / s[:, :, None]).add_(z[:, :, None]).round_().clamp_(0, 15)
            wq = w * q
            sum_wq, sum_wqq, sum_wqx = wq.sum(dim=2), (wq * q).sum(dim=2), (wq * x).sum(dim=2)
            sum_wdd, sum_wdx = sum_wqq - 2 * z * sum_wq + sum_w * z.square(), sum_wqx - z * sum_wx
            error = s.square() * sum_wdd - 2 * s * sum_wdx                                 # E - sum wxx
            better = error < least
            least, scales = torch.where(better, error, least), torch.where(better, stored, scales)
            zeros = torch.where(better, z, zeros)
            slope = (sum_wqx - sum_wq * sum_wx / sum_w) / (sum_wqq - sum_wq.square() / sum_w).clamp(min=1e-6)
            z = round_zeros((sum_wq - sum_wx / torch.where(slope > 0, slope, s)) / sum_w, symmetric)
            sum_wdd, sum_wdx = sum_wqq - 2 * z * sum_wq + sum_w * z.square(), sum_wqx - z * sum_wx
            s = torch.where(sum_wdx > 0, sum_wdx / sum_wdd.clamp(min=1e-6), s)
    constant = lowest == highest                       # exact as one step from zero
    one = 8.0 if symmetric else 1.0
    scales, zeros = torch.where(constant, lowest.abs().bfloat16(), scales), torch.where(constant, one, zeros)
    return scales, (zeros * ZERO_STEPS).to(torch.uint8)


def round_zeros(z: Tensor, symmetric: bool) -> Tensor:
    return torch.full_like(z, 8) if symmetric else (z * ZERO_STEPS).round().clamp(0, 15 * ZERO_STEPS) / ZERO_STEPS


def in_groups(t: Tensor, groupsize: int, mode: str = "constant") -> Tensor:
    """[N, K] -> [N, ceil(K / G), G]; a last group that is shorter is padded."""
    missing = -t.size(1) % groupsize
    return (F.pad(t, (0, missing), mode=mode) if missing else t).unflatten(1, (-1, groupsize))


def divisor(scales: Tensor) -> Tensor:
    """Scales to divide by: 1 in the place of 0, which stands for nothing but zeros."""
    return torch.where(scales > 0, scales.float(), 1.0)


# ---- linears

class QuantizedLinear(nn.Module):
    """Takes a model.Linear's place. On CPUs with VNNI or AVX2, the activations of a few tokens may be quantized too.

    The methods take scales and zeros of [N, ceil(K / G)] in both formats; int8's zeros are 0.
    """
    lowest, highest, zero_steps = 0, 15, ZERO_STEPS
    groupsize: int
    experts = 1                          # how many a model.MoE keeps in its rows
    portable = False                     # find_params: only what all other programs load, symmetric, bf16 scales
    weight: Tensor
    scales: Any                          # Tensor; None where pack_for has put them elsewhere
    zeros: Any

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.quantize_activations = in_features, out_features, True
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def find_params(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zeros for any rows [n, K] of a weight; or for one group of columns, of some importance [g]."""
        raise NotImplementedError

    def round(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest q, for any rows of a weight or any columns of one group."""
        groups = in_groups(weight.float(), min(self.groupsize, weight.size(1)))
        q = (groups / divisor(scales)[:, :, None]).add_(zeros[:, :, None] / self.zero_steps).round_()
        return q.clamp_(self.lowest, self.highest).to(self.weight.dtype).flatten(1)[:, :weight.size(1)]

    def restore(self, q: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that q stands for."""
        groups = in_groups(q, min(self.groupsize, q.size(1))).to(dtype)
        weight = (groups - zeros[:, :, None].to(dtype) / self.zero_steps) * scales[:, :, None].to(dtype)
        return weight.flatten(1)[:, :q.size(1)]

    def to_buffers(self, q: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """As they are stored."""
        raise NotImplementedError

    def from_buffers(self, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Any rows [n, K] of a weight, rounded to nearest -> the same rows of the buffers."""
        params = self.find_params(weight)
        return self.to_buffers(self.round(weight, *params), *params)

    def dequantize(self, dtype: torch.dtype = torch.float32, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """The weight that buffers stand for: by default the module's own, before pack_for."""
        return self.restore(*self.from_buffers(buffers or dict(self.named_buffers())), dtype)

    def repacks(self, device: torch.device) -> bool:
        """Whether pack_for makes matrices of its own from those stored, which then need not be copied from a file."""
        return False

    def pack_for(self, device: torch.device, dtype: torch.dtype) -> None:
        """Turns the buffers as stored into those that compute fastest on a device for activations of a dtype."""

    def multiply(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def first_rows(self, x: Tensor, rows: int) -> Tensor:
        """As model.Linear's."""
        return self.multiply(x)[..., :rows]

    def expert_args(self, dtype: torch.dtype) -> list[Tensor]:
        """As model.Linear's."""
        return present(self.weight, self.scales, self.zeros)

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantizedLinear):
    lowest, highest = -127, 127
    zeros = None

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.groupsize = in_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features))

    def find_params(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scales = weight.float().abs().amax(dim=1, keepdim=True) / 127
        scales = scales.bfloat16().float() if self.portable else scales
        return scales, torch.zeros_like(scales, dtype=torch.uint8)

    def to_buffers(self, q: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        return dict(weight=q.contiguous(), scales=scales[:, 0])

    def from_buffers(self, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        scales = buffers["scales"][:, None]
        return buffers["weight"], scales, torch.zeros_like(scales, dtype=torch.uint8)

    def multiply(self, x: Tensor) -> Tensor:
        return kernels.int8_linear(x, self.weight, self.scales, self.quantize_activations)

    def first_rows(self, x: Tensor, rows: int) -> Tensor:
        return kernels.int8_linear(x, self.weight[:rows], self.scales[:rows], self.quantize_activations)

    def kernel_args(self, dtype: torch.dtype) -> list[Tensor] | None:
        return present(self.weight, self.scales, self.bias) if is_unmodified(self, Int8Linear) else None


class Int4Linear(QuantizedLinear):
    def __init__(self, in_features: int, out_features: int, bias: bool = False, groupsize: int = 32):
        super().__init__(in_features, out_features, bias)
        self.groupsize, self.layout = groupsize, "stored"
        groups = math.ceil(in_features / groupsize)
        self.register_buffer("weight", torch.empty(out_features, math.ceil(in_features / 2), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(out_features, groups, dtype=torch.bfloat16))
        self.register_buffer("zeros", torch.empty(out_features, groups, dtype=torch.uint8))

    def find_params(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        groupsize = self.groupsize if importance is None else weight.size(1)
        return int4_params(weight, groupsize, importance, self.portable)

    def to_buffers(self, q: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        return dict(weight=kernels.pack_nibbles(q), scales=scales, zeros=zeros)

    def from_buffers(self, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.unpack_nibbles(buffers["weight"], self.in_features), buffers["scales"], buffers["zeros"]

    def repacks(self, device: torch.device) -> bool:
        return device.type == "cpu" and kernels.available()

    def pack_for(self, device: torch.device, dtype: torch.dtype) -> None:
        assert self.layout == "stored"
        if Int4Linear.repacks(self, device):
            packed = kernels.pack_int4(self.weight.cpu(), self.scales.cpu(), self.zeros.cpu(), self.groupsize)
            self.weight, self.scales, self.zeros = (tensor.to(device) for tensor in packed)
            self.layout = "packed"
        elif device.type == "cuda":
            self.scales = self.scales.to(dtype)      # the compiler takes no bf16 where a GPU lacks it, as Turing does

    def multiply(self, x: Tensor) -> Tensor:
        if self.layout == "packed":
            return kernels.int4_linear(x, self.weight, self.scales, self.zeros, self.out_features,
                                       self.quantize_activations)
        if self.layout == "stored" and x.device.type == "cuda":
            return kernels.stored_int4_linear(x, self.weight, self.scales, self.zeros)
        return F.linear(x, self.dequantize(x.dtype))

    def first_rows(self, x: Tensor, rows: int) -> Tensor:
        rows = min(rows, self.out_features)
        if self.layout != "packed" or rows % 16:
            return super().first_rows(x, rows)
        weight, scales, zeros = (tensor[:rows // 16] for tensor in (self.weight, self.scales, self.zeros))
        return kernels.int4_linear(x, weight, scales, zeros, rows, self.quantize_activations)

    def kernel_args(self, dtype: torch.dtype) -> list[Tensor] | None:
        whole = self.in_features % min(self.groupsize, self.in_features) == 0          # groups, which the GPU needs
        fits = self.layout == "packed" or (self.weight.is_cuda and whole)
        ours = type(self) in (Int4Linear, GPTQLinear) and is_unmodified(self, type(self))
        return present(self.weight, self.scales, self.zeros, self.bias) if fits and ours else None


class GPTQLinear(Int4Linear):
    """A published GPTQ or AWQ linear, as convert.PublishedQuantization decodes it: 4 or 8 bits, scales fp16.

    GPUs run 4 bits as they are. On CPUs, models in bf16 round the scales to bf16, as they do all weights, and run 4
    bits like Int4Linear. 8 bits, and all else, become plain weights.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, groupsize: int = 128, bits: int = 4,
                 reordered: bool = False):
        super().__init__(in_features, out_features, bias, groupsize)
        self.bits, self.zero_steps, self.scales = bits, ZERO_STEPS if bits == 4 else 1, self.scales.half()
        if bits == 8:
            self.weight = torch.empty(out_features, in_features, dtype=torch.uint8)
        self.register_buffer("order", torch.empty(in_features, dtype=torch.int32) if reordered else None)

    def from_buffers(self, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if self.bits == 8:
            return buffers["weight"], buffers["scales"], buffers["zeros"]
        return super().from_buffers(buffers)

    def dequantize(self, dtype: torch.dtype = torch.float32, buffers: dict[str, Tensor] | None = None) -> Tensor:
        weight = super().dequantize(dtype, buffers)
        return weight if self.order is None else weight[:, self.order.argsort()]

    def repacks(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def pack_for(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.bits == 4 and kernels.on_gpu(device):
            return
        if self.bits == 4 and dtype == torch.bfloat16:
            self.scales = self.scales.bfloat16()
            super().pack_for(device, dtype)
        if self.layout == "stored":
            weight = self.dequantize(torch.float32 if dtype == torch.bfloat16 else dtype)
            self.weight, self.layout = kernels.copy_to(weight, device, dtype), "plain"
            self.scales = self.zeros = self.order = None

    def multiply(self, x: Tensor) -> Tensor:
        if self.layout == "plain":
            return kernels.linear(x, self.weight)
        return super().multiply(x if self.order is None else x[..., self.order])

    def kernel_args(self, dtype: torch.dtype) -> list[Tensor] | None:
        if self.layout == "plain" and is_unmodified(self, GPTQLinear):
            return present(self.weight, self.bias)
        return super().kernel_args(dtype) if self.order is None else None


# ---- models

@dataclass(frozen=True)
class Quantization:
    """What is quantized to what; stands in the checkpoint. skipped: names of linears that stay as they were."""
    mode: str
    groupsize: int = 32                  # of int4 linears
    lm_head: str = "int8"                # int4 there cost an early demo as much as in all other linears together
    skipped: tuple[str, ...] = ()
    source: str = ""
    reordered: tuple[str, ...] = ()      # GPTQLinears whose columns are stored in an order of their own

    def check(self, where: str = "") -> None:
        """Errors: UserError, for a value that is not supported; `where` is said before the field."""
        for name, offered in (("mode", FILE_MODES), ("groupsize", GROUPSIZES), ("lm_head", LM_HEADS)):
            value = getattr(self, name)
            if type(value) is not type(offered[0]) or value not in offered:
                wrong = f"{value!r:.80} is not supported (supported: {', '.join(map(str, offered))})"
                raise UserError(f"{where}{name} {wrong}") if where else UserError(wrong, name)
        for name in ("skipped", "reordered"):
            if not isinstance(names := getattr(self, name), tuple) or not all(isinstance(n, str) for n in names):
                raise UserError(f"{where}{name} {names!r:.80} are no names")

    def linear(self, name: str, in_features: int, out_features: int, bias: bool) -> QuantizedLinear | None:
        """An empty module for the linear of this name, or None if it stays as it is."""
        kind, size = self.lm_head if name == "output" else self.mode, (in_features, out_features, bias)
        if name in self.skipped or kind == "none":
            return None
        if kind.endswith("-fp16"):
            return GPTQLinear(*size, self.groupsize, 4 if kind == "int4-fp16" else 8, name in self.reordered)
        return Int8Linear(*size) if kind == "int8" else Int4Linear(*size, self.groupsize)


def replace_linears(model: Transformer, quantization: Quantization) -> list[tuple[str, QuantizedLinear]]:
    """Replaces a model's linears in place by empty ones; a tied model gets a quantized head of its own."""
    replaced = []
    for name in linear_names(model):
        tied = name == "output" and model.output is None
        old: Any = model.tok_embeddings if tied else model.get_submodule(name)
        bias = getattr(old, "bias", None)
        with torch.device("meta"):
            new = quantization.linear(name, old.weight.size(1), old.weight.size(0), bias is not None)
        if new is not None:
            new.bias, new.experts, (parent, _, leaf) = bias, getattr(old, "experts", 1), name.rpartition(".")
            rows = new.out_features // new.experts
            if isinstance(new, Int4Linear) and new.experts > 1 and rows % 16:
                raise UserError(f"{name}: experts of {rows} rows, which are no multiple of 16, cannot be int4")
            setattr(model.get_submodule(parent), leaf, new)
            replaced.append((name, new))
    return replaced


def pack_for(model: Transformer, device: torch.device, release: Callable[[Tensor], None] = lambda stored: None) -> None:
    """release: for the buffers that are needed no longer."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            stored = dict(module.named_buffers())
            module.pack_for(device, model.dtype)
            for name, tensor in stored.items():
                if getattr(module, name) is not tensor:
                    release(tensor)


def set_quantize_activations(model: Transformer, on: bool) -> None:
    """Whether activations may be quantized where that is faster: to int8 beside int4 weights, to int16 beside int8."""
    for module in model.modules():
        if isinstance(module, (Transformer, QuantizedLinear)):
            module.quantize_activations = on


def linear_names(model: Transformer) -> list[str]:
    """All that can be quantized, which a router and its like are too small for. The head counts even where it is tied
    to the embedding."""
    names = (name for name, module in model.named_modules() if isinstance(module, Linear) and name != "output")
    return [*(name for name in names if not name.endswith((".router", ".shared_gate", ".wba"))), "output"]


def skipped_names(model: Transformer, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The linears whose name matches one of the patterns (*, ?, [...])."""
    names = linear_names(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{pattern} matches no linear (there are {', '.join(names[:4])} ... {names[-1]})", "skip")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
