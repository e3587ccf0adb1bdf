"""Builds the C++ kernels on first use, keeps the library in a cache, and loads it."""
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent    # a translation unit in every .cpp, compiled in parallel
FLAGS = "-O3 -march=native -ffp-contract=fast -fno-math-errno -fopenmp -fPIC -std=c++20 -Wno-psabi".split()


def cpu_flags() -> str:
    """The CPU's instruction sets, as the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).split(":", 1)[1]
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_flags().split())


@functools.cache
def unavailable_reason() -> str | None:
    """Loads the kernels, building them if need be. Why PyTorch's operators must run instead, in one line, or None.

    QWEN_FAST_KERNELS=off in the environment leaves the kernels out. A build that fails says so on stderr, once.
    """
    if os.environ.get("QWEN_FAST_KERNELS", "").lower() in ("off", "0"):
        return "QWEN_FAST_KERNELS=off"
    try:
        torch.ops.load_library(built_library())
        register_fakes()
        return None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"the C++ kernels are not used ({reason}); PyTorch's own run instead, more slowly", file=sys.stderr)
        return reason


def available() -> bool:
    """Whether the C++ kernels run on this CPU. The first call loads or builds them."""
    return unavailable_reason() is None


# As torch.compiler.assume_constant_result does, which imports the compiler: a second that eager runs need not spend.
available._dynamo_marked_constant = True


def built_library() -> Path:
    """The shared library, built if it is not in the cache. Errors: OSError, RuntimeError.

    Its name is a hash of every source, the flags, PyTorch and the CPU: one for another CPU must not be loaded.
    """
    root = Path(torch.__file__).parent
    flags = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    sources = [path.name + path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    key = "\0".join([*sources, *flags, torch.__version__, str(root), cpu_flags()])
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "qwen_fast")
    library = folder / f"kernels_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        print("building the C++ kernels for this CPU (once, 10 to 30 seconds) ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        build(library, root, flags)
        print(f"built in {time.perf_counter() - start:.0f} seconds: {library}", file=sys.stderr)
    return library


def build(library: Path, root: Path, flags: list[str]) -> None:
    """root: of PyTorch. Two processes may build at once: the last rename wins, and both files are whole."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no C++ compiler was found")
    include = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    # The libgomp that PyTorch brought along: with a second one, two pools of threads would fight for the cores.
    gomp = [str(path) for path in sorted((root / "lib").glob("libgomp*.so*"))[:1]] or ["-fopenmp"]
    partial = f"{library}.{os.getpid()}.{threading.get_ident()}.tmp"
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [f"{partial}.{source.stem}.o" for source in sources]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # started all at once, they would end with the longest alone
            list(pool.map(run, ([compiler, *flags, *include, "-c", str(source), "-o", to]
                                for source, to in zip(sources, objects))))
        run([compiler, *objects, "-o", partial, "-shared", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *gomp])
        os.replace(partial, library)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        errors = [line for line in lines if "error" in line] or lines[-1:] or ["no message"]
        raise RuntimeError(f"{compiler} failed: {errors[0]}") from error
    finally:
        for path in (partial, *objects):
            Path(path).unlink(missing_ok=True)


def run(command: list[str]) -> None:
    """Errors: OSError, CalledProcessError."""
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)


def register_fakes() -> None:
    """For torch.compile: the shape and dtype of every operator's result."""
    @torch.library.register_fake("qwen_fast::linear")
    def _(x: Tensor, tensors: list[Tensor], out_features: int, quantize_activations: bool) -> Tensor:
        return x.new_empty(*x.shape[:-1], out_features)

    @torch.library.register_fake("qwen_fast::experts")
    def _(x: Tensor, *others) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("qwen_fast::attend")
    def _(q: Tensor, *others) -> Tensor:
        return q.new_empty(*q.shape[:2], q.size(2) * q.size(3))

    @torch.library.register_fake("qwen_fast::delta_net")
    def _(qkv: Tensor, g: Tensor, b: Tensor, conv: Tensor, input_pos: Tensor, state: list[Tensor]) -> Tensor:
        return g.new_empty(*g.shape, state[0].size(3))

    @torch.library.register_fake("qwen_fast::run_fused")
    def _(x: Tensor, *others) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)


def describe(device: torch.device | str = "cpu") -> str:
    """Which kernels run on a device, in one line for the user."""
    if torch.device(device).type != "cpu":
        return "PyTorch kernels"
    if reason := unavailable_reason():
        return f"PyTorch kernels ({reason})"
    flags = cpu_flags().split()
    kinds = [("avx512_bf16", "AVX512-BF16"), ("avx512f", "AVX512"), ("avx2", "AVX2"), ("asimd", "NEON")]
    kind = next((name for flag, name in kinds if flag in flags), "portable")
    return f"{kind} kernels, {torch.get_num_threads()} threads"
