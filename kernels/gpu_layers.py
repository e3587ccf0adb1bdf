"""All layers of a model as one operator on a GPU: which tiles its kernels use, and the operators of a compiled step.

The kernels and their twins are in gpu.py."""
import functools
import itertools
import json
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime.errors import OutOfResources  # pyright: ignore[reportMissingImports]

from . import gpu
from .gpu import LIBRARY, MAX_TOKENS, Tile, Weights, attend, fits, prepare  # noqa: F401

MAX_HEAD = 256                       # dimensions: more would not fit into a thread block's registers


@functools.cache
def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    version = torch.version.hip or torch.version.cuda
    return f"{torch.cuda.get_device_name(device)}, {version}, triton {triton.__version__}"


# ---- tiles

# The fastest of many on an H200, each somewhere: for one token, and for several.
ONE_TOKEN = {16: [(4, 512, 1, 2), (2, 512, 1, 2), (2, 1024, 2, 2), (4, 1024, 4, 1), (4, 2048, 8, 1), (8, 2048, 8, 1)],
             8: [(4, 1024, 1, 1), (2, 512, 1, 2), (4, 512, 1, 2), (8, 1024, 2, 1), (4, 2048, 4, 1)],
             4: [(4, 1024, 1, 1), (2, 1024, 1, 2), (4, 2048, 2, 1), (4, 4096, 4, 1), (8, 4096, 4, 1)],
             32: [(4, 512, 2, 1)]}
FEW_TOKENS = {16: [(16, 256, 2, 4), (32, 128, 1, 4), (64, 128, 4, 4), (64, 64, 4, 6), (16, 512, 2, 3)],
              8: [(16, 256, 2, 3), (32, 128, 2, 4), (64, 128, 4, 4), (16, 512, 4, 3)],
              4: [(16, 256, 2, 3), (32, 256, 2, 3), (64, 128, 4, 4), (16, 512, 4, 3)],
              32: [(16, 64, 2, 3)]}
MOST_TIMED = 40                      # weights of a kind: together far larger than the cache
tiles: dict[str, dict[str, Tile]] = {}     # by device, what tune found


def candidates(w: Weights, M: int) -> list[Tile]:
    """Tiles no wider than the weight needs; the first is the one to take unmeasured."""
    if M > 1 and not gpu.has_tensor_cores(w.weight.device):
        return [LIBRARY]
    of = [Tile(*tile) for tile in (ONE_TOKEN if M == 1 else FEW_TOKENS)[w.bits]]
    return [tile for tile in of if tile.columns < 2 * w.in_features and tile.columns >= w.groupsize] or of[:1]


def kind_of(w: Weights, M: int, gated: bool, normed: bool) -> str:
    """What the speed of a linear depends on."""
    return (f"{'one token' if M == 1 else 'few tokens'}, {w.weight.size(0)} x {w.in_features}, {w.bits} bits, "
            f"groups of {w.groupsize}, {'gated' if gated else 'plain'}, {'normed' if normed else 'bare'}")


def tile_for(w: Weights, M: int, gated: bool, normed: bool, device: torch.device) -> Tile:
    """What tune found, or the first candidate."""
    known = tiles.get(device_name(device), {})
    return known.get(kind_of(w, M, gated, normed)) or candidates(w, M)[0]


def tune(layers: "Layers", M: int) -> None:
    """Times every candidate for the layers' linears with M tokens, on these very weights, and PyTorch's operators;
    keeps the fastest, in a file too, beside what it saw. Takes seconds, once for each shape, format and device."""
    device = layers.layers[0].k_cache.device
    file = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "qwen_fast") / "gpu_tiles.json"
    found = read_tiles(file)
    known = tiles.setdefault(device_name(device), {})
    known |= {kind: Tile(*entry["tile"]) for kind, entry in found.get(device_name(device), {}).items()}
    groups: dict[str, list[Callable[[Tile], object]]] = {}
    offered: dict[str, list[Tile]] = {}
    for (normed, gated), weights in layers.linears().items():
        for w in weights:
            kind = kind_of(w, M, gated, normed)
            if kind not in known:
                groups.setdefault(kind, []).append(layers.call(w, M, normed, gated))
                offered[kind] = [*candidates(w, M), LIBRARY]
    if not groups:
        return
    start = time.perf_counter()
    print(f"timing the GPU kernels for this model's shapes with {M} tokens (once) ...", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as pool:      # which compile
        jobs = [(kind, tile, pool.submit(calls[0], tile)) for kind, calls in groups.items()
                for tile in offered[kind][:-1]]
        for kind, tile, job in jobs:
            if isinstance(job.exception(), OutOfResources):        # of a smaller GPU
                offered[kind].remove(tile)
            else:
                job.result()
    for kind, calls in groups.items():
        us = {tile: 1e3 * milliseconds([functools.partial(call, tile) for call in calls[:MOST_TIMED]])
              for tile in offered[kind]}
        known[kind] = min(us, key=us.__getitem__)
        found.setdefault(device_name(device), {})[kind] = dict(
            tile=known[kind], us={"x".join(map(str, tile)): round(time, 2) for tile, time in us.items()})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        partial.write_text(json.dumps(found, indent=1))
        partial.replace(file)
        print(f"timed in {time.perf_counter() - start:.0f} seconds: {file}", file=sys.stderr)
    except OSError as error:
        print(f"{file}: {error.strerror}: they will be timed again", file=sys.stderr)


def read_tiles(file: Path) -> dict[str, dict[str, Any]]:
    """What tune wrote; nothing, if it is not there or not as it was written."""
    try:
        found = json.loads(file.read_text())
        for entry in (entry for kinds in found.values() for entry in kinds.values()):
            if not all(isinstance(n, int) and 0 <= n <= 1 << 16 for n in Tile(*entry["tile"])):
                return {}
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def milliseconds(calls: list[Callable[[], object]]) -> float:
    """For one of them: the median of a few replays of all, recorded as a CUDA graph."""
    calls[0]()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / len(calls)


# ---- whole layers

class Experts(NamedTuple):
    """What a mixture of experts has besides w13 and w2, which hold all of them."""
    router: Weights
    n_chosen: int
    normalize: bool
    shared_gate: Weights | None = None
    shared_w13: Weights | None = None
    shared_w2: Weights | None = None


class Layer(NamedTuple):
    """LayerTensors as the kernels take them."""
    attention_norm: Tensor
    wqkv: Weights
    q_norm: Tensor | None
    k_norm: Tensor | None
    wo: Weights
    ffn_norm: Tensor
    w13: Weights
    w2: Weights
    experts: Experts | None
    k_cache: Tensor
    v_cache: Tensor
    window: int
    scales: list[Tensor]             # of caches in int8


keys: dict[tuple, int] = {}          # a number for each set of tensors, because comparing hundreds takes long


class Layers:
    """All layers of a model, and what run needs besides."""

    def __init__(self, layers: list[Layer], n_head: int, eps: float):
        self.layers, self.n_head, self.eps = layers, n_head, eps
        fields = {w.fields for weights in self.linears().values() for w in weights}
        fields |= {layer.w13.fields for layer in layers}
        self.planes = fields.pop() if len(fields) == 1 else 1     # the order of activations where there is one token
        self.norms = [[norm_in_planes(norm, self.planes) for norm in (layer.attention_norm, layer.ffn_norm)]
                      for layer in layers]

    @functools.cached_property
    def key(self) -> int:
        """What a recorded CUDA graph depends on: equal for equal tensors."""
        leaves = tree_leaves((self.layers, self.norms, self.n_head, self.eps))
        return keys.setdefault(tuple((leaf.data_ptr(), leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf
                                     for leaf in leaves), len(keys))

    def linears(self) -> dict[tuple[bool, bool], list[Weights]]:
        """Those of each kind: (normed, gated). Experts are not among them, nor what chooses them."""
        dense = [(layer.w13, layer.w2) for layer in self.layers if layer.experts is None]
        dense += [(layer.experts.shared_w13, layer.experts.shared_w2) for layer in self.layers
                  if layer.experts and layer.experts.shared_w13 and layer.experts.shared_w2]
        return {(True, False): [layer.wqkv for layer in self.layers],
                (False, False): [layer.wo for layer in self.layers] + [w2 for _, w2 in dense],
                (True, True): [w13 for w13, _ in dense]}

    def call(self, w: Weights, M: int, normed: bool, gated: bool) -> Callable[[Tile], object]:
        """One of the linears, as run calls it."""
        layer = self.layers[0]
        x = torch.randn(M, w.in_features, dtype=layer.attention_norm.dtype, device=layer.k_cache.device)
        norm, planes = layer.attention_norm if normed else None, self.planes if M == 1 else 1
        residual = None if normed else x.new_zeros(M, w.weight.size(0))
        return lambda tile: gpu.linear(x, w, norm, self.eps, residual, gated, tile, (planes, planes))

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None,
            input_pos: Tensor) -> Tensor:
        """x [B, S, C] through all layers, as kernels.run_fused."""
        (B, S, C), eps = x.shape, self.eps
        cos, sin, input_pos = (t.contiguous() for t in (cos, sin, input_pos.expand(B, S)))
        x, planes = x.reshape(B * S, C), self.planes if B * S == 1 else 1
        x = gpu.in_planes(x, planes)
        for layer, norms in zip(self.layers, self.norms, strict=True):
            attention_norm, ffn_norm = norms if planes > 1 else (layer.attention_norm, layer.ffn_norm)
            ready = torch.empty(B * layer.k_cache.size(1), dtype=torch.int32, device=x.device)
            qkv = linear(x, layer.wqkv, attention_norm, eps, planes=(planes, 1))
            q = prepare(qkv, layer.q_norm, layer.k_norm, cos, sin, logn, input_pos, layer.k_cache, layer.v_cache,
                        self.n_head, eps, ready, layer.scales)
            y = attend(q, layer.k_cache, layer.v_cache, input_pos, layer.window, ready, planes, layer.scales)
            x = linear(y.view(B * S, -1), layer.wo, residual=x, planes=(planes, planes))
            if layer.experts:
                x = self.run_experts(x, layer, layer.experts, ffn_norm, planes)
            else:
                hidden = linear(x, layer.w13, ffn_norm, eps, gated=True, planes=(planes, planes))
                x = linear(hidden, layer.w2, residual=x, planes=(planes, planes))
        return gpu.out_of_planes(x, planes).view(B, S, C)

    def run_experts(self, x: Tensor, layer: Layer, experts: Experts, ffn_norm: Tensor, planes: int) -> Tensor:
        """As model.MoE. ffn_norm: in the order of x; the router, which is not quantized, takes natural order."""
        natural, eps, y = gpu.out_of_planes(x, planes), self.eps, x
        logits = linear(natural, experts.router, layer.ffn_norm, eps)
        weights, chosen = logits.float().softmax(-1).topk(experts.n_chosen, dim=-1)
        if experts.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if experts.shared_gate and experts.shared_w13 and experts.shared_w2:
            gate = linear(natural, experts.shared_gate, layer.ffn_norm, eps).sigmoid()
            hidden = linear(x, experts.shared_w13, ffn_norm, eps, gated=True, planes=(planes, planes))
            y = x + gate * linear(hidden, experts.shared_w2, planes=(planes, planes))
        tiles = candidates(layer.w13, 1)[0], candidates(layer.w2, 1)[0]
        return gpu.experts(x, chosen, weights, layer.w13, layer.w2, ffn_norm, eps, y, tiles, planes)


@torch.inference_mode()
def norm_in_planes(norm: Any, planes: int) -> Tensor:
    """Kept with the norm's weight, at one address, and always copied anew: the weight may have changed."""
    if planes == 1:
        return norm
    if getattr(norm, "in_planes", None) is None:
        norm.in_planes = torch.empty_like(norm)
    return norm.in_planes.copy_(gpu.in_planes(norm[None], planes)[0])


def linear(x: Tensor, w: Weights, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None,
           gated: bool = False, planes: tuple[int, int] = (1, 1)) -> Tensor:
    """gpu.linear by the tile for it; products of more tokens are PyTorch's."""
    if len(x) > MAX_TOKENS:
        return many_tokens_linear(x, w, norm, eps, residual, gated)
    return gpu.linear(x, w, norm, eps, residual, gated, tile_for(w, len(x), gated, norm is not None, x.device), planes)


def many_tokens_linear(x: Tensor, w: Weights, norm: Tensor | None, eps: float, residual: Tensor | None,
                       gated: bool) -> Tensor:
    if norm is not None:
        x = gpu.rms_norm(x, norm, eps)
    weight = w.weight if w.scales is None else gpu.dequantize(w, x.dtype)
    if residual is not None and residual.dtype == x.dtype and w.bias is None:
        return torch.addmm(residual, x, weight.t())
    y = F.linear(x, weight, w.bias)
    if gated:
        gate, up = y.chunk(2, dim=1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


fused: weakref.WeakValueDictionary[int, Layers] = weakref.WeakValueDictionary()    # what handles stand for
numbers = itertools.count()


def fuse(layers: Sequence[Any], n_head: int, eps: float) -> Tensor | None:
    """A tensor that stands for kernels.LayerTensors in operators, and keeps them alive; None where run cannot compute
    them."""
    ours = []
    for layer in layers:
        attention, part = layer.attention, layer.feed_forward
        if getattr(attention, "output_gate", True):                # or a Gated DeltaNet
            return None
        linears = attention.wqkv, attention.wo, part.w13, part.w2
        k_cache, v_cache = attention.k_cache, attention.v_cache
        others = [tensors for tensors in (part.router, part.shared_gate, part.shared_w13, part.shared_w2) if tensors]
        same = layer.attention_norm.dtype == layer.ffn_norm.dtype
        cached = torch.int8 if attention.scales else layer.attention_norm.dtype
        same = same and k_cache.dtype == v_cache.dtype == cached
        if not same or not all(map(fits, (*linears, *others))) or k_cache.size(3) > MAX_HEAD:
            return None
        wqkv, wo, w13, w2 = map(Weights.of, linears)
        router, *shared = map(Weights.of, others) if others else (None,)
        experts = Experts(router, part.n_chosen, part.normalize, *shared) if router else None
        ours.append(Layer(layer.attention_norm, wqkv, attention.q_norm, attention.k_norm, wo, layer.ffn_norm, w13, w2,
                          experts, k_cache, v_cache, attention.window, attention.scales))
    handle: Any = torch.tensor([next(numbers)])
    fused[int(handle)] = handle.layers = Layers(ours, n_head, eps)
    return handle


@torch.library.custom_op("qwen_fast::run_layers", mutates_args=())
def run_layers(x: Tensor, handle: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None, input_pos: Tensor) -> Tensor:
    """Opaque to the compiler, for which hundreds of launches are seconds of work; a CUDA graph records them."""
    return fused[int(handle)].run(x, cos, sin, logn, input_pos)


@torch.library.custom_op("qwen_fast::few_tokens_linear", mutates_args=())
def few_tokens_linear(x: Tensor, tensors: list[Tensor]) -> Tensor:
    """x [..., K] through a linear by itself."""
    w = Weights.of(tensors)
    return linear(x.reshape(-1, x.size(-1)).contiguous(), w).view(*x.shape[:-1], w.weight.size(0))


@torch.library.custom_op("qwen_fast::attend_gpu", mutates_args=())
def attend_op(q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int,
              scales: list[Tensor]) -> Tensor:
    (B, S, _, _), KV = q.shape, k_cache.size(1)
    q, input_pos = q.contiguous(), input_pos.expand(B, S).contiguous()
    ready = torch.zeros(B * KV, dtype=torch.int32, device=q.device) if S <= MAX_TOKENS else None
    return attend(q, k_cache, v_cache, input_pos, window, ready, scales=scales)


@torch.library.custom_op("qwen_fast::dequantize", mutates_args=())
def dequantize_op(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return gpu.dequantize(Weights.of(tensors), dtype)


@run_layers.register_fake
def _(x: Tensor, *others) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@few_tokens_linear.register_fake
def _(x: Tensor, tensors: list[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:-1], tensors[0].size(0))


@attend_op.register_fake
def _(q: Tensor, *others) -> Tensor:
    return q.new_empty(*q.shape[:2], q.size(2) * q.size(3))


@dequantize_op.register_fake
def _(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    weight = tensors[0]
    return weight.new_empty(weight.size(0), weight.size(1) * (2 if weight.dtype == torch.uint8 else 1), dtype=dtype)
