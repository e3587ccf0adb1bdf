"""Prefill and decoding: one token after another from a model with a KV cache."""
import itertools
import random
from typing import Iterator, Sequence

import torch
from torch import Tensor

import kernels
from cli import UserError
from loading import check_memory
from model import ModelArgs, Transformer
from sampling import Sampling, exponential, sample
from tokenizer import Tokenizer

PREFILL_CHUNK = 1024


class Generator:
    """A model with its compiled functions and the state of the KV cache."""
    warm_up_tokens = 3               # whatever a request runs has run by then

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None, compile: bool = False, compile_prefill: bool = False):
        self.model, self.tokenizer = model, tokenizer
        self.vocab = min(tokenizer.vocab_size, model.args.vocab_size) if tokenizer else model.args.vocab_size
        self.stop_ids = tokenizer.stop_ids if tokenizer else frozenset()
        self.decode, self.prefill = self.decode_step, model.forward
        self.cached: list[int] = []                                # the tokens that row 0 of the cache holds, when the batch is 1,
        self.kept = 0                                              # and how many of them the present request found there
        self.compiled = compile
        if compile:
            self.decode = torch.compile(self.decode_step, fullgraph=True, **compile_settings(model, compile_prefill))
        if compile_prefill:
            self.prefill = torch.compile(model.forward, fullgraph=True)

    def run_eagerly(self) -> None:
        """Instead of compiled, where no compiler works."""
        self.decode, self.prefill = self.decode_step, self.model.forward

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
        self.check(rows, max_new_tokens)
        lengths = [len(row) for row in rows]
        stops = self.stop_ids if stop_ids is None else stop_ids
        self.reserve(len(rows), max(max(lengths) + max_new_tokens, max_seq_length))
        source = torch.Generator(self.model.device).manual_seed(self.fresh_seed() if seed is None else seed)
        logits = self.prefill_rows(rows, keep_cache)
        idx = sample(logits[:, -1, :self.vocab], sampling, exponential(len(rows), sampling.candidates(self.vocab), source))
        input_pos = torch.tensor(lengths, device=self.model.device)[:, None]
        ended = [False] * len(rows)
        for ids in self.steps(idx, input_pos, max_new_tokens, sampling, source):
            ended = [end or i in stops for end, i in zip(ended, ids)]
            if all(ended):
                return
            yield [None if end else i for end, i in zip(ended, ids)]

    def check(self, rows: list[list[int]], max_new_tokens: int) -> None:
        check_request(self.model.args, rows, max_new_tokens)

    def reserve(self, batch: int, max_seq_length: int) -> None:
        """Makes room in the KV cache; what it held is lost if it has to grow."""
        if reserve_cache(self.model, batch, max_seq_length):
            self.cached = []

    def steps(self, idx: Tensor, input_pos: Tensor, count: int, sampling: Sampling, source: torch.Generator) -> Iterator[list[int]]:
        """The ids of all rows, `count` times: first idx [B, 1], which belongs at input_pos [B, 1]."""
        on_gpu = self.model.device.type == "cuda"
        for left in range(count - 1, -1, -1):
            # A GPU computes the next token while this one is read; a CPU would only be late with this one.
            following = self.advance(idx, input_pos, sampling, source) if on_gpu and left else None
            ids = idx[:, 0].tolist()
            yield ids
            if left:
                self.cached.append(ids[0])
                idx = following if following is not None else self.advance(idx, input_pos, sampling, source)

    def fresh_seed(self) -> int:
        """The same on all ranks: so they draw the same tokens."""
        seed = random.getrandbits(63)
        return self.model.ranks.from_first(seed) if self.model.ranks else seed

    def advance(self, idx: Tensor, input_pos: Tensor, sampling: Sampling, source: torch.Generator) -> Tensor:
        begin_step(self.model.device)
        noise = exponential(len(idx), sampling.candidates(self.vocab), source)
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
        self.cached, self.kept = list(rows[0]), start
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


def begin_step(device: torch.device) -> None:
    """Tells CUDA graphs that what they returned before is no longer needed."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


def compile_settings(model: Transformer, prefill_too: bool) -> dict:
    """What torch.compile is told for decoding: static shapes; on CUDA, CUDA graphs."""
    settings: dict = {"dynamic": False}
    if model.device.type == "cuda":
        settings["mode"] = "reduce-overhead"
    elif kernels.ready() and not model.ranks and not prefill_too:
        without_vector_code()
    return settings


def without_vector_code() -> None:
    """Where all layers are one operator little is left for the compiler's own vector code, and it would try for ten seconds which instructions
    work here. For the whole process, and only before it has tried: what is compiled later must agree with what it knows then."""
    from torch._inductor import config, cpu_vec_isa
    if cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0:
        config.cpp.vec_isa_ok = False


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


def reserve_cache(model: Transformer, batch: int, max_seq_length: int) -> bool:
    """Whether new caches were needed."""
    grows = batch != model.max_batch_size or max_seq_length > model.max_seq_length
    if grows:
        needed = cache_bytes(model.local, batch, max_seq_length, model.dtype)
        check_memory(model.device, needed, f"keys and values of {batch} x {max_seq_length} positions (--batch_size, --max_seq_length)")
    model.setup_caches(batch, max_seq_length)
    return grows
