"""Generates text: loads a checkpoint, prefills the prompt, decodes one token after another.

    python generate.py --compile --prompt "def quicksort(arr):"
"""
import argparse
import itertools
import os
import random
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import torch
from torch import Tensor

import kernels
import quantize
import tp
from cli import UserError, run
from convert import convert, read_json
from model import ModelArgs, Transformer
from tokenizer import StreamDecoder, Tokenizer

DEMO = Path(__file__).resolve().parent / "checkpoints" / "demo" / "model.pth"
PREFILL_CHUNK = 1024


# ---- loading

def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it; else fp16 on a GPU, fp32 on a CPU (fp16 products there are emulated, and 400 times slower)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type != "cpu" or kernels.cpu_has_bf16() else torch.float32


def parse_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device (cpu, cuda, cuda:1)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} is not supported (cpu, cuda, cuda:1)")
    return device


def parse_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    if device.type == "cpu" and name == "fp16":
        raise UserError("--dtype fp16 is not for CPUs, which emulate it hundreds of times slower: use bf16 or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}[name]


def load_model(checkpoint_path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
               ranks: tp.Ranks | None = None) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer, quantized if the file says so. A folder that holds a Hugging Face checkpoint but no model.pth yet is converted first.

    dtype: of the computation and of the weights that are not quantized; by default what the device computes best.
    ranks: the processes to spread the model over (tp.init_dist): each of them calls this and reads its own share. Errors: UserError.
    """
    path, device = Path(checkpoint_path), torch.device(device)
    if path.is_dir():
        path = path / "model.pth"
    if ranks and ranks.local_rank:
        ranks.gather(None)                  # the first rank of each machine converts and builds for the others
    if not path.exists():
        if path.name != "model.pth" or not (path.parent / "config.json").exists():
            raise UserError(f"--checkpoint_path {path}: no such file, and no Hugging Face checkpoint in its folder to convert")
        print(f"{path} is missing: converting the Hugging Face checkpoint beside it", file=sys.stderr)
        convert(path.parent)
    kernels.describe(device)
    if ranks and not ranks.local_rank:
        ranks.gather(None)
    args = ModelArgs.from_hf(read_json(path.parent / "config.json"))
    tokenizer = Tokenizer.from_dir(path.parent)
    state, quantization = quantize.read_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(args)
    if quantization:
        quantize.replace_linears(model, quantization)
    quantize.check_fits(path, model, state)
    part = None
    if ranks:
        ranks.check_same(f"{path} ({path.stat().st_size} bytes)", (path.stat().st_size, args, [(n, t.shape, t.dtype) for n, t in state.items()]))
        part = tp.plan(args, ranks.rank, ranks.world, quantization)
        model = tp.build(part, ranks)
    dtype = dtype or default_dtype(device)
    dtypes = {name: quantize.loaded_dtype(name, tensor, dtype) for name, tensor in state.items()}
    needed = sum(tensor.numel() * dtypes[name].itemsize for name, tensor in model.state_dict().items())
    check_memory(device, needed * (ranks.local_world if ranks and device.type == "cpu" else 1), f"the weights of {path}")
    weights = zip(dtypes, quantize.read_weights(path, list(dtypes)))
    parts = weights if part is None else ((name, part.cut(name, tensor)) for name, tensor in weights)
    model.load_state_dict({name: kernels.place(tensor, device, dtypes[name]) for name, tensor in parts}, assign=True)
    quantize.pack_for(model, device)
    return model.eval(), tokenizer


def check_memory(device: torch.device, needed: int, what: str) -> None:
    free = free_memory(device)
    if needed > free:
        raise UserError(f"out of memory: {what} take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {device}")


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return sys.maxsize                  # not Linux: let the allocation itself fail


# ---- sampling

@dataclass(frozen=True)
class Sampling:
    """temperature 0 is argmax. top_k and top_p keep the most probable tokens; None keeps all."""
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None

    def check(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"--temperature {self.temperature} must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k {self.top_k} must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p} must be more than 0 and at most 1")

    def candidates(self, vocab: int) -> int:
        """How many random numbers a row needs."""
        return 0 if self.temperature == 0 else min(self.top_k or vocab, vocab)


def sample(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Draws ids [B, 1] from logits [B, V] by the Gumbel-max trick: argmax(logits / T - log E), E exponential noise [B, candidates] in fp32."""
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / sampling.temperature
    n = noise.size(-1)
    if n < logits.size(-1) or sampling.top_p is not None:
        logits, ids = logits.topk(n, dim=-1)                       # sorted, the most probable first
    else:
        ids = None
    if sampling.top_p is not None and sampling.top_p < 1:
        probs = logits.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs                      # what the more probable tokens hold together
        logits = logits.masked_fill(before >= sampling.top_p, -torch.inf)
    choice = (logits - noise.log()).argmax(dim=-1, keepdim=True)
    return choice if ids is None else ids.gather(-1, choice)


# ---- generation

class Generator:
    """A model with its compiled functions and the state of the KV cache."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None, compile: bool = False, compile_prefill: bool = False):
        self.model = model
        self.vocab = min(tokenizer.vocab_size, model.args.vocab_size) if tokenizer else model.args.vocab_size
        self.stop_ids = tokenizer.stop_ids if tokenizer else frozenset()
        self.decode, self.prefill = self.decode_step, model.forward
        self.cached: list[int] = []                                # the tokens that row 0 of the cache holds, when the batch is 1
        if compile:
            self.decode = torch.compile(self.decode_step, fullgraph=True, **compile_settings(model, compile_prefill))
        if compile_prefill:
            self.prefill = torch.compile(model.forward, fullgraph=True)

    def decode_step(self, idx: Tensor, input_pos: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
        """Next ids [B, 1] after idx [B, 1] at input_pos [B, 1]."""
        return sample(self.model(idx, input_pos)[:, -1, :self.vocab], sampling, noise)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[int] | Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = Sampling(), *,
                 seed: int | None = None, stop_ids: frozenset[int] | None = None, max_seq_length: int = 0,
                 keep_cache: bool = False) -> Iterator[list[int | None]]:
        """Yields the new ids of all rows, step by step; None for a row that has met a stop id, which is itself not yielded.

        prompts: one list of ids, or a batch of them, of any lengths.  stop_ids: the tokenizer's if None.  max_seq_length: capacity of the
        cache, at least what the request needs.  keep_cache: what the cache already holds of the prompt is not computed again (batch 1).
        """
        rows = [list(p) for p in prompts] if prompts and not isinstance(prompts[0], int) else [list(prompts)]
        sampling.check()
        check_request(self.model.args, rows, max_new_tokens)
        lengths = [len(row) for row in rows]
        stops = self.stop_ids if stop_ids is None else stop_ids
        reserve_cache(self.model, len(rows), max(max(lengths) + max_new_tokens, max_seq_length))
        device = self.model.device
        random_source = torch.Generator(device).manual_seed(self.fresh_seed() if seed is None else seed)

        def noise() -> Tensor:
            drawn = torch.empty(len(rows), sampling.candidates(self.vocab), dtype=torch.float32, device=device)
            return drawn.exponential_(generator=random_source).clamp_(min=torch.finfo(torch.float32).tiny)

        logits = self.prefill_rows(rows, keep_cache)
        idx = sample(logits[:, -1, :self.vocab], sampling, noise())
        input_pos = torch.tensor(lengths, device=device)[:, None]
        ended = [False] * len(rows)
        for step in range(max_new_tokens):
            # A GPU computes the next token while this one is read; a CPU would only be late with this one.
            following = self.advance(idx, input_pos, sampling, noise()) if device.type == "cuda" and step + 1 < max_new_tokens else None
            ids = idx[:, 0].tolist()
            ended = [end or i in stops for end, i in zip(ended, ids)]
            if all(ended):
                return
            yield [None if end else i for end, i in zip(ended, ids)]
            if step + 1 < max_new_tokens:
                self.cached.append(ids[0])
                idx = following if following is not None else self.advance(idx, input_pos, sampling, noise())

    def fresh_seed(self) -> int:
        """The same on all ranks: so they draw the same tokens."""
        seed = random.getrandbits(63)
        return self.model.ranks.from_first(seed) if self.model.ranks else seed

    def advance(self, idx: Tensor, input_pos: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        following = self.decode(idx, input_pos, sampling, noise).clone()
        input_pos += 1
        return following

    def prefill_rows(self, rows: list[list[int]], keep_cache: bool) -> Tensor:
        """Logits [B, 1, V] of each row's last token. Shorter rows are padded on the right; decoding overwrites the padding's cache."""
        device, lengths = self.model.device, torch.tensor([len(row) for row in rows])
        self.model.set_prompt_length(int(lengths.max()))
        start = 0
        if keep_cache and len(rows) == 1 and not (self.model.args.dynamic_ntk and len(rows[0]) > self.model.args.seq_length):
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.cached, rows[0][:-1]))
            start = sum(1 for _ in same)
        self.cached = list(rows[0])
        longest = int(lengths.max())
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        logits = None
        for begin in range(start, longest, PREFILL_CHUNK):
            chunk = padded[:, begin:begin + PREFILL_CHUNK].to(device)
            last = (lengths - 1 - begin)[:, None]
            inside = (last >= 0) & (last < chunk.size(1))
            new = self.forward_chunk(chunk, torch.arange(begin, begin + chunk.size(1), device=device), last.clamp(0, chunk.size(1) - 1).to(device))
            logits = new if logits is None else torch.where(inside[:, :, None].to(device), new, logits)
        return logits

    def forward_chunk(self, idx: Tensor, input_pos: Tensor, logits_at: Tensor) -> Tensor:
        """Through the compiled prefill, which takes any length but 1: the compiler would make a special case of it."""
        if idx.size(1) == 1:
            return self.model(idx, input_pos, logits_at)
        torch._dynamo.maybe_mark_dynamic(idx, 1)
        torch._dynamo.maybe_mark_dynamic(input_pos, 0)
        return self.prefill(idx, input_pos, logits_at)


def compile_settings(model: Transformer, prefill_too: bool) -> dict:
    """What torch.compile is told for decoding: static shapes; on CUDA, CUDA graphs."""
    settings: dict = {"dynamic": False}
    if model.device.type == "cuda":
        settings["mode"] = "reduce-overhead"
    elif kernels.ready() and not model.ranks:
        settings["options"] = {"guard_filter_fn": needed_guards}
        if not prefill_too:              # little is left for the compiler's own vector code, and it would try for ten seconds which instructions work
            settings["options"]["cpp.vec_isa_ok"] = False
    return settings


def needed_guards(guards: Sequence) -> list[bool]:
    """Which of the compiler's guards are checked at every step: of the hundreds of tensors in a kernels.Stack the first ones stand for all."""
    return [not re.search(r"\.stack\.\w+\[[1-9]", guard.name) for guard in guards]


def check_request(args: ModelArgs, rows: list[list[int]], max_new_tokens: int) -> None:
    if not rows or not all(rows):
        raise UserError("--prompt is empty")
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens} must be 1 or more")
    longest = max(map(len, rows))
    if longest + max_new_tokens > args.max_position:
        raise UserError(f"--prompt of {longest} tokens and --max_new_tokens {max_new_tokens} exceed the model's context of {args.max_position} positions")


def cache_bytes(args: ModelArgs, batch: int, max_seq_length: int, dtype: torch.dtype) -> int:
    return 2 * args.n_layer * batch * args.n_local_heads * max_seq_length * args.head_dim * dtype.itemsize


def reserve_cache(model: Transformer, batch: int, max_seq_length: int) -> None:
    needed = cache_bytes(model.local, batch, max_seq_length, model.dtype)
    if batch != model.max_batch_size or max_seq_length > model.max_seq_length:
        check_memory(model.device, needed, f"keys and values of {batch} x {max_seq_length} positions (--batch_size, --max_seq_length)")
    model.setup_caches(batch, max_seq_length)


def generate(model: Transformer, tokenizer: Tokenizer, prompt: str | Sequence[int], max_new_tokens: int, sampling: Sampling = Sampling(),
             seed: int | None = None) -> Iterator[int]:
    """The new tokens of one prompt, eagerly: the short way for a program that imports this file. Generator compiles, batches and keeps caches."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    for row in Generator(model, tokenizer).generate(ids, max_new_tokens, sampling, seed=seed):
        yield row[0]


# ---- the command

def bytes_read_per_token(model: Transformer) -> int:
    """All weights but the input embedding; a tied embedding is read as the output head."""
    tensors = {id(t): t for t in itertools.chain(model.parameters(), model.buffers()) if t is not model.tok_embeddings.weight}
    caches = {id(t) for layer in model.layers if layer.attention.kv_cache for t in layer.attention.kv_cache.buffers()}
    head = model.tok_embeddings.weight if model.output is None else None
    return sum(t.nbytes for i, t in tensors.items() if i not in caches) + (head.nbytes if head is not None else 0)


def memory_used(device: torch.device) -> float:
    """Peak GB: of the device's allocator on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@dataclass
class Timing:
    tokens: int                      # of all rows
    steps: int
    total: float                     # seconds
    first: float                     # seconds to the first token

    @property
    def decode_rate(self) -> float:
        """Tokens/s after the first, all rows together."""
        return (self.tokens - self.tokens / self.steps) / (self.total - self.first) if self.steps > 1 else float("nan")


def stream(generator: Generator, tokenizer: Tokenizer, prompts, show: bool, **request) -> tuple[list[list[int]], Timing]:
    """Runs one request to its end, printing row 0's text as it comes."""
    decoder, out, first, steps = StreamDecoder(tokenizer, True, after=prompts[0]), [[] for _ in prompts], 0.0, 0
    start = time.perf_counter()
    try:
        for ids in generator.generate(prompts, **request):
            first, steps = first or time.perf_counter() - start, steps + 1
            for row, i in zip(out, ids):
                if i is not None:
                    row.append(i)
            if show and ids[0] is not None:
                print(decoder.push(ids[0]), end="", flush=True)
    finally:
        if show:
            print(decoder.flush(), flush=True)
    total = time.perf_counter() - start
    return out, Timing(sum(map(len, out)), steps, total, first or total)


def report(timing: Timing, number: int, weights: int, device: torch.device) -> float:
    rate = timing.tokens / timing.total
    print(f"Time for inference {number}: {timing.total:.02f} sec total, {rate:.02f} tokens/sec")
    print(f"Time to first token: {1000 * timing.first:.1f} ms, decode: {timing.decode_rate:.02f} tokens/sec")
    print(f"Bandwidth achieved: {weights * timing.steps / timing.total / 1e9:.02f} GB/s")
    return rate


def warm_up(generator: Generator, prompts: list[list[int]], request: dict) -> float:
    """Compiles what the request will run; returns seconds. Without a working compiler it says so and goes on eagerly."""
    start = time.perf_counter()
    try:
        for _ in generator.generate(prompts, **{**request, "max_new_tokens": min(3, request["max_new_tokens"]), "stop_ids": frozenset()}):
            pass
    except Exception as error:
        if not any(word in f"{type(error).__name__} {error}" for word in ("InvalidCxxCompiler", "CppCompileError", "No working C++ compiler")):
            raise
        print("--compile: no working C++ compiler was found, so the model runs eagerly", file=sys.stderr)
        generator.decode, generator.prefill = generator.decode_step, generator.model.forward
    return time.perf_counter() - start


def chat(generator: Generator, tokenizer: Tokenizer, args: argparse.Namespace, request: dict) -> None:
    """A conversation on the terminal: what was said stays in the KV cache; Ctrl-C stops the answer."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages, ranks = list(system), generator.model.ranks
    print("Ctrl-C stops an answer, an empty line or Ctrl-D ends, /reset begins anew." if args.chat else "An empty line or Ctrl-D ends.")
    while True:
        try:
            text = input("> ").strip() if not ranks or ranks.first else ""
        except (EOFError, KeyboardInterrupt):
            print()
            text = ""
        text = ranks.from_first(text) if ranks else text
        if not text:
            return
        if text == "/reset":
            messages = list(system)
            continue
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.render_chat(messages, enable_thinking=not args.no_thinking) if args.chat else tokenizer.encode(text)
        room = request["max_seq_length"] - len(prompt)
        if room < 1:
            messages.pop()
            print(f"The conversation and this message are {len(prompt)} tokens, and --max_seq_length is {request['max_seq_length']}: /reset begins anew.")
            continue
        answer: list[int] = []
        decoder = StreamDecoder(tokenizer, skip_special=True, after=prompt)
        try:
            for (i,) in generator.generate([prompt], **{**request, "max_new_tokens": min(room, request["max_new_tokens"])}, keep_cache=True):
                answer.append(i)
                print(decoder.push(i), end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(decoder.flush(), flush=True)
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="def quicksort(arr):\n", help="text, or an integer for a synthetic prompt of that many tokens")
    parser.add_argument("--prompt_file", type=Path, help="read the prompt from a file")
    parser.add_argument("--interactive", action="store_true", help="read prompts from the terminal")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the checkpoint's chat template")
    parser.add_argument("--system", help="system message of the chat")
    parser.add_argument("--no_thinking", action="store_true", help="ask a thinking model to answer at once")
    parser.add_argument("--num_samples", type=int, default=5)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=1, help="how many continuations of the prompt at a time")
    parser.add_argument("--top_k", type=int, default=200, help="0: all tokens")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--ignore_eos", action="store_true", help="go on past the end of the text")
    parser.add_argument("--checkpoint_path", type=Path, default=DEMO)
    parser.add_argument("--max_seq_length", type=int, default=0, help="capacity of the KV cache (default: what the request needs)")
    parser.add_argument("--compile", action="store_true", help="compile decoding")
    parser.add_argument("--compile_prefill", action="store_true", help="compile the prompt's pass too")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a chrome trace of the last sample")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: what the device computes best")
    parser.add_argument("--activations", choices=["int8", "bf16"], default="int8", help="beside int8 and int4 weights, where the CPU has int8 products")
    return parser.parse_args(argv)


def read_prompt(args: argparse.Namespace, tokenizer: Tokenizer, vocab: int) -> list[int]:
    if args.prompt.isdigit() and not args.prompt_file:
        return torch.randint(0, min(vocab, 1024), (int(args.prompt),), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        text = args.prompt_file.read_text("utf-8") if args.prompt_file else args.prompt
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {args.prompt_file}: {error}") from None
    if not text:
        raise UserError("--prompt is empty")
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        return tokenizer.render_chat([*system, {"role": "user", "content": text}], enable_thinking=not args.no_thinking)
    return tokenizer.encode(text)


def main(argv: list[str] | None = None) -> None:
    with tp.joined() as ranks:
        command(parse_args(argv), ranks)


def command(args: argparse.Namespace, ranks: tp.Ranks | None) -> None:
    for flag in ("num_samples", "batch_size", "max_new_tokens"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} must be 1 or more")
    sampling = Sampling(args.temperature, args.top_k or None, args.top_p)
    sampling.check()
    device = parse_device(args.device)
    device = ranks.take_device(device) if ranks else device
    dtype = parse_dtype(args.dtype, device)

    start = time.perf_counter()
    model, tokenizer = load_model(args.checkpoint_path, device, dtype, ranks)
    quantize.set_activations(model, args.activations)
    print(f"Time to load model: {time.perf_counter() - start:.02f} seconds ({args.checkpoint_path}, {str(model.dtype)[6:]}, {device}, {kernels.describe(device)})")
    if args.max_seq_length > model.args.max_position:
        raise UserError(f"--max_seq_length {args.max_seq_length} exceeds the model's context of {model.args.max_position} positions")
    generator = Generator(model, tokenizer, args.compile, args.compile_prefill)
    capacity = args.max_seq_length or (min(model.args.max_position, 4096) if args.interactive else 0)
    request = dict(max_new_tokens=args.max_new_tokens, sampling=sampling, max_seq_length=capacity, seed=args.seed,
                   stop_ids=frozenset() if args.ignore_eos else None)
    prompts = [tokenizer.encode("def")] if args.interactive else [read_prompt(args, tokenizer, generator.vocab)] * args.batch_size
    check_request(model.args, prompts, 1 if args.interactive else args.max_new_tokens)
    if not args.interactive and args.max_seq_length and len(prompts[0]) + args.max_new_tokens > args.max_seq_length:
        raise UserError(f"--max_seq_length {args.max_seq_length} is less than the prompt's {len(prompts[0])} tokens and --max_new_tokens {args.max_new_tokens}")
    reserve_cache(model, len(prompts), capacity or len(prompts[0]) + args.max_new_tokens)
    if ranks:                               # what can fail on one rank alone is behind us
        prompts = ranks.from_first(prompts)
        args.profile = args.profile if ranks.first else None
    if args.compile or args.compile_prefill:
        print(f"Compilation time: {warm_up(generator, prompts, request):.2f} seconds")
    if args.interactive:
        return chat(generator, tokenizer, args, request)

    weights, rates = bytes_read_per_token(model), []
    for number in range(1, args.num_samples + 1):
        request["seed"] = None if args.seed is None else args.seed + number - 1
        profiler = torch.profiler.profile() if args.profile and number == args.num_samples else None
        if not args.chat and not args.prompt.isdigit():
            print(tokenizer.decode(prompts[0], skip_special=True), end="", flush=True)
        with profiler or torch.inference_mode():
            rows, timing = stream(generator, tokenizer, prompts, show=True, **request)
        for row in rows[1:]:
            print(f"---\n{tokenizer.decode(row if args.chat else prompts[0] + row, skip_special=True)}")
        rates.append(report(timing, number, weights, device))
        if profiler:
            profiler.export_chrome_trace(str(args.profile))
    print("==========")
    print(f"Average tokens/sec: {sum(rates) / len(rates):.2f}")
    print(f"Memory used: {memory_used(device):.02f} GB")


if __name__ == "__main__":
    run(main)
