"""Evaluates checkpoints: on tasks of EleutherAI's harness (lm-eval), by the perplexity of a text, and against each other.

    python eval.py --checkpoint_path checkpoints/demo/model.pth --compile --tasks hellaswag winogrande
    python eval.py --checkpoint_path checkpoints/demo/model.pth --perplexity tests/data/heldout.txt
    python eval.py --perplexity tests/data/heldout.txt --compare model.pth model_int8.pth model_int4.pth
"""
import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

import kernels
import tp
from cli import UserError, run
from formats import set_quantize_activations
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
    """(tokens to read, tokens that the last of them predict): every id of the text is predicted once, after at most `window` tokens.

    The first window predicts all of its tokens, each later one `stride` more (lm-eval's rolling windows, where stride = window).
    """
    text = [prefix, *ids]
    end, begin = min(window, len(ids)), 0
    while begin < len(ids):
        yield text[max(0, end - window):end], text[begin + 1:end + 1]
        begin, end = end, min(end + stride, len(ids))


@torch.inference_mode()
def token_logits(model: Transformer, ids: Sequence[int], targets: Sequence[int], chunk: int | None = None,
                 forward: Callable[..., Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits that follow the last of `ids`, as many as there are targets, fp32 [n, V], with their targets [n]; chunk after chunk.

    chunk: tokens per pass. At most 16 goes through the kernels that decoding uses on a CPU.
    """
    chunk, device, first = chunk or 512, model.device, len(ids) - len(targets)
    model.setup_caches(1, max(len(ids), model.max_seq_length))
    model.set_prompt_length(len(ids))
    tokens, target = torch.tensor([ids], device=device), torch.tensor(targets, device=device)
    for begin in range(0, len(ids), chunk):
        end = min(begin + chunk, len(ids))
        at = torch.arange(min(max(first - begin, 0), end - begin), end - begin, device=device)
        logits = (forward or model)(tokens[:, begin:end], torch.arange(begin, end, device=device), at if len(at) else at.new_zeros(1))
        if len(at):
            yield logits[0].float(), target[end - first - len(at):end - first]


def text_ids(tokenizer: Tokenizer, text: str, window: int, stride: int) -> list[int]:
    if not 1 <= stride <= window:
        raise UserError(f"--stride {stride} must be at least 1 and at most the window of {window} tokens (--max_seq_length)")
    ids = tokenizer.encode(text, bos=False)
    if len(ids) < window:
        raise UserError(f"--perplexity: the text's {len(ids)} tokens are fewer than a window of {window}: "
                        "give a longer text or a smaller --max_seq_length")
    return ids


def perplexity(model: Transformer, tokenizer: Tokenizer, text: str, window: int, stride: int, chunk: int | None = None,
               forward: Callable[..., Tensor] | None = None) -> TextScore:
    """Scores a text through windows of at most `window` tokens that advance by `stride`. UserError for a text shorter than a window."""
    ids, nll = text_ids(tokenizer, text, window, stride), 0.0
    for tokens, targets in windows(ids, tokenizer.prefix_id, window, stride):
        for logits, target in token_logits(model, tokens, targets, chunk, forward):
            nll += torch.nn.functional.cross_entropy(logits, target, reduction="none").double().sum().item()
    return TextScore(nll, len(ids), len(text.encode()))


@dataclass(frozen=True)
class Comparison:
    """One checkpoint beside the first of its table."""
    path: Path
    size: int                     # bytes of the file
    score: TextScore
    kl: float                     # nats per token, of the first's distribution from this one's
    agreement: float              # share of tokens at which both have the same most probable token


@torch.inference_mode()
def compare(paths: Sequence[Path], text: str, window: int | None = None, stride: int | None = None,
            device: torch.device | str = "cpu", dtype: torch.dtype | None = None, chunk: int | None = None, activations: str = "bf16",
            ranks: tp.Ranks | None = None) -> Iterator[Comparison]:
    """Compares checkpoints with the first of them at every token of the text, in fp32 from the logits on. Two are in memory at a time."""
    def load(path: Path) -> tuple[Transformer, Tokenizer]:
        model, tokenizer = load_model(path, device, dtype, ranks)
        set_quantize_activations(model, activations)
        return model, tokenizer
    first, first_tokenizer = load(paths[0])
    window = check_window(window, first)
    stride = stride or max(window // 2, 1)
    ids = text_ids(first_tokenizer, text, window, stride)
    for path in paths:
        other, tokenizer = (first, first_tokenizer) if path is paths[0] else load(path)
        check_window(window, other)
        if difference := same_tokenizer(first_tokenizer, tokenizer):
            raise UserError(f"--compare {path}: the tokenizers differ: {difference}")
        vocab = min(first.args.vocab_size, other.args.vocab_size)            # the padding of one may be longer
        nll = kl = same = 0.0
        for tokens, targets in windows(ids, tokenizer.prefix_id, window, stride):
            ours = None if other is first else token_logits(other, tokens, targets, chunk)
            for p, target in token_logits(first, tokens, targets, chunk):
                p = p[:, :vocab].log_softmax(-1)
                q = p if ours is None else next(ours)[0][:, :vocab].log_softmax(-1)
                nll -= q.gather(1, target[:, None]).double().sum().item()
                kl += (p.exp() * (p - q)).sum(-1).double().sum().item()
                same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        size = (path / "model.pth" if path.is_dir() else path).stat().st_size
        yield Comparison(path, size, TextScore(nll, len(ids), len(text.encode())), kl / len(ids), same / len(ids))


def print_comparisons(rows: Iterable[Comparison]) -> None:
    print(f"{'checkpoint':<40} {'size':>10} {'perplexity':>11} {'bits/byte':>10} {'KL':>9} {'top-1':>8}")
    for row in rows:
        print(f"{str(row.path)[-40:]:<40} {row.size / 1e6:>7.1f} MB {row.score.perplexity:>11.4f} {row.score.bits_per_byte:>10.4f} {row.kl:>9.5f} "
              f"{row.agreement:>8.2%}", flush=True)


# ---- the command

def check_window(window: int | None, model: Transformer) -> int:
    if window is None:
        return min(model.args.max_position, 2048)
    if not 1 <= window <= model.args.max_position:
        raise UserError(f"--max_seq_length {window} must be at least 1 and at most the model's context of {model.args.max_position} positions")
    return window


def read_text(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--perplexity {path}: {error}") from None
    if not text:
        raise UserError(f"--perplexity {path}: the file is empty")
    return text


def output_file(path: Path) -> Path:
    """Where the results will go: better found out before the evaluation than after it."""
    file = path if path.suffix == ".json" else path / "results.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_path {path}: {error.strerror}") from None
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--output_path {path}: cannot be written")
    return file


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, default=DEMO)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="lm-eval's names, patterns, or .yaml files")
    parser.add_argument("--include_path", type=Path, metavar="FOLDER", help="where further tasks are")
    parser.add_argument("--num_fewshot", type=int, help="examples before each question (default: the task's own number)")
    parser.add_argument("--limit", type=float, help="only so many questions of each task, or this share of them if less than 1")
    parser.add_argument("--apply_chat_template", action="store_true", help="ask in the checkpoint's chat template")
    parser.add_argument("--fewshot_as_multiturn", action=argparse.BooleanOptionalAction, default=True, help="examples are turns of the chat")
    parser.add_argument("--batch_size", default="auto", help="requests at a time, a number or auto")
    parser.add_argument("--max_seq_length", type=int, help="tokens of context (default: the model's; for --perplexity at most 2048)")
    parser.add_argument("--output_path", type=Path, help="write lm-eval's results to this JSON file, or to results.json in this folder")
    parser.add_argument("--seed", type=int, help="of the choice of examples and of sampling (default: lm-eval's)")
    parser.add_argument("--perplexity", type=Path, metavar="FILE", help="perplexity and bits per byte of a text")
    parser.add_argument("--stride", type=int, help="by how many tokens the window advances over the text (default: half of it)")
    parser.add_argument("--chunk", type=int, help="tokens of the text per pass (default: 512); up to 16 go through decoding's kernels")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="CHECKPOINT", help="compare these on the text of --perplexity")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: what the device computes best")
    parser.add_argument("--activations", choices=["int8", "bf16"], default="bf16", help="int8: rounded where generate.py does so")
    args = parser.parse_args(argv)
    if args.batch_size != "auto" and not (args.batch_size.isdecimal() and int(args.batch_size)):
        raise UserError(f"--batch_size {args.batch_size} must be a number from 1 on, or auto")
    args.batch_size = None if args.batch_size == "auto" else int(args.batch_size)
    if args.limit is not None and not args.limit > 0:
        raise UserError(f"--limit {args.limit} must be more than 0")
    for flag, least in (("stride", 1), ("chunk", 1), ("num_fewshot", 0), ("seed", 0)):
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            raise UserError(f"--{flag} {getattr(args, flag)} must be {least} or more")
    if args.compare and (args.tasks or not args.perplexity):
        raise UserError("--compare needs a text and no tasks: give --perplexity FILE")
    if not args.tasks and not args.perplexity:
        raise UserError("nothing to do: give --tasks, or --perplexity FILE")
    return args


def main(argv: list[str] | None = None) -> None:
    with tp.joined() as ranks:
        command(parse_args(argv), ranks)


def command(args: argparse.Namespace, ranks: tp.Ranks | None) -> None:
    device = parse_device(args.device)
    device = ranks.take_device(device) if ranks else device
    dtype = parse_dtype(args.dtype, device)
    text = read_text(args.perplexity) if args.perplexity else ""
    file = output_file(args.output_path) if args.output_path and args.tasks else None
    if args.compare:
        return print_comparisons(compare(args.compare, text, args.max_seq_length, args.stride, device, dtype, args.chunk, args.activations, ranks))
    model, tokenizer = load_model(args.checkpoint_path, device, dtype, ranks)
    set_quantize_activations(model, args.activations)
    print(f"{args.checkpoint_path}: {str(model.dtype)[6:]}, {device}, {kernels.describe(device)}")
    window = check_window(args.max_seq_length, model)
    if text:
        start = time.perf_counter()
        forward = torch.compile(model.forward) if args.compile else None
        score = perplexity(model, tokenizer, text, window, args.stride or max(window // 2, 1), args.chunk, forward)
        print(f"perplexity {score.perplexity:.4f}, {score.bits_per_byte:.4f} bits per byte, {score.tokens} tokens, {score.bytes} bytes "
              f"({time.perf_counter() - start:.1f} seconds)")
    if args.tasks:
        import harness                       # lm-eval takes seconds to import
        lm = harness.QwenFast(model, tokenizer, args.batch_size, args.max_seq_length, args.compile, args.seed)
        results = harness.evaluate(lm, args.tasks, args.include_path, args.num_fewshot, args.limit, args.apply_chat_template,
                                   args.fewshot_as_multiturn, model_args={"checkpoint_path": str(args.checkpoint_path)})
        if results:
            harness.write_results(results, file)


if __name__ == "__main__":
    run(main)
