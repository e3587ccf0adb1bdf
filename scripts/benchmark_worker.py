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
from dataclasses import astuple
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import torch
from torch import Tensor

import kernels
import tp
from checkpoint import write_checkpoint
from config import ModelArgs
from formats import Quantization, replace_linears
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
    """The file to load, in the work folder: random weights with the demo's tokenizer. Those of a quantized file are
    drawn as they are stored, so that it may be of a model which is too large for this machine when not quantized."""
    folder, quantization = Path(job["work_dir"]) / f"{job['name']}-{job['dtype']}", None
    if job["quantization"] != "none":
        quantization = Quantization(job["quantization"], job["groupsize"], job["lm_head"])
    file = folder / ("{}-g{}-head-{}.pth".format(*astuple(quantization)[:3]) if quantization else "model.pth")
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for tokenizer in DEMO.parent.glob("tokenizer*.json"):
            shutil.copy(tokenizer, folder)
        (folder / "config.json").write_text(json.dumps(job["config"]))
        write_random_checkpoint(ModelArgs.from_hf(job["config"]), getattr(torch, job["dtype"]), file, quantization)
    return file


# Of random bits, those that are kept and those that are set, by dtype: of weights sign and mantissa, +- 0.008 to
# 0.016; of scales the mantissa, so that the weights are as large: 2^-13 for int8, 2^-9 for int4; zeros of 7 to 8.
WEIGHTS = {torch.float32: (-0x7f800001, 0x3c000000), torch.bfloat16: (-0x7f81, 0x3c00),
           torch.float16: (-0x7c01, 0x2000), torch.int8: (255, 0), torch.uint8: (255, 0)}
SCALES = {torch.float32: (0x7fffff, 0x39000000), torch.bfloat16: (0x7f, 0x3b00)}
ZEROS = {torch.uint8: (15, 112)}


def random_tensor(shape: torch.Size, dtype: torch.dtype, patterns: dict[torch.dtype, tuple[int, int]]) -> Tensor:
    """No NaN, no slow denormals, and no two pages alike, which virtual machines would merge, and then read faster than
    their memory allows."""
    words = torch.empty(-(-shape.numel() * dtype.itemsize // 8), dtype=torch.int64).random_(-1 << 63, None)
    integers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[dtype.itemsize]
    kept, also = patterns[dtype]
    bits = words.view(integers)[:shape.numel()].bitwise_and_(kept).bitwise_or_(also)
    return bits.view(dtype).view(shape)


def write_random_checkpoint(args: ModelArgs, dtype: torch.dtype, path: Path,
                            quantization: Quantization | None = None) -> None:
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
    if quantization:
        replace_linears(model, quantization)
    state = model.state_dict()
    for name, tensor in state.items():
        patterns = dict(scales=SCALES, zeros=ZEROS).get(name.rpartition(".")[2], WEIGHTS)
        state[name] = (torch.ones(tensor.shape, dtype=dtype) if tensor.dim() == 1 and patterns is WEIGHTS else
                       random_tensor(tensor.shape, tensor.dtype, patterns))
    write_checkpoint(path, state, quantization)


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
    model, _ = load_model(file, device, getattr(torch, job["dtype"]), ranks, int8_kv_cache=job["kv_cache"] == "int8")
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
