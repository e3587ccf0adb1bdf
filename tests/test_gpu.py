"""The GPU kernels without a GPU: in Triton's interpreter against their twins, and compiled for several GPUs."""
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT

triton = pytest.importorskip(
    "triton", reason="triton is not installed (pip install --no-deps -r requirements-gpu-tests.txt)")
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import formats
import kernels
from config import ModelArgs
from kernels import gpu, gpu_deltanet
from kernels.gpu import COMPILED, LIBRARY, Tile, Weights
from model import Transformer

gpu_layers = importlib.import_module("kernels.gpu_layers")     # the package's own name for it is None without a GPU

# fp16 results carry half a unit in the last of 11 bits, and PyTorch sums their products in an order of its own. One
# token meets quantized weights plus 2^15 + 128 or 2^7, which are subtracted from the sum: that costs some bits of fp32.
ALLOWED = {"weights": 0.0, "words": 5e-4, "dequantize": 0.0, "norm": 1e-6, "planes, int8": 5e-4, "planes, int4": 5e-4,
           **{f"linear, {name}, {tokens} token{'s' * (tokens == 'few')}": tolerance
              for name, one, few in (("fp32", 1e-5, 1e-5), ("fp16", 2e-3, 2e-3), ("int8", 5e-4, 1e-5),
                                     ("int4", 5e-4, 1e-5), ("int8, fp16", 2e-3, 2e-3), ("int4, fp16", 2e-3, 2e-3))
              for tokens, tolerance in (("one", one), ("few", few))},
           **{f"{name}, {dtype}": tolerance for name in ("prepare", "attend, whole", "attend, split")
              for dtype, tolerance in (("fp32", 1e-5), ("fp16", 2e-3))},
           "delta net, fp32": 1e-5, "delta net, fp16": 1e-5,      # whose inputs alone are fp16
           "choose": 1e-5,
           **{f"{kind}, {name}": tolerance for kind in ("experts", "layers", "layers of experts", "layers of a hybrid",
                                                        "layers of a hybrid with experts")
              for name, tolerance in (("none", 1e-5), ("int8", 1e-3), ("int4", 1e-3))}}


# ---- in the interpreter

@pytest.fixture(scope="module")
def differences() -> dict[str, str]:
    """What gpu_interpreter.py prints: in a process of its own, because Triton interprets all or nothing."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "gpu_interpreter.py"], capture_output=True, text=True)
    found = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert found.keys() == ALLOWED.keys(), done.stderr[-2000:]
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("case", ALLOWED)
def test_kernels_equal_their_twins(case: str, differences: dict[str, str]) -> None:
    assert float(differences[case]) <= ALLOWED[case]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it takes ten minutes")
def test_gpu_check_runs_its_first_stage_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "gpu_check.py", "--out", tmp_path], capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.endswith("all parity checks passed\n"), done.stderr
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(results["kernels"]) == 21 and not results["failed"]


# ---- compiled

TARGETS = {"sm_75": GPUTarget("cuda", 75, 32), "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
           "gfx90a": GPUTarget("hip", "gfx90a", 64), "gfx942": GPUTarget("hip", "gfx942", 64),
           "gfx1100": GPUTarget("hip", "gfx1100", 32)}
NO_TENSOR_CORES = {"sm_75", "gfx1100"}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
         torch.uint8: "u8", torch.int8: "i8"}
BITS = (16, 8, 4)
FEW_TILES = {"gfx1100"}                       # whose small tiles spill: timing finds the others
SPILLING = {("sm_80", 16, (4, 512, 1, 2))}    # the assembler moves all loads to the front: timing avoids it there


@pytest.fixture(scope="module", autouse=True)
def compiled_anew(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


class Compiled(SimpleNamespace):
    registers: int
    spills: int           # bytes of stack on NVIDIA, vector registers on AMD
    wide_loads: int       # instructions that read 16 bytes for a thread


def launched(compute: Callable[[], object], target: str, monkeypatch: pytest.MonkeyPatch,
             number: int = -1) -> Compiled:
    """A kernel that a function launches, by default the last, as a GPU would get it. It computes with meta tensors."""
    launches = []

    def record(kernel, grid, *args, **options) -> None:
        launches.append((kernel, args, options))

    class Dequantize:
        def __getitem__(self, grid) -> Callable:
            return lambda *args, **options: record(dequantize_kernel, grid, *args, **options)
    dequantize_kernel = gpu.dequantize_kernel
    monkeypatch.setattr(gpu, "launch", record)
    monkeypatch.setattr(gpu, "dequantize_kernel", Dequantize())
    compute()
    monkeypatch.undo()
    kernel, args, options = launches[number]
    values = dict(zip(kernel.arg_names, args)) | options | dict(PDL=target == "sm_90", PERMUTE=target.startswith("sm"))
    values = {name: values[name] for name in kernel.arg_names}
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(values.items()):
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = f"*{NAMES[value.dtype]}", [["tt.divisibility", 16]]
        elif name in fixed or value is None or value is True or value == 1:      # as Triton specializes it
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return inspect(triton.compile(source, target=TARGETS[target], options={
        name: options[name] for name in ("num_warps", "num_stages") if name in options}).asm)


def inspect(asm: dict) -> Compiled:
    if "amdgcn" in asm:
        code = asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{name}: +(\d+)", code)[1])
                             for name in ("vgpr_count", "vgpr_spill_count"))
        return Compiled(registers=registers, spills=spills, wide_loads=len(re.findall("load_(?:dwordx4|b128)", code)))
    tool, binary = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", triton.knobs.cache.dir
    binary = Path(binary) / "kernel.cubin"
    binary.parent.mkdir(exist_ok=True)
    binary.write_bytes(asm["cubin"])
    code = subprocess.run([tool, "--dump-resource-usage", "--dump-sass", binary], capture_output=True, text=True,
                          check=True).stdout
    registers, spills = re.search(r"REG:(\d+) STACK:(\d+)", code).groups()
    return Compiled(registers=int(registers), spills=int(spills), wide_loads=len(re.findall(r"LDG\.E\S*\.128", code)))


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weights(bits: int, N: int, K: int, dtype: torch.dtype) -> Weights:
    scales = {8: empty(N, dtype=torch.float32), 4: empty(N, K // 32, dtype=dtype)}.get(bits)
    return Weights(bits, empty(N, K, dtype=dtype) if bits > 8 else empty(N, K * bits // 32), scales,
                   empty(N, K // 32, dtype=torch.uint8) if bits == 4 else None)


def linear(bits: int, M: int, tile: tuple, target: str, monkeypatch: pytest.MonkeyPatch, gated: bool = False,
           N: int = 4096, K: int = 4096) -> Compiled:
    """With the norm where it is gated, else with a residual, as in a layer."""
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    w, x = weights(bits, N, K, dtype), empty(M, K, dtype=dtype)
    norm, residual = (empty(K, dtype=dtype), None) if gated else (None, empty(M, N, dtype=dtype))
    planes = (w.fields, w.fields) if M == 1 else (1, 1)
    return launched(lambda: gpu.linear(x, w, norm, 1e-6, residual, gated, Tile(*tile), planes), target, monkeypatch)


def attend(queries: int, int8: bool, target: str, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """4 query heads for each of 8 KV heads, 128 dimensions, a cache in shares."""
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    B, S = 1, queries // 4
    q, caches = empty(B, S, 32, 128, dtype=dtype), [empty(B, 8, 2048, 128, dtype=torch.int8 if int8 else dtype)] * 2
    scales = [empty(B, 8, 2048, 1, dtype=torch.float32)] * 2 * int8
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(gpu, "has_tensor_cores", lambda device: target not in NO_TENSOR_CORES)
    return launched(lambda: gpu.attend(q, *caches, empty(B, S, dtype=torch.int64), ready=empty(8), scales=scales),
                    target, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942", pytest.param("gfx90a", marks=pytest.mark.long),
                                    pytest.param("gfx1100", marks=pytest.mark.long)])
@pytest.mark.parametrize("bits", BITS)
def test_one_token_reads_16_bytes_at_a_time(bits: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row of weights for a thread's tile, at the least; and keeps all of it in registers."""
    tile = {16: (4, 2048, 8, 1), 8: (4, 2048, 4, 1), 4: (4, 4096, 4, 1)}[bits]
    assert tile in gpu_layers.ONE_TOKEN[bits]
    most, threads = 256 if target == "gfx1100" else 128, TARGETS[target].warp_size * tile[2]
    for gated in (False, True):
        kernel = linear(bits, 1, tile, target, monkeypatch, gated)
        assert kernel.spills == 0 and kernel.registers <= most, kernel
        assert kernel.wide_loads >= 4 * 4096 * bits // 128 // threads, kernel


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("bits, tile", [(bits, tile) for bits in BITS for tile in gpu_layers.ONE_TOKEN[bits]], ids=str)
@pytest.mark.parametrize("target", [target for target in TARGETS if target not in FEW_TILES])
def test_one_token_keeps_to_registers(bits: int, tile: tuple, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = linear(bits, 1, tile, target, monkeypatch)
    assert (kernel.spills == 0 or (target, bits, tile) in SPILLING) and kernel.wide_loads > 0, kernel


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("bits, tile", [(bits, tile) for bits in BITS for tile in gpu_layers.FEW_TOKENS[bits]], ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_few_tokens_keep_to_registers(bits: int, tile: tuple, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = linear(bits, 16, tile, target, monkeypatch)
    assert kernel.spills == 0 and kernel.registers <= 255, kernel


@pytest.mark.slow
@pytest.mark.parametrize("target", [
    pytest.param(target, marks=pytest.mark.long) if target.startswith("gfx") else target for target in TARGETS])
@pytest.mark.parametrize("queries, int8", [(16, False), (64, False), (16, True), (64, True)])
def test_attention_keeps_to_registers(queries: int, int8: bool, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = attend(queries, int8, target, monkeypatch)
    allowed = 6 if (target, queries, int8) == ("gfx1100", 16, True) else 0         # of 256
    assert kernel.spills <= allowed and kernel.registers <= (512 if target in ("gfx90a", "gfx942") else 256), kernel


def test_without_tensor_cores_few_tokens_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton multiplies matrices by tensor cores from sm_80 on; the tiles would spill registers by the kilobyte."""
    monkeypatch.setattr(gpu, "has_tensor_cores", lambda device: False)
    for bits in BITS:
        w = weights(bits, 64, 4096, torch.float16)
        assert gpu_layers.candidates(w, 2) == [LIBRARY]
        assert gpu_layers.candidates(w, 1) == [Tile(*tile) for tile in gpu_layers.ONE_TOKEN[bits]]


@pytest.mark.slow
@pytest.mark.parametrize("target", [
    pytest.param(target, marks=pytest.mark.long) if target in ("gfx90a", "gfx1100") else target for target in TARGETS])
def test_small_kernels_keep_to_registers(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm, what comes before the attention, and weights in full."""
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    norm, head, angles = empty(4096, dtype=dtype), empty(128, dtype=dtype), empty(1, 1, 1, 128, dtype=torch.float32)
    caches, qkv = [empty(1, 8, 2048, 128, dtype=dtype) for _ in range(2)], empty(1, 48 * 128, dtype=dtype)
    int8, scales = ([empty(1, 8, 2048, n, dtype=kind)] * 2 for n, kind in ((128, torch.int8), (1, torch.float32)))
    for compute in (lambda: gpu.rms_norm(empty(16, 4096, dtype=dtype), norm, 1e-6),
                    lambda: gpu.prepare(qkv, head, head, angles, angles, None, empty(1, 1, dtype=torch.int64), *caches,
                                        32, 1e-6, empty(8)),
                    lambda: gpu.prepare(qkv, head, head, angles, angles, None, empty(1, 1, dtype=torch.int64), *int8,
                                        32, 1e-6, empty(8), scales),
                    lambda: gpu.dequantize(weights(8, 64, 4096, dtype), dtype),
                    lambda: gpu.dequantize(weights(4, 64, 4096, dtype), dtype)):
        kernel = launched(compute, target, monkeypatch)
        assert kernel.spills == 0 and kernel.registers <= 64, kernel


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("S", [1, 16])
def test_delta_nets_keep_to_registers(S: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Qwen3.5-27B. Memory is read and written 16 bytes at a time."""
    C, Hv = 5120, 48
    dtype, fp32 = torch.float16 if target == "sm_75" else torch.bfloat16, torch.float32
    N, x = (32 + Hv) * 128, empty(S, C, dtype=dtype if target != "sm_75" else fp32)
    state = [empty(1, Hv, 128, 128, dtype=fp32), empty(1, dtype=torch.int64), empty(1, 19, N, dtype=dtype),
             empty(1, dtype=torch.int64), empty(1, 16, 16, 128, dtype=fp32), empty(1, 16, Hv, 128, dtype=fp32),
             empty(1, 16, Hv, dtype=fp32)]
    made_from = gpu_deltanet.Gates(x, empty(C, dtype=dtype), empty(2 * Hv, C, dtype=dtype), empty(Hv, dtype=fp32),
                                   empty(Hv, dtype=fp32), empty(128, dtype=fp32), 1e-6, 1.0)
    qkv, conv, pos = empty(S, N + Hv * 128, dtype=dtype), empty(N, 4, dtype=dtype), empty(1, S, dtype=torch.int64)
    for number, most in ((0, 96), (1, 128)):
        kernel = launched(lambda: gpu_deltanet.delta_net(qkv, conv, pos, state, made_from), target, monkeypatch, number)
        assert kernel.spills == 0 and kernel.registers <= most, kernel
    assert kernel.wide_loads > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_gated_attention_keeps_to_registers(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Qwen3.5-4B: 256 dimensions, of which RoPE turns 64."""
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    head, angles = empty(256, dtype=dtype), empty(1, 1, 1, 64, dtype=torch.float32)
    caches, qkv = [empty(1, 4, 2048, 256, dtype=dtype) for _ in range(2)], empty(1, 40 * 256, dtype=dtype)
    q, pos, ready = empty(1, 1, 16, 256, dtype=dtype), empty(1, 1, dtype=torch.int64), empty(4)
    kernel = launched(lambda: gpu.prepare(qkv, head, head, angles, angles, None, pos, *caches, 16, 1e-6, ready,
                                          offset=1.0), target, monkeypatch)
    assert kernel.spills == 0 and kernel.registers <= 64, kernel
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(gpu, "has_tensor_cores", lambda device: target not in NO_TENSOR_CORES)
    kernel = launched(lambda: gpu.attend(q, *caches, pos, ready=ready, gates=qkv[:, 24 * 256:]), target, monkeypatch)
    assert kernel.spills <= (72 if target == "gfx1100" else 0), kernel


LINEAR = ["linear_kernel"]
ATTENTION = [*LINEAR, "prepare_kernel", "attend_kernel", *LINEAR]
DELTA_NET = [*LINEAR, "convolve_kernel", "recall_kernel", *LINEAR]
EXPERTS = [*LINEAR, "choose_kernel", *LINEAR, *LINEAR, *LINEAR, "experts_down_kernel"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3.5-0.8B", "Qwen3.5-35B-A3B"])
def test_launches_of_a_decoding_step(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six a layer, PyTorch's own among them, and ten with experts of which one is for all tokens. In int8 and int4 two
    more for the whole step."""
    args = dataclasses.replace(ModelArgs.from_name(name), n_layer=4, windows=())
    with torch.device("meta"):
        model = Transformer(args).bfloat16()
    for _, linear in formats.replace_linears(model, formats.Quantization(f"int{bits}", 128)) if bits < 16 else ():
        linear.layout = "packed"                       # so that kernel_args takes its tensors, as on a GPU
    model.setup_caches(1, 256)
    layers = [layer.kernel_args() for layer in model.layers]
    fused = gpu_layers.fuse(layers, args.n_head, args.norm_eps, args.norm_offset).layers
    cos = empty(1, 1, 1, args.rotary_dim or args.head_dim, dtype=torch.float32)
    launches = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if not operator.is_view and not re.search("empty|_unsafe_view", operator.name()):
                launches.append(operator.name())
            return operator(*args, **kwargs or {})
    monkeypatch.setattr(gpu, "launch", lambda kernel, *args, **options: launches.append(kernel.__name__))
    with Operators():
        fused.run(empty(1, 1, args.dim, dtype=torch.bfloat16), cos, cos, None, empty(1, 1, dtype=torch.int64))
    order, expected = ["aten::clone"] * (bits < 16), []
    for i in range(4):
        expected += DELTA_NET if i in args.delta_layers else ATTENTION
        expected += EXPERTS if args.has_experts(i) else 2 * LINEAR
    assert launches == [*order, *expected, *order], launches


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("target", [target for target in TARGETS if target not in FEW_TILES])
@pytest.mark.parametrize("bits", BITS)
def test_experts_keep_to_registers(bits: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Qwen3-30B-A3B."""
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    x, norm, w13, w2 = empty(1, 2048, dtype=dtype), empty(2048, dtype=dtype), *(
        weights(bits, N, K, dtype) for N, K in ((128 * 1536, 2048), (128 * 2048, 768)))
    chosen, factors = empty(1, 8, dtype=torch.int64), empty(1, 8, dtype=torch.float32)
    tiles = gpu_layers.candidates(w13, 1)[0], gpu_layers.candidates(w2, 1)[0]
    kernel = launched(lambda: gpu.choose(empty(1, 128, dtype=dtype), 8, True, x, norm, 1e-6, 0.0, norm[None]), target,
                      monkeypatch)
    assert kernel.spills == 0 and kernel.registers <= 128, kernel
    for number in (0, 1):
        kernel = launched(lambda: gpu.experts(x, chosen, factors, w13, w2, norm, 1e-6, x, tiles, w13.fields), target,
                          monkeypatch, number)
        assert kernel.spills == 0 and kernel.wide_loads > 0, kernel


# ---- which of them runs

@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """tune without a GPU: `us` has the time of a tile, 9 by default, and `kinds` what was timed."""
    state = SimpleNamespace(us={}, kinds=[], file=tmp_path / "gpu_tiles.json", name="a GPU", fails=False)

    def milliseconds(calls: list) -> float:
        tile = calls[0].args[0]
        if tile == COMPILED and state.fails:
            raise RuntimeError("no working C++ compiler")
        state.kinds.append(tile)
        return state.us.get(tile, 9) / 1e3
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_layers, "tiles", {})
    monkeypatch.setattr(gpu_layers, "device_name", lambda device: state.name)
    monkeypatch.setattr(gpu_layers, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(gpu, "linear", lambda *args, **options: None)
    monkeypatch.setattr(gpu, "experts", lambda *args, **options: None)

    def tune(*args, forget: bool = False) -> dict[str, Tile]:
        """What it found; forget: as in another process."""
        if forget:
            gpu_layers.tiles.clear()
        state.kinds.clear()
        gpu_layers.tune(*args)
        return gpu_layers.tiles[state.name]
    state.tune = tune
    return state


def layers_of_experts():
    C, size, dtype = 1024, 512, torch.bfloat16
    router, norm = weights(16, 4, C, dtype), empty(C, dtype=dtype)
    cache, experts = empty(1, 2, 64, 64, dtype=dtype), gpu_layers.Experts(router, 2, True)
    w13, w2 = weights(8, 4 * 2 * size, C, dtype), weights(8, 4 * C, size, dtype)
    heads = gpu_layers.Heads(None, None, cache, cache, 0, False, [])
    layer = gpu_layers.Layer(norm, weights(8, 2 * C, C, dtype), heads, weights(8, C, C, dtype), norm, w13, w2, experts)
    return gpu_layers.Layers([layer] * 3, 4, 1e-6, 0.0)


META = torch.device("meta")


def head() -> list:
    return list(gpu_layers.calls_of([[empty(4096, 1024, dtype=torch.bfloat16)]], 1, torch.bfloat16))


def test_the_fastest_of_all_candidates_is_kept(tuned: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    fast = Tile(*gpu_layers.ONE_TOKEN[16][1])
    tuned.us = {fast: 2, COMPILED: 3, LIBRARY: 4}
    (kind, offered, _), = calls = head()
    assert tuned.tune(calls, META, 1) == {kind: fast} and tuned.kinds == offered
    assert offered[:-2] == gpu_layers.candidates(weights(16, 4096, 1024, torch.bfloat16), 1)
    assert offered[-2:] == [COMPILED, LIBRARY] and "gpu_tiles.json" in capsys.readouterr().err
    stored = json.loads(tuned.file.read_text())["a GPU"][kind]
    assert stored["tile"] == list(fast) and stored["us"]["0x0x0x0"] == 4 and len(stored["us"]) == len(offered)
    assert tuned.tune(calls, META, 1) == {kind: fast} and not tuned.kinds
    assert tuned.tune(calls, META, 1, forget=True) == {kind: fast} and not tuned.kinds, "read from the file"
    tuned.name, tuned.us = "a GPU, another driver", {LIBRARY: 1}
    assert tuned.tune(calls, META, 1) == {kind: LIBRARY} and tuned.kinds == offered
    assert json.loads(tuned.file.read_text()).keys() == {"a GPU", "a GPU, another driver"}


def test_layers_experts_and_head_are_timed(tuned: SimpleNamespace) -> None:
    """Each kind once, and what run asks for is what was found."""
    layers = layers_of_experts()
    layer, up, down = layers.layers[0], Tile(*gpu_layers.ONE_TOKEN[8][1]), Tile(*gpu_layers.ONE_TOKEN[8][2])
    tuned.us = {up: 1}
    assert len(tuned.tune([*layers.calls(1), *head()], META, 1)) == 5        # wqkv, wo, experts' two, the head
    assert sum(tile == LIBRARY for tile in tuned.kinds) == 3                 # which experts do without
    assert gpu_layers.tile_for(layer.w13, 1, True, True, META, experts=True) == up
    tuned.us, tuned.name = {down: 1}, "another"
    tuned.tune(layers.calls(1), META, 1)
    assert gpu_layers.tile_for(layer.w2, 1, False, False, META, experts=True) == down


@pytest.mark.parametrize("content", [
    "", "[]", "{", "null", '{"a GPU": 1}', '{"a GPU": {"KIND": {"tile": [0, 0, 0]}}}', "[" * 100000,
    '{"a GPU": {"KIND": {"tile": [3, 5, 1, 1], "us": {}}}}', '{"a GPU": {"KIND": {"tile": "4096"}}}', "\udcff"])
def test_a_broken_file_of_tiles_costs_nothing_but_time(tuned: SimpleNamespace, content: str) -> None:
    """Even if it names a tile that there is none of."""
    (kind, offered, _), = calls = head()
    tuned.file.write_bytes(content.replace("KIND", kind).encode("utf-8", "surrogateescape"))
    tuned.us = {offered[1]: 1}
    assert tuned.tune(calls, META, 1) == {kind: offered[1]} and tuned.kinds == offered
    assert json.loads(tuned.file.read_text())["a GPU"][kind]["tile"] == list(offered[1])


def test_what_cannot_be_compiled_is_left_out(tuned: SimpleNamespace, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's compiler, or by Triton for a smaller GPU; and a folder that cannot be written changes nothing."""
    (kind, offered, _), = head()
    tuned.fails = True

    def call(tile: Tile) -> None:
        if tile == offered[0]:
            raise gpu_layers.OutOfResources(1, 0, "shared memory")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    tuned.us = {offered[2]: 1}
    assert tuned.tune([(kind, offered, call)], META, 1) == {kind: offered[2]}
    assert tuned.kinds == [tile for tile in offered[1:] if tile != COMPILED]


def test_times_hold_for_a_device_and_its_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = []
    monkeypatch.setattr(gpu_layers, "DRIVER_VERSIONS", (tmp_path / "missing", tmp_path / "version"))
    for name, driver, version in zip("ABAA", ("580.1", "580.1", "575.2", "580.1"), ("2.13", "2.13", "2.13", "2.11")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        (tmp_path / "version").write_text(f"NVRM version: {driver}\nGCC version\n")
        monkeypatch.setattr(torch, "__version__", version)
        said.append(gpu_layers.device_name.__wrapped__(torch.device("cuda")))
    assert len(set(said)) == 4 and f"triton {triton.__version__}" in said[0]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("bits", BITS)
def test_what_the_compiler_makes_of_linears_equals_their_twin(bits: int) -> None:
    """Also within an operator of a compiled step, which is where it runs."""
    stored = {16: [torch.randn(48, 64)], 8: [torch.randint(-128, 128, (48, 64), dtype=torch.int8), torch.rand(48)],
              4: [torch.randint(256, (48, 32), dtype=torch.uint8), torch.rand(48, 2).bfloat16(),
                  torch.randint(241, (48, 2), dtype=torch.uint8)]}[bits]
    w, x, norm = Weights.of(stored), torch.randn(1, 64), torch.rand(64)

    @torch.library.custom_op(f"tests::compiled_linear_{bits}", mutates_args=())
    def compiled_linear(x: torch.Tensor) -> torch.Tensor:
        return gpu.linear(x, w, norm, 1e-6, None, True, COMPILED, (w.fields, 1))
    compiled_linear.register_fake(lambda x: x.new_empty(1, 24))
    expected = gpu.linear_reference(x, w, norm, 1e-6, None, True, (w.fields, 1))
    with torch.inference_mode():
        assert torch.allclose(torch.compile(lambda x: compiled_linear(2 * x) + 1, fullgraph=True)(x / 2) - 1, expected,
                              rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2


@pytest.mark.parametrize("way, timed", [("auto", True), ("triton", False), ("plain", False)])
def test_only_auto_measures(way: str, timed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(kernels, "gpu_layers", gpu_layers)
    monkeypatch.setattr(gpu_layers, "tune", lambda calls, device, tokens: called.append((len(calls), tokens)))
    monkeypatch.setitem(kernels.chosen, "gpu", way)
    linear = [empty(1024, 256, dtype=torch.bfloat16)]
    for tokens in (1, 5, 17):
        kernels.tune(None, [linear], tokens, torch.bfloat16)
    assert called == ([(1, 1), (1, 5)] if timed else [])
    assert kernels.on_gpu(torch.device("cuda")) == (way != "plain")
