"""Continuous batching: requests share the model's passes, each in a row of one KV cache, which they join and leave at
any step. Knows nothing of HTTP.

A pass of decoding takes the smallest block of 1, 2, 4 ... rows that holds all that are answered: few sizes are
compiled, and few rows computed for nothing. Those run a token at the first position that they do not use yet, which
whatever is written there later replaces. A prompt is read in between, in passes of its row alone.
"""
import itertools
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from generate import PREFILL_CHUNK, Engine, eager_without_compiler, warm_up
from grammar import Grammars, Matcher
from rows import Row, Rows, block_of
from sampling import Sampling, exponential_noise, sample
from tokenizer import StreamDecoder

SHARED_CHUNK = 256       # tokens of a prompt that are read between two steps of the other rows, which wait
AFTER = 16               # tokens of a prompt that its answer's decoder sees: a split character, a leading space


@dataclass(frozen=True)
class Request:
    """logprobs: of how many alternatives beside each token's own; None: not even that. grammar: of grammar.py."""
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: str | None = None


class Scored(NamedTuple):
    """A token and its log-probability, in nats, by the model itself, and the most probable tokens with theirs."""
    id: int
    logprob: float
    top: list[tuple[int, float]]


class Output(NamedTuple):
    """What a step adds to an answer."""
    number: int                          # of the request
    text: str = ""
    tokens: int = 0
    scored: Scored | None = None
    finish_reason: str | None = None     # of the last one: stop, length or error
    cached: int = 0                      # tokens of the prompt that did not have to be read


class QueueFull(Exception):
    """More requests than may wait."""


# ---- one request

class StopStrings:
    """Ends a text before the first of some strings, and holds back what may become one."""

    def __init__(self, stop: Sequence[str]):
        self.stop, self.held, self.found = stop, "", False

    def push(self, text: str) -> str:
        """What is sure not to belong to a stop string, and was not returned before."""
        text = self.held + text
        begins = [begin for begin in (text.find(stop) for stop in self.stop) if begin >= 0]
        self.found = bool(begins)
        held = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        end = min(begins) if begins else len(text) - held
        self.held = "" if begins else text[end:]
        return text[:end]

    def flush(self) -> str:
        held, self.held = self.held, ""
        return held


class Answer:
    """A request while it is answered in a row."""

    def __init__(self, number: int, request: Request, engine: Engine, matcher: Matcher | None):
        self.number, self.request, self.engine, self.matcher = number, request, engine, matcher
        self.choice = request.sampling.choice(engine.vocab_size, engine.model.device)
        self.rng = torch.Generator(engine.model.device).manual_seed(request.seed)
        self.decoder = StreamDecoder(engine.tokenizer, True, after=request.prompt[-AFTER:])
        self.stops = StopStrings(request.stop)
        self.tokens = self.cached = 0
        self.next: int | None = None               # the token to run next, when the prompt has been read
        self.steps: Iterator[list[int | None]] | None = None       # of an engine that speculates

    def noise(self) -> Tensor:
        """[1, candidates]: the draws of one answer do not depend on the other rows."""
        return exponential_noise(1, self.choice.candidates, self.rng)

    def choose(self, logits: Tensor) -> int:
        """A token, from logits [V]."""
        logits = logits[None, :self.engine.vocab_size]
        if self.matcher:
            logits = logits.masked_fill(self.matcher.forbidden().to(logits.device), -torch.inf)
        return int(sample(logits, self.choice, self.noise()))

    def take(self, id: int, logits: Tensor | None = None) -> Output:
        """Goes on with a token, which logits [V] gave."""
        text, scored, ended = "", None, id in self.engine.stop_ids
        self.next = id
        if not ended:
            self.tokens += 1
            text = self.stops.push(self.decoder.push(id))
            scored = self.score(id, logits) if logits is not None and self.request.logprobs is not None else None
            if self.matcher:
                self.matcher.take(id)
                ended = self.matcher.ended
        reason = "length" if self.tokens == self.request.max_new_tokens else None
        if ended or self.stops.found:
            reason = "stop"
        if reason and not self.stops.found:
            text += self.stops.push(self.decoder.flush()) + self.stops.flush()
        return Output(self.number, text, int(id not in self.engine.stop_ids), scored, reason, self.cached)

    def score(self, id: int, logits: Tensor) -> Scored:
        logprobs = logits.float().log_softmax(-1)
        top = logprobs[:self.engine.vocab_size].topk(self.request.logprobs or 0)
        return Scored(id, float(logprobs[id]), list(zip(top.indices.tolist(), top.values.tolist())))


# ---- the loop

@dataclass
class Statistics:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    busy_seconds: float = 0.0


class Batcher:
    """Answers requests with an engine, as many at a time as there are rows, in the order in which they come.

    capacity, cache_tokens: as in Rows. max_queue: how many requests may wait. deliver: called in `run`, with what a
    step added to the answers. An engine that speculates has one row. Errors: UserError (memory).
    """

    def __init__(self, engine: Engine, max_batch: int, capacity: int, cache_tokens: int = 0, max_queue: int = 1 << 30,
                 deliver: Callable[[list[Output]], None] = lambda outputs: None):
        self.engine, self.ranks, self.device = engine, engine.model.ranks, engine.model.device
        self.capacity, self.max_queue, self.deliver = capacity, max_queue, deliver
        self.cache = Rows(engine, max_batch, capacity, cache_tokens)
        self.rows = self.cache.rows
        self.grammars = Grammars(engine.tokenizer, engine.vocab_size, engine.stop_ids)
        # How the rows of a step are sampled, unless all are greedy. Who needs it otherwise is sampled alone.
        self.shared = Sampling(top_p=0.5).choice(engine.vocab_size, self.device)
        self.greedy = Sampling(temperature=0, top_k=1).choice(engine.vocab_size, self.device)
        self.no_noise = torch.ones(1, self.shared.candidates, device=self.device)
        self.threads = torch.get_num_threads()
        self.statistics, self.numbers = Statistics(), itertools.count()
        self.waiting: deque[tuple[int, Request]] = deque()
        self.queued = 0                                            # those waiting, and those not yet seen by the loop
        self.commands: list[tuple[int, Request | None] | None] = []
        self.changed = threading.Condition()

    # ---- for other threads

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Their numbers. Errors: QueueFull, and then none is answered."""
        with self.changed:
            if self.queued + len(requests) > self.max_queue + sum(not row.answer for row in self.rows):
                raise QueueFull
            numbers = [next(self.numbers) for _ in requests]
            self.queued += len(requests)
            self.commands += zip(numbers, requests)
            self.changed.notify()
        return numbers

    def cancel(self, number: int) -> None:
        """Frees a request's row, or its place in the queue; nothing more of it is delivered."""
        with self.changed:
            self.commands.append((number, None))
            self.changed.notify()

    def close(self) -> None:
        """Ends `run`, and all answers."""
        with self.changed:
            self.commands.append(None)
            self.changed.notify()

    # ---- the loop

    @torch.inference_mode()
    def run(self) -> None:
        """Until `close`. Under torchrun all ranks call it, and follow what the first is told."""
        torch.set_num_threads(self.threads)        # a new thread's own number may be another
        while None not in (commands := self.next_commands()):
            if outputs := self.tick(commands):
                self.deliver(outputs)

    def next_commands(self) -> list[Any]:
        """What was asked for since the last step; waits where there is nothing else to do."""
        commands = []
        if not self.ranks or self.ranks.first:
            with self.changed:
                while not (self.commands or self.waiting or any(row.answer for row in self.rows)):
                    self.changed.wait()
                commands, self.commands = self.commands, []
        return self.ranks.from_first(commands) if self.ranks else commands

    def tick(self, commands: Sequence[tuple[int, Request | None]] = ()) -> list[Output]:
        """One step: prompts are read, up to a number of tokens, and all answers get a token."""
        outputs, start = [], time.perf_counter()
        for number, request in commands:
            if request:
                self.waiting.append((number, request))
            else:
                self.drop(number)
        try:
            outputs.extend(self.read_prompts())
            self.cache.compact()
            outputs.extend(self.decode())
        except Exception:
            if self.ranks:                         # which no longer do the same
                raise
            traceback.print_exc()
            outputs.extend(self.give_up())
        self.statistics.new_tokens += sum(output.tokens for output in outputs)
        self.statistics.busy_seconds += time.perf_counter() - start
        return outputs

    def drop(self, number: int) -> None:
        with self.changed:
            before = len(self.waiting)
            self.waiting = deque(item for item in self.waiting if item[0] != number)
            self.queued -= before - len(self.waiting)
        for row in self.rows:
            if row.answer and row.answer.number == number:
                self.end(row)

    def end(self, row: Row) -> None:
        if row.answer and row.answer.steps:
            cast(Any, row.answer.steps).close()
        row.answer, row.used = None, next(self.cache.clock)

    def give_up(self) -> Iterator[Output]:
        """After an error in the model, of which nobody knows what it left behind."""
        self.cache.forget()
        for row in self.rows:
            if row.answer:
                yield Output(row.answer.number, finish_reason="error")
                self.end(row)

    def read_prompts(self) -> Iterator[Output]:
        """One after the other, so that the next can begin with the same tokens."""
        left = SHARED_CHUNK if any(row.is_decoding for row in self.rows) else PREFILL_CHUNK[self.device.type]
        while left > 0:
            row = next((row for row in self.rows if row.answer and not row.is_decoding), None)
            if row is None:
                if not self.waiting or all(row.answer for row in self.rows):
                    return
                number, request = self.next_waiting()
                try:
                    row = self.start(number, request)
                except Exception:                  # its grammar, perhaps: the other requests go on
                    traceback.print_exc()
                    yield Output(number, finish_reason="error")
                    continue
            answer = cast(Answer, row.answer)
            if answer.steps:
                return
            begin, prompt = len(row.tokens), answer.request.prompt
            ids = prompt[begin:begin + left]
            left -= len(ids)
            logits = self.read(row, ids)
            if begin + len(ids) == len(prompt):
                self.cache.remember(row)
                yield self.advance(row, logits)

    def next_waiting(self) -> tuple[int, Request]:
        with self.changed:
            self.queued -= 1
            return self.waiting.popleft()

    def start(self, number: int, request: Request) -> Row:
        """Gives a request a row."""
        matcher, engine, row = None, self.engine, self.rows[0]
        if request.grammar is not None:
            matcher = self.grammars.matcher(request.grammar)
        answer = Answer(number, request, engine, matcher)
        if engine.speculator:                      # which shares the row's memory, and has tokens in it that it knows
            self.cache.forget()
        if engine.speculator and not matcher and request.logprobs is None:
            engine.reserve(1, self.capacity)
            answer.cached = engine.reusable(request.prompt)
            answer.steps = engine.generate(request.prompt, request.max_new_tokens, request.sampling, seed=request.seed,
                                           stop_ids=frozenset(), max_seq_length=self.capacity, keep_cache=True)
        else:
            engine.model.cache_owner = None
            row = self.cache.place(request.prompt)
            answer.cached = len(row.tokens)
        row.answer = answer
        self.statistics.prompt_tokens += len(request.prompt)
        self.statistics.cached_tokens += answer.cached
        return row

    def read(self, row: Row, ids: list[int]) -> Tensor:
        """Runs the next tokens of a row's prompt: the logits [V] after the last."""
        self.cache.use(row.index, 1)
        begin = len(row.tokens)
        input_pos = torch.arange(begin, begin + len(ids), device=self.device)
        last = torch.tensor([[len(ids) - 1]], device=self.device)
        logits = self.engine.forward_chunk(torch.tensor([ids], device=self.device), input_pos, last)
        row.tokens = row.tokens + ids
        return logits[0, -1]

    def decode(self) -> Iterator[Output]:
        """A token for every answer whose prompt has been read."""
        decoding = [row for row in self.rows if row.is_decoding]
        if self.rows[0].answer and self.rows[0].answer.steps:
            yield self.advance(self.rows[0], None, *next(self.rows[0].answer.steps))
        elif decoding:
            first, size = block_of(row.index for row in decoding)
            rows = self.rows[first:first + size]
            self.cache.use(first, size)
            ids, logits = self.step([row.answer.next if row in decoding else 0 for row in rows],
                                    [len(row.tokens) for row in rows],
                                    [row.answer if row in decoding else None for row in rows])
            for row, id, scores in zip(rows, ids.flatten().tolist(), logits):
                if row in decoding:
                    row.tokens.append(row.answer.next)
                    alone = row.answer.matcher or row.answer.choice.candidates and not self.shares(row.answer)
                    yield self.advance(row, scores, None if alone else id)

    def step(self, ids: list[int], positions: list[int], answers: list[Answer | None]) -> tuple[Tensor, Tensor]:
        """The next ids [B, 1] and the logits [B, V] that they are from. Who is not sampled as the others are has the
        most probable token."""
        sampled = [answer if answer and self.shares(answer) else None for answer in answers]
        choice, noise = self.greedy, torch.empty(len(ids), 0, device=self.device)
        if any(sampled):
            limits = torch.stack([answer.choice.limits if answer else choice.limits for answer in sampled])
            choice = self.shared._replace(limits=limits)
            noise = torch.cat([answer.noise() if answer else self.no_noise for answer in sampled])
        idx, input_pos = (torch.tensor(column, device=self.device)[:, None] for column in (ids, positions))
        engine = self.engine
        return engine.run_decode(engine.model, engine.fused, engine.vocab_size, idx, input_pos, choice, noise)

    def shares(self, answer: Answer) -> bool:
        """Whether its tokens are drawn as most are: in the step itself, which is compiled for that."""
        return not answer.matcher and answer.choice[:2] == self.shared[:2]

    def advance(self, row: Row, logits: Tensor | None, id: int | None = None) -> Output:
        """Goes on with a token, or one from the logits [V]. What goes wrong with one answer ends no other."""
        answer = cast(Answer, row.answer)
        try:
            output = answer.take(answer.choose(cast(Tensor, logits)) if id is None else id, logits)
        except Exception:
            traceback.print_exc()
            output = Output(answer.number, finish_reason="error")
        if output.finish_reason:
            self.end(row)
        return output

    @torch.inference_mode()
    def warm_up(self) -> float:
        """Compiles the steps of all sizes; returns seconds. Without a working compiler the engine goes on eagerly."""
        start, request = time.perf_counter(), dict(max_new_tokens=8, max_seq_length=self.capacity)
        if self.engine.speculator:
            return warm_up(self.engine, [[0]], request)
        answers = [Answer(0, Request([0], 1, sampling), self.engine, None) for sampling in (Sampling(0), Sampling())]
        with eager_without_compiler(self.engine):
            self.read(self.rows[0], [0, 0, 0])
            for answer, n in itertools.product(answers, range(len(self.rows).bit_length())):
                self.cache.use(0, 1 << n)
                self.step([0] * (1 << n), [0] * (1 << n), [answer] * (1 << n))
        self.cache.forget()
        return time.perf_counter() - start
