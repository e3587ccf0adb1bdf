"""Evaluates checkpoints: on tasks of lm-eval, by the perplexity of a text, and against each other.

    python eval.py --compile --tasks hellaswag winogrande
    python eval.py --model checkpoints/demo/model.pth --perplexity tests/data/heldout.txt
    python eval.py --perplexity tests/data/heldout.txt --compare model.pth model_int8.pth model_int4.pth
"""
import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import argparse
import contextlib
import math
import os
import re
import time
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
import kernels
import tp
from cli import UserError
from loading import DEMO, load_model, parse_device, parse_dtype
from model import Transformer
from tokenizer import Tokenizer, same_tokenizer

# ---- perplexity of a text, and checkpoints against each other

@dataclass(frozen=True)
class TextScore:
    nll: float                    # nats, all tokens together
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.bytes


def windows(ids: Sequence[int], prefix: int, window: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens to read, tokens that the last of them predict): each id is predicted once, after at most `window` tokens.

    The first window predicts all of its tokens, each later one `stride` more (lm-eval's have stride = window).
    """
    text = [prefix, *ids]
    end, begin = min(window, len(ids)), 0
    while begin < len(ids):
        yield text[max(0, end - window):end], text[begin + 1:end + 1]
        begin, end = end, min(end + stride, len(ids))


def text_windows(model: Transformer, tokenizer: Tokenizer, text: str, window: int | None = None,
                 stride: int | None = None) -> Iterator[tuple[list[int], list[int]]]:
    """The windows of a text; by default of at most 2048 tokens, half of which are new. Errors: UserError."""
    window = check_window(window, model)
    stride = max(window // 2, 1) if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(f"{stride} must be at least 1 and at most the window of {window} (max_seq_length)", "stride")
    ids = tokenizer.encode(text, bos=False)
    if len(ids) < window:
        raise UserError(f"needs a text of a window of {window} tokens or more, and this one has {len(ids)}: "
                        "give a longer one, or a smaller max_seq_length", "perplexity")
    return windows(ids, tokenizer.prefix_id, window, stride)


def check_window(window: int | None, model: Transformer) -> int:
    longest = model.args.max_position
    if window is not None and not 1 <= window <= longest:
        raise UserError(f"{window} must be at least 1 and at most the model's context of {longest}", "max_seq_length")
    return window or min(longest, 2048)


@torch.inference_mode()
def token_logits(model: Transformer, ids: Sequence[int], targets: Sequence[int], chunk: int | None = None,
                 forward: Callable[..., Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits that predict targets, the last of which follows all of ids: fp32 [n, V] and targets [n], by chunks.

    chunk: tokens per pass (default: 512); up to 16 go through the kernels that decoding uses on a CPU.
    """
    chunk, device, first = chunk or 512, model.device, len(ids) - len(targets)
    model.setup_caches(1, max(len(ids), model.max_seq_length))
    model.cache_owner = None
    model.set_prompt_lengths([len(ids)])
    fused, idx, target = model.fuse(), torch.tensor([ids], device=device), torch.tensor(targets, device=device)
    for begin in range(0, len(ids), chunk):
        end = min(begin + chunk, len(ids))
        scored = torch.arange(min(max(first - begin, 0), end - begin), end - begin, device=device)
        logits_at = scored if len(scored) else scored.new_zeros(1)
        logits = (forward or model)(idx[:, begin:end], torch.arange(begin, end, device=device), logits_at, fused)
        if len(scored):
            yield logits[0].float(), target[end - first - len(scored):end - first]


def perplexity(model: Transformer, tokenizer: Tokenizer, text: str, window: int | None = None,
               stride: int | None = None, chunk: int | None = None,
               forward: Callable[..., Tensor] | None = None) -> TextScore:
    """Scores a text in windows of `window` tokens that advance by `stride`. forward: the model's, compiled."""
    nll, tokens = 0.0, 0
    for ids, targets in text_windows(model, tokenizer, text, window, stride):
        tokens += len(targets)
        for logits, target in token_logits(model, ids, targets, chunk, forward):
            nll += F.cross_entropy(logits, target, reduction="none").double().sum().item()
    return TextScore(nll, tokens, len(text.encode()))


@dataclass(frozen=True)
class Comparison:
    """A checkpoint beside the first of its table."""
    path: Path
    size: int                     # bytes of the file
    score: TextScore
    kl: float                     # nats per token: divergence of this one's distribution from the first's
    agreement: float              # share of tokens at which both have the same most probable token


@torch.inference_mode()
def compare(paths: Sequence[Path], text: str, window: int | None = None, stride: int | None = None,
            device: torch.device | str = "cpu", dtype: torch.dtype | None = None, chunk: int | None = None,
            quantize_activations: bool = False, ranks: tp.Ranks | None = None, verify: bool = False,
            int8_kv_cache: bool = False) -> Iterator[Comparison]:
    """Compares checkpoints with the first, token by token, in fp32 from the logits on. Two are in memory at a time."""
    def load(path: Path) -> tuple[Transformer, Tokenizer]:
        with cli.fields(checkpoint_path="compare"):
            return load_model(path, device, dtype, ranks, quantize_activations=quantize_activations, verify=verify,
                              int8_kv_cache=int8_kv_cache)
    first, first_tokenizer = load(paths[0])
    window = check_window(window, first)
    for path in paths:
        other, tokenizer = (first, first_tokenizer) if path is paths[0] else load(path)
        check_window(window, other)
        if difference := same_tokenizer(first_tokenizer, tokenizer):
            raise UserError(f"{path}: the tokenizers differ: {difference}", "compare")
        vocab_size = min(first.args.vocab_size, other.args.vocab_size)       # one may be padded further
        tokens, nll, kl, same = 0, 0.0, 0.0, 0.0
        for ids, targets in text_windows(first, tokenizer, text, window, stride):
            other_logits = None if other is first else token_logits(other, ids, targets, chunk)
            for logits, target in token_logits(first, ids, targets, chunk):
                p = logits[:, :vocab_size].log_softmax(-1)
                q = p if other_logits is None else next(other_logits)[0][:, :vocab_size].log_softmax(-1)
                tokens += len(target)
                nll -= q.gather(1, target[:, None]).double().sum().item()
                kl += (p.exp() * (p - q)).sum(-1).double().sum().item()
                same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        size = (path / "model.pth" if path.is_dir() else path).stat().st_size
        yield Comparison(path, size, TextScore(nll, tokens, len(text.encode())), kl / tokens, same / tokens)


def print_comparisons(rows: Iterable[Comparison]) -> None:
    print(f"{'checkpoint':<40} {'size':>10} {'perplexity':>11} {'bits/byte':>10} {'KL':>9} {'top-1':>8}")
    for row in rows:
        print(f"{str(row.path)[-40:]:<40} {row.size / 1e6:>7.1f} MB {row.score.perplexity:>11.4f} "
              f"{row.score.bits_per_byte:>10.4f} {row.kl:>9.5f} {row.agreement:>8.2%}", flush=True)


# ---- the command

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("tasks of lm-eval").add_argument
    add("--tasks", nargs="+", metavar="TASK", help="names, patterns, or .yaml files")
    add("--include_path", type=Path, metavar="FOLDER", help="where further tasks are")
    add("--num_fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    add("--limit", type=float, metavar="N", help="questions of each task at most; less than 1: a share of them")
    add("--apply_chat_template", action="store_true", help="ask in the checkpoint's chat template")
    add("--fewshot_as_multiturn", action=BooleanOptionalAction, default=True, help="the examples are turns of the chat")
    add("--batch_size", default="auto", metavar="N", help="requests at a time, or auto")
    add("--seed", type=int, help="of the choice of examples and of sampling (default: lm-eval's)")
    add("--output_path", type=Path, help="write the results to this .json file, or to results.json in this folder")

    add = parser.add_argument_group("perplexity of a text").add_argument
    add("--perplexity", type=Path, metavar="FILE", help="perplexity and bits per byte of this text")
    add("--stride", type=int, metavar="N", help="tokens that the window advances by (default: half of it)")
    add("--chunk", type=int, metavar="N", help="tokens per pass (default: 512); up to 16 go through decoding's kernels")
    add("--compare", type=Path, nargs="+", metavar="CHECKPOINT", help="compare these on the text")

    add = parser.add_argument_group("model").add_argument
    add("--checkpoint_path", "--model", type=Path, default=DEMO, metavar="PATH",
        help="model.pth, its folder, or a Hugging Face repository such as Qwen/Qwen3-0.6B, to be downloaded")
    add("--verify", action="store_true", help="compare the file's checksums before it is used")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    add("--dtype", choices=["bf16", "fp16", "fp32"], help="default: what the device computes best")
    add("--quantize_activations", action=BooleanOptionalAction, default=False,
        help="as generate.py does beside int8 and int4 weights")
    add("--kv_cache", choices=["int8"], help="as generate.py's (default: the model's dtype)")
    add("--max_seq_length", type=int, metavar="N",
        help="tokens of context (default: the model's) or of the window over a text (default: the same, 2048 at most)")
    add("--compile", action="store_true", help="compile the model")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    if args.batch_size != "auto" and not re.fullmatch("0*[1-9][0-9]{0,8}", args.batch_size):
        raise UserError(f"{args.batch_size[:20]} must be a number from 1 to 999999999, or auto", "batch_size")
    if args.limit is not None and not 0 < args.limit < 1 << 32:
        raise UserError(f"{args.limit} must be more than 0 and less than 2^32", "limit")
    for field, least in (("stride", 1), ("chunk", 1), ("num_fewshot", 0), ("seed", 0), ("max_seq_length", 1)):
        if getattr(args, field) is not None and getattr(args, field) < least:
            raise UserError(f"{getattr(args, field)} must be {least} or more", field)
    if args.seed is not None and args.seed >= 1 << 32:
        raise UserError(f"{args.seed} must be less than 2^32", "seed")                  # NumPy's limit
    if args.include_path and not os.path.isdir(args.include_path):
        raise UserError(f"{args.include_path}: no such folder", "include_path")
    if args.compare and (args.tasks or not args.perplexity):
        raise UserError("needs a text and no tasks: give --perplexity FILE", "compare")
    if not args.tasks and not args.perplexity:
        raise UserError("nothing to do: give --tasks, or --perplexity FILE")


def results_file(path: Path) -> Path:
    """Where the results will go: better found out before the evaluation than after it."""
    file = path if path.suffix == ".json" else path / "results.json"
    with contextlib.suppress(OSError):           # of which check_writable tells
        file.parent.mkdir(parents=True, exist_ok=True)
    cli.check_writable(file, "output_path")
    return file


def main(argv: list[str] | None = None) -> None:
    with tp.joined() as ranks:
        command(parse_args(argv), ranks)


def command(args: argparse.Namespace, ranks: tp.Ranks | None) -> None:
    check_args(args)
    device = parse_device(args.device)
    device = ranks.take_device(device) if ranks else device
    dtype, text = parse_dtype(args.dtype, device), ""
    if args.perplexity and not (text := cli.read_text(args.perplexity, "perplexity")):
        raise UserError(f"{args.perplexity}: the file is empty", "perplexity")
    file = results_file(args.output_path) if args.output_path and args.tasks else None
    if args.compare:
        return print_comparisons(compare(args.compare, text, args.max_seq_length, args.stride, device, dtype,
                                         args.chunk, args.quantize_activations, ranks, args.verify,
                                         args.kv_cache == "int8"))
    model, tokenizer = load_model(args.checkpoint_path, device, dtype, ranks,
                                  quantize_activations=args.quantize_activations, verify=args.verify,
                                  int8_kv_cache=args.kv_cache == "int8")
    print(f"{args.checkpoint_path}: {str(model.dtype)[6:]}, {device}, {kernels.describe(device)}")
    check_window(args.max_seq_length, model)
    if text:
        start = time.perf_counter()
        forward = torch.compile(model.forward, dynamic=True) if args.compile else None       # chunks of any length
        score = perplexity(model, tokenizer, text, args.max_seq_length, args.stride, args.chunk, forward)
        print(f"perplexity {score.perplexity:.4f}, {score.bits_per_byte:.4f} bits per byte, {score.tokens} tokens, "
              f"{score.bytes} bytes ({time.perf_counter() - start:.1f} seconds)")
    if args.tasks:
        batch_size = None if args.batch_size == "auto" else int(args.batch_size)
        lm = harness.QwenFast(model, tokenizer, batch_size, args.max_seq_length, args.compile, args.seed)
        results = harness.evaluate(
            lm, args.tasks, args.include_path, num_fewshot=args.num_fewshot, limit=args.limit,
            apply_chat_template=args.apply_chat_template, fewshot_as_multiturn=args.fewshot_as_multiturn)
        if results:
            results["config"]["model_args"] = {"checkpoint_path": str(args.checkpoint_path)}
            harness.write_results(results, file)


if __name__ == "__main__":
    cli.run(main)
