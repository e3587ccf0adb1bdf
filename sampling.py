"""From logits to tokens."""
from dataclasses import dataclass

import torch
from torch import Tensor

from cli import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is argmax. top_k and top_p keep the most probable tokens; None keeps all."""
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None

    def check(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"--temperature {self.temperature} must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k {self.top_k} must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p} must be more than 0 and at most 1")

    def candidates(self, vocab: int) -> int:
        """How many random numbers a row needs."""
        return 0 if self.temperature == 0 else min(self.top_k or vocab, vocab)


def shortlist(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn from logits [R, V], at a temperature above 0: logits / T in fp32, -inf for what top_p leaves out, and ids, both [R, n]."""
    V, n = logits.size(-1), sampling.candidates(logits.size(-1))
    logits = logits.float() / sampling.temperature
    if n == V and sampling.top_p is None:
        return logits, torch.arange(V, device=logits.device).expand_as(logits)
    logits, ids = logits.topk(n, dim=-1)                           # sorted, the most probable first
    if sampling.top_p is not None and sampling.top_p < 1:
        probs = logits.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs                      # what the more probable tokens hold together
        logits = logits.masked_fill(before >= sampling.top_p, -torch.inf)
    return logits, ids


def sample(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Draws ids [B, 1] from logits [B, V] by the Gumbel-max trick: argmax(logits / T - log E), E exponential noise [B, candidates] in fp32."""
    if sampling.temperature == 0:
        return logits.float().argmax(dim=-1, keepdim=True)
    logits, ids = shortlist(logits, sampling)
    return ids.gather(-1, (logits - noise.log()).argmax(dim=-1, keepdim=True))


def exponential(rows: int, columns: int, source: torch.Generator) -> Tensor:
    """fp32 [rows, columns] of exponential noise, never 0."""
    drawn = torch.empty(rows, columns, dtype=torch.float32, device=source.device)
    return drawn.exponential_(generator=source).clamp_(min=torch.finfo(torch.float32).tiny)
