"""How published checkpoints store a quantized linear, to read and to write: GPTQ, AWQ, compressed-tensors, FP8.

A weight [N, K] is there as several tensors, its parts, named MODULE.part. All but FP8's stand for integers q with
scales and zeros, w[n, k] = scale[n, g] * (q[n, k] - zero[n, g]), where g is the group of column k: k // G or, where
columns were quantized in another order, g_idx[k]. An int32 word holds P = 32 / bits integers, the first one lowest.

  GPTQ                 qweight [K / P, N]               q[i * P + j, n] = bits of qweight[i, n] from j * bits on
                       qzeros [groups, N / P]           zero[g, i * P + j] = those of qzeros[g, i], plus 1 but in the
                                                        format "gptq_v2"; scales [groups, N]; g_idx [K]
  AWQ                  qweight [K, N / 8]               q[k, i * 8 + (0 2 4 6 1 3 5 7)[j]] = those of qweight[k, i]
                       qzeros [groups, N / 8]           alike, from qzeros[g, i]                    ("gemm", 4 bits)
  compressed-tensors   weight_packed [N, K / P]         q[n, i * P + j] = those of weight_packed[n, i]
                       weight_zero_point [N / P, groups]     zero[i * P + j, g] alike; 2 ** (bits - 1) if symmetric
                                                        weight_scale [N, groups]; weight_g_idx [K]; weight_shape
                       weight [N, K] int8               q - 128                                     ("int-quantized")
  FP8                  weight [N, K] float8, times      weight_scale, or weight_scale_inv, of a tensor, row or block
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kernels
from checkpoint import FLOATS
from cli import UserError
from formats import CHUNK_WEIGHTS, GROUPSIZES, ZERO_STEPS, GPTQLinear, Int8Linear, QuantizedLinear
from schema import Checked, checked

Kind = tuple[str, int]                   # mode and group size of formats.Quantization, 0 for any
Parts = Mapping[str, Tensor]
STORED_SCALES = {"int4": torch.bfloat16, "int4-fp16": torch.float16, "int8-fp16": torch.float16, "int8": torch.float32}


def is_exact(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds these numbers as they are."""
    return values.dtype == dtype or torch.equal(values.to(dtype).double(), values.double())


def pack(q: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] -> int32 [R, ceil(C * bits / 32)], padded with zeros."""
    q = F.pad(q, (0, -q.size(1) % (32 // bits))).contiguous()
    return (kernels.pack_nibbles(q) if bits == 4 else q).flatten().view(torch.int32).view(len(q), -1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse: int32 [R, W] -> uint8 [R, W * 32 / bits]."""
    values = words.contiguous().view(torch.uint8)
    return kernels.unpack_nibbles(values) if bits == 4 else values


@dataclass(frozen=True)
class Integers:
    """Some rows of a quantized weight: w = scales * (q - zeros), column by column in groups."""
    bits: int
    groupsize: int
    q: Tensor                            # uint8 [n, K]
    scales: Tensor                       # [n, groups]
    zeros: Tensor                        # uint8 [n, groups]
    order: Tensor | None = None          # int32 [K], which column of the weight each column here is

    @classmethod
    def from_buffers(cls, linear: QuantizedLinear, buffers: dict[str, Tensor]) -> "Integers":
        """Of a linear as formats.py stores it. Its zeros must be whole."""
        q, scales, zeros = linear.from_buffers(buffers)
        if isinstance(linear, Int8Linear):
            return cls(8, q.size(1), q.view(torch.uint8) ^ 128, scales, torch.full_like(zeros, 128))
        bits = linear.bits if isinstance(linear, GPTQLinear) else 4
        return cls(bits, linear.groupsize, q, scales, zeros // linear.zero_steps, buffers.get("order"))

    def to_buffers(self, mode: str) -> dict[str, Tensor]:
        """Those of formats.Int8Linear, Int4Linear or GPTQLinear."""
        scales = self.scales.to(STORED_SCALES[mode])
        if mode == "int8":
            return {"weight": (self.q ^ 128).view(torch.int8), "scales": scales[:, 0]}
        buffers = {"weight": self.q, "scales": scales, "zeros": self.zeros}
        if self.bits == 4:
            buffers |= {"weight": kernels.pack_nibbles(self.q), "zeros": self.zeros * ZERO_STEPS}
        return buffers if self.order is None else {**buffers, "order": self.order}

    def in_weights_order(self) -> Tensor:
        """q, its columns in the weight's order."""
        return self.q if self.order is None else self.q[:, self.order.argsort()]

    def group_index(self) -> Tensor:
        """int32 [K]: the group of each of the weight's columns."""
        groups = torch.arange(self.q.size(1), dtype=torch.int32) // self.groupsize
        return groups if self.order is None else groups[self.order.argsort()]

    def dequantize(self) -> Tensor:
        """The weight, in bf16."""
        K, chunks = self.q.size(1), []
        columns = torch.arange(K) // self.groupsize
        by_rows = (tensor.split(max(1, CHUNK_WEIGHTS // K)) for tensor in (self.q, self.scales, self.zeros))
        for q, scales, zeros in zip(*by_rows, strict=True):
            w = (q.float() - zeros.float()[:, columns]) * scales.float()[:, columns]
            chunks.append((w if self.order is None else w[:, self.order.argsort()]).bfloat16())
        return torch.cat(chunks)


def find_order(g_idx: Tensor, groupsize: int, name: str) -> Tensor | None:
    """int32 [K], the columns by their groups, or None where they are so already. Errors: UserError, for groups of other
    sizes."""
    in_groups = torch.arange(len(g_idx)) // groupsize
    if torch.equal(g_idx.long(), in_groups):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), in_groups):
        raise UserError(f"{name}: groups of other sizes than {groupsize} are not supported")
    return order.int()


# ---- the packings

class Packing:
    """How the parts of a linear stand for its weight. A linear is packed so if it has the part `marker`."""
    marker: str
    optional: tuple[str, ...] = ()

    def shapes(self, N: int, K: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Those that each part may have; the first is the usual one."""
        raise NotImplementedError

    def dtypes(self) -> dict[str, tuple[torch.dtype, ...]]:
        raise NotImplementedError

    def fits(self, N: int, K: int, parts: Parts) -> bool:
        """Whether parts (of which no value is read) are what this packing has."""
        shapes, dtypes = self.shapes(N, K), self.dtypes()
        return (parts.keys() <= shapes.keys() and shapes.keys() - parts.keys() <= {*self.optional}
                and all(tuple(t.shape) in shapes[part] and t.dtype in dtypes[part] for part, t in parts.items()))

    def kinds(self, parts: Parts) -> set[Kind]:
        """What formats.py can hold it as with the same integers and scales; nothing if it is floating-point. Of the
        parts, it may read the scales."""
        raise NotImplementedError

    def decode(self, name: str, shape: torch.Size, parts: Parts) -> Integers:
        """On the meta device too, but for the order of columns. Errors: UserError, naming the module."""
        raise NotImplementedError

    def dequantize(self, name: str, shape: torch.Size, parts: Parts) -> Tensor:
        """The weight, in bf16."""
        return self.decode(name, shape, parts).dequantize()


@dataclass(frozen=True)
class WordPacking(Packing):
    """GPTQ and AWQ."""
    method: str
    bits: int
    groupsize: int                       # -1: a row is one group
    zero_offset: int = 0                 # zero - stored zero
    marker = "qweight"
    optional = ("g_idx",)

    @property
    def stored_groupsize(self) -> int:
        return 128 if self.groupsize == -1 else self.groupsize           # a row's one scale is repeated

    def shapes(self, N: int, K: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        groups = 1 if self.groupsize == -1 else -(-K // self.groupsize)
        K_words, N_words = (-(-size * self.bits // 32) for size in (K, N))
        qweight = (K_words, N) if self.method == "gptq" else (K, N_words)
        return {"qweight": (qweight,), "qzeros": ((groups, N_words),), "scales": ((groups, N),), "g_idx": ((K,),)}

    def dtypes(self) -> dict[str, tuple[torch.dtype, ...]]:
        return {"qweight": (torch.int32,), "qzeros": (torch.int32,), "scales": FLOATS, "g_idx": (torch.int32,)}

    def kinds(self, parts: Parts) -> set[Kind]:
        kind = f"int{self.bits}-fp16", self.stored_groupsize
        return {kind} if is_exact(parts["scales"], STORED_SCALES[kind[0]]) else set()

    @property
    def ones(self) -> int:
        """In every place of a word: words are added, 15 + 1 carries over, as in gptqmodel."""
        return self.zero_offset * sum(1 << shift for shift in range(0, 32, self.bits))

    def unpack(self, words: Tensor) -> Tensor:
        values = unpack(words, self.bits)
        return values if self.method == "gptq" else values.unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1)

    def decode(self, name: str, shape: torch.Size, parts: Parts) -> Integers:
        words, (N, K), G = parts["qweight"], shape, self.stored_groupsize
        q = self.unpack(words.t())[:, :K] if self.method == "gptq" else self.unpack(words)[:, :N].t()      # [N, K]
        repeats = -(-K // G) if self.groupsize == -1 else 1
        scales, zeros = parts["scales"].t().repeat(1, repeats), self.unpack(parts["qzeros"] + self.ones)[:, :N].t()
        order = None
        if "g_idx" in parts:
            order = find_order(parts["g_idx"], K if self.groupsize == -1 else G, f"{name}.g_idx")
        return Integers(self.bits, G, q if order is None else q[:, order], scales, zeros.repeat(1, repeats), order)

    def encode(self, integers: Integers, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """The parts of GPTQ."""
        qweight, qzeros = pack(integers.in_weights_order(), self.bits).t(), pack(integers.zeros.t(), self.bits)
        return {"qweight": qweight.contiguous(), "qzeros": qzeros - self.ones, "g_idx": integers.group_index(),
                "scales": integers.scales.t().to(scale_dtype).contiguous()}


@dataclass(frozen=True)
class CompressedIntegers(Packing):
    """compressed-tensors' "pack-quantized", and "int-quantized" where packed is False."""
    bits: int
    groupsize: int                       # -1: a row is one group; 0: the tensor is
    symmetric: bool
    packed: bool = True
    optional = ("weight_g_idx",)

    @property
    def is_int8(self) -> bool:
        """Whether formats.Int8Linear holds it."""
        return self.bits == 8 and self.symmetric and self.groupsize <= 0

    @property
    def marker(self) -> str:             # pyright: ignore[reportIncompatibleVariableOverride]
        return "weight_packed" if self.packed else "weight_scale"

    def shapes(self, N: int, K: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        groups = -(-K // self.groupsize) if self.groupsize > 0 else 1
        one_scale = {0: ((1,), (), (1, 1)), -1: ((N, 1), (N,))}
        shapes = {"weight_scale": one_scale.get(self.groupsize, ((N, groups),)), "weight_g_idx": ((K,),)}
        if self.packed:
            shapes |= {"weight_packed": ((N, -(-K * self.bits // 32)),), "weight_shape": ((2,),)}
        else:
            shapes["weight"] = ((N, K),)
        if not self.symmetric:
            shapes["weight_zero_point"] = ((-(-N * self.bits // 32), groups) if self.packed else (N, groups),)
        return shapes

    def dtypes(self) -> dict[str, tuple[torch.dtype, ...]]:
        whole = (torch.int32, torch.int64)
        return {"weight_scale": FLOATS, "weight_g_idx": whole, "weight_packed": (torch.int32,), "weight_shape": whole,
                "weight": (torch.int8,), "weight_zero_point": (torch.int32 if self.packed else torch.int8,)}

    def kinds(self, parts: Parts) -> set[Kind]:
        if self.is_int8:
            return {("int8", 0)}
        groupsize, scales = self.groupsize if self.groupsize > 0 else 128, parts["weight_scale"]
        modes = ["int4"] if self.bits == 4 and "weight_g_idx" not in parts and scales.dtype != torch.float16 else []
        if scales.dtype != torch.bfloat16 or not modes:
            modes.append(f"int{self.bits}-fp16")
        return {(mode, groupsize) for mode in modes if is_exact(scales, STORED_SCALES[mode])}

    def decode(self, name: str, shape: torch.Size, parts: Parts) -> Integers:
        (N, K), half = shape, 1 << self.bits - 1
        if self.packed:
            stated = parts["weight_shape"]
            if stated.device.type != "meta" and stated.tolist() != [N, K]:
                raise UserError(f"{name}.weight_shape {stated.tolist()} instead of {[N, K]}")
            q = unpack(parts["weight_packed"], self.bits)[:, :K]
        else:
            q = parts["weight"].view(torch.uint8) ^ 128
        scales = parts["weight_scale"].reshape(-1, 1) if self.groupsize <= 0 else parts["weight_scale"]
        scales = scales.expand(N, -1)
        if self.symmetric:
            zeros = torch.full(scales.shape, half, dtype=torch.uint8, device=scales.device)
        elif self.packed:
            zeros = unpack(parts["weight_zero_point"].t(), self.bits)[:, :N].t()
        else:
            zeros = parts["weight_zero_point"].view(torch.uint8) ^ 128
        order, groupsize = None, self.groupsize
        if groupsize > 0 and "weight_g_idx" in parts and -1 not in parts["weight_g_idx"]:         # -1: not set
            order = find_order(parts["weight_g_idx"], groupsize, f"{name}.weight_g_idx")
        if self.is_int8:
            groupsize = K
        elif groupsize <= 0:                             # GPTQLinear has groups, which share the row's scale
            scales, zeros, groupsize = scales.repeat(1, -(-K // 128)), zeros.repeat(1, -(-K // 128)), 128
        return Integers(self.bits, groupsize, q if order is None else q[:, order], scales, zeros, order)

    def encode(self, integers: Integers, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        q = integers.q                   # in the weight's order: compressed-tensors has given up another
        parts = {"weight_packed": pack(q, self.bits), "weight_scale": integers.scales.to(scale_dtype).contiguous(),
                 "weight_shape": torch.tensor(q.shape)}
        if not self.symmetric:
            parts["weight_zero_point"] = pack(integers.zeros.t(), self.bits).t().contiguous()
        return parts


@dataclass(frozen=True)
class Float8(Packing):
    """A scale for each block of rows and columns; 0 of them for all."""
    marker: str
    block: tuple[int, int]

    def shapes(self, N: int, K: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        scale = tuple(-(-size // block) if block else 1 for size, block in zip((N, K), self.block, strict=True))
        others = {(0, 0): ((1,), ()), (1, 0): ((N,),)}
        return {"weight": ((N, K),), self.marker: (scale, *others.get(self.block, ()))}

    def dtypes(self) -> dict[str, tuple[torch.dtype, ...]]:
        return {"weight": (torch.float8_e4m3fn,), self.marker: FLOATS}

    def kinds(self, parts: Parts) -> set[Kind]:
        return set()

    def dequantize(self, name: str, shape: torch.Size, parts: Parts) -> Tensor:
        (N, K), (rows, columns) = shape, self.block
        scales = parts[self.marker].float().reshape(-(-N // rows) if rows else 1, -1)
        row, column = (torch.arange(size) // (block or size) for size, block in ((N, rows), (K, columns)))
        weight, out = parts["weight"], torch.empty(N, K, dtype=torch.bfloat16)
        for chunk in torch.arange(N).split(max(1, CHUNK_WEIGHTS // K)):
            here = slice(int(chunk[0]), int(chunk[-1]) + 1)
            out[here] = (weight[here].float() * scales[row[here]][:, column]).bfloat16()
        return out


PARTS = ("weight", "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_shape", "weight_scale",
         "weight_zero_point", "weight_g_idx", "weight_scale_inv")


# ---- from config.json

Block = Annotated[list[Annotated[int, Field(ge=1, le=1 << 20)]], Field(min_length=2, max_length=2)]     # rows, columns
Form = Literal["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"]
WHERE = "config.json: quantization_config"
METHODS = ("gptq", "awq", "compressed-tensors", "fp8")


class Weights(Checked):
    """Of compressed-tensors' QuantizationArgs."""
    num_bits: Literal[4, 8]
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group", "block"] | None = None
    group_size: int | None = Field(None, ge=-1, le=1 << 20)
    block_structure: Block | None = None
    dynamic: Literal[False] = False

    def packing(self, form: str) -> Packing:
        strategy = self.strategy or {None: "tensor", -1: "channel"}.get(self.group_size, "group")
        G = {"tensor": 0, "channel": -1}.get(strategy, self.group_size)
        packed, asymmetric = form == "pack-quantized", "" if self.symmetric else "a"
        if (self.type == "int" and form != "float-quantized" and (packed or self.num_bits == 8) and strategy != "block"
                and G in (0, -1, *GROUPSIZES) and (self.symmetric or G)):
            return CompressedIntegers(self.num_bits, G, self.symmetric, packed)
        if self.type == "float" and form in ("float-quantized", "naive-quantized") and self.symmetric:
            block = {"tensor": (0, 0), "channel": (1, 0), "group": (1, G)}.get(strategy, self.block_structure)
            if self.num_bits == 8 and block and all(size is not None and size >= 0 for size in block):
                return Float8("weight_scale", (block[0], block[1]))
        raise UserError(f"{WHERE}: {form} weights of type {self.type}{self.num_bits}, {asymmetric}symmetric, strategy "
                        f"{strategy}{f' of {G}' if strategy == 'group' else ''} are not supported")


class ConfigGroup(Checked):
    weights: Weights
    format: Form | None = None
    input_activations: dict[str, Any] | None = None


class CompressedTensors(Checked):
    """Which linears a group is for (`targets`, `ignore`) is not read: it shows in their tensors."""
    format: Literal["pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"]
    config_groups: Annotated[dict[str, ConfigGroup], Field(min_length=1)]
    transform_config: Annotated[dict[str, Any], Field(max_length=0)] | None = None       # rotations of activations
    sparsity_config: dict[str, Any] | None = None

    def packings(self) -> list[Packing]:
        if (sparsity := (self.sparsity_config or {}).get("format", "dense")) != "dense":
            raise UserError(f"{WHERE}: sparsity_config: format {sparsity!r:.80} is not supported")
        found = []
        for name, group in self.config_groups.items():
            form = group.format or self.format
            if form == "mixed-precision":
                raise UserError(f"{WHERE}: group {name!r:.80} of mixed-precision has no format")
            found.append(group.weights.packing(form))
        return found


class BlockFP8(Checked):
    """quant_method fp8, of DeepSeek and Qwen."""
    weight_block_size: Block | None = None
    fmt: Literal["e4m3"] = "e4m3"

    def packings(self) -> list[Packing]:
        block: Any = tuple(self.weight_block_size or (0, 0))
        return [Float8("weight_scale_inv", block), *(Float8("weight_scale", block) for block in ((0, 0), (1, 0)))]


@dataclass(frozen=True)
class Published:
    """The packings of a published checkpoint."""
    method: str
    packings: list[Packing]
    quantizes_activations: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Published | None":
        """From the contents of config.json. UserError that names what is not supported."""
        text = config.get("text_config")
        holders = [config, text] if isinstance(text, dict) else [config]
        keys = "quantization_config", "compression_config"
        stated = next((holder[key] for holder in holders for key in keys if holder.get(key)), None)
        if not stated:
            return None
        stated = stated if isinstance(stated, dict) else {"quant_method": stated}
        method = stated.get("quant_method", "unnamed")
        if method == "compressed-tensors":
            found = checked(CompressedTensors, stated, WHERE)
            activations = any(group.input_activations for group in found.config_groups.values())
            return cls(method, found.packings(), activations or bool(stated.get("kv_cache_scheme")))
        if method == "fp8":
            return cls(method, checked(BlockFP8, stated, WHERE).packings(), True)
        return cls(method, [word_packing(method, stated)])


def word_packing(method: Any, stated: dict[str, Any]) -> WordPacking:
    """GPTQ or AWQ."""
    form: Any = stated.get("checkpoint_format") or stated.get("format")
    bits: Any = stated.get("bits", stated.get("w_bit"))
    groupsize: Any = stated.get("group_size", stated.get("q_group_size", -1))
    if method == "awq":
        layout = "version", str(stated.get("version") or form or "gemm").lower(), ("gemm",)
    else:
        layout = "checkpoint_format", form or "gptq", ("gptq", "gptq_v2")
    marlin = "checkpoint_format", "marlin" if stated.get("is_marlin_format") else "gptq", ("gptq", "gptq_v2")
    for key, value, supported in (("quant_method", method, METHODS), marlin, layout,
                                  ("bits", bits, (4,) if method == "awq" else (4, 8)),
                                  ("group_size", groupsize, (-1, *GROUPSIZES)),
                                  ("lm_head", bool(stated.get("lm_head")), (False,)),
                                  ("dynamic", other_numbers(stated.get("dynamic"), bits, groupsize), (None,))):
        if value not in supported:
            raise UserError(f"{WHERE}: {key} {value!r:.80} is not supported (supported: "
                            f"{', '.join(map(str, supported))}); take the unquantized checkpoint")
    return WordPacking(method, int(bits), int(groupsize), int(method == "gptq" and form != "gptq_v2"))


def other_numbers(dynamic: Any, bits: Any, groupsize: Any) -> Any:
    """What a map of patterns to settings asks for beside leaving modules as they are (which shows in their tensors)."""
    if not isinstance(dynamic, dict):
        return dynamic or None
    own = {"bits": bits, "group_size": groupsize}
    settings = (value for pattern, value in dynamic.items() if not pattern.startswith("-:"))
    return next((value for value in settings
                 if not isinstance(value, dict) or any(value.get(key, own[key]) != own[key] for key in own)), None)
