"""GPTQ: linears quantized column by column, the error of each made up for by those that follow (Frantar et al. 2022,
arXiv 2210.17323).

The model is gone through linear by linear in the order of computation, and each sees what the already quantized ones
before it produce. formats.py has the number formats.

Shapes: B batch, S sequence, C model dim, N and K the rows and columns of a weight, G the columns that share a scale.
"""
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import check_finite
from cli import UserError
from config import rope_frequencies
from deltanet import DeltaState
from formats import QuantizedLinear
from model import Attention, FeedForward, GatedDeltaNet, KVCache, Linear, MoE, Transformer, TransformerBlock

ATTENTION, FEED_FORWARD = ("attention.wqkv", "attention.wo"), ("feed_forward.w13", "feed_forward.w2")
SHARED = ("feed_forward.shared.w13", "feed_forward.shared.w2")       # halves of a block, in the order of computation
BATCH_TOKENS = 4096               # that go through a block at a time
KEPT_BYTES = 1 << 29              # inputs of a linear that are kept rather than computed again
COLUMNS = 1024                    # of an inverse, found together
LEAST_TOKENS = 1 / 16             # for each column of an expert's weight; with fewer it is rounded to nearest


@dataclass(frozen=True)
class Options:
    percdamp: float = 0.01        # of the Hessian's mean diagonal, added to its diagonal
    blocksize: int = 128          # columns whose errors reach the rest of the matrix together
    act_order: bool = False       # groups, and the columns in each, in decreasing order of activation


# ---- one matrix

def quantize_matrix(weight: Tensor, hessian: Tensor, target: QuantizedLinear, options: Options = Options(),
                    name: str = "") -> tuple[dict[str, Tensor], Tensor]:
    """weight [N, K] and the Hessian [K, K] of its inputs (sum of x x^T) -> the target's buffers, and the weight that
    they stand for in fp32.

    With U^T U the inverse Hessian, column j's error over U_jj is taken off the later columns in proportion to row U_j.
    """
    groups = column_groups(hessian, target.groupsize, options.act_order)
    order, ends = torch.cat(groups), list(itertools.accumulate(map(len, groups)))
    U = inverse_factor(hessian[order][:, order], options.percdamp, name)
    importance = U.diagonal().square().reciprocal()
    W = weight.float().t()[order].contiguous()                   # [K, N]: a column of the weight is a row here
    Q, q = torch.empty_like(W), torch.empty_like(W, dtype=target.weight.dtype)
    params: dict[int, tuple[Tensor, Tensor]] = {}                # of each group, by its number in the weight
    group_end = dict(itertools.pairwise([0, *ends]))             # first column of a group -> the one after its last
    for begin, end in column_blocks(ends, target.groupsize, options.blocksize):
        errors = torch.empty_like(W[begin:end])
        for j in range(begin, end):
            if j in group_end:
                group = slice(j, group_end[j])
                scale, zero = target.find_params(W[group].t(), importance[group])            # [N, 1]
                params[int(order[j]) // target.groupsize] = scale, zero
            q_j = target.round(W[j, :, None], scale, zero)
            q[j], Q[j] = q_j[:, 0], target.restore(q_j, scale, zero)[:, 0]
            errors[j - begin] = (W[j] - Q[j]) / U[j, j]
            W[j + 1:end].addr_(U[j, j + 1:end], errors[j - begin], alpha=-1)
        W[end:].addmm_(U[begin:end, end:].t(), errors, alpha=-1)
    scales, zeros = (torch.cat(found, dim=1) for found in zip(*(params[i] for i in range(len(groups))), strict=True))
    in_order = order.argsort()
    return target.to_buffers(q[in_order].t(), scales, zeros), Q[in_order].t().contiguous()


def column_groups(hessian: Tensor, groupsize: int, act_order: bool) -> list[Tensor]:
    """The columns of each group, in the order in which groups and columns are quantized."""
    groups = torch.arange(len(hessian), device=hessian.device).split(groupsize)
    if not act_order:
        return list(groups)
    diagonal = hessian.diagonal()
    sorted_inside = [group[diagonal[group].argsort(descending=True, stable=True)] for group in groups]
    return sorted(sorted_inside, key=lambda group: -diagonal[group].mean().item())


def column_blocks(ends: list[int], groupsize: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of runs of about `blocksize` columns: whole groups, or pieces of one that is larger."""
    step = max(1, blocksize // groupsize)
    for first, last in itertools.pairwise([0, *ends[step - 1:-1:step], ends[-1]]):
        for begin in range(first, last, blocksize):
            yield begin, min(begin + blocksize, last)


def inverse_factor(hessian: Tensor, percdamp: float, name: str = "") -> Tensor:
    """Upper triangular U, fp32, with U^T U the inverse of the damped Hessian [K, K]; the damping is raised until there
    is one."""
    # With the order of the columns reversed, a matrix's lower factor is the upper factor that U is the inverse of.
    hessian = hessian.double().flip(0, 1)
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0          # an input that is always 0 decides nothing: its weights are rounded to nearest
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
        tqdm.write(f"{name}: the Hessian is not positive definite; damping raised to {damping / mean:.2%} of its "
                   "diagonal", file=sys.stderr)
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


# ---- through the model

@torch.no_grad()
def quantize_layers(model: Transformer, tokens: Tensor, embedding: Tensor, load: Callable[[int], dict[str, Tensor]],
                    targets: dict[str, QuantizedLinear], options: Options = Options(),
                    device: torch.device | str = "cpu", measure: bool = False,
                    progress: bool = True) -> Iterator[tuple[str, dict[str, Tensor], float]]:
    """Yields each target's name, buffers and, if measured, the RMS of its output's error over the RMS of its output.

    model: on the meta device; `load` gives the weights of one of its layers, in fp32 and on `device`. tokens: int64
    [B, S] to calibrate with; embedding: [V, C]. Errors: UserError if activations or weights are NaN or infinite.
    """
    tokens = tokens.to(device)
    model.inv_freq = rope_frequencies(model.args, tokens.size(1))[None].to(device)
    hidden = F.embedding(tokens, embedding.to(device)).float()                             # [B, S, C]
    total = sum(target.out_features * target.in_features for target in targets.values())
    with tqdm(total=total, desc="Quantizing", unit="weight", unit_scale=True, disable=not progress) as bar:
        run = Run(model, targets, options, measure, bar)
        for i, block in enumerate(model.layers):
            block.load_state_dict(load(i), assign=True)
            yield from run.half(i, block, ATTENTION, hidden, hidden)
            if isinstance(block.feed_forward, MoE):
                after = hidden.clone()                           # the shared expert and the others read the same
                if block.feed_forward.shared:
                    yield from run.half(i, block, SHARED, hidden, after)
                yield from run.experts(i, block, hidden, after)
                hidden = after
            else:
                yield from run.half(i, block, FEED_FORWARD, hidden, hidden)
            block.to("meta")
    if run.num_rounded:
        print(f"{run.num_rounded} of {run.num_experts} experts had too few tokens to learn from: rounded to nearest",
              file=sys.stderr)


@dataclass
class Run:
    """One pass over a model's blocks. hidden: what they read, [B, S, C]; out: to which what they make is added."""
    model: Transformer
    targets: dict[str, QuantizedLinear]
    options: Options
    measure: bool
    bar: tqdm
    num_experts: int = 0
    num_rounded: int = 0                  # of them

    def half(self, i: int, block: TransformerBlock, kinds: tuple[str, str], hidden: Tensor,
             out: Tensor) -> Iterator[tuple[str, dict[str, Tensor], float]]:
        """The two linears of an attention or a feed-forward."""
        for kind in kinds:
            name, linear = f"layers.{i}.{kind}", cast(Linear, block.get_submodule(kind))
            inputs = partial(linear_inputs, self.model, block, kind, hidden)
            last = kind == kinds[1]                              # whose inputs are needed twice
            keep = last and hidden[..., 0].numel() * linear.in_features * hidden.itemsize <= KEPT_BYTES
            kept = list(inputs()) if keep else None
            if name in self.targets:
                weight = linear.weight
                buffers, quantized, hessian = self.quantize(name, weight, (x for _, x in kept or inputs()))
                linear.weight = torch.nn.Parameter(quantized, requires_grad=False)
                yield name, buffers, relative(*self.energies(quantized, weight, hessian))
            for rows, x in (kept or inputs()) if last else ():
                y = linear(x)
                if kinds == SHARED:
                    y *= block.feed_forward.shared_gate(block.ffn_norm(hidden[rows])).sigmoid()
                out[rows] += y

    def experts(self, i: int, block: TransformerBlock, hidden: Tensor,
                out: Tensor) -> Iterator[tuple[str, dict[str, Tensor], float]]:
        """One expert after another, each from the tokens that the router sends to it."""
        moe, flat, sums = block.feed_forward, hidden.flatten(0, 1), out.flatten(0, 1)      # views
        routes = [moe.route(block.ffn_norm(chunk)) for chunk in flat.split(BATCH_TOKENS)]
        chosen, weights = (torch.cat(parts) for parts in zip(*routes, strict=True))
        names = [f"layers.{i}.{kind}" for kind in FEED_FORWARD]
        found: dict[str, list[tuple[dict[str, Tensor], float, float]]] = {name: [] for name in names}
        for e in range(moe.n_expert):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            x = block.ffn_norm(flat[token])
            few = len(token) < LEAST_TOKENS * x.size(1)
            for name, linear in zip(names, (moe.w13, moe.w2), strict=True):
                weight = linear.weight.unflatten(0, (moe.n_expert, -1))[e].float()
                if name in self.targets:
                    buffers, quantized, hessian = self.quantize(f"{name}, expert {e}", weight, [x],
                                                                self.targets[name], to_nearest=few)
                    found[name].append((buffers, *self.energies(quantized, weight, hessian)))
                    weight = quantized
                y = F.linear(x, weight)
                if linear is moe.w13:
                    gate, up = y.chunk(2, dim=-1)
                    x = F.silu(gate) * up
            sums[token] += weights[token, slot, None] * y
            self.num_experts, self.num_rounded = self.num_experts + 1, self.num_rounded + few
        for name in filter(self.targets.__contains__, names):
            parts, errors, energies = zip(*found[name], strict=True)
            yield name, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, relative(
                sum(errors), sum(energies))

    def quantize(self, name: str, weight: Tensor, inputs: Iterable[Tensor], target: QuantizedLinear | None = None,
                 to_nearest: bool = False) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The buffers for a weight, what they stand for in fp32, and the Hessian of its inputs."""
        target = target or self.targets[name]
        check_finite(f"{name}.weight", weight)
        hessian = hessian_of(inputs, weight.size(1), weight.device)
        if not hessian.isfinite().all():
            raise UserError(f"{name}: NaN or infinity among its inputs from the calibration text: a damaged checkpoint "
                            "cannot be quantized")
        if to_nearest:
            buffers = target.quantize(weight)
            quantized = target.restore(*target.from_buffers(buffers))
        else:
            buffers, quantized = quantize_matrix(weight, hessian, target, self.options, name)
        self.bar.update(weight.numel())
        return {key: value.cpu() for key, value in buffers.items()}, quantized, hessian

    def energies(self, quantized: Tensor, weight: Tensor, hessian: Tensor) -> tuple[float, float]:
        """Of the error of a linear's outputs, and of the outputs."""
        return (energy(quantized - weight, hessian), energy(weight, hessian)) if self.measure else (0.0, 1.0)


def relative(error: float, whole: float) -> float:
    return math.sqrt(error / max(whole, 1e-30))


def linear_inputs(model: Transformer, block: TransformerBlock, kind: str,
                  hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """What one of a block's linears gets for the hidden states [B, S, C] before its half of the block, computed a few
    rows at a time: (slice of rows, [b, S, K])."""
    B, S, _ = hidden.shape
    for begin in range(0, B, step := max(1, BATCH_TOKENS // S)):
        rows = slice(begin, min(begin + step, B))
        if kind.startswith("attention"):
            x = block.attention_norm(hidden[rows])
            yield rows, x if kind == "attention.wqkv" else attend(model, block.attention, x)
        else:
            x = block.ffn_norm(hidden[rows])
            feed_forward = cast(FeedForward, block.get_submodule(kind.rpartition(".")[0]))
            yield rows, x if kind.endswith(".w13") else feed_forward.hidden(x)


def attend(model: Transformer, attention: Attention | GatedDeltaNet, x: Tensor) -> Tensor:
    """The heads' output for all positions at once, with a KV cache or a state for this alone."""
    args, (B, S, _) = model.args, x.shape
    input_pos, shape = torch.arange(S, device=x.device).expand(B, S), (B, args.n_local_heads, S, args.head_dim)
    if isinstance(attention, Attention):
        attention.kv_cache = KVCache(x.new_empty(shape), x.new_empty(shape))
    else:
        attention.state = DeltaState(args, B, 1, x.dtype, x.device)
    logn = model.logn_scale(input_pos) if args.logn else None
    heads = attention.heads(x, *model.rope(input_pos), logn, input_pos)
    attention.forget()
    return heads


def hessian_of(batches: Iterable[Tensor], K: int, device: torch.device | str = "cpu") -> Tensor:
    """Sum of x x^T over all the inputs x in batches [..., K], fp32 [K, K]."""
    hessian = torch.zeros(K, K, device=device)
    bounds = [K * i // 4 for i in range(5)]      # it is symmetric: most of what is below the diagonal is left out
    for x in batches:
        x = x.flatten(0, -2).float()
        for begin, end in itertools.pairwise(bounds):
            hessian[begin:end, begin:].addmm_(x[:, begin:end].t(), x[:, begin:])
    return hessian.triu_().add_(hessian.triu(1).t())


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Sum of the squares of a linear's outputs."""
    return ((weight @ hessian) * weight).sum(dtype=torch.float64).item()
