"""One configuration of benchmark.py over several processes, in each of them:

    torchrun --standalone --nproc_per_node=2 scripts/benchmark_ranks.py '{"config": {...}, ...}'

Rank 0 reports as benchmark_worker.py does, and what the ranks tell each other in a token: see `communication`.
"""
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import tp
from benchmark_worker import decoded, loaded, step_times
from cli import run
from generate import Engine
from model import Transformer

PROFILED_STEPS = 16


def run_ranks(job: dict, ranks: tp.Ranks) -> dict:
    job["device"] = str(ranks.take_device(torch.device(job["device"])))
    torch.set_num_threads(job["threads"])
    model, load_s = loaded(job, ranks)
    generator = Engine(model, compile=job["compile"])
    result = decoded(job, generator, load_s)
    result["peak_bytes"] = max(ranks.gather(result["peak_bytes"]))
    return result | dict(communication=communication(generator, ranks, job["prompt_length"]))


def communication(generator: Engine, ranks: tp.Ranks, position: int) -> dict:
    """Of a token: numbers of collectives; share: the part of the time that the ranks spend in them, waiting for each other included (their mean,
    from a profile of decoding); exchange_s: what as many collectives of the same sizes take when all ranks are there and do nothing else."""
    model = generator.model
    with torch.profiler.profile() as profile:
        step_s = sum(step_times(generator, 1, position, PROFILED_STEPS)) / PROFILED_STEPS
    events = profile.key_averages()

    def of(prefix: str, figure: Callable) -> float:
        return sum(figure(event) for event in events if event.key.startswith(prefix)) / PROFILED_STEPS
    counts = {name: of(f"_c10d_functional::{name}", lambda event: event.count) for name in ("all_reduce", "all_gather")}
    on_gpu = model.device.type == "cuda"
    microseconds = of("nccl", lambda event: event.self_device_time_total) if on_gpu else of("_c10d_functional::", lambda event: event.cpu_time_total)
    sizes = dict(all_reduce=(model.args.dim, tp.AllReduce(ranks)), all_gather=(model.local.vocab_size, model.gather))
    exchange_s = sum(counts[name] * seconds_of(model, size, collective) for name, (size, collective) in sizes.items())
    return dict(counts, share=statistics.mean(ranks.gather(microseconds / 1e6 / step_s)), exchange_s=exchange_s)


def seconds_of(model: Transformer, size: int, collective: Callable) -> float:
    """One of many in a row, each of `size` numbers of the model's dtype."""
    x, times = torch.zeros(1, 1, size, dtype=model.dtype, device=model.device), []
    for _ in range(200):
        start = time.perf_counter()
        collective(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    with tp.joined() as ranks, torch.inference_mode():
        torch.manual_seed(0)
        result = run_ranks(json.loads(sys.argv[1]), ranks)
        if ranks.first:
            print(json.dumps(result))


if __name__ == "__main__":
    run(main)
