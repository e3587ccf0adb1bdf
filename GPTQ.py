"""GPTQ: linears quantized column by column, the error of each made up for by those that follow (Frantar et al. 2022, arXiv 2210.17323).

The model is gone through linear by linear in the order of computation, and each sees what the already quantized ones before it produce. The number
formats are quantize.py's: a linear comes with fit (levels for a group of columns) and round_to (weights to these levels).

Shapes: B batch, S sequence, C model dim, N and K the rows and columns of a weight, G the columns that share a scale.
"""
import contextlib
import itertools
import math
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cli import UserError
from model import KVCache, Transformer, TransformerBlock, rope_frequencies
from tokenizer import Tokenizer

LINEARS = {"attention": ("wqkv", "wo"), "feed_forward": ("w13", "w2")}             # of a block's halves, in the order of computation
BATCH_TOKENS = 4096               # that go through a block at a time
MOST_DOCUMENTS = 10000            # of a task
# Of the standard library: the modules that the demo checkpoints have not seen, and what is no source text.
HELD_OUT = ["bisect", "calendar", "configparser", "contextlib", "csv", "fnmatch", "fractions", "graphlib", "heapq", "queue", "sched",
            "shlex", "statistics", "string", "textwrap"]
SKIPPED = ("site-packages", "config-", "pydoc_data", "lib2to3/tests/data", "test/bad", "ensurepip/_bundled")


class Target(Protocol):
    """The linear that a weight is quantized for: a quantize.QuantizedLinear."""
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
    """Upper triangular U with U^T U the inverse of the damped Hessian [K, K]. The damping is raised until that is positive definite."""
    # with the order of the columns reversed, the lower factor of a matrix is the upper factor that U is the inverse of
    hessian = hessian.double().flip(0, 1)
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1   # an input that never differs from 0 decides nothing: its weights are rounded to nearest
    mean = diagonal.mean().item()
    damping = percdamp * mean
    for _ in range(8):
        hessian.diagonal().copy_(diagonal + damping)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            del hessian
            return torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=True)
        damping = max(10 * damping, 1e-4 * mean)
        print(f"{name}: the Hessian is not positive definite; damping raised to {damping / mean:.2%} of its diagonal", file=sys.stderr)
    raise UserError(f"{name}: the Hessian stays indefinite: the calibration's activations are too large for fp32")


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
    U = inverse_factor(hessian[order][:, order], options.percdamp, name).float()
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
        W[end:] -= U[begin:end, end:].t() @ errors
    back = order.argsort()
    return target.assemble(q[back].t(), levels), Q[back].t().contiguous()


# ---- through the model

class Reached(Exception):
    """The linear whose inputs are wanted has got them."""


def add_to_hessian(hessian: Tensor, x: Tensor) -> None:
    x = x.flatten(0, -2).float()
    hessian.addmm_(x.t(), x)


def run_half(block: TransformerBlock, half: str, model: Transformer, hidden: Tensor) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
    """Of the hidden states [B, S, C], the rows of each batch, and a call that sends them through the block's attention or its feed-forward."""
    B, S, _ = hidden.shape
    rows = max(1, BATCH_TOKENS // S)
    pos = torch.arange(S, device=hidden.device)

    def attention() -> Tensor:
        return x + block.attention(block.attention_norm(x), cos, sin, logn, input_pos)

    def feed_forward() -> Tensor:
        return x + block.feed_forward(block.ffn_norm(x))
    for begin in range(0, B, rows):
        x = hidden[begin:begin + rows]
        input_pos = pos.expand(len(x), S)
        cos, sin = model.rope(input_pos)
        logn = model.logn_scale(input_pos) if model.args.logn else None
        block.attention.kv_cache = KVCache(len(x), model.args.n_local_heads, S, model.args.head_dim, x.dtype, x.device)
        yield slice(begin, begin + len(x)), attention if half == "attention" else feed_forward
    block.attention.kv_cache = None


def hessian_of(block: TransformerBlock, half: str, part: str, model: Transformer, hidden: Tensor) -> Tensor:
    """Sum of x x^T over the inputs x of one of the linears of a block's half, fp32 [K, K]."""
    linear = block.get_submodule(f"{half}.{part}")
    hessian = torch.zeros(linear.in_features, linear.in_features, device=hidden.device)

    def collect(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        add_to_hessian(hessian, inputs[0])
        raise Reached
    with linear.register_forward_pre_hook(collect):
        for _, forward in run_half(block, half, model, hidden):
            with contextlib.suppress(Reached):
                forward()
    return hessian


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Sum of the squares of a linear's outputs."""
    return ((weight @ hessian) * weight).sum(dtype=torch.float64).item()


@torch.no_grad()
def quantize_layers(model: Transformer, tokens: Tensor, embedding: Tensor, load: Callable[[int], dict[str, Tensor]], targets: dict[str, Target],
                    options: Options = Options(), device: torch.device | str = "cpu",
                    measure: bool = False, progress: bool = True) -> Iterator[tuple[str, dict[str, Tensor], float]]:
    """Yields (name, buffers, RMS of the output's error over the RMS of the output if to be measured) of each target in the layers of a model on the
    meta device, whose weights `load` gives layer by layer.

    tokens: int64 [B, S] to calibrate with; embedding: [V, C]. Errors: UserError if activations are NaN or infinite.
    """
    tokens = tokens.to(device)
    model.inv_freq = rope_frequencies(model.args, tokens.size(1)).to(device)
    hidden = F.embedding(tokens, embedding.to(device)).float()
    cost = {name: target.out_features * target.in_features for name, target in targets.items()}
    with tqdm(total=sum(cost.values()), desc="Quantizing", unit="weight", unit_scale=True, disable=not progress) as bar:
        for i, block in enumerate(model.layers):
            block.load_state_dict({key: value.to(device, torch.float32) for key, value in load(i).items()}, assign=True)
            for half, part in ((half, part) for half, parts in LINEARS.items() for part in (*parts, "")):
                name = f"layers.{i}.{half}.{part}"
                if not part:
                    for rows, forward in run_half(block, half, model, hidden):
                        hidden[rows] = forward()
                elif name in targets:
                    hessian = hessian_of(block, half, part, model, hidden)
                    if not hessian.isfinite().all():
                        raise UserError(f"{name}: NaN or infinity among its inputs from the calibration text: a damaged checkpoint cannot be quantized")
                    linear = block.get_submodule(f"{half}.{part}")
                    buffers, quantized = quantize_matrix(linear.weight, hessian, targets[name], options, name)
                    error = math.sqrt(energy(quantized - linear.weight, hessian) / max(energy(linear.weight, hessian), 1e-30)) if measure else 0.0
                    linear.weight = torch.nn.Parameter(quantized, requires_grad=False)
                    yield name, {key: value.cpu() for key, value in buffers.items()}, error
                    bar.update(cost[name])
            block.to("meta")


# ---- calibration text

def source_files(heldout: bool) -> list[Path]:
    """The standard library's .py files: the held-out modules, or all others but their tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    if heldout:
        return [library / f"{name}.py" for name in HELD_OUT]
    names = set(HELD_OUT) | {f"test_{name}" for name in HELD_OUT}
    files = []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library).as_posix()
        if path.stem not in names and not any(s in relative for s in SKIPPED) and not any(f"test_{n}/" in relative for n in HELD_OUT):
            files.append(path)
    return files


def read_sources(files: list[Path]) -> list[str]:
    """Text of each file that is UTF-8 and of ordinary size (the largest files are generated tables)."""
    texts = []
    for path in files:
        raw = path.read_bytes()
        if 200 < len(raw) < 300_000:
            try:
                texts.append(raw.decode("utf-8"))
            except UnicodeDecodeError:
                continue
    return texts


def texts_of_tasks(names: list[str], include_path: Path | None = None) -> list[str]:
    """The documents of lm-eval's tasks, each with its answer: those for training where there are such, else those for validation or the test."""
    from tasks import load_tasks             # lm_eval takes seconds to import
    texts = []
    for task in tasks_in(load_tasks(names, include_path, flag="--calibration_tasks", advice=", or give a text: --calibration_file FILE")[1]):
        docs = task.training_docs() if task.has_training_docs() else task.validation_docs() if task.has_validation_docs() else task.test_docs()
        for doc in itertools.islice(docs, MOST_DOCUMENTS):
            question, answer = task.doc_to_text(doc), task.doc_to_target(doc)
            if isinstance(question, int):        # the choices are beginnings, of which this is the right one (winogrande)
                question, answer = task.doc_to_choice(doc)[question], answer
            elif isinstance(answer, int):
                answer = task.doc_to_choice(doc)[answer]
            texts.append(" ".join(str(part) for part in (question, answer) if part))
    return texts


def tasks_in(loaded: list) -> Iterator:
    """The tasks themselves, of a list that may hold groups of them."""
    for item in loaded:
        if hasattr(item, "doc_to_text"):
            yield item
        else:
            children = getattr(item, "tasks", item)
            yield from tasks_in(list(children.values() if isinstance(children, dict) else children))


def calibration_tokens(tokenizer: Tokenizer, texts: list[str], limit: int, seq_length: int, least: int) -> Tensor:
    """int64 [B, S] of B <= limit sequences from all over the texts. UserError if they come to fewer than `least` tokens."""
    pieces = [text[i:i + 8 * seq_length] for text in texts for i in range(0, len(text), 8 * seq_length)]
    ids: list[int] = []
    for i in torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist():
        if len(ids) >= limit * seq_length:
            break
        ids += tokenizer.encode(pieces[i])
    count = min(limit, len(ids) // seq_length)
    if count * seq_length < least:
        raise UserError(f"too little to calibrate with: {count} sequences of {seq_length} tokens, and the widest linear has {least} inputs: "
                        "give more text (--calibration_file, --calibration_tasks), or raise --calibration_limit")
    return torch.tensor(ids[:count * seq_length]).view(count, seq_length)
