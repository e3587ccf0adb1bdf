"""int8 and int4: the number formats, the linears that run them, and the checkpoint file.

int8: w = scale * q, q in -127 .. 127, one fp32 scale per row (0.4 % of the bytes at K = 1024).
int4: w = scale * (q - zero / ZERO_STEPS), q in 0 .. 15, one bf16 scale and one uint8 zero per row and group of G columns: 4.75 bits a weight at G = 32.
      The last group of a row may be shorter.
The output head is int8 in both by default: on an early state of the demo, int4 there cost as much as in all other linears together.

Shapes: N and K the rows and columns of a weight, G the group size.
"""
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

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
LM_HEADS = (*MODES, "none")
ZERO_STEPS = 16                               # how many units of an int4 zero make a scale; kernels.py and kernels.cpp know it too
SHRINK = (1.0, 0.92, 0.84, 0.76)         # of the range of a group: what is lost at its ends may be won between them
CHUNK = 1 << 20                          # weights quantized at a time: each takes some tens of bytes of work space


# ---- number formats

def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> q int8 [N, K], scales fp32 [N]. Every weight comes back within half a scale."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1) / 127
    q = (weight / nonzero(scales)[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scales


def dequantize_int8(q: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (q.float() * scales[:, None]).to(dtype)


def quantize_int4(weight: Tensor, groupsize: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] -> q uint8 [N, K] of 0 .. 15, scales bf16 and zeros uint8 [N, ceil(K / G)]."""
    scales, zeros = int4_scales(weight, groupsize)
    return to_int4(weight, scales, zeros, groupsize), scales, zeros


def int4_scales(weight: Tensor, groupsize: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zeros whose levels have the least squared error in each group, among some that reach from its smallest weight to its largest
    or not quite, each improved by a least-squares fit. 0 is between the levels' ends. importance: [K], how much a column's errors count (alike)."""
    groups = in_groups(weight.float(), groupsize, mode="replicate")
    counts = 1.0 if importance is None else in_groups(importance[None], groupsize)
    count = groupsize if importance is None else counts.sum(dim=2)
    lowest, highest = groups.amin(dim=2), groups.amax(dim=2)
    unit = highest.clamp(min=0) / 15 - lowest.clamp(max=0) / 15
    x = groups / nonzero(unit)[:, :, None]                       # so that squares neither overflow nor vanish
    middle, sum_x = (lowest + highest) / 2 / nonzero(unit), (x if importance is None else counts * x).sum(dim=2)
    best = torch.full_like(unit, torch.inf)
    scales, zeros = torch.empty_like(unit, dtype=torch.bfloat16), torch.empty_like(unit, dtype=torch.uint8)
    for shrink in SHRINK:
        scale = torch.full_like(unit, shrink)
        zero = 7.5 - middle / scale
        for _ in range(2):
            stored_scale, stored_zero = (scale * unit).bfloat16(), (zero * ZERO_STEPS).round().clamp(0, 15 * ZERO_STEPS)
            scale, zero = nonzero(stored_scale) / nonzero(unit), stored_zero / ZERO_STEPS
            q = (x / scale[:, :, None]).add_(zero[:, :, None]).round_().clamp_(0, 15)
            counted = q if importance is None else counts * q
            sum_q, sum_qq, sum_qx = counted.sum(dim=2), (counted * q).sum(dim=2), (counted * x).sum(dim=2)
            sum_dd, sum_dx = sum_qq - 2 * zero * sum_q + count * zero.square(), sum_qx - zero * sum_x          # d = q - zero
            error = scale.square() * sum_dd - 2 * scale * sum_dx
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, stored_scale, scales), torch.where(better, stored_zero.to(torch.uint8), zeros)
            slope = (sum_qx - sum_q * sum_x / count) / (sum_qq - sum_q.square() / count).clamp(min=1e-6)
            zero = (sum_q - sum_x / torch.where(slope > 0, slope, scale)) / count
            zero = (zero * ZERO_STEPS).round().clamp(0, 15 * ZERO_STEPS) / ZERO_STEPS
            sum_dd, sum_dx = sum_qq - 2 * zero * sum_q + count * zero.square(), sum_qx - zero * sum_x
            scale = torch.where(sum_dx > 0, sum_dx / sum_dd.clamp(min=1e-6), scale)
    constant = lowest == highest                                 # exact as one step from zero
    return torch.where(constant, lowest.abs().bfloat16(), scales), torch.where(constant, ZERO_STEPS, zeros).to(torch.uint8)


def to_int4(weight: Tensor, scales: Tensor, zeros: Tensor, groupsize: int) -> Tensor:
    """The nearest of the 16 levels: uint8 [N, K]."""
    q = in_groups(weight.float(), groupsize) / nonzero(scales)[:, :, None]
    return q.add_(zeros[:, :, None] / ZERO_STEPS).round_().clamp_(0, 15).to(torch.uint8).flatten(1)[:, :weight.size(1)]


def dequantize_int4(q: Tensor, scales: Tensor, zeros: Tensor, groupsize: int, dtype: torch.dtype = torch.float32, zero_steps: int = ZERO_STEPS) -> Tensor:
    weight = (in_groups(q, groupsize).to(dtype) - zeros[:, :, None].to(dtype) / zero_steps) * scales[:, :, None].to(dtype)
    return weight.flatten(1)[:, :q.size(1)]


def in_groups(t: Tensor, groupsize: int, mode: str = "constant") -> Tensor:
    """[N, K] -> [N, ceil(K / G), G]; a last group that is shorter is filled up."""
    missing = -t.size(1) % groupsize
    return (F.pad(t, (0, missing), mode=mode) if missing else t).unflatten(1, (-1, groupsize))


def nonzero(scales: Tensor) -> Tensor:
    """To divide by."""
    return torch.where(scales > 0, scales.float(), 1.0)


# ---- linears

class QuantizedLinear(nn.Module):
    """In the place of a model.Linear. On CPUs with VNNI, decoding may quantize the activations too."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.quantize_activations = in_features, out_features, True
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Any rows [n, K] of a weight -> the same rows of this module's buffers. fit, round_to, assemble: the same in steps (GPTQ.Target)."""
        raise NotImplementedError

    def dequantize(self, **buffers: Tensor) -> Tensor:
        """The inverse, fp32; of the module's own buffers (before pack_for) if none are given."""
        raise NotImplementedError

    def pack_for(self, device: torch.device, dtype: torch.dtype) -> None:
        """Turns the buffers from the stored form to the one that computes fastest on the device for activations of a dtype."""

    def multiply(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def kernel_args(self, dtype: torch.dtype) -> list[Tensor] | None:
        """As model.Linear's."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantizedLinear):
    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(("weight", "scales"), quantize_int8(weight)))

    @property
    def groupsize(self) -> int:
        return self.in_features

    def fit(self, weight: Tensor, importance: Tensor) -> Tensor:
        return quantize_int8(weight)[1]

    def round_to(self, levels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        q = (weight / nonzero(levels)[:, None]).round().clamp(-127, 127)
        return q, q * levels[:, None]

    def assemble(self, q: Tensor, levels: list[Tensor]) -> dict[str, Tensor]:
        return dict(weight=q.contiguous(), scales=levels[0])

    def dequantize(self, **buffers: Tensor) -> Tensor:
        own = buffers or dict(self.named_buffers())
        return dequantize_int8(own["weight"], own["scales"])

    def multiply(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:     # in which sums over q overflow
            return F.linear(x, dequantize_int8(self.weight, self.scales, x.dtype))
        return kernels.int8_linear(x, self.weight, self.scales, self.quantize_activations)

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

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        q, scales, zeros = quantize_int4(weight, self.groupsize)
        return dict(weight=kernels.pack_nibbles(q), scales=scales, zeros=zeros)

    def fit(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        return int4_scales(weight, weight.size(1), importance / importance.mean())

    def round_to(self, levels: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        q = to_int4(weight, *levels, weight.size(1))
        return q, dequantize_int4(q, *levels, weight.size(1))

    def assemble(self, q: Tensor, levels: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        scales, zeros = zip(*levels)
        return dict(weight=kernels.pack_nibbles(q), scales=torch.cat(scales, dim=1), zeros=torch.cat(zeros, dim=1))

    def dequantize(self, dtype: torch.dtype = torch.float32, **buffers: Tensor) -> Tensor:
        own = buffers or dict(self.named_buffers())
        return dequantize_int4(kernels.unpack_nibbles(own["weight"], self.in_features), own["scales"], own["zeros"], self.groupsize, dtype)

    def pack_for(self, device: torch.device, dtype: torch.dtype) -> None:
        assert self.layout == "stored"
        if device.type == "cpu" and kernels.available():
            self.weight, self.scales, self.zeros = kernels.pack_int4(self.weight, self.scales, self.zeros, self.groupsize)
            self.layout = "cpu"
        elif (tiles := int4pack_tiles(self, device, dtype)) is not None:
            self.weight = convert_int4pack(self.weight >> 4 | self.weight << 4, tiles)           # there, the even column is the upper half
            offsets = (8 - self.zeros.float() / ZERO_STEPS) * self.scales.float()                     # w = scale * (q - 8) + offset
            self.scales, self.zeros = torch.stack((self.scales, offsets.bfloat16()), dim=-1).transpose(0, 1).contiguous(), None   # [K / G, N, 2]
            self.layout = "cuda"

    def multiply(self, x: Tensor) -> Tensor:
        if self.layout == "cpu":
            return kernels.int4_linear(x, self.weight, self.scales, self.zeros, self.out_features, self.quantize_activations)
        if self.layout == "cuda":
            return int4pack_mm(x.flatten(0, -2), self.weight, self.groupsize, self.scales).unflatten(0, x.shape[:-1])
        return F.linear(x, self.dequantize(x.dtype))

    def kernel_args(self, dtype: torch.dtype) -> list[Tensor] | None:
        fits = self.layout == "cpu" and is_unmodified(self, type(self)) and type(self) in (Int4Linear, GPTQLinear)
        return present(self.weight, self.scales, self.zeros, self.bias) if fits else None


class GPTQLinear(Int4Linear):
    """What convert.PublishedQuantization makes of a GPTQ or AWQ linear: 4 or 8 bits, scales as published (fp16), zeros uint8 (of 4 bits in sixteenths, as ever).

    Models in bf16 round the scales to bf16, as they do all weights, and run 4 bits like Int4Linear. 8 bits, and all else, become plain weights.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, groupsize: int = 128, bits: int = 4, reordered: bool = False):
        super().__init__(in_features, out_features, bias, groupsize)
        self.bits, self.scales = bits, self.scales.half()
        if bits == 8:
            self.weight = torch.empty(out_features, in_features, dtype=torch.uint8)
        self.register_buffer("order", torch.empty(in_features, dtype=torch.int32) if reordered else None)

    def dequantize(self, dtype: torch.dtype = torch.float32, **buffers: Tensor) -> Tensor:
        own = buffers or dict(self.named_buffers())
        q = kernels.unpack_nibbles(own["weight"], self.in_features) if self.bits == 4 else own["weight"]
        weight = dequantize_int4(q, own["scales"], own["zeros"], self.groupsize, dtype, ZERO_STEPS if self.bits == 4 else 1)
        return weight if self.order is None else weight[:, self.order.argsort()]

    def pack_for(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.bits == 4 and dtype == torch.bfloat16:
            self.scales = self.scales.bfloat16()
            super().pack_for(device, dtype)
        if self.layout == "stored":
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            self.weight, self.layout = kernels.copy_to(self.dequantize(wide), device, dtype), "plain"
            self.scales = self.zeros = self.order = None

    def multiply(self, x: Tensor) -> Tensor:
        if self.layout == "plain":
            return kernels.linear(x, self.weight)
        return super().multiply(x if self.order is None else x[..., self.order])

    def kernel_args(self, dtype: torch.dtype) -> list[Tensor] | None:
        if self.layout == "plain":
            return present(self.weight, self.bias) if is_unmodified(self, GPTQLinear) else None
        return None if self.order is not None else super().kernel_args(dtype)


def int4pack_tiles(linear: Int4Linear, device: torch.device, dtype: torch.dtype) -> int | None:
    """The tile width for PyTorch's CUDA int4 kernel, or None where it cannot run and the weights are dequantized instead."""
    if device.type != "cuda" or torch.version.hip or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if linear.out_features % 8 or linear.in_features % linear.groupsize:
        return None
    return next((tiles for tiles in (8, 4, 2) if linear.in_features % (16 * tiles) == 0), None)


def convert_int4pack(weight: Tensor, tiles: int) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack(weight, tiles)


def int4pack_mm(x: Tensor, weight: Tensor, groupsize: int, scales_and_zeros: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, weight, groupsize, scales_and_zeros)


# ---- models

@dataclass(frozen=True)
class Quantization:
    """What is quantized to what; stands in the checkpoint. skipped: names of linears that stay as they were."""
    mode: str
    groupsize: int = 32                  # of int4 linears
    lm_head: str = "int8"
    skipped: tuple[str, ...] = ()
    source: str = ""
    reordered: tuple[str, ...] = ()      # SourceLinears whose columns are stored in an order of their own

    def check(self, said_in: str = "--") -> None:
        for name, offered in (("mode", FILE_MODES), ("groupsize", GROUPSIZES), ("lm_head", LM_HEADS)):
            if getattr(self, name) not in offered:
                raise UserError(f"{said_in}{name} {getattr(self, name)!r} is not supported (supported: {', '.join(map(str, offered))})")

    def linear(self, name: str, in_features: int, out_features: int, bias: bool) -> QuantizedLinear | None:
        """An empty module for the linear of this name, or None if it stays as it is."""
        kind = self.lm_head if name == "output" else self.mode
        if name in self.skipped or kind == "none":
            return None
        if kind.endswith("-fp16"):
            return GPTQLinear(in_features, out_features, bias, self.groupsize, 4 if kind == "int4-fp16" else 8, name in self.reordered)
        return Int8Linear(in_features, out_features, bias) if kind == "int8" else Int4Linear(in_features, out_features, bias, self.groupsize)


def replace_linears(model: Transformer, quantization: Quantization) -> list[tuple[str, QuantizedLinear]]:
    """Replaces a model's linears in place; a tied model gets a quantized head of its own. On the meta device the new ones are empty,
    elsewhere they hold the quantized weights."""
    replaced = []
    for name in linear_names(model):
        old = model.tok_embeddings if name == "output" and model.output is None else model.get_submodule(name)
        bias = getattr(old, "bias", None)
        with torch.device("meta"):
            new = quantization.linear(name, old.weight.size(1), old.weight.size(0), bias is not None)
        if new is None:
            continue
        if not old.weight.is_meta:
            for key, value in quantize_weight(name, old.weight, new)[0].items():
                setattr(new, key, kernels.copy_to(value, value.device, value.dtype))
        new.bias = bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        replaced.append((name, new))
    return replaced


def quantize_model(model: Transformer, mode: str, groupsize: int = 32, lm_head: str = "int8", skip: tuple[str, ...] = ()) -> Transformer:
    """Quantizes a loaded model in place and packs it for its device. skip: patterns of names of linears."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UserError("the model is already quantized")
    quantization = Quantization(mode, groupsize, lm_head, skipped_names(model, skip))
    quantization.check()
    replace_linears(model, quantization)
    pack_for(model, model.device)
    return model


def pack_for(model: Transformer, device: torch.device) -> None:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.pack_for(device, model.dtype)


def set_quantize_activations(model: Transformer, on: bool) -> None:
    """Whether activations may be quantized where that is faster: to int8 beside int4 weights, to 16 bits beside int8 weights."""
    model.quantize_activations = on
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.quantize_activations = on


def linear_names(model: Transformer) -> list[str]:
    """All that can be quantized. The head counts even where it is tied to the embedding."""
    return [name for name, module in model.named_modules() if isinstance(module, Linear) and name != "output"] + ["output"]


def skipped_names(model: Transformer, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The linears whose name matches one of the patterns (*, ?, [...])."""
    names = linear_names(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"--skip {pattern} matches no linear (there are e.g. {', '.join([*names[:4], names[-1]])})")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


@torch.no_grad()
def quantize_weight(name: str, weight: Tensor, linear: QuantizedLinear, device: torch.device | None = None,
                    measure: bool = False) -> tuple[dict[str, Tensor], float]:
    """The buffers that stand for a weight [N, K], computed some rows at a time, and the RMS of their error over the RMS of the weight."""
    parts: list[dict[str, Tensor]] = []
    error = total = 0.0
    for rows in weight.split(max(1, CHUNK // weight.size(1))):
        rows = rows.to(device or weight.device)
        check_finite(f"{name}.weight", rows)
        part = linear.quantize(rows)
        if measure:
            error += (linear.dequantize(**part) - rows.float()).square().sum(dtype=torch.float64).item()
            total += rows.float().square().sum(dtype=torch.float64).item()
        parts.append({key: value.to(weight.device) for key, value in part.items()})
    whole = parts[0] if len(parts) == 1 else {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return whole, math.sqrt(error / total) if total else 0.0


def check_finite(name: str, weight: Tensor) -> None:
    if not all(part.isfinite().all() for part in weight.flatten().split(CHUNK)):        # in parts: they take work space
        raise UserError(f"{name} holds NaN or infinity: a damaged checkpoint cannot be quantized")
