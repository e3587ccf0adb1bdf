"""What drafts tokens for speculative decoding (speculate.py): a smaller model, the checkpoint's own head for
multi-token prediction, or the text itself.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import tp
from model import Transformer
from sampling import Choice, compile_step, exponential_noise, runs_fused, shortlist
from tokenizer import Tokenizer

DRAFT_ROWS = 1 << 15                 # tokens that MTPDraft drafts: the first, which are the most common (merged first)
LOOKUP_LENGTHS = (4, 3, 2)           # how many of the last tokens prompt lookup looks for, the most telling first


class Decoder(Protocol):
    """What speculation needs of a model with a KV cache: generate.Engine has it."""
    model: Transformer
    tokenizer: Tokenizer
    vocab_size: int
    compiled: bool
    compiled_prefill: bool
    cached: list[int]
    fused: kernels.FusedLayers | None

    def prefill(self, rows: Sequence[Sequence[int]], keep_cache: bool) -> Tensor: ...
    def resume(self, prompt: Sequence[int]) -> int: ...
    def step(self, idx: Tensor, input_pos: Tensor, choice: Choice, rng: torch.Generator) -> Tensor: ...
    def reserve(self, batch: int, max_seq_length: int) -> None: ...
    def run_eagerly(self) -> None: ...
    def invalidate(self) -> None: ...


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@dataclass
class Draft:
    """Drafted tokens [1, k], and the distributions that they were drawn from (see accept), or None if certain."""
    tokens: Tensor
    probs: Tensor | None = None
    ids: Tensor | None = None

    def of_first(self, ranks: tp.Ranks) -> "Draft":
        """Rank 0's draft, on every rank."""
        def received(t: Tensor | None) -> Tensor | None:
            return None if t is None else tp.broadcast(t, ranks.group)
        return Draft(tp.broadcast(self.tokens, ranks.group), received(self.probs), received(self.ids))


class Drafter:
    """What drafts for a text, which begins with what the verifying model has cached."""
    filled: int | None = None            # how many positions have all that it needs; None: it needs nothing

    def prepare(self) -> None:
        """Before a request, when the KV caches are large enough."""

    def begin(self, text: list[int], keep_cache: bool) -> None:
        """text: all of it, which the Speculator extends. keep_cache: what is known of it may be used."""
        self.text = text

    def uncached(self) -> int:
        """How many tokens must be read before drafting, beyond those that a draft's first step reads."""
        return 0

    def propose(self, k: int, choice: Choice, rng: torch.Generator) -> Draft | None:
        raise NotImplementedError

    def follow(self, before: int, k: int, accepted: int) -> None:
        """After a round with k drafted tokens, of which so many were accepted, that extended a text of `before`."""

    def read(self, prompt: Sequence[int], begin: int, end: int) -> None:
        """After the verifying model has read these tokens of a prompt."""

    def run_eagerly(self) -> None:
        """For a machine without a working compiler."""


class ModelDraft(Drafter):
    """A smaller model drafts. Its KV cache follows the text: rejected tokens are written over, never taken back. What
    DeltaNets remember is taken back, and the next round's first step reads the accepted tokens again."""

    def __init__(self, engine: Decoder, vocab_size: int, compile: bool):
        self.engine, self.vocab_size = engine, vocab_size
        self.before: list[list[Tensor]] = []     # DeltaNets' states, while they are ahead of what the engine has cached
        self.text: list[int] = []
        self.step = self.draft_step
        if compile and not runs_fused(engine.model):
            self.step = compile_step(self.draft_step, engine.model)

    def draft_step(self, fused: kernels.FusedLayers | None, idx: Tensor, input_pos: Tensor, choice: Choice,
                   noise: Tensor) -> tuple[Tensor, ...]:
        """The token [1, 1] after idx [1, S], and unless greedy its distribution [1, m] with ids."""
        return draw(self.engine.model(idx, input_pos, fused=fused)[:, -1, :self.vocab_size], choice, noise)

    def run_eagerly(self) -> None:
        self.step = self.draft_step

    def begin(self, text: list[int], keep_cache: bool) -> None:
        self.text = text
        self.take_back()
        self.engine.cached = text[:self.engine.resume(text[:-1]) if keep_cache else 0]

    def take_back(self) -> None:
        if self.before:
            self.engine.model.restore(self.before)
        self.before = []

    def uncached(self) -> int:
        states, missing = self.engine.model.delta_states(), len(self.text) - 2 - len(self.engine.cached)
        return max(0, missing) if not states or missing + 2 > states[0].max_pending else 0

    def propose(self, k: int, choice: Choice, rng: torch.Generator) -> Draft:
        """The first step reads two tokens: if all k were accepted, the last drafted one is unread (see follow)."""
        self.take_back()
        if self.uncached():
            self.engine.prefill([self.text[:-1]], keep_cache=True)
        begin, device = min(max(0, len(self.text) - 2), len(self.engine.cached)), self.engine.model.device
        idx = torch.tensor([self.text[begin:]], device=device)
        input_pos = torch.arange(begin, len(self.text), device=device)[None]
        noise = exponential_noise(k, choice.candidates, rng)
        steps = []
        for i in range(k):
            step = self.step(self.engine.fused, idx, input_pos, choice, noise[i:i + 1])
            steps.append([t.clone() for t in step] if device.type == "cuda" else step)
            if not i and (before := self.engine.model.save()):
                self.before, self.engine.cached = before, list(self.text)
            idx, input_pos = steps[-1][0], input_pos[:, -1:] + 1
        tokens, *distribution = (torch.cat(column, dim=0) for column in zip(*steps))
        return Draft(tokens.view(1, -1), *distribution)

    def follow(self, before: int, k: int, accepted: int) -> None:
        """The cache keeps the accepted tokens. The last drafted one was never read."""
        if k and not self.before:
            self.engine.cached = self.text[:before + min(accepted, k - 1)]
        self.take_back()


def draw(logits: Tensor, choice: Choice, noise: Tensor) -> tuple[Tensor, ...]:
    """A token [1, 1] from logits [1, V] and, unless it is the most probable, its distribution [1, m] with ids."""
    if not choice.candidates:
        return (logits.float().argmax(dim=-1, keepdim=True),)
    scaled, ids = shortlist(logits, choice)
    return ids.gather(-1, (scaled - noise.log()).argmax(dim=-1, keepdim=True)), scaled.softmax(dim=-1), ids


class MTPDraft(Drafter):
    """The model's own head for multi-token prediction drafts, see model.MTPHead. Slot p of its KV cache is for token
    p + 1 and what the model made of token p. The head can but guess the latter of drafted tokens: once they are
    verified, their slots are filled again."""

    def __init__(self, engine: Decoder, compile: bool):
        self.engine, self.model, self.filled = engine, engine.model, 0     # filled: slots of the KV cache
        self.hidden = torch.empty(0)             # of the tokens from position `filled` on, [1, n, C]
        self.fused: kernels.FusedLayers | None = None
        self.step = self.draft_step
        if compile and not runs_fused(self.model):
            self.step = compile_step(self.draft_step, self.model)

    def run_eagerly(self) -> None:
        self.step = self.draft_step

    def prepare(self) -> None:
        self.fused = self.model.fuse_mtp()

    def draft_step(self, fused: kernels.FusedLayers | None, idx: Tensor, hidden: Tensor, input_pos: Tensor,
                   choice: Choice, noise: Tensor) -> tuple[Tensor, ...]:
        """The hidden state [1, 1, C] that is expected of the last of idx [1, S], then as draw returns it."""
        expected = self.model.draft(idx, hidden, input_pos, fused)[:, -1:]
        rows = None if self.model.ranks else DRAFT_ROWS      # a rank holds few of them or none of the commonest
        logits = self.model.gather(self.model.head(expected, rows))[:, -1, :self.engine.vocab_size]
        missing = choice.candidates - logits.size(-1)
        return expected, *draw(F.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits, choice, noise)

    def read(self, prompt: Sequence[int], begin: int, end: int) -> None:
        last = min(end, len(prompt) - 1)         # the slot of the prompt's last token waits for the token after it
        hidden, device = self.model.hidden_states[:1, :end - begin], self.model.device
        if last > begin:
            idx, input_pos = torch.tensor([prompt[begin + 1:last + 1]]), torch.arange(begin, last)[None]
            self.model.draft(idx.to(device), hidden[:, :last - begin], input_pos.to(device), self.fused)
        self.filled, self.hidden = last, hidden[:, last - begin:].clone()

    def uncached(self) -> int:
        return max(0, self.hidden.size(1) - 16)

    def propose(self, k: int, choice: Choice, rng: torch.Generator) -> Draft:
        device, begin = self.model.device, self.filled or 0
        idx, hidden = torch.tensor([self.text[begin + 1:]], device=device), self.hidden
        input_pos = torch.arange(begin, len(self.text) - 1, device=device)[None]
        noise = exponential_noise(k, choice.candidates, rng)
        steps = []
        for i in range(k):
            hidden, *drawn = (t.clone() for t in self.step(self.fused, idx, hidden, input_pos, choice, noise[i:i + 1]))
            steps.append(drawn)
            idx, input_pos = drawn[0], input_pos[:, -1:] + 1
        tokens, *distribution = (torch.cat(column, dim=0) for column in zip(*steps))
        return Draft(tokens.view(1, -1), *distribution)

    def follow(self, before: int, k: int, accepted: int) -> None:
        """hidden_states are of the text's last token and the drafted ones. The slots before are filled by a draft."""
        new = self.model.hidden_states[:1, :accepted + 1].clone()
        self.hidden = new if k else torch.cat((self.hidden, new), dim=1)
        self.filled = before - 1 if k else self.filled


class PromptLookup(Drafter):
    """No model drafts: what followed the last tokens where they stood before."""

    def __init__(self, device: torch.device):
        self.device = device
        self.begin([], False)

    def begin(self, text: list[int], keep_cache: bool) -> None:
        self.text, self.indexed = text, 0
        self.followers: dict[tuple[int, ...], int] = {}          # n-gram -> the position after it, earlier on

    def propose(self, k: int, choice: Choice, rng: torch.Generator) -> Draft | None:
        text = self.text
        for end in range(self.indexed + 1, len(text)):
            for n in LOOKUP_LENGTHS:
                if n <= end:
                    self.followers[tuple(text[end - n:end])] = end
        self.indexed = max(self.indexed, len(text) - 1)
        found = (self.followers.get(tuple(text[-n:])) for n in LOOKUP_LENGTHS if n <= len(text))
        start = next((position for position in found if position is not None), None)
        if start is None:
            return None
        period = len(text) - start                               # a match that overlaps the end goes on repeating
        return Draft(torch.tensor([[text[start + i % period] for i in range(k)]], device=self.device))
