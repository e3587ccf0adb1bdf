"""What benchmark.py compares this project with, each configuration in a process of its own:

    python scripts/benchmark_peers.py '{"program": "llama.cpp", "config": {...}, ...}'

Programs: llama.cpp (through llama-cpp-python, on a GGUF written here), transformers' `generate` with a static cache, and "plain", the formulas
of a straightforward PyTorch program. They report as benchmark_worker.py does.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmark_worker import measured, peak_memory, reset_peak_memory, serve, token_times
from config import ModelArgs, rope_frequencies
from model import rotate


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
            if not lib.llama_state_seq_save_file(ctx, f"{state}.tmp".encode(), 0, no_tokens, 0):
                raise RuntimeError(f"llama.cpp could not write {state}")
            Path(f"{state}.tmp").rename(state)
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


if __name__ == "__main__":
    serve({"llama.cpp": run_llama_cpp, "transformers": run_transformers, "plain": run_plain})
