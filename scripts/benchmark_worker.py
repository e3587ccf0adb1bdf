"""One configuration of benchmark.py, in a process of its own:

    python scripts/benchmark_worker.py '{"program": "qwen-fast", "config": {...}, ...}'

Programs: "bandwidth" (what the memory can do) and "qwen-fast" (this project); benchmark_ranks.py spreads it over several processes, and
benchmark_peers.py runs the others.
The last line of stdout is one JSON object of raw figures in seconds and bytes; see `measured`.
"""
import json
import shutil
import statistics
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from config import ModelArgs
import kernels
import quantize
import tp
from cli import atomic_write
from generate import bytes_read_per_token, DEMO, Engine, reserve_caches, warm_up
from loading import load_model
from model import KVCache, Transformer
from sampling import Sampling


def reset_peak_memory() -> None:
    """The peak of memory counts from here (on a CPU only where the system is Linux)."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory() -> int:
    """Bytes: what the allocator reserved on CUDA, otherwise the resident set's high-water mark."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def measured(seconds: list[float], ttft_s: float, peak_bytes: int, version: str, **more) -> dict:
    """What a worker reports. seconds: one figure per decoded token after the prompt; ttft_s: from the prompt to its first new token.

    more: load_s (files to a model that is ready), compile_s, recompiles (while generating), weight_bytes (read per token), bandwidth (bytes/s that
    this process read from the memory, in turns with decoding), and sweeps, [{"what": "position" | "capacity" | "batch", "at": its value,
    "seconds": one figure per step}]."""
    return dict(seconds=seconds, ttft_s=ttft_s, peak_bytes=peak_bytes, version=version, **more)


def token_times(tokens: Iterable, start: float, between: Callable[[], None] = lambda: None) -> tuple[float, list[float]]:
    """Seconds to the first of the tokens, and between the others, without what is done in between."""
    seconds = []
    for _ in tokens:
        seconds.append(time.perf_counter() - start)
        between()
        start = time.perf_counter()
    return seconds[0], seconds[1:]


# The memory

def run_bandwidth(job: dict, args: ModelArgs) -> dict:
    """Bytes/s read from a buffer far larger than the caches, several ways; the median of each way's repetitions, as of every other figure here:
    what other programs leave of the memory's speed is not the same from one second to the next."""
    cuda = job["device"].startswith("cuda")
    numbers = kernels.huge_zeros(((4 if cuda else 1) << 28,), torch.float32, job["device"]).fill_(1)       # in the pages that weights are in
    parts, pool = numbers.chunk(job["threads"]), ThreadPoolExecutor(job["threads"])
    ways: dict[str, Callable] = {"sum of fp32": numbers.sum, "sum of int64": numbers.view(torch.int64).sum, "maximum": numbers.amax,
                                 "sum of bf16": numbers.view(torch.bfloat16).sum, "dot product": lambda: torch.dot(numbers, numbers)}
    if cuda:
        ways["compiled sum of fp32"] = torch.compile(numbers.sum)
    else:
        arrays = [part.numpy() for part in parts]
        ways["NumPy maximum, a thread a core"] = lambda: list(pool.map(lambda a: a.max(), arrays))
        ways["NumPy dot product, a thread a core"] = lambda: list(pool.map(lambda a: a.dot(a), arrays))
    rates = {}
    for name, way in ways.items():
        times = []
        for _ in range(12):
            start = time.perf_counter()
            way()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        rates[name] = numbers.nbytes / statistics.median(times)
    return dict(rates=rates)


# This project

def prepared_checkpoint(job: dict, dtype: torch.dtype) -> Path:
    """The file to load, in the work folder: --checkpoint_path's files, or random weights with the demo's tokenizer; quantized where asked."""
    origin = f"-{zlib.crc32(job['checkpoint_path'].encode())}-{Path(job['checkpoint_path']).stat().st_mtime_ns}" if job["checkpoint_path"] else ""
    folder = Path(job["work_dir"]) / f"{job['name']}-{job['dtype']}{origin}"
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "model.pth"
    if job["checkpoint_path"]:
        given = Path(job["checkpoint_path"]).resolve()
        for name, file in {**{f.name: f for f in given.parent.glob("*.json")}, "model.pth": given}.items():
            if not (folder / name).exists():
                (folder / name).symlink_to(file)
    elif not plain.exists():
        for file in DEMO.parent.glob("tokenizer*.json"):
            shutil.copy(file, folder)
        (folder / "config.json").write_text(json.dumps(job["config"]))
        write_random_checkpoint(ModelArgs.from_hf(job["config"]), dtype, plain)
    if job["quantization"] == "none":
        return plain
    ready = folder / f"{job['quantization']}-g{job['groupsize']}-head-{job['lm_head']}.pth"
    if not ready.exists():
        quantize.quantize_checkpoint(plain, job["quantization"], job["groupsize"], job["lm_head"], progress=False).rename(ready)
    return ready


def write_random_checkpoint(args: ModelArgs, dtype: torch.dtype, path: Path) -> None:
    """Values of normal size: no NaN, no slow denormals."""
    with torch.device("meta"):
        expected = Transformer(args).state_dict()
    pool = torch.randn((1 << 22) - 3).mul_(0.02).to(dtype)               # repeated; an odd length, so that no two rows are equal
    state = {}
    for name, value in expected.items():
        n = value.numel()
        state[name] = pool.repeat(-(-n // pool.numel()))[:n].clone().view(value.shape) if value.dim() == 2 else torch.ones(n, dtype=dtype)
    with atomic_write(path) as partial:
        torch.save({"version": 1, "quantization": None, "state_dict": state}, partial)


def read_rate(model: Transformer) -> float:
    """Bytes/s that the memory gives right now, where other programs share it: from a sum over the largest tensor there is anyway."""
    numbers = model.tok_embeddings.weight.flatten().view(torch.int64)
    start = time.perf_counter()
    numbers.sum()
    return numbers.nbytes / (time.perf_counter() - start)


GREEDY = Sampling(temperature=0.0)


def loaded(job: dict, ranks: tp.Ranks | None = None) -> tuple[Transformer, float]:
    """The model, and seconds from its file to the memory."""
    dtype, device = getattr(torch, job["dtype"]), torch.device(job["device"])
    file = prepared_checkpoint(job, dtype) if not ranks or ranks.first else None
    file = ranks.from_first(file) if ranks else file
    kernels.describe(device)                                             # builds the kernels, once on a machine
    start = time.perf_counter()
    model, _ = load_model(file, device, dtype, ranks)
    return model, time.perf_counter() - start


def decoded(job: dict, generator: Engine, load_s: float) -> dict:
    """Figures of greedy decoding through Engine, as generate.py does it."""
    model, tokens = generator.model, job["tokens"]
    prompt = torch.randint(0, model.args.vocab_size, (job["prompt_length"],)).tolist()
    request = dict(sampling=GREEDY, max_seq_length=max(512, len(prompt) + tokens + 1), stop_ids=frozenset())
    compile_s = warm_up(generator, [prompt[:8]], dict(max_new_tokens=3, **request))
    list(generator.generate(prompt, 3, **request))
    reset_peak_memory()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    alone, rates = model.device.type == "cpu" and not model.ranks, []     # several ranks would read their parts at the same time
    ttft_s, seconds = token_times(generator.generate(prompt, tokens + 1, **request), time.perf_counter(),
                                  lambda: rates.append(read_rate(model)) if alone else None)
    return measured(seconds, ttft_s, peak_memory(), f"torch {torch.__version__} ({kernels.describe(model.device)})", load_s=load_s,
                    compile_s=compile_s if job["compile"] else None,
                    recompiles=torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs, weight_bytes=bytes_read_per_token(model),
                    **(dict(bandwidth=statistics.median(rates)) if rates else {}))


def step_times(generator: Engine, batch: int, position: int, n: int) -> list[float]:
    """Seconds of each of n steps from this position on."""
    device = generator.model.device
    idx, input_pos = (torch.full((batch, 1), i, device=device) for i in (0, position))
    times = [time.perf_counter()]
    for _ in range(n):
        idx = generator.advance(idx, input_pos, GREEDY, torch.Generator(device))
        idx.tolist()
        times.append(time.perf_counter())
    return [b - a for a, b in zip(times, times[1:])]


def run_ours(job: dict, args: ModelArgs) -> dict:
    """Decoding after a prompt; the sweeps step the decoder at a position of a cache filled beforehand, a few steps at each place in turn."""
    model, load_s = loaded(job)
    main = decoded(job, Engine(model, compile=job["compile"]), load_s)
    generator, turns = Engine(model, compile=job["compile"]), 1 if model.device.type == "cuda" else 4

    def caches(batch: int, capacity: int) -> tuple[list[KVCache], kernels.Stack | None]:
        """Of a shape of their own; every page of them is real."""
        model.max_seq_length = 0
        reserve_caches(model, batch, capacity)
        for layer in model.layers:
            layer.attention.kv_cache.k_cache.fill_(0.01)
            layer.attention.kv_cache.v_cache.fill_(0.01)
        return [layer.attention.kv_cache for layer in model.layers], model.stack

    sweeps, tokens = [], job["tokens"]
    torch._dynamo.config.recompile_limit = 64                             # for as many shapes of the cache, in one sweep
    shapes = [("position", job["positions"], lambda at: (1, max(job["positions"]) + tokens, at)),
              ("capacity", job["capacities"], lambda at: (1, at, min(64, min(job["capacities"]) - tokens))),
              ("batch", job["batch_sizes"], lambda at: (at, 64 + tokens, 64))]
    for what, values, shape_of in shapes:
        torch.compiler.reset()
        kept = {shape: caches(*shape) for shape in dict.fromkeys(shape_of(at)[:2] for at in values)}
        seconds: dict[int, list[float]] = {at: [] for at in values}
        for turn in range(turns):
            for at in values:
                batch, capacity, position = shape_of(at)
                of_layers, model.stack = kept[batch, capacity]
                for layer, cache in zip(model.layers, of_layers):
                    layer.attention.kv_cache = cache
                steps = -(-tokens // turns)
                step_times(generator, batch, position, 3 if turn == 0 else 1)
                seconds[at] += step_times(generator, batch, position + min(turn * steps, tokens - steps), steps)
        del kept
        sweeps += [dict(what=what, at=at, seconds=seconds[at]) for at in values]
    return main | dict(sweeps=sweeps)


def serve(programs: dict[str, Callable[[dict, ModelArgs], dict]]) -> None:
    """Runs the job of the command line and prints what it reports."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with torch.inference_mode():
        result = programs[job["program"]](job, ModelArgs.from_hf(job["config"]))
    print(json.dumps(result))


if __name__ == "__main__":
    serve({"bandwidth": run_bandwidth, "qwen-fast": run_ours})
