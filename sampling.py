"""From logits to tokens, and how the steps that do it are compiled."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from cli import UserError
from model import Transformer


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is argmax. top_k and top_p keep the most probable tokens; None keeps all."""
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None

    def check(self) -> None:
        """Errors: UserError."""
        if not self.temperature >= 0:
            raise UserError(f"{self.temperature} must be 0 or more", "temperature")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"{self.top_k} must be 1 or more", "top_k")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"{self.top_p} must be more than 0 and at most 1", "top_p")

    def candidates(self, vocab_size: int) -> int:
        """How many tokens of a row may be drawn, and so how many random numbers it needs."""
        return 0 if self.temperature == 0 else min(self.top_k or vocab_size, vocab_size)


def shortlist(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn from logits [B, V] at a temperature above 0: their logits / T in fp32, -inf for what
    top_p leaves out, and their ids; both [B, candidates]."""
    V, n = logits.size(-1), sampling.candidates(logits.size(-1))
    logits = logits.float() / sampling.temperature
    if n == V and sampling.top_p is None:
        return logits, torch.arange(V, device=logits.device).expand_as(logits)
    logits, ids = logits.topk(n, dim=-1)                           # sorted, the most probable first
    if sampling.top_p is not None and sampling.top_p < 1:
        probs = logits.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs                      # of all more probable tokens together
        logits = logits.masked_fill(before >= sampling.top_p, -torch.inf)
    return logits, ids


def sample(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Draws ids [B, 1] from logits [B, V] by the Gumbel-max trick: argmax(logits / T - log E).

    noise: E, exponential, fp32 [B, candidates]."""
    if sampling.temperature == 0:
        return logits.float().argmax(dim=-1, keepdim=True)
    logits, ids = shortlist(logits, sampling)
    return ids.gather(-1, (logits - noise.log()).argmax(dim=-1, keepdim=True))


def exponential_noise(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    """fp32 [rows, columns], never 0."""
    noise = torch.empty(rows, columns, dtype=torch.float32, device=rng.device)
    return noise.exponential_(generator=rng).clamp_(min=torch.finfo(torch.float32).tiny)


# ---- compilation

def compile_step(step: Callable, model: Transformer, dynamic: bool | None = False,
                 prefill_too: bool = False) -> Callable:
    """A step of decoding, drafting or verifying, compiled: static shapes, unless dynamic on a CPU; CUDA graphs on CUDA.

    prefill_too: whether the process compiles prefill as well, whose code needs the compiler's vector instructions."""
    if model.device.type == "cuda":
        return torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")
    if runs_fused(model) and not prefill_too:
        skip_vector_instructions()
    return torch.compile(step, fullgraph=True, dynamic=dynamic)


def runs_fused(model: Transformer) -> bool:
    """Whether all layers are one operator, which leaves little to compile."""
    return model.device.type == "cpu" and kernels.available() and not model.ranks


def skip_vector_instructions() -> None:
    """Spares ten seconds of the compiler's probing for vector instructions, where little is left to compile.

    It holds for the whole process, so only before the compiler has tried: later code must agree with earlier."""
    from torch._inductor import config, cpu_vec_isa
    if cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0:
        config.cpp.vec_isa_ok = False


def begin_step(device: torch.device) -> None:
    """Tells CUDA graphs that what they returned before is no longer needed."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
