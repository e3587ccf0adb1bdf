"""Generates text: loads a checkpoint, prefills the prompt, decodes one token after another.

    python generate.py --compile --prompt "def quicksort(arr):"
"""
import argparse
import itertools
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import torch

import formats
import kernels
import tp
from chat import chat
from cli import UserError, run
from decoding import Generator
from loading import load_model, parse_device, parse_dtype
from model import Transformer
from sampling import Sampling, sample
from speculate import Speculator, Statistics, summary
from tokenizer import StreamDecoder, Tokenizer

DEMO = Path(__file__).resolve().parent / "checkpoints" / "demo" / "model.pth"


# ---- generation

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


def report(timing: Timing, number: int, bytes_read: int) -> float:
    rate = timing.tokens / timing.total
    print(f"Time for inference {number}: {timing.total:.02f} sec total, {rate:.02f} tokens/sec")
    print(f"Time to first token: {1000 * timing.first:.1f} ms, decode: {timing.decode_rate:.02f} tokens/sec")
    print(f"Bandwidth achieved: {bytes_read / timing.total / 1e9:.02f} GB/s")
    return rate


def warm_up(generator: Generator, prompts: list[list[int]], request: dict) -> float:
    """Compiles what the request will run; returns seconds. Without a working compiler it says so and goes on eagerly."""
    start = time.perf_counter()
    try:
        for _ in generator.generate(prompts, **{**request, "max_new_tokens": min(generator.warm_up_tokens, request["max_new_tokens"]), "stop_ids": frozenset()}):
            pass
    except Exception as error:
        if not any(word in f"{type(error).__name__} {error}" for word in ("InvalidCxxCompiler", "CppCompileError", "No working C++ compiler")):
            raise
        print("--compile: no working C++ compiler was found, so the model runs eagerly", file=sys.stderr)
        generator.run_eagerly()
    return time.perf_counter() - start


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
    parser.add_argument("--draft_checkpoint_path", type=Path, help="a smaller model of the same tokenizer, for speculative decoding")
    parser.add_argument("--draft", choices=["ngram"], help="speculative decoding without a model: what followed the last words where they stood before")
    parser.add_argument("--speculate_k", help="how many tokens to draft at a time, or auto: as many, or none, as is fastest (default)")
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
    formats.set_activations(model, args.activations)
    print(f"Time to load model: {time.perf_counter() - start:.02f} seconds ({args.checkpoint_path}, {str(model.dtype)[6:]}, {device}, {kernels.describe(device)})")
    if args.max_seq_length > model.args.max_position:
        raise UserError(f"--max_seq_length {args.max_seq_length} exceeds the model's context of {model.args.max_position} positions")
    generator = make_generator(args, model, tokenizer, ranks)
    capacity = args.max_seq_length or (min(model.args.max_position, 4096) if args.interactive else 0)
    request = dict(max_new_tokens=args.max_new_tokens, sampling=sampling, max_seq_length=capacity, seed=args.seed,
                   stop_ids=frozenset() if args.ignore_eos else None)
    prompts = [tokenizer.encode("def")] if args.interactive else [read_prompt(args, tokenizer, generator.vocab)] * args.batch_size
    generator.check(prompts, 1 if args.interactive else args.max_new_tokens)
    if not args.interactive and args.max_seq_length and len(prompts[0]) + args.max_new_tokens > args.max_seq_length:
        raise UserError(f"--max_seq_length {args.max_seq_length} is less than the prompt's {len(prompts[0])} tokens and --max_new_tokens {args.max_new_tokens}")
    generator.reserve(len(prompts), capacity or len(prompts[0]) + args.max_new_tokens)
    if ranks:                               # what can fail on one rank alone is behind us
        prompts = ranks.from_first(prompts)
        args.profile = args.profile if ranks.first else None
    if args.compile or args.compile_prefill or isinstance(generator, Speculator):
        seconds = warm_up(generator, prompts, request)
        print(f"{'Compilation' if args.compile or args.compile_prefill else 'Warm-up'} time: {seconds:.2f} seconds")
    if args.interactive:
        return chat(generator, tokenizer, args, request)
    run_samples(args, generator, prompts, request)


def make_generator(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, ranks: tp.Ranks | None) -> Generator:
    if not args.draft_checkpoint_path and not args.draft:
        if args.speculate_k is not None:
            raise UserError(f"--speculate_k {args.speculate_k} needs --draft_checkpoint_path or --draft ngram")
        return Generator(model, tokenizer, args.compile, args.compile_prefill)
    if args.draft_checkpoint_path and args.draft:
        raise UserError("--draft_checkpoint_path and --draft are two ways to draft: give one")
    draft = None
    if args.draft_checkpoint_path:
        try:
            draft_model, draft_tokenizer = load_model(args.draft_checkpoint_path, model.device, model.dtype, ranks, may_replicate=True)
        except UserError as error:
            raise UserError(str(error).replace("--checkpoint_path", "--draft_checkpoint_path")) from None
        formats.set_activations(draft_model, args.activations)
        draft = Generator(draft_model, draft_tokenizer, compile_prefill=args.compile_prefill)
    speculator = Speculator(model, tokenizer, draft, parse_speculate_k(args.speculate_k), args.compile, args.compile_prefill)
    speculator.measures = True
    return speculator


def parse_speculate_k(text: str | None) -> int | None:
    """None for auto."""
    if text is None or text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--speculate_k {text!r} is neither a number nor auto") from None


def run_samples(args: argparse.Namespace, generator: Generator, prompts: list[list[int]], request: dict) -> None:
    tokenizer, speculates, plain_rate = generator.tokenizer, isinstance(generator, Speculator), 0.0
    if speculates:
        generator.enabled = False
        plain_rate = stream(generator, tokenizer, prompts, show=False,
                            **{**request, "max_new_tokens": min(64, args.max_new_tokens), "stop_ids": frozenset()})[1].decode_rate
        generator.enabled, generator.statistics = True, Statistics([])
    weights, rates, decode_rates = bytes_read_per_token(generator.model), [], []
    for number in range(1, args.num_samples + 1):
        request["seed"] = None if args.seed is None else args.seed + number - 1
        passed = generator.statistics.passes if speculates else 0
        profiler = torch.profiler.profile() if args.profile and number == args.num_samples else None
        if not args.chat and not args.prompt.isdigit():
            print(tokenizer.decode(prompts[0], skip_special=True), end="", flush=True)
        with profiler or torch.inference_mode():
            rows, timing = stream(generator, tokenizer, prompts, show=True, **request)
        for row in rows[1:]:
            print(f"---\n{tokenizer.decode(row if args.chat else prompts[0] + row, skip_special=True)}")
        passes = 1 + generator.statistics.passes - passed if speculates else timing.steps
        rates.append(report(timing, number, weights * passes))
        decode_rates.append(timing.decode_rate)
        if profiler:
            profiler.export_chrome_trace(str(args.profile))
    print("==========")
    print(f"Average tokens/sec: {sum(rates) / len(rates):.2f}")
    if speculates:
        print(summary(generator, plain_rate, sum(decode_rates) / len(decode_rates)))
    print(f"Memory used: {memory_used(generator.model.device):.02f} GB")


if __name__ == "__main__":
    run(main)
