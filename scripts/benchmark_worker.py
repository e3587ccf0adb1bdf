"""One configuration of benchmark.py, in a process of its own:

    python scripts/benchmark_worker.py '{"program": "llama.cpp", "config": {...}, ...}'

Programs: "bandwidth" (what the memory can do), "qwen-fast" (this project), and what it is compared with: llama.cpp (through llama-cpp-python,
on a GGUF written here), transformers' `generate` with a static cache, and "plain", the formulas of a straightforward PyTorch program.
The last line of stdout is one JSON object of raw figures in seconds and bytes; see `measured`.
"""
import json
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import kernels
import quantize
from cli import written_whole
from decoding import Generator, reserve_cache
from generate import DEMO, bytes_read_per_token, warm_up
from loading import load_model
from model import ModelArgs, Transformer, rope_frequencies, rotate
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

    more: load_s (files to a model that is ready), compile_s, recompiles (while generating), weight_bytes (read per token), and sweeps,
    [{"what": "position" | "capacity" | "batch", "at": its value, "seconds": one figure per step}]."""
    return dict(seconds=seconds, ttft_s=ttft_s, peak_bytes=peak_bytes, version=version, **more)


def token_times(tokens, start: float) -> tuple[float, list[float]]:
    """Seconds to the first of an iterable of tokens, and between the others."""
    times = [start] + [time.perf_counter() for _ in tokens]
    return times[1] - times[0], [b - a for a, b in zip(times[1:], times[2:])]


# The memory

def run_bandwidth(job: dict, args: ModelArgs) -> dict:
    """Bytes/s read from a buffer far larger than the caches, several ways; the median of each way's repetitions, as of every other figure here:
    what other programs leave of the memory's speed is not the same from one second to the next."""
    cuda = job["device"].startswith("cuda")
    numbers = kernels.large_zeros(((4 if cuda else 1) << 28,), torch.float32, job["device"]).fill_(1)       # in the pages that weights are in
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
    folder = Path(job["work_dir"]) / f"{job['name']}-{job['dtype']}"
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
    with written_whole(path) as partial:
        torch.save({"version": 1, "quantization": None, "state_dict": state}, partial)


def run_ours(job: dict, args: ModelArgs) -> dict:
    """Greedy decoding through Generator, as generate.py does it; the sweeps step the decoder at a position of a cache filled beforehand."""
    dtype, device = getattr(torch, job["dtype"]), torch.device(job["device"])
    file = prepared_checkpoint(job, dtype)
    path = kernels.describe(device)                                      # builds the kernels, once on a machine
    start = time.perf_counter()
    model, _ = load_model(file, device, dtype)
    load_s, greedy, tokens = time.perf_counter() - start, Sampling(temperature=0.0), job["tokens"]
    prompt = torch.randint(0, args.vocab_size, (job["prompt_length"],)).tolist()
    generator = Generator(model, compile=job["compile"])
    request = dict(sampling=greedy, max_seq_length=max(512, len(prompt) + tokens + 1), stop_ids=frozenset())
    compile_s = warm_up(generator, [prompt[:8]], dict(max_new_tokens=3, **request))
    list(generator.generate(prompt, 3, **request))
    reset_peak_memory()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    ttft_s, seconds = token_times(generator.generate(prompt, tokens + 1, **request), time.perf_counter())
    main = measured(seconds, ttft_s, peak_memory(), f"torch {torch.__version__} ({path})", load_s=load_s,
                    compile_s=compile_s if job["compile"] else None,
                    recompiles=torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs, weight_bytes=bytes_read_per_token(model))

    def prepared(batch: int, capacity: int) -> Generator:
        """A generator for another shape of cache; every page of the cache is real."""
        torch.compiler.reset()
        model.max_seq_length = 0                                         # a larger cache is given up too
        reserve_cache(model, batch, capacity)
        for layer in model.layers:
            layer.attention.kv_cache.k_cache.fill_(0.01)
            layer.attention.kv_cache.v_cache.fill_(0.01)
        return Generator(model, compile=job["compile"])

    def steps(generator: Generator, batch: int, position: int, n: int) -> list[float]:
        idx, input_pos = (torch.full((batch, 1), i, device=device) for i in (0, position))
        times = [time.perf_counter()]
        for _ in range(n):
            idx = generator.advance(idx, input_pos, greedy, torch.Generator(device))
            idx.tolist()
            times.append(time.perf_counter())
        return [b - a for a, b in zip(times, times[1:])]

    sweeps = []
    shapes = [("position", job["positions"], lambda at: (1, max(job["positions"]) + tokens, at)),
              ("capacity", job["capacities"], lambda at: (1, at, min(64, min(job["capacities"]) - tokens))),
              ("batch", job["batch_sizes"], lambda at: (at, 64 + tokens, 64))]
    for what, values, shape_of in shapes:
        ready = None
        for at in values:
            batch, capacity, position = shape_of(at)
            if ready != (batch, capacity):
                generator, ready = prepared(batch, capacity), (batch, capacity)
                steps(generator, batch, position, 3)
            sweeps.append(dict(what=what, at=at, seconds=steps(generator, batch, position, tokens)))
    return main | dict(sweeps=sweeps)


# llama.cpp

GGUF_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "Q8_0", "int4": "Q4_0"}


def gguf_types(job: dict) -> tuple[str, str]:
    """Names of the formats of the matrices and of the output head (and the embedding), with as many bits as this project uses."""
    kind = job["dtype"] if job["quantization"] == "none" else job["quantization"]
    head = kind if job["quantization"] == "none" else job["dtype"] if job["lm_head"] == "none" else job["lm_head"]
    return GGUF_TYPES[kind], GGUF_TYPES[head]


def gguf_tensors(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor, in llama.cpp's names; matrices are [N, K]."""
    q, kv, dim, ffn = args.n_head * args.head_dim, args.n_local_heads * args.head_dim, args.dim, args.intermediate_size
    tensors = {"token_embd.weight": (args.vocab_size, dim), "output_norm.weight": (dim,)}
    if not args.tie_word_embeddings:
        tensors["output.weight"] = (args.vocab_size, dim)
    projections = {"attn_qkv": q + 2 * kv} if args.model_type == "qwen" else {"attn_q": q, "attn_k": kv, "attn_v": kv}
    for i in range(args.n_layer):
        layer = {f"{name}.weight": (rows, dim) for name, rows in projections.items()}
        if args.qkv_bias:
            layer |= {f"{name}.bias": (rows,) for name, rows in projections.items()}
        if args.qk_norm:
            layer |= {"attn_q_norm.weight": (args.head_dim,), "attn_k_norm.weight": (args.head_dim,)}
        layer |= {"attn_output.weight": (dim, q), "ffn_gate.weight": (ffn, dim), "ffn_up.weight": (ffn, dim), "ffn_down.weight": (dim, ffn),
                  "attn_norm.weight": (dim,), "ffn_norm.weight": (dim,)}
        tensors |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return tensors


def write_gguf(args: ModelArgs, kinds: tuple[str, str], path: Path) -> None:
    """Random weights of this shape. Speed does not depend on values, so 256 random rows are quantized and repeated."""
    import gguf
    import numpy as np
    arch = {"mistral": "llama"}.get(args.model_type, args.model_type)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, arch)
    writer.add_context_length(args.max_position)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layer)
    writer.add_feed_forward_length(args.intermediate_size * (2 if arch == "qwen" else 1))     # Qwen v1 counts gate and up together
    writer.add_head_count(args.n_head)
    writer.add_head_count_kv(args.n_local_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_base)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_vocab_size(args.vocab_size)
    writer.add_tokenizer_model("none")                                                        # ids without texts are enough here
    rng, blocks = np.random.default_rng(0), {}

    def block(name: str, width: int):
        """256 quantized rows for the tensor of this name, uint8 [256, bytes a row], and their type."""
        kind = gguf.GGMLQuantizationType[kinds[name in ("token_embd.weight", "output.weight")]]
        if (kind, width) not in blocks:
            blocks[kind, width] = gguf.quants.quantize(rng.normal(0, 0.02, (256, width)).astype(np.float32), kind).view(np.uint8)
        return blocks[kind, width], kind

    tensors = gguf_tensors(args)
    for name, shape in tensors.items():
        if len(shape) == 2:
            rows, kind = block(name, shape[1])
            writer.add_tensor_info(name, (shape[0], rows.shape[1]), np.dtype(np.uint8), shape[0] * rows.shape[1], kind)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in tensors.items():
        if len(shape) == 2:
            rows, _ = block(name, shape[1])
            writer.write_tensor_data(np.tile(rows, (-(-shape[0] // len(rows)), 1))[: shape[0]])
        else:
            writer.write_tensor_data(np.full(shape, float(name.endswith("norm.weight")), np.float32))
    writer.close()
    partial.rename(path)


def run_llama_cpp(job: dict, args: ModelArgs) -> dict:
    """The low-level API: one llama_decode a token, no sampling; everything else (flash attention, fp16 cache, repacking) as llama.cpp chooses."""
    import llama_cpp
    from llama_cpp import llama_cpp as lib
    path = Path(job["work_dir"]) / f"{job['name']}-{'-'.join(gguf_types(job))}.gguf"
    if not path.exists():
        write_gguf(args, gguf_types(job), path)
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    if job["device"].startswith("cuda") and not lib.llama_supports_gpu_offload():
        raise RuntimeError("this llama-cpp-python was built without CUDA")
    start = time.perf_counter()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 999 if job["device"].startswith("cuda") else 0
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path}")
    load_s = time.perf_counter() - start
    tokens, length, n_batch = job["tokens"], job["prompt_length"], 512
    batch = lib.llama_batch_init(n_batch, 0, 1)

    def context(n_seq: int, slots: int):
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = n_seq * (-(-slots // 256) * 256), n_seq, n_batch
        params.n_threads = params.n_threads_batch = job["threads"]
        return lib.llama_init_from_model(model, params)

    def evaluate(rows: list[tuple[int, int]], last_only: bool = False) -> float:
        """Seconds for one llama_decode of (position, sequence) rows of arbitrary tokens."""
        for i, (position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = (7919 * position + sequence) % args.vocab_size, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = not last_only or i == len(rows) - 1
        batch.n_tokens = len(rows)
        start = time.perf_counter()
        if status := lib.llama_decode(ctx, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        lib.llama_synchronize(ctx)
        return time.perf_counter() - start

    def prefill(end: int) -> float:
        lib.llama_memory_clear(lib.llama_get_memory(ctx), True)
        return sum(evaluate([(p, 0) for p in range(b, min(b + n_batch, end))], last_only=True) for b in range(0, end, n_batch))

    ctx = context(1, length + tokens)
    prefill(32)                                                          # brings in the pages of the weights
    evaluate([(32, 0)])
    reset_peak_memory()
    ttft_s = prefill(length)
    seconds = [evaluate([(length + i, 0)]) for i in range(tokens)]
    main, sweeps = measured(seconds, ttft_s, peak_memory(), f"llama-cpp-python {llama_cpp.__version__}", load_s=load_s), []
    lib.llama_free(ctx)
    if positions := sorted(job["positions"], reverse=True):
        ctx = context(1, positions[0] + tokens)
        state = Path(job["work_dir"]) / f"{job['name']}-{positions[0]}.state"    # the cache of one long prompt serves every run
        no_tokens, count = (lib.llama_token * 1)(), lib.ctypes.c_size_t()
        if not state.exists():
            prefill(positions[0])
            lib.llama_state_seq_save_file(ctx, str(state).encode(), 0, no_tokens, 0)
        elif not lib.llama_state_seq_load_file(ctx, str(state).encode(), 0, no_tokens, 1, lib.ctypes.byref(count)):
            raise RuntimeError(f"llama.cpp could not load {state}")
        for position in positions:
            lib.llama_memory_seq_rm(lib.llama_get_memory(ctx), 0, position, -1)
            sweeps.append(dict(what="position", at=position, seconds=[evaluate([(position + i, 0)]) for i in range(tokens)]))
        lib.llama_free(ctx)
    for size in job["batch_sizes"]:
        ctx = context(size, 64 + tokens)
        seconds = [evaluate([(position, sequence) for sequence in range(size)]) for position in range(64 + tokens)]
        sweeps.append(dict(what="batch", at=size, seconds=seconds[64:]))
        lib.llama_free(ctx)
    return main | dict(sweeps=sweeps)


# transformers

def run_transformers(job: dict, args: ModelArgs) -> dict:
    """`generate`, greedy, static cache; a streamer takes the time of each token."""
    import transformers
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self):
            self.times = []

        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            pass

    config = dict(job["config"])
    if args.model_type == "qwen":            # Qwen v1 itself needs remote code; within its training length it equals this Qwen2
        config = dict(model_type="qwen2", hidden_size=args.dim, num_hidden_layers=args.n_layer, num_attention_heads=args.n_head,
                      num_key_value_heads=args.n_head, intermediate_size=args.intermediate_size, vocab_size=args.vocab_size,
                      max_position_embeddings=args.max_position, tie_word_embeddings=args.tie_word_embeddings)
    dtype = getattr(torch, job["dtype"])
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config), dtype=dtype).eval().to(job["device"])
    model.generation_config = transformers.GenerationConfig(do_sample=False, cache_implementation="static", pad_token_id=0)
    prompt = torch.randint(0, args.vocab_size, (1, job["prompt_length"]), device=job["device"])

    def times_of(new_tokens: int) -> list[float]:
        clock = Clock()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, streamer=clock)
        return clock.times[1:]                                           # the streamer is given the prompt first

    times_of(4)
    reset_peak_memory()
    start = time.perf_counter()
    times = times_of(job["tokens"] + 1)
    return measured([b - a for a, b in zip(times, times[1:])], times[0] - start, peak_memory(), f"transformers {transformers.__version__}")


# plain PyTorch

class PlainBlock(nn.Module):
    """A transformer block as one first writes it: F.linear, and SDPA with a mask over the whole static cache."""

    def __init__(self, args: ModelArgs, capacity: int):
        super().__init__()
        self.args = args
        width, kv = args.n_head * args.head_dim, args.n_local_heads * args.head_dim
        self.wqkv, self.wo = nn.Linear(args.dim, width + 2 * kv, bias=args.qkv_bias), nn.Linear(width, args.dim, bias=args.o_bias)
        self.w1, self.w3 = (nn.Linear(args.dim, args.intermediate_size, bias=args.mlp_bias) for _ in range(2))
        self.w2 = nn.Linear(args.intermediate_size, args.dim, bias=args.mlp_bias)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(args.dim, args.norm_eps) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else nn.Identity() for _ in range(2))
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, args.n_local_heads, capacity, args.head_dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        """x [1, S, C]; mask [S, T]."""
        S, H, K = x.size(1), self.args.n_head, self.args.n_local_heads
        q, k, v = self.wqkv(self.attention_norm(x)).view(1, S, -1, self.args.head_dim).split([H, K, K], dim=2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        self.k_cache[:, :, input_pos], self.v_cache[:, :, input_pos] = k.transpose(1, 2), v.transpose(1, 2)
        k, v = (cache.repeat_interleave(H // K, dim=1) for cache in (self.k_cache, self.v_cache))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
        h = x + self.wo(y.transpose(1, 2).reshape(1, S, -1))
        z = self.ffn_norm(h)
        return h + self.w2(F.silu(self.w1(z)) * self.w3(z))


class Plain(nn.Module):
    def __init__(self, args: ModelArgs, capacity: int):
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(PlainBlock(args, capacity) for _ in range(args.n_layer))
        self.norm, self.output = nn.RMSNorm(args.dim, args.norm_eps), nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("mask", torch.ones(capacity, capacity, dtype=torch.bool).tril())
        self.register_buffer("inv_freq", rope_frequencies(args))

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        """Logits [1, 1, V] of the last of idx [1, S] at input_pos [S]."""
        angles = (input_pos[:, None] * self.inv_freq).repeat(1, 2)[None, :, None]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), self.mask[input_pos], input_pos)
        return self.output(self.norm(x[:, -1:]))


def run_plain(job: dict, args: ModelArgs) -> dict:
    """Greedy decoding, eager, a cache of at least 512 slots."""
    length, tokens, device, dtype = job["prompt_length"], job["tokens"], job["device"], getattr(torch, job["dtype"])
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = Plain(args, max(512, length + tokens + 1))
    model.to_empty(device=device)
    for value in model.parameters():
        value.normal_(0, 0.02) if value.dim() == 2 else value.fill_(1)
    for name, value in model.named_buffers():
        value.copy_(rope_frequencies(args)) if name == "inv_freq" else value.fill_(1) if name == "mask" else value.zero_()
    model.mask.tril_()
    prompt = torch.randint(0, args.vocab_size, (1, length), device=device)

    def generate(n: int):
        token, position = model(prompt, torch.arange(length, device=device)).argmax(-1), torch.tensor([length], device=device)
        for _ in range(n):
            yield token.item()
            token, position = model(token, position).argmax(-1), position + 1

    list(generate(4))
    reset_peak_memory()
    ttft_s, seconds = token_times(generate(tokens + 1), time.perf_counter())
    return measured(seconds, ttft_s, peak_memory(), f"torch {torch.__version__}")


PROGRAMS = {"bandwidth": run_bandwidth, "qwen-fast": run_ours, "llama.cpp": run_llama_cpp, "transformers": run_transformers, "plain": run_plain}


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with torch.inference_mode():
        result = PROGRAMS[job["program"]](job, ModelArgs.from_hf(job["config"]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
