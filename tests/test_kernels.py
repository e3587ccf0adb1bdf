"""Every kernel against its plain PyTorch twin, computed in fp64.

Tolerances are relative to the largest result. bf16 results carry half a unit in the last of 8 bits: 2^-8 = 0.4 %. fp32 sums of up to 5000 products
differ by their order: 3e-6. Where activations are rounded to int8 the twin rounds as well, but a value on the boundary between two steps may
fall to either side; one step is 1/127 of the group's largest value in one of K_in terms: 2e-3 covers a few of them at the sizes used here.
"""
import copy
import functools
import gc
import mmap
import os
import platform
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

import generate
import kernels

BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = {BF16: 4e-3, FP32: 3e-6}
ROUNDED = 2e-3
HAVE_OPS = kernels.unavailable_reason() is None
needs_ops = pytest.mark.skipif(not HAVE_OPS, reason="kernels.cpp could not be built here")
vnni = "avx512_vnni" in kernels.cpu_flags().split() and os.environ.get("TEST_MARCH", "cascadelake") == "cascadelake"
SHAPES = [(64, 64), (33, 78), (7, 1024), (1000, 896), (130, 4864)]      # [N, K_in], with tails in both
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16]


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
    scales, zeros = (torch.rand(N, groups) * 0.1 + 0.01).bfloat16(), torch.randint(0, 241, (N, groups), dtype=torch.uint8)
    group = torch.arange(K_in) // groupsize
    w = scales.double()[:, group] * (q - zeros[:, group].double() / 16)
    return (q[:, ::2] + 16 * q[:, 1::2]).to(torch.uint8), scales, zeros, w


@needs_ops
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("N,K_in", [*SHAPES, (5, 3)])
def test_linear(N: int, K_in: int, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K_in).to(dtype)
    for M in TOKENS:
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
@pytest.mark.parametrize("B,S,H,K,D,T", [(1, 1, 16, 8, 128, 300), (2, 3, 14, 2, 64, 100), (1, 16, 4, 4, 80, 70), (1, 1, 8, 1, 256, 1000),
                                         (3, 1, 6, 3, 96, 513), (1, 24, 4, 2, 64, 90)])
def test_attend(B: int, S: int, H: int, K: int, D: int, T: int, dtype: torch.dtype) -> None:
    """Windows, rows at different positions, and NaN where no query may look. The fast path and both plain ones."""
    k, v = torch.randn(2, B, K, T, D).to(dtype)
    q = torch.randn(B, S, H, D).to(dtype)
    tolerance = 2 * TOLERANCE[dtype]              # PyTorch's own attention rounds its weights to bf16 before it sums the values
    for window in (0, 1, 17, 200):
        for input_pos in (torch.randint(0, T - S, (B, 1)) + torch.arange(S), torch.arange(T - S, T), torch.arange(S)):
            expected = attention_in_fp64(q, k, v, input_pos.expand(B, S), window)
            assert error(kernels.attend_reference(q, k, v, input_pos, window), expected) < tolerance
            assert error(kernels.attend_sliced(q, k, v, input_pos, window), expected) < tolerance
            unseen_k, unseen_v = k.clone(), v.clone()
            unseen_k[:, :, int(input_pos.max()) + 1:] = unseen_v[:, :, int(input_pos.max()) + 1:] = torch.nan
            y = kernels.attend(q, unseen_k, unseen_v, input_pos, window)
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
    finally:
        torch.set_num_threads(threads)


@needs_ops
def test_attend_refuses_positions_outside_the_cache() -> None:
    q, cache = torch.randn(1, 1, 4, 64), torch.randn(1, 4, 8, 64)
    for position in (-1, 8):
        with pytest.raises(RuntimeError, match="outside the cache"):
            kernels.attend(q, cache, cache, torch.tensor([position]))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("N,K_in", SHAPES)
def test_int8_linear(N: int, K_in: int, dtype: torch.dtype) -> None:
    weight, scale = torch.randint(-128, 128, (N, K_in), dtype=torch.int8), torch.rand(N) * 0.01
    w = weight.double() * scale.double()[:, None]
    for M in [*TOKENS, 17, 40]:
        x = torch.randn(M, K_in).to(dtype)
        tolerance = TOLERANCE[dtype] * (1 if HAVE_OPS and M <= 16 else 2)
        assert error(kernels.int8_linear(x, weight, scale, exact=True), x.double() @ w.T) < tolerance, M
        rounded = kernels.quantize_activations_reference(x, torch.int16, 256) if HAVE_OPS and vnni and M <= 16 else x
        assert error(kernels.int8_linear(x, weight, scale), rounded.double() @ w.T) < tolerance + ROUNDED / 256, M
        assert error(kernels.int8_linear_reference(x, weight, scale), x.double() @ w.T) < 3 * TOLERANCE[dtype], M


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("groupsize", [32, 64, 128, 256])
@pytest.mark.parametrize("N,K_in", SHAPES)
def test_int4_linear(N: int, K_in: int, groupsize: int, dtype: torch.dtype) -> None:
    weight, scales, zeros, w = int4_weights(N, K_in, groupsize)
    packed = kernels.pack_int4(weight, scales, zeros, groupsize)
    for M in [1, 3, 4, 9, 16, 40]:
        x = torch.randn(M, K_in).to(dtype)
        tolerance = TOLERANCE[dtype] * (1 if HAVE_OPS and M <= 16 else 2)
        assert error(kernels.int4_linear(x, *packed, N, exact=True), x.double() @ w.T) < tolerance, M
        rounded = kernels.quantize_activations_reference(x, torch.int8, 32) if HAVE_OPS and vnni and M <= 16 else x
        assert error(kernels.int4_linear(x, *packed, N), rounded.double() @ w.T) < tolerance + ROUNDED, M
        assert error(kernels.int4_linear_reference(x, *packed, N), x.double() @ w.T) < 3 * TOLERANCE[dtype], M


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_int4_linear_for_other_numbers_of_tokens(dtype: torch.dtype) -> None:
    """Two blocks at once, and tiles of two and three after one of four. Over so many results that the largest of them is a measure."""
    weight, scales, zeros, w = int4_weights(1000, 896, 32)
    packed = kernels.pack_int4(weight, scales, zeros, 32)
    for M in [2, 5, 6, 7]:
        x = torch.randn(M, 896).to(dtype)
        assert error(kernels.int4_linear(x, *packed, 1000, exact=True), x.double() @ w.T) < TOLERANCE[dtype] * (1 if HAVE_OPS else 2), M
        rounded = kernels.quantize_activations_reference(x, torch.int8, 32) if HAVE_OPS and vnni else x
        assert error(kernels.int4_linear(x, *packed, 1000), rounded.double() @ w.T) < TOLERANCE[dtype] * (1 if HAVE_OPS else 2) + ROUNDED, M


@pytest.mark.parametrize("groupsize", [32, 64, 128, 256])
def test_packed_int4_stands_for_the_same_weights(groupsize: int) -> None:
    for N, K_in in SHAPES:
        weight, scales, zeros, w = int4_weights(N, K_in, groupsize)
        packed = kernels.pack_int4(weight, scales, zeros, groupsize)
        assert torch.equal(kernels.dequantize_packed_int4(*packed, N, K_in, torch.float64), w)


def test_rounded_activations_are_within_half_a_step() -> None:
    x = torch.randn(5, 600) * torch.logspace(-3, 3, 600)
    for dtype, group in ((torch.int16, 256), (torch.int8, 32)):
        rounded = kernels.quantize_activations_reference(x, dtype, group)
        for start in range(0, 600, group):
            part, high = slice(start, start + group), x[:, start:start + group].abs().amax(1, keepdim=True)
            assert ((rounded - x)[:, part].abs() <= high / {torch.int8: 127, torch.int16: 127 * 257}[dtype] * 0.51).all()
    assert torch.equal(kernels.quantize_activations_reference(torch.zeros(2, 64), torch.int8, 32), torch.zeros(2, 64))


@needs_ops
def test_zero_activations_give_zero() -> None:
    weight, scales, zeros, _ = int4_weights(32, 64, 32)
    assert not kernels.int4_linear(torch.zeros(1, 64), *kernels.pack_int4(weight, scales, zeros, 32), 32).any()
    assert not kernels.int8_linear(torch.zeros(1, 64), torch.ones(32, 64, dtype=torch.int8), torch.ones(32)).any()


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
    """One token and many, in nested regions; and the integer linears."""
    def forward(x: Tensor, input_pos: Tensor) -> Tensor:
        for block in blocks:
            x = block(x, input_pos)
        return x
    blocks = [Block(), Block()]
    compiled = torch.compile(forward, fullgraph=True)
    for S in (1, 20):
        x, input_pos = torch.randn(1, S, 64), torch.arange(S)
        assert torch.allclose(compiled(x, input_pos), forward(x, input_pos), atol=1e-3, rtol=1e-4)
    weight, scales, zeros, _ = int4_weights(32, 64, 32)
    packed, w8, scale = kernels.pack_int4(weight, scales, zeros, 32), torch.ones(32, 64, dtype=torch.int8), torch.ones(32)

    def integer(x: Tensor) -> Tensor:
        return kernels.int4_linear(x, *packed, 32) + kernels.int8_linear(x, w8, scale)
    x = torch.randn(1, 64)
    assert torch.allclose(torch.compile(integer, fullgraph=True)(x), integer(x), atol=1e-3, rtol=1e-4)


@needs_ops
def test_fakes_agree_with_the_ops(tmp_path: Path) -> None:
    weight, scales, zeros, _ = int4_weights(32, 64, 32)
    cache, x = torch.randn(2, 2, 9, 16), torch.randn(2, 3, 64)
    ops, checks = torch.ops.qwen_fast, ("test_schema", "test_faketensor")
    packed = kernels.pack_int4(weight, scales, zeros, 32)
    for parts, N in (([torch.randn(5, 64)], 5), ([torch.ones(5, 64, dtype=torch.int8), torch.ones(5)], 5), (list(packed), 32)):
        torch.library.opcheck(ops.linear, (x, parts, N, False), test_utils=checks)
    torch.library.opcheck(ops.attend, (torch.randn(2, 1, 4, 16), cache, cache, torch.tensor([3]), 0), test_utils=checks)
    tiny.save(tiny.reference("qwen3"), tmp_path)
    model = generate.load_model(tmp_path, "cpu", FP32)[0]
    model.setup_caches(1, 16)
    arguments = (torch.randn(1, 1, model.args.dim), model.stack.handle, *model.rope(torch.tensor([[3]])), None, torch.tensor([[3]]))
    real = ops.layers(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ops.layers(*(mode.from_tensor(t) if t is not None else None for t in arguments))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@needs_ops
def test_a_stack_keeps_its_tensors_and_no_longer_than_the_model(tmp_path: Path) -> None:
    tiny.save(tiny.reference("qwen3"), tmp_path)
    model = generate.load_model(tmp_path, "cpu", FP32)[0]
    model.setup_caches(1, 16)
    expected = model(torch.tensor([[5]]), torch.tensor([0]))
    weight, cache = (weakref.ref(t) for t in (model.layers[0].attention.wqkv.weight, model.layers[0].attention.kv_cache.k_cache))
    layers, model.layers = model.layers, torch.nn.ModuleList()
    del layers
    gc.collect()
    assert weight() is not None and torch.equal(model(torch.tensor([[5]]), torch.tensor([0])), expected)
    del model
    gc.collect()
    assert weight() is None and cache() is None


@needs_ops
def test_larger_caches_take_the_place_of_smaller_ones(tmp_path: Path) -> None:
    tiny.save(tiny.reference("qwen3"), tmp_path)
    model = generate.load_model(tmp_path, "cpu", FP32)[0]
    model.setup_caches(1, 16)
    old = weakref.ref(model.layers[-1].attention.kv_cache.v_cache)
    model.setup_caches(1, 17)
    assert old() is None


@needs_ops
def test_a_copied_model_needs_caches_of_its_own(tmp_path: Path) -> None:
    """It does not write to the original's."""
    tiny.save(tiny.reference("qwen3"), tmp_path)
    model = generate.load_model(tmp_path, "cpu", FP32)[0]
    model.setup_caches(1, 16)
    other = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="setup_caches"):
        other(torch.tensor([[5]]), torch.tensor([0]))
    other.setup_caches(1, 16)
    torch.testing.assert_close(other(torch.tensor([[5]]), torch.tensor([0])), model(torch.tensor([[5]]), torch.tensor([0])))


@needs_ops
@pytest.mark.parametrize("change", ["weights", "table", "narrow norm", "wide linear", "caches", "dtype"])
def test_a_stack_of_what_does_not_fit_is_refused(change: str) -> None:
    """One block of 2 heads on 1 KV head of 16, 24 wide, 40 between w13 and w2."""
    weights = [torch.ones(24), torch.ones(64, 24), torch.ones(24, 32), torch.ones(24), torch.ones(80, 24), torch.ones(24, 40)]
    table, k, v = [1, 1, 0, 1, 1, 1, 1, 0], torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 8, 16)
    torch.ops.qwen_fast.stack(weights, table, 1e-6, [k], [v], 2, 40, False)
    match change:
        case "weights": weights = weights[:-1]
        case "table": table = table[:-1]
        case "narrow norm": weights[3] = torch.ones(23)
        case "wide linear": weights[1] = torch.ones(64, 25)
        case "caches": v = torch.zeros(1, 1, 9, 16)
        case "dtype": weights[5] = weights[5].bfloat16()
    with pytest.raises(RuntimeError, match="stack: |linear|caches"):
        torch.ops.qwen_fast.stack(weights, table, 1e-6, [k], [v], 2, 40, False)


def test_place_copies() -> None:
    source = torch.randn(1024, 1100)
    placed = kernels.copy_to(source, "cpu", BF16)
    assert torch.equal(placed, source.bfloat16()) and placed.data_ptr() != source.data_ptr() and placed.is_contiguous()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages here")
def test_vectors_do_not_keep_the_memory_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight matrices of half a chunk, each with a vector, as weights are read: the matrices are packed later and go."""
    monkeypatch.setattr(kernels, "arena", kernels.Arena())
    size, matrices, vectors, chunks = kernels.Arena.CHUNK // 2 - kernels.HUGE_PAGE, [], [], {}
    for _ in range(8):
        matrices.append(kernels.copy_to(torch.zeros(1, size, dtype=torch.uint8), "cpu", torch.uint8))
        vectors.append(kernels.copy_to(torch.ones(5), "cpu", FP32))
        chunks[id(kernels.arena.memory)] = weakref.ref(kernels.arena.memory)
    assert len(chunks) == 4
    matrices.clear()
    gc.collect()
    assert sum(chunk() is not None for chunk in chunks.values()) == 1      # the one that is being filled
    assert all(vector.sum() == 5 for vector in vectors)


def test_large_zeros_are_apart_and_live_as_long_as_they_are_used() -> None:
    """Small ones, one larger than a chunk of the arena, and more than a chunk of others after them."""
    sizes = [1, 100, kernels.Arena.CHUNK + 5, 3, *[kernels.Arena.CHUNK // 4] * 9, 7]
    tensors = [kernels.huge_zeros((size,), torch.uint8) for size in sizes]
    assert not any(t.any() for t in tensors) and all(t.data_ptr() % 64 == 0 for t in tensors)
    for i, t in enumerate(tensors):
        t.fill_(i + 1)
    del t
    assert all((tensors.pop() == len(tensors) + 1).all() for _ in sizes)
    assert kernels.huge_zeros((0, 4), FP32).shape == (0, 4) and kernels.huge_zeros((2, 3), FP32).storage_offset() == 0


@pytest.mark.parametrize("setting,said", [({"CXX": "/nonexistent/c++"}, "nonexistent"), ({"CXX": "/bin/false"}, "failed"),
                                          ({"QWEN_FAST_KERNELS": "off"}, None), ({"TORCH_EXTENSIONS_DIR": "/proc/nowhere"}, "/proc/nowhere")])
def test_without_a_compiler_pytorch_runs(setting: dict[str, str], said: str | None, tmp_path: Path, monkeypatch, capsys) -> None:
    for name, value in {"TORCH_EXTENSIONS_DIR": str(tmp_path), **setting}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kernels, "problem", functools.cache(kernels.unavailable_reason.__wrapped__))
    x, w, q, cache = torch.randn(2, 64), torch.randn(5, 64), torch.randn(1, 2, 4, 16), torch.randn(1, 2, 9, 16)

    def use() -> tuple[Tensor, ...]:
        return kernels.linear(x, w), kernels.attend(q, cache, cache, torch.tensor([3, 4])), kernels.int8_linear(x, w.to(torch.int8), torch.ones(5))
    called: set[str] = set()
    monkeypatch.setattr(kernels, "linear_reference", lambda x, w: called.add("linear") or x @ w.T)
    torch.testing.assert_close(torch.compile(use, fullgraph=True, backend="eager")(), use())
    assert called == {"linear"} and kernels.describe().startswith("PyTorch kernels (")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kernels.cpp is not used")]
    assert len(lines) == (said is not None) and (said is None or said in lines[0])


def test_two_processes_build_at_once(tmp_path: Path, monkeypatch) -> None:
    """The library appears whole under its name, and nothing else stays behind."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nsleep 0.2\necho built > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with ThreadPoolExecutor() as pool:
        libraries = set(pool.map(lambda _: kernels.built_library(), range(2)))
    assert len(libraries) == 1 and libraries.pop().read_text() == "built\n"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
@needs_ops
@pytest.mark.skipif(platform.machine() != "x86_64" or "TEST_MARCH" in os.environ, reason="built for x86-64, and once")
@pytest.mark.parametrize("march", ["haswell", "skylake-avx512", "cascadelake"])
def test_older_cpus(tmp_path: Path, march: str) -> None:
    """The same kernels as such a CPU would build them: AVX2, AVX512 without BF16 and VNNI, and without BF16. The tests above but this one, in another process."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nfor flag; do shift; set -- "$@" "$(echo "$flag" | sed "s/^-march=native$/-march=$TEST_MARCH/")"; done\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    env = dict(os.environ, TEST_MARCH=march, CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(tmp_path))
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", "linear or attend or all_layers", __file__,
                          str(Path(__file__).with_name("test_model.py"))], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "[100%]" in run.stdout and list(tmp_path.glob("kernels_*.so")), run.stdout[-2000:]
