"""From logits to tokens, and how the steps that do it are compiled."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import kernels
from cli import UserError
from model import Transformer

CANDIDATES = (256, 4096)             # what top_k rounds up to, because each number is compiled apart
RECOMPILE_LIMIT = 64                 # per step: sizes of the batch and of the KV cache, and five kinds of sampling
SMALLEST = torch.finfo(torch.float32).tiny
COLDEST = 1e-30                      # a temperature by which no logit overflows


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

    def choice(self, vocab_size: int, device: torch.device | str = "cpu") -> "Choice":
        """As a step takes it."""
        top_k, top_p = min(self.top_k or vocab_size, vocab_size), self.top_p or 1.0
        sizes = (n for n in CANDIDATES if top_k <= n < vocab_size)
        limits = max(self.temperature, COLDEST), top_k, max(top_p, SMALLEST) if top_p < 1 else torch.inf
        return Choice(next(sizes, vocab_size) if self.temperature else 0, top_k < vocab_size or top_p < 1,
                      torch.tensor(limits, dtype=torch.float32, device=device))


class Choice(NamedTuple):
    """What a step chooses a token from. The first two are compiled into it, the limits are data.

    candidates: how many tokens of a row may be drawn, and so how many random numbers it needs; 0 for argmax.
    cuts: whether top_k or top_p leaves any of them out.
    limits: fp32, the temperature, top_k and top_p: [3], or [B, 3] where rows differ.
    """
    candidates: int
    cuts: bool
    limits: Tensor


def shortlist(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """The candidates among logits [B, V]: their logits / T in fp32, -inf for what top_k and top_p leave out, and their
    ids; both [B, candidates]."""
    temperature, top_k, top_p = choice.limits[..., None].unbind(-2)                # [1] or [B, 1] each
    every = torch.arange(choice.candidates, device=logits.device)
    if not choice.cuts:
        return logits.float() / temperature, every.expand_as(logits)
    logits, ids = logits.topk(choice.candidates, dim=-1)           # sorted, the most probable first
    logits = (logits.float() / temperature).masked_fill(every >= top_k, -torch.inf)
    probs = logits.softmax(dim=-1)
    whole = probs.is_cuda and choice.candidates > CANDIDATES[-1]
    before = (called_cumsum(probs) if whole else probs.cumsum(dim=-1)) - probs     # of all more probable tokens
    return logits.masked_fill(before >= top_p, -torch.inf), ids


@torch.library.custom_op("qwen_fast::cumsum", mutates_args=())
def called_cumsum(x: Tensor) -> Tensor:
    """Over the last dimension. Opaque to the compiler: PyTorch 2.11's fails where it fuses a long one with sums."""
    return x.cumsum(dim=-1)


@called_cumsum.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def sample(logits: Tensor, choice: Choice, noise: Tensor) -> Tensor:
    """Draws ids [B, 1] from logits [B, V] by the Gumbel-max trick: argmax(logits / T - log E).

    noise: E, exponential, fp32 [B, candidates]."""
    if not choice.candidates:
        return logits.float().argmax(dim=-1, keepdim=True)
    logits, ids = shortlist(logits, choice)
    return ids.gather(-1, (logits - noise.log()).argmax(dim=-1, keepdim=True))


def exponential_noise(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    """fp32 [rows, columns], never 0."""
    noise = torch.empty(rows, columns, dtype=torch.float32, device=rng.device)
    return noise.exponential_(generator=rng).clamp_(min=SMALLEST)


# ---- compilation

def compile_step(step: Callable, model: Transformer, dynamic: bool | None = False,
                 prefill_too: bool = False) -> Callable:
    """A step of decoding, drafting or verifying, compiled: static shapes, unless dynamic on a CPU; CUDA graphs on CUDA.

    prefill_too: whether the process compiles prefill as well, whose code needs the compiler's vector instructions."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.run_gc_after_compile = False          # it looks through all that is loaded
    if model.device.type == "cuda":
        return RecordedStep(step, model)
    if runs_fused(model) and not prefill_too:
        expect_little_to_compile()
    return torch.compile(step, fullgraph=True, dynamic=dynamic)


class RecordedStep:
    """A compiled step on a GPU. With fused layers it is recorded as a CUDA graph, one for each kind of call, so that
    the host is done long before the device. Without, the compiler keeps graphs of its own, whose guards see any change.

    What it returns is overwritten by the next call."""

    def __init__(self, step: Callable, model: Transformer):
        # The tuning turns a product with one token into a fused multiply and sum, which reads weights faster.
        options: dict[str, Any] = {"coordinate_descent_tuning": True}
        self.by_compiler = torch.compile(step, fullgraph=True, dynamic=False,
                                         options=options | {"triton.cudagraphs": True})
        self.step = torch.compile(step, fullgraph=True, dynamic=False, options=options)
        self.model = model
        self.recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}
        self.tuned: set[int] = set()                 # for one token or for several

    def __call__(self, *args: Any) -> Any:
        """args: of the step, fused layers and the model among them."""
        fused = next((arg for arg in args if isinstance(arg, kernels.FusedLayers)), None)
        tokens = next(t.numel() for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_cuda)     # idx comes first
        if fused is None or tokens > fused.max_tokens or not self.model.is_unmodified_around_layers():
            if (few := min(tokens, 2)) not in self.tuned and tokens <= kernels.MAX_TOKENS:
                kernels.tune(None, self.model.linears(), tokens, self.model.dtype)
                self.tuned.add(few)
            torch.compiler.cudagraph_mark_step_begin()
            # Experts one by one await the device, which no graph can record (PyTorch 2.11 overlooks their tag).
            graphs = tokens * self.model.args.n_expert_per_token <= kernels.FEW_PAIRS
            step = self.by_compiler if graphs else self.step
            return step(*(None if isinstance(arg, kernels.FusedLayers) else arg for arg in args))
        flat, spec = tree_flatten([arg for arg in args if not isinstance(arg, kernels.FusedLayers)])
        inputs = [arg for arg in flat if isinstance(arg, Tensor) and arg.numel()]
        around = [t.data_ptr() for t in self.model.around_layers()]
        key = (kernels.key_of(fused), *around, spec, *((arg.shape, arg.dtype) if isinstance(arg, Tensor) else arg
                                                       for arg in flat))
        if key not in self.recorded:                 # those of tensors that are gone will not come back
            alive = kernels.fused_alive()
            self.recorded = {known: step for known, step in self.recorded.items() if known[0] in alive}
            self.recorded[key] = self.record(fused, args, inputs, tokens)
        graph, static, outputs = self.recorded[key]
        torch._foreach_copy_(static, inputs)         # pyright: ignore[reportPrivateImportUsage]
        graph.replay()
        return outputs

    def record(self, fused: kernels.FusedLayers, args: tuple, inputs: list[Tensor], tokens: int) -> tuple:
        kernels.tune(fused, self.model.linears()[-1:], tokens, self.model.dtype)
        static = {id(t): t.clone() for t in inputs}
        args = tree_map(lambda arg: static[id(arg)] if isinstance(arg, Tensor) and id(arg) in static else arg, args)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):              # compiles; twice, because the first call may still be measuring
            self.step(*args)
            self.step(*args)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.step(*args)
        return graph, list(static.values()), outputs


def runs_fused(model: Transformer) -> bool:
    """Whether all layers are one operator, which leaves little to compile."""
    return model.device.type == "cpu" and kernels.available() and not model.ranks


def expect_little_to_compile() -> None:
    """Spares three seconds of precompiling headers, and ten of probing for vector instructions.

    The latter holds for the whole process, so only before the compiler has tried: later code must agree with
    earlier."""
    from torch._inductor import config, cpu_vec_isa
    config.cpp_cache_precompile_headers = False
    if cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0:
        config.cpp.vec_isa_ok = False
