"""Runs the GPU kernels on the CPU, in Triton's interpreter, against their plain twins.

    python tests/gpu_interpreter.py

Prints a line per case: its name, and the largest difference relative to the largest value. test_gpu.py runs it: Triton
decides when it is imported whether it interprets. Not in bf16, which the interpreter does not round as a GPU does.
"""
import importlib
import itertools
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ |= dict(TRITON_INTERPRET="1", QWEN_FAST_KERNELS="off")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from config import ModelArgs
from deltanet import DeltaState
from kernels import gpu
from model import Transformer, rotate
from quantize import quantize_model

gpu_layers = importlib.import_module("kernels.gpu_layers")     # the package's own name for it is None without a GPU
FP32, FP16, EPS = torch.float32, torch.float16, 1e-6
FORMATS = {"fp32": (32, FP32), "fp16": (16, FP16), "int8": (8, FP32), "int4": (4, FP32), "int8, fp16": (8, FP16),
           "int4, fp16": (4, FP16)}


def error(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape and y.dtype == expected.dtype
    return ((y.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def stored(N: int, K: int, bits: int, groupsize: int, dtype: torch.dtype) -> list[Tensor]:
    """A linear's tensors, with every value that a quantized weight may have."""
    if bits == 4:
        return [torch.randint(0, 256, (N, K // 2), dtype=torch.uint8),
                (torch.rand(N, K // groupsize) * 0.1 + 0.01).to(dtype),
                torch.randint(0, 241, (N, K // groupsize), dtype=torch.uint8)]
    if bits == 8:
        return [torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N) * 0.01 + 0.001]
    return [torch.randn(N, K).to(dtype)]


# ---- linears

def weights() -> float:
    """What the twins take weights for, by the definitions in kernels."""
    w4, w8 = stored(6, 256, 4, 64, FP32), stored(6, 256, 8, 0, FP32)
    return max(error(gpu.Weights.of(w4).dequantize(FP32), kernels.dequantize_int4(*w4, 256, FP32)),
               error(gpu.Weights.of(w8).dequantize(FP32), w8[0] * w8[1][:, None]))


def linears(bits: int, dtype: torch.dtype, one: bool) -> float:
    """N that is no multiple of the tile's rows, K within a tile, of whole tiles, and of several and a tail."""
    most, case = 0.0, 0
    for N, K, groupsize in ((13, 96, 32), (34, 256, 128), (10, 448, 64), (9, 288, 32)):
        for gated, normed in ((False, False), (False, True), (True, False), (True, True))[:4 if N % 2 == 0 else 2]:
            case += 1
            tile = (8, 128, 4, 1 + case % 2) if one else (16, max(64, groupsize), 4, 2)
            M = 1 if one else (2, 5, 16)[case % 3]
            bias = [torch.randn(N).to(dtype)] if case // 2 % 2 else []
            w = gpu.Weights.of([*stored(N, K, bits, groupsize, dtype), *bias])
            x = torch.randn(M, K).to(FP32 if normed else dtype)         # in fp16 models, what is normed is fp32
            norm = (torch.rand(K) + 0.5).to(dtype) if normed else None
            residual = None if normed else torch.randn(M, N // 2 if gated else N)
            given, offset = (x, w, norm, EPS, residual, gated), float(case % 2)
            most = max(most, error(gpu.linear(*given, gpu.Tile(*tile), offset=offset),
                                   gpu.linear_reference(*given, offset=offset)))
    return most


def words() -> float:
    """x, a norm and weights in bf16, one token: sums in fp32, because the interpreter truncates to bf16."""
    most = 0.0
    for bits, normed in itertools.product((16, 8, 4), (False, True)):
        w = gpu.Weights.of(stored(16, 288, bits, 32, torch.bfloat16))
        x, norm, residual = torch.randn(1, 288).bfloat16(), (torch.rand(288) + 0.5).bfloat16(), torch.randn(1, 16)
        tile = gpu.Tile(8, 256 if bits < 16 else 128, 4, 1)
        y = gpu.linear(x, w, norm if normed else None, EPS, residual, False, tile)
        w32 = w._replace(weight=w.weight.float()) if bits == 16 else w
        expected = gpu.linear_reference(x.float(), w32, norm.float() if normed else None, EPS, residual)
        most = max(most, error(y, expected))
    return most


def planes(bits: int) -> float:
    """One token in the order of the weights' words, before the linear, after it, or both."""
    most, fields = 0.0, 32 // bits
    for order in ((fields, fields), (fields, 1), (1, fields)):
        for gated in (False, True):
            w = gpu.Weights.of(stored(16, 288, bits, 32, FP32))
            given = torch.randn(1, 288), w, torch.rand(288) + 0.5, EPS, torch.randn(1, 8 if gated else 16), gated
            y = gpu.linear(*given, gpu.Tile(8, 256, 4, 1), order)
            most = max(most, error(y, gpu.linear_reference(*given, planes=order)))
    x = torch.randn(3, 64)
    assert torch.equal(gpu.in_planes(x, fields), torch.cat([x[:, n::fields] for n in range(fields)], dim=1))
    assert torch.equal(gpu.out_of_planes(gpu.in_planes(x, fields), fields), x)
    return most


def dequantize() -> float:
    tensors = [stored(5, 1312, bits, 32, FP32) for bits in (8, 4)] + [stored(3, 256, 4, 128, FP32)]
    return max(error(gpu.dequantize(gpu.Weights.of(w), dtype), gpu.Weights.of(w).dequantize(dtype))
               for w in tensors for dtype in (FP32, FP16))


def norm() -> float:
    x, weight = torch.randn(5, 200), torch.rand(200) + 0.5
    return error(gpu.rms_norm(x, weight, EPS), F.rms_norm(x, (200,), weight, EPS))


# ---- attention

BOTH = [(False, True)] * 2
# B, S, H, KV, D, T, window, the rows' first positions
SHAPES = [(1, 1, 4, 4, 16, 64, 0, [0]), (1, 1, 4, 2, 16, 256, 0, [255]), (1, 1, 8, 2, 64, 512, 0, [300]),
          (1, 1, 8, 1, 80, 512, 100, [511]), (1, 1, 6, 2, 64, 300, 100, [20]), (1, 9, 16, 8, 128, 512, 0, [400]),
          (1, 16, 8, 2, 128, 300, 33, [284]), (3, 1, 4, 2, 64, 256, 0, [0, 255, 77]), (2, 5, 4, 4, 32, 256, 0, [77, 0]),
          (2, 3, 8, 2, 16, 256, 60, [128, 253]), (1, 40, 8, 2, 32, 256, 0, [20]), (2, 33, 4, 1, 80, 130, 50, [0, 97])]


def attend(dtype: torch.dtype, split: bool) -> float:
    """With NaN where no query may look. Result in the order of int4's activations, too. Every other cache in int8, and
    every third result times gates."""
    most = 0.0
    for i, (B, S, H, KV, D, T, window, starts) in enumerate([*SHAPES, *SHAPES[1:]]):
        q, input_pos = torch.randn(B, S, H, D).to(dtype), torch.tensor(starts)[:, None] + torch.arange(S)
        (k, v), scales = torch.randn(2, B, KV, T, D).to(dtype), []
        if i % 2:
            (k, v), scales = zip(*map(kernels.quantize_heads, (k, v)))
        expected = kernels.attend_reference(q, k, v, input_pos, window, scales)
        gates = torch.randn(B * S, 3 * H * D).to(dtype)[:, H * D:2 * H * D] if i % 3 == 0 else None
        if gates is not None:
            expected = expected * gates.view_as(expected).sigmoid()
        for b, t in itertools.product(range(B), scales or (k, v)):
            t[b, :, input_pos[b, -1] + 1:] = torch.nan
        ready = torch.zeros(B * KV, dtype=torch.int32) if split else None
        y = gpu.attend(q, k, v, input_pos, window, ready, scales=scales, gates=gates)
        most = max(most, error(y, expected))
        if B * S == 1:
            ready = torch.zeros(KV, dtype=torch.int32) if split else None
            y = gpu.attend(q, k, v, input_pos, window, ready, 8, scales, gates)
            assert torch.equal(gpu.out_of_planes(y[0], 8)[None], gpu.attend(q, k, v, input_pos, window, None if ready is
                               None else torch.zeros_like(ready), scales=scales, gates=gates))
    return most


def prepare(dtype: torch.dtype) -> float:
    """Queries, the caches, which change only where the tokens are, and the zeros for attend. RoPE of all dimensions or
    of some, norms with an offset or none, queries and keys alone or before gates."""
    most = 0.0
    for (B, S, H, KV, D, T, _, starts), normed, scaled in itertools.product(SHAPES[1:9:3], *BOTH):
        R, offset, gated = (D // 4, 1.0, H) if scaled else (D, 0.0, 0)
        input_pos, angles = torch.tensor(starts)[:, None] + torch.arange(S), torch.randn(B, S, 1, R // 2)
        wide, caches = torch.randn(B * S, (H + 2 * KV + gated) * D).to(dtype), torch.randn(2, B, KV, T, D).to(dtype)
        qkv = wide[:, :(H + 2 * KV) * D]
        q_norm, k_norm = (torch.rand(2, D) + 0.5).to(dtype) if normed else (None, None)
        cos, sin = (torch.cat((t, t), dim=-1) for t in (angles.cos(), angles.sin()))
        logn = torch.rand(B, S, 1, 1) + 1 if scaled else None
        q, k, v = qkv.reshape(B, S, -1, D).float().split([H, KV, KV], dim=2)
        if normed:
            q, k = (F.rms_norm(x, (D,), norm.float() + offset, EPS) for x, norm in ((q, q_norm), (k, k_norm)))
        expected, rows = caches.clone(), torch.arange(B)[:, None]
        expected[0][rows, :, input_pos], expected[1][rows, :, input_pos] = rotate(k, cos, sin).to(dtype), v.to(dtype)
        ready = torch.full((B * KV,), 7, dtype=torch.int32)
        y = gpu.prepare(wide, q_norm, k_norm, cos, sin, logn, input_pos, *caches, H, EPS, ready, offset=offset)
        most = max(most, error(y, (rotate(q, cos, sin) * (1 if logn is None else logn)).to(dtype)),
                   error(caches, expected))
        assert not ready.any()
        int8, scales = caches.to(torch.int8), torch.zeros(2, B, KV, T, 1)
        gpu.prepare(wide, q_norm, k_norm, cos, sin, logn, input_pos, *int8, H, EPS, ready, list(scales), offset)
        for cache, scale, x in zip(int8, scales, (rotate(k, cos, sin), v)):
            steps, expected_scale = kernels.quantize_heads(x)
            assert (cache[rows, :, input_pos] - steps).abs().max() <= 1        # it may fall to either side of a step
            most = max(most, error(scale[rows, :, input_pos], expected_scale))
            assert scale.count_nonzero() == B * S * KV
    return most


# ---- Gated DeltaNet

def delta_net(dtype: torch.dtype) -> float:
    """Results and states, row by row at positions of their own: texts begin, and begin anew; of what is pending all
    stays, or less; the last row ends in padding."""
    most = 0.0
    for B, Hk, Hv, K, V, size in ((1, 1, 1, 16, 16, 4), (2, 2, 4, 20, 12, 4), (3, 1, 2, 16, 40, 3)):
        args = ModelArgs("qwen3_5_text", 8, 1, 1, 1, 4, 8, 8, 64, delta_layers=(0,), delta_key_heads=Hk,
                         delta_value_heads=Hv, delta_key_dim=K, delta_value_dim=V, conv_size=size)
        mine, twin = (DeltaState(args, B, 16, dtype, torch.device("cpu")) for _ in range(2))
        mine.memory.fill_(torch.nan)
        N, row, ends = args.delta_channels, torch.arange(B), torch.zeros(B, dtype=torch.int64)
        conv = torch.randn(N, size).to(dtype)
        for S, back, padding in ((5, 0, 2), (1, 2, 0), (16, 0, 3), (7, 10, 1), (1, 99, 0), (2, 1, 0)):
            begin = torch.where(row == 0, (ends - back).clamp(min=0), ends)
            ends = begin + torch.where(row == B - 1, S - padding, S)
            input_pos = begin[:, None] + torch.arange(S)
            input_pos = torch.where(input_pos < ends[:, None], input_pos, 60)
            qkv, g, b = torch.randn(B, S, N).to(dtype), -torch.rand(B, S, Hv) ** 4, torch.rand(B, S, Hv)
            y = torch.ops.qwen_fast.delta_net_gpu(qkv, g, b, conv, input_pos, mine.tensors())
            most = max(most, error(y, twin.run_reference(qkv, g, b, conv, input_pos)))
            for ours, theirs in zip(mine.tensors(), twin.tensors()):
                exact = torch.equal(ours, theirs)                  # and so not divided by 0, in an empty memory
                most = max(most, 0.0 if exact else error(ours, theirs))
            assert all(torch.equal(getattr(mine, name), getattr(twin, name)) for name in ("length", "pending"))
    return most


# ---- whole layers

def layers(mode: str) -> float:
    """Two layers, of which one has a window, against the modules: several tokens, then one; one row, then two."""
    most = 0.0
    for B, qk_norm, bias, logn in ((1, True, False, False), (2, False, True, True)):
        args = ModelArgs("qwen3", dim=64, n_layer=2, n_head=4, n_local_heads=2, head_dim=16, intermediate_size=96,
                         vocab_size=64, max_position=512, qk_norm=qk_norm, qkv_bias=bias, o_bias=bias, mlp_bias=bias,
                         windows=(0, 7), seq_length=8 if logn else 0, logn=logn)
        model = Transformer(args)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1 and not bias), std=0.3)
        if mode != "none":
            quantize_model(model, mode, groupsize=32)
        model.int8_kv_cache = bias
        model.setup_caches(B, 48)
        handle = gpu_layers.fuse([tensors_of(layer) for layer in model.layers], 4, args.norm_eps, 0.0)
        start = 0
        for S in (5, 1):
            input_pos = (start + torch.arange(S) + torch.arange(B)[:, None])[:B]
            cos, sin = model.rope(input_pos)
            factors, x = model.logn_scale(input_pos) if logn else None, torch.randn(B, S, 64)
            y = torch.ops.qwen_fast.run_layers(x, handle, cos, sin, factors, input_pos)
            written = [t.clone() for layer in model.layers for t in layer.attention.kv_cache.buffers()]
            expected = x
            for layer in model.layers:
                expected = layer(expected, cos, sin, factors, input_pos)
            most = max(most, error(y, expected), *(error(t, cache) for t, cache in zip(written, (
                t for layer in model.layers for t in layer.attention.kv_cache.buffers()))))
            start += S
    return most


def experts(bits: int) -> float:
    """Three of six experts, for one token and four, in natural order and in planes; thread blocks for more rows and
    columns than there are."""
    most, E, C, size, k = 0.0, 6, 160, 96, 3
    w13, w2 = (gpu.Weights.of(stored(N, K, bits, 32, FP32)) for N, K in ((E * 2 * size, C), (E * C, size)))
    for M, planes in ((1, w13.fields), (4, 1)):
        x, residual, norm, weights = torch.randn(M, C), torch.randn(M, C), torch.rand(C) + 0.5, torch.rand(M, k)
        chosen = torch.stack([torch.randperm(E)[:k] for _ in range(M)])
        shared = (torch.randn(M, C), torch.rand(M)) if M > 1 else ()
        expected = gpu.experts_reference(x, chosen, weights, w13, w2, norm, EPS, residual, float(M == 1), *shared)
        x, residual = gpu.in_planes(x, planes), gpu.in_planes(residual, planes)
        norm = gpu.in_planes(norm[None], planes)[0]
        tiles = gpu.Tile(128, 128, 4, 1), gpu.Tile(64, 128, 4, 2)
        y = gpu.experts(x, chosen, weights, w13, w2, norm, EPS, residual, tiles, planes, float(M == 1), *shared)
        most = max(most, error(gpu.out_of_planes(y, planes), expected))
    return most


def choose() -> float:
    most = 0.0
    for M, E, n, C, normalize, gated in ((1, 6, 2, 96, True, False), (3, 60, 4, 200, False, True),
                                         (2, 256, 10, 5000, True, True)):
        gate = torch.randn(1, C) if gated else None
        given = torch.randn(M, E), n, normalize, torch.randn(M, C), torch.randn(C), EPS, 1.0, gate
        for y, expected in zip(gpu.choose(*given), gpu.choose_reference(*given)):
            most = max(most, 0.0 if y is expected is None else error(y, expected))
    return most


def layers_of_experts(mode: str) -> float:
    """A layer of 4 experts, 2 of them chosen, and a shared one, against the modules: one token, then three."""
    args = ModelArgs("qwen2_moe", dim=64, n_layer=1, n_head=4, n_local_heads=2, head_dim=16, intermediate_size=64,
                     vocab_size=64, max_position=512, n_expert=4, n_expert_per_token=2, expert_size=32,
                     shared_expert_size=64, normalize_experts=mode == "none")
    model, most = Transformer(args), 0.0
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    if mode != "none":
        quantize_model(model, mode, groupsize=32)
    for S in (1, 3):
        model.setup_caches(1, 16 * S)
        handle = gpu_layers.fuse([tensors_of(layer) for layer in model.layers], 4, args.norm_eps, 0.0)
        input_pos = torch.arange(S)[None]
        cos, sin = model.rope(input_pos)
        x = torch.randn(1, S, 64)
        y, expected = torch.ops.qwen_fast.run_layers(x, handle, cos, sin, None, input_pos), x
        for layer in model.layers:
            expected = layer(expected, cos, sin, None, input_pos)
        most = max(most, error(y, expected))
    return most


def layers_of_a_hybrid(mode: str, moe: bool) -> float:
    """A Gated DeltaNet and an attention against the modules: results, caches and states. One row, or two; several
    tokens, of which some are taken back, and one. As Qwen3.5 has them, or with experts, as Qwen3-Next."""
    most, more = 0.0, dict(n_expert=4, n_expert_per_token=2, expert_size=32, shared_expert_size=64,
                           normalize_experts=True) if moe else dict()
    args = ModelArgs("qwen3_next" if moe else "qwen3_5_text", dim=64, n_layer=2, n_head=2, n_local_heads=1, head_dim=32,
                     intermediate_size=96, vocab_size=64, max_position=512, qk_norm=True, norm_offset=1.0,
                     output_gate=True, rotary_dim=8, delta_layers=(0,), delta_key_heads=2, delta_value_heads=4,
                     delta_key_dim=16, delta_value_dim=24, conv_size=4, **more)
    model = Transformer(args)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if mode != "none":
        quantize_model(model, mode, groupsize=32)
    B = 2 if mode == "int8" else 1
    model.setup_caches(B, 48)
    handle = gpu_layers.fuse([tensors_of(layer) for layer in model.layers], 2, args.norm_eps, 1.0)

    def remembered() -> list[Tensor]:
        tensors = (t for layer in model.layers for t in layer.attention.caches())
        return [t.clone() for t in tensors if t.is_floating_point()]
    for S, start in ((2, 0), (1, 1)) if moe else ((5, 0), (1, 3), (1, 4)):
        input_pos, x = torch.arange(start, start + S).expand(B, S), torch.randn(B, S, 64)
        (cos, sin), before = model.rope(input_pos), model.save()
        y, mine = torch.ops.qwen_fast.run_layers(x, handle, cos, sin, None, input_pos), remembered()
        model.restore(before)
        for layer in model.layers:
            x = layer(x, cos, sin, None, input_pos)
        most = max(most, error(y, x), *(error(a, b) for a, b in zip(mine, remembered()) if not torch.equal(a, b)))
    return most


def tensors_of(layer) -> kernels.LayerTensors:
    """As layer.kernel_args would give them on a GPU, where int4 stays in the stored form."""
    def of(linear) -> list[Tensor]:
        tensors = (getattr(linear, name, None) for name in ("weight", "scales", "zeros", "bias"))
        return [tensor for tensor in tensors if tensor is not None]
    attention, feed_forward = layer.attention, layer.feed_forward
    tensors = kernels.FeedForwardTensors(of(feed_forward.w13), of(feed_forward.w2), feed_forward.size)
    if hasattr(feed_forward, "router"):
        shared = feed_forward.shared
        tensors = tensors._replace(
            router=of(feed_forward.router), shared_gate=of(feed_forward.shared_gate), shared_w13=of(shared.w13),
            shared_w2=of(shared.w2), shared_size=shared.size, n_expert=feed_forward.n_expert,
            n_chosen=feed_forward.n_chosen, normalize=feed_forward.normalize)
    wqkv, wo = of(attention.wqkv), of(attention.wo)
    if hasattr(attention, "state"):
        heads = kernels.DeltaNetTensors(wqkv, of(attention.wba), attention.conv, attention.A_log, attention.dt_bias,
                                        attention.norm.weight, wo, attention.state.tensors())
    else:
        q_norm, k_norm = (getattr(norm, "weight", None) for norm in (attention.q_norm, attention.k_norm))
        cache = attention.kv_cache
        heads = kernels.AttentionTensors(wqkv, q_norm, k_norm, wo, cache.k_cache, cache.v_cache, attention.window,
                                         attention.output_gate, cache.scales())
    return kernels.LayerTensors(layer.attention_norm.weight, heads, layer.ffn_norm.weight, tensors)


def cases() -> Iterator[tuple]:
    yield "weights", weights
    for name, (bits, dtype) in FORMATS.items():
        yield f"linear, {name}, one token", linears, bits, dtype, True
        yield f"linear, {name}, few tokens", linears, bits, dtype, False
    yield "words", words
    yield "planes, int8", planes, 8
    yield "planes, int4", planes, 4
    yield "dequantize", dequantize
    yield "norm", norm
    for name, dtype in (("fp32", FP32), ("fp16", FP16)):
        yield f"prepare, {name}", prepare, dtype
        yield f"attend, whole, {name}", attend, dtype, False
        yield f"attend, split, {name}", attend, dtype, True
        yield f"delta net, {name}", delta_net, dtype
    yield "choose", choose
    for mode, bits in (("none", 32), ("int8", 8), ("int4", 4)):
        yield f"experts, {mode}", experts, bits
        yield f"layers, {mode}", layers, mode
        yield f"layers of experts, {mode}", layers_of_experts, mode
        yield f"layers of a hybrid, {mode}", layers_of_a_hybrid, mode, False
        yield f"layers of a hybrid with experts, {mode}", layers_of_a_hybrid, mode, True


@torch.inference_mode()
def main() -> None:
    warnings.simplefilter("ignore")                # NumPy's, of what masks leave out
    for name, compute, *arguments in cases():
        torch.manual_seed(0)
        try:
            print(f"{name}: {compute(*arguments)}", flush=True)
        except Exception as error:
            print(f"{name}: {error!r:.200}", flush=True)


if __name__ == "__main__":
    main()
