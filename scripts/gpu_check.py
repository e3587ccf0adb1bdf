"""Checks and measures the GPU path, in about ten minutes on one GPU.

    python scripts/gpu_check.py --out results

Stages, each written to results/gpu_check.json as soon as it is done: kernels against their twins, texts of the demo,
read bandwidth and matrix rate, decoding of published shapes (random weights) in bf16, int8 and int4, what else a step
may be (more tokens, sampling, long contexts, prefill), other programs. It ends with a table for BENCHMARKS.md and the
parity checks that failed, of which there should be none.

Without a GPU it runs the first stage alone, on a CPU in Triton's interpreter.
"""
import argparse
import dataclasses
import datetime
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"               # before Triton is imported
try:
    from kernels import gpu, gpu_deltanet
except ImportError:
    cli.fail("this needs Triton, which PyTorch's builds for GPUs bring along (or pip install --no-deps triton)")

import formats
import kernels
from cli import UserError
from config import ModelArgs
from deltanet import DeltaState
from generate import Engine, bytes_read_per_token
from loading import DEMO, load_model
from model import Linear, Transformer
from sampling import Sampling
from shapes import PUBLISHED

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
MODELS = ("Qwen3-0.6B", "Qwen3.5-0.8B", "Qwen-1.8B", "Qwen3-8B")
KINDS = ("none", "int8", "int4")
GREEDY = Sampling(temperature=0.0)
NAMES = {"none": "bf16", "int8": "int8", "int4": "int4, g32"}


class Report:
    """Results by stage, kept in a file."""

    def __init__(self, folder: Path):
        self.file, self.results, self.failed, self.start = folder / "gpu_check.json", {}, [], time.perf_counter()

    def add(self, stage: str, name: str, value: Any) -> None:
        self.results.setdefault(stage, {})[name] = value
        with cli.atomic_write(self.file, "out") as partial:
            partial.write_text(json.dumps(self.results | dict(failed=self.failed), indent=1))
        print(f"[{time.perf_counter() - self.start:.0f} s] {stage}: {name}: {value}", flush=True)

    def check(self, stage: str, name: str, error: float, limit: float) -> None:
        if not error <= limit:                         # NaN fails
            self.failed.append(f"{stage}: {name}: {error:.2g} exceeds {limit:.2g}")
        self.add(stage, name, float(f"{error:.2g}"))


def difference(y: Tensor, expected: Tensor) -> float:
    """|y - expected| / |expected|, Euclidean."""
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def milliseconds(call: Callable[[], object], times: int = 5) -> float:
    """The median, by the device's clock."""
    call()
    taken = []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


# ---- kernels against their twins

def random_weights(N: int, K: int, bits: int, dtype: torch.dtype, groupsize: int = 32) -> gpu.Weights:
    if bits == 4:
        return gpu.Weights.of([torch.randint(256, (N, K // 2), dtype=torch.uint8, device=DEVICE),
                               (torch.rand(N, K // groupsize, device=DEVICE) * 0.01 + 0.001).bfloat16(),
                               torch.randint(241, (N, K // groupsize), dtype=torch.uint8, device=DEVICE)])
    if bits == 8:
        return gpu.Weights.of([torch.randint(-127, 128, (N, K), dtype=torch.int8, device=DEVICE),
                               torch.rand(N, device=DEVICE) * 0.001])
    return gpu.Weights.of([torch.randn(N, K, dtype=dtype, device=DEVICE) * 0.02])


def check_kernels(report: Report) -> None:
    limits = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 5e-4}    # of rounding; fp32: int8's mantissas
    dtypes = list(limits)[:2] if HAS_GPU else [torch.float32]                      # the interpreter truncates bf16
    N, K = (1536, 3072) if HAS_GPU else (40, 96)
    for dtype, bits, M in [(d, b, m) for d in dtypes for b in (16, 8, 4) for m in (1, 5, 16)]:
        w = random_weights(N, K, bits, dtype)
        x, norm = torch.randn(M, K, device=DEVICE).to(dtype), (torch.rand(K, device=DEVICE) + 0.5).to(dtype)
        residual = torch.randn(M, N, device=DEVICE).to(dtype)
        tile = gpu.Tile(*((4, 512, 1, 2) if M == 1 else (16, 128, 2, 3)) if HAS_GPU else (16, 64, 1, 2))
        ways: dict[str, dict[str, Any]] = {"norm, gated": dict(norm=norm, eps=1e-6, gated=True),
                                           "residual": dict(residual=residual)}
        for what, more in ways.items():
            y, expected = gpu.linear(x, w, tile=tile, **more), gpu.linear_reference(x, w, **more)
            report.check("kernels", f"linear {N} x {K}, {w.bits} bits, {M} tokens, {what}, {str(dtype)[6:]}",
                         difference(y, expected), limits[dtype])
    shapes = [(1, 1, 16, 8, 128, 512, 0, 0), (1, 1, 16, 8, 128, 8192, 0, 8000), (1, 9, 32, 8, 128, 4096, 0, 3000),
              (3, 1, 16, 2, 64, 1024, 100, 700), (1, 300, 32, 8, 128, 1024, 0, 500), (1, 1, 16, 16, 80, 1024, 0, 1000)]
    for dtype, (B, S, H, K, D, T, window, position) in [(d, s) for d in dtypes for s in shapes[:6 if HAS_GPU else 1]]:
        input_pos = (position + torch.arange(S, device=DEVICE)).expand(B, S).contiguous()
        q, k, v = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((B, S, H, D), (B, K, T, D), (B, K, T, D)))
        ready = torch.zeros(B * K, dtype=torch.int32, device=DEVICE)
        expected = kernels.attend_reference(q, k, v, input_pos, window)
        what = f"attention, batch {B}, {S} tokens at {position}, heads {H} / {K} of {D}, window {window}"
        report.check("kernels", f"{what}, {str(dtype)[6:]}",
                     difference(gpu.attend(q, k, v, input_pos, window, ready), expected), limits[dtype])
        (k, v), scales = zip(*map(kernels.quantize_heads, (k, v)))
        expected = kernels.attend_reference(q, k, v, input_pos, window, scales)
        y = gpu.attend(q, k, v, input_pos, window, ready.zero_(), scales=scales)
        report.check("kernels", f"{what}, {str(dtype)[6:]}, int8", difference(y, expected), limits[dtype])
    check_delta_net(report, dtypes)


def check_delta_net(report: Report, dtypes: list[torch.dtype]) -> None:
    """Results and memory of a Gated DeltaNet after passes of many lengths, some tokens of which are taken back."""
    args = ModelArgs.from_name("Qwen3.5-4B")
    if not HAS_GPU:
        args = dataclasses.replace(args, delta_key_heads=1, delta_value_heads=2, delta_key_dim=16, delta_value_dim=24)
    B, N, Hv = 1 + HAS_GPU, args.delta_channels, args.delta_value_heads
    for dtype in dtypes:
        states, most, at = [DeltaState(args, B, 16, dtype, DEVICE) for _ in range(2)], 0.0, 0
        conv = torch.randn(N, args.conv_size, device=DEVICE).to(dtype)
        for S, back in ((5, 0), (1, 2), (1, 0), (16, 0), (9, 7), (2, 0)):
            at -= back
            qkv, g, b = (torch.randn(B, S, n, device=DEVICE) for n in (N, Hv, Hv))
            input_pos = (at + torch.arange(S, device=DEVICE)).expand(B, S).contiguous()
            qkv, gates = qkv.to(dtype), (-g.square(), b.sigmoid())
            y = gpu_deltanet.delta_net(qkv.flatten(0, 1), conv, input_pos, states[0].tensors(), gates)
            expected = states[1].run_reference(qkv, *gates, conv, input_pos)
            most, at = max(most, difference(y.view_as(expected), expected)), at + S
        most = max(most, difference(states[0].memory, states[1].memory))
        report.check("kernels", f"Gated DeltaNet, {str(dtype)[6:]} inputs", most, 1e-4)


# ---- the demo: the same text by every way

def check_texts(report: Report) -> None:
    model, tokenizer = load_model(DEMO, DEVICE, torch.float32)
    prompts = [tokenizer.encode(text) for text in ("def quicksort(arr):\n", "class Stack:\n", "import os\n\ndef walk(")]

    def texts(way: str, prompts: list, draft: Any = None, compile: bool = True) -> list:
        kernels.chosen["gpu"] = way
        engine = Engine(model, tokenizer, compile=compile, draft=draft, speculate_k=4 if draft else None)
        return list(engine.generate(prompts, 64, GREEDY, stop_ids=frozenset()))

    plain = [texts("plain", [prompt], compile=False) for prompt in prompts]
    ways: dict[str, dict[str, Any]] = {
        "triton": dict(way="auto"), "triton, not compiled": dict(way="auto", compile=False),
        "triton, n-gram drafts": dict(way="auto", draft="ngram"), "PyTorch's kernels, compiled": dict(way="plain")}
    for name, way in ways.items():
        same = sum(texts(prompts=[prompt], **way) == text for prompt, text in zip(prompts, plain))
        report.check("texts", f"fp32, {name}: of 3 texts differ", 3 - same, 0)
    batch = zip(*texts("auto", prompts))
    same = sum(list(row) == [ids[0] for ids in text] for row, text in zip(batch, plain))
    report.check("texts", "fp32, triton, in one batch: of 3 texts differ", 3 - same, 0)
    kernels.chosen["gpu"] = "auto"


def check_families(report: Report) -> None:
    """A mixture of experts and a hybrid, one row, five of several lengths and seventeen, against PyTorch's kernels,
    eager; one row by drafts, too."""
    for name, layers in (("Qwen1.5-MoE-A2.7B", 2), ("Qwen3.5-0.8B", 4)):
        for kind, rows in [(k, r) for k in ("none", "int4") for r in (1, 5, 17)]:
            model, texts = random_model(name, kind, torch.float32, layers), []
            prompts = [list(range(20 + (row if rows == 5 else 0))) for row in range(rows)]
            for kernels.chosen["gpu"], compile, draft in (("plain", False, None), ("auto", True, None),
                                                          ("auto", True, "ngram"))[:3 if rows == 1 else 2]:
                engine = Engine(model, compile=compile, draft=draft, speculate_k=4 if draft else None)
                texts.append(list(engine.generate(prompts, 16, GREEDY, stop_ids=frozenset())))
            report.check("texts", f"{name}, {layers} layers, fp32, {kind}, {rows} rows: of 16 steps differ",
                         sum(len(set(map(tuple, steps))) > 1 for steps in zip(*texts)), 0)
            free(model)


# ---- models of published shapes

def random_model(name: str, kind: str, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> Transformer:
    args = ModelArgs.from_name(name)
    args = dataclasses.replace(args, n_layer=layers, windows=()) if layers else args
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(args)
    state = {}
    for key, tensor in model.state_dict().items():
        state[key] = (torch.ones(tensor.shape, device=DEVICE) if "norm" in key else
                      torch.randn(tensor.shape, dtype=dtype, device=DEVICE) * 0.02).to(dtype)
    model.load_state_dict(state, assign=True)
    if kind != "none":
        weights = {key: module.weight for key, module in model.named_modules() if isinstance(module, Linear)}
        for key, linear in formats.replace_linears(model, formats.Quantization(kind, 32)):
            weight = weights.pop(key, model.tok_embeddings.weight)
            parts = [linear.quantize(rows) for rows in weight.split(4096)]
            for buffer in parts[0]:
                setattr(linear, buffer, torch.cat([part[buffer] for part in parts]))
        formats.pack_for(model, DEVICE)
    return model.eval()


def check_models(report: Report) -> None:
    """Logits with fused layers against those of the modules, for one token, several and many."""
    limits = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
    for name, kind, dtype in [(n, k, d) for n in MODELS[:3] for k in KINDS for d in limits]:
        model = random_model(name, kind, dtype, layers=4)
        model.setup_caches(1, 512)
        ids = torch.randint(model.args.vocab_size, (1, 400), device=DEVICE)
        model(ids[:, :20], torch.arange(20, device=DEVICE))
        before = model.save()
        for tokens in (1, 9, 300):
            everywhere = torch.arange(tokens, device=DEVICE)
            call = ids[:, 20:20 + tokens], 20 + everywhere, everywhere
            kernels.chosen["gpu"] = "plain"
            expected = model(*call)
            model.restore(before)
            kernels.chosen["gpu"] = "triton"
            fused = model.fuse()
            assert fused is not None
            report.check("models", f"{name}, 4 layers, {kind}, {str(dtype)[6:]}, {tokens} tokens",
                         difference(model(*call, fused), expected), limits[dtype])
            model.restore(before)
    kernels.chosen["gpu"] = "auto"


def measure_device(report: Report) -> tuple[float, float]:
    """Bytes/s that a sum reads, operations/s of a matrix product in bf16."""
    x = torch.empty(1 << 29, dtype=torch.int64, device=DEVICE).random_()
    bandwidth = x.nbytes / milliseconds(x.sum) * 1e3
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    rate = 2 * 8192 ** 3 / milliseconds(lambda: a @ a) * 1e3
    report.add("device", "read bandwidth, GB/s", round(bandwidth / 1e9))
    report.add("device", "matrix rate, TFLOP/s", round(rate / 1e12))
    return bandwidth, rate


def decode_step(engine: Engine, length: int, tokens: int = 80, sampling: Sampling = GREEDY, **more) -> dict[str, Any]:
    """ms of a decoding step after a prompt of so many tokens: on the wall, by the device alone; s to the first text."""
    prompt = torch.randint(1000, (length,)).tolist()
    request: dict[str, Any] = dict(sampling=sampling, stop_ids=frozenset(), seed=1, **more)
    start = time.perf_counter()
    list(engine.generate(prompt, 3, **request))
    first, times = time.perf_counter() - start, []
    for _ in engine.generate(prompt, tokens, **request):
        times.append(time.perf_counter())
    found = dict(wall_ms=1e3 * (times[-1] - times[9]) / (len(times) - 10), first_s=first)
    recorded = getattr(engine.run_decode, "recorded", None)
    if recorded:
        graph = list(recorded.values())[-1][0]
        found["device_ms"] = milliseconds(lambda: [graph.replay() for _ in range(10)]) / 10
    return {key: round(value, 3) for key, value in found.items()}


def measure_decoding(report: Report, bandwidth: float, models: list[str]) -> None:
    for name, kind in [(n, k) for n in models for k in KINDS]:
        model = random_model(name, kind)
        found = decode_step(Engine(model, compile=True), 64, max_seq_length=512)
        read = bytes_read_per_token(model)
        found |= dict(tokens_s=round(1e3 / found["wall_ms"]), read_gb=round(read / 1e9, 3),
                      of_bandwidth=round(read / found["wall_ms"] * 1e3 / bandwidth, 3))
        report.add("decoding", f"{name}, {NAMES[kind]}", found)
        free(model)


def free(model: Transformer) -> None:
    model.to("meta")
    torch.compiler.reset()                             # what has been compiled for many models would exceed a limit
    gc.collect()
    torch.cuda.empty_cache()


def measure_other_steps(report: Report, rate: float, name: str) -> None:
    """More tokens in a step, sampling, eager, PyTorch's kernels, long contexts, prefill."""
    model = random_model(name, "none")
    engine = Engine(model, compile=True, draft="ngram", speculate_k=8)
    verifier = engine.speculator
    assert verifier is not None
    verifier.enabled = False
    plain = decode_step(engine, 64, max_seq_length=512)
    report.add("steps", f"{name}, one token at 64", plain)
    for tokens in (2, 5, 9):
        engine.reserve(1, 512)
        everywhere, choice = torch.arange(tokens, device=DEVICE)[None], GREEDY.choice(model.args.vocab_size, DEVICE)
        inputs = everywhere, 64 + everywhere, choice, None, None, torch.zeros(tokens - 1, device=DEVICE)
        with torch.inference_mode():
            ms = milliseconds(lambda inputs=inputs: [
                verifier.verify(engine.fused, *inputs, torch.empty(1, 0, device=DEVICE)) for _ in range(10)]) / 10
        report.add("steps", f"{name}, verification of {tokens}",
                   dict(device_ms=round(ms, 3), steps=round(ms / plain["device_ms"], 3)))
    for length in (4000, 16000) if model.args.max_position > 16100 else (4000,):
        found = decode_step(engine, length, 40, max_seq_length=length + 100)
        report.add("steps", f"{name}, one token at {length}",
                   found | dict(of_64=round(found["wall_ms"] / plain["wall_ms"], 3)))
    matrices = sum(p.numel() for key, p in model.named_parameters() if ".w" in key and p.dim() == 2)
    for length in (512, 4096):
        engine.reserve(1, length + 64)
        prompt = torch.randint(1000, (length,)).tolist()
        with torch.inference_mode():
            ms = milliseconds(lambda prompt=prompt: engine.prefill([prompt]), 3)
        report.add("steps", f"{name}, prefill of {length}", dict(
            ms=round(ms, 2), tokens_s=round(1e3 * length / ms),
            of_matrix_rate=round(2 * matrices * length / ms * 1e3 / rate, 3)))
    report.add("steps", f"{name}, sampled (top_k 200)",
               decode_step(engine, 64, sampling=Sampling(), max_seq_length=512))
    if matrices < 4e9:
        kernels.chosen["gpu"] = "plain"
        for what, compile in (("eager", False), ("compiled", True)):
            report.add("steps", f"{name}, {what}, PyTorch's kernels",
                       decode_step(Engine(model, compile=compile), 64, max_seq_length=512))
        kernels.chosen["gpu"] = "auto"
    free(model)


def measure_peers(report: Report, name: str) -> None:
    from benchmark_peers import run_plain, run_transformers
    job: dict[str, Any] = dict(config=PUBLISHED[name], dtype="bfloat16", device="cuda", batch_size=1, prompt_length=64,
                               tokens=40)
    torch.set_default_device(DEVICE)                   # a model made on the CPU would take a minute
    for program, run in (("plain PyTorch, eager", run_plain), ("transformers, static cache", run_transformers)):
        try:
            with torch.inference_mode():
                result = run(job, ModelArgs.from_name(name))
            report.add("peers", f"{name}, bf16, {program}", dict(
                wall_ms=round(1e3 * statistics.median(result["seconds"]), 3), version=result["version"]))
        except Exception as error:                     # another program's: the rest is worth having
            report.add("peers", f"{name}, bf16, {program}", f"{type(error).__name__}: {error}"[:200])
    torch.set_default_device("cpu")


def table(results: dict) -> str:
    lines = ["| model | bits | tokens/s | ms | of the bandwidth | GB read |", "|---|---|---:|---:|---:|---:|"]
    for name, row in results.get("decoding", {}).items():
        model, bits = name.split(", ", 1)
        lines.append(f"| {model} | {bits} | {row['tokens_s']} | {row['wall_ms']:.2f} | {row['of_bandwidth']:.0%} | "
                     f"{row['read_gb']:.2f} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of gpu_check.json")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=PUBLISHED, metavar="NAME",
                        help="published shapes to measure, the largest last")
    parser.add_argument("--stages", nargs="+", default=["parity", "decoding", "steps", "peers"],
                        choices=["parity", "decoding", "steps", "peers"])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out}: {error.strerror}", "out") from None
    report = Report(args.out)
    name = torch.cuda.get_device_name() if HAS_GPU else "CPU, interpreted"
    report.add("device", "name", f"{name}, torch {torch.__version__}, {datetime.date.today().isoformat()}")
    if "parity" in args.stages:
        check_kernels(report)
    if HAS_GPU:
        if "parity" in args.stages:
            check_texts(report)
            check_families(report)
            with torch.inference_mode():
                check_models(report)
        bandwidth, rate = measure_device(report)
        if "decoding" in args.stages:
            measure_decoding(report, bandwidth, args.models)
        if "steps" in args.stages:
            for model in args.models:
                measure_other_steps(report, rate, model)
        if "peers" in args.stages:
            measure_peers(report, args.models[0])
        print(table(report.results))
    print("\n".join(["parity checks that failed:", *report.failed] if report.failed else ["all parity checks passed"]))
    if report.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
