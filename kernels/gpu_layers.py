"""All layers of a model as one operator on a GPU: which tiles its kernels use, and the operators of a compiled step.

The kernels and their twins are in gpu.py and gpu_deltanet.py."""
import functools
import itertools
import json
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
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
from .gpu import COMPILED, LIBRARY, MAX_TOKENS, Tile, Weights, attend, fits, prepare  # noqa: F401
from .gpu_deltanet import Gates, delta_net
from .gpu_deltanet import fits as fits_delta_net

MAX_HEAD = 256                       # dimensions: more would not fit into a thread block's registers


DRIVER_VERSIONS = "/proc/driver/nvidia/version", "/sys/module/amdgpu/version"     # where Linux has them


@functools.cache
def device_name(device: torch.device) -> str:
    """All that times depend on."""
    if device.type != "cuda":
        return str(device)
    drivers = [Path(file).read_text().split("\n")[0].strip() for file in DRIVER_VERSIONS if os.path.exists(file)]
    return ", ".join([torch.cuda.get_device_name(device), f"runtime {torch.version.hip or torch.version.cuda}",
                      *drivers, f"torch {torch.__version__}", f"triton {triton.__version__}"])


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


def alternatives(w: Weights, M: int) -> list[Tile]:
    """The same and what PyTorch offers: several tokens are its library's alone. Of quantized weights its compiler makes
    code that took up to nine times as long as the best tile, and compiling it most of the time that tune takes."""
    return [*candidates(w, M), *([COMPILED] if M == 1 and w.scales is None else []), LIBRARY]


def kind_of(w: Weights, M: int, gated: bool, normed: bool, experts: bool = False) -> str:
    """What the speed of a linear depends on."""
    return (f"{'one token' if M == 1 else 'few tokens'}, {'experts, ' if experts else ''}{w.weight.size(0)} x "
            f"{w.in_features}, {w.bits} bits, groups of {w.groupsize}, {'gated' if gated else 'plain'}, "
            f"{'normed' if normed else 'bare'}")


def tile_for(w: Weights, M: int, gated: bool, normed: bool, device: torch.device, experts: bool = False) -> Tile:
    """What tune found, or the first candidate."""
    known = tiles.get(device_name(device), {})
    return known.get(kind_of(w, M, gated, normed, experts)) or candidates(w, M)[0]


Timed = tuple[str, list[Tile], Callable[[Tile], object]]     # a kind, the tiles it may have, and a call by one of them


def tune(calls: Sequence[Timed], device: torch.device, M: int) -> None:
    """Finds the fastest tile of every kind with M tokens, on the model's very weights, and keeps it, in a file too,
    beside what it saw. Takes seconds, once for each shape, format, device and version."""
    file = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "qwen_fast") / "gpu_tiles.json"
    found, known = read_tiles(file), tiles.setdefault(device_name(device), {})
    stored = found.get(device_name(device), {})
    kinds: dict[str, tuple[list[Tile], list[Callable[[Tile], object]]]] = {}
    for kind, offered, call in calls:
        if kind not in known and kind in stored and Tile(*stored[kind]["tile"]) in offered:
            known[kind] = Tile(*stored[kind]["tile"])
        if kind not in known:
            kinds.setdefault(kind, (list(offered), []))[1].append(call)
    if not kinds:
        return
    start = time.perf_counter()
    print(f"timing the GPU kernels for this model's shapes with {M} tokens (once) ...", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as pool:      # which compile
        jobs = [(offered, tile, pool.submit(of_kind[0], tile)) for offered, of_kind in kinds.values()
                for tile in offered if tile.rows]
        for offered, tile, job in jobs:
            if isinstance(job.exception(), OutOfResources):        # of a smaller GPU
                offered.remove(tile)
            else:
                job.result()
    for kind, (offered, of_kind) in kinds.items():
        us = {}
        for tile in offered:
            try:
                us[tile] = 1e3 * milliseconds([functools.partial(call, tile) for call in of_kind[:MOST_TIMED]])
            except Exception:
                if tile != COMPILED:                               # for want of a C compiler, say
                    raise
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


def calls_of(linears: list[list[Tensor]], M: int, dtype: torch.dtype) -> Iterator[Timed]:
    """Of linears by themselves, as few_tokens_linear calls them."""
    for w in (Weights.of(tensors) for tensors in linears if fits(tensors)):
        if w.scales is None and w.weight.dtype != dtype:
            continue
        x = torch.randn(M, w.in_features, dtype=dtype, device=w.weight.device)
        yield (kind_of(w, M, gated=False, normed=False), alternatives(w, M),
               lambda tile, x=x, w=w: gpu.linear(x, w, tile=tile))


def read_tiles(file: Path) -> dict[str, dict[str, Any]]:
    """What tune wrote; nothing, if it is not there or not as it was written."""
    try:
        found = json.loads(file.read_text())
        for entry in (entry for kinds in found.values() for entry in kinds.values()):
            if not all(isinstance(n, int) and 0 <= n <= 1 << 16 for n in Tile(*entry["tile"])):
                return {}
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
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


class Heads(NamedTuple):
    """What an attention has besides wqkv and wo."""
    q_norm: Tensor | None
    k_norm: Tensor | None
    k_cache: Tensor
    v_cache: Tensor
    window: int
    output_gate: bool
    scales: list[Tensor]             # of caches in int8


class DeltaNet(NamedTuple):
    """What a Gated DeltaNet has."""
    wba: Tensor
    conv: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    state: list[Tensor]


class Layer(NamedTuple):
    """LayerTensors as the kernels take them."""
    attention_norm: Tensor
    wqkv: Weights
    heads: Heads | DeltaNet
    wo: Weights
    ffn_norm: Tensor
    w13: Weights
    w2: Weights
    experts: Experts | None


keys: dict[tuple, int] = {}          # a number for each set of tensors, because comparing hundreds takes long


class Layers:
    """All layers of a model, and what run needs besides."""

    def __init__(self, layers: list[Layer], n_head: int, eps: float, offset: float):
        self.layers, self.n_head, self.eps, self.offset = layers, n_head, eps, offset
        self.device = layers[0].attention_norm.device
        fields = {w.fields for weights in self.linears().values() for w in weights}
        fields |= {layer.w13.fields for layer in layers}
        self.planes = fields.pop() if len(fields) == 1 else 1     # the order of activations where there is one token
        self.reordered = [[in_planes(t, self.planes) for t in meets_hidden(layer)] for layer in layers]

    @functools.cached_property
    def key(self) -> int:
        """What a recorded CUDA graph depends on: equal for equal tensors."""
        leaves = tree_leaves((self.layers, self.reordered, self.n_head, self.eps, self.offset))
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

    def calls(self, M: int) -> Iterator[Timed]:
        """Of all linears and experts, as run calls them."""
        for (normed, gated), weights in self.linears().items():
            for w in weights:
                yield kind_of(w, M, gated, normed), alternatives(w, M), self.call(w, M, normed, gated)
        for layer in self.layers:
            if layer.experts:
                yield from self.calls_of_experts(layer, layer.experts, M)

    def calls_of_experts(self, layer: Layer, experts: Experts, M: int) -> Iterator[Timed]:
        """With other tiles for one of their two linears at a time."""
        C, planes = layer.ffn_norm.size(0), self.planes if M == 1 else 1
        x = torch.randn(M, C, dtype=layer.ffn_norm.dtype, device=self.device)
        chosen = torch.rand(M, layer.w2.weight.size(0) // C, device=x.device).topk(experts.n_chosen).indices
        inputs = x, chosen, torch.rand(chosen.shape, device=x.device), layer.w13, layer.w2, layer.ffn_norm, self.eps, x
        up, down = candidates(layer.w13, 1), candidates(layer.w2, 1)
        yield (kind_of(layer.w13, 1, gated=True, normed=True, experts=True), up,
               lambda tile: gpu.experts(*inputs, (tile, down[0]), planes))
        yield (kind_of(layer.w2, 1, gated=False, normed=False, experts=True), down,
               lambda tile: gpu.experts(*inputs, (up[0], tile), planes))

    def call(self, w: Weights, M: int, normed: bool, gated: bool) -> Callable[[Tile], object]:
        """One of the linears, as run calls it."""
        layer = self.layers[0]
        x = torch.randn(M, w.in_features, dtype=layer.attention_norm.dtype, device=self.device)
        norm, planes = layer.attention_norm if normed else None, self.planes if M == 1 else 1
        residual = None if normed else x.new_zeros(M, w.weight.size(0))
        return lambda tile: gpu.linear(x, w, norm, self.eps, residual, gated, tile, (planes, planes), self.offset)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None,
            input_pos: Tensor) -> Tensor:
        """x [B, S, C] through all layers, as kernels.run_fused."""
        (B, S, C), eps, offset = x.shape, self.eps, self.offset
        cos, sin, input_pos = (t.contiguous() for t in (cos, sin, input_pos.expand(B, S)))
        x, planes = x.reshape(B * S, C), self.planes if B * S == 1 else 1
        x = gpu.in_planes(x, planes)
        for layer, reordered in zip(self.layers, self.reordered, strict=True):
            attention_norm, ffn_norm, wba, router, gate = reordered if planes > 1 else meets_hidden(layer)
            qkv = linear(x, layer.wqkv, attention_norm, eps, planes=(planes, 1), offset=offset)
            if isinstance(layer.heads, DeltaNet):
                _, conv, A_log, dt_bias, norm, state = layer.heads
                y = delta_net(qkv, conv, input_pos, state,
                              Gates(x, attention_norm, wba, A_log, dt_bias, norm, eps, offset), planes)
            else:
                y = self.run_attention(qkv, cos, sin, logn, input_pos, layer.heads, planes)
            x = linear(y.view(B * S, -1), layer.wo, residual=x, planes=(planes, planes))
            if layer.experts:
                x = self.run_experts(x, layer, layer.experts, ffn_norm, router, gate, planes)
            else:
                hidden = linear(x, layer.w13, ffn_norm, eps, gated=True, planes=(planes, planes), offset=offset)
                x = linear(hidden, layer.w2, residual=x, planes=(planes, planes))
        return gpu.out_of_planes(x, planes).view(B, S, C)

    def run_attention(self, qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None, input_pos: Tensor, heads: Heads,
                      planes: int) -> Tensor:
        (B, KV, _, D), (_, _, k_cache, v_cache, window, _, scales) = heads.k_cache.shape, heads
        ready = torch.empty(B * KV, dtype=torch.int32, device=qkv.device)
        q = prepare(qkv, heads.q_norm, heads.k_norm, cos, sin, logn, input_pos, k_cache, v_cache, self.n_head, self.eps,
                    ready, scales, self.offset)
        gates = qkv[:, (self.n_head + 2 * KV) * D:] if heads.output_gate else None
        return attend(q, k_cache, v_cache, input_pos, window, ready, planes, scales, gates)

    def run_experts(self, x: Tensor, layer: Layer, experts: Experts, ffn_norm: Tensor, router: Tensor,
                    gate: Tensor | None, planes: int) -> Tensor:
        """As model.MoE. router, gate: of the shared expert, in the order of x."""
        shared, eps, offset = None, self.eps, self.offset
        logits = linear(x, experts.router._replace(weight=router), ffn_norm, eps, offset=offset)
        chosen, weights, share = gpu.choose(logits, experts.n_chosen, experts.normalize, x, ffn_norm, eps, offset, gate)
        if experts.shared_w13 and experts.shared_w2:
            hidden = linear(x, experts.shared_w13, ffn_norm, eps, gated=True, planes=(planes, planes), offset=offset)
            shared = linear(hidden, experts.shared_w2, planes=(planes, planes))
        tiles = (tile_for(layer.w13, 1, gated=True, normed=True, device=x.device, experts=True),
                 tile_for(layer.w2, 1, gated=False, normed=False, device=x.device, experts=True))
        return gpu.experts(x, chosen, weights, layer.w13, layer.w2, ffn_norm, eps, x, tiles, planes, offset, shared,
                           share)


def meets_hidden(layer: Layer) -> list[Any]:
    """What hidden states are multiplied by, besides quantized weights: norms, wba, the router, the shared expert's
    gate."""
    wba = layer.heads.wba if isinstance(layer.heads, DeltaNet) else None
    router, gate = (layer.experts.router, layer.experts.shared_gate) if layer.experts else (None, None)
    return [layer.attention_norm, layer.ffn_norm, wba, router and router.weight, gate and gate.weight]


@torch.inference_mode()
def in_planes(weight: Any, planes: int) -> Any:
    """Kept with the weight, at one address, and always copied anew: the weight may have changed."""
    if planes == 1 or weight is None:
        return weight
    if getattr(weight, "in_planes", None) is None:
        weight.in_planes = torch.empty_like(weight)
    return weight.in_planes.copy_(gpu.in_planes(weight.view(-1, weight.size(-1)), planes).view(weight.shape))


def linear(x: Tensor, w: Weights, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None,
           gated: bool = False, planes: tuple[int, int] = (1, 1), offset: float = 0.0) -> Tensor:
    """gpu.linear by the tile for it; products of more tokens are PyTorch's."""
    if len(x) > MAX_TOKENS:
        return many_tokens_linear(x, w, norm, eps, residual, gated, offset)
    tile = tile_for(w, len(x), gated, norm is not None, x.device)
    return gpu.linear(x, w, norm, eps, residual, gated, tile, planes, offset)


def many_tokens_linear(x: Tensor, w: Weights, norm: Tensor | None, eps: float, residual: Tensor | None, gated: bool,
                       offset: float) -> Tensor:
    if norm is not None:
        x = gpu.rms_norm(x, norm, eps, offset)
    weight = w.weight if w.scales is None else gpu.dequantize(w, x.dtype)
    if residual is not None and residual.dtype == x.dtype and w.bias is None:
        return torch.addmm(residual, x, weight.t())
    y = F.linear(x, weight, w.bias)
    if gated:
        gate, up = y.chunk(2, dim=1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def heads_of(attention: Any, dtype: torch.dtype) -> Heads | DeltaNet | None:
    """Of kernels.AttentionTensors or DeltaNetTensors; None where the kernels do not compute them for a dtype."""
    if hasattr(attention, "state"):
        (wba, *bias), conv, state = attention.wba, attention.conv, attention.state
        fits = not bias and wba.is_contiguous() and fits_delta_net(conv, state, dtype, MAX_TOKENS)
        return DeltaNet(wba, conv, attention.A_log, attention.dt_bias, attention.norm, state) if fits else None
    k_cache, v_cache, scales = attention.k_cache, attention.v_cache, attention.scales
    fits = k_cache.dtype == v_cache.dtype == (torch.int8 if scales else dtype) and k_cache.size(3) <= MAX_HEAD
    return Heads(attention.q_norm, attention.k_norm, k_cache, v_cache, attention.window, attention.output_gate,
                 scales) if fits else None


fused: weakref.WeakValueDictionary[int, Layers] = weakref.WeakValueDictionary()    # what handles stand for
numbers = itertools.count()


def fuse(layers: Sequence[Any], n_head: int, eps: float, offset: float) -> Tensor | None:
    """A tensor that stands for kernels.LayerTensors in operators, and keeps them alive; None where run cannot compute
    them."""
    ours = []
    for layer in layers:
        attention, part, dtype = layer.attention, layer.feed_forward, layer.attention_norm.dtype
        linears = attention.wqkv, attention.wo, part.w13, part.w2
        others = [tensors for tensors in (part.router, part.shared_gate, part.shared_w13, part.shared_w2) if tensors]
        heads = heads_of(attention, dtype)
        if heads is None or layer.ffn_norm.dtype != dtype or not all(map(fits, (*linears, *others))):
            return None
        wqkv, wo, w13, w2 = map(Weights.of, linears)
        router, *shared = map(Weights.of, others) if others else (None,)
        experts = Experts(router, part.n_chosen, part.normalize, *shared) if router else None
        ours.append(Layer(layer.attention_norm, wqkv, heads, wo, layer.ffn_norm, w13, w2, experts))
    handle: Any = torch.tensor([next(numbers)])
    fused[int(handle)] = handle.layers = Layers(ours, n_head, eps, offset)
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


@torch.library.custom_op("qwen_fast::delta_net_gpu", mutates_args=())
def delta_net_op(qkv: Tensor, g: Tensor, b: Tensor, conv: Tensor, input_pos: Tensor, state: list[Tensor]) -> Tensor:
    """DeltaState.run by itself. That the state changes, as a cache does in run_layers, is not said: the compiler's
    nested regions take no operator that does, and nothing else in a step reads it."""
    given = g.contiguous(), b.contiguous()
    return delta_net(qkv.flatten(0, 1).contiguous(), conv, input_pos.contiguous(), state, given).view(*g.shape, -1)


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


@delta_net_op.register_fake
def _(qkv: Tensor, g: Tensor, b: Tensor, conv: Tensor, input_pos: Tensor, state: list[Tensor]) -> Tensor:
    return g.new_empty(*g.shape, state[0].size(3))


@dequantize_op.register_fake
def _(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    weight = tensors[0]
    return weight.new_empty(weight.size(0), weight.size(1) * (2 if weight.dtype == torch.uint8 else 1), dtype=dtype)
