"""The GPU kernels without a GPU: in Triton's interpreter against their twins, and compiled for several GPUs."""
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import gpu
from kernels.gpu import LIBRARY, Tile, Weights

gpu_layers = importlib.import_module("kernels.gpu_layers")     # the package's own name for it is None without a GPU

# fp16 results carry half a unit in the last of 11 bits, and PyTorch sums their products in an order of its own. One
# token meets quantized weights plus 2^15 + 128 or 2^7, which are subtracted from the sum: that costs some bits of fp32.
ALLOWED = {"weights": 0.0, "dequantize": 0.0, "norm": 1e-6, "planes, int8": 5e-4, "planes, int4": 5e-4,
           **{f"linear, {name}, {tokens} token{'s' * (tokens == 'few')}": tolerance
              for name, one, few in (("fp32", 1e-5, 1e-5), ("fp16", 2e-3, 2e-3), ("int8", 5e-4, 1e-5),
                                     ("int4", 5e-4, 1e-5), ("int8, fp16", 2e-3, 2e-3), ("int4, fp16", 2e-3, 2e-3))
              for tokens, tolerance in (("one", one), ("few", few))},
           **{f"{name}, {dtype}": tolerance for name in ("prepare", "attend, whole", "attend, split")
              for dtype, tolerance in (("fp32", 1e-5), ("fp16", 2e-3))},
           **{f"{kind}, {name}": tolerance for kind in ("experts", "layers", "layers of experts")
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
    assert len(results["kernels"]) == 20 and not results["failed"]


# ---- compiled

TARGETS = {"sm_75": GPUTarget("cuda", 75, 32), "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
         torch.uint8: "u8", torch.int8: "i8"}
BITS = (16, 8, 4)
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
    values = dict(zip(kernel.arg_names, args)) | dict(PDL=target == "sm_90") | options
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
        return Compiled(registers=registers, spills=spills, wide_loads=len(re.findall("load_dwordx4", code)))
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
    scales = {8: empty(N, dtype=torch.float32), 4: empty(N, K // 32, dtype=torch.bfloat16)}.get(bits)
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
    monkeypatch.setattr(gpu, "has_tensor_cores", lambda device: target != "sm_75")
    return launched(lambda: gpu.attend(q, *caches, empty(B, S, dtype=torch.int64), ready=empty(8), scales=scales),
                    target, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("bits", BITS)
def test_one_token_reads_16_bytes_at_a_time(bits: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row of weights for a thread's tile, at the least; and keeps all of it in registers."""
    tile = {16: (4, 2048, 8, 1), 8: (4, 2048, 4, 1), 4: (4, 4096, 4, 1)}[bits]
    assert tile in gpu_layers.ONE_TOKEN[bits]
    for gated in (False, True):
        kernel = linear(bits, 1, tile, target, monkeypatch, gated)
        assert kernel.spills == 0 and kernel.registers <= 128 and kernel.wide_loads >= 4 * 4096 * bits // 128 // (
            32 * tile[2] * (2 if target == "gfx942" else 1)), kernel


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("bits, tile", [(bits, tile) for bits in BITS for tile in gpu_layers.ONE_TOKEN[bits]], ids=str)
@pytest.mark.parametrize("target", TARGETS)
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
@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("queries, int8", [(16, False), (64, False), (16, True), (64, True)])
def test_attention_keeps_to_registers(queries: int, int8: bool, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = attend(queries, int8, target, monkeypatch)
    assert kernel.spills == 0, kernel


def test_without_tensor_cores_few_tokens_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton multiplies matrices by tensor cores from sm_80 on; the tiles would spill registers by the kilobyte."""
    monkeypatch.setattr(gpu, "has_tensor_cores", lambda device: False)
    for bits in BITS:
        w = weights(bits, 64, 4096, torch.float16)
        assert gpu_layers.candidates(w, 2) == [LIBRARY]
        assert gpu_layers.candidates(w, 1) == [Tile(*tile) for tile in gpu_layers.ONE_TOKEN[bits]]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
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
@pytest.mark.parametrize("bits", BITS)
def test_experts_keep_to_registers(bits: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Qwen3-30B-A3B."""
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    x, norm, w13, w2 = empty(1, 2048, dtype=dtype), empty(2048, dtype=dtype), *(
        weights(bits, N, K, dtype) for N, K in ((128 * 1536, 2048), (128 * 2048, 768)))
    chosen, factors = empty(1, 8, dtype=torch.int64), empty(1, 8, dtype=torch.float32)
    tiles = gpu_layers.candidates(w13, 1)[0], gpu_layers.candidates(w2, 1)[0]
    for number in (0, 1):
        kernel = launched(lambda: gpu.experts(x, chosen, factors, w13, w2, norm, 1e-6, x, tiles, w13.fields), target,
                          monkeypatch, number)
        assert kernel.spills == 0 and kernel.wide_loads > 0, kernel
