"""GPU kernels in Triton for up to 16 tokens, one source for NVIDIA and AMD, each beside its plain PyTorch twin.

A decoding step reads every weight once, so each kernel streams one matrix, with what comes before and after it folded
in. A dense layer takes six launches:

    norm, wqkv, bias | QK-norm, RoPE, cache write | attention | wo, residual | norm, w13, silu(gate) * up | w2, residual

One of a Gated DeltaNet takes as many (gpu_deltanet.py). In the place of the last two, experts take

    norm, router | choice | chosen w13 | chosen w2, their sum, residual

and two more, where one is for all tokens.

On Hopper a kernel begins to load its weights while the one before it ends (programmatic dependent launch): gdc_wait
stands before the first load of what another kernel writes.

Letters as in __init__.py; M tokens, of all rows together.
"""
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

MAX_TOKENS = 16                      # of a narrow matrix product: a tensor core's tile
FEWEST_KEYS = 64                     # of a thread block of the attention


class Tile(NamedTuple):
    """How a matrix is cut up: rows and columns of a thread block's tile, its warps, and tiles loaded ahead."""
    rows: int
    columns: int
    warps: int
    stages: int


LIBRARY = Tile(0, 0, 0, 0)           # no tile: PyTorch's operators
COMPILED = Tile(0, 0, 0, 1)          # or what its compiler makes of them
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
MAGIC = {8: 0x47008000, 4: 0x43000000}      # the former flips a byte's sign, too
ODD = tl.constexpr(0x02000000)       # makes 2^11 of the latter


# ---- linears
#
# Quantized weights are read as words, and become floats without a conversion instruction, of which a multiprocessor
# does 16 a cycle: their bits are put into the mantissa of a constant, 2^15 + q of a byte, 2^7 + q or 2^11 + q of a
# nibble. The constant is an argument, because one instruction takes a mask and a register, not two constants.

@triton.jit
def load_tile(w_ptr, scales_ptr, zeros_ptr, rows, here, t: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
              GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile t of some rows, [chunks of 16 bytes, rows, entries], with int4's scales and zeros [chunks, rows].

    Triton gives the threads of a warp to the first dimension first: so each has chunks of all rows, and x for them."""
    SPAN: tl.constexpr = 128 // BITS                               # columns of a chunk
    WIDE: tl.constexpr = SPAN if BITS > 8 else 4  # pyright: ignore    entries of a chunk: columns or words
    STRIDE: tl.constexpr = K // SPAN * WIDE                        # of a row, in entries
    chunk = t * (COLUMNS // SPAN) + tl.arange(0, COLUMNS // SPAN)
    mask = here[None, :]
    if (t + 1) * COLUMNS > K:
        mask = mask & (chunk * SPAN < K)[:, None]
    offset = (rows[None, :] * STRIDE + chunk[:, None] * WIDE)[:, :, None] + tl.arange(0, WIDE)
    w = tl.load(w_ptr + tl.max_contiguous(offset, [2, 1, WIDE]),
                mask=mask[:, :, None], other=0, eviction_policy="evict_first")
    scale, shift = 0.0, 0.0
    if BITS == 4:
        at = rows[None, :] * (K // GROUP) + (chunk * SPAN // GROUP)[:, None]
        scale = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32) * (scale / 16)
    return w, scale, shift


@triton.jit
def byte_floats(w, n: tl.constexpr, magic, PERMUTE: tl.constexpr):
    """Byte n of words, int8: 2^15 + 128 + q."""
    if PERMUTE:                                                    # one instruction, after one for all four signs
        w = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [w ^ -0x7F7F7F80, magic, 0x7604 + 16 * n],
                                      dtype=tl.int32, is_pure=True, pack=1)
        return w.to(tl.float32, bitcast=True)
    if n == 0:
        w = w << 8
    elif n > 1:
        w = w >> (8 * n - 8)
    return ((w & 0xFF00) ^ magic).to(tl.float32, bitcast=True)


@triton.jit
def nibble_floats(w, n: tl.constexpr, magic):
    """Nibble n of words: 2^11 + q where n is 1, 3 or 5, else 2^7 + q."""
    if n == 0:
        w = w << 16
    elif n <= 2:
        w = w << 8
    elif n == 5 or n == 6:
        w = w >> 8
    elif n == 7:
        w = w >> 12
    if n == 1 or n == 3 or n == 5:
        return ((w & 0xF000) | (magic + ODD)).to(tl.float32, bitcast=True)
    return ((w & 0xF0000) | magic).to(tl.float32, bitcast=True)


@triton.jit
def load_floats(ptr, first, inside, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """COUNT numbers from first [chunks, 1] on, fp32 [chunks, COUNT]; zeros outside, where not the WHOLE is inside."""
    if ptr.dtype.element_ty == tl.bfloat16:                        # by words: an instruction a number, not two
        word = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (first // 2 + tl.arange(0, COUNT // 2)[None, :])
        word = tl.load(word) if WHOLE else tl.load(word, mask=inside, other=0)
        low, high = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), [first.shape[0], COUNT])
    at = ptr + (first + tl.arange(0, COUNT)[None, :])
    return (tl.load(at) if WHOLE else tl.load(at, mask=inside, other=0.0)).to(tl.float32)


@triton.jit
def load_x(x_ptr, norm_ptr, first, inside, COUNT: tl.constexpr, WHOLE: tl.constexpr, squares, OFFSET: tl.constexpr):
    """x times the norm's weight plus OFFSET, as load_floats, and the squares of x so far, by their place in a chunk."""
    x = load_floats(x_ptr, first, inside, COUNT, WHOLE)
    if norm_ptr is not None:
        squares += x * x
        weight = load_floats(norm_ptr, first, inside, COUNT, WHOLE)
        if OFFSET != 0:
            weight += OFFSET
        x *= weight
    return x, squares


@triton.jit
def one_token(x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, rows, here, magic, K: tl.constexpr, BITS: tl.constexpr,
              GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
              PERMUTE: tl.constexpr, PDL: tl.constexpr, residual_ptr, at, wanted, OFFSET: tl.constexpr):
    """Rows of W times x [K] (times the norm's weight), fp32 [ROWS], the sum of x's squares, and the residual."""
    TILES: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    SPAN: tl.constexpr = 128 // BITS
    CHUNKS: tl.constexpr = COLUMNS // SPAN
    acc = tl.zeros([CHUNKS, ROWS], tl.float32)
    squares = tl.zeros([CHUNKS, 4 if BITS <= 8 else SPAN], tl.float32)  # pyright: ignore
    w, scale, shift = load_tile(w_ptr, scales_ptr, zeros_ptr, rows, here, 0, K, BITS, GROUP, COLUMNS)
    w1, scale1, shift1 = w, scale, shift
    if TILES > 1 and AHEAD > 1:
        w1, scale1, shift1 = load_tile(w_ptr, scales_ptr, zeros_ptr, rows, here, 1, K, BITS, GROUP, COLUMNS)
    w2, scale2, shift2 = w1, scale1, shift1
    if PDL:
        gdc_wait()
    residual = 0.0
    if residual_ptr is not None:                                   # early, to have it in time
        residual = tl.load(residual_ptr + at, mask=wanted, other=0.0).to(tl.float32)
    for t in tl.static_range(TILES):                               # unrolled: to move registers would await their loads
        if t + AHEAD < TILES:
            w2, scale2, shift2 = load_tile(w_ptr, scales_ptr, zeros_ptr, rows, here, t + AHEAD, K, BITS, GROUP, COLUMNS)
        WHOLE = (t + 1) * COLUMNS <= K
        chunk = t * CHUNKS + tl.arange(0, CHUNKS)[:, None]
        if BITS > 8:
            x, squares = load_x(x_ptr, norm_ptr, chunk * SPAN, chunk * SPAN < K, SPAN, WHOLE, squares, OFFSET)
            acc += tl.sum(w.to(tl.float32) * x[:, None], axis=2)
        else:
            dot = tl.zeros([CHUNKS, ROWS, 4], tl.float32)
            total, odd = tl.zeros([CHUNKS, 4], tl.float32), tl.zeros([CHUNKS, 4], tl.float32)
            for n in tl.static_range(32 // BITS):
                first = n * (K * BITS // 32) + chunk * 4                                   # see in_planes
                x, squares = load_x(x_ptr, norm_ptr, first, chunk * SPAN < K, 4, WHOLE, squares, OFFSET)
                if BITS == 8:
                    total += x
                    dot += byte_floats(w, n, magic, PERMUTE) * x[:, None]
                else:
                    if n == 1 or n == 3 or n == 5:
                        odd += x
                    else:
                        total += x
                    dot += nibble_floats(w, n, magic) * x[:, None]
            if BITS == 8:
                acc += tl.sum(dot, axis=2) - 32896 * tl.sum(total, axis=1)[:, None]
            else:
                dot = tl.sum(dot, axis=2) - tl.sum(128 * total + 2048 * odd, axis=1)[:, None]
                acc += scale * dot - shift * tl.sum(total + odd, axis=1)[:, None]
        if AHEAD > 1:
            w, scale, shift = w1, scale1, shift1
            w1, scale1, shift1 = w2, scale2, shift2
        else:
            w, scale, shift = w2, scale2, shift2
    return tl.sum(acc, axis=0), tl.sum(squares), residual


@triton.jit
def join_four(a, b, c, d):
    """[R, C] four times -> [R, C, 4]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], a.shape[1], 4])


@triton.jit
def few_tokens(x_ptr, w_ptr, scales_ptr, zeros_ptr, rows, here, magic, M, K: tl.constexpr, BITS: tl.constexpr,
               GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
               DTYPE: tl.constexpr, PERMUTE: tl.constexpr, PDL: tl.constexpr):
    """The same for up to 16 rows of x [M, K], by tensor cores: fp32 [ROWS, 16]."""
    acc = tl.zeros([ROWS, 16], tl.float32)
    token = tl.arange(0, 16)[None, :]
    ENTRY: tl.constexpr = 1 if BITS > 8 else 32 // BITS            # columns of an entry
    if PDL:
        gdc_wait()
    for first in tl.range(0, K, COLUMNS, num_stages=STAGES):
        entry = first // ENTRY + tl.arange(0, COLUMNS // ENTRY)
        w = tl.load(w_ptr + rows[:, None] * (K // ENTRY) + entry[None, :],
                    mask=here[:, None] & (entry * ENTRY < K)[None, :], other=0, eviction_policy="evict_first")
        if BITS == 8:
            w = join_four(byte_floats(w, 0, magic, PERMUTE), byte_floats(w, 1, magic, PERMUTE),
                          byte_floats(w, 2, magic, PERMUTE), byte_floats(w, 3, magic, PERMUTE)) - 32896
        elif BITS == 4:
            even = join_four(nibble_floats(w, 0, magic) - 128, nibble_floats(w, 2, magic) - 128,
                             nibble_floats(w, 4, magic) - 128, nibble_floats(w, 6, magic) - 128)
            odd = join_four(nibble_floats(w, 1, magic) - 2048, nibble_floats(w, 3, magic) - 2048,
                            nibble_floats(w, 5, magic) - 2048, nibble_floats(w, 7, magic) - 128)
            group = first // GROUP + tl.arange(0, COLUMNS // GROUP)
            at, mask = rows[:, None] * (K // GROUP) + group[None, :], here[:, None] & (group * GROUP < K)[None, :]
            scale = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
            zero = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32)[:, :, None] / 16
            w = (tl.reshape(tl.join(even, odd), [ROWS, COLUMNS // GROUP, GROUP]) - zero) * scale
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + token * K + column[:, None], mask=(column < K)[:, None] & (token < M), other=0.0)
        acc = tl.dot(tl.reshape(w, [ROWS, COLUMNS]).to(DTYPE), x, acc, input_precision="ieee")
    return acc


@triton.jit
def linear_kernel(x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, bias_ptr, residual_ptr, chosen_ptr, y_ptr, eps, magic,
                  M, N, per_token, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, ONE: tl.constexpr,
                  DTYPE: tl.constexpr, PLANES: tl.constexpr, OFFSET: tl.constexpr, PERMUTE: tl.constexpr,
                  PDL: tl.constexpr):
    """y [M, N] = norm(x) W^T + bias + residual; GATED: silu(gate) * up, of W's rows 0 .. N - 1 and N .. 2 N - 1.

    With chosen [pairs], W holds experts one after another, and y [pairs, N] is of per_token experts for each x."""
    if PDL:
        gdc_launch_dependents()
    UNITS: tl.constexpr = ROWS // 2 if GATED else ROWS
    i = tl.arange(0, ROWS)
    unit, row = tl.program_id(0) * UNITS + tl.arange(0, UNITS), tl.program_id(0) * UNITS + i
    if GATED:
        row = tl.program_id(0) * UNITS + i // 2                    # gate and up of a unit beside each other
    here = row < N
    if GATED:
        row += i % 2 * N
    rows = row.to(tl.int64)
    if chosen_ptr is not None:
        if PDL:
            gdc_wait()
        pair = tl.program_id(1)
        rows += tl.load(chosen_ptr + pair) * (2 * N if GATED else N)
        x_ptr += pair // per_token * K
        y_ptr += pair * N
    place = unit if PLANES == 1 else unit % PLANES * (N // PLANES) + unit // PLANES        # see in_planes
    if ONE:
        y, squares, residual = one_token(  # pyright: ignore
            x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, rows, here, magic, K, BITS, GROUP, ROWS, COLUMNS, STAGES,
            PERMUTE, PDL, residual_ptr, place, unit < N, OFFSET)
        if norm_ptr is not None:
            y *= tl.rsqrt(squares / K + eps)
        y, token = tl.reshape(y, [ROWS, 1]), tl.arange(0, 1)
    else:
        y = few_tokens(x_ptr, w_ptr, scales_ptr, zeros_ptr, rows, here, magic, M, K, BITS, GROUP, ROWS, COLUMNS, STAGES,
                       DTYPE, PERMUTE, PDL)
        token = tl.arange(0, 16)
    if BITS == 8:
        y *= tl.load(scales_ptr + rows, mask=here, other=0.0)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=here, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, [UNITS, 2, 1 if ONE else 16]), (0, 2, 1)))
        y = gate * tl.sigmoid(gate) * up
    at = token[None, :] * N + place[:, None]
    mask = (token < M)[None, :] & (unit < N)[:, None]
    if residual_ptr is not None:
        if ONE:
            y += tl.reshape(residual, [UNITS, 1])
        else:
            y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y, mask=mask)


@triton.jit
def normed_dot(x_ptr, norm_ptr, w_ptr, eps, offset, C, BLOCK: tl.constexpr):
    """norm(x) . w, of C elements."""
    squares, dot = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, C, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < C
        x = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
        squares += x * x
        x *= tl.load(norm_ptr + column, mask=mask, other=0.0).to(tl.float32) + offset
        dot += x * tl.load(w_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(dot) * tl.rsqrt(tl.sum(squares) / C + eps)


@triton.jit
def choose_kernel(logits_ptr, x_ptr, norm_ptr, gate_ptr, chosen_ptr, weights_ptr, share_ptr, eps, offset, E, C,
                  CHOSEN: tl.constexpr, NORMALIZE: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
                  BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A token's CHOSEN most probable experts, their weights, and its share of what all tokens' expert makes of it."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m, e, slot = tl.program_id(0), tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    p = tl.load(logits_ptr + m * E + e, mask=e < E, other=-float("inf")).to(tl.float32)
    p = tl.exp(p - tl.max(p, axis=0))
    p /= tl.sum(p, axis=0)
    chosen, weights = tl.zeros([SLOTS], tl.int32), tl.zeros([SLOTS], tl.float32)
    for j in tl.static_range(CHOSEN):
        most, which = tl.max(p, axis=0, return_indices=True)
        chosen, weights = tl.where(slot == j, which, chosen), tl.where(slot == j, most, weights)
        p = tl.where(e == which, -1.0, p)
    if NORMALIZE:
        weights /= tl.sum(weights, axis=0)
    tl.store(chosen_ptr + m * CHOSEN + slot, chosen, mask=slot < CHOSEN)
    tl.store(weights_ptr + m * CHOSEN + slot, weights, mask=slot < CHOSEN)
    if gate_ptr is not None:
        tl.store(share_ptr + m, tl.sigmoid(normed_dot(x_ptr + m * C, norm_ptr, gate_ptr, eps, offset, C, BLOCK)))


@triton.jit
def experts_down_kernel(x_ptr, w_ptr, scales_ptr, zeros_ptr, chosen_ptr, weights_ptr, residual_ptr, shared_ptr,
                        share_ptr, y_ptr, magic, N, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                        CHOSEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
                        PLANES: tl.constexpr, PERMUTE: tl.constexpr, PDL: tl.constexpr):
    """y [M, N] = residual + share * shared + the weighted sum of what each token's CHOSEN experts make of their
    x [M * CHOSEN, K]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m, unit = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = unit < N
    place = unit if PLANES == 1 else unit % PLANES * (N // PLANES) + unit // PLANES
    total = tl.load(residual_ptr + m * N + place, mask=here, other=0.0).to(tl.float32)
    if shared_ptr is not None:
        total += tl.load(share_ptr + m) * tl.load(shared_ptr + m * N + place, mask=here, other=0.0).to(tl.float32)
    for j in range(CHOSEN):
        pair = m * CHOSEN + j
        rows = tl.load(chosen_ptr + pair) * N + unit
        y, squares, residual = one_token(  # pyright: ignore
            x_ptr + pair * K, None, w_ptr, scales_ptr, zeros_ptr, rows, here, magic, K, BITS, GROUP, ROWS, COLUMNS,
            STAGES, PERMUTE, False, None, unit, here, 0.0)
        if BITS == 8:
            y *= tl.load(scales_ptr + rows, mask=here, other=0.0)
        total += y * tl.load(weights_ptr + pair)
    tl.store(y_ptr + m * N + place, total, mask=here)


@triton.jit
def norm_kernel(x_ptr, norm_ptr, y_ptr, eps, offset, C, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """The RMS norm of a row of x [M, C]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i, row = tl.arange(0, WIDTH), tl.program_id(0).to(tl.int64) * C
    x = tl.load(x_ptr + row + i, mask=i < C, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + i, mask=i < C, other=0.0).to(tl.float32) + offset
    y = x * tl.rsqrt(tl.sum(x * x) / C + eps) * weight
    tl.store(y_ptr + row + i, y, mask=i < C)


class Weights(NamedTuple):
    """A linear's tensors as the kernels take them: quantized weights as words int32 [N, K * bits / 32]."""
    bits: int
    weight: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "Weights":
        """tensors: as in LayerTensors, int4 in the stored form."""
        weight, bits = tensors[0], {torch.uint8: 4, torch.int8: 8}.get(tensors[0].dtype, 8 * tensors[0].itemsize)
        count = {4: 3, 8: 2}.get(bits, 1)
        scales, zeros = (*tensors[1:count], None, None)[:2]
        words = weight if bits > 8 else weight.view(torch.int32)
        return cls(bits, words, scales, zeros, tensors[count] if len(tensors) > count else None)

    @property
    def fields(self) -> int:
        """Weights of a word; 1 if there are no words."""
        return 32 // self.bits if self.bits <= 8 else 1

    @property
    def in_features(self) -> int:
        return self.weight.size(1) if self.bits > 8 else self.weight.size(1) * 32 // self.bits

    @property
    def groupsize(self) -> int:
        return self.in_features // self.zeros.size(1) if self.zeros is not None else 0

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights [N, K]."""
        if self.scales is None:
            return self.weight
        if self.zeros is None:
            return (self.weight.view(torch.int8) * self.scales[:, None]).to(dtype)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.weight.device)
        q = (self.weight[:, :, None] >> shifts & 15).view(*self.zeros.shape, -1)
        return ((q - self.zeros[:, :, None].float() / 16) * self.scales[:, :, None].float()).flatten(1).to(dtype)


def fits(tensors: list[Tensor]) -> bool:
    """Whether the kernels take a linear: rows of whole 16-byte chunks, groups of one size."""
    weight = tensors[0]
    if weight.dtype == torch.uint8:
        if weight.dim() != 2:
            return False
        columns, groups = 2 * weight.size(1), tensors[2].size(1)
        size = columns // groups
        if columns % groups or size % 32 or size & (size - 1):       # the last one may be shorter
            return False
    return weight.is_contiguous() and weight.size(1) * weight.itemsize % 16 == 0


def linear(x: Tensor, w: Weights, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None,
           gated: bool = False, tile: Tile = LIBRARY, planes: tuple[int, int] = (1, 1), offset: float = 0.0) -> Tensor:
    """x [M, K] through a linear, M up to 16, with all that norm (an RMS norm's weight, to which offset is added),
    residual [M, N] and gated ask for. planes: the order of x and norm, and of y and residual: see in_planes; more than
    1 only for one token."""
    (M, K), rows = x.shape, w.weight.size(0)
    N, dtype = rows // 2 if gated else rows, norm.dtype if norm is not None else x.dtype
    if tile == COMPILED:
        return compiled_reference()(x, w, norm, eps, residual, gated, planes, offset)
    if tile == LIBRARY:
        if w.scales is not None:
            w = Weights(16, dequantize(w, dtype), bias=w.bias)
        return linear_reference(x, w, norm, eps, residual, gated, planes, offset)
    if M == 1 and planes[0] == 1 < w.fields:
        x, norm = in_planes(x, w.fields), None if norm is None else in_planes(norm[None], w.fields)
    if norm is not None and M > 1:
        x, norm = rms_norm(x, norm, eps, offset), None
    y = torch.empty(M, N, dtype=residual.dtype if residual is not None else dtype, device=x.device)
    launch(linear_kernel, (cdiv(rows, tile.rows),), x, norm, w.weight, w.scales, w.zeros, w.bias, residual, None,
           y, eps, MAGIC.get(w.bits, 0), M, N, 0, K, BITS=w.bits, GROUP=w.groupsize, GATED=gated, ROWS=tile.rows,
           COLUMNS=tile.columns, STAGES=tile.stages, ONE=M == 1, DTYPE=TRITON_DTYPES[dtype], PLANES=planes[1],
           OFFSET=offset, PERMUTE=on_nvidia(x.device), num_warps=tile.warps)
    return y


def linear_reference(x: Tensor, w: Weights, norm: Tensor | None = None, eps: float = 0.0,
                     residual: Tensor | None = None, gated: bool = False, planes: tuple[int, int] = (1, 1),
                     offset: float = 0.0) -> Tensor:
    def natural(t: Any, n: int) -> Any:
        return None if t is None else out_of_planes(t.view(-1, t.size(-1)), n)
    x, norm, residual = natural(x, planes[0]), natural(norm, planes[0]), natural(residual, planes[1])
    if norm is not None:
        x = F.rms_norm(x.float(), x.shape[1:], norm.float().view(-1) + offset, eps).to(norm.dtype)
    y = F.linear(x, w.dequantize(x.dtype), w.bias)
    if gated:
        gate, up = y.chunk(2, dim=1)
        y = F.silu(gate) * up
    return in_planes(y if residual is None else residual + y, planes[1])


@functools.cache
def compiled_reference() -> Any:
    """linear_reference by PyTorch's compiler. The tuning makes a product with one token a fused multiply and sum."""
    return torch.compile(linear_reference, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": True})


def experts(x: Tensor, chosen: Tensor, weights: Tensor, w13: Weights, w2: Weights, norm: Tensor, eps: float,
            residual: Tensor, tiles: tuple[Tile, Tile], planes: int = 1, offset: float = 0.0,
            shared: Tensor | None = None, share: Tensor | None = None) -> Tensor:
    """residual [M, C] and the weighted sum of what experts make of norm(x) [M, C], M up to 16: in two launches.

    chosen, weights, share: see choose. planes: the order of x, norm, residual and shared. w13, w2: of all experts.
    offset: as in linear. shared: what all tokens' expert makes of x [M, C], if there is one."""
    (M, C), k, size = x.shape, chosen.size(1), w2.in_features
    dtype = norm.dtype
    hidden, y = torch.empty(M * k, size, dtype=dtype, device=x.device), torch.empty_like(residual)
    up, down = tiles
    if planes != w13.fields:
        x, norm = (in_planes(out_of_planes(t, planes), w13.fields) for t in (x, norm[None]))
    launch(linear_kernel, (cdiv(2 * size, up.rows), M * k), x, norm, w13.weight, w13.scales, w13.zeros, None,
           None, chosen, hidden, eps, MAGIC.get(w13.bits, 0), 1, size, k, C, BITS=w13.bits, GROUP=w13.groupsize,
           GATED=True, ROWS=up.rows, COLUMNS=up.columns, STAGES=up.stages, ONE=True, DTYPE=TRITON_DTYPES[dtype],
           PLANES=w2.fields, OFFSET=offset, PERMUTE=on_nvidia(x.device), num_warps=up.warps)
    launch(experts_down_kernel, (cdiv(C, down.rows), M), hidden, w2.weight, w2.scales, w2.zeros, chosen, weights,
           residual, shared, share, y, MAGIC.get(w2.bits, 0), C, size, BITS=w2.bits, GROUP=w2.groupsize, CHOSEN=k,
           ROWS=down.rows, COLUMNS=down.columns, STAGES=down.stages, PLANES=planes, PERMUTE=on_nvidia(x.device),
           num_warps=down.warps)
    return y


def experts_reference(x: Tensor, chosen: Tensor, weights: Tensor, w13: Weights, w2: Weights, norm: Tensor, eps: float,
                      residual: Tensor, offset: float = 0.0, shared: Tensor | None = None,
                      share: Tensor | None = None) -> Tensor:
    """In natural order."""
    C, size = x.size(1), w2.in_features
    normed = F.rms_norm(x.float(), (C,), norm.float() + offset, eps).to(norm.dtype)
    up, down = w13.dequantize(norm.dtype).view(-1, 2 * size, C), w2.dequantize(norm.dtype).view(-1, C, size)
    gate, up = torch.einsum("mkfc,mc->mkf", up[chosen], normed).chunk(2, dim=-1)
    y = torch.einsum("mkcf,mkf->mkc", down[chosen], F.silu(gate) * up)
    if shared is not None and share is not None:
        residual = residual + share[:, None] * shared
    return residual + (y.float() * weights[:, :, None]).sum(1).to(residual.dtype)


def choose(logits: Tensor, n: int, normalize: bool, x: Tensor, norm: Tensor, eps: float, offset: float,
           gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The n most probable experts of a router's logits [M, E] and their weights, int64 and fp32 [M, n]; and, if there
    is a gate [1, C], the share of what all tokens' expert makes of norm(x) [M, C], fp32 [M]."""
    (M, E), C, device = logits.shape, x.size(1), x.device
    chosen = torch.empty(M, n, dtype=torch.int64, device=device)
    weights, share = (torch.empty(*shape, dtype=torch.float32, device=device) for shape in ((M, n), (M,)))
    launch(choose_kernel, (M,), logits, x, norm, gate, chosen, weights, share, eps, offset, E, C, CHOSEN=n,
           NORMALIZE=normalize, EXPERTS=next_power_of_2(E), SLOTS=next_power_of_2(n),
           BLOCK=min(2048, next_power_of_2(C)), num_warps=4)
    return chosen, weights, None if gate is None else share


def choose_reference(logits: Tensor, n: int, normalize: bool, x: Tensor, norm: Tensor, eps: float, offset: float,
                     gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    weights, chosen = logits.float().softmax(-1).topk(n, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if gate is None:
        return chosen, weights, None
    return chosen, weights, (F.rms_norm(x.float(), norm.shape, norm.float() + offset, eps) @ gate[0].float()).sigmoid()


def in_planes(x: Tensor, planes: int) -> Tensor:
    """x [M, K] in the order that quantized weights want: first what meets field 0 of the words, then field 1 ..."""
    return x if planes == 1 else x.view(len(x), -1, planes).transpose(1, 2).reshape(x.shape)


def out_of_planes(x: Tensor, planes: int) -> Tensor:
    """The inverse."""
    return x if planes == 1 else x.view(len(x), planes, -1).transpose(1, 2).reshape(x.shape)


@triton.jit
def dequantize_kernel(w_ptr, scales_ptr, zeros_ptr, y_ptr, K, BITS: tl.constexpr, GROUP: tl.constexpr,
                      COLUMNS: tl.constexpr):
    """A row's columns, for products of many tokens."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < K
    if BITS == 8:
        y = tl.load(w_ptr + row * K + column, mask=mask, other=0).to(tl.float32) * tl.load(scales_ptr + row)
    else:
        at = row * (K // GROUP) + column // GROUP
        scale = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32) / 16
        q = tl.load(w_ptr + row * (K // 2) + column // 2, mask=mask, other=0) >> (column % 2 * 4)
        y = ((q & 15).to(tl.float32) - zero) * scale
    tl.store(y_ptr + row * K + column, y, mask=mask)


def dequantize(w: Weights, dtype: torch.dtype) -> Tensor:
    """As Weights.dequantize, of quantized weights."""
    N, K = w.weight.size(0), w.in_features
    y = torch.empty(N, K, dtype=dtype, device=w.weight.device)
    stored = w.weight.view(torch.int8 if w.bits == 8 else torch.uint8)
    kernel: Any = dequantize_kernel
    kernel[N, cdiv(K, 1024)](stored, w.scales, w.zeros, y, K, BITS=w.bits, GROUP=w.groupsize, COLUMNS=1024)
    return y


def rms_norm(x: Tensor, norm: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    y = torch.empty(x.shape, dtype=norm.dtype, device=x.device)
    launch(norm_kernel, (len(x),), x, norm, y, eps, offset, x.size(1), WIDTH=next_power_of_2(x.size(1)), num_warps=8)
    return y


# ---- attention

@triton.jit
def prepare_kernel(qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, logn_ptr, pos_ptr, q_ptr, k_ptr, v_ptr,
                   k_scales_ptr, v_scales_ptr, ready_ptr, eps, offset, row, S, T, H, KV, D: tl.constexpr,
                   R: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr):
    """One head of one token: norm and RoPE of R dimensions; queries go to q [M, H, D], keys and values to the cache,
    where there are scales in int8."""
    m, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALF)
    mask = i < D // 2
    a, b = i, i + D // 2                                           # pairs of dimensions, of which RoPE turns the first
    if R < D:
        a = tl.where(i < R // 2, i, i + R // 2)
        b = tl.where(i < R // 2, i + R // 2, i + D // 2)
    is_query, is_value = head < H, head >= H + KV
    cos = tl.load(cos_ptr + m * R + i, mask=i < R // 2, other=1.0)
    sin = tl.load(sin_ptr + m * R + i, mask=i < R // 2, other=0.0)
    slot = tl.load(pos_ptr + m)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    source = qkv_ptr + m * row + head * D
    first = tl.load(source + a, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + b, mask=mask, other=0.0).to(tl.float32)
    if not is_value:
        if q_norm_ptr is not None:
            scale = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / D + eps)
            of_q, of_k = mask & is_query, mask & (head >= H)
            first *= scale * (tl.load(q_norm_ptr + a, mask=of_q, other=0.0).to(tl.float32)
                              + tl.load(k_norm_ptr + a, mask=of_k, other=0.0).to(tl.float32) + offset)
            second *= scale * (tl.load(q_norm_ptr + b, mask=of_q, other=0.0).to(tl.float32)
                               + tl.load(k_norm_ptr + b, mask=of_k, other=0.0).to(tl.float32) + offset)
        first, second = first * cos - second * sin, second * cos + first * sin
    if is_query:
        if logn_ptr is not None:
            scale = tl.load(logn_ptr + m)
            first *= scale
            second *= scale
        to = q_ptr + (m * H + head) * D
        tl.store(to + a, first, mask=mask)
        tl.store(to + b, second, mask=mask)
    else:
        line = ((m // S).to(tl.int64) * KV + (head - H) % KV) * T + slot
        if k_scales_ptr is not None:
            high = tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(second)))
            tl.store(k_scales_ptr + line, high / 127, mask=head < H + KV)
            tl.store(v_scales_ptr + line, high / 127, mask=is_value)
            inverse = tl.where(high > 1e-30, 127 / high, 0.0)
            first, second = tl.floor(first * inverse + 0.5), tl.floor(second * inverse + 0.5)
        tl.store(k_ptr + line * D + a, first, mask=mask & (head < H + KV))
        tl.store(k_ptr + line * D + b, second, mask=mask & (head < H + KV))
        tl.store(v_ptr + line * D + a, first, mask=mask & is_value)
        tl.store(v_ptr + line * D + b, second, mask=mask & is_value)
    if ready_ptr is not None:
        if m % S == 0 and head < KV:
            tl.store(ready_ptr + m // S * KV + head, 0)


@triton.jit
def add_up_shares(partial_ptr, active, query, d, QUERIES: tl.constexpr, WIDTH: tl.constexpr):
    """The sums of all active shares, each scaled to the highest score of all: fp32 [QUERIES, WIDTH], [QUERIES]."""
    most = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    for share in range(active):                                    # not from the L1 cache: other blocks wrote them
        its = partial_ptr + share * QUERIES * (WIDTH + 2)
        its_most = tl.load(its + QUERIES * WIDTH + query, cache_modifier=".cg")
        its_total = tl.load(its + QUERIES * (WIDTH + 1) + query, cache_modifier=".cg")
        its_acc = tl.load(its + query[:, None] * WIDTH + d[None, :], cache_modifier=".cg")
        new = tl.maximum(most, its_most)
        fade, its_fade = tl.exp2(most - new), tl.exp2(its_most - new)
        total = total * fade + its_total * its_fade
        acc = acc * fade[:, None] + its_acc * its_fade[:, None]
        most = new
    return acc, total


@triton.jit
def store_heads(to, y, gates, inside):
    """Times the sigmoid of the gates, if there are any."""
    if gates is not None:
        y *= tl.sigmoid(tl.load(gates, mask=inside, other=0.0).to(tl.float32))
    tl.store(to, y, mask=inside)


@triton.jit
def attend_kernel(q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, pos_ptr, gates_ptr, y_ptr, partial_ptr, ready_ptr,
                  scale, row, S, T, H, KV, D, window, splits, fewest, PER_HEAD: tl.constexpr, TOKENS: tl.constexpr,
                  QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
                  PLANES: tl.constexpr, PDL: tl.constexpr):
    """TOKENS tokens of one row and the PER_HEAD query heads of one KV head, QUERIES in all, over a share of the cache.

    The shares' results go to partial [B * KV, splits, (WIDTH + 2) * QUERIES]; whichever thread block is ready last adds
    them up, in order."""
    if PDL:
        gdc_launch_dependents()
        if not SPLIT:
            gdc_wait()
    program, split = tl.program_id(0), tl.program_id(2)
    b, kv = (program // KV).to(tl.int64), program % KV
    query, d = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    token = tl.program_id(1) * TOKENS + query // PER_HEAD
    real = (query < TOKENS * PER_HEAD) & (token < S)
    pos = tl.load(pos_ptr + b * S + token, mask=real, other=-1).to(tl.int32)
    at = ((b * S + token) * H + kv * PER_HEAD + query % PER_HEAD)[:, None] * D + d[None, :]
    inside = real[:, None] & (d < D)[None, :]
    column = (kv * PER_HEAD + query % PER_HEAD)[:, None] * D + d[None, :]
    out = y_ptr + (b * S + token)[:, None] * H * D + column % PLANES * (H * D // PLANES) + column // PLANES
    gates = None if gates_ptr is None else gates_ptr + (b * S + token)[:, None] * row + column
    begin, end = 0, tl.max(pos, axis=0) + 1
    if window > 0:
        begin = tl.maximum(tl.min(tl.where(real, pos, 2147483647), axis=0) - window + 1, 0) // KEYS * KEYS
    share = tl.maximum(tl.cdiv(tl.cdiv(end - begin, splits), KEYS) * KEYS, fewest)
    active = tl.cdiv(end - begin, share)
    if PDL:
        gdc_wait()                                                 # a step's positions were there before its kernels
    if split < active:
        q = tl.load(q_ptr + at, mask=inside, other=0.0)
        first = begin + split * share
        last = tl.minimum(first + share, end)
        most = tl.full([QUERIES], -1e30, tl.float32)               # finite, where a query sees nothing of its share
        total = tl.zeros([QUERIES], tl.float32)
        acc = tl.zeros([QUERIES, WIDTH], tl.float32)
        base = (b * KV + kv) * T * D
        for start in range(first, last, KEYS):
            slot = start + tl.arange(0, KEYS)
            k = tl.load(k_ptr + base + slot[None, :] * D + d[:, None], mask=(slot < last)[None, :] & (d < D)[:, None],
                        other=0.0)
            v = tl.load(v_ptr + base + slot[:, None] * D + d[None, :], mask=(slot < last)[:, None] & (d < D)[None, :],
                        other=0.0)
            if k_scales_ptr is not None:
                at_slot = (b * KV + kv) * T + slot
                k_scales = tl.load(k_scales_ptr + at_slot, mask=slot < last, other=0.0)
                v_scales = tl.load(v_scales_ptr + at_slot, mask=slot < last, other=0.0)
                k, v = (k * k_scales[None, :]).to(q.dtype), (v * v_scales[:, None]).to(q.dtype)
            seen = (slot[None, :] <= pos[:, None]) & (slot < last)[None, :]
            if window > 0:
                seen = seen & (slot[None, :] > pos[:, None] - window)
            score = tl.where(seen, tl.dot(q, k, input_precision="ieee") * scale, -float("inf"))
            new = tl.maximum(most, tl.max(score, axis=1))
            p, fade = tl.exp2(score - new[:, None]), tl.exp2(most - new)
            total = total * fade + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            most = new
        if not SPLIT:
            store_heads(out, acc / total[:, None], gates, inside)
        elif active == 1:
            store_heads(out, acc / total[:, None], gates, inside)
        else:
            SIZE: tl.constexpr = QUERIES * (WIDTH + 2)
            to = partial_ptr + (program * splits + split) * SIZE
            tl.store(to + query[:, None] * WIDTH + d[None, :], acc)
            tl.store(to + QUERIES * WIDTH + query, most)
            tl.store(to + QUERIES * (WIDTH + 1) + query, total)
            tl.debug_barrier()
            if tl.atomic_add(ready_ptr + program, 1, sem="acq_rel") == active - 1:
                acc, total = add_up_shares(partial_ptr + program * splits * SIZE, active, query, d, QUERIES, WIDTH)
                store_heads(out, acc / total[:, None], gates, inside)


def prepare(qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, logn: Tensor | None,
            input_pos: Tensor, k_cache: Tensor, v_cache: Tensor, n_head: int, eps: float,
            ready: Tensor | None = None, scales: Sequence[Tensor] = (), offset: float = 0.0) -> Tensor:
    """Queries [B, S, H, D] of qkv [M, (H + 2 K) * D or more], normed and rotated; writes keys and values to the caches.

    cos, sin: fp32 [B, S, 1, R]. ready: int32 [B * K], which becomes 0 for attend. scales: of caches in int8, as in
    kernels.attend. offset: of the norms' weights."""
    (B, S), (_, KV, T, D) = input_pos.shape, k_cache.shape
    q = torch.empty(B, S, n_head, D, dtype=qkv.dtype, device=qkv.device)
    launch(prepare_kernel, (B * S, n_head + 2 * KV), qkv, q_norm, k_norm, cos, sin, logn, input_pos, q, k_cache,
           v_cache, *(scales or (None, None)), ready, eps, offset, qkv.size(1), S, T, n_head, KV, D=D, R=cos.size(-1),
           HALF=next_power_of_2(D // 2), num_warps=1)
    return q


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int = 0,
           ready: Tensor | None = None, planes: int = 1, scales: Sequence[Tensor] = (),
           gates: Tensor | None = None) -> Tensor:
    """As kernels.attend, input_pos [B, S]. ready: int32 [B * K] of zeros, without which no head's cache is split.
    planes: the order of the result, see in_planes. gates: [M, H * D], rows at any distance, whose sigmoid the result is
    multiplied by."""
    (B, S, H, D), (_, KV, T, _) = q.shape, k_cache.shape
    per_head = H // KV
    most, keys, stages = 64, 64, 2                                 # less, where shared memory or registers are short
    if not has_tensor_cores(q.device):
        most, keys, stages = 16, 16, 1
    elif q.dtype == torch.float32:
        most, keys = 64 if D <= 128 else 32, 16
    elif D > 128 or scales:
        keys = 32
    tokens = S if S * per_head <= most else max(1, most // per_head)
    queries = max(16, next_power_of_2(tokens * per_head))
    blocks, width = cdiv(S, tokens), next_power_of_2(D)
    splits = 1
    if ready is not None and blocks == 1:
        splits = max(1, min(2 * multiprocessors(q.device) // (B * KV), cdiv(T, FEWEST_KEYS)))
    y = torch.empty(B, S, H * D, dtype=q.dtype, device=q.device)
    partial = torch.empty(B * KV * splits, queries * (width + 2), dtype=torch.float32, device=q.device)
    row = 0 if gates is None else gates.stride(0)
    launch(attend_kernel, (B * KV, blocks, splits), q, k_cache, v_cache, *(scales or (None, None)), input_pos, gates, y,
           partial, ready, D ** -0.5 / math.log(2), row, S, T, H, KV, D, window, splits, FEWEST_KEYS, PER_HEAD=per_head,
           TOKENS=tokens, QUERIES=queries, KEYS=keys, WIDTH=width, SPLIT=splits > 1, PLANES=planes, num_warps=4,
           num_stages=stages)
    return y


# ---- launches

def cdiv(n: int, size: int) -> int:
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on_nvidia(device: torch.device) -> bool:
    """Whether the device has a byte permutation; elsewhere the compiler finds its own."""
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton has a matrix product for them that keeps large tiles in registers: NVIDIA's from sm_80 on, and
    AMD's MI series."""
    if device.type == "cuda" and torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9")
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch."""
    return on_nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **options: Any) -> None:
    early = launches_early(x.device)
    kernel[grid](x, *args, PDL=early, **options, **(dict(launch_pdl=True) if early else {}))
