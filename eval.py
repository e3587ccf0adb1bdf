"""Evaluates checkpoints: on tasks of EleutherAI's harness (lm-eval), by the perplexity of a text, and against each other.

    python eval.py --checkpoint_path checkpoints/demo/model.pth --compile --tasks hellaswag winogrande
    python eval.py --checkpoint_path checkpoints/demo/model.pth --perplexity tests/data/heldout.txt
    python eval.py --perplexity tests/data/heldout.txt --compare model.pth model_int8.pth model_int4.pth
"""
import argparse
import itertools
import json
import math
import re
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

import kernels
from cli import UserError, load_tasks, run, written_whole
from convert import read_json
from decoding import Generator, cache_bytes
from generate import DEMO
from loading import free_memory, load_model, parse_device
from model import Transformer
from tokenizer import StreamDecoder, Tokenizer, same_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

LOGITS_BYTES = 1 << 29            # of fp32 logits at a time, about
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}


def eos_id(tokenizer: Tokenizer) -> int | None:
    """The id of the tokenizer's own end-of-text token."""
    name = tokenizer._config.get("eos_token")
    return tokenizer.control.get(name["content"] if isinstance(name, dict) else name, tokenizer._backend.eos_id)


def prefix_id(tokenizer: Tokenizer) -> int:
    """The token that stands before a text which nothing precedes: BOS, or the end of the text before, as lm-eval has it."""
    id = tokenizer.bos_id if tokenizer.bos_id is not None else eos_id(tokenizer)
    if id is None:
        raise UserError(f"{tokenizer.folder}: the tokenizer names neither a BOS nor an EOS token to put before a text")
    return id


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
def token_logits(model: Transformer, ids: Sequence[int], last: int, chunk: int | None = None,
                 forward: Callable[..., Tensor] | None = None) -> Iterator[Tensor]:
    """The logits that follow each of the `last` last tokens of `ids`, fp32 [n, V] at a time, chunk after chunk through the KV cache.

    chunk: tokens per pass. At most 16 goes through the kernels that decoding uses on a CPU, which may round activations of quantized linears.
    """
    chunk = chunk or max(16, min(1024, LOGITS_BYTES // (4 * model.args.vocab_size)))
    device, first = model.device, len(ids) - last
    model.setup_caches(1, max(len(ids), model.max_seq_length))
    model.set_prompt_length(len(ids))
    tokens = torch.tensor([ids], device=device)
    for begin in range(0, len(ids), chunk):
        end = min(begin + chunk, len(ids))
        at = torch.arange(min(max(first - begin, 0), end - begin), end - begin, device=device)
        logits = (forward or model)(tokens[:, begin:end], torch.arange(begin, end, device=device), at if len(at) else at.new_zeros(1))
        if len(at):
            yield logits[0].float()


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
    for tokens, targets in windows(ids, prefix_id(tokenizer), window, stride):
        at = 0
        for logits in token_logits(model, tokens, len(targets), chunk, forward):
            target = torch.tensor(targets[at:at + len(logits)], device=logits.device)
            at += len(logits)
            nll += torch.nn.functional.cross_entropy(logits, target, reduction="none").double().sum().item()
    return TextScore(nll, len(ids), len(text.encode()))


@dataclass(frozen=True)
class Comparison:
    """One checkpoint beside the first of its table."""
    path: Path
    score: TextScore
    kl: float                     # nats per token, of the first's distribution from this one's
    agreement: float              # share of tokens at which both have the same most probable token

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return (self.path / "model.pth" if self.path.is_dir() else self.path).stat().st_size


@torch.inference_mode()
def compare(paths: Sequence[Path], text: str, window: int | None = None, stride: int | None = None,
            device: torch.device | str = "cpu", dtype: torch.dtype | None = None, chunk: int | None = None) -> Iterator[Comparison]:
    """Compares checkpoints with the first of them at every token of the text, in fp32 from the logits on. Two are in memory at a time."""
    first, first_tokenizer = load_model(paths[0], device, dtype)
    window = check_window(window, first)
    stride = stride or max(window // 2, 1)
    ids = text_ids(first_tokenizer, text, window, stride)
    for path in paths:
        other, tokenizer = (first, first_tokenizer) if path is paths[0] else load_model(path, device, dtype)
        check_window(window, other)
        if difference := same_tokenizer(first_tokenizer, tokenizer):
            raise UserError(f"--compare {path}: the tokenizers differ: {difference}")
        vocab = min(first.args.vocab_size, other.args.vocab_size)            # the padding of one may be longer
        nll = kl = same = 0.0
        for tokens, targets in windows(ids, prefix_id(tokenizer), window, stride):
            theirs = token_logits(first, tokens, len(targets), chunk)
            ours = theirs if other is first else token_logits(other, tokens, len(targets), chunk)
            at = 0
            for p in theirs:
                p = p[:, :vocab].log_softmax(-1)
                q = p if other is first else next(ours)[:, :vocab].log_softmax(-1)
                target = torch.tensor(targets[at:at + len(p)], device=p.device)
                at += len(p)
                nll -= q.gather(1, target[:, None]).double().sum().item()
                kl += (p.exp() * (p - q)).sum(-1).double().sum().item()
                same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        yield Comparison(Path(path), TextScore(nll, len(ids), len(text.encode())), kl / len(ids), same / len(ids))


def print_comparisons(rows: Iterable[Comparison]) -> None:
    print(f"{'checkpoint':<40} {'size':>10} {'perplexity':>11} {'bits/byte':>10} {'KL':>9} {'top-1':>8}")
    for row in rows:
        print(f"{str(row.path)[-40:]:<40} {row.size / 1e6:>7.1f} MB {row.score.perplexity:>11.4f} {row.score.bits_per_byte:>10.4f} {row.kl:>9.5f} "
              f"{row.agreement:>8.2%}", flush=True)


# ---- continuations after contexts

@dataclass
class Row:
    """Tokens that the model reads at positions start, start + 1, ...; wanted: after which of them which (request, next token) are scored."""
    tokens: list[int]
    start: int = 0
    wanted: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    cached: int = 0               # the row of the contexts' caches that holds what comes before


@dataclass
class Group:
    """Requests whose context is read once. A lone request's row holds its continuation too; the others' follow in rows of their own."""
    context: Row
    continuations: list[Row]
    requests: int

    @property
    def length(self) -> int:
        return len(self.context.tokens) + max((len(row.tokens) for row in self.continuations), default=0)


def group_requests(requests: Sequence[tuple[list[int], list[int]]], max_length: int) -> tuple[list[Group], int]:
    """Groups (context, continuation) pairs by context, the longest first. Also returns how many pairs were cut on the left to fit max_length."""
    members: dict[Any, list[int]] = {}
    cut = 0
    for number, (context, continuation) in enumerate(requests):
        if len(continuation) > max_length:
            raise UserError(f"a continuation of {len(continuation)} tokens does not fit the context of {max_length} positions (--max_seq_length)")
        too_long = len(context) + len(continuation) > max_length + 1
        cut += too_long
        members.setdefault(number if too_long else tuple(context), []).append(number)
    groups = []
    for numbers in members.values():
        context, continuation = requests[numbers[0]]
        if len(numbers) == 1:
            tokens = (context + continuation)[-(max_length + 1):-1]
            first = len(tokens) - len(continuation)
            row = Row(tokens, wanted={first + i: [(numbers[0], token)] for i, token in enumerate(continuation)})
            groups.append(Group(row, [], 1))
            continue
        row = Row(context, wanted={len(context) - 1: [(n, requests[n][1][0]) for n in numbers]})
        rest = [Row(requests[n][1][:-1], len(context), {i: [(n, token)] for i, token in enumerate(requests[n][1][1:])})
                for n in numbers if len(requests[n][1]) > 1]
        groups.append(Group(row, rest, len(numbers)))
    return sorted(groups, key=lambda group: -group.length), cut


class Scorer:
    """Log-probabilities of continuations, in batches padded on the right.

    batch_size: how many requests at a time, None for what suits the device and its memory. Each batch takes two passes: one over the contexts,
    each once, one over the continuations on copies of the contexts' caches.
    """

    def __init__(self, model: Transformer, batch_size: int | None = None, max_length: int | None = None, compile: bool = False):
        self.model, self.batch_size, self.max_length = model, batch_size, max_length or model.args.max_position
        self.compile = compile
        self.forward = torch.compile(model.forward) if compile else model.forward
        self.cut = 0                                     # requests that lost tokens on the left so far

    @torch.inference_mode()
    def score(self, requests: Sequence[tuple[list[int], list[int]]], progress: Callable[[int], Any] = lambda n: None) -> list[tuple[float, bool]]:
        """For each (context, continuation), both of at least one token: the continuation's log-probability, and whether it is the greedy choice."""
        groups, cut = group_requests(requests, self.max_length)
        self.cut += cut
        self.sums, self.greedy = [0.0] * len(requests), [True] * len(requests)
        try:
            for batch in self.batches(groups):
                self.score_batch(batch)
                progress(sum(group.requests for group in batch))
        finally:
            self.model.max_batch_size = self.model.max_seq_length = 0         # the caches were this function's: whoever comes next makes new ones
        return list(zip(self.sums, self.greedy))

    def batches(self, groups: list[Group]) -> Iterator[list[Group]]:
        """As many groups as fit, at least one."""
        on_cpu = self.model.device.type == "cpu"
        batch: list[Group] = []
        for group in groups:
            requests = sum(g.requests for g in batch) + group.requests
            if self.batch_size is not None or self.model.args.dynamic_ntk:    # dynamic NTK goes by the length: no row may decide for others
                full = requests > (self.batch_size or 1)
            else:
                longest = max(group.length, batch[0].length if batch else 0)
                row_bytes = 2 * cache_bytes(self.model.args, 1, longest, self.model.dtype)
                full = requests > 64 or requests * longest > (2048 if on_cpu else 32768) or requests * row_bytes > free_memory(self.model.device) // 2
            if full and batch:
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def score_batch(self, batch: list[Group]) -> None:
        contexts = [group.context for group in batch]
        self.model.setup_caches(1, 1)
        self.model.set_prompt_length(max(group.length for group in batch))
        length = self.bucket(max(len(row.tokens) for row in contexts))
        rows = max(len(contexts), 2) if self.compile else len(contexts)
        shape = self.model.layers[0].attention.kv_cache.k_cache.shape
        caches = [tuple(c.new_zeros(rows, shape[1], length, shape[3]) for c in layer.attention.kv_cache.buffers()) for layer in self.model.layers]
        self.run_rows(contexts, caches)
        rest = []
        for number, group in enumerate(batch):
            for row in group.continuations:
                row.cached = number
                rest.append(row)
        rest.sort(key=lambda row: -len(row.tokens))
        step = max(self.batch_size or 64, 1)
        for begin in range(0, len(rest), step):
            part = rest[begin:begin + step]
            source = torch.tensor([row.cached for row in part] + [0] * (len(part) == 1 and self.compile), device=self.model.device)
            more = self.bucket(max(len(row.tokens) for row in part))
            copies = [tuple(torch.nn.functional.pad(cache[source], (0, 0, 0, more)) for cache in pair) for pair in caches]
            self.run_rows(part, copies)

    def bucket(self, length: int) -> int:
        """Compiled code sees multiples of 32: no length of one, and none that the kernels treat as decoding."""
        return -(-length // 32) * 32 if self.compile else length

    def any_size(self, tensor: Tensor, *dims: int) -> None:
        """Tells the compiler at once which sizes vary, lest it learn it from one recompilation after another."""
        if self.compile:
            torch._dynamo.maybe_mark_dynamic(tensor, dims)

    def run_rows(self, rows: list[Row], caches: list[tuple[Tensor, Tensor]]) -> None:
        """Reads the rows over the caches (k and v of each layer, [B, K, T, D]) and adds what they want to know to sums and greedy."""
        for layer, (k_cache, v_cache) in zip(self.model.layers, caches):
            layer.attention.kv_cache.k_cache, layer.attention.kv_cache.v_cache = k_cache, v_cache
            self.any_size(k_cache, 0, 2), self.any_size(v_cache, 0, 2)
        device, B = self.model.device, len(caches[0][0])
        length = self.bucket(max(len(row.tokens) for row in rows))
        idx = torch.zeros(B, length, dtype=torch.int64)
        for i, row in enumerate(rows):
            idx[i, :len(row.tokens)] = torch.tensor(row.tokens)
        start = torch.tensor([row.start for row in rows] + [0] * (B - len(rows)))
        positions = start[:, None] + torch.arange(length)
        most, fit = max(len(row.wanted) for row in rows), LOGITS_BYTES // (4 * B * self.model.args.vocab_size)
        chunk = length if most <= fit else max(fit // 32, 1) * 32
        for begin in range(0, length, chunk):
            self.run_chunk(rows, idx[:, begin:begin + chunk].to(device), positions[:, begin:begin + chunk].to(device), begin)

    def run_chunk(self, rows: list[Row], idx: Tensor, input_pos: Tensor, begin: int) -> None:
        B, S = idx.shape
        wanted = [[(offset - begin, row.wanted[offset]) for offset in range(begin, begin + S) if offset in row.wanted] for row in rows]
        P = max(2 if self.compile else 1, *map(len, wanted))
        M = max((len(pairs) for row in wanted for _, pairs in row), default=1)
        at = torch.zeros(B, P, dtype=torch.int64)
        targets = torch.zeros(B, P, M, dtype=torch.int64)
        for i, row in enumerate(wanted):
            for p, (offset, pairs) in enumerate(row):
                at[i, p] = offset
                targets[i, p, :len(pairs)] = torch.tensor([token for _, token in pairs])
        at = at.to(idx.device)
        for tensor in (idx, input_pos, at):
            self.any_size(tensor, 0, 1)
        logits = self.forward(idx, input_pos, at).float()                                 # [B, P, V]
        chosen, targets = logits.argmax(-1, keepdim=True), targets.to(idx.device)
        logprobs = (logits.gather(2, targets) - logits.logsumexp(-1, keepdim=True)).tolist()
        hits = (chosen == targets).tolist()                                               # [B, P, M]
        for i, row in enumerate(wanted):
            for p, (_, pairs) in enumerate(row):
                for m, (request, _) in enumerate(pairs):
                    self.sums[request] += logprobs[i][p][m]
                    self.greedy[request] &= hits[i][p][m]


# ---- generation until a stop string

def generate_texts(generator: Generator, tokenizer: Tokenizer, prompts: list[list[int]], until: Sequence[str], max_new_tokens: int,
                   sampling: Sampling, seed: int | None = None, max_seq_length: int = 0) -> list[str]:
    """The text that follows each prompt, up to a stop string or a stop id or max_new_tokens; the stop string may still be at its end."""
    decoders = [StreamDecoder(tokenizer, skip_special=True) for _ in prompts]
    texts, ended = ["" for _ in prompts], [False for _ in prompts]
    longest = max(map(len, until), default=0)
    for ids in generator.generate(prompts, max_new_tokens, sampling, seed=seed, max_seq_length=max_seq_length):
        for i, id in enumerate(ids):
            if id is None or ended[i]:
                ended[i] = True
                continue
            piece = decoders[i].push(id)
            texts[i] += piece
            tail = texts[i][-(longest + len(piece)):]
            ended[i] = any(stop in tail for stop in until if stop)
        if all(ended):
            break
    return [text + decoder.flush() for text, decoder in zip(texts, decoders)]


def sampling_from(options: dict[str, Any]) -> Sampling:
    """From a task's normalized generation_kwargs, less until and max_gen_toks."""
    harmless = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True, "do_sample": None, "temperature": None,
                "top_k": None, "top_p": None}
    for name, value in options.items():
        if name not in harmless or (harmless[name] is not None and value != harmless[name]):
            raise UserError(f"the task's generation_kwargs ask for {name} = {value}, which is not supported")
    if not options.get("do_sample"):
        return Sampling(temperature=0)
    return Sampling(float(options.get("temperature", 1.0)), options.get("top_k") or None, options.get("top_p"))


# ---- the harness

def harness_model(model: Transformer, tokenizer: Tokenizer, batch_size: int | None = None, max_length: int | None = None, compile: bool = False,
                  seed: int | None = None) -> "TemplateLM":
    """The model as lm-eval wants it. max_length: of context and continuation, in tokens (default: the model's)."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

    class QwenFast(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer, self._device = tokenizer, model.device
            self.scorer = Scorer(model, batch_size, max_length, compile)
            self.generator = Generator(model, tokenizer, compile, compile)
            # A rendered chat goes to lm-eval as a string, and comes back with more text around it: a word that no text holds stands for each control
            # token that the template wrote.
            self.nonce = secrets.token_hex(8)

        @property
        def eot_token_id(self) -> int:
            return eos_id(tokenizer)

        @property
        def prefix_token_id(self) -> int:
            return prefix_id(tokenizer)

        @property
        def max_length(self) -> int:
            return self.scorer.max_length

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.folder).replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str:
            return tokenizer._template() if chat_template else ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            ids = tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
            control = set(tokenizer.control.values())
            text = ""
            for id, run_of_ids in itertools.groupby(ids, lambda id: id if id in control else None):
                text += tokenizer.decode(run_of_ids) if id is None else f"<{self.nonce}.{id}>" * len(list(run_of_ids))
            if not add_generation_prompt:            # the answer has begun: what the template wrote after it goes
                begun = chat_history[-1]["content"].strip()
                text = text[:text.rindex(begun) + len(begun)]
            return text

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
            pieces = re.split(f"<{self.nonce}\\.([0-9]+)>", string)
            parts = [int(piece) if i % 2 else piece for i, piece in enumerate(pieces) if i % 2 or piece]
            if len(parts) < 2 and not (parts and isinstance(parts[0], int)):
                return tokenizer.encode(string, bos=add_special_tokens)
            bos = tokenizer.encode("", bos=add_special_tokens)
            return (bos if parts[0] != tokenizer.bos_id else []) + tokenizer._backend.encode(parts)

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
            with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
                answers = self.scorer.score([(context, continuation) for _, context, continuation in requests], bar.update)
            for (texts, _, _), answer in zip(requests, answers):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
            return answers

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            pairs, owners = [], []
            for number, (text,) in enumerate(request.args for request in requests):
                ids = tokenizer.encode(text, bos=False)                  # the prefix is BOS already, where there is one
                for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                    pairs.append((None, *make_disjoint_window(pair)))
                    owners.append(number)
            totals = [0.0] * len(requests)
            for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(pairs, disable_tqdm)):
                totals[owner] += logprob
            for request, total in zip(requests, totals):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            texts: list[str] = [""] * len(requests)
            eos = tokenizer.decode([self.eot_token_id])
            by_options: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                by_options.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
            with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
                for numbers in by_options.values():
                    options = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], 256))
                    until, new = handle_stop_sequences(options.pop("until", None), eos=eos), options.pop("max_gen_toks")
                    sampling, room = sampling_from(options), self.max_length - new
                    if room < 1:
                        raise UserError(f"a task asks for {new} new tokens, and the context has {self.max_length} positions (--max_seq_length)")
                    prompts = {n: self.tok_encode(requests[n].args[0]) for n in numbers}
                    self.scorer.cut += sum(len(ids) > room for ids in prompts.values())
                    numbers.sort(key=lambda n: -len(prompts[n]))
                    length = min(len(prompts[numbers[0]]), room) + new
                    rows = batch_size or rows_that_fit(model, length)
                    for begin in range(0, len(numbers), rows):
                        batch = numbers[begin:begin + rows]
                        ids = [prompts[n][-room:] or [self.prefix_token_id] for n in batch]
                        ids += [ids[-1]] * (min(rows, len(numbers)) - len(ids))         # one batch size, so that nothing is compiled twice
                        answers = generate_texts(self.generator, tokenizer, ids, until, new, sampling,
                                                 None if seed is None else seed + begin, length)
                        for n, text in zip(batch, answers):
                            texts[n] = postprocess_generated_text(text, until, None)
                            self.cache_hook.add_partial("generate_until", requests[n].args, texts[n])
                        bar.update(len(batch))
            return texts

    return QwenFast()


def rows_that_fit(model: Transformer, length: int) -> int:
    """How many rows of this length to generate at a time."""
    return max(1, min(16 if model.device.type == "cpu" else 64, free_memory(model.device) // 2 // cache_bytes(model.args, 1, length, model.dtype)))


def evaluate(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> dict:
    """lm-eval's results for the command's tasks."""
    import lm_eval

    seeds = {} if args.seed is None else {f"{name}_seed": args.seed for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
    manager, tasks = load_tasks(args.tasks, args.include_path)
    lm = harness_model(model, tokenizer, args.batch_size, args.max_seq_length, args.compile, args.seed)
    results = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, num_fewshot=args.num_fewshot, limit=args.limit,
                                      apply_chat_template=args.apply_chat_template, fewshot_as_multiturn=args.fewshot_as_multiturn,
                                      log_samples=False, **seeds)
    results["config"].update(model_args={"checkpoint_path": str(args.checkpoint_path)}, batch_size=args.batch_size or "auto",
                             device=str(model.device), model_dtype=str(model.dtype))
    if lm.scorer.cut:
        print(f"{lm.scorer.cut} requests were longer than {lm.max_length} tokens and were cut on the left", file=sys.stderr)
    return results


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
    parser.add_argument("--chunk", type=int, help="tokens of the text per pass; up to 16 go through decoding's kernels, activations rounded and all")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="CHECKPOINT", help="compare these on the text of --perplexity")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: what the device computes best")
    args = parser.parse_args(argv)
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size)):
        raise UserError(f"--batch_size {args.batch_size} must be a number from 1 on, or auto")
    args.batch_size = None if args.batch_size == "auto" else int(args.batch_size)
    if args.limit is not None and not args.limit > 0:
        raise UserError(f"--limit {args.limit} must be more than 0")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num_fewshot {args.num_fewshot} must be 0 or more")
    for flag in ("stride", "chunk"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} must be 1 or more")
    if not args.tasks and not args.perplexity:
        raise UserError("--compare needs a text: add --perplexity FILE" if args.compare else "nothing to do: give --tasks, or --perplexity FILE")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, dtype = parse_device(args.device), DTYPES[args.dtype]
    text = read_text(args.perplexity) if args.perplexity else ""
    if args.compare:
        return print_comparisons(compare(args.compare, text, args.max_seq_length, args.stride, device, dtype, args.chunk))
    model, tokenizer = load_model(args.checkpoint_path, device, dtype)
    print(f"{args.checkpoint_path}: {str(model.dtype)[6:]}, {device}, {kernels.describe(device)}")
    window = check_window(args.max_seq_length, model)
    if text:
        start = time.perf_counter()
        forward = torch.compile(model.forward) if args.compile else None
        score = perplexity(model, tokenizer, text, window, args.stride or max(window // 2, 1), args.chunk, forward)
        print(f"perplexity {score.perplexity:.4f}, {score.bits_per_byte:.4f} bits per byte, {score.tokens} tokens, {score.bytes} bytes "
              f"({time.perf_counter() - start:.1f} seconds)")
    if args.tasks:
        results = evaluate(args, model, tokenizer)
        from lm_eval.utils import handle_non_serializable, make_table
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
        if args.output_path:
            file = args.output_path if args.output_path.suffix == ".json" else args.output_path / "results.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as partial:
                partial.write_text(json.dumps(results, indent=2, default=handle_non_serializable), "utf-8")
            print(f"results: {file}")


if __name__ == "__main__":
    run(main)
