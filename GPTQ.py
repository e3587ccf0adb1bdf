"""GPTQ: linears quantized column by column, the error of each made up for by those that follow (Frantar et al. 2022, arXiv 2210.17323).

The model is gone through linear by linear in the order of computation, and each sees what the already quantized ones before it produce. The number
formats are formats.py's: a linear comes with fit (levels for a group of columns) and round_to (weights to these levels).

Shapes: B batch, S sequence, C model dim, N and K the rows and columns of a weight, G the columns that share a scale.
"""
import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config import rope_frequencies
from cli import UserError
from formats import check_finite
from model import KVCache, Linear, Transformer, TransformerBlock

LINEARS = {"attention": ("wqkv", "wo"), "feed_forward": ("w13", "w2")}             # of a block's halves, in the order of computation
BATCH_TOKENS = 4096               # that go through a block at a time
KEPT_BYTES = 1 << 29              # inputs of a linear that are kept rather than computed again
COLUMNS = 1024                    # of an inverse, found together


class Target(Protocol):
    """The linear that a weight is quantized for: a formats.QuantizedLinear."""
    weight: Tensor
    in_features: int
    out_features: int
    groupsize: int                # columns that share levels

    def fit(self, weight: Tensor, importance: Tensor) -> Any:
        """Levels for the columns [N, G] of a group, whose squared errors count by importance [G]."""

    def round_to(self, levels: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest of the levels to each weight [N, g]: their numbers, and themselves in fp32."""

    def assemble(self, q: Tensor, levels: list[Any]) -> dict[str, Tensor]:
        """The linear's buffers from the numbers [N, K] and the levels of each group."""


@dataclass(frozen=True)
class Options:
    percdamp: float = 0.01        # of the Hessian's mean diagonal, added to its diagonal
    blocksize: int = 128          # columns whose errors reach the rest of the matrix together
    act_order: bool = False       # groups, and the columns in each, by falling activation


def inverse_factor(hessian: Tensor, percdamp: float, name: str = "") -> Tensor:
    """Upper triangular U, fp32, with U^T U the inverse of the damped Hessian [K, K]. The damping is raised until that is positive definite."""
    # with the order of the columns reversed, the lower factor of a matrix is the upper factor that U is the inverse of
    hessian = hessian.double().flip(0, 1)
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0          # an input that never differs from 0 decides nothing: its weights are rounded to nearest
    mean = diagonal[~dead].mean().item() if not dead.all() else 1.0
    diagonal[dead] = mean
    damping = percdamp * mean
    for _ in range(8):
        hessian.diagonal().copy_(diagonal + damping)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            del hessian
            return inverse_of_upper(lower.flip(0, 1))
        damping = max(10 * damping, 1e-4 * mean)
        tqdm.write(f"{name}: the Hessian is not positive definite; damping raised to {damping / mean:.2%} of its diagonal", file=sys.stderr)
    raise UserError(f"{name}: the Hessian stays indefinite: the calibration's activations are too large for fp32")


def inverse_of_upper(upper: Tensor) -> Tensor:
    """The inverse, fp32, of an upper triangular matrix [K, K]."""
    inverse = torch.zeros_like(upper, dtype=torch.float32)
    for begin in range(0, len(upper), COLUMNS):
        end = min(begin + COLUMNS, len(upper))
        unit = torch.zeros_like(upper[:end, begin:end])
        unit[begin:].fill_diagonal_(1)
        inverse[:end, begin:end] = torch.linalg.solve_triangular(upper[:end, :end], unit, upper=True)
    return inverse


def order_of(hessian: Tensor, groupsize: int, act_order: bool) -> list[Tensor]:
    """The columns of each group, in the order in which groups and columns are quantized."""
    groups = torch.arange(len(hessian), device=hessian.device).split(groupsize)
    if not act_order:
        return list(groups)
    diagonal = hessian.diagonal()
    inside = [group[diagonal[group].argsort(descending=True, stable=True)] for group in groups]
    return sorted(inside, key=lambda group: -diagonal[group].mean().item())


def blocks_of(ends: list[int], groupsize: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of runs of about `blocksize` columns: whole groups, or parts of one that is larger."""
    step = max(1, blocksize // groupsize)
    for first, last in itertools.pairwise([0, *ends[step - 1:-1:step], ends[-1]]):
        for begin in range(first, last, blocksize):
            yield begin, min(begin + blocksize, last)


def quantize_matrix(weight: Tensor, hessian: Tensor, target: Target, options: Options = Options(),
                    name: str = "") -> tuple[dict[str, Tensor], Tensor]:
    """weight [N, K] and the Hessian [K, K] of its inputs (sums of x x^T) -> the target's buffers, and the weight that they stand for in fp32."""
    groups = order_of(hessian, target.groupsize, options.act_order)
    order, ends = torch.cat(groups), torch.tensor([len(group) for group in groups]).cumsum(0).tolist()
    U = inverse_factor(hessian[order][:, order], options.percdamp, name)
    importance = U.diagonal().square().reciprocal()
    W = weight.float().t()[order].contiguous()                   # [K, N]: a column of the weight is a row here
    Q, q = torch.empty_like(W), torch.empty_like(W, dtype=target.weight.dtype)
    levels: list[Any] = [None] * len(ends)
    last_of = dict(zip([0, *ends], ends))                        # first column of a group -> the one after its last
    for begin, end in blocks_of(ends, target.groupsize, options.blocksize):
        errors = torch.empty_like(W[begin:end])
        for j in range(begin, end):
            if j in last_of:
                group = slice(j, last_of[j])
                found = levels[int(order[j]) // target.groupsize] = target.fit(W[group].t(), importance[group])
            q_j, Q_j = target.round_to(found, W[j, :, None])
            q[j], Q[j] = q_j[:, 0], Q_j[:, 0]
            errors[j - begin] = (W[j] - Q[j]) / U[j, j]
            W[j + 1:end].addr_(U[j, j + 1:end], errors[j - begin], alpha=-1)
        W[end:].addmm_(U[begin:end, end:].t(), errors, alpha=-1)
    back = order.argsort()
    return target.assemble(q[back].t(), levels), Q[back].t().contiguous()


# ---- through the model

class Reached(Exception):
    """The linear whose inputs are wanted has got them: they are the argument."""


def stop(linear: torch.nn.Module, inputs: tuple[Tensor]) -> None:
    raise Reached(inputs[0])


@dataclass(frozen=True)
class Inputs:
    """What one of a block's linears gets from the hidden states [B, S, C] before the half that it is in. Iterating computes it some rows at a time:
    yields (their slice, [b, S, K])."""
    model: Transformer
    block: TransformerBlock
    half: str
    linear: Linear
    hidden: Tensor

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        B, S, _ = self.hidden.shape
        rows = max(1, BATCH_TOKENS // S)
        for x, begin in zip(self.hidden.split(rows), range(0, B, rows)):
            try:
                with self.linear.register_forward_pre_hook(stop):
                    self.attention(x) if self.half == "attention" else self.block.feed_forward(self.block.ffn_norm(x))
            except Reached as reached:
                found = reached.args[0]
            yield slice(begin, begin + len(x)), found

    def attention(self, x: Tensor) -> None:
        B, S, _ = x.shape
        args, input_pos = self.model.args, torch.arange(S, device=x.device).expand(B, S)
        self.block.attention.kv_cache = KVCache(B, args.n_local_heads, S, args.head_dim, x.dtype, x.device)
        logn = self.model.logn_scale(input_pos) if args.logn else None
        self.block.attention(self.block.attention_norm(x), *self.model.rope(input_pos), logn, input_pos)


def hessian_of(batches: Iterable[Tensor], K: int, device: torch.device | str = "cpu") -> Tensor:
    """Sum of x x^T over all the inputs x in batches [..., K], fp32 [K, K]."""
    hessian = torch.zeros(K, K, device=device)
    bounds = [K * i // 4 for i in range(5)]      # as it is symmetric, most of what is below the diagonal need not be computed
    for x in batches:
        x = x.flatten(0, -2).float()
        for begin, end in itertools.pairwise(bounds):
            hessian[begin:end, begin:].addmm_(x[:, begin:end].t(), x[:, begin:])
    return hessian.triu_().add_(hessian.triu(1).t())


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Sum of the squares of a linear's outputs."""
    return ((weight @ hessian) * weight).sum(dtype=torch.float64).item()


@torch.no_grad()
def quantize_layers(model: Transformer, tokens: Tensor, embedding: Tensor, load: Callable[[int], dict[str, Tensor]], targets: dict[str, Target],
                    options: Options = Options(), device: torch.device | str = "cpu",
                    measure: bool = False, progress: bool = True) -> Iterator[tuple[str, dict[str, Tensor], float]]:
    """Yields (name, buffers, RMS of the output's error over the RMS of the output if to be measured) of each target in the layers of a model on the
    meta device, whose weights `load` gives layer by layer, in fp32 and on the device.

    tokens: int64 [B, S] to calibrate with; embedding: [V, C]. Errors: UserError if activations or weights are NaN or infinite.
    """
    tokens = tokens.to(device)
    model.inv_freq = rope_frequencies(model.args, tokens.size(1)).to(device)
    hidden = F.embedding(tokens, embedding.to(device)).float()
    cost = {name: target.out_features * target.in_features for name, target in targets.items()}
    with tqdm(total=sum(cost.values()), desc="Quantizing", unit="weight", unit_scale=True, disable=not progress) as bar:
        for i, block in enumerate(model.layers):
            block.load_state_dict(load(i), assign=True)
            for half, part in ((half, part) for half, parts in LINEARS.items() for part in parts):
                name, linear = f"layers.{i}.{half}.{part}", block.get_submodule(f"{half}.{part}")
                inputs, ends_half = Inputs(model, block, half, linear, hidden), part == LINEARS[half][-1]
                if ends_half and tokens.numel() * linear.in_features * hidden.itemsize <= KEPT_BYTES:
                    inputs = list(inputs)        # which are needed twice
                if name in targets:
                    buffers, error = quantize_linear(linear, inputs, targets[name], options, name, measure)
                    yield name, {key: value.cpu() for key, value in buffers.items()}, error
                    bar.update(cost[name])
                if ends_half:
                    for rows, x in inputs:
                        hidden[rows] += linear(x)
            block.to("meta")
            block.attention.kv_cache = None


def quantize_linear(linear: Linear, inputs: Iterable[tuple[slice, Tensor]], target: Target, options: Options, name: str,
                    measure: bool) -> tuple[dict[str, Tensor], float]:
    """Gives a linear the weight that its target can store. The target's buffers, and the error if to be measured."""
    weight = linear.weight
    check_finite(f"{name}.weight", weight)
    hessian = hessian_of((x for _, x in inputs), linear.in_features, weight.device)
    if not hessian.isfinite().all():
        raise UserError(f"{name}: NaN or infinity among its inputs from the calibration text: a damaged checkpoint cannot be quantized")
    buffers, quantized = quantize_matrix(weight, hessian, target, options, name)
    linear.weight = torch.nn.Parameter(quantized, requires_grad=False)
    return buffers, math.sqrt(energy(quantized - weight, hessian) / max(energy(weight, hessian), 1e-30)) if measure else 0.0
