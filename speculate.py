"""Speculative decoding: something cheap drafts k tokens, the model checks them all in one pass, and the output's distribution stays the model's.

Leviathan et al. 2023, "Fast inference from transformers via speculative decoding"; Chen et al. 2023, "Accelerating large language model decoding with
speculative sampling". a is the probability that a drafted token is accepted, c the cost of a draft step and v that of a pass over k + 1 tokens, both
in steps of plain decoding: the speed-up is (1 - a^(k+1)) / ((1 - a) (v + k c)).
"""
import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import Callable, Iterator

import torch
from torch import Tensor

import kernels
import tp
from cli import UserError
from decoding import Generator, begin_step, check_request, compile_settings
from model import Transformer
from sampling import Sampling, exponential, shortlist
from tokenizer import Tokenizer, same_tokenizer

AUTO_K = range(1, 9)                 # what may be chosen
AUTO_K_CUDA = (1, 2, 4, 8)           # where each is compiled apart
LOOKUP = (4, 3, 2)                   # how many of the last tokens prompt lookup tries to find again


# ---- what the formula says

def expected_tokens(a: float, k: int) -> float:
    """New tokens of a round with k drafted ones."""
    return k + 1.0 if a >= 1 else (1 - a ** (k + 1)) / (1 - a)


def predicted_speedup(a: float, k: int, c: float, v: float) -> float:
    return expected_tokens(a, k) / (v + k * c)


# ---- acceptance, on the device

def accept_greedy(logits: Tensor, drafted: Tensor) -> Tensor:
    """int64 [k + 2]: how many of drafted [k] are what the logits [k + 1, V] would have chosen, n, then tokens of which the first n + 1 count."""
    best = logits.float().argmax(dim=-1)
    n = (best[:-1] == drafted).long().cumprod(0).sum()
    return torch.cat((n[None], best))


def accept(logits: Tensor, drafted: Tensor, sampling: Sampling, probs: Tensor, ids: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
    """The same for sampling; all probabilities in fp32.

    Token i, drawn from the draft's distribution q_i, is accepted with probability min(1, p_i / q_i); the first refused one is replaced by a draw
    from max(0, p - q), and after the last a further one is drawn from p.
    probs, ids [k, m]: q on the m tokens that could have been drawn.  uniform [k] in [0, 1).  noise [1, n]: exponential, n = sampling.candidates(V).
    """
    k, V = len(drafted), logits.size(-1)
    scaled, at = shortlist(logits, sampling)                           # [k + 1, n]
    p = scaled.softmax(dim=-1)
    p_drafted = p[:-1].masked_fill(at[:-1] != drafted[:, None], 0).sum(-1)
    q_drafted = probs.masked_fill(ids != drafted[:, None], 0).sum(-1)
    n = (uniform * q_drafted < p_drafted).long().cumprod(0).sum()[None]
    q = torch.zeros(V, dtype=p.dtype, device=p.device).scatter(0, ids[n.clamp(max=k - 1)][0], probs[n.clamp(max=k - 1)][0])
    p, at = p[n], at[n]                                                # [1, n], of the first token that was not accepted
    rest = (p - q[at] * (n < k)).clamp(min=0)
    rest = torch.where(rest.sum() > 0, rest, p)
    last = at.gather(1, (rest / noise).argmax(dim=-1, keepdim=True))[0]
    tokens = torch.cat((drafted, last))
    return torch.cat((n, torch.where(torch.arange(k + 1, device=n.device) < n, tokens, last)))


# ---- drafts

@dataclass
class Draft:
    """Drafted tokens and what they were drawn from (see accept); no distribution where the choice was certain."""
    tokens: Tensor                   # [1, k]
    probs: Tensor | None = None
    ids: Tensor | None = None

    def of_first(self, ranks: tp.Ranks) -> "Draft":
        return Draft(*(None if t is None else tp.of_first(t, ranks.group) for t in (self.tokens, self.probs, self.ids)))


class ModelDraft:
    """A smaller model. Its cache follows the text: positions are written over, never taken back."""

    def __init__(self, generator: Generator, vocab: int, compile: bool):
        self.generator, self.vocab = generator, vocab
        self.text: list[int] = []        # the whole text, shared with whoever extends it
        self.fed = 0                     # how many of its tokens are in the cache
        self.step = self.draft_step
        if compile and not one_operator(generator.model):
            self.step = torch.compile(self.draft_step, fullgraph=True, **compile_settings(generator.model, False))

    def draft_step(self, idx: Tensor, input_pos: Tensor, sampling: Sampling, noise: Tensor) -> tuple[Tensor, ...]:
        """The token [1, 1] after idx [1, S], and unless greedy its distribution [1, m] with ids."""
        logits = self.generator.model(idx, input_pos)[:, -1, :self.vocab]
        if sampling.temperature == 0:
            return (logits.float().argmax(dim=-1, keepdim=True),)
        scaled, ids = shortlist(logits, sampling)
        return ids.gather(-1, (scaled - noise.log()).argmax(dim=-1, keepdim=True)), scaled.softmax(dim=-1), ids

    def begin(self, text: list[int], kept: bool) -> None:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.text[:self.fed], text)) if kept else ()
        self.text, self.fed = text, sum(1 for _ in same)

    def missing(self) -> int:
        """How many tokens must be read before the next draft, beyond the two that every draft begins with."""
        return max(0, len(self.text) - 2 - self.fed)

    def propose(self, k: int, sampling: Sampling, source: torch.Generator) -> Draft:
        """The first step is given the last two tokens, because after a round without refusals the last but one is not in the cache yet."""
        if self.missing():
            self.generator.cached = self.text[:self.fed]
            self.generator.prefill_rows([self.text[:-1]], keep_cache=True)
        begin, device = max(0, len(self.text) - 2), self.generator.model.device
        idx = torch.tensor([self.text[begin:]], device=device)
        input_pos = torch.arange(begin, len(self.text), device=device)[None]
        noise = exponential(k, sampling.candidates(self.vocab), source)
        steps = []
        for i in range(k):
            begin_step(device)
            step = self.step(idx, input_pos, sampling, noise[i:i + 1])
            steps.append([t.clone() for t in step] if device.type == "cuda" else step)
            idx, input_pos = steps[-1][0], input_pos[:, -1:] + 1
        tokens, *distribution = (torch.cat(parts, dim=0) for parts in zip(*steps))
        return Draft(tokens.view(1, -1), *distribution)

    def settle(self, before: int, k: int, accepted: int) -> None:
        """After a round on a text of `before` tokens: which of the drafted ones the cache holds rightly. The last one was never fed."""
        self.fed = before + min(accepted, k - 1)


class Lookup:
    """No model: what followed the last tokens where they stood before (prompt lookup)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.begin([], False)

    def begin(self, text: list[int], kept: bool) -> None:
        self.text, self.seen = text, 0
        self.after: dict[tuple[int, ...], int] = {}              # tokens -> the position behind their last occurrence but the present one

    def missing(self) -> int:
        return 0

    def propose(self, k: int, sampling: Sampling, source: torch.Generator) -> Draft | None:
        text = self.text
        for end in range(self.seen + 1, len(text)):
            for n in LOOKUP:
                if n <= end:
                    self.after[tuple(text[end - n:end])] = end
        self.seen = max(self.seen, len(text) - 1)
        start = next((at for n in LOOKUP if (at := self.after.get(tuple(text[-n:]))) is not None and n <= len(text)), None)
        if start is None:
            return None
        period = len(text) - start                               # a match that overlaps the end goes on repeating
        return Draft(torch.tensor([[text[start + i % period] for i in range(k)]], device=self.device))

    def settle(self, before: int, k: int, accepted: int) -> None:
        pass


# ---- how many to draft

@dataclass
class Costs:
    """Measured seconds, and with them the choice of k. Everything is relative to `plain`, a step of plain decoding."""
    plain: float
    draft: float
    verify: dict[int, float]                                     # of a pass over k + 1 tokens, by k
    reading: float = 0.0                                         # of a token that the draft has to read before it can begin
    rounds: dict[int, float] = field(default_factory=dict)
    hits: float = 0.0
    tests: float = 0.0
    lost: float = 0.0                                            # seconds that drafting has cost more than it gained (less than 0: gained)
    spoken: int = 0                                              # tokens of this request
    since_plain: int = 0
    age: dict[int, int] = field(default_factory=dict)            # rounds since one with this k
    FORGET, MARGIN, ALLOWANCE, SAVINGS, RECHECK = 0.98, 1.03, 0.012, 8, 24

    def __post_init__(self) -> None:
        self.rounds = {0: self.plain} | {k: v + k * self.draft for k, v in self.verify.items()}

    @property
    def acceptance(self) -> float:
        """Of late; without evidence, a guess in favour of trying that a few refusals do not overturn."""
        return (self.hits + 2.1) / (self.tests + 3)

    def predicted(self, a: float) -> tuple[float, int]:
        """What the formula promises at best, and with which k; (1, 0) where plain decoding is best."""
        return max([(predicted_speedup(a, k, self.draft / self.plain, v / self.plain), k) for k, v in self.verify.items()] + [(1.0, 0)])

    def gain(self, k: int, a: float) -> float:
        """Tokens/s in plain decoding's."""
        return expected_tokens(a, k) * self.rounds[0] / self.rounds[k]

    def begin(self) -> None:
        self.lost, self.spoken, self.since_plain = min(0.0, self.lost), 0, 0

    def choose(self, left: int, missing: int) -> int:
        """k for the next round with `left` tokens to come, 0 for a plain step. `missing`: tokens that the draft must read first."""
        choices = [k for k in self.verify if k < left]
        if not choices or self.since_plain >= self.RECHECK or self.lost > self.rounds[0] * (0.5 + self.ALLOWANCE * self.spoken):
            return 0
        best = max(choices, key=lambda k: self.gain(k, self.acceptance))
        gain = self.gain(best, self.acceptance)
        saved = left * self.rounds[0] * (1 - 1 / gain)
        return best if gain > self.MARGIN and saved > 1.5 * missing * self.reading else 0

    def record(self, k: int, accepted: int, seconds: float, catching_up: bool = False) -> None:
        """A round and its seconds; those of one in which the draft had to catch up say nothing about the next."""
        forget = self.FORGET ** (accepted + 1)
        self.hits, self.tests = self.hits * forget + accepted, self.tests * forget + min(k, accepted + 1)
        self.spoken += accepted + 1
        self.since_plain = self.since_plain + 1 if k else 0
        if not catching_up:
            self.learn(k, seconds)
            if k:
                self.lost = max(-self.SAVINGS * self.rounds[0], self.lost + seconds - (accepted + 1) * self.rounds[0])

    def learn(self, k: int, seconds: float) -> None:
        """Moves the estimate of a round towards what it took, the more the older it is; a stall of the machine counts for little. When plain steps
        have become faster or slower, so has whatever was not tried of late."""
        known = self.rounds.setdefault(k, seconds)
        weight = min(0.5, 1 - 0.9 ** (1 + self.age.get(k, 0)))
        self.rounds[k] = known + weight * (min(max(seconds, known / 2), 1.25 * known) - known)
        if k == 0:
            for other in self.rounds:
                if other and self.age.get(other, self.RECHECK + 1) > self.RECHECK:
                    self.rounds[other] *= self.rounds[0] / known
        self.age = {other: self.age.get(other, self.RECHECK) + 1 for other in self.rounds} | {k: 0}


def seconds_of(call: Callable[[], object], device: torch.device, times: int) -> float:
    """Median over `times` calls after a first one."""
    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start
    timed()
    return statistics.median(timed() for _ in range(times))


# ---- the generator

@dataclass
class Statistics:
    """Of the rounds with drafted tokens: how many accepted so many, and of all tokens that were tested how many were accepted."""
    counts: list[int]
    tested: int = 0
    plain: int = 0                   # steps without drafted tokens

    def add(self, k: int, accepted: int) -> None:
        if not k:
            self.plain += 1
            return
        self.counts += [0] * (k + 1 - len(self.counts))
        self.counts[accepted] += 1
        self.tested += min(k, accepted + 1)

    @property
    def rounds(self) -> int:
        return sum(self.counts)

    @property
    def passes(self) -> int:
        """Of the model."""
        return self.rounds + self.plain

    @property
    def mean_accepted(self) -> float:
        return sum(n * count for n, count in enumerate(self.counts)) / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> float:
        """a of the formula."""
        return self.mean_accepted * self.rounds / self.tested if self.tested else 0.0


class Speculator(Generator):
    """A Generator, batch 1 only, whose rounds of drafting and checking yield one token or several.

    draft: the draft model's Generator, or None for prompt lookup.  k: drafted tokens a round, or None: chosen while running, so that timing decides
    where a round ends and a seed fixes the text at temperature 0 only.  Errors: UserError.
    """
    warm_up_tokens = 32              # so that the first choice of k rests on something

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None, draft: Generator | None = None, k: int | None = None,
                 compile: bool = False, compile_prefill: bool = False):
        super().__init__(model, tokenizer, compile, compile_prefill)
        check_k(k, model.args.max_position)
        if draft:
            self.check_draft(draft, tokenizer)
        self.k, self.draft_generator = k, draft
        self.draft = ModelDraft(draft, self.vocab, compile) if draft else Lookup(model.device)
        self.verify = self.verify_step
        if compile and not one_operator(model):
            self.verify = torch.compile(self.verify_step, fullgraph=True, **verify_settings(model, compile_prefill))
        self.agreeing = bool(draft and model.ranks and not draft.model.ranks)       # ranks with a draft of their own follow the first one's
        self.enabled, self.measures = True, k is None    # measures: whether the first request finds out the costs
        self.costs: Costs | None = None
        self.statistics = Statistics([])

    def run_eagerly(self) -> None:
        super().run_eagerly()
        self.verify = self.verify_step
        if self.draft_generator:
            self.draft_generator.run_eagerly()
            self.draft.step = self.draft.draft_step

    def check_draft(self, draft: Generator, tokenizer: Tokenizer | None) -> None:
        if tokenizer and draft.tokenizer:
            difference = same_tokenizer(tokenizer, draft.tokenizer)
            if difference:
                raise UserError(f"--draft_checkpoint_path: the draft's tokenizer is not the model's: {difference}")
        if draft.model.args.vocab_size < self.vocab:
            raise UserError(f"--draft_checkpoint_path: the draft's embedding has {draft.model.args.vocab_size} rows, and the tokenizer {self.vocab} tokens")
        if draft.model.device != self.model.device:
            raise UserError(f"--draft_checkpoint_path: the draft is on {draft.model.device}, the model on {self.model.device}")

    def verify_step(self, idx: Tensor, input_pos: Tensor, sampling: Sampling, probs: Tensor | None, ids: Tensor | None,
                    uniform: Tensor, noise: Tensor) -> Tensor:
        """idx [1, k + 1], the last token and the drafted ones, at input_pos [1, k + 1]: int64 [k + 2] as accept returns it."""
        logits = self.model(idx, input_pos, torch.arange(idx.size(1), device=idx.device))[0, :, :self.vocab]
        drafted = idx[0, 1:]
        if sampling.temperature == 0:
            return accept_greedy(logits, drafted)
        if probs is None:
            probs, ids = torch.ones_like(uniform)[:, None], drafted[:, None]
        return accept(logits, drafted, sampling, probs, ids, uniform, noise)

    def check(self, rows: list[list[int]], max_new_tokens: int) -> None:
        super().check(rows, max_new_tokens)
        if len(rows) > 1:
            raise UserError(f"--batch_size {len(rows)}: speculative decoding takes one sequence at a time")
        if self.draft_generator:
            try:
                check_request(self.draft_generator.model.args, rows, max_new_tokens)
            except UserError as error:
                raise UserError(str(error).replace("the model's context", "the draft's context")) from None

    def reserve(self, batch: int, max_seq_length: int) -> None:
        more = max_seq_length + (self.k or AUTO_K[-1])           # a round may look past the end
        super().reserve(batch, more)
        if self.draft_generator:
            kept = self.draft_generator.model.max_seq_length
            self.draft_generator.reserve(batch, more)
            if self.draft_generator.model.max_seq_length != kept:
                self.draft.fed = 0

    def steps(self, idx: Tensor, input_pos: Tensor, count: int, sampling: Sampling, source: torch.Generator) -> Iterator[list[int]]:
        if not self.enabled:
            yield from super().steps(idx, input_pos, count, sampling, source)
            return
        text = [*self.cached, int(idx)]
        yield [text[-1]]
        if self.measures and self.costs is None:
            self.costs = self.measure(sampling, source)
        self.draft.begin(text, self.kept > 0)
        if self.costs:
            self.costs.begin()
        left = count - 1
        while left:
            new = self.round(text, left, sampling, source)[:left]
            left -= len(new)
            for token in new:
                yield [token]

    def round(self, text: list[int], left: int, sampling: Sampling, source: torch.Generator) -> list[int]:
        """Extends the text by one token or several, and the caches by all but the last."""
        start = time.perf_counter()
        before, missing = len(text), self.draft.missing()
        k = self.k or self.costs.choose(left, missing)
        if self.model.ranks and not self.k:
            k = self.model.ranks.from_first(k)
        if left == 1 or self.model.device.type == "cpu":         # on a GPU the shapes are those that were captured
            k = min(k, left - 1)
        draft = self.draft.propose(k, sampling, source) if k else None
        if draft and self.agreeing:
            draft = draft.of_first(self.model.ranks)
        if draft is None:
            k, accepted = 0, 0
            tokens = self.advance(*self.place(text[-1:], before - 1), sampling, source).flatten().tolist()
        else:
            accepted, *tokens = self.check_round(text, draft, sampling, source).tolist()
            self.draft.settle(before, k, accepted)
        text += tokens[:accepted + 1]
        self.cached = text[:-1]
        self.statistics.add(k, accepted)
        if self.costs:
            self.costs.record(k, accepted, time.perf_counter() - start, catching_up=k > 0 and missing > 0)
        return text[before:]

    def place(self, tokens: list[int], position: int) -> tuple[Tensor, Tensor]:
        """Tokens and positions [1, S] from `position` on, on the device."""
        device = self.model.device
        return torch.tensor([tokens], device=device), torch.arange(position, position + len(tokens), device=device)[None]

    def check_round(self, text: list[int], draft: Draft, sampling: Sampling, source: torch.Generator) -> Tensor:
        k, device = draft.tokens.size(1), self.model.device
        last, first_pos = self.place(text[-1:], len(text) - 1)
        idx, input_pos = torch.cat((last, draft.tokens), dim=1), first_pos + torch.arange(k + 1, device=device)
        uniform = torch.rand(k, dtype=torch.float32, device=device, generator=source)
        noise = exponential(1, sampling.candidates(self.vocab), source)
        if device.type == "cpu":                                 # one compilation for all k
            for tensor, dim in ((idx, 1), (input_pos, 1), (uniform, 0), (draft.probs, 0), (draft.ids, 0)):
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        begin_step(device)
        return self.verify(idx, input_pos, sampling, draft.probs, draft.ids, uniform, noise)

    def measure(self, sampling: Sampling, source: torch.Generator) -> Costs:
        """What plain steps, draft steps and checks cost at the text's present end. What they leave in the caches is written over."""
        device, text = self.model.device, [*self.cached, 0]
        idx, input_pos = self.place(text[-1:], len(text) - 1)
        plain = seconds_of(lambda: self.advance(idx, input_pos.clone(), sampling, source), device, 7)
        step = reading = 0.0
        if self.draft_generator:
            reading = seconds_of(lambda: self.draft_generator.prefill_rows([text[:-1]], False), device, 1) / len(text)
            self.draft.begin(text, False)
            self.draft.fed = len(text)
            step = seconds_of(lambda: self.draft.propose(4, sampling, source), device, 5) / 4
        verify: dict[int, float] = {}
        choices = [self.k] if self.k else AUTO_K if device.type == "cpu" else AUTO_K_CUDA
        for k in choices:
            draft = self.draft.propose(k, sampling, source) if self.draft_generator else Draft(torch.zeros(1, k, dtype=torch.int64, device=device))
            verify[k] = seconds_of(lambda: self.check_round(text, draft, sampling, source), device, 3)
            rates = [(k + 1) / (v + k * step) for k, v in verify.items()]                # if all were accepted
            hopeless = rates[-1] < 0.9 * max(rates)
            if self.model.ranks.from_first(hopeless) if self.model.ranks else hopeless:
                break
        return Costs(plain, step, verify, reading)


def check_k(k: int | None, max_position: int) -> None:
    if k is not None and k < 1:
        raise UserError(f"--speculate_k {k} must be 1 or more, or auto")
    if k is not None and k >= max_position:
        raise UserError(f"--speculate_k {k} exceeds the model's context of {max_position} positions")


def one_operator(model: Transformer) -> bool:
    """Whether all layers are one call already: compiling around it would save less than a compiled function's own call costs."""
    return model.device.type == "cpu" and kernels.ready() and not model.ranks


def verify_settings(model: Transformer, prefill_too: bool) -> dict:
    """What torch.compile is told for checking: as for decoding, but on a CPU one graph for every k."""
    settings = compile_settings(model, prefill_too)
    return settings if model.device.type == "cuda" else {**settings, "dynamic": None}


def summary(speculator: Speculator, plain_rate: float, rate: float) -> str:
    """The lines that a run ends with. plain_rate, rate: tokens/s of decoding without and with drafts."""
    found, costs = speculator.statistics, speculator.costs
    probs = [count / found.rounds if found.rounds else 0.0 for count in found.counts]
    lines = [f"Acceptance probs: {[round(p, 4) for p in probs]}", f"Mean Accepted: {found.mean_accepted:.4f}",
             f"Speed-up over plain decoding: {rate / plain_rate:.2f} x ({rate:.2f} against {plain_rate:.2f} tokens/sec), {found.rounds} rounds with drafts and "
             f"{found.plain} plain steps"]
    if costs and found.tested:
        a, c = found.acceptance, costs.draft / costs.plain
        best, k = costs.predicted(a)
        k = speculator.k or k
        says = f"{predicted_speedup(a, k, c, costs.verify[k] / costs.plain):.2f} x at k = {k} (v = {costs.verify[k] / costs.plain:.2f})" if k else "plain decoding is best"
        lines.append(f"The formula says: {says}, with a = {a:.3f} and c = {c:.3f}")
    return "\n".join(lines)
