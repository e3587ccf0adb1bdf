"""The model as EleutherAI's harness (lm-eval) wants it, and the harness run on it. eval.py is the command."""
import itertools
import json
import re
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
from torch import Tensor
from tqdm import tqdm

import kernels
from cli import UserError, atomic_write
from generate import Engine, cache_bytes
from loading import free_memory
from model import Transformer
from sampling import Sampling
from tasks import load_tasks
from tokenizer import StreamDecoder, Tokenizer

LOGITS_BYTES = 1 << 29            # of fp32 logits at a time, about


# ---- continuations after contexts

@dataclass
class Row:
    """Tokens to read at positions start, start + 1, ...; for (offset, request, token) of wanted, `token` is scored after tokens[offset]."""
    tokens: list[int]
    wanted: list[tuple[int, int, int]]
    start: int = 0


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
        if continuation:                                 # an empty one is certain
            members.setdefault(number if too_long else tuple(context), []).append(number)
    groups = []
    for numbers in members.values():
        context, continuation = requests[numbers[0]]
        if len(numbers) == 1:
            tokens = (context + continuation)[-(max_length + 1):-1]
            first, rest = len(tokens) - len(continuation), []
            row = Row(tokens, [(first + i, numbers[0], token) for i, token in enumerate(continuation)])
        else:
            row = Row(context, [(len(context) - 1, n, requests[n][1][0]) for n in numbers])
            rest = [Row(ids[:-1], [(i, n, token) for i, token in enumerate(ids[1:])], len(context))
                    for n in numbers if len(ids := requests[n][1]) > 1]
        groups.append(Group(row, rest, len(numbers)))
    return sorted(groups, key=lambda group: -group.length), cut


def memory_for_caches(model: Transformer) -> int:
    """Bytes, the same number on all ranks: by it they cut the same batches."""
    free = free_memory(model.device) // 2
    return min(model.ranks.gather(free)) if model.ranks else free


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
        """For each (context, continuation): the continuation's log-probability, and whether it is the greedy choice. No context may be empty."""
        groups, cut = group_requests(requests, self.max_length)
        self.cut += cut
        self.sums, self.greedy = [0.0] * len(requests), [True] * len(requests)
        self.model.setup_caches(1, 1)
        try:
            for batch in self.batches(groups):
                self.score_batch(batch)
                progress(sum(group.requests for group in batch))
        finally:
            self.model.max_batch_size = self.model.max_seq_length = 0         # whoever comes next makes new ones
        return list(zip(self.sums, self.greedy))

    def batches(self, groups: list[Group]) -> Iterator[list[Group]]:
        """As many groups as fit, at least one. Dynamic NTK goes by the length: there no row may decide for others."""
        tokens, free, args = 2048 if self.model.device.type == "cpu" else 32768, memory_for_caches(self.model), self.model.args
        batch: list[Group] = []
        for group in groups:
            longest = (*batch, group)[0].length
            fit = min(64, tokens // longest, free // (2 * cache_bytes(args, 1, longest, self.model.dtype)))
            if batch and sum(g.requests for g in (*batch, group)) > (self.batch_size or (1 if args.dynamic_ntk else fit)):
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def score_batch(self, batch: list[Group]) -> None:
        self.model.set_prompt_length(max(group.length for group in batch))
        contexts = [group.context for group in batch]
        size, length = self.shape(contexts)
        caches = [tuple(cache.new_zeros(size, cache.size(1), length, cache.size(3)) for cache in layer.attention.kv_cache.buffers())
                  for layer in self.model.layers]
        self.run_rows(contexts, caches)
        rest = [(row, number) for number, group in enumerate(batch) for row in group.continuations]
        rest.sort(key=lambda pair: -len(pair[0].tokens))
        step = self.batch_size or 64
        for begin in range(0, len(rest), step):
            rows, sources = zip(*rest[begin:begin + step])
            size, more = self.shape(rows)
            source = torch.tensor([*sources, *[0] * (size - len(rows))], device=self.model.device)
            self.run_rows(rows, [tuple(torch.nn.functional.pad(cache[source], (0, 0, 0, more)) for cache in pair) for pair in caches])

    def shape(self, rows: Sequence[Row]) -> tuple[int, int]:
        """(B, S) that hold the rows. Compiled code sees no size of 1, and no batch that the kernels would treat as decoding."""
        size, length = len(rows), max(len(row.tokens) for row in rows)
        return (max(size, 2), max(-(-length // 8) * 8, 16)) if self.compile else (size, length)

    def any_size(self, tensor: Tensor, *dims: int) -> None:
        """Tells the compiler at once which sizes vary, lest it learn it from one recompilation after another."""
        if self.compile:
            torch._dynamo.maybe_mark_dynamic(tensor, dims)

    def run_rows(self, rows: Sequence[Row], caches: list[tuple[Tensor, Tensor]]) -> None:
        """Reads the rows over the caches (k and v of each layer, [B, K, T, D]) and adds what they want to know to sums and greedy."""
        for layer, (k_cache, v_cache) in zip(self.model.layers, caches):
            layer.attention.kv_cache.k_cache, layer.attention.kv_cache.v_cache = k_cache, v_cache
            self.any_size(k_cache, 0, 2), self.any_size(v_cache, 0, 2)
        self.model.stack = kernels.stack(self.model.layers)
        size, length = self.shape(rows)
        idx, start = torch.zeros(size, length, dtype=torch.int64), torch.zeros(size, 1, dtype=torch.int64)
        for i, row in enumerate(rows):
            idx[i, :len(row.tokens)], start[i] = torch.tensor(row.tokens), row.start
        positions = start + torch.arange(length)
        most, fit = max(len(row.wanted) for row in rows), LOGITS_BYTES // (4 * size * self.model.args.vocab_size)
        chunk = length if most <= fit else max(fit // 16, 1) * 16
        for begin in range(0, length, chunk):
            self.run_chunk(rows, idx[:, begin:begin + chunk].to(self.model.device), positions[:, begin:begin + chunk].to(self.model.device), begin)

    def run_chunk(self, rows: Sequence[Row], idx: Tensor, input_pos: Tensor, begin: int) -> None:
        (B, S), V = idx.shape, self.model.args.vocab_size
        wanted = [[(offset - begin, *what) for offset, *what in row.wanted if begin <= offset < begin + S] for row in rows]
        offsets = [sorted({offset for offset, _, _ in of_row}) for of_row in wanted]
        P = max(max(2, -(-17 // B)) if self.compile else 1, *map(len, offsets))           # the same holds for the head: see shape
        at = torch.tensor([[*of_row, *[0] * (P - len(of_row))] for of_row in offsets] + [[0] * P] * (B - len(rows)), device=idx.device)
        for tensor in (idx, input_pos, at):
            self.any_size(tensor, 0, 1)
        logits = self.forward(idx, input_pos, at).float().view(-1, V)                     # [B P, V]
        which = [(i * P + offsets[i].index(offset), request, token) for i, of_row in enumerate(wanted) for offset, request, token in of_row]
        if not which:
            return
        flat, requests, tokens = zip(*which)
        flat, tokens = torch.tensor(flat, device=idx.device), torch.tensor(tokens, device=idx.device)
        logprobs = (logits[flat, tokens] - logits.logsumexp(-1)[flat]).tolist()
        greedy = (logits.argmax(-1)[flat] == tokens).tolist()
        for request, logprob, hit in zip(requests, logprobs, greedy):
            self.sums[request] += logprob
            self.greedy[request] &= hit


# ---- generation until a stop string

def generate_texts(generator: Engine, tokenizer: Tokenizer, prompts: list[list[int]], until: Sequence[str], max_new_tokens: int,
                   sampling: Sampling, seed: int | None = None, max_seq_length: int = 0) -> list[str]:
    """The text that follows each prompt, up to a stop string or a stop id or max_new_tokens; the stop string may still be at its end."""
    decoders = [StreamDecoder(tokenizer, skip_special=True) for _ in prompts]
    texts, ended = ["" for _ in prompts], [False for _ in prompts]
    longest = max(map(len, until), default=0)
    for ids in generator.generate(prompts, max_new_tokens, sampling, seed=seed, max_seq_length=max_seq_length):
        for i, id in enumerate(ids):
            ended[i] = ended[i] or id is None
            if not ended[i]:
                piece = decoders[i].push(id)
                texts[i] += piece
                ended[i] = any(stop in texts[i][-(longest + len(piece)):] for stop in until if stop)
        if all(ended):
            break
    return [text + decoder.flush() for text, decoder in zip(texts, decoders)]


def sampling_from(options: dict[str, Any]) -> Sampling:
    """From a task's normalized generation_kwargs, less until and max_gen_toks."""
    defaults = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}
    for name, value in options.items():
        if name not in ("do_sample", "temperature", "top_k", "top_p") and value != defaults.get(name):
            raise UserError(f"the task's generation_kwargs ask for {name} = {value}, which is not supported")
    if not options.get("do_sample"):
        return Sampling(temperature=0)
    return Sampling(float(options.get("temperature", 1.0)), options.get("top_k") or None, options.get("top_p"))


@dataclass(frozen=True)
class Job:
    """Prompts that the same generation_kwargs hold for, the longest first. numbers: which of the requests they are."""
    numbers: list[int]
    prompts: list[list[int]]
    until: list[str]
    max_new_tokens: int
    sampling: Sampling


# ---- the adapter

class QwenFast(TemplateLM):
    """max_length: of context and continuation, in tokens (default: the model's). batch_size: None for what suits the device. seed: of sampling."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int | None = None, max_length: int | None = None, compile: bool = False,
                 seed: int | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.compile, self.seed = model, tokenizer, batch_size, compile, seed
        self._device, self.capacity = model.device, 0
        self.scorer = Scorer(model, batch_size, max_length, compile)
        self.generator = Engine(model, tokenizer, compile, compile)
        # A rendered chat goes to lm-eval as a string, and comes back with more text around it: a word that no text holds stands for each control
        # token that the template wrote.
        self.nonce = secrets.token_hex(8)

    eot_token_id = property(lambda self: self.tokenizer.eos_id)
    prefix_token_id = property(lambda self: self.tokenizer.prefix_id)
    max_length = property(lambda self: self.scorer.max_length)
    tokenizer_name = property(lambda self: str(self.tokenizer.folder).replace("/", "__"))

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokenizer.template() if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        ids = self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        control = set(self.tokenizer.control.values())
        text = ""
        for id, same in itertools.groupby(ids, lambda id: id if id in control else None):
            text += self.tokenizer.decode(same) if id is None else f"<{self.nonce}.{id}>" * len(list(same))
        if not add_generation_prompt:            # the answer has begun: what the template wrote after it goes
            begun = chat_history[-1]["content"].strip()
            text = text[:text.rindex(begun) + len(begun)]
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        pieces = re.split(f"<{self.nonce}\\.([0-9]+)>", string)
        parts = [int(piece) if i % 2 else piece for i, piece in enumerate(pieces) if i % 2 or piece]
        return self.tokenizer.encode_segments(parts or [""], add_special_tokens)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            return self.scorer.score(pairs, bar.update)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        pairs, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tokenizer.encode(text, bos=False)                  # the prefix is BOS already, where there is one
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                pairs.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(pairs, disable_tqdm)):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        jobs = [self.job(requests, numbers) for numbers in alike.values()]
        longest = max((len(job.prompts[0]) + job.max_new_tokens for job in jobs), default=1)
        self.capacity = max(self.capacity, min(1 << (longest - 1).bit_length(), self.max_length))
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for number, text in itertools.chain.from_iterable(map(self.run_job, jobs)):
                texts[number] = text
                bar.update()
        return texts

    def job(self, requests, numbers: list[int]) -> Job:
        """Errors: UserError for options that are not supported."""
        options = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], 256))
        eos = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        until, new = handle_stop_sequences(options.pop("until", None), eos), options.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise UserError(f"a task asks for {new} new tokens, and the context has {self.max_length} positions (--max_seq_length)")
        ids = {n: self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in numbers}
        self.scorer.cut += sum(len(prompt) > room for prompt in ids.values())
        numbers = sorted(numbers, key=lambda n: -len(ids[n]))
        return Job(numbers, [ids[n][-room:] for n in numbers], until, new, sampling_from(options))

    def run_job(self, job: Job) -> Iterator[tuple[int, str]]:
        """(number of the request, text). Compiled, all jobs share one size of cache and batch: others compile anew."""
        length = self.capacity if self.compile else len(job.prompts[0]) + job.max_new_tokens
        fit = memory_for_caches(self.model) // cache_bytes(self.model.args, 1, length, self.model.dtype)
        rows = self.batch_size or max(1, min(16 if self.model.device.type == "cpu" else 64, fit))
        for begin in range(0, len(job.prompts), rows):
            prompts, seed = job.prompts[begin:begin + rows], None if self.seed is None else self.seed + begin
            prompts += [prompts[-1]] * (rows - len(prompts)) * self.compile
            texts = generate_texts(self.generator, self.tokenizer, prompts, job.until, job.max_new_tokens, job.sampling, seed, length)
            yield from ((n, postprocess_generated_text(text, job.until, None)) for n, text in zip(job.numbers[begin:begin + rows], texts))


# ---- the harness

def evaluate(lm: QwenFast, tasks: Sequence[str], include_path: Path | None = None, num_fewshot: int | None = None, limit: float | None = None,
             apply_chat_template: bool = False, fewshot_as_multiturn: bool = True, **config: Any) -> dict[str, Any] | None:
    """lm-eval's results, to which config is added; None on ranks other than the first of a machine. lm.seed stands for all of lm-eval's seeds."""
    seeds = {} if lm.seed is None else {f"{name}_seed": lm.seed for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
    manager, loaded = load_tasks(tasks, include_path)
    if lm.model.ranks:
        lm.model.ranks.gather(None)                      # all have the tasks, or all end
    results = lm_eval.simple_evaluate(lm, tasks=loaded, task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False,
                                      apply_chat_template=apply_chat_template, fewshot_as_multiturn=fewshot_as_multiturn, **seeds)
    if lm.scorer.cut:
        print(f"{lm.scorer.cut} requests were longer than {lm.max_length} tokens and were cut on the left", file=sys.stderr)
    if results:
        results["config"].update(config, batch_size=lm.batch_size or "auto", device=str(lm.model.device), model_dtype=str(lm.model.dtype))
    return results


def write_results(results: dict[str, Any], file: Path | None) -> None:
    """Prints lm-eval's tables and writes its JSON."""
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if file:
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(results, indent=2, default=handle_non_serializable), "utf-8")
        print(f"results: {file}")
