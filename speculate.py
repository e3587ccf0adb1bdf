"""Speculative decoding: something cheap drafts k tokens, and the model verifies them all in one pass; the output keeps
the model's own distribution (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).

Let a be the acceptance rate (the probability that a drafted token is accepted), c the cost of a draft step and v(k)
that of a pass over k + 1 tokens, both in steps of plain decoding. A round yields 1 + a + ... + a^k tokens, so

    speed-up = (1 - a^(k+1)) / ((1 - a) (v(k) + k c))
"""
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

import kernels
from cli import UserError
from drafts import Decoder, Draft, Drafter, ModelDraft, MTPDraft, PromptLookup
from sampling import Choice, compile_step, exponential_noise, runs_fused, shortlist
from tokenizer import same_tokenizer

AUTO_K = range(1, 9)                 # the numbers of drafted tokens to choose from
AUTO_K_CUDA = (1, 2, 4, 8)           # there each is compiled apart


def expected_tokens(a: float, k: int) -> float:
    """Tokens that a round with k drafted ones yields: 1 + a + ... + a^k."""
    return k + 1.0 if a >= 1 else (1 - a ** (k + 1)) / (1 - a)


def predicted_speedup(a: float, k: int, c: float, v: float) -> float:
    return expected_tokens(a, k) / (v + k * c)


# ---- verification, on the device

def accept_greedy(logits: Tensor, drafted: Tensor) -> Tensor:
    """int64 [k + 2]: n, how many of drafted [k] the logits [k + 1, V] would choose, and tokens, n + 1 of them valid."""
    best = logits.float().argmax(dim=-1)
    n = (best[:-1] == drafted).long().cumprod(0).sum()
    return torch.cat((n[None], best))


def accept(logits: Tensor, drafted: Tensor, choice: Choice, probs: Tensor, ids: Tensor, uniform: Tensor,
           noise: Tensor) -> Tensor:
    """The same for sampling; all probabilities in fp32.

    Token i, drawn from the draft's distribution q_i, is accepted with probability min(1, p_i / q_i); the first rejected
    one is replaced by a draw from max(0, p - q), and after the last a further one is drawn from p.
    probs, ids [k, m]: q on the m tokens that could have been drawn.
    uniform [k] in [0, 1).  noise [1, candidates]: exponential.
    """
    k, V = len(drafted), logits.size(-1)
    scaled, at = shortlist(logits, choice)                             # [k + 1, candidates]
    p = scaled.softmax(dim=-1)
    p_drafted = p[:-1].masked_fill(at[:-1] != drafted[:, None], 0).sum(-1)
    q_drafted = probs.masked_fill(ids != drafted[:, None], 0).sum(-1)
    n = (uniform * q_drafted < p_drafted).long().cumprod(0).sum()[None]
    rejected = n.clamp(max=k - 1)
    q = torch.zeros(V, dtype=p.dtype, device=p.device).scatter(0, ids[rejected][0], probs[rejected][0])
    p, at = p[n], at[n]                                                # at the first token that is not accepted
    rest = (p - q[at] * (n < k)).clamp(min=0)
    rest = torch.where(rest.sum() > 0, rest, p)
    last = at.gather(1, (rest / noise).argmax(dim=-1, keepdim=True))[0]
    tokens = torch.cat((drafted, last))
    return torch.cat((n, torch.where(torch.arange(k + 1, device=n.device) < n, tokens, last)))


# ---- how many to draft

@dataclass
class KPolicy:
    """Chooses k by what it measures: the acceptance rate, and the seconds of a round with each k."""
    plain_s: float                               # a step of plain decoding
    draft_s: float                               # a draft step
    verify_s: dict[int, float]                   # by k, a pass over k + 1 tokens
    read_s: float = 0.0                          # per token that the draft must read before it can begin
    round_s: dict[int, float] = field(default_factory=dict)      # by k, a whole round as last seen; 0: a plain step
    recent: set[int] = field(default_factory=set)                # the k timed since the last plain step
    accepted: float = 0.0                        # drafted tokens accepted and tested of late (exponentially weighted)
    tested: float = 0.0
    overspent_s: float = 0.0                     # what drafting cost more than plain decoding would have
    num_generated: int = 0                       # of this request
    since_plain: int = 0
    MEMORY = 0.98                                # per token: the acceptance rate is that of the last 50 or so
    PRIOR = (2.1, 3.0)                           # accepted, tested: hopeful enough for a draft to be tried
    MARGIN = 1.03                                # two runs of the same program differ by as much
    BUDGET = (0.5, 0.012)                        # plain steps that trying may cost: at once, and per generated token
    SAVINGS = 8                                  # plain steps of earlier gain that may be risked as well
    RECHECK = 24                                 # rounds after which a plain step is timed again

    def __post_init__(self) -> None:
        self.round_s = {0: self.plain_s} | {k: v + k * self.draft_s for k, v in self.verify_s.items()}

    @property
    def acceptance(self) -> float:
        return (self.accepted + self.PRIOR[0]) / (self.tested + self.PRIOR[1])

    def begin_request(self) -> None:
        self.overspent_s, self.num_generated, self.since_plain = min(0.0, self.overspent_s), 0, 0

    def choose(self, left: int, uncached: int) -> int:
        """k for the next round, 0 for a plain step. left: tokens to come. uncached: what the draft must read first."""
        choices = [k for k in self.verify_s if k < left]
        budget = self.round_s[0] * (self.BUDGET[0] + self.BUDGET[1] * self.num_generated)
        if not choices or self.since_plain >= self.RECHECK or self.overspent_s > budget:
            return 0
        gains = {k: expected_tokens(self.acceptance, k) * self.round_s[0] / self.round_s[k] for k in choices}
        best = max(gains, key=gains.__getitem__)
        gain = gains[best]
        saved_s = left * self.round_s[0] * (1 - 1 / gain)
        pays = gain > self.MARGIN and saved_s > 1.5 * uncached * self.read_s             # 1.5: the text may end early
        return best if pays else 0

    def record(self, k: int, accepted: int, seconds: float, catching_up: bool = False) -> None:
        """Learns from a round; the time of one in which the draft had to catch up says nothing about the next."""
        memory = self.MEMORY ** (accepted + 1)
        self.accepted, self.tested = self.accepted * memory + accepted, self.tested * memory + min(k, accepted + 1)
        self.num_generated += accepted + 1
        self.since_plain = self.since_plain + 1 if k else 0
        if catching_up:
            return
        known = self.round_s.setdefault(k, seconds)
        weight = 0.1 if k in self.recent else 0.5                # an old figure counts for less, a stall for little:
        self.round_s[k] = known + weight * (min(max(seconds, known / 2), 1.25 * known) - known)
        if k:
            spent_s = seconds - (accepted + 1) * self.round_s[0]
            self.overspent_s = max(-self.SAVINGS * self.round_s[0], self.overspent_s + spent_s)
            self.recent = self.recent - {0} | {k}
        else:
            for other in self.round_s.keys() - self.recent - {0}:                   # as the machine's speed changes
                self.round_s[other] *= self.round_s[0] / known
            self.recent = {0}


def median_seconds(call: Callable[[], object], device: torch.device, times: int) -> float:
    """Over `times` calls after a first one."""
    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start
    timed()
    return statistics.median(timed() for _ in range(times))


# ---- rounds

@dataclass
class Statistics:
    """counts[n]: rounds with drafted tokens of which n were accepted."""
    counts: list[int] = field(default_factory=list)
    tested: int = 0
    plain_steps: int = 0

    def add(self, k: int, accepted: int) -> None:
        if not k:
            self.plain_steps += 1
            return
        self.counts += [0] * (k + 1 - len(self.counts))
        self.counts[accepted] += 1
        self.tested += min(k, accepted + 1)

    @property
    def rounds(self) -> int:
        return sum(self.counts)

    @property
    def passes(self) -> int:
        """Passes of the verifying model."""
        return self.rounds + self.plain_steps

    @property
    def mean_accepted(self) -> float:
        return sum(n * count for n, count in enumerate(self.counts)) / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> float:
        """a of the formula."""
        return self.mean_accepted * self.rounds / self.tested if self.tested else 0.0


class Speculator:
    """Rounds of drafting and verification on an engine's text, batch 1 only.

    draft: the draft model's engine, "mtp" for the model's own head, or "ngram" for prompt lookup.
    k: drafted tokens a round; None chooses it by timing, so that a seed fixes the text at temperature 0 only.
    Errors: UserError.
    """

    def __init__(self, engine: Decoder, draft: Decoder | str, k: int | None):
        check_k(k, engine.model.args.max_position)
        self.engine, self.model, self.k = engine, engine.model, k
        self.draft_engine, self.drafter = None, cast(Drafter, PromptLookup(engine.model.device))
        if draft == "mtp":
            self.drafter = MTPDraft(engine, engine.compiled)
        elif not isinstance(draft, str):
            check_draft(engine, draft)
            self.draft_engine, self.drafter = draft, ModelDraft(draft, engine.vocab_size, engine.compiled)
        self.verify = self.verify_step
        if engine.compiled and not runs_fused(self.model):       # on a CPU one compilation serves every k
            self.verify = compile_step(self.verify_step, self.model, dynamic=None, prefill_too=engine.compiled_prefill)
        self.follows_first = bool(self.draft_engine and self.model.ranks and not self.draft_engine.model.ranks)
        self.enabled, self.measures = True, k is None            # measures: whether the first request times the steps
        self.policy: KPolicy | None = None
        self.statistics = Statistics()

    @property
    def lookahead(self) -> int:
        """How many positions past its end a text may need in the KV caches."""
        return self.k or AUTO_K[-1]

    def run_eagerly(self) -> None:
        self.verify = self.verify_step
        self.drafter.run_eagerly()

    def verify_step(self, fused: kernels.FusedLayers | None, idx: Tensor, input_pos: Tensor, choice: Choice,
                    probs: Tensor | None, ids: Tensor | None, uniform: Tensor, noise: Tensor) -> Tensor:
        """The last token and the drafted ones, idx [1, k + 1] at input_pos [1, k + 1] -> int64 [k + 2], see accept."""
        everywhere = torch.arange(idx.size(1), device=idx.device)
        logits = self.model(idx, input_pos, everywhere, fused)[0, :, :self.engine.vocab_size]
        drafted = idx[0, 1:]
        if not choice.candidates:
            return accept_greedy(logits, drafted)
        if probs is None or ids is None:
            probs, ids = torch.ones_like(uniform)[:, None], drafted[:, None]
        return accept(logits, drafted, choice, probs, ids, uniform, noise)

    def decode(self, first: int, n: int, choice: Choice, rng: torch.Generator, keep_cache: bool) -> Iterator[int]:
        """n tokens that follow what the engine has cached, from `first` on. keep_cache: the draft has cached them."""
        text = [*self.engine.cached, first]
        yield first
        if self.measures and self.policy is None:
            self.policy = self.measure(choice, rng)
        self.drafter.begin(text, keep_cache)
        if self.policy:
            self.policy.begin_request()
        left = n - 1
        while left:
            new = self.round(text, left, choice, rng)[:left]
            left -= len(new)
            yield from new

    def round(self, text: list[int], left: int, choice: Choice, rng: torch.Generator) -> list[int]:
        """Extends the text, its ids, in place by one token or several, and the caches by all but the last."""
        start = time.perf_counter()
        before, uncached = len(text), self.drafter.uncached()
        k = self.k or (self.policy.choose(left, uncached) if self.policy else 0)
        if self.model.ranks and not self.k:
            k = self.model.ranks.from_first(k)
        if left == 1 or self.model.device.type == "cpu":         # on a GPU only the shapes that were compiled
            k = min(k, left - 1)
        draft = self.drafter.propose(k, choice, rng) if k else None
        if draft and self.follows_first:
            draft = draft.of_first(self.model.ranks)
        if draft is None:
            k, accepted = 0, 0
            tokens = self.engine.step(*self.place(text[-1:], before - 1), choice, rng).flatten().tolist()
        else:
            accepted, *tokens = self.verify_draft(text, draft, choice, rng).tolist()
        text += tokens[:accepted + 1]
        self.engine.cached = text[:-1]
        self.drafter.follow(before, k, accepted)
        self.statistics.add(k, accepted)
        if self.policy:
            self.policy.record(k, accepted, time.perf_counter() - start, catching_up=k > 0 and uncached > 0)
        return text[before:]

    def place(self, tokens: list[int], position: int) -> tuple[Tensor, Tensor]:
        """Tokens and their positions from `position` on, each [1, S], on the device."""
        input_pos = torch.arange(position, position + len(tokens), device=self.model.device)[None]
        return torch.tensor([tokens], device=input_pos.device), input_pos

    def verify_draft(self, text: list[int], draft: Draft, choice: Choice, rng: torch.Generator) -> Tensor:
        k, device = draft.tokens.size(1), self.model.device
        last, first_pos = self.place(text[-1:], len(text) - 1)
        idx, input_pos = torch.cat((last, draft.tokens), dim=1), first_pos + torch.arange(k + 1, device=device)
        uniform = torch.rand(k, dtype=torch.float32, device=device, generator=rng)
        noise = exponential_noise(1, choice.candidates, rng)
        if device.type == "cpu" and self.verify != self.verify_step:           # compiled
            for tensor, dim in ((idx, 1), (input_pos, 1), (uniform, 0), (draft.probs, 0), (draft.ids, 0)):
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return self.verify(self.engine.fused, idx, input_pos, choice, draft.probs, draft.ids, uniform, noise)

    def measure(self, choice: Choice, rng: torch.Generator) -> KPolicy:
        """Times plain steps, draft steps and passes at the text's present end; what they cache is overwritten later."""
        device, text = self.model.device, [*self.engine.cached, 0]
        idx, input_pos = self.place(text[-1:], len(text) - 1)
        plain_s = median_seconds(lambda: self.engine.step(idx, input_pos.clone(), choice, rng), device, 7)
        draft_s = read_s = 0.0
        learned = not isinstance(drafter := self.drafter, PromptLookup)
        if isinstance(drafter, ModelDraft):
            read_s = median_seconds(lambda: drafter.engine.prefill([text[:-1]], False), device, 1) / len(text)
        if learned:
            drafter.begin(text, True)
            few = min(4, self.lookahead)                         # more might not fit into the draft's KV cache
            draft_s = median_seconds(lambda: drafter.propose(few, choice, rng), device, 5) / few
        verify_s: dict[int, float] = {}
        for k in [self.k] if self.k else AUTO_K if device.type == "cpu" else AUTO_K_CUDA:
            draft = (cast(Draft, drafter.propose(k, choice, rng)) if learned
                     else Draft(torch.zeros(1, k, dtype=torch.int64, device=device)))
            verify_s[k] = median_seconds(functools.partial(self.verify_draft, text, draft, choice, rng), device, 3)
            rates = [(k + 1) / (v + k * draft_s) for k, v in verify_s.items()]           # if all were accepted
            hopeless = rates[-1] < 0.9 * max(rates)                                      # and so are larger k
            if self.model.ranks.from_first(hopeless) if self.model.ranks else hopeless:
                break
        return KPolicy(plain_s, draft_s, verify_s, read_s)


def check_k(k: int | None, max_position: int) -> None:
    if k is not None and k < 1:
        raise UserError(f"{k} must be 1 or more, or auto", "speculate_k")
    if k is not None and k >= max_position:
        raise UserError(f"{k} exceeds the model's context of {max_position} positions", "speculate_k")


def check_draft(engine: Decoder, draft: Decoder) -> None:
    """Errors: UserError, for a draft that another model's text cannot be drafted with."""
    field = "draft_checkpoint_path"
    if engine.tokenizer and draft.tokenizer and (difference := same_tokenizer(engine.tokenizer, draft.tokenizer)):
        raise UserError(f"has another tokenizer than the model: {difference}", field)
    rows = draft.model.args.vocab_size
    if rows < engine.vocab_size:
        raise UserError(f"has an embedding of {rows} rows, and the tokenizer has {engine.vocab_size} tokens", field)
    if draft.model.device != engine.model.device:
        raise UserError(f"is on {draft.model.device}, and the model on {engine.model.device}", field)


def summary(speculator: Speculator, plain_rate: float, rate: float) -> str:
    """The lines that a run ends with. plain_rate, rate: decoded tokens/s without and with drafts."""
    found, policy = speculator.statistics, speculator.policy
    probs = [round(count / found.rounds, 4) if found.rounds else 0.0 for count in found.counts]
    lines = [f"Acceptance probs: {probs}", f"Mean Accepted: {found.mean_accepted:.4f}",
             f"Speed-up over plain decoding: {rate / plain_rate:.2f} x ({rate:.2f} against {plain_rate:.2f} "
             f"tokens/sec), {found.rounds} rounds with drafts and {found.plain_steps} plain steps"]
    if policy and found.tested:
        a, c = found.acceptance, policy.draft_s / policy.plain_s
        v = {k: seconds / policy.plain_s for k, seconds in policy.verify_s.items()}
        choices = [speculator.k] if speculator.k else [0, *v]
        speedup, k = max((predicted_speedup(a, k, c, v[k]) if k else 1.0, k) for k in choices)
        says = f"{speedup:.2f} x at k = {k} (v = {v[k]:.2f})" if k else "plain decoding is best"
        lines.append(f"The formula says: {says}, with a = {a:.3f} and c = {c:.3f}")
    return "\n".join(lines)
