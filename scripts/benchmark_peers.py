"""What benchmark.py compares this project with, each configuration in a process of its own:

    python scripts/benchmark_peers.py '{"program": "llama.cpp", "config": {...}, ...}'

Programs: llama.cpp (through llama-cpp-python, on a GGUF written here), ik_llama.cpp (its llama-bench, on the same
file), transformers' `generate` with a static cache, and "plain", the formulas of a straightforward PyTorch program.
They report as benchmark_worker.py does.
"""
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark_worker import measured, reset_peak_memory, serve, token_times
from config import ModelArgs, rope_frequencies
from kernels.build import cpu_flags
from model import rotate

# ---- llama.cpp

GGUF_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "Q8_0", "int4": "Q4_0"}


def gguf_types(job: dict) -> tuple[str, str]:
    """Formats of the matrices, and of the output head and embedding, with as many bits as this project uses."""
    kinds = ("none", "none") if job["quantization"] == "none" else (job["quantization"], job["lm_head"])
    kind, head = (GGUF_TYPES[job["dtype"] if kind == "none" else kind] for kind in kinds)
    return kind, head


def gguf_tensors(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor, in llama.cpp's names; matrices are [N, K]."""
    q, kv, C, ffn = args.n_head * args.head_dim, args.n_local_heads * args.head_dim, args.dim, args.intermediate_size
    projections = ({"attn_qkv": q + 2 * kv} if args.model_type == "qwen" else
                   {"attn_q": q * (1 + args.output_gate), "attn_k": kv, "attn_v": kv})
    layer = {f"{name}.weight": (rows, C) for name, rows in projections.items()}
    layer |= {"attn_output.weight": (C, q)}
    norms = {"attn_norm.weight": (C,), f"{'post_attention' if args.delta_layers else 'ffn'}_norm.weight": (C,)}
    if args.qkv_bias:
        layer |= {f"{name}.bias": (rows,) for name, rows in projections.items()}
    if args.qk_norm:
        layer |= {"attn_q_norm.weight": (args.head_dim,), "attn_k_norm.weight": (args.head_dim,)}
    head = {} if args.tie_word_embeddings else {"output.weight": (args.vocab_size, C)}
    dense = {"ffn_gate.weight": (ffn, C), "ffn_up.weight": (ffn, C), "ffn_down.weight": (C, ffn)}
    E, size, shared = args.n_expert, args.expert_size, args.shared_expert_size
    experts = {"ffn_gate_inp.weight": (E, C), "ffn_gate_exps.weight": (E, size, C), "ffn_up_exps.weight": (E, size, C),
               "ffn_down_exps.weight": (E, C, size)}
    if shared:
        experts |= {"ffn_gate_inp_shexp.weight": (C,), "ffn_gate_shexp.weight": (shared, C),
                    "ffn_up_shexp.weight": (shared, C), "ffn_down_shexp.weight": (C, shared)}
    Hv, N = args.delta_value_heads, args.delta_channels
    delta = {"attn_qkv.weight": (N, C), "attn_gate.weight": (Hv * args.delta_value_dim, C),
             "ssm_conv1d.weight": (N, args.conv_size), "ssm_dt.bias": (Hv,), "ssm_a": (Hv,),
             "ssm_norm.weight": (args.delta_value_dim,), "ssm_out.weight": (C, Hv * args.delta_value_dim)}
    delta |= ({"ssm_ba.weight": (2 * Hv, C)} if args.model_type == "qwen3_next" else
              {"ssm_beta.weight": (Hv, C), "ssm_alpha.weight": (Hv, C)})
    return {"token_embd.weight": (args.vocab_size, C), "output_norm.weight": (C,)} | head | {
        f"blk.{i}.{name}": shape for i in range(args.n_layer) for name, shape in (
            (delta if i in args.delta_layers else layer) | norms | (experts if args.has_experts(i) else dense)).items()}


def random_blocks(kind, shape: tuple[int, ...], rng):
    """A tensor as it stands in a GGUF: random bits, whose exponents and scales make values of normal size. All differ,
    because virtual machines merge equal pages, and then read them faster than their memory allows."""
    import gguf  # pyright: ignore[reportMissingImports]
    import numpy as np
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return (rng.random(shape, np.float32) * 0.03).astype(np.float32 if kind.name == "F32" else np.float16)
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 1 << 16, (*shape[:-1], shape[-1] // weights, -(-nbytes // 2)), np.uint16)
    if kind.name == "BF16":
        return (blocks & 0x807f | 0x3c00).view(np.uint8).reshape(*shape[:-1], -1)         # +- 0.008 to 0.016
    scale = {"Q8_0": 0.012 / 73.9, "Q4_0": 0.012 / 4.61}[kind.name]            # over the spread of such integers
    blocks[..., 0] = np.float16(scale).view(np.uint16)                         # a block begins with its scale
    return blocks.view(np.uint8).reshape(*shape[:-1], -1)


def write_gguf(args: ModelArgs, types: tuple[str, str], path: Path) -> None:
    """Random weights of this shape."""
    import gguf  # pyright: ignore[reportMissingImports]
    import numpy as np
    rng = np.random.default_rng(0)

    def kind_of(name: str, shape: tuple[int, ...]):
        if len(shape) == 1 or "gate_inp" in name or "conv1d" in name:
            return gguf.GGMLQuantizationType.F32
        return gguf.GGMLQuantizationType[types[name in ("token_embd.weight", "output.weight")]]

    def values_of(name: str, shape: tuple[int, ...]):
        return (np.full(shape, float(name.endswith("norm.weight")), np.float32) if len(shape) == 1 else
                random_blocks(kind_of(name, shape), shape, rng))

    with cli.atomic_write(path) as partial:
        model_type = args.model_type.removesuffix("_text")
        arch = {"mistral": "llama", "mixtral": "llama"}.get(model_type, model_type.replace("_", ""))
        ffn = args.intermediate_size * (2 if arch == "qwen" else 1)      # Qwen v1 counts gate and up together
        writer = gguf.GGUFWriter(partial, arch)
        for key, value in dict(
                context_length=args.max_position, embedding_length=args.dim, block_count=args.n_layer,
                feed_forward_length=ffn, head_count=args.n_head, head_count_kv=args.n_local_heads,
                key_length=args.head_dim, value_length=args.head_dim,
                rope_dimension_count=args.rotary_dim or args.head_dim,
                rope_freq_base=args.rope_base, layer_norm_rms_eps=args.norm_eps, vocab_size=args.vocab_size,
                tokenizer_model="none").items():                         # ids without texts will do
            getattr(writer, f"add_{key}")(value)
        if args.delta_layers:
            for key, value in dict(
                    conv_kernel=args.conv_size, state_size=args.delta_key_dim, group_count=args.delta_key_heads,
                    time_step_rank=args.delta_value_heads,
                    inner_size=args.delta_value_heads * args.delta_value_dim).items():
                getattr(writer, f"add_ssm_{key}")(value)
            writer.add_full_attention_interval(4)                        # as in all published shapes
            writer.add_rope_dimension_sections([11, 11, 10, 0])
        if args.n_expert:
            writer.add_expert_count(args.n_expert)
            writer.add_expert_used_count(args.n_expert_per_token)
            writer.add_expert_feed_forward_length(args.expert_size)
            if args.shared_expert_size:
                writer.add_expert_shared_feed_forward_length(args.shared_expert_size)
        for name, shape in gguf_tensors(args).items():
            kind = kind_of(name, shape)
            stored = gguf.quant_shape_to_byte_shape(shape, kind) if kind.name not in ("F32", "F16") else shape
            dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
            writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape in gguf_tensors(args).items():
            writer.write_tensor_data(values_of(name, shape))
        writer.close()


def gguf_file(job: dict, args: ModelArgs) -> Path:
    path = Path(job["work_dir"]) / f"{job['name']}-{'-'.join(gguf_types(job))}.gguf"
    if not path.exists():
        write_gguf(args, gguf_types(job), path)
    return path


def load_llama(lib, path: Path, on_gpu: bool):
    if on_gpu and not lib.llama_supports_gpu_offload():
        raise RuntimeError("this llama-cpp-python was built without CUDA")
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 999 if on_gpu else 0
    params.use_extra_bufts = "amx_int8" not in cpu_flags()    # with those for AMX 0.3.36 ends in a segmentation fault
    if not (model := lib.llama_model_load_from_file(str(path).encode(), params)):
        raise RuntimeError(f"llama.cpp could not load {path}")
    return model


def run_llama_cpp(job: dict, args: ModelArgs) -> dict:
    """The low-level API: one llama_decode a step, no sampling; everything else (flash attention, fp16 cache, repacking
    of weights) as llama.cpp chooses."""
    import llama_cpp  # pyright: ignore[reportMissingImports]
    from llama_cpp import llama_cpp as lib  # pyright: ignore[reportMissingImports]
    path = gguf_file(job, args)
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    start = time.perf_counter()
    model = load_llama(lib, path, job["device"].startswith("cuda"))
    load_s = time.perf_counter() - start
    tokens, length, B, n_batch = job["tokens"], job["prompt_length"], job["batch_size"], 512
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch = B * (-(-(length + tokens) // 256) * 256), B, n_batch
    params.n_threads = params.n_threads_batch = job["threads"]
    context, batch = lib.llama_init_from_model(model, params), lib.llama_batch_init(n_batch, 0, 1)

    def evaluate(begin: int, end: int) -> float:
        """Seconds for one llama_decode of arbitrary tokens at positions begin .. end - 1 of each sequence."""
        rows = [(position, sequence) for position in range(begin, end) for sequence in range(B)]
        for i, (position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = (7919 * position + sequence) % args.vocab_size, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, position == end - 1
        batch.n_tokens, start = len(rows), time.perf_counter()
        if status := lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        lib.llama_synchronize(context)
        return time.perf_counter() - start

    def prefill(end: int) -> float:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        return sum(evaluate(begin, min(begin + n_batch // B, end)) for begin in range(0, end, n_batch // B))

    prefill(32)                                                          # brings in the pages of the weights
    evaluate(32, 33)
    reset_peak_memory()
    ttft_s = prefill(length)
    seconds = [evaluate(position, position + 1) for position in range(length, length + tokens)]
    return measured(seconds, ttft_s, f"llama-cpp-python {llama_cpp.__version__}", load_s=load_s)


def run_ik_llama_cpp(job: dict, args: ModelArgs) -> dict:
    """Weights repacked when they are loaded, and flash attention, which is how it is fastest. It tells the time of all
    steps together, so that each has their mean."""
    length, tokens = job["prompt_length"], job["tokens"]
    options = dict(m=gguf_file(job, args), t=job["threads"], p=length, n=0, gp=f"{length},{tokens}", r=1, rtr=1, fa=1,
                   o="json")
    command = [job["llama_bench"], *(text for name, value in options.items() for text in (f"-{name}", str(value)))]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    prefill, decode = json.loads(out[out.index("["):])
    seconds = [decode["samples_ns"][0] / 1e9 / tokens] * tokens
    result = measured(seconds, prefill["samples_ns"][0] / 1e9, f"ik_llama.cpp {decode['build_commit']}")
    return result | dict(peak_bytes=1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


# ---- transformers

def run_transformers(job: dict, args: ModelArgs) -> dict:
    """`generate`, greedy, static cache; a streamer takes the time of each token. (Qwen v1 would need remote code.)"""
    import transformers
    config = transformers.AutoConfig.for_model(**job["config"])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job["dtype"]))
    model = model.eval().to(job["device"])
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, cache_implementation="static", pad_token_id=0)
    prompt = torch.randint(0, args.vocab_size, (job["batch_size"], job["prompt_length"]), device=job["device"])

    def times_of(new_tokens: int) -> list[float]:
        times: list[float] = []
        clock = SimpleNamespace(put=lambda ids: times.append(time.perf_counter()), end=lambda: None)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, streamer=clock)
        return times[1:]                                                 # the streamer is given the prompt first

    times_of(4)
    reset_peak_memory()
    start = time.perf_counter()
    times = times_of(job["tokens"] + 1)
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return measured(seconds, times[0] - start, f"transformers {transformers.__version__}")


# ---- plain PyTorch

def plain_model(args: ModelArgs, batch: int, capacity: int, device: str,
                dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """The formulas as one first writes them: F.linear, and SDPA with a mask over the whole static cache."""
    H, K, D, C, ffn = args.n_head, args.n_local_heads, args.head_dim, args.dim, args.intermediate_size

    def weight(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02)
    shapes = dict(wqkv=((H + 2 * K) * D, C), wo=(C, H * D), w1=(ffn, C), w3=(ffn, C), w2=(C, ffn),
                  **(dict(bias=((H + 2 * K) * D,)) if args.qkv_bias else {}))
    layers = [{name: weight(*shape) for name, shape in shapes.items()} for _ in range(args.n_layer)]
    caches = [torch.zeros(2, batch, K, capacity, D, dtype=dtype, device=device) for _ in layers]
    ones = {size: torch.ones(size, dtype=dtype, device=device) for size in (C, D)}
    embedding = weight(args.vocab_size, C)
    head = embedding if args.tie_word_embeddings else weight(args.vocab_size, C)
    mask = torch.ones(capacity, capacity, dtype=torch.bool, device=device).tril()
    inv_freq = rope_frequencies(args).to(device)

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], ones[x.size(-1)], args.norm_eps)

    def forward(idx: Tensor, input_pos: Tensor) -> Tensor:
        """Logits [B, 1, V] of the last of idx [B, S] at input_pos [S]."""
        angles = (input_pos[:, None] * inv_freq).repeat(1, 2)[None, :, None]
        x = F.embedding(idx, embedding)                                  # [B, S, C]
        for layer, cache in zip(layers, caches, strict=True):
            qkv = F.linear(norm(x), layer["wqkv"], layer.get("bias")).view(*idx.shape, -1, D)
            q, k, v = qkv.split([H, K, K], dim=2)                        # [B, S, H or K, D]
            q, k = (rotate(norm(t) if args.qk_norm else t, angles.cos(), angles.sin()) for t in (q, k))
            cache[0][:, :, input_pos], cache[1][:, :, input_pos] = k.transpose(1, 2), v.transpose(1, 2)
            k, v = cache.repeat_interleave(H // K, dim=2)
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[input_pos])
            x = x + F.linear(y.transpose(1, 2).flatten(2), layer["wo"])
            z = norm(x)
            x = x + F.linear(F.silu(F.linear(z, layer["w1"])) * F.linear(z, layer["w3"]), layer["w2"])
        return F.linear(norm(x[:, -1:]), head)
    return forward


def run_plain(job: dict, args: ModelArgs) -> dict:
    """Greedy decoding, eager, a cache of at least 512 slots."""
    length, tokens, device = job["prompt_length"], job["tokens"], job["device"]
    batch, capacity = job["batch_size"], max(512, length + tokens + 1)
    model = plain_model(args, batch, capacity, device, getattr(torch, job["dtype"]))
    prompt = torch.randint(0, args.vocab_size, (batch, length), device=device)

    def generate(n: int) -> Iterator[list[int]]:
        token = model(prompt, torch.arange(length, device=device)).argmax(-1)
        position = torch.tensor([length], device=device)
        for _ in range(n):
            yield token[:, 0].tolist()
            token, position = model(token, position).argmax(-1), position + 1

    list(generate(4))
    reset_peak_memory()
    ttft_s, seconds = token_times(generate(tokens + 1), time.perf_counter())
    return measured(seconds, ttft_s, f"torch {torch.__version__}")


def main() -> None:
    serve({"llama.cpp": run_llama_cpp, "ik_llama.cpp": run_ik_llama_cpp, "transformers": run_transformers,
           "plain": run_plain})


if __name__ == "__main__":
    cli.run(main)
