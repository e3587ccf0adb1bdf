"""Fast CPU kernels (kernels.cpp, built on first use) and their plain PyTorch twins.

Shapes: B batch, S sequence, T cache length, H query heads, K KV heads, D head dim, N and K_in the rows and columns of a weight.
run_stack computes all layers of a model at once; its twin is the loop over model.TransformerBlock. The others are one operation each.
For up to 16 tokens reading the weights is what takes the time, and the kernels do it at the memory's speed; matrices for more tokens are PyTorch's.
QWEN_FAST_KERNELS=off in the environment leaves the C++ out.
"""
import contextlib
import ctypes
import functools
import hashlib
import itertools
import mmap
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TOKENS, MAX_HEAD = 16, 512    # of the C++ ops
SOURCE = Path(__file__).with_name("kernels.cpp")
HUGE_PAGE = 2 << 20


# ---- building and loading

def cpu_flags() -> str:
    """What distinguishes this CPU's instruction set: a library built for another one must not be loaded."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).split(":", 1)[1]
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself."""
    flags = cpu_flags().split()
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags


@functools.cache
def unavailable_reason() -> str | None:
    """Loads the C++ ops, building them if need be. Returns why the PyTorch path must be taken instead, in one line, or None."""
    if os.environ.get("QWEN_FAST_KERNELS", "").lower() in ("off", "0"):
        return "QWEN_FAST_KERNELS=off"
    try:
        torch.ops.load_library(built_library())
        register_fakes()
        return None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"kernels.cpp is not used ({reason}); PyTorch's own operators run instead, more slowly", file=sys.stderr)
        return reason


@torch.compiler.assume_constant_result
def available() -> bool:
    return unavailable_reason() is None


def built_library() -> Path:
    """The shared library for this source, PyTorch and CPU, built if it is not in the cache. Errors: OSError, RuntimeError."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    torch_dir = Path(torch.__file__).parent
    compile_flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-std=c++20", "-Wno-psabi",
                     f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    # The libgomp that PyTorch brought along: with a second one, two pools of threads would fight for the cores.
    gomp = sorted((torch_dir / "lib").glob("libgomp*.so*"))[:1]
    link_flags = ["-shared", f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10", *(map(str, gomp) if gomp else ["-fopenmp"])]
    key = "\0".join([SOURCE.read_text(), *compile_flags, torch.__version__, str(torch_dir), cpu_flags()])
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "qwen_fast")
    library = folder / f"kernels_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    if compiler is None:
        raise RuntimeError("no C++ compiler was found")
    print(f"building {SOURCE.name} for this CPU (once, about half a minute)", file=sys.stderr)
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{library}.{os.getpid()}.{threading.get_ident()}.tmp")       # two may build at once: the last rename wins, both are whole
    try:
        include = [f"-isystem{torch_dir / 'include'}", f"-isystem{torch_dir / 'include/torch/csrc/api/include'}"]
        subprocess.run([compiler, *compile_flags, *include, "-c", str(SOURCE), "-o", f"{partial}.o"], check=True, capture_output=True, text=True)
        subprocess.run([compiler, f"{partial}.o", "-o", str(partial), *link_flags], check=True, capture_output=True, text=True)
        os.replace(partial, library)
    except subprocess.CalledProcessError as error:
        errors = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"{compiler} failed: {errors[0]}") from error
    finally:
        for path in (partial, Path(f"{partial}.o")):
            path.unlink(missing_ok=True)
    print(f"built in {time.perf_counter() - start:.0f} seconds: {library}", file=sys.stderr)
    return library


def register_fakes() -> None:
    @torch.library.register_fake("qwen_fast::linear")
    def _(x: Tensor, parts: list[Tensor], out_features: int, exact: bool) -> Tensor:
        return x.new_empty(*x.shape[:-1], out_features)

    @torch.library.register_fake("qwen_fast::attend")
    def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int) -> Tensor:
        return q.new_empty(*q.shape[:2], q.size(2) * q.size(3))

    @torch.library.register_fake("qwen_fast::layers")
    def _(x: Tensor, *others: Any) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)


def describe(device: torch.device | str = "cpu") -> str:
    """Which path runs on the device, in one line for the user."""
    if torch.device(device).type != "cpu":
        return "PyTorch kernels"
    why_not = unavailable_reason()
    if why_not:
        return f"PyTorch kernels ({why_not})"
    flags = cpu_flags().split()
    kinds = [("avx512_bf16", "AVX512-BF16"), ("avx512f", "AVX512"), ("avx2", "AVX2"), ("asimd", "NEON")]
    return f"{next((name for flag, name in kinds if flag in flags), 'portable')} kernels, {torch.get_num_threads()} threads"


# ---- memory in large pages

class Arena:
    """Memory in pages of 2 MB instead of 4 KB where the system allows, handed out piece by piece and freed when the last piece of a chunk is.

    A core that streams weights through 4 KB pages waits for address translation: under virtualization half of the bandwidth is lost to it.
    """
    CHUNK = 64 << 20

    def __init__(self) -> None:
        self.memory, self.used = None, 0

    def take(self, size: int) -> Tensor:
        """uint8 [size] of zeros with a storage of its own, not taken up before it is written to."""
        if self.memory is None or self.used + size > len(self.memory):
            rest = len(self.memory) - self.used if self.memory is not None else 0
            room = max(self.CHUNK, size + HUGE_PAGE)
            memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
            with contextlib.suppress(OSError):         # a kernel without huge pages: slower, no more
                memory.madvise(mmap.MADV_HUGEPAGE, start, (room - start) // HUGE_PAGE * HUGE_PAGE)
            if room - start - size < rest:             # the old chunk has more left to give
                return torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=size)
            self.memory, self.used = memory, start
        piece = torch.frombuffer(self.memory, dtype=torch.uint8, offset=self.used, count=size)
        self.used += -(-size // 64) * 64
        return piece


arena = Arena()


def huge_zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """torch.zeros, on the CPU in large pages."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if torch.device(device).type != "cpu" or not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    return arena.take(size).view(dtype).view(shape)


def copy_to(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A copy of a weight where it will be used: on the CPU in large pages of anonymous memory, away from the file it was mapped from.

    Vectors go elsewhere: they outlive matrices that are packed later, and would keep whole chunks of large pages from being freed."""
    if torch.device(device).type != "cpu" or tensor.dim() < 2:
        return tensor.to(device, dtype, copy=True)
    return huge_zeros(tensor.shape, dtype).copy_(tensor)


def trim_memory() -> None:
    """To the system: what packing has used for a while, glibc would keep for later."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


# ---- linear

def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K_in], weight [N, K_in] -> [..., N], summed in fp32."""
    if (x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and 0 < x.numel() <= MAX_TOKENS * x.size(-1)
            and weight.dtype == x.dtype and weight.is_contiguous() and available()):
        return torch.ops.qwen_fast.linear(x, [weight], weight.size(0), True)
    return linear_reference(x, weight)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


# ---- linear with int8 weights: w = scale * q, one scale per row

def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, quantize_activations: bool = True) -> Tensor:
    """x [..., K_in], weight int8 [N, K_in], scale fp32 [N] -> [..., N].

    Unless exact, up to 16 tokens of activations may be rounded to int16, in groups of 256 with a scale each (on CPUs with VNNI).
    """
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous() and available():
        return torch.ops.qwen_fast.linear(x, [weight, scale], weight.size(0), not quantize_activations)
    return int8_linear_reference(x, weight, scale)


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)


def quantize_activations_reference(x: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """What the kernels make of activations x [..., K_in] (int16, 256 to a group, beside int8 weights; int8, 32 to a group, beside int4), in fp32."""
    most = 127 if dtype == torch.int8 else 127 * 257               # the kernels take the latter apart into two bytes, each up to 127
    padded = F.pad(x.float(), (0, -x.size(-1) % group)).unflatten(-1, (-1, group))
    high = padded.abs().amax(-1, keepdim=True)
    rounded = torch.where(high > 1e-30, (padded * (most / high)).round() * (high / most), 0.0)
    return rounded.flatten(-2)[..., :x.size(-1)]


# ---- linear with int4 weights: w = scale * (q - zero / 16), scale and zero per row and group of G along K_in
#
# As stored: weight uint8 [N, K_in / 2], byte i holds q of column 2 i in its lower half and of column 2 i + 1 in its upper half;
# scales [N, K_in / G], zeros uint8 [N, K_in / G].
# Packed for the CPU: blocks of 16 rows, [N / 16, K_in / 32, 4, 16, 4] (kernels.cpp says what goes where), scales bf16 and zeros
# [N / 16, K_in / G, 16]. K_in is padded to whole groups and N to whole blocks.

def pack_nibbles(q: Tensor) -> Tensor:
    q = F.pad(q, (0, q.size(1) % 2))
    return q[:, ::2] | q[:, 1::2] << 4


def unpack_nibbles(weight: Tensor, in_features: int | None = None) -> Tensor:
    """uint8 [N, K_in / 2] -> the values 0 .. 15, uint8 [N, K_in]."""
    return torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1)[:, :in_features]


def pack_int4(weight: Tensor, scales: Tensor, zeros: Tensor, groupsize: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stored form to the CPU's packed form. groupsize: a multiple of 32."""
    N, groups = scales.shape
    q = F.pad(unpack_nibbles(weight), (0, groups * groupsize - 2 * weight.size(1), 0, -N % 16))
    q = q.view(-1, 16, groups * groupsize // 32, 4, 2, 4)                  # block, row, unit, register, half, byte
    lower, upper = q.permute(4, 0, 2, 3, 1, 5)                             # block, unit, register, row, byte

    def in_blocks(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, -N % 16)).view(-1, 16, groups).transpose(1, 2)
    packed = torch.bitwise_or(lower, upper << 4, out=huge_zeros(lower.shape, torch.uint8))
    return packed, copy_to(in_blocks(scales), "cpu", torch.bfloat16), copy_to(in_blocks(zeros), "cpu", torch.uint8)


def dequantize_packed_int4(packed: Tensor, scales: Tensor, zeros: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weights [N, K_in] that the packed form stands for."""
    q = torch.stack((packed & 15, packed >> 4), dim=3)                     # block, unit, register, half, row, byte
    q = q.permute(0, 4, 1, 2, 3, 5).reshape(len(packed), 16, scales.size(1), -1).to(dtype)
    w = (q - zeros.to(dtype).transpose(1, 2)[..., None] / 16) * scales.to(dtype).transpose(1, 2)[..., None]
    return w.flatten(2).flatten(0, 1)[:out_features, :in_features]


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, out_features: int, quantize_activations: bool = True) -> Tensor:
    """x [..., K_in] and weights as pack_int4 gave them -> [..., N].

    Unless exact, up to 16 tokens of activations may be rounded to int8, in groups of 32 with a scale each (on CPUs with VNNI).
    """
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and available():
        return torch.ops.qwen_fast.linear(x, [packed, scales, zeros], out_features, not quantize_activations)
    return int4_linear_reference(x, packed, scales, zeros, out_features)


def int4_linear_reference(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, out_features: int) -> Tensor:
    return F.linear(x, dequantize_packed_int4(packed, scales, zeros, out_features, x.size(-1), x.dtype))


# ---- all layers as one operator

class LayerTensors(NamedTuple):
    attention_norm: Tensor
    wqkv: list[Tensor]
    q_norm: Tensor | None
    k_norm: Tensor | None
    wo: list[Tensor]
    ffn_norm: Tensor
    w13: list[Tensor]
    w2: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    window: int


class FusedLayers(NamedTuple):
    handle: Tensor
    dtype: torch.dtype


def fuse(layers, n_head: int, intermediate_size: int, eps: float, quantize_activations: bool) -> FusedLayers | None:
    k_cache = layers[0].k_cache
    if not (k_cache.device.type == "cpu" and k_cache.dtype == layers[0].ffn_norm.dtype in (torch.bfloat16, torch.float32) and available()
            and k_cache.size(3) % 16 == 0 and k_cache.size(3) <= MAX_HEAD):
        return None
    weights, table = [], []
    for l in layers:
        parts = ([l.attention_norm], l.wqkv, [t for t in (l.q_norm, l.k_norm) if t is not None], l.wo, [l.ffn_norm], l.w13, l.w2)
        weights += itertools.chain(*parts)
        table += [*map(len, parts), l.window]
    handle = torch.ops.qwen_fast.stack(weights, table, eps, [l.k_cache for l in layers], [l.v_cache for l in layers], n_head,
                                       intermediate_size, not quantize_activations)
    return FusedLayers(handle, k_cache.dtype)


def accepts(fused: FusedLayers, x: Tensor) -> bool:
    return x.dtype == fused.dtype and x.numel() > 0


def run_fused(fused: FusedLayers, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None, input_pos: Tensor) -> Tensor:
    return torch.ops.qwen_fast.layers(x, fused.handle, cos, sin, logn, input_pos)


# ---- attention over the KV cache

def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int = 0) -> Tensor:
    """Causal attention of q [B, S, H, D] at input_pos ([S] or [B, S]) over caches [B, K, T, D] -> [B, S, H * D].

    A query at position p sees slots <= p, and with a window > 0 only those > p - window. On a CPU the cost follows the position, not T.
    """
    if q.device.type != "cpu":
        return attend_reference(q, k_cache, v_cache, input_pos, window)
    if (q.dtype in (torch.bfloat16, torch.float32) and k_cache.dtype == q.dtype and q.size(3) % 16 == 0 and q.size(3) <= MAX_HEAD
            and k_cache.is_contiguous() and v_cache.is_contiguous() and available()):
        return torch.ops.qwen_fast.attend(q, k_cache, v_cache, input_pos, window)
    return attend_sliced(q, k_cache, v_cache, input_pos, window)


def visible(input_pos: Tensor, slots: int, window: int) -> Tensor:
    """Which cache slots each query sees: bool [S, slots] or [B, 1, S, slots]."""
    slot = torch.arange(slots, device=input_pos.device)
    mask = slot <= input_pos[..., None]
    if window > 0:
        mask = mask & (slot > input_pos[..., None] - window)
    return mask[:, None] if mask.dim() == 3 else mask


def attend_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int = 0) -> Tensor:
    """The same over the whole cache under a mask: no size depends on the positions' values."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k_cache.to(q.dtype), v_cache.to(q.dtype),
                                       attn_mask=visible(input_pos, k_cache.size(2), window), enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


@torch.library.custom_op("qwen_fast::attend_sliced", mutates_args=())
def attend_sliced(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """The same over the cache up to the last position. Opaque to the compiler, because the slice depends on the positions' values."""
    S, end = q.size(1), int(input_pos.max()) + 1
    k, v = k_cache[:, :, :end].to(q.dtype), v_cache[:, :, :end].to(q.dtype)
    from_start = end == S and (window <= 0 or window >= end) and bool((input_pos == torch.arange(S)).all())
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=from_start,
                                       attn_mask=None if from_start else visible(input_pos, end, window), enable_gqa=True)
    return y.transpose(1, 2).flatten(2).contiguous()


@attend_sliced.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int) -> Tensor:
    return q.new_empty(*q.shape[:2], q.size(2) * q.size(3))
