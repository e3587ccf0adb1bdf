"""Every kernel against its plain PyTorch twin, computed in fp64.

Tolerances are relative to the largest result. bf16 results carry half a unit in the last of 8 bits: 2^-8 = 0.4 %.
fp32 sums of up to 6000 products differ by their order: 3e-6. Where activations are rounded to int8 the twin rounds as
well, but a value on the boundary between two steps may fall to either side; one step is 1/127 of the group's largest
value in one of K_in terms: 2e-3 covers a few of them at the sizes used here.
"""
import copy
import functools
import gc
import mmap
import os
import platform
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from kernels import build, memory

BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = {BF16: 4e-3, FP32: 3e-6}
ROUNDED = 2e-3
HAVE_OPS = kernels.available()
needs_ops = pytest.mark.skipif(not HAVE_OPS, reason="the C++ kernels could not be built here")
CPU = os.environ.get("TEST_CPU", "")               # which other CPU test_other_cpus has built for
flags = set(build.cpu_flags().split())
vnni, narrow = "avx512_vnni" in flags, "avx2" in flags and "avx512f" not in flags
# Whether activations are rounded
rounds = HAVE_OPS and (CPU in ("haswell", "cascadelake", "cooperlake", "emulated") or not CPU and (vnni or narrow))
MOST_ROUNDED = {"int8": kernels.MAX_TOKENS, "int4": kernels.MAX_TOKENS}                       # tokens
if CPU == "haswell" or not CPU and narrow:
    MOST_ROUNDED["int4"] = 1 << 30
if CPU in ("cascadelake", "cooperlake") or not CPU and vnni and "amx_int8" not in flags:
    MOST_ROUNDED = dict.fromkeys(MOST_ROUNDED, 1 << 30)
# Whether more tokens, in bf16, go through AMX's tiles of int8
TILES = HAVE_OPS and not CPU and {"amx_bf16", "amx_int8"} <= flags
# [N, K_in] with tails in both, one large enough to be shared out, and K_in beyond what two rows at once are for
SHAPES = [(64, 64), (33, 78), (7, 1024), (300, 896), (37, 2100), (21, 6200)]
TOKENS = [1, 2, 3, 4, 5, 6, 7, 9, 16]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def error(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    return ((y.double() - expected).abs().max() / expected.abs().max()).item()


def int4_weights(N: int, K_in: int, groupsize: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stored form and the weights that it stands for, by a formula of its own."""
    groups = -(-K_in // groupsize)
    q = torch.randint(0, 16, (N, K_in))
    scales = (torch.rand(N, groups) * 0.1 + 0.01).bfloat16()
    zeros = torch.randint(0, 241, (N, groups), dtype=torch.uint8)
    group = torch.arange(K_in) // groupsize
    w = scales.double()[:, group] * (q - zeros[:, group].double() / 16)
    return (q[:, ::2] + 16 * q[:, 1::2]).to(torch.uint8), scales, zeros, w


def int8_weights(N: int, K_in: int) -> tuple[Tensor, Tensor, Tensor]:
    weight, scales = torch.randint(-128, 128, (N, K_in), dtype=torch.int8), torch.rand(N) * 0.01
    return weight, scales, weight.double() * scales.double()[:, None]


# ---- linears

@needs_ops
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("N,K_in", [*SHAPES, (5, 3)])
def test_linear(N: int, K_in: int, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K_in).to(dtype)
    for M in [*TOKENS, 17, 40]:
        x = torch.randn(M, K_in).to(dtype)
        y = kernels.linear(x, weight)
        assert y.dtype == dtype and error(y, x.double() @ weight.double().T) < TOLERANCE[dtype], M
        assert error(kernels.linear_reference(x, weight), y.double()) < 2 * TOLERANCE[dtype], M


def test_linear_keeps_leading_dimensions_and_takes_any_layout() -> None:
    weight = torch.randn(32, 48)
    x = torch.randn(48, 3, 2).permute(2, 1, 0)
    for rows in (weight, torch.randn(48, 32).T, torch.randn(32, 96)[:, ::2]):
        assert error(kernels.linear(x, rows), x.double() @ rows.double().T) < TOLERANCE[FP32]
    assert kernels.linear(torch.randn(2, 40, 48), weight).shape == (2, 40, 32)
    assert kernels.linear(torch.randn(0, 48), weight).shape == (0, 32)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("N,K_in", SHAPES)
def test_int8_linear(N: int, K_in: int, dtype: torch.dtype) -> None:
    weight, scales, w = int8_weights(N, K_in)
    for M in [*TOKENS, 17, 40]:
        x = torch.randn(M, K_in).to(dtype)
        tolerance = TOLERANCE[dtype] * (1 if HAVE_OPS and M <= 16 else 2)
        assert error(kernels.int8_linear(x, weight, scales, False), x.double() @ w.T) < tolerance, M
        few = M <= MOST_ROUNDED["int8"]
        rounded = kernels.quantize_activations_reference(x, torch.int16, 256) if rounds and few else x
        if TILES and M > 16 and dtype == BF16:
            rounded = kernels.quantize_activations_reference(x, torch.int8, 512)
        assert error(kernels.int8_linear(x, weight, scales), rounded.double() @ w.T) < tolerance + ROUNDED / 256, M
        assert error(kernels.int8_linear_reference(x, weight, scales), x.double() @ w.T) < 3 * TOLERANCE[dtype], M


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("groupsize", [32, 64, 128, 256])
@pytest.mark.parametrize("N,K_in", SHAPES)
def test_int4_linear(N: int, K_in: int, groupsize: int, dtype: torch.dtype) -> None:
    """The packed form too: it stands for the same weights."""
    weight, scales, zeros, w = int4_weights(N, K_in, groupsize)
    packed = kernels.pack_int4(weight, scales, zeros, groupsize)
    assert torch.equal(kernels.dequantize_packed_int4(*packed, N, K_in, torch.float64), w)
    if K_in % groupsize == 0:
        kernels.pack_int4_reference(weight, by_twin := torch.zeros_like(packed[0]))
        assert torch.equal(by_twin, packed[0])
    for M in [*TOKENS, 40] if groupsize == 32 else [1, 3, 16, 40]:
        x = torch.randn(M, K_in).to(dtype)
        tolerance = TOLERANCE[dtype] * (1 if HAVE_OPS and M <= 16 else 2)
        assert error(kernels.int4_linear(x, *packed, N, False), x.double() @ w.T) < tolerance, M
        few = M <= MOST_ROUNDED["int4"]
        rounded = kernels.quantize_activations_reference(x, torch.int8, 32) if rounds and few else x
        w_rounded = w
        if TILES and M > 16 and dtype == BF16:
            rounded = kernels.quantize_activations_reference(x, torch.int8, 512)
            w_rounded = kernels.int4_to_int8_reference(w, scales, zeros, groupsize)
            assert error(w_rounded, w) < 0.55 / 127
        assert error(kernels.int4_linear(x, *packed, N), rounded.double() @ w_rounded.T) < tolerance + ROUNDED, M
    assert error(kernels.int4_linear_reference(x, *packed, N), x.double() @ w.T) < 3 * TOLERANCE[dtype]


def test_nibbles() -> None:
    q = torch.randint(0, 16, (3, 7), dtype=torch.uint8)
    packed = kernels.pack_nibbles(q)
    assert packed.dtype == torch.uint8 and packed.tolist()[0] == [
        int(q[0, i]) + 16 * (int(q[0, i + 1]) if i < 6 else 0) for i in (0, 2, 4, 6)]
    assert torch.equal(kernels.unpack_nibbles(packed, 7), q)
    assert torch.equal(kernels.unpack_nibbles(packed), torch.cat((q, torch.zeros(3, 1, dtype=torch.uint8)), dim=1))


def test_rounded_activations_are_within_half_a_step() -> None:
    x = torch.randn(5, 600) * torch.logspace(-3, 3, 600)
    for dtype, group, most in ((torch.int16, 256, 127 * 257), (torch.int8, 32, 127)):
        rounded = kernels.quantize_activations_reference(x, dtype, group)
        for start in range(0, 600, group):
            columns = slice(start, start + group)
            high = x[:, columns].abs().amax(1, keepdim=True)
            assert ((rounded - x)[:, columns].abs() <= high / most * 0.51).all()
    assert torch.equal(kernels.quantize_activations_reference(torch.zeros(2, 64), torch.int8, 32), torch.zeros(2, 64))


@needs_ops
def test_zero_activations_give_zero() -> None:
    weight, scales, zeros, _ = int4_weights(32, 64, 32)
    assert not kernels.int4_linear(torch.zeros(1, 64), *kernels.pack_int4(weight, scales, zeros, 32), 32).any()
    assert not kernels.int8_linear(torch.zeros(1, 64), *int8_weights(32, 64)[:2]).any()


@needs_ops
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_a_token_of_nan_is_seen_in_its_own_results_alone(kind: str) -> None:
    """Integers hold no NaN."""
    if kind == "int4":
        weight, scales, zeros, _ = int4_weights(64, 512, 32)
        tensors = list(kernels.pack_int4(weight, scales, zeros, 32))
    else:
        tensors = list(int8_weights(64, 512)[:2]) if kind == "int8" else [torch.randn(64, 512).bfloat16()]
    for M in [*TOKENS, 40]:
        x = torch.randn(M, 512).bfloat16()
        expected = torch.ops.qwen_fast.linear(x, tensors, 64, True)
        for value in (torch.nan, torch.inf):
            x[0, 300] = value
            y = torch.ops.qwen_fast.linear(x, tensors, 64, True)
            assert not y[0].isfinite().any() and torch.equal(y[1:], expected[1:]), (M, value)


@needs_ops
def test_linears_of_what_does_not_fit_are_refused() -> None:
    weight, scales, zeros, _ = int4_weights(32, 64, 32)
    packed, scales, zeros = kernels.pack_int4(weight, scales, zeros, 32)
    w8, x = torch.ones(32, 64, dtype=torch.int8), torch.ones(1, 64)
    lists = [[], [torch.ones(32, 63)], [torch.ones(64, 32).T], [torch.ones(32, 64).bfloat16()],
             [torch.ones(32, 64)] * 3, [torch.ones(32, 64), torch.ones(31)],
             [w8], [w8, torch.ones(31)], [w8, torch.ones(32).bfloat16()],
             [packed, scales], [packed, scales, zeros[:1]], [packed, scales.float(), zeros],
             [packed[:1], scales, zeros], [packed.flatten(), scales, zeros],
             [packed, scales[:, :1].contiguous(), zeros]]
    for tensors in lists:
        with pytest.raises(RuntimeError, match="linear"):
            torch.ops.qwen_fast.linear(x, tensors, 32, True)
    for x in (torch.ones(1, 96), torch.ones(1, 32), torch.ones(1, 64).double()):
        with pytest.raises(RuntimeError, match="linear"):
            torch.ops.qwen_fast.linear(x, [packed, scales, zeros], 32, True)


# ---- attention

@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_quantized_heads_are_within_half_a_step(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5, 2, 64) * torch.logspace(-3, 3, 5)[:, None, None]).to(dtype)
    x[0, 0, 0], x[0, 0, 1] = 0, 1e-35
    q, scales = kernels.quantize_heads(x)
    assert (q.dtype, scales.dtype, scales.shape) == (torch.int8, FP32, (3, 5, 2, 1)) and not q[0, 0].any()
    assert torch.equal(q.abs().amax(-1).flatten()[2:], torch.full((28,), 127, dtype=torch.int8))
    assert ((q * scales - x.float()).abs() <= 0.501 * scales + 1e-30).all()
    assert torch.equal(scales[..., 0], x.float().abs().amax(-1) / 127)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("B,S,H,K,D,T", [(1, 1, 16, 8, 128, 300), (2, 3, 14, 2, 64, 100), (1, 16, 4, 4, 80, 70),
                                         (1, 1, 8, 1, 256, 600), (3, 1, 6, 3, 96, 290), (1, 24, 4, 2, 64, 60),
                                         (1, 1, 8, 2, 256, 301), (2, 90, 4, 1, 16, 97), (1, 270, 2, 1, 32, 700),
                                         (2, 21, 6, 2, 96, 530)])
def test_attend(B: int, S: int, H: int, K: int, D: int, T: int, dtype: torch.dtype, int8: bool) -> None:
    """Windows, rows at different positions, and NaN where no query may look. The fast path and both plain ones. A
    cache in int8 stands for the keys and values that the reference sees."""
    k, v = torch.randn(2, B, K, T, D).to(dtype)
    q, scales = torch.randn(B, S, H, D).to(dtype), []
    caches, exact = [k, v], [k.double(), v.double()]
    if int8:
        caches, scales = map(list, zip(*map(kernels.quantize_heads, (k, v))))
        exact = [cache * scale.double() for cache, scale in zip(caches, scales)]
    tolerance = 2 * TOLERANCE[dtype]    # PyTorch's attention rounds its weights to bf16 before it sums the values
    for window in (0, 1, 17, 200):
        rows = torch.randint(0, T - S, (B, 1)) + torch.arange(S)
        for input_pos in (rows, torch.arange(T - S, T), torch.arange(S)):
            expected = attention_in_fp64(q, *exact, input_pos.expand(B, S), window)
            assert error(kernels.attend_reference(q, *caches, input_pos, window, scales), expected) < tolerance
            assert error(kernels.attend_sliced(q, *caches, input_pos, window, scales), expected) < tolerance
            unseen_k, unseen_v = unseen = [t.clone() for t in scales or caches]
            unseen_k[:, :, int(input_pos.max()) + 1:] = unseen_v[:, :, int(input_pos.max()) + 1:] = torch.nan
            y = kernels.attend(q, *(caches if int8 else unseen), input_pos, window, unseen if int8 else [])
            assert y.dtype == dtype and error(y, expected) < tolerance, (window, input_pos)


def attention_in_fp64(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """One query at a time, from the definition."""
    B, S, H, D = q.shape
    out = torch.empty(B, S, H, D, dtype=torch.float64)
    for b in range(B):
        for s in range(S):
            p = int(input_pos[b, s])
            slots = slice(max(0, p - window + 1) if window else 0, p + 1)
            keys, values = (t[b, :, slots].double().repeat_interleave(H // k.size(1), 0) for t in (k, v))
            weights = (keys @ q[b, s].double()[:, :, None] / D ** 0.5).softmax(1)
            out[b, s] = (weights * values).sum(1)
    return out.flatten(2)


@needs_ops
def test_attend_splits_positions_between_threads() -> None:
    """One KV head, more threads than heads: the parts are put together again, at any magnitude of the scores."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for scale in (1.0, 30.0):
            q, k, v = scale * torch.randn(1, 1, 4, 64), torch.randn(1, 1, 3000, 64), torch.randn(1, 1, 3000, 64)
            for position in (2999, 5):
                input_pos = torch.tensor([[position]])
                assert error(kernels.attend(q, k, v, input_pos), attention_in_fp64(q, k, v, input_pos, 0)) < 1e-5
                (k8, ks), (v8, vs) = map(kernels.quantize_heads, (k, v))
                expected = attention_in_fp64(q, k8 * ks.double(), v8 * vs.double(), input_pos, 0)
                assert error(kernels.attend(q, k8, v8, input_pos, 0, [ks, vs]), expected) < 1e-5
    finally:
        torch.set_num_threads(threads)


@needs_ops
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("S", [1, 16])
def test_nan_in_one_row_of_the_cache_stays_there(S: int, int8: bool) -> None:
    k, v = torch.randn(2, 2, 1, 100, 64).bfloat16()
    q, scales = torch.randn(2, S, 2, 64).bfloat16(), []
    if int8:
        (k, k_scales), (v, v_scales) = map(kernels.quantize_heads, (k, v))
        scales = [k_scales, v_scales]
    input_pos = torch.tensor([[100 - S], [20]]) + torch.arange(S)
    expected = kernels.attend(q, k, v, input_pos, 0, scales)
    for t in scales or (k, v):
        t[0] = torch.nan
    y = kernels.attend(q, k, v, input_pos, 0, scales)
    assert y[0].isnan().all() and torch.equal(y[1], expected[1])


@needs_ops
def test_attend_refuses_what_does_not_fit() -> None:
    q, cache, one = torch.randn(1, 1, 4, 64), torch.randn(1, 4, 8, 64), torch.tensor([1])
    for position in (-1, 8):
        with pytest.raises(RuntimeError, match="outside the cache"):
            kernels.attend(q, cache, cache, torch.tensor([position]))
    shorter = cache[:, :, :7].contiguous()
    for arguments in ((q[:, :, :3], cache, cache, one), (q[0], cache, cache, one), (q, cache, shorter, one),
                      (q, cache[:, :0], cache[:, :0], one), (q, cache, cache, one.int()),
                      (q, cache, cache, torch.tensor([1, 2]))):
        with pytest.raises((RuntimeError, IndexError)):
            torch.ops.qwen_fast.attend(*arguments, 0, [])
    (int8, scale) = kernels.quantize_heads(cache)
    assert torch.ops.qwen_fast.attend(q, int8, int8, one, 0, [scale, scale]).isfinite().all()
    for key, scales in ((cache, [scale, scale]), (int8, []), (int8, [scale]), (int8, [scale, scale[:, :3]]),
                        (int8, [scale, scale.double()]), (int8, [scale, torch.cat((scale, scale), -1)[..., :1]])):
        with pytest.raises(RuntimeError, match="caches"):
            torch.ops.qwen_fast.attend(q, key, int8, one, 0, scales)
    assert torch.ops.qwen_fast.attend(q[:, :0], cache, cache, one[:0], 0, []).shape == (1, 0, 256)


# ---- whole layers

H, K, D, C, FFN, EPS, OFFSET = 4, 2, 16, 40, 72, 1e-6, 0.5     # tails of 8 in C and FFN


def make_layer(kind: str, dtype: torch.dtype, B: int = 1, T: int = 48, window: int = 0, norms: bool = True,
               biases: bool = False, gate: bool = False,
               int8_cache: bool = False) -> tuple[kernels.LayerTensors, dict[str, Tensor]]:
    """And the weights of its linears in fp64."""
    weights = {}

    def make_linear(name: str, N: int, K_in: int) -> list[Tensor]:
        if kind == "int4":
            weight, scales, zeros, w = int4_weights(N, K_in, 32)
            tensors, weights[name] = list(kernels.pack_int4(weight, scales / 4, zeros, 32)), w / 4
        elif kind == "int8":
            weight, scales, w = int8_weights(N, K_in)
            tensors, weights[name] = [weight, scales / 4], w / 4
        else:
            tensors = [(torch.randn(N, K_in) / 6).to(dtype)]
            weights[name] = tensors[0].double()
        return [*tensors, torch.randn(N).to(dtype)] if biases else tensors

    def norm(size: int) -> Tensor:
        return (torch.rand(size) + 0.5).to(dtype)
    attention_norm, (k_cache, v_cache) = norm(C), torch.zeros(2, B, K, T, D, dtype=torch.int8 if int8_cache else dtype)
    attention = kernels.AttentionTensors(
        make_linear("wqkv", (H * (1 + gate) + 2 * K) * D, C), norm(D) if norms else None, norm(D) if norms else None,
        make_linear("wo", C, H * D), k_cache, v_cache, window, gate, list(torch.zeros(2 * int8_cache, B, K, T, 1)))
    ffn_norm = norm(C)
    feed_forward = kernels.FeedForwardTensors(make_linear("w13", 2 * FFN, C), make_linear("w2", C, FFN), FFN)
    return kernels.LayerTensors(attention_norm, attention, ffn_norm, feed_forward), weights


def layer_in_fp64(layer: kernels.LayerTensors, w: dict[str, Tensor], caches: Tensor, x: Tensor, cos: Tensor,
                  sin: Tensor, logn: Tensor | None, input_pos: Tensor, rounding: tuple | None = None) -> Tensor:
    """caches [2, B, K, T, D] are written to. rounding: of activations, for quantize_activations_reference."""
    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return x * scale * (weight.double() + OFFSET * attention.output_gate)

    def multiply(name: str, x: Tensor) -> Tensor:
        tensors: list[Tensor] = getattr(layer.feed_forward if name in ("w13", "w2") else attention, name)
        own = {torch.uint8: 3, torch.int8: 2}.get(tensors[0].dtype, 1)
        if rounding:
            x = kernels.quantize_activations_reference(x, *rounding).double()
        return x @ w[name].T + (tensors[own].double() if len(tensors) > own else 0)

    def rotate(x: Tensor) -> Tensor:
        x, rest = x[..., :cos.size(-1)], x[..., cos.size(-1):]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((x * cos.double() + torch.cat((-second, first), dim=-1) * sin.double(), rest), dim=-1)
    (B, S, _), attention = x.shape, layer.attention
    heads = multiply("wqkv", norm(x, layer.attention_norm)).view(B, S, -1, D)
    q, k, v, gates = heads.split([H, K, K, H * attention.output_gate], dim=2)
    q = rotate(norm(q, attention.q_norm)) * (1 if logn is None else logn.double())
    k = rotate(norm(k, attention.k_norm))
    if attention.scales:
        k, v = (q * scales.double() for q, scales in map(kernels.quantize_heads, (k, v)))
    for b in range(B):
        caches[0][b, :, input_pos[b]], caches[1][b, :, input_pos[b]] = k[b].transpose(0, 1), v[b].transpose(0, 1)
    y = attention_in_fp64(q, *caches, input_pos, attention.window)
    x = x + multiply("wo", y * gates.flatten(2).sigmoid() if attention.output_gate else y)
    gate, up = multiply("w13", norm(x, layer.ffn_norm)).chunk(2, dim=-1)
    return x + multiply("w2", torch.nn.functional.silu(gate) * up)


def step_inputs(B: int, S: int, start: int, R: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin, input_pos [B, S], where every row stands one further than the row before."""
    angles = torch.randn(B, S, 1, R)
    return angles.cos(), angles.sin(), start + torch.arange(S) + torch.arange(B)[:, None]


@needs_ops
@pytest.mark.parametrize("quantize_activations", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_fused_layers(kind: str, dtype: torch.dtype, quantize_activations: bool) -> None:
    """Two layers against their definition: prefill of 20 tokens, then one and five more, in one row and in two. With
    gates, also RoPE of a part and norms with an offset. Keys and values in int8 may fall to either side of a step."""
    tolerance, rounding = 3e-2 if dtype == BF16 else 2e-5, None
    if rounds and quantize_activations and kind != "plain":
        rounding = (torch.int16, 256) if kind == "int8" else (torch.int8, 32)
        tolerance += 2e-4 if kind == "int8" else 2e-2
    for B, norms, biases, logn, gate, int8_cache in (
            (1, True, False, False, False, False), (2, False, True, True, False, False),
            (1, True, False, False, True, False), (1, True, False, False, False, True),
            (2, False, True, True, True, True)):
        both = [make_layer(kind, dtype, B, 48, window, norms, biases, gate, int8_cache) for window in (0, 7)]
        allowed = tolerance + 1e-2 * int8_cache
        layers, caches = [layer for layer, _ in both], torch.zeros(2, 2, B, K, 48, D, dtype=torch.float64)
        fused = kernels.fuse(layers, H, EPS, OFFSET * gate, quantize_activations)
        for S, start in ((20, 0), (1, 20), (5, 21)):
            x, (cos, sin, input_pos) = torch.randn(B, S, C).to(dtype), step_inputs(B, S, start, D // (1 + gate))
            factors = 1 + torch.rand(B, S, 1, 1) if logn else None
            y, expected = kernels.run_fused(fused, x, cos, sin, factors, input_pos), x.double()
            for (layer, weights), cache in zip(both, caches):
                expected = layer_in_fp64(layer, weights, cache, expected, cos, sin, factors, input_pos,
                                         rounding if rounding and B * S <= MOST_ROUNDED[kind] else None)
            assert kernels.accepts(fused, x) and y.dtype == dtype and error(y, expected) < allowed, (B, S)
        for layer, cache in zip(layers, caches):
            keys, values = kernels.dequantize_caches(layer.attention[4:6], layer.attention.scales, torch.float64)
            assert error(keys, cache[0]) < allowed and error(values, cache[1]) < allowed


@needs_ops
def test_fused_layers_keep_their_tensors_and_no_longer() -> None:
    layer, _ = make_layer("plain", FP32)
    fused, x = kernels.fuse([layer], H, EPS, 0.0, True), torch.randn(1, 1, C)
    cos, sin, input_pos = step_inputs(1, 1, 0)
    expected = kernels.run_fused(fused, x, cos, sin, None, input_pos)
    weight, cache = weakref.ref(layer.attention.wqkv[0]), weakref.ref(layer.attention.k_cache)
    del layer
    gc.collect()
    assert weight() is not None and torch.equal(kernels.run_fused(fused, x, cos, sin, None, input_pos), expected)
    del fused
    gc.collect()
    assert weight() is None and cache() is None


@needs_ops
def test_copied_fused_layers_are_refused() -> None:
    """A copy would write to the original's caches."""
    fused = copy.deepcopy(kernels.fuse([make_layer("plain", FP32)[0]], H, EPS, 0.0, True))
    cos, sin, input_pos = step_inputs(1, 1, 0)
    for handle in (fused.handle, fused.handle[:8], torch.zeros(0, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="fuse the layers again"):
            kernels.run_fused(fused._replace(handle=handle), torch.randn(1, 1, C), cos, sin, None, input_pos)


def changed(layer: kernels.LayerTensors, **change: object) -> kernels.LayerTensors:
    """The layer with other tensors, wherever they are in it."""
    def fields_of(part: tuple) -> dict:
        return {name: value for name, value in change.items() if name in part._fields}
    attention = layer.attention._replace(**fields_of(layer.attention))
    feed_forward = layer.feed_forward._replace(**fields_of(layer.feed_forward))
    return layer._replace(attention=attention, feed_forward=feed_forward, **fields_of(layer))


@needs_ops
@pytest.mark.parametrize("change", [
    dict(attention_norm=torch.ones(C + 1)), dict(ffn_norm=torch.ones(C - 1)), dict(q_norm=None),
    dict(k_norm=torch.ones(D + 1)), dict(wqkv=[torch.ones((H + 2 * K) * D, C + 1)]), dict(wo=[]),
    dict(w13=[torch.ones(FFN, C)]), dict(w2=[torch.ones(C, FFN).bfloat16()]),
    dict(w2=[torch.ones(C, FFN), torch.ones(C + 1)]), dict(size=0), dict(size=FFN + 1), dict(output_gate=True),
    dict(n_expert=2, n_chosen=1), dict(n_expert=1, n_chosen=2, router=[torch.ones(1, C)]),
    dict(k_cache=torch.zeros(1, K, 47, D)),
    dict(v_cache=torch.zeros(1, K, 48, D).bfloat16()),
    dict(k_cache=torch.zeros(1, 3, 48, D), v_cache=torch.zeros(1, 3, 48, D)),
    dict(scales=[torch.ones(1, K, 48, 1)] * 2),
    dict(k_cache=torch.zeros(2, K, 48, D), v_cache=torch.zeros(2, K, 48, D))], ids=lambda change: "-".join(change))
def test_layers_that_do_not_fit_are_refused(change: dict) -> None:
    layer, _ = make_layer("plain", FP32)
    handle = torch.ops.qwen_fast.fuse_layers(H, EPS, 0.0, True)
    kernels.add_layer(handle, layer)
    with pytest.raises(RuntimeError, match="add_attention: |add_feed_forward: |linear|caches|norm|rows"):
        kernels.add_layer(handle, changed(layer, **change))


@needs_ops
def test_run_fused_refuses_what_does_not_fit() -> None:
    fused, x = kernels.fuse([make_layer("plain", FP32)[0]], H, EPS, 0.0, True), torch.randn(1, 1, C)
    cos, sin, input_pos = step_inputs(1, 1, 0)
    with pytest.raises(RuntimeError, match="outside the cache"):
        kernels.run_fused(fused, x, cos, sin, None, input_pos + 48)
    fitting = dict(x=x, cos=cos, sin=sin, logn=None, input_pos=input_pos)
    for change in (dict(x=x.double()), dict(x=x[0]), dict(x=x[:, :0]), dict(x=x[..., 1:]), dict(cos=cos[..., 1:]),
                   dict(sin=sin.double()), dict(logn=cos), dict(input_pos=input_pos.int()),
                   dict(input_pos=input_pos.expand(2, 1))):
        with pytest.raises(RuntimeError):
            kernels.run_fused(fused, **fitting | change)
    with pytest.raises(RuntimeError, match="no layers"):
        kernels.run_fused(fused._replace(handle=torch.ops.qwen_fast.fuse_layers(H, EPS, 0.0, True)), **fitting)
    with pytest.raises(RuntimeError, match="heads"):
        torch.ops.qwen_fast.fuse_layers(0, EPS, 0.0, True)


def test_what_cannot_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = make_layer("plain", FP32)

    def fuse(**changes) -> kernels.FusedLayers | None:
        return kernels.fuse([layer, changed(layer, **changes)], H, EPS, 0.0, True)
    full = layer.attention.k_cache
    for cache in (torch.zeros(1, K, 48, 24), torch.zeros(1, K, 48, kernels.MAX_HEAD + 16), full.half(), full.bfloat16(),
                  full.to("meta")):
        assert fuse(k_cache=cache, v_cache=cache) is None
    assert fuse(attention_norm=torch.ones(C).bfloat16()) is None and fuse(v_cache=full.bfloat16()) is None
    int8, scales = full.to(torch.int8), [torch.ones(1, K, 48, 1)] * 2
    assert fuse(k_cache=int8, v_cache=int8) is None and fuse(scales=scales) is None
    assert (fuse(k_cache=int8, v_cache=int8, scales=scales) is not None) == HAVE_OPS
    fused = fuse()
    assert kernels.fuse([], H, EPS, 0.0, True) is None and (fused is not None) == HAVE_OPS
    assert kernels.accepts(fused, torch.zeros(1, 2, C)) == HAVE_OPS
    assert not any(kernels.accepts(f, x) for f, x in (
        (None, torch.zeros(1, 2, C)), (fused, torch.zeros(1, 2, C).double()), (fused, torch.zeros(1, 0, C))))
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert fuse() is None


# ---- experts

E_, SIZE, WIDTH = 6, 24, 48                       # experts' rows: whole blocks of 16


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_experts(kind: str, dtype: torch.dtype) -> None:
    """The operator and both of its twins against the definition, for few and many tokens and one-sided choices."""
    rounding = dict(int8=(torch.int16, 256), int4=(torch.int8, 32)).get(kind) if rounds else None

    def in_fp64(x: Tensor, rounding: tuple | None) -> Tensor:
        """Of each token and each of its experts [M, k, WIDTH]."""
        def multiply(w: Tensor, x: Tensor) -> Tensor:
            x = kernels.quantize_activations_reference(x, *rounding).double() if rounding else x
            return (w @ x[..., None])[..., 0]
        gate, up = multiply(gate_up[chosen], x.double()[:, None]).chunk(2, dim=2)
        return multiply(down[chosen], torch.nn.functional.silu(gate) * up)

    def make(N: int, K_in: int) -> tuple[list[Tensor], Tensor]:
        if kind == "int4":
            weight, scales, zeros, w = int4_weights(N, K_in, 32)
            return list(kernels.pack_int4(weight, scales, zeros, 32)), w
        if kind == "int8":
            *tensors, w = int8_weights(N, K_in)
            return tensors, w
        w = (torch.randn(N, K_in) / 4).to(dtype)
        return [w], w.double()
    (w13, gate_up), (w2, down) = make(E_ * 2 * SIZE, WIDTH), make(E_ * WIDTH, SIZE)
    gate_up, down = gate_up.unflatten(0, (E_, -1)), down.unflatten(0, (E_, -1))
    for M, k in ((1, 1), (1, 3), (2, E_), (5, 2), (16, 4), (17, 2), (90, 3)):
        x, weights = torch.randn(M, WIDTH).to(dtype), torch.rand(M, k)
        chosen = torch.stack([torch.randperm(E_)[:k] for _ in range(M)])
        chosen[M // 2:] = torch.arange(k)         # an expert of many tokens
        exact = in_fp64(x, None)
        expected = (exact * weights[..., None]).sum(1)
        tolerance = 3e-2 if dtype == BF16 else 2e-5
        for compute in (kernels.experts, kernels.experts_gathered, kernels.experts_one_by_one):
            unrounded = (False,) if compute is kernels.experts else ()
            y = compute(x, chosen, weights, w13, w2, E_, SIZE, *unrounded)
            assert y.dtype == dtype and error(y, expected) < tolerance, (compute, M, k)
        few = chosen.flatten().bincount()[chosen] <= MOST_ROUNDED.get(kind, 0)          # of an expert
        expected = (torch.where(few[..., None], in_fp64(x, rounding), exact) * weights[..., None]).sum(1)
        assert error(kernels.experts(x, chosen, weights, w13, w2, E_, SIZE), expected) < tolerance + ROUNDED, (M, k)


@needs_ops
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """By no bit, also with more threads than cores: linears large enough to be shared out, experts, packing and layers
    over a short text. Attention adds up a long one in as many parts as threads want: to rounding."""
    N, K_in, before = 1000, 896, torch.get_num_threads()
    weight, scales, zeros, _ = int4_weights(N, K_in, 32)
    int8, scale, _ = int8_weights(N, K_in)
    plain, xs = torch.randn(N, K_in), [torch.randn(M, K_in) for M in (1, 3, 16)]
    chosen, expert_weights = torch.stack([torch.randperm(E_)[:3] for _ in range(9)]), torch.rand(9, 3)
    w13, w2, x9 = torch.randn(E_ * 2 * SIZE, WIDTH), torch.randn(E_ * WIDTH, SIZE), torch.randn(9, WIDTH)
    odd13, odd2, x_odd = int8_weights(E_ * 2 * 12, 2048)[:2], int8_weights(E_ * 2048, 12)[:2], torch.randn(9, 2048)
    layer, (cos, sin, input_pos) = make_layer("int4", FP32)[0], step_inputs(1, 5, 20)
    fused, x5 = kernels.fuse([layer], H, EPS, 0.0, True), torch.randn(1, 5, C)
    q, k, v = torch.randn(1, 2, 4, 64), torch.randn(1, 2, 3000, 64), torch.randn(1, 2, 3000, 64)

    def results() -> list[Tensor]:
        packed = kernels.pack_int4(weight, scales, zeros, 32)
        linears = [y for x in xs for quantize in (False, True) for y in (
            kernels.linear(x, plain), kernels.linear(x.bfloat16(), plain.bfloat16()),
            kernels.int8_linear(x, int8, scale, quantize), kernels.int4_linear(x, *packed, N, quantize))]
        return [*packed, *linears, kernels.experts(x9, chosen, expert_weights, [w13], [w2], E_, SIZE),
                kernels.experts(x_odd, chosen, expert_weights, [*odd13], [*odd2], E_, 12),
                kernels.run_fused(fused, x5, cos, sin, None, input_pos)]
    try:
        found = []
        for threads in (1, 2, 4, 8):
            torch.set_num_threads(threads)
            found.append((results(), kernels.attend(q, k, v, torch.tensor([2000, 2999]))))
    finally:
        torch.set_num_threads(before)
    for others, attended in found[1:]:
        assert all(map(torch.equal, found[0][0], others)) and error(attended, found[0][1].double()) < 3e-6


@needs_ops
def test_experts_that_do_not_fit_are_refused() -> None:
    x, chosen, weights = torch.randn(2, WIDTH), torch.tensor([[0, 1], [2, 5]]), torch.rand(2, 2)
    w13, w2 = torch.randn(E_ * 2 * SIZE, WIDTH), torch.randn(E_ * WIDTH, SIZE)
    good = dict(x=x, chosen=chosen, weights=weights, w13=[w13], w2=[w2], n_expert=E_, size=SIZE,
                quantize_activations=True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.qwen_fast.experts, tuple(good.values()), test_utils=checks)
    for change in (dict(chosen=chosen + 1), dict(chosen=chosen - 1), dict(chosen=chosen.int()), dict(x=x[:1]),
                   dict(chosen=chosen[:, :1]), dict(weights=weights.double()), dict(n_expert=E_ + 1),
                   dict(size=SIZE // 2), dict(w13=[w13.bfloat16()]), dict(w2=[])):
        with pytest.raises((RuntimeError, IndexError)):
            torch.ops.qwen_fast.experts(**good | change)
    halves = [list(kernels.pack_int4(*int4_weights(N, 32, 32)[:3], 32)) for N in (E_ * 2 * 4, E_ * 32)]
    with pytest.raises(RuntimeError, match="not whole blocks"):
        kernels.experts(x[:, :32].contiguous(), chosen, weights, *halves, E_, 4)


# ---- compilation

class Block(torch.nn.Module):
    """A linear and attention over a cache, in a region that the compiler handles once for all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3 * 64, 64), requires_grad=False)
        self.register_buffer("k_cache", torch.zeros(1, 1, 40, 64))
        self.register_buffer("v_cache", torch.zeros(1, 1, 40, 64))

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, input_pos: Tensor) -> Tensor:
        q, k, v = kernels.linear(x, self.weight).view(1, -1, 3, 64).split(1, dim=2)
        self.k_cache[:, :, input_pos], self.v_cache[:, :, input_pos] = k.transpose(1, 2), v.transpose(1, 2)
        return x + kernels.attend(q, self.k_cache, self.v_cache, input_pos)


@torch.inference_mode()
def test_fullgraph_compilation() -> None:
    """One token and many, in nested regions; the integer linears. aot_eager does all but generate code.

    Fused layers are compiled in test_model: aot_eager copies what an operator writes to, their handle as well.
    """
    def forward(x: Tensor, input_pos: Tensor) -> Tensor:
        for block in blocks:
            x = block(x, input_pos)
        return x
    blocks = [Block(), Block()]
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for S in (1, 20):
        x, input_pos = torch.randn(1, S, 64), torch.arange(S)
        assert torch.allclose(compiled(x, input_pos), forward(x, input_pos), atol=1e-3, rtol=1e-4)
    weight, scales, zeros, _ = int4_weights(32, 64, 32)
    packed, (w8, scale, _) = kernels.pack_int4(weight, scales, zeros, 32), int8_weights(32, 64)

    def integer(x: Tensor) -> Tensor:
        return kernels.int4_linear(x, *packed, 32) + kernels.int8_linear(x, w8, scale)
    compiled, x = torch.compile(integer, fullgraph=True, backend="aot_eager"), torch.randn(1, 64)
    assert torch.allclose(compiled(x), integer(x), atol=1e-3, rtol=1e-4)


@needs_ops
def test_fakes_agree_with_the_ops() -> None:
    weight, scales, zeros, _ = int4_weights(32, 64, 32)
    cache, x = torch.randn(2, 2, 9, 16), torch.randn(2, 3, 64)
    ops, checks = torch.ops.qwen_fast, ("test_schema", "test_faketensor")
    packed = kernels.pack_int4(weight, scales, zeros, 32)
    for tensors, N in (([torch.randn(5, 64)], 5), (int8_weights(5, 64)[:2], 5), (packed, 32)):
        torch.library.opcheck(ops.linear, (x, list(tensors), N, True), test_utils=checks)
    int8, scales = kernels.quantize_heads(cache)
    for keys, both in ((cache, []), (int8, [scales, scales])):
        torch.library.opcheck(ops.attend, (torch.randn(2, 1, 4, 16), keys, keys, torch.tensor([3]), 0, both),
                              test_utils=checks)
    fused = kernels.fuse([make_layer("plain", FP32)[0]], H, EPS, 0.0, True)
    cos, sin, input_pos = step_inputs(1, 2, 3)
    arguments = (torch.randn(1, C, 2).transpose(1, 2), fused.handle, cos, sin, None, input_pos)
    real = ops.run_fused(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ops.run_fused(*(mode.from_tensor(t) if t is not None else None for t in arguments))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


# ---- memory

@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> memory.HugePages:
    """An arena of its own, of smaller chunks."""
    monkeypatch.setattr(memory.HugePages, "CHUNK", 16 << 20)
    monkeypatch.setattr(memory, "arena", functools.cache(memory.HugePages))
    return memory.arena()


def test_copy_to_copies(pages: memory.HugePages) -> None:
    source = torch.randn(1024, 1100)
    copied = kernels.copy_to(source, "cpu", BF16)
    assert torch.equal(copied, source.bfloat16()) and copied.data_ptr() != source.data_ptr() and copied.is_contiguous()
    assert kernels.copy_to(source, "cpu", FP32).data_ptr() != source.data_ptr()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages here")
def test_vectors_do_not_keep_the_memory_of_matrices(pages: memory.HugePages) -> None:
    """Eight matrices of half a chunk, each with a vector, as weights are read: the matrices are packed later and go."""
    size, matrices, vectors, chunks = pages.CHUNK // 2 - memory.HUGE_PAGE, [], [], {}
    for _ in range(8):
        matrices.append(kernels.copy_to(torch.zeros(1, size, dtype=torch.uint8), "cpu", torch.uint8))
        vectors.append(kernels.copy_to(torch.ones(5), "cpu", FP32))
        chunks[id(pages.chunk)] = weakref.ref(pages.chunk)
    assert len(chunks) == 4
    matrices.clear()
    gc.collect()
    assert sum(chunk() is not None for chunk in chunks.values()) == 1      # the one that is being filled
    assert all(vector.sum() == 5 for vector in vectors)
    kernels.trim_memory()


def test_huge_zeros_are_apart_and_live_as_long_as_they_are_used(pages: memory.HugePages) -> None:
    """Small ones, one larger than a chunk of the arena, and more than a chunk of others after them."""
    sizes = [1, 100, pages.CHUNK + 5, 3, *[pages.CHUNK // 4] * 9, 7]
    tensors = [kernels.huge_zeros((size,), torch.uint8) for size in sizes]
    assert not any(t.any() for t in tensors) and all(t.data_ptr() % 64 == 0 for t in tensors)
    for i, t in enumerate(tensors):
        t.fill_(i + 1)
    del t
    assert all((tensors.pop() == len(tensors) + 1).all() for _ in sizes)
    assert kernels.huge_zeros((0, 4), FP32).shape == (0, 4) and kernels.huge_zeros((2, 3), FP32).storage_offset() == 0


# ---- building

@pytest.mark.parametrize("setting,said", [
    ({"CXX": "/nonexistent/c++"}, "nonexistent"), ({"CXX": "/bin/false"}, "failed"),
    ({"QWEN_FAST_KERNELS": "off"}, None), ({"TORCH_EXTENSIONS_DIR": "/proc/nowhere"}, "/proc/nowhere")])
def test_without_a_compiler_pytorch_runs(setting: dict[str, str], said: str | None, tmp_path: Path, monkeypatch,
                                         capsys) -> None:
    for name, value in {"TORCH_EXTENSIONS_DIR": str(tmp_path), **setting}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build, "unavailable_reason", functools.cache(build.unavailable_reason.__wrapped__))
    x, w, q, cache = torch.randn(2, 64), torch.randn(5, 64), torch.randn(1, 2, 4, 16), torch.randn(1, 2, 9, 16)

    def use() -> tuple[Tensor, ...]:
        return (kernels.linear(x, w), kernels.attend(q, cache, cache, torch.tensor([3, 4])),
                kernels.int8_linear(x, w.to(torch.int8), torch.ones(5)))
    called: set[str] = set()
    monkeypatch.setattr(kernels, "linear_reference", lambda x, w: called.add("linear") or x @ w.T)
    torch.testing.assert_close(torch.compile(use, fullgraph=True, backend="eager")(), use())
    assert called == {"linear"} and kernels.describe().startswith("PyTorch kernels (")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the C++ kernels are not used")]
    assert len(lines) == (said is not None) and (said is None or said in lines[0])


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that writes a line, and a cache folder for it."""
    script = tmp_path / "c++"
    script.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nsleep 0.2\necho built > "$2"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return script


def test_two_processes_build_at_once(compiler: Path, capsys) -> None:
    """The library appears whole under its name, nothing else stays behind, and the user is told what takes the time."""
    with ThreadPoolExecutor() as pool:
        libraries = set(pool.map(lambda _: kernels.built_library(), range(2)))
    library, = libraries
    assert library.read_text() == "built\n" and list(library.parent.iterdir()) == [library]
    assert "building the C++ kernels" in capsys.readouterr().err
    assert kernels.built_library() == library and not capsys.readouterr().err


def test_a_change_of_any_source_is_built_anew(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(build.SOURCES, tmp_path / "kernels"))
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "build", lambda library, root, flags: None)
    sources = [*folder.glob("*.h"), *folder.glob("*.cpp")]
    names = [kernels.built_library()]
    for source in sources:
        source.write_text(source.read_text() + "\n")
        names.append(kernels.built_library())
    assert len(sources) > 5 and len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.long
@needs_ops
@pytest.mark.skipif(platform.machine() != "x86_64" or bool(CPU), reason="built for x86-64, and once")
@pytest.mark.parametrize("cpu", ["haswell", "skylake-avx512", "cascadelake", "cooperlake", "emulated"])
def test_other_cpus(tmp_path: Path, cpu: str) -> None:
    """The kernels as other CPUs build them, in another process: AVX2, AVX512 without BF16 and VNNI, without BF16, and
    without AMX.

    On a CPU without VNNI, also its path with plain C++ in the place of its instruction. -O1 compiles in half the time.
    """
    needed = {"haswell": "avx512f", "skylake-avx512": "avx512bw", "cascadelake": "avx512_vnni",
              "cooperlake": "amx_bf16"}
    if cpu == "emulated" and vnni or needed.get(cpu, "fpu") not in flags:
        pytest.skip("this CPU's own build is that one, or cannot run it")
    target = "native -DEMULATE_VNNI" if cpu == "emulated" else cpu
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec g++ $(echo "$@" | sed "s/-march=native/-march={target}/; s/-O3/-O1/")\n')
    compiler.chmod(0o755)
    env = dict(os.environ, TEST_CPU=cpu, CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(tmp_path))
    chosen = ["-m", "not slow", "-k", "linear or attend or fused"]
    command = [sys.executable, "-m", "pytest", "-n", "0", *chosen, __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "[100%]" in run.stdout and list(tmp_path.glob("kernels_*.so")), run.stdout[-2000:]
