"""Generates text: loads a checkpoint, prefills the KV cache with the prompt, and decodes one token after another.

    python generate.py --compile --prompt "def quicksort(arr):"
"""
import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import argparse
import contextlib
import functools
import gzip
import itertools
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import torch
from torch import Tensor

import kernels
import tp
from chat import RowPrinter, chat, show_prefill
from cli import UserError
from config import ModelArgs, ntk_alpha
from deltanet import MAX_PENDING
from drafts import common_prefix
from loading import DEMO, check_memory, free_memory, load_model, parse_device, parse_dtype
from model import MoE, Transformer
from sampling import Choice, Sampling, compile_step, exponential_noise, sample
from shapes import PUBLISHED
from speculate import Speculator, Statistics, summary
from tokenizer import StreamDecoder, Tokenizer

PREFILL_CHUNK = {"cpu": 1024, "cuda": 4096}      # tokens of a pass: bounds the memory that activations take
MAX_BATCH = 1 << 16              # of the command: what fits into memory is checked when there is a model
MAX_SYNTHETIC = 1 << 24          # tokens: a config.json may claim a context of any length
MAX_SNAPSHOTS = 2                # each as large as the memory of all DeltaNets: 20 MB for 0.8B parameters, 150 for 27B
MIN_CAPACITY = 256               # of a KV cache; up from there powers of 2, because a compiled step knows the size
Progress = Callable[[int, int], None]


# ---- prefill and decode

class Snapshot(NamedTuple):
    """What the DeltaNets of a hybrid model remembered at the end of a prompt, so that a chat can go on from there: its
    template may drop the thoughts of the answer that followed."""
    first: int                       # positions that the next token may have
    last: int
    states: list[list[Tensor]]


class Engine:
    """A model, its compiled functions, and what its KV cache holds.

    draft: the engine of a draft model, "mtp" or "ngram", for speculative decoding with speculate_k drafted tokens a
    round (None: chosen while running).
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None, compile: bool = False,
                 compile_prefill: bool = False, draft: "Engine | str | None" = None, speculate_k: int | None = None):
        self.model, self.tokenizer = model, cast(Tokenizer, tokenizer)     # None serves who passes and takes ids only
        self.vocab_size = min(tokenizer.vocab_size, model.args.vocab_size) if tokenizer else model.args.vocab_size
        self.stop_ids = tokenizer.stop_ids if tokenizer else frozenset()
        self.snapshots: list[Snapshot] = []            # in the order of the text
        self.cached: list[int] = []                    # the tokens that the KV cache holds, where the batch is 1,
        self.cached_alpha = 1                          # the ntk_alpha that these tokens' keys were rotated with
        self.cache_owner = object()                    # what model.cache_owner is while they are in its KV cache
        self.fused: kernels.FusedLayers | None = None  # the layers as the present request found them
        self.compiled, self.compiled_prefill = compile, compile_prefill
        self.run_decode, self.run_forward = decode_one_token, model.forward
        if compile:
            self.run_decode = compile_step(decode_one_token, model, prefill_too=compile_prefill)
        if compile_prefill:
            self.run_forward = torch.compile(model.forward, fullgraph=True)
        self.speculator = None
        if draft:
            self.speculator = Speculator(self, draft, speculate_k)

    @property
    def context(self) -> int:
        """How many positions the model, and its draft, have."""
        draft = self.speculator.draft_engine if self.speculator else None
        return min(self.model.args.max_position, draft.model.args.max_position if draft else 1 << 62)

    def run_eagerly(self) -> None:
        """For a machine without a working compiler."""
        self.run_decode, self.run_forward = decode_one_token, self.model.forward
        if self.speculator:
            self.speculator.run_eagerly()
            if self.speculator.draft_engine:
                self.speculator.draft_engine.run_eagerly()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[int] | Sequence[Sequence[int]], max_new_tokens: int,
                 sampling: Sampling = Sampling(), *, seed: int | None = None, stop_ids: frozenset[int] | None = None,
                 max_seq_length: int = 0, keep_cache: bool = False,
                 progress: Progress | None = None) -> Iterator[list[int | None]]:
        """Yields the new ids of all rows, step by step; None for a row that has met a stop id, which is not yielded.

        prompts: one list of ids, or a batch of them, of any lengths.
        stop_ids: the tokenizer's if None.
        max_seq_length: capacity of the KV cache, at least what the request needs.
        keep_cache: what the cache already holds of the prompt is not computed again (batch 1).
        progress: called with the numbers of the prompt's tokens that have been read, and that there are.

        A change to the model takes effect with the next request; keep_cache keeps what was computed before it.
        Errors: UserError.
        """
        single = not prompts or isinstance(prompts[0], int)
        rows: list[list[int]] = [list(p) for p in cast(Any, [prompts] if single else prompts)]
        sampling.check()
        self.check_request(rows, max_new_tokens)
        lengths, stop_ids = [len(row) for row in rows], self.stop_ids if stop_ids is None else stop_ids
        self.reserve(len(rows), max(max(lengths) + max_new_tokens, max_seq_length))
        rng = torch.Generator(self.model.device).manual_seed(self.fresh_seed() if seed is None else seed)
        choice = sampling.choice(self.vocab_size, self.model.device)
        try:
            yield from self.run(rows, lengths, max_new_tokens, choice, rng, stop_ids, keep_cache, progress)
        except BaseException as error:                 # Ctrl-C amid a pass, perhaps
            if not isinstance(error, GeneratorExit):
                self.invalidate()
            raise

    def run(self, rows: list[list[int]], lengths: list[int], max_new_tokens: int, choice: Choice, rng: torch.Generator,
            stop_ids: frozenset[int], keep_cache: bool, progress: Progress | None) -> Iterator[list[int | None]]:
        logits = self.prefill(rows, keep_cache, progress)                                  # [B, 1, V]
        noise = exponential_noise(len(rows), choice.candidates, rng)
        idx = sample(logits[:, -1, :self.vocab_size], choice, noise)                       # [B, 1]
        if self.speculator and self.speculator.enabled:
            steps = ([i] for i in self.speculator.decode(int(idx), max_new_tokens, choice, rng, keep_cache))
        else:
            input_pos = torch.tensor(lengths, device=idx.device)[:, None]
            steps = self.decode_n_tokens(idx, input_pos, max_new_tokens, choice, rng)
        ended = [False] * len(rows)
        for ids in steps:
            ended = [end or i in stop_ids for end, i in zip(ended, ids)]
            if all(ended):
                return
            yield [None if end else i for end, i in zip(ended, ids)]

    def prefill(self, rows: Sequence[Sequence[int]], keep_cache: bool = False,
                progress: Progress | None = None) -> Tensor:
        """Logits [B, 1, V] of each row's last token. Shorter rows are padded on the right, at a position that does not
        follow on theirs, and where a decoded token will overwrite the padding's keys and values."""
        device, lengths = self.model.device, torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        start = self.resume(rows[0]) if keep_cache and len(rows) == 1 else 0
        self.snapshots = [s._replace(last=min(s.last, start)) for s in self.snapshots if s.first <= start]
        self.cached, self.cached_alpha = self.cached[:start], ntk_alpha(self.model.args, longest)
        self.model.set_prompt_lengths(lengths.tolist())
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        logits, chunk = cast(Any, None), PREFILL_CHUNK[device.type]
        for begin in range(start, longest, chunk):
            idx = padded[:, begin:begin + chunk].to(device)
            last = (lengths - 1 - begin)[:, None]                      # each row's last token: is it in this chunk?
            inside = (last >= 0) & (last < idx.size(1))
            input_pos = torch.arange(begin, begin + idx.size(1))
            if lengths.min() < longest:
                input_pos = torch.where(input_pos < lengths[:, None], input_pos, lengths[:, None] + 1)
            input_pos = input_pos.to(device)
            new = self.forward_chunk(idx, input_pos, last.clamp(0, idx.size(1) - 1).to(device))
            if self.speculator:
                self.speculator.drafter.read(rows[0], begin, begin + idx.size(1))
            logits = new if logits is None else torch.where(inside[:, :, None].to(device), new, logits)
            if progress and longest > chunk:
                progress(begin + idx.size(1), longest)
        self.cached = list(rows[0])
        if keep_cache and self.model.delta_states():
            new = Snapshot(*self.model.resumable(), self.model.save())
            older = [snapshot for snapshot in self.snapshots if snapshot.first < new.first]
            self.snapshots = [*older[1 - MAX_SNAPSHOTS:], new]
        return logits

    def reusable(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's first tokens need not be computed; the last always is."""
        if self.cached_alpha != ntk_alpha(self.model.args, len(prompt)):
            return 0
        known = min(common_prefix(self.cached, prompt), len(prompt) - 1)
        if self.speculator and self.speculator.drafter.filled is not None:     # it needs the token after each, too
            known = max(0, min(common_prefix(self.cached, prompt) - 1, known, self.speculator.drafter.filled))
        ranges = [self.model.resumable(), *((snapshot.first, snapshot.last) for snapshot in self.snapshots)]
        return max((min(known, last) for first, last in ranges if first <= known), default=0)

    def resume(self, prompt: Sequence[int]) -> int:
        """The same, and the model is ready to go on from there."""
        start, (first, last) = self.reusable(prompt), self.model.resumable()
        if start and not first <= start <= last:
            self.model.restore(next(s for s in self.snapshots if s.first <= start <= s.last).states)
        return start

    def invalidate(self) -> None:
        """What DeltaNets remember after a pass that was cut short, the draft's too, serves nothing any more."""
        for state in self.model.delta_states():
            state.invalidate()
        if self.speculator and self.speculator.draft_engine:
            self.speculator.draft_engine.invalidate()

    def forward_chunk(self, idx: Tensor, input_pos: Tensor, logits_at: Tensor) -> Tensor:
        """Through the compiled model, which takes any length but 1: the compiler would make a special case of it."""
        if idx.size(1) == 1:
            return self.model(idx, input_pos, logits_at, self.fused)
        if self.compiled_prefill:                              # else the compiler need not be imported
            torch._dynamo.maybe_mark_dynamic(idx, 1)
            torch._dynamo.maybe_mark_dynamic(input_pos, input_pos.dim() - 1)
        return self.run_forward(idx, input_pos, logits_at, self.fused)

    def decode_n_tokens(self, idx: Tensor, input_pos: Tensor, n: int, choice: Choice,
                        rng: torch.Generator) -> Iterator[list[int]]:
        """The ids of all rows, n times: first idx [B, 1], which belongs at input_pos [B, 1]."""
        on_gpu = self.model.device.type == "cuda"
        for left in range(n - 1, -1, -1):
            # A GPU computes the next token while this one is read; a CPU would only be late with this one.
            read = start_reading(idx[:, 0])
            following = self.step(idx, input_pos, choice, rng) if on_gpu and left else None
            ids = read()
            yield ids
            if left:
                idx = following if following is not None else self.step(idx, input_pos, choice, rng)
                self.cached.append(ids[0])

    def step(self, idx: Tensor, input_pos: Tensor, choice: Choice, rng: torch.Generator) -> Tensor:
        """The next ids [B, 1]; moves input_pos on."""
        noise = exponential_noise(len(idx), choice.candidates, rng)
        following, _ = self.run_decode(self.model, self.fused, self.vocab_size, idx, input_pos, choice, noise)
        following = following.clone()
        input_pos += 1
        return following

    def check_request(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raises UserError if the model, or its draft, cannot serve the request."""
        check_request(self.model.args, rows, max_new_tokens)
        if self.speculator and len(rows) > 1:
            raise UserError(f"{len(rows)}: speculative decoding takes one sequence at a time", "batch_size")
        if self.speculator and self.speculator.draft_engine:
            check_request(self.speculator.draft_engine.model.args, rows, max_new_tokens, "the draft's context")

    def reserve(self, batch: int, max_seq_length: int) -> None:
        """Makes the KV cache large enough and fuses the layers as they are now."""
        max_pending = 0
        if self.speculator:
            max_seq_length, max_pending = max_seq_length + self.speculator.lookahead, self.speculator.lookahead + 1
            if self.speculator.draft_engine:
                self.speculator.draft_engine.reserve(batch, max_seq_length)
        reserve_caches(self.model, batch, max_seq_length, max_pending)
        if self.model.cache_owner is not self.cache_owner:
            self.cached, self.snapshots = [], []
        self.model.cache_owner = self.cache_owner
        self.fused = self.model.fuse()
        if self.speculator:
            self.speculator.drafter.prepare()

    def fresh_seed(self) -> int:
        """The same on all ranks, so that they draw the same tokens."""
        seed = random.getrandbits(63)
        return self.model.ranks.from_first(seed) if self.model.ranks else seed


def decode_one_token(model: Transformer, fused: kernels.FusedLayers | None, vocab_size: int, idx: Tensor,
                     input_pos: Tensor, choice: Choice, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The next ids [B, 1] after idx [B, 1] at input_pos [B, 1], and the logits [B, V] that they were chosen from. No
    method: an Engine that refers to itself would keep its model in memory until Python looks for cycles."""
    logits = model(idx, input_pos, fused=fused)[:, -1]
    return sample(logits[:, :vocab_size], choice, noise), logits


def start_reading(ids: Tensor) -> Callable[[], list[int]]:
    """Begins to copy ids to the host; what it returns waits for them, and not for what a GPU was given to do since."""
    if ids.device.type != "cuda":
        return ids.tolist
    host, copied = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(ids, non_blocking=True)
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        return host.tolist()
    return read


def check_request(args: ModelArgs, rows: Sequence[Sequence[int]], max_new_tokens: int,
                  context: str = "the model's context") -> None:
    """Raises UserError if the request is empty or exceeds the model's context."""
    if not rows or not all(rows):
        raise UserError("is empty", "prompt")
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} must be 1 or more", "max_new_tokens")
    longest = max(map(len, rows))
    if longest + max_new_tokens > args.max_position:
        raise UserError(f"of {longest} tokens and max_new_tokens {max_new_tokens} exceed {context} of "
                        f"{args.max_position} positions", "prompt")


def head_bytes(args: ModelArgs, dtype: torch.dtype) -> int:
    """Of one head's key, or value, in the KV cache; in int8 with its scale."""
    return args.head_dim * dtype.itemsize + 4 * (dtype == torch.int8)


def cache_bytes(args: ModelArgs, batch: int, max_seq_length: int, dtype: torch.dtype) -> int:
    """Of the keys and values, in a dtype, and of what the DeltaNets remember, a few MB a row however long it is."""
    layers = args.n_layer - len(args.delta_layers) + args.has_mtp
    keys, values = args.delta_key_heads * args.delta_key_dim, args.delta_value_heads * args.delta_value_dim
    of_state = 4 * (values * args.delta_key_dim + MAX_PENDING * (keys + values + args.delta_channels))
    of_token = 2 * layers * args.n_local_heads * head_bytes(args, dtype)
    return batch * (max_seq_length * of_token + len(args.delta_layers) * of_state)


def reserve_caches(model: Transformer, batch: int, max_seq_length: int, max_pending: int = 0) -> None:
    """Makes the KV caches large enough: where memory allows, of a size that later requests can share."""
    if batch != model.max_batch_size or max_seq_length > model.max_seq_length:
        bytes_of = functools.partial(cache_bytes, model.local, batch, dtype=model.kv_dtype)
        power_of_2 = 1 << (max(max_seq_length, MIN_CAPACITY) - 1).bit_length()
        rounded = max(max_seq_length, min(power_of_2, model.args.max_position))
        if bytes_of(rounded) <= memory_for_caches(model):
            max_seq_length = rounded
        check_memory(model.device, bytes_of(max_seq_length),
                     f"keys and values of {batch} x {max_seq_length} positions (batch_size, max_seq_length)")
    model.setup_caches(batch, max_seq_length, max_pending=max_pending)


def memory_for_caches(model: Transformer) -> int:
    """Bytes: the same on all ranks, whose batches and caches must be alike."""
    free = free_memory(model.device) // 2
    return min(model.ranks.gather(free)) if model.ranks else free


# ---- what a run reports

def bytes_read_per_token(model: Transformer) -> int:
    """All weights but the input embedding, of which a token needs one row (tied to the head, it is read whole), and the
    experts that are not chosen; and what DeltaNets remember, which is read and written."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    tensors = {id(t): t for name, t in named if not name.startswith(("mtp.", "hidden_states"))}
    if model.output is not None:
        del tensors[id(model.tok_embeddings.weight)]
    for cache in (cache for layer in model.layers for cache in layer.attention.caches()):
        del tensors[id(cache)]
    of_experts = ((module.n_chosen / module.n_expert, tensor) for module in model.modules() if isinstance(module, MoE)
                  for linear in (module.w13, module.w2) for tensor in linear.expert_args(model.dtype))
    unread = sum(int((1 - share) * tensor.nbytes) for share, tensor in of_experts)
    memory = sum(state.memory.nbytes for state in model.delta_states())
    return sum(t.nbytes for t in tensors.values()) - unread + 2 * memory


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


def stream(engine: Engine, prompts: Sequence[Sequence[int]],
           show: Callable[[int, str], None] = lambda row, text: None, **request) -> tuple[list[list[int]], Timing]:
    """Runs one request to its end: the new ids of each row. show: told (row, more text) as it comes."""
    decoders = [StreamDecoder(engine.tokenizer, True, after=prompt) for prompt in prompts]
    out, first, steps, start = [[] for _ in prompts], 0.0, 0, time.perf_counter()
    try:
        for ids in engine.generate(prompts, **request):
            first, steps = first or time.perf_counter() - start, steps + 1
            for row, i in enumerate(ids):
                if i is not None:
                    out[row].append(i)
                    show(row, decoders[row].push(i))
    finally:
        for row, decoder in enumerate(decoders):
            show(row, decoder.flush())
    total = time.perf_counter() - start
    return out, Timing(sum(map(len, out)), steps, total, first or total)


@cli.without_gc()
def warm_up(engine: Engine, prompts: Sequence[Sequence[int]], request: dict[str, Any]) -> float:
    """Compiles what the request will run; returns seconds. Without a working compiler the engine goes on eagerly."""
    start = time.perf_counter()
    tokens = 32 if engine.speculator else 3          # so that the first choice of k rests on some rounds
    request = {**request, "max_new_tokens": min(tokens, request["max_new_tokens"]), "stop_ids": frozenset()}
    with eager_without_compiler(engine):
        for _ in engine.generate(prompts, **request):
            pass
    return time.perf_counter() - start


@contextlib.contextmanager
def eager_without_compiler(engine: Engine) -> Iterator[None]:
    """Where what is done inside fails for want of a compiler, the engine runs eagerly from then on."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__} {error}"
        if not any(words in said for words in ("InvalidCxxCompiler", "CppCompileError", "No working C++ compiler")):
            raise
        print("--compile: no working C++ compiler was found, so the model runs eagerly", file=sys.stderr)
        engine.run_eagerly()


# ---- the command

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("-p", "--prompt", metavar="TEXT", default="def quicksort(arr):\n",
                        help="text; - reads it from stdin; an integer asks for a synthetic prompt of that many tokens")
    prompt.add_argument("--prompt_file", type=Path, metavar="FILE", help="read the prompt from a file")
    prompt.add_argument("--interactive", action="store_true", help="read prompts from the terminal")
    prompt.add_argument("--chat", action=argparse.BooleanOptionalAction,
                        help="the prompt is a user's message in the checkpoint's chat template (default: with "
                        "--interactive, if there is one)")
    prompt.add_argument("--system", metavar="TEXT", help="system message of the chat")
    prompt.add_argument("--no_thinking", action="store_true", help="ask a thinking model to answer at once")

    output = parser.add_argument_group("generation")
    output.add_argument("-n", "--max_new_tokens", type=int, default=200, metavar="N",
                        help="tokens to generate at most")
    output.add_argument("--num_samples", type=int, default=5, metavar="N", help="samples, one after another")
    output.add_argument("--batch_size", type=int, default=1, metavar="N",
                        help="continuations of the prompt at a time")
    add_sampling_options(output)
    output.add_argument("--seed", type=int, metavar="N",
                        help="the same seed gives the same text (with drafts: for a fixed K)")
    output.add_argument("--ignore_eos", action="store_true", help="go on past the end of the text")
    output.add_argument("--quiet", action="store_true", help="print the text alone")

    model = add_model_options(parser)
    model.add_argument("--list_models", action="store_true", help="print the shapes of published models and end")
    speed = add_speed_options(parser)
    speed.add_argument("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the last sample")
    return parser.parse_args(argv)


def add_sampling_options(group: Any) -> None:
    group.add_argument("--temperature", "--temp", type=float, default=0.8, metavar="T",
                       help="0: always the most probable token")
    group.add_argument("--top_k", type=int, default=200, metavar="K",
                       help="sample from the K most probable tokens; 0: from all")
    group.add_argument("--top_p", type=float, metavar="P",
                       help="sample from the most probable tokens that have a probability of P together")


def add_model_options(parser: argparse.ArgumentParser, capacity: str = "what the request needs") -> Any:
    """For load_engine; returns their group. capacity: the default of max_seq_length, in words."""
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint_path", "--model", type=Path, default=DEMO, metavar="PATH",
                       help="a model.pth, its folder, or a Hugging Face repository to download, "
                       "e.g. Qwen/Qwen3-0.6B (default: the bundled demo)")
    model.add_argument("--verify", action="store_true", help="compare the file's checksums before it is used")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    model.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: what the device computes best")
    model.add_argument("--quantize_activations", action=argparse.BooleanOptionalAction, default=True,
                       help="beside int8 and int4 weights, where the CPU multiplies integers faster")
    model.add_argument("--max_seq_length", type=int, default=0, metavar="N",
                       help=f"capacity of the KV cache in tokens (default: {capacity})")
    model.add_argument("--kv_cache", choices=["int8"], help="half the size: worth it for texts of thousands of tokens, "
                       "and where memory is short (default: the model's dtype)")
    return model


def add_speed_options(parser: argparse.ArgumentParser) -> Any:
    """For load_engine; returns their group."""
    speed = parser.add_argument_group("speed")
    speed.add_argument("--compile", action="store_true", help="compile decoding")
    speed.add_argument("--compile_prefill", action="store_true", help="compile the prompt's pass too")
    speed.add_argument("--kernels", choices=kernels.GPU_KERNELS, default="auto",
                       help="on a GPU: PyTorch's (plain), triton's, or whichever is measured to be faster (default)")
    speed.add_argument("--draft_checkpoint_path", type=Path, metavar="PATH",
                       help="a smaller model of the same tokenizer, for speculative decoding")
    speed.add_argument("--draft", choices=["ngram", "mtp"],
                       help="speculative decoding without a draft model: by prompt lookup, or by the checkpoint's own "
                       "head for multi-token prediction (Qwen3-Next, Qwen3.5)")
    speed.add_argument("--speculate_k", metavar="K",
                       help="tokens to draft at a time, or auto: as many, or none, as is fastest (default: auto)")
    return speed


def main(argv: list[str] | None = None) -> None:
    with tp.joined() as ranks:
        command(parse_args(argv), ranks)


def list_models() -> None:
    print(f"{'model':<22} {'family':<16} {'parameters':>11} {'bf16':>9} {'context':>8}")
    for name in PUBLISHED:
        args = ModelArgs.from_name(name)
        with torch.device("meta"):
            size = sum(p.numel() for p in Transformer(args).parameters())
        print(f"{name:<22} {args.model_type:<16} {size / 1e9:>9.2f} B {2 * size / 1e9:>6.1f} GB {args.max_position:>8}")


def check_args(args: argparse.Namespace, ranks: tp.Ranks | None) -> Sampling:
    """What can be checked without the model. Errors: UserError."""
    for field in ("num_samples", "batch_size", "max_new_tokens"):
        if getattr(args, field) < 1:
            raise UserError(f"{getattr(args, field)} must be 1 or more", field)
    if args.batch_size > MAX_BATCH:
        raise UserError(f"{args.batch_size} must be at most {MAX_BATCH}", "batch_size")
    if args.seed is not None and not 0 <= args.seed < 1 << 63:
        raise UserError(f"{args.seed} must be from 0 to 2^63 - 1", "seed")
    for field in ("system", "no_thinking"):
        if getattr(args, field) and not (args.chat or args.interactive and args.chat is None):
            raise UserError("needs --chat", field)
    check_engine_args(args)
    if args.profile and args.interactive:
        raise UserError("is of samples, and --interactive takes none", "profile")
    if args.profile and (not ranks or ranks.first):
        cli.check_writable(args.profile, "profile")
    return sampling_of(args)


def check_engine_args(args: argparse.Namespace) -> None:
    """The same of what load_engine takes."""
    if args.max_seq_length < 0:
        raise UserError(f"{args.max_seq_length} must be 0 or more", "max_seq_length")
    if args.speculate_k is not None and not (args.draft_checkpoint_path or args.draft):
        raise UserError(f"{args.speculate_k} needs --draft_checkpoint_path or --draft", "speculate_k")
    if args.draft_checkpoint_path and args.draft:
        raise UserError("and --draft are two ways to draft: give one", "draft_checkpoint_path")
    parse_speculate_k(args.speculate_k)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """What add_sampling_options' flags say. Errors: UserError."""
    sampling = Sampling(args.temperature, args.top_k or None, args.top_p)
    sampling.check()
    return sampling


@cli.without_gc()
def load_engine(args: argparse.Namespace, ranks: tp.Ranks | None, log: TextIO | None = None) -> Engine:
    """The model and what drafts for it, as the flags of add_model_options and add_speed_options say. Errors:
    UserError."""
    kernels.chosen["gpu"] = args.kernels
    device, start = parse_device(args.device), time.perf_counter()
    device = ranks.take_device(device) if ranks else device
    model, tokenizer = load_model(args.checkpoint_path, device, parse_dtype(args.dtype, device), ranks,
                                  quantize_activations=args.quantize_activations, verify=args.verify,
                                  mtp=args.draft == "mtp", int8_kv_cache=args.kv_cache == "int8")
    print(f"Time to load model: {time.perf_counter() - start:.02f} seconds ({args.checkpoint_path}, "
          f"{str(model.dtype)[6:]}, {device}, {kernels.describe(device)})", file=log)
    context = model.args.max_position
    if args.max_seq_length > context:
        raise UserError(f"{args.max_seq_length} exceeds the model's context of {context} positions", "max_seq_length")
    draft, speculate_k = load_draft(args, model, ranks), parse_speculate_k(args.speculate_k)
    return Engine(model, tokenizer, args.compile, args.compile_prefill, draft, speculate_k)


def command(args: argparse.Namespace, ranks: tp.Ranks | None) -> None:
    if args.list_models:
        return list_models()
    sampling, log = check_args(args, ranks), open(os.devnull, "w") if args.quiet else sys.stdout
    text = "" if args.interactive else read_text(args, ranks)
    engine = load_engine(args, ranks, log)
    tokenizer, context = engine.tokenizer, engine.context
    if args.chat is None:
        args.chat = args.interactive and tokenizer.has_template
    if engine.speculator:
        engine.speculator.measures = True            # for the summary, whether or not k is to be chosen
    capacity = min(context, args.max_seq_length or 4096) if args.interactive else args.max_seq_length
    request = dict(max_new_tokens=args.max_new_tokens, sampling=sampling, max_seq_length=capacity, seed=args.seed,
                   stop_ids=frozenset() if args.ignore_eos else None)
    prompts = [tokenizer.encode("def")]              # to warm up with
    if not args.interactive:
        prompts = [encode_prompt(args, text, tokenizer, engine.vocab_size, context, log)] * args.batch_size
        length = len(prompts[0])
        engine.check_request(prompts, args.max_new_tokens)
        if args.max_seq_length and length + args.max_new_tokens > args.max_seq_length:
            raise UserError(f"{args.max_seq_length} is less than the prompt's {length} tokens and max_new_tokens "
                            f"{args.max_new_tokens}", "max_seq_length")
    engine.reserve(len(prompts), capacity or len(prompts[0]) + args.max_new_tokens)
    if ranks:                                        # what can fail on one rank alone is behind us
        prompts = ranks.from_first(prompts)
        args.profile = args.profile if ranks.first else None
    if args.compile or args.compile_prefill or engine.speculator:
        seconds = warm_up(engine, prompts, request)
        what = "Compilation" if args.compile or args.compile_prefill else "Warm-up"
        print(f"{what} time: {seconds:.2f} seconds", file=log)
    if args.interactive:
        return chat(engine.generate, tokenizer, ranks, request, args.chat, args.system, not args.no_thinking,
                    args.quiet)
    run_samples(args, engine, prompts, request, log)


def read_text(args: argparse.Namespace, ranks: tp.Ranks | None) -> str:
    """The prompt, from where the flags say. Errors: UserError."""
    text = args.prompt
    if args.prompt_file:
        text = cli.read_text(args.prompt_file, "prompt_file")
    elif text == "-":
        text = cli.read_stdin() if not ranks or ranks.first else ""
        text = ranks.from_first(text) if ranks else text
    if not text:
        raise UserError("is empty", "prompt")
    return text


def encode_prompt(args: argparse.Namespace, text: str, tokenizer: Tokenizer, vocab_size: int, context: int,
                  log: TextIO) -> list[int]:
    if is_synthetic(args):
        length = int(args.prompt[:20])
        if not 0 < length <= min(context, MAX_SYNTHETIC):
            raise UserError(f"{args.prompt[:20]} asks for a synthetic prompt of so many tokens, and there may be "
                            f"{min(context, MAX_SYNTHETIC)} (--prompt_file reads any text)", "prompt")
        print(f"Synthetic prompt of {length} tokens", file=log)
        return torch.randint(min(vocab_size, 1024), (length,), generator=torch.Generator().manual_seed(0)).tolist()
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        return tokenizer.render_chat([*system, {"role": "user", "content": text}], enable_thinking=not args.no_thinking)
    return tokenizer.encode(text)


def is_synthetic(args: argparse.Namespace) -> bool:
    return args.prompt.isascii() and args.prompt.isdigit() and not args.prompt_file


def load_draft(args: argparse.Namespace, model: Transformer, ranks: tp.Ranks | None) -> Engine | str | None:
    if not args.draft_checkpoint_path:
        return args.draft
    with cli.fields(checkpoint_path="draft_checkpoint_path"):
        draft, tokenizer = load_model(args.draft_checkpoint_path, model.device, model.dtype, ranks, may_replicate=True,
                                      quantize_activations=args.quantize_activations, verify=args.verify,
                                      int8_kv_cache=args.kv_cache == "int8")
    return Engine(draft, tokenizer, compile_prefill=args.compile_prefill)


def parse_speculate_k(text: str | None) -> int | None:
    """None for auto."""
    if text is None or text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{text[:20]!r} is neither a number nor auto", "speculate_k") from None


def run_samples(args: argparse.Namespace, engine: Engine, prompts: list[list[int]], request: dict[str, Any],
                log: TextIO) -> None:
    speculator, plain_rate = engine.speculator, 0.0
    if speculator:
        speculator.enabled = False
        plain = {**request, "max_new_tokens": min(64, args.max_new_tokens), "stop_ids": frozenset()}
        plain_rate = stream(engine, prompts, **plain)[1].decode_rate
        speculator.enabled, speculator.statistics = True, Statistics()
    shown = "" if args.chat or is_synthetic(args) else engine.tokenizer.decode(prompts[0], skip_special=True)
    weights, rates, decode_rates = bytes_read_per_token(engine.model), [], []
    for number in range(1, args.num_samples + 1):
        request["seed"] = None if args.seed is None else args.seed + number - 1
        passes_before = speculator.statistics.passes if speculator else 0
        profiler = torch.profiler.profile() if args.profile and number == args.num_samples else None
        printer = RowPrinter([shown] * len(prompts))
        with profiler or contextlib.nullcontext():
            timing = stream(engine, prompts, show=printer, progress=show_prefill, **request)[1]
        printer.close()
        if profiler:
            write_profile(profiler, args.profile)
        passes = timing.steps
        if speculator:
            passes = 1 + (speculator.statistics.passes - passes_before)                   # 1 for the prefill
        rates.append(timing.tokens / timing.total)
        decode_rates.append(timing.decode_rate)
        print(f"Time for inference {number}: {timing.total:.02f} sec total, {rates[-1]:.02f} tokens/sec\n"
              f"Time to first token: {1000 * timing.first:.1f} ms, decode: {timing.decode_rate:.02f} tokens/sec\n"
              f"Bandwidth achieved: {weights * passes / timing.total / 1e9:.02f} GB/s", file=log)
    print(f"==========\nAverage tokens/sec: {sum(rates) / len(rates):.2f}", file=log)
    if speculator:
        print(summary(speculator, plain_rate, sum(decode_rates) / len(decode_rates)), file=log)
    print(f"Memory used: {memory_used(engine.model.device):.02f} GB", file=log)


def write_profile(profiler: torch.profiler.profile, path: Path) -> None:
    """A Chrome trace, compressed if the name ends in .gz. Errors: UserError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))              # which does not say if it fails
        try:
            trace = json.loads(file.read_bytes()) | {"traceName": path.name}
        except (OSError, ValueError):
            raise UserError(f"{path}: the trace cannot be written: is {folder} full?", "profile") from None
    content = json.dumps(trace).encode()
    with cli.atomic_write(path, "profile") as partial:
        partial.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


if __name__ == "__main__":
    cli.run(main)
