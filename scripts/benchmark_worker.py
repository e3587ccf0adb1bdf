"""One configuration of benchmark.py for this project, in a process of its own, or under torchrun in one for each rank:

    python scripts/benchmark_worker.py '{"program": "qwen-fast", "config": {...}, ...}'

The last line of stdout is one JSON object of raw figures in seconds and bytes; see `measured`.
"""
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import torch
from torch import Tensor

import kernels
import quantize
import tp
from checkpoint import write_checkpoint
from config import ModelArgs
from generate import Engine, bytes_read_per_token, warm_up
from loading import DEMO, load_model
from model import Transformer
from sampling import Sampling


def serve(programs: dict[str, Callable[[dict, ModelArgs], dict]]) -> None:
    """Runs the job of the command line and prints what it reports."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with torch.inference_mode():
        print(json.dumps(programs[job["program"]](job, ModelArgs.from_hf(job["config"]))))


def measured(seconds: list[float], ttft_s: float, version: str, **more) -> dict:
    """What a worker reports. seconds: one figure per decoding step; ttft_s: from the prompt to its first new token.

    more: load_s (from the file to a model that is ready), compile_s, recompiles (while generating), weight_bytes (read
    per step), bandwidth (bytes/s that this process read from the memory)."""
    return dict(seconds=seconds, ttft_s=ttft_s, peak_bytes=peak_memory(), version=version, **more)


def reset_peak_memory() -> None:
    """The peak of memory counts from here (on a CPU only where the system is Linux)."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif (control := Path("/proc/self/clear_refs")).exists():
        control.write_text("5")


def peak_memory() -> int:
    """Bytes: what the allocator reserved on CUDA, otherwise the resident set's high-water mark."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def token_times(tokens: Iterable, start: float, between: Callable = lambda: None) -> tuple[float, list[float]]:
    """Seconds to the first of the tokens, and between the others, without what is done in between."""
    seconds = []
    for _ in tokens:
        seconds.append(time.perf_counter() - start)
        between()
        start = time.perf_counter()
    return seconds[0], seconds[1:]


# ---- this project

def prepare_checkpoint(job: dict) -> Path:
    """The file to load, in the work folder: random weights with the demo's tokenizer, quantized where asked."""
    folder = Path(job["work_dir"]) / f"{job['name']}-{job['dtype']}"
    plain = folder / "model.pth"
    if not plain.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in DEMO.parent.glob("tokenizer*.json"):
            shutil.copy(file, folder)
        (folder / "config.json").write_text(json.dumps(job["config"]))
        write_random_checkpoint(ModelArgs.from_hf(job["config"]), getattr(torch, job["dtype"]), plain)
    quantization = job["quantization"], job["groupsize"], job["lm_head"]
    ready = folder / "{}-g{}-head-{}.pth".format(*quantization)
    if job["quantization"] != "none" and not ready.exists():
        quantize.quantize_checkpoint(plain, *quantization, progress=False).rename(ready)
    return plain if job["quantization"] == "none" else ready


def random_weights(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Random signs and mantissas, +- 0.008 to 0.016: no NaN, no slow denormals, and no two pages alike, which virtual
    machines would merge, and then read faster than their memory allows."""
    if dtype == torch.float32:
        bits = torch.empty(shape, dtype=torch.int32).random_(-1 << 31, (1 << 31) - 1)
        return (bits & -0x7f800001 | 0x3c000000).view(dtype)
    bits = torch.empty(shape, dtype=torch.int16).random_(-1 << 15, 1 << 15)
    return (bits & -0x7f81 | 0x3c00 if dtype == torch.bfloat16 else bits & -0x7c01 | 0x2000).view(dtype)


def write_random_checkpoint(args: ModelArgs, dtype: torch.dtype, path: Path) -> None:
    with torch.device("meta"):
        state = Transformer(args).state_dict()
    for name, tensor in state.items():
        matrix = tensor.dim() == 2
        state[name] = random_weights(tensor.shape, dtype) if matrix else torch.ones(tensor.shape, dtype=dtype)
    write_checkpoint(path, state, None)


def read_rate(tensor: Tensor) -> float:
    """Bytes/s that the memory gives right now, where other programs share it."""
    numbers = tensor.flatten().view(torch.int64)
    start = time.perf_counter()
    numbers.sum().item()
    return numbers.nbytes / (time.perf_counter() - start)


def run_ours(job: dict, ranks: tp.Ranks | None) -> dict:
    device = torch.device(job["device"])
    if ranks:
        device = ranks.take_device(device)
        torch.set_num_threads(job["threads"])
    file = prepare_checkpoint(job) if not ranks or ranks.first else Path()
    file = ranks.from_first(file) if ranks else file
    kernels.describe(device)                                             # builds the kernels, once on a machine
    start = time.perf_counter()
    model, _ = load_model(file, device, getattr(torch, job["dtype"]), ranks)
    result = dict(load_s=time.perf_counter() - start) | decode(job, Engine(model, compile=job["compile"]))
    return result | dict(peak_bytes=max(ranks.gather(result["peak_bytes"]))) if ranks else result


def decode(job: dict, engine: Engine) -> dict:
    """Greedy decoding after a prompt, as generate.py does it. A CPU reads the memory in turns with decoding; a GPU,
    which decodes ahead, reads it afterwards; several ranks do not, because they would do so at the same time."""
    model, tokens, counted = engine.model, job["tokens"], torch._dynamo.utils.counters["stats"]
    prompts = torch.randint(0, model.args.vocab_size, (job["batch_size"], job["prompt_length"])).tolist()
    capacity = max(job["prompt_length"] + tokens + 1, job["max_seq_length"])
    request: dict[str, Any] = dict(sampling=Sampling(temperature=0.0), max_seq_length=capacity, stop_ids=frozenset())
    compile_s = warm_up(engine, [prompt[:8] for prompt in prompts], dict(max_new_tokens=3, **request))
    list(engine.generate(prompts, 3, **request))
    reset_peak_memory()
    graphs, rates, largest = counted["unique_graphs"], [], model.tok_embeddings.weight
    in_turns = model.device.type == "cpu" and not model.ranks
    ttft_s, seconds = token_times(engine.generate(prompts, tokens + 1, **request), time.perf_counter(),
                                  lambda: rates.append(read_rate(largest)) if in_turns else None)
    result = measured(seconds, ttft_s, f"torch {torch.__version__} ({kernels.describe(model.device)})",
                      compile_s=compile_s if job["compile"] else None, recompiles=counted["unique_graphs"] - graphs,
                      weight_bytes=bytes_read_per_token(model))
    if model.device.type == "cuda" and not model.ranks:
        rates = [read_rate(largest) for _ in range(12)]
    return result | (dict(bandwidth=statistics.median(rates)) if rates else {})


def main() -> None:
    with tp.joined() as ranks:
        serve({"qwen-fast": lambda job, args: run_ours(job, ranks)})


if __name__ == "__main__":
    cli.run(main)
