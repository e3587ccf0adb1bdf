"""Measures decoding and prefill against other programs and against the memory's limit, in one run on one machine.

    python scripts/benchmark.py --model Qwen3-0.6B --quant none int8 int4 --peers llama.cpp transformers --out results
    python scripts/benchmark.py --prompt_length 64 4096 --batch_size 1 4 --modes compile --no_plain
    python scripts/benchmark.py --plot benchmarks/Qwen3-0.6B-cpu.json

The limit: a decoding step needs every weight once, and the keys and values of its sequences, so

    tokens/s <= batch size x memory bandwidth / bytes per step

Weights are random. Every configuration runs in a process of its own, one after the other, --rounds times over, and
medians are reported, so that a noisy neighbour meets them all alike. stdout: a table, then a line of JSON.
"""
import argparse
import datetime
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import torch

import formats
import tp
from benchmark_report import LABELS, OURS, PEERS, plot, report
from cli import UserError
from config import ModelArgs
from generate import head_bytes
from loading import parse_device
from shapes import PUBLISHED

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
NEEDS = {"llama.cpp": ("llama_cpp", "gguf"), "ik_llama.cpp": ("gguf",), "transformers": ("transformers",)}
SIZES = ("prompt_length", "batch_size", "neighbours", "max_seq_length", "ranks")   # lists; all combinations are run
OF_ALL = 3                                                                         # the others are this project's only


# ---- from raw figures to rows

def bytes_per_step(weight_bytes: int, args: ModelArgs, position: int, batch: int = 1,
                   kv_dtype: torch.dtype = torch.bfloat16) -> int:
    """Every weight, and of each sequence's keys and values positions 0 .. position, as far back as the layer looks.

    weight_bytes: from bytes_read_per_token, with what DeltaNets remember, which is read and written."""
    windows = [window for layer, window in enumerate(args.windows or (0,) * args.n_layer)
               if layer not in args.delta_layers]
    attended = sum(min(position + 1, window or position + 1) for window in windows)
    return weight_bytes + batch * attended * 2 * args.n_local_heads * head_bytes(args, kv_dtype)


def percentile(values: list[float], percent: int) -> float:
    """The smallest of the values that at least `percent` percent of them do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def summarize(job: dict, rounds: list[dict], args: ModelArgs) -> dict:
    """One row: medians over the rounds of what the workers measured (see benchmark_worker.measured).

    mbu, model bandwidth utilization: the share of the limit, with the bandwidth that the same process measured."""
    def median(of: Callable[[dict], Any]) -> Any:
        values = [of(r) for r in rounds]
        return None if None in values else statistics.median(values)
    batch, length = job["batch_size"], job["prompt_length"]
    kv_dtype = getattr(torch, job["dtype"] if job["kv_cache"] == "none" else job["kv_cache"])
    nbytes = bytes_per_step(rounds[0].get("weight_bytes", 0), args, length + job["tokens"] // 2, batch, kv_dtype)
    steps = [statistics.median(r["seconds"]) for r in rounds]
    step_s, ttft_s, compile_s = statistics.median(steps), median(lambda r: r["ttft_s"]), rounds[0].get("compile_s")
    return {key: job[key] for key in ("label", "program", "quantization", "compile", *SIZES)} | dict(
        version=rounds[0]["version"], bytes_per_step=nbytes if "weight_bytes" in rounds[0] else None,
        mbu=median(lambda r: nbytes / statistics.median(r["seconds"]) / r["bandwidth"] if "bandwidth" in r else None),
        bandwidth_gb_s=median(lambda r: r["bandwidth"] / 1e9 if "bandwidth" in r else None),
        decode_tok_s=batch / step_s, decode_tok_s_rounds=[batch / s for s in steps], decode_ms=1e3 * step_s,
        decode_ms_p90=1e3 * median(lambda r: percentile(r["seconds"], 90)),
        prefill_tok_s=batch * length / ttft_s, prefill_tok_s_rounds=[batch * length / r["ttft_s"] for r in rounds],
        ttft_ms=1e3 * ttft_s, peak_gb=median(lambda r: r["peak_bytes"]) / 1e9, load_s=median(lambda r: r.get("load_s")),
        compile_cold_s=compile_s, ratios={},
        compile_warm_s=statistics.median(r["compile_s"] for r in rounds[1:]) if compile_s and rounds[1:] else None)


def compare(rows: list[dict]) -> None:
    """Adds to each row how many times as fast as the peers it is at the same, by the median over the rounds."""
    def same(row: dict) -> tuple:
        return row["quantization"], *(row[size] for size in SIZES[:OF_ALL])
    for row, peer in itertools.permutations(rows, 2):
        if peer["program"] in PEERS and same(row) == same(peer):
            pairs = {what: zip(row[f"{what}_tok_s_rounds"], peer[f"{what}_tok_s_rounds"], strict=True)
                     for what in ("decode", "prefill")}
            row["ratios"][peer["program"]] = {
                what: statistics.median(mine / theirs for mine, theirs in rounds) for what, rounds in pairs.items()}


# ---- running

def describe_machine(threads: int, device: torch.device) -> dict:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name, flags = (re.search(rf"^{key}\s*: (.*)", info, re.MULTILINE) for key in ("model name", "flags"))
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return dict(
        cpu=name[1] if name else platform.processor() or platform.machine(), cores=os.cpu_count(), threads=threads,
        flags=" ".join(flag for flag in known if flags and flag in flags[1].split()),
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "", date=datetime.date.today().isoformat())


def work(job: dict, caches: str) -> dict:
    """Runs one worker, or one for each rank, to its end. A worker that fails gives {"failed": its last line}."""
    # A compiled configuration keeps its own compile cache: empty in the first round, filled in the later ones.
    folder = f"{caches}/{job['label']}-{job['quantization']}".replace(" ", "")
    env = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder, TRITON_CACHE_DIR=f"{folder}/triton",
               OMP_NUM_THREADS=str(job["threads"]))
    worker = Path(__file__).with_name("benchmark_peers.py" if job["program"] in PEERS else "benchmark_worker.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job['ranks']}"]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(job["neighbours"])]
    process = subprocess.Popen([sys.executable, *torchrun * (job["ranks"] > 1), str(worker), json.dumps(job)],
                               env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate()
    except BaseException:
        process.terminate()                              # unlike a kill, it ends torchrun's processes too
        process.wait()
        raise
    finally:
        for neighbour in busy:
            neighbour.kill()
            neighbour.wait()
    if process.returncode:
        print(err[-4000:], file=sys.stderr)
        return dict(failed=cause(err) or f"exit status {process.returncode}")
    return json.loads(out.strip().splitlines()[-1])


def cause(err: str) -> str:
    """The line of a worker's stderr that says why it failed; torchrun's own report comes after it."""
    lines = err.strip().splitlines() or [""]
    told = (line for start in ("error: ", "[rank") for line in reversed(lines) if line.startswith(start))
    return next(told, lines[-1])


def missing(program: str) -> str | None:
    """The first package that a peer needs and that is not installed."""
    return next((name for name in NEEDS.get(program, ()) if importlib.util.find_spec(name) is None), None)


def plan(args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """The jobs in the order in which a round runs them, and one line for each one left out."""
    common = {key: getattr(args, key) for key in ("device", "threads", "tokens", "groupsize", "lm_head", "work_dir",
                                                 "llama_bench")}
    config, name = PUBLISHED[args.model], args.model
    if args.layers:
        config, name = {**config, "num_hidden_layers": args.layers}, f"{name}-{args.layers}-layers"
    common |= dict(config=config, name=name, dtype=DTYPES[args.dtype])
    shape = ModelArgs.from_hf(config)
    is_plain = not shape.n_expert and not shape.delta_layers                 # else the plain program has no form for it
    lacks = {peer: f"{name} is not installed (pip install -r requirements-bench.txt)"
             for peer in args.peers if (name := missing(peer))}
    if "ik_llama.cpp" in args.peers and not args.llama_bench:
        lacks["ik_llama.cpp"] = "its llama-bench is neither on the PATH nor given by --llama_bench"
    peers = [peer for peer in args.peers if peer not in lacks] + ["plain"] * (not args.no_plain and is_plain)
    points, jobs = itertools.product(*(getattr(args, size) for size in SIZES)), []
    for kind, point in itertools.product(args.quant, [dict(zip(SIZES, point, strict=True)) for point in points]):
        jobs += [job_of(args, common, kind, point, OURS, mode == "compile", kv_cache)
                 for mode, kv_cache in itertools.product(args.modes, args.kv_cache)]
        if (point["max_seq_length"], point["ranks"]) == (args.max_seq_length[0], args.ranks[0]):  # once
            jobs += [job_of(args, common, kind, point | dict(ranks=1), peer) for peer in peers
                     if (kind == "none" or peer in ("llama.cpp", "ik_llama.cpp"))
                     and (point["batch_size"] == 1 or peer != "ik_llama.cpp")]
    skipped = [f"{peer}: {reason}" for peer, reason in lacks.items()]
    if "transformers" in peers and "none" not in args.quant:
        skipped.append("transformers: runs without quantization (--quant none)")
    return jobs, skipped


def job_of(args: argparse.Namespace, common: dict, kind: str, point: dict, program: str, compile: bool = False,
           kv_cache: str = "none") -> dict:
    """The label names the sizes that differ from job to job."""
    sizes = SIZES if program == OURS else SIZES[:OF_ALL]
    varied = [f", {size} {point[size]}" for size in sizes if len(getattr(args, size)) > 1]
    int8 = " --kv_cache int8" * (kv_cache == "int8")
    label = "".join([LABELS.get(program, program), " --compile" * compile, int8, *varied])
    return dict(common, **point, program=program, quantization=kind, compile=compile, kv_cache=kv_cache, label=label)


def measure(args: argparse.Namespace, caches: str) -> dict:
    jobs, skipped = plan(args)
    pairs: list[tuple[dict, list[dict]]] = [(job, []) for job in jobs]
    for number, (job, results) in itertools.product(range(1, args.rounds + 1), pairs):
        if not results or "failed" not in results[-1]:
            results.append(work(job, caches))
            ms = 1e3 * statistics.median(results[-1].get("seconds", [float("nan")]))
            print(f"round {number}: {job['label']} {job['quantization']}: {ms:.1f} ms a step", file=sys.stderr)
    skipped += [f"{job['label']} {job['quantization']} failed: {results[-1]['failed']}"
                for job, results in pairs if "failed" in results[-1]]
    rows = [summarize(job, results, ModelArgs.from_hf(job["config"])) for job, results in pairs
            if "failed" not in results[-1]]
    compare(rows)
    asked = ("model", "layers", "dtype", "device", "tokens", "rounds", "groupsize", "lm_head")
    told = {key: getattr(args, key) for key in asked}
    return told | dict(machine=describe_machine(args.threads, torch.device(args.device)), rows=rows, skipped=skipped)


# ---- the command

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--model", default="Qwen3-0.6B", choices=PUBLISHED, metavar="NAME", help="a published shape, e.g. Llama-3.2-1B")
    add("--layers", type=int, help="fewer of them, where the model does not fit into memory")
    add("--device", default="cpu", help="cpu, cuda or cuda:1")
    add("--dtype", default="bf16", choices=DTYPES)
    add("--quant", nargs="+", default=["none"], choices=["none", *formats.MODES], help="formats of the weights")
    add("--groupsize", type=int, default=32, choices=formats.GROUPSIZES, help="of int4")
    add("--lm_head", default="int8", choices=formats.LM_HEADS, help="of the quantized models, llama.cpp's too")
    add("--kv_cache", nargs="+", default=["none"], choices=["none", "int8"], help="of this project, e.g. none int8")
    add("--modes", nargs="*", default=["compile", "eager"], choices=["compile", "eager"], help="of this project")
    add("--peers", nargs="*", default=[], choices=["llama.cpp", "ik_llama.cpp", "transformers"])
    add("--llama_bench", default=shutil.which("llama-bench"), help="of ik_llama.cpp (default: the one on the PATH)")
    add("--no_plain", action="store_true", help="leave out the plain PyTorch program")
    add("--tokens", type=int, default=64, help="tokens to time")
    add("--prompt_length", type=int, nargs="+", default=[256], help="tokens before them, e.g. 64 4096")
    add("--batch_size", type=int, nargs="+", default=[1], help="sequences at a time, e.g. 1 4 16")
    add("--neighbours", type=int, nargs="+", default=[0], help="other processes that keep a core busy, e.g. 0 1 2")
    add("--max_seq_length", type=int, nargs="+", default=[512], help="least capacity of the KV cache, e.g. 1024 32768")
    add("--ranks", type=int, nargs="+", default=[1], help="spread this project over so many processes, e.g. 1 2")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, help="of each process (default: all cores, divided by the largest number of --ranks)")
    add("--work_dir", help="keeps the random checkpoints for the next run (default: a temporary folder)")
    add("--out", type=Path, help="folder for the JSON, the Markdown tables and the plot")
    add("--plot", type=Path, metavar="JSON", help="measure nothing: print this result's table and draw it again")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Errors: UserError."""
    for field in (*SIZES, "tokens", "rounds", "threads"):
        value = getattr(args, field)
        least = 0 if field == "neighbours" else 1
        if (smallest := min(value) if isinstance(value, list) else value) < least:
            raise UserError(f"{smallest} must be {least} or more", field)
    shape, most = ModelArgs.from_name(args.model), {size: max(getattr(args, size)) for size in SIZES}
    if parse_device(args.device).type == "cuda" and most["ranks"] > torch.cuda.device_count():
        raise UserError(f"{most['ranks']}: there are {torch.cuda.device_count()} CUDA devices", "ranks")
    with cli.fields(world_size="ranks"):
        tp.plan(shape, 0, most["ranks"])
    for field, new in dict(prompt_length=args.tokens + 1, max_seq_length=0).items():
        if most[field] + new > shape.max_position:
            raise UserError(f"{most[field]} and {new} new tokens exceed the model's {shape.max_position} positions",
                            field)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.plot:
        try:
            result = json.loads(cli.read_text(args.plot, "plot"))
            print(report(result))
            return plot(result, args.plot.with_suffix(".svg"))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{args.plot}: not a result that this program wrote", "plot") from None
    args.threads = max(1, torch.get_num_threads() // max(1, *args.ranks)) if args.threads is None else args.threads
    check_args(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # so that a worker does not outlive this process
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        args.work_dir = args.work_dir or scratch
        result = measure(args, f"{scratch}/caches")
    print(text := report(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = args.out / f"{args.model}-{args.device.replace(':', '')}"
        Path(f"{stem}.json").write_text(json.dumps(result, indent=1))
        Path(f"{stem}.md").write_text(text + "\n")
        plot(result, Path(f"{stem}.svg"))
    print(f"\n{json.dumps(result)}")


if __name__ == "__main__":
    cli.run(main)
