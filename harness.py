"""EleutherAI's lm-evaluation-harness (lm-eval) on our models: tasks, adapter, evaluation. eval.py is the command.

lm_eval takes seconds to import, and not everyone who imports this file runs it: the functions that need it import it.
"""
import itertools
import json
import math
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import kernels
from cli import UserError, atomic_write
from config import ModelArgs, ntk_alpha
from generate import Engine, cache_bytes, memory_for_caches
from model import Transformer
from sampling import Sampling
from tokenizer import StreamDecoder, Tokenizer

MAX_LOGITS_BYTES = 1 << 29        # of a pass, fp32 [B, P, V]: with a large vocabulary they outgrow all other memory
MAX_BATCH = 64                    # rows, where the batch size is automatic


# ---- tasks

def load_tasks(names: Sequence[str], include_path: Path | None = None, include_defaults: bool = True,
               field: str = "tasks", advice: str = "") -> tuple[Any, list[Any]]:
    """lm-eval's TaskManager, and the tasks and groups of tasks that names, patterns or .yaml files stand for.

    field: the argument that the names come from.  advice: what else to do where a task's data cannot be had.
    Errors: UserError, for an unknown name, data that cannot be had, or an unsupported kind of task.
    """
    from lm_eval.tasks import TaskManager

    def is_known(name: str) -> bool:
        return bool(manager.match_tasks([name])) or (name.endswith((".yaml", ".yml")) and Path(name).is_file())

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"{include_path}: no such folder", "include_path")
    for path in include_path.rglob("*.y*ml") if include_path else ():            # lm-eval would wait for a pipe's end
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file", "include_path")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    unknown = [name for name in names if not is_known(name)]
    if include_defaults and unknown and all(map(is_mentioned, unknown)):
        manager = TaskManager(include_path=include_path)
    loaded: dict[str, Any] = {}
    for name in names:
        if not is_known(name):
            raise UserError(f"{name}: no such task (`lm-eval ls tasks` lists them; include_path adds others)", field)
        try:
            found: Any = manager.load(manager.match_tasks([name]) or [name])
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{name}: its data cannot be had: {reason}. Without a network, write a task whose dataset "
                            "is a local file and give its folder as include_path (tests/lm_eval_tasks shows how)"
                            + advice, field) from error
        except Exception as error:               # lm-eval checks little of what is in a task's file
            reason = f"{type(error).__name__} {error}"
            raise UserError(f"{name}: lm-eval cannot read this task: {reason:.200}", field) from error
        if any(getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False)
               for task in found["tasks"].values()):
            raise UserError(f"{name}: tasks that run generated code, or show images, are not supported", field)
        children = {child for names_in_group in found["group_map"].values() for child in names_in_group}
        loaded |= {key: item for key, item in (found["groups"] | found["tasks"]).items() if key not in children}
    return manager, list(loaded.values())


def is_mentioned(name: str) -> bool:
    """Whether a file of lm-eval's own tasks holds the name, or the parts of the pattern: otherwise there is no such
    task. To search the files takes half a second, to index them ten."""
    import lm_eval.tasks
    parts = [part.encode() for part in re.split(r"\*|\?|\[.*?\]", name)]
    files = Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")
    return any(all(part in content for part in parts) for content in map(Path.read_bytes, files))


# ---- log-likelihoods of continuations

Pairs = Sequence[tuple[list[int], list[int]]]        # (context, continuation)


class Target(NamedTuple):
    """A token to score for request number `request`, by the logits after column `offset` of its row."""
    offset: int
    request: int
    token: int


class Row(NamedTuple):
    """A row of a batch: tokens at positions start, start + 1, ... and what is scored there.

    length: of a request's whole text, for Qwen v1's dynamic NTK."""
    tokens: list[int]
    targets: list[Target]
    length: int
    start: int = 0


class ContextGroup(NamedTuple):
    """Requests with the same context, and the same keys of it, which is prefilled once. The continuation of a single
    request is in the same row; several have rows of their own, over copies of the context's KV cache."""
    context: Row
    continuations: list[Row]
    num_requests: int

    @property
    def length(self) -> int:
        return len(self.context.tokens) + max((len(row.tokens) for row in self.continuations), default=0)


def group_by_context(requests: Pairs, max_length: int, args: ModelArgs) -> tuple[list[ContextGroup], int]:
    """Groups of requests, the longest first, and how many requests were truncated on the left to max_length."""
    members: dict[Any, list[int]] = {}
    groups, num_truncated = [], 0
    for number, (context, continuation) in enumerate(requests):
        if len(continuation) > max_length:
            raise UserError(f"{max_length} is too short for a continuation of {len(continuation)}", "max_seq_length")
        too_long = len(context) + len(continuation) > max_length + 1       # the last token is predicted, not read
        num_truncated += too_long
        if continuation:                                                   # an empty one has probability 1
            alpha = ntk_alpha(args, len(context) + len(continuation) - 1)
            members.setdefault(number if too_long else (tuple(context), alpha), []).append(number)
    for numbers in members.values():
        context, continuation = requests[numbers[0]]
        if len(numbers) == 1:
            tokens, rest = (context + continuation)[-(max_length + 1):-1], []
            first = len(tokens) - len(continuation)
            targets = [Target(first + i, numbers[0], token) for i, token in enumerate(continuation)]
            length = len(tokens)
        else:
            tokens, targets = context, [Target(len(context) - 1, n, requests[n][1][0]) for n in numbers]
            length = len(context) + len(continuation) - 1                  # of any: all have the same alpha
            rest = [Row(ids[:-1], [Target(i, n, token) for i, token in enumerate(ids[1:])], length, len(context))
                    for n in numbers if len(ids := requests[n][1]) > 1]
        groups.append(ContextGroup(Row(tokens, targets, length), rest, len(numbers)))
    return sorted(groups, key=lambda group: -group.length), num_truncated


class Scorer:
    """Log-probabilities of continuations, in batches padded on the right.

    batch_size: requests per batch; None for what suits the device and its memory.
    """

    def __init__(self, model: Transformer, batch_size: int | None = None, max_length: int | None = None,
                 compile: bool = False):
        self.model, self.batch_size, self.max_length = model, batch_size, max_length or model.args.max_position
        self.compile, self.forward = compile, torch.compile(model.forward) if compile else model.forward
        self.num_truncated = 0                           # requests so far that lost tokens on the left

    @torch.inference_mode()
    def score(self, requests: Pairs, progress: Callable[[int], Any] = lambda n: None) -> list[tuple[float, bool]]:
        """For each request, the continuation's log-probability, and whether it is the greedy choice. No context may be
        empty. progress: told after each batch how many requests it held."""
        groups, num_truncated = group_by_context(requests, self.max_length, self.model.args)
        self.num_truncated += num_truncated
        self.logprobs, self.is_greedy = [0.0] * len(requests), [True] * len(requests)
        self.model.setup_caches(1, 1)
        try:
            for batch in self.batches(groups):
                self.score_batch(batch)
                progress(sum(group.num_requests for group in batch))
        finally:
            self.model.max_batch_size = self.model.max_seq_length = 0      # whoever is next allocates its own caches
        return list(zip(self.logprobs, self.is_greedy, strict=True))

    def batches(self, groups: list[ContextGroup]) -> Iterator[list[ContextGroup]]:
        """As many groups as fit, at least one."""
        args, memory, batch, limit = self.model.args, memory_for_caches(self.model), [], 0
        max_tokens = 2048 if self.model.device.type == "cpu" else 32768
        for group in groups:
            if batch and sum(g.num_requests for g in (*batch, group)) > limit:
                yield batch
                batch = []
            if not batch:                                # the longest of its batch
                fitting = memory // (2 * cache_bytes(args, 1, group.length, self.model.kv_dtype))
                limit = self.batch_size or min(MAX_BATCH, max_tokens // group.length, fitting)
            batch.append(group)
        if batch:
            yield batch

    def score_batch(self, batch: list[ContextGroup]) -> None:
        """In two passes, one over the contexts, one over further continuations."""
        model, contexts = self.model, [group.context for group in batch]
        B, T = self.batch_shape(contexts)
        T += bool(model.delta_states())                  # a position for the padding, see score_rows
        caches = [model.new_cache(B, T, torch.zeros) for _ in model.full_layers()]
        states = [[t.new_zeros(B, *t.shape[1:]) for t in state] for state in model.save()]
        self.score_rows(contexts, caches, states)
        continuations = [(row, number) for number, group in enumerate(batch) for row in group.continuations]
        continuations.sort(key=lambda pair: -len(pair[0].tokens))
        step = self.batch_size or MAX_BATCH
        for begin in range(0, len(continuations), step):
            rows, owners = zip(*continuations[begin:begin + step], strict=True)
            B, S = self.batch_shape(rows)
            owners = torch.tensor([*owners, *[0] * (B - len(rows))], device=model.device)
            self.score_rows(rows, [[F.pad(t[owners], (0, 0, 0, S)) for t in cache] for cache in caches],
                            [[t[owners] for t in state] for state in states])

    def batch_shape(self, rows: Sequence[Row]) -> tuple[int, int]:
        """(B, S) that hold the rows. For the compiler no size is 1, and B x S is more than decoding's kernels take: it
        would compile these special cases apart."""
        B, S = len(rows), max(len(row.tokens) for row in rows)
        return (max(B, 2), max(math.ceil(S / 8) * 8, kernels.MAX_TOKENS)) if self.compile else (B, S)

    def score_rows(self, rows: Sequence[Row], caches: list[list[Tensor]], states: list[list[Tensor]]) -> None:
        """Runs the rows over the KV caches, of each layer that has one, and what the DeltaNets remember, which keep
        what they read; adds to logprobs and is_greedy."""
        self.mark_dynamic(itertools.chain.from_iterable(caches), 0, 2)
        self.mark_dynamic(itertools.chain.from_iterable(states), 0)
        self.model.use_caches(caches)
        self.model.use_states(states)
        fused, (B, S) = self.model.fuse(), self.batch_shape(rows)
        self.model.set_prompt_lengths([row.length for row in rows] + [0] * (B - len(rows)))
        self.mark_dynamic([self.model.inv_freq], 0)
        idx, input_pos = torch.zeros(B, S, dtype=torch.int64), torch.arange(S).repeat(B, 1)
        for i, row in enumerate(rows):
            idx[i, :len(row.tokens)] = torch.tensor(row.tokens)
            input_pos[i] += row.start
            if states:                                   # padding must not follow on the text, which would remember it
                input_pos[i, len(row.tokens):] = row.start + len(row.tokens) + 1
        min_positions = max(2, math.ceil((kernels.MAX_TOKENS + 1) / B)) if self.compile else 1       # as in batch_shape
        max_positions = MAX_LOGITS_BYTES // (4 * B * self.model.args.vocab_size)
        fits = max(len(row.targets) for row in rows) <= max_positions
        chunk = S if fits else max(max_positions // 16, 1) * 16
        for begin in range(0, S, chunk):
            end = begin + chunk
            targets = [[target for target in row.targets if begin <= target.offset < end] for row in rows]
            offsets = [sorted({target.offset for target in of_row}) for of_row in targets]
            P = max(min_positions, *map(len, offsets))
            logits_at = torch.zeros(B, P, dtype=torch.int64)
            for i, of_row in enumerate(offsets):
                logits_at[i, :len(of_row)] = torch.tensor(of_row) - begin
            inputs = [t.to(self.model.device) for t in (idx[:, begin:end], input_pos[:, begin:end], logits_at)]
            self.mark_dynamic(inputs, 0, 1)
            logits = self.forward(*inputs, fused=fused).float().flatten(0, 1)                      # [B P, V]
            positions = [i * P + offsets[i].index(t.offset) for i, of_row in enumerate(targets) for t in of_row]
            if positions:
                self.add_scores(logits, positions, list(itertools.chain.from_iterable(targets)))

    def add_scores(self, logits: Tensor, positions: list[int], targets: list[Target]) -> None:
        """positions: which of the logits [n, V] score which target."""
        at = torch.tensor(positions, device=logits.device)
        tokens = torch.tensor([target.token for target in targets], device=logits.device)
        logprobs = (logits[at, tokens] - logits.logsumexp(-1)[at]).tolist()
        is_greedy = (logits.argmax(-1)[at] == tokens).tolist()
        for target, logprob, greedy in zip(targets, logprobs, is_greedy, strict=True):
            self.logprobs[target.request] += logprob
            self.is_greedy[target.request] &= greedy

    def mark_dynamic(self, tensors: Iterable[Tensor], *dims: int) -> None:
        """Tells the compiler at once which sizes vary, lest it learn it from one recompilation after another."""
        for tensor in tensors if self.compile else ():
            torch._dynamo.maybe_mark_dynamic(tensor, dims)


# ---- generation until a stop string

def generate_texts(engine: Engine, tokenizer: Tokenizer, prompts: list[list[int]], until: Sequence[str],
                   max_new_tokens: int, sampling: Sampling, seed: int | None, max_seq_length: int = 0) -> list[str]:
    """What follows each prompt up to a stop string, a stop id or max_new_tokens. The stop string may still be there."""
    decoders = [StreamDecoder(tokenizer, skip_special=True) for _ in prompts]
    texts, ended = ["" for _ in prompts], [False for _ in prompts]
    longest = max(map(len, until), default=0)
    for ids in engine.generate(prompts, max_new_tokens, sampling, seed=seed, max_seq_length=max_seq_length):
        for i, token in enumerate(ids):
            if token is None:
                ended[i] = True
            elif not ended[i]:
                piece = decoders[i].push(token)
                texts[i] += piece
                ended[i] = any(stop in texts[i][-(longest + len(piece)):] for stop in until if stop)
        if all(ended):
            break
    return [text + decoder.flush() for text, decoder in zip(texts, decoders, strict=True)]


def sampling_from(options: dict[str, Any]) -> Sampling:
    """From a task's normalized generation_kwargs, less until and max_gen_toks. Errors: UserError."""
    no_effect = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}
    for name, value in options.items():
        if name not in ("do_sample", "temperature", "top_k", "top_p") and value != no_effect.get(name):
            raise UserError(f"the task's generation_kwargs ask for {name} = {value}, which is not supported")
    if not options.get("do_sample"):
        return Sampling(temperature=0)
    return Sampling(float(options.get("temperature", 1.0)), options.get("top_k") or None, options.get("top_p"))


# ---- the adapter

class QwenFast:
    """A model as lm-eval sees it. Instances inherit from lm-eval's TemplateLM too, which tokenizes most requests.

    batch_size: None for what suits the device.  max_length: of context and continuation (default: the model's).
    seed: of sampling (default: a new one each time).
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from lm_eval.api.model import TemplateLM
        return object.__new__(type("QwenFast", (cls, TemplateLM), {}))

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int | None = None,
                 max_length: int | None = None, compile: bool = False, seed: int | None = None):
        super().__init__()
        self.model, self.tokenizer, self._device = model, tokenizer, model.device
        self.batch_size, self.compile, self.seed, self.cache_length = batch_size, compile, seed, 0
        self.scorer = Scorer(model, batch_size, max_length, compile)
        self.engine = Engine(model, tokenizer, compile, compile)
        # A rendered chat goes to lm-eval as a string, and comes back with more text around it: an unguessable word in
        # it stands for each control token that the template wrote.
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
        for is_control, run in itertools.groupby(ids, control.__contains__):
            run = list(run)
            text += "".join(f"<{self.nonce}.{i}>" for i in run) if is_control else self.tokenizer.decode(run)
        if not add_generation_prompt:            # the answer has begun: what the template put after it goes
            begun = chat_history[-1]["content"].strip()
            text = text[:text.rindex(begun) + len(begun)]
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        pieces = re.split(f"<{self.nonce}\\.([0-9]+)>", string)              # text and ids of control tokens in turn
        segments = [int(piece) if i % 2 else piece for i, piece in enumerate(pieces) if i % 2 or piece]
        return self.tokenizer.encode_segments(segments or [""], add_special_tokens)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            return self.scorer.score(pairs, bar.update)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        pairs, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)                           # with BOS again after the prefix, as lm-eval has it
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                pairs.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(pairs, disable_tqdm), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """In batches of the same generation_kwargs, the longest prompts first. Compiled, all share one size of batch
        and cache: another would compile anew."""
        texts: list[str] = [""] * len(requests)
        by_kwargs: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_kwargs.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        groups = []
        for numbers in by_kwargs.values():
            options = self.generation_options(requests[numbers[0]].args[1])
            ids = {n: self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in numbers}
            room = self.max_length - options[1]
            self.scorer.num_truncated += sum(len(prompt) > room for prompt in ids.values())
            numbers = sorted(numbers, key=lambda n: -len(ids[n]))
            prompts = [ids[n][-room:] for n in numbers]
            groups.append((numbers, prompts, options, len(prompts[0]) + options[1]))
        power_of_2 = 1 << (max(length for *_, length in groups) - 1).bit_length() if groups else 0
        self.cache_length = max(self.cache_length, min(power_of_2, self.max_length))
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for number, text in itertools.chain.from_iterable(itertools.starmap(self.generate_group, groups)):
                texts[number] = text
                bar.update()
        return texts

    def generate_group(self, numbers: list[int], prompts: list[list[int]], options: tuple[list[str], int, Sampling],
                       length: int) -> Iterator[tuple[int, str]]:
        """(number of the request, text) for requests with the same options, as generation_options has them."""
        from lm_eval.models.utils import postprocess_generated_text
        length = self.cache_length if self.compile else length
        fitting = memory_for_caches(self.model) // cache_bytes(self.model.args, 1, length, self.model.kv_dtype)
        B = self.batch_size or max(1, min(16 if self.model.device.type == "cpu" else MAX_BATCH, fitting))
        for begin in range(0, len(prompts), B):
            batch, seed = prompts[begin:begin + B], None if self.seed is None else self.seed + begin
            batch += [batch[-1]] * (B - len(batch)) * self.compile
            texts = generate_texts(self.engine, self.tokenizer, batch, *options, seed, length)
            for number, text in zip(numbers[begin:begin + B], texts):        # less what pads the batch
                yield number, postprocess_generated_text(text, options[0], None)

    def generation_options(self, kwargs: dict[str, Any]) -> tuple[list[str], int, Sampling]:
        """(stop strings, max_new_tokens, sampling) of a request. Errors: UserError, for what is not supported."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
        options: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, 256))
        eos = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        until, max_new = handle_stop_sequences(options.pop("until", None), eos), options.pop("max_gen_toks")
        if max_new >= self.max_length:
            raise UserError(f"{self.max_length} is too short: a task asks for {max_new} new tokens", "max_seq_length")
        return until, max_new, sampling_from(options)


# ---- an evaluation

def evaluate(lm: Any, tasks: Sequence[str], include_path: Path | None = None, **options: Any) -> dict[str, Any] | None:
    """lm-eval's results on a QwenFast; None on all ranks of a machine but the first.

    options: of lm_eval.simple_evaluate. lm.seed, if any, is for all of its seeds."""
    import lm_eval
    if lm.seed is not None:
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        options |= dict.fromkeys(seeds, lm.seed)
    manager, loaded = load_tasks(tasks, include_path)
    if lm.model.ranks:
        lm.model.ranks.gather(None)                      # all ranks have the tasks, or all end
    run: Callable[..., Any] = lm_eval.simple_evaluate
    try:
        results = run(lm, tasks=loaded, task_manager=manager, log_samples=False, **options)
    except ValueError as error:
        if "larger than population" not in str(error):
            raise
        raise UserError(f"{options['num_fewshot']} examples are more than a task has", "num_fewshot") from error
    if lm.scorer.num_truncated:
        print(f"{lm.scorer.num_truncated} requests were longer than {lm.max_length} tokens: truncated on the left",
              file=sys.stderr)
    if results:
        results["config"].update(batch_size=lm.batch_size or "auto", device=str(lm.model.device),
                                 model_dtype=str(lm.model.dtype))
    return results


def write_results(results: dict[str, Any], file: Path | None) -> None:
    """Prints lm-eval's tables and writes its JSON."""
    from lm_eval.utils import handle_non_serializable, make_table
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if file:
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(results, indent=2, default=handle_non_serializable), "utf-8")
        print(f"results: {file}")
