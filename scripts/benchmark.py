"""Measures decoding and prefill against other programs and against the memory's limit, in one run on one machine.

    python scripts/benchmark.py --model Qwen3-0.6B --device cpu --dtype bf16 --quant none int8 int4 --peers llama.cpp transformers
    python scripts/benchmark.py --model Qwen3-0.6B --ranks 1 2

The named shape is filled with random weights. Every configuration runs in a process of its own, one after the other, --rounds times over, and
medians are reported, so that a noisy neighbour meets them all alike. Tables go to stdout, with JSON and a plot to --out; the last line is JSON.
"""
import argparse
import datetime
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import formats
import tp
from benchmark_report import OURS, PEERS, plot, report
from config import PUBLISHED, ModelArgs
from cli import read_json, run, UserError
from loading import parse_device

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
NEEDS = {"llama.cpp": ("llama_cpp", "gguf"), "transformers": ("transformers",)}


# What one token costs

def matrices(args: ModelArgs) -> list[tuple[int, int]]:
    """[N, K] of every matrix that a decoded token passes through: all but the input embedding; the output head, tied or not, comes last."""
    width = args.n_head * args.head_dim
    layer = [(width + 2 * args.n_local_heads * args.head_dim, args.dim), (args.dim, width),
             (2 * args.intermediate_size, args.dim), (args.dim, args.intermediate_size)]
    return layer * args.n_layer + [(args.vocab_size, args.dim)]


def vector_elements(args: ModelArgs) -> int:
    """Norm weights and biases."""
    qkv, F, C = (args.n_head + 2 * args.n_local_heads) * args.head_dim, args.intermediate_size, args.dim
    layer = 2 * C + args.qkv_bias * qkv + args.o_bias * C + args.mlp_bias * (2 * F + C) + args.qk_norm * 2 * args.head_dim
    return args.n_layer * layer + C


def matrix_bytes(n: int, k: int, kind: str, dtype_bytes: int, groupsize: int, program: str) -> int:
    """int8: an fp32 scale a row. int4: a bf16 scale and a zero of one byte a group. llama.cpp's Q8_0 and Q4_0: an fp16 scale per 32 weights."""
    if kind == "none":
        return dtype_bytes * n * k
    if program == "llama.cpp":
        return n * k // 32 * {"int8": 34, "int4": 18}[kind]
    return n * k + 4 * n if kind == "int8" else n * (-(-k // 2) + 3 * -(-k // groupsize))


def bytes_per_token(args: ModelArgs, quantization: str = "none", position: int = 0, batch: int = 1, dtype_bytes: int = 2, groupsize: int = 32,
                    lm_head: str = "int8", program: str = OURS) -> int:
    """Bytes that one decode step must read: every weight once, and of each row's KV cache the slots 0 .. position.

    lm_head: the output head's format in a quantized model.
    """
    *inner, head = matrices(args)
    weights = sum(matrix_bytes(n, k, quantization, dtype_bytes, groupsize, program) for n, k in inner)
    weights += matrix_bytes(*head, "none" if quantization == "none" else lm_head, dtype_bytes, groupsize, program)
    slots = sum(min(position + 1, window or position + 1) for window in args.windows or (0,) * args.n_layer)
    return weights + dtype_bytes * vector_elements(args) + batch * slots * 2 * args.n_local_heads * args.head_dim * dtype_bytes


def mbu(bytes_read: int, seconds: float, bandwidth: float) -> float:
    """Model bandwidth utilization: the share of the measured read bandwidth (bytes/s) that one step's necessary reads make up."""
    return bytes_read / seconds / bandwidth


def percentile(values: list[float], percent: float) -> float:
    """The smallest of the values that at least `percent` percent of them do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100).__int__() - 1)]


# From raw figures to rows

def summarize(job: dict, rounds: list[dict], args: ModelArgs, bandwidths: list[float]) -> dict:
    """One row: medians over the rounds of what the workers measured (see benchmark_worker.measured). bandwidths: of each round."""
    def median(of) -> float | None:
        values = [of(r) for r in rounds]
        return None if None in values else statistics.median(values)
    dtype_bytes = {"bf16": 2, "fp16": 2, "fp32": 4}[job["dtype_name"]]
    cost = dict(quantization=job["quantization"], dtype_bytes=dtype_bytes, groupsize=job["groupsize"], lm_head=job["lm_head"], program=job["program"])
    step_s = median(lambda r: statistics.median(r["seconds"]))
    bandwidths = [r.get("bandwidth", rate) for r, rate in zip(rounds, bandwidths, strict=True)]
    bytes_read = bytes_per_token(args, position=job["prompt_length"] + job["tokens"] // 2, **cost)
    row = dict(label=label(job), program=job["program"], quantization=job["quantization"], compile=job["compile"], version=rounds[0]["version"],
               decode_tok_s=1 / step_s, decode_ms=1e3 * step_s, decode_ms_p90=1e3 * median(lambda r: percentile(r["seconds"], 90)),
               decode_tok_s_rounds=[1 / statistics.median(r["seconds"]) for r in rounds],
               mbu=statistics.median(mbu(bytes_read, statistics.median(r["seconds"]), rate) for r, rate in zip(rounds, bandwidths)),
               bytes_per_token=bytes_read, limit_tok_s=statistics.median(bandwidths) / bytes_read,
               prefill_tok_s_rounds=[job["prompt_length"] / r["ttft_s"] for r in rounds],
               prefill_tok_s=job["prompt_length"] / median(lambda r: r["ttft_s"]), ttft_ms=1e3 * median(lambda r: r["ttft_s"]),
               peak_gb=median(lambda r: r["peak_bytes"]) / 1e9, load_s=median(lambda r: r.get("load_s")),
               compile_cold_s=rounds[0].get("compile_s"), weight_bytes=rounds[0].get("weight_bytes"),
               compile_warm_s=statistics.median(r["compile_s"] for r in rounds[1:]) if len(rounds) > 1 and rounds[0].get("compile_s") else None,
               recompiles=max(r.get("recompiles", 0) for r in rounds), ranks=job["ranks"], position={}, capacity={}, batch={})
    if job["ranks"] > 1:
        told = {name: median(lambda r: r["communication"][name]) for name in rounds[0]["communication"]}
        row["communication"] = dict(
            all_reduces=told["all_reduce"], all_reduces_a_layer=(told["all_reduce"] - 1) / args.n_layer, all_gathers=told["all_gather"],
            bytes=dtype_bytes * (told["all_reduce"] * args.dim + told["all_gather"] * args.vocab_size),
            ms=1e3 * step_s * told["share"], exchange_ms=1e3 * told["exchange_s"])
    for i, sweep in enumerate(rounds[0].get("sweeps", [])):
        times, at = [statistics.median(r["sweeps"][i]["seconds"]) for r in rounds], sweep["at"]
        seconds, tokens = statistics.median(times), at if sweep["what"] == "batch" else 1
        row[sweep["what"]][at] = dict(ms=1e3 * seconds, tok_s=tokens / seconds, tok_s_rounds=[tokens / t for t in times])
        if sweep["what"] == "position":
            row["position"][at]["mbu"] = mbu(bytes_per_token(args, position=at + job["tokens"] // 2, **cost), seconds, statistics.median(bandwidths))
    return row


def label(job: dict) -> str:
    return job["program"] + (" --compile" if job["compile"] else "") + (f", {job['ranks']} ranks" if job["ranks"] > 1 else "")


def add_speedups(rows: list[dict]) -> None:
    """Of several ranks over one, measured and expected: t(W) = t(1) x (bytes that a rank reads / bytes that one process reads) + the exchange."""
    for row in rows:
        alone = next((r for r in rows if r["ranks"] == 1 and all(r[key] == row[key] for key in ("program", "quantization", "compile"))), None)
        if row["ranks"] > 1 and alone:
            expected_ms = alone["decode_ms"] * row["weight_bytes"] / alone["weight_bytes"] + row["communication"]["exchange_ms"]
            row["communication"] |= dict(speedup=alone["decode_ms"] / row["decode_ms"], expected_speedup=alone["decode_ms"] / expected_ms)


# Running

def describe_machine(threads: int, device: torch.device) -> dict:
    cpu, flags, memory = platform.processor() or platform.machine(), "", 0
    try:
        info = Path("/proc/cpuinfo").read_text()
        cpu = next(line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name"))
        present = set(next(line for line in info.splitlines() if line.startswith("flags")).split())
        flags = " ".join(f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if f in present)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (OSError, StopIteration, ValueError):
        pass
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return dict(cpu=cpu, cores=os.cpu_count(), flags=flags, memory_gb=memory, threads=threads, gpu=gpu, torch=torch.__version__,
                date=datetime.date.today().isoformat())


def work(job: dict, caches: str) -> dict:
    """Runs one worker, or as many as there are ranks, to its end. A worker that fails gives {"failed": its last line}."""
    # A compiled configuration keeps its own compile cache: empty in the first round, filled in the later ones.
    folder = f"{caches}/{job['program']}-{job['quantization']}-{job['compile']}-{job['ranks']}"
    env = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder, TRITON_CACHE_DIR=f"{folder}/triton", OMP_NUM_THREADS=str(job["threads"]))
    several = job["ranks"] > 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job['ranks']}"] if several else []
    worker = Path(__file__).resolve().with_name(
        "benchmark_ranks.py" if several else "benchmark_peers.py" if job["program"] in PEERS else "benchmark_worker.py")
    command = [sys.executable, *torchrun, str(worker), json.dumps(job)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate()
    except BaseException:
        process.terminate()                                              # unlike a kill, it ends torchrun's processes too
        process.wait()
        raise
    if process.returncode:
        print(err[-4000:], file=sys.stderr)
        return dict(failed=cause(err) or f"exit status {process.returncode}")
    return json.loads(out.strip().splitlines()[-1])


def cause(err: str) -> str:
    """The line of a worker's stderr that says why it failed; torchrun's own report comes after it."""
    lines = err.strip().splitlines() or [""]
    return next((line for start in ("error: ", "[rank") for line in reversed(lines) if line.startswith(start)), lines[-1])


def missing(program: str) -> str | None:
    """The first package that a peer needs and that is not installed."""
    return next((name for name in NEEDS.get(program, ()) if importlib.util.find_spec(name) is None), None)


def plan(args: argparse.Namespace, common: dict) -> tuple[list[dict], list[str]]:
    """The jobs in the order in which a round runs them, and one line for each one left out."""
    jobs, skipped = [], []
    for quantization in args.quant:
        jobs += [dict(common, program=OURS, quantization=quantization, compile=mode == "compile", ranks=n) for mode in args.modes for n in args.ranks]
        if "llama.cpp" in args.peers and not missing("llama.cpp"):
            jobs.append(dict(common, program="llama.cpp", quantization=quantization, compile=False))
    if "transformers" in args.peers and "none" in args.quant and not missing("transformers"):
        jobs.append(dict(common, program="transformers", quantization="none", compile=False))
    if "none" in args.quant and not args.no_plain:
        jobs.append(dict(common, program="plain", quantization="none", compile=False))
    if "transformers" in args.peers and "none" not in args.quant:
        skipped.append("transformers: runs without quantization (--quant none)")
    skipped += [f"{peer}: {missing(peer)} is not installed (pip install -r requirements-bench.txt)" for peer in args.peers if missing(peer)]
    return jobs, skipped


def measure(args: argparse.Namespace, config: dict, name: str, work_dir: str, caches: str) -> dict:
    common = dict(config=config, name=name, device=args.device, dtype=DTYPES[args.dtype], dtype_name=args.dtype, threads=args.threads,
                  prompt_length=args.prompt_length, tokens=args.tokens, positions=args.positions, capacities=args.capacities,
                  batch_sizes=args.batch_sizes, ranks=1, groupsize=args.groupsize, lm_head=args.lm_head, work_dir=work_dir,
                  checkpoint_path=str(args.checkpoint_path) if args.checkpoint_path else None)
    jobs, skipped = plan(args, common)
    bandwidths, found = [], [[] for _ in jobs]
    for number in range(1, args.rounds + 1):
        rates = work(dict(common, program="bandwidth", quantization="none", compile=False), caches)
        if "failed" in rates:
            raise RuntimeError(f"the bandwidth's measurement failed: {rates['failed']}")
        bandwidths.append(max((rate, way) for way, rate in rates["rates"].items()))
        print(f"round {number}: reads {bandwidths[-1][0] / 1e9:.1f} GB/s ({bandwidths[-1][1]})", file=sys.stderr)
        for job, results in zip(jobs, found):
            if results and "failed" in results[-1]:
                continue
            results.append(work(job, caches))
            rate = "failed" if "failed" in results[-1] else f"{1 / statistics.median(results[-1]['seconds']):.1f} tok/s"
            print(f"round {number}: {label(job)} {job['quantization']}: {rate}", file=sys.stderr)
    bandwidth = statistics.median(rate for rate, _ in bandwidths)
    machine = describe_machine(args.threads, torch.device(args.device)) | dict(
        bandwidth_gb_s=bandwidth / 1e9, bandwidth_by=bandwidths[-1][1], bandwidth_rounds=[rate / 1e9 for rate, _ in bandwidths])
    rows = []
    for job, results in zip(jobs, found):
        if "failed" in results[-1]:
            skipped.append(f"{label(job)} {job['quantization']} failed: {results[-1]['failed']}")
        else:
            rows.append(summarize(job, results, ModelArgs.from_hf(config), [rate for rate, _ in bandwidths]))
    add_speedups(rows)
    return dict(model=name, dtype=args.dtype, device=args.device, prompt_length=args.prompt_length, tokens=args.tokens, rounds=args.rounds,
                groupsize=args.groupsize, lm_head=args.lm_head, machine=machine, rows=rows, skipped=skipped)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-0.6B", choices=PUBLISHED, metavar="NAME", help="a published shape, e.g. Llama-3.2-1B")
    parser.add_argument("--checkpoint_path", type=Path, help="measure this checkpoint instead; the others run random weights of its shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--quant", nargs="+", default=["none"], choices=["none", "int8", "int4"])
    parser.add_argument("--groupsize", type=int, default=32, choices=formats.GROUPSIZES, help="of int4")
    parser.add_argument("--lm_head", default="int8", choices=["none", "int8", "int4"], help="of the quantized models, llama.cpp's too")
    parser.add_argument("--modes", nargs="*", default=["compile", "eager"], choices=["compile", "eager"], help="how to run this project")
    parser.add_argument("--peers", nargs="*", default=[], choices=["llama.cpp", "transformers"])
    parser.add_argument("--no_plain", action="store_true", help="leave out the plain PyTorch program")
    parser.add_argument("--prompt_length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64, help="how many to time")
    parser.add_argument("--positions", type=int, nargs="*", default=[], help="decode at these positions, e.g. 64 1024 4096")
    parser.add_argument("--capacities", type=int, nargs="*", default=[], help="decode at position 64 of caches this long, e.g. 1024 32768")
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[], help="e.g. 1 4 16")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="spread this project over so many processes, e.g. 1 2: tensor parallelism")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of each process (default: all cores, divided by the largest number of --ranks)")
    parser.add_argument("--work_dir", type=Path, help="keeps the random checkpoints and GGUF files for the next run (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="folder for the JSON, the Markdown table and the plot")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if min(args.ranks) < 1:
        raise UserError(f"--ranks {min(args.ranks)} must be 1 or more")
    args.threads = max(1, torch.get_num_threads() // max(args.ranks)) if args.threads is None else args.threads
    for flag in ("prompt_length", "tokens", "rounds", "threads", "positions", "batch_sizes"):
        least = min(value, default=1) if isinstance(value := getattr(args, flag), list) else value
        if least < 1:
            raise UserError(f"--{flag} {least} must be 1 or more")
    device = parse_device(args.device)
    if device.type == "cuda" and max(args.ranks) > torch.cuda.device_count():
        raise UserError(f"--ranks {max(args.ranks)}: there are {torch.cuda.device_count()} CUDA devices")
    if args.checkpoint_path:
        if args.checkpoint_path.is_dir():
            args.checkpoint_path /= "model.pth"
        if not args.checkpoint_path.exists() or loading.read_checkpoint(args.checkpoint_path)[1]:
            raise UserError(f"--checkpoint_path {args.checkpoint_path}: an unquantized model.pth is needed; --quant quantizes it for the measurement")
        config, name = read_json(args.checkpoint_path.parent / "config.json"), args.checkpoint_path.resolve().parent.name
    else:
        config, name = PUBLISHED[args.model], args.model
    shape = ModelArgs.from_hf(config)
    try:
        tp.plan(shape, 0, max(args.ranks))
    except UserError as error:
        raise UserError(str(error).replace("--nproc_per_node", "--ranks")) from None
    if max([0, *args.capacities, *(p + args.tokens + 1 for p in [args.prompt_length, *args.positions])]) > shape.max_position:
        raise UserError(f"--prompt_length, --positions, --capacities: with --tokens they go past the model's {shape.max_position} positions")
    if min([args.tokens + 1, *args.capacities]) <= args.tokens:
        raise UserError(f"--capacities {min(args.capacities)} does not hold --tokens {args.tokens}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # so that a worker does not outlive this process
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        if args.work_dir:
            args.work_dir.mkdir(parents=True, exist_ok=True)
        result = measure(args, config, name, str(args.work_dir or scratch), f"{scratch}/caches")
    text = report(result)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = args.out / f"{name}-{args.device.replace(':', '')}"
        stem.with_name(stem.name + ".json").write_text(json.dumps(result, indent=1))
        stem.with_name(stem.name + ".md").write_text(text + "\n")
        if importlib.util.find_spec("matplotlib"):
            plot(result, stem.with_name(stem.name + ".png"))
        else:
            print("\nskipped: the plot: matplotlib is not installed (pip install -r requirements-bench.txt)")
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    run(main)
