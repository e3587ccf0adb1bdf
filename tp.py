"""Tensor parallelism: one model over several processes, each with its share of every layer, started by torchrun.

    torchrun --standalone --nproc_per_node=2 generate.py --compile

In a layer wqkv and w13 are split by their output rows (whole heads; the same columns of gate and up), wo and w2 by the input columns that
meet those rows. So attention and the feed-forward need nothing from other ranks until their last product, whose partial results are
summed over the ranks: two all-reduces a layer (Megatron-LM, Shoeybi et al. 2019). Embedding and output head are split over the vocabulary.
Where a size does not divide, ranks get padding of zeros, which contributes exactly nothing.
"""
import contextlib
import datetime
import hashlib
import math
import os
import signal
import sys
from dataclasses import dataclass, replace
from typing import Any, Iterator

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import ModelArgs
from cli import UserError, fail
from formats import Int4Linear, Quantization, replace_linears
from model import Transformer

ROWS, COLUMNS = 0, 1
# Bytes that a rank reads from its memory in the time of one collective: 0.6 ms (measured) at 30 GB/s, 15 us (assumed) at 2.7 TB/s.
READ_MEANWHILE = {"cpu": 18e6, "cuda": 40e6}
# Module -> the dimension of its weight that is split, and what that dimension counts. Everything else, the norms, is whole on every rank.
SPLIT = {
    "tok_embeddings": (ROWS, "vocab"),
    "output": (ROWS, "vocab"),
    "attention.wqkv": (ROWS, "qkv"),
    "attention.wo": (COLUMNS, "heads"),
    "feed_forward.w13": (ROWS, "gate_up"),
    "feed_forward.w2": (COLUMNS, "ffn"),
}
Run = tuple[int | None, int]             # (first, count) of the whole tensor's rows or columns; first None: `count` of zeros


# ---- which rank holds what

@dataclass(frozen=True)
class Plan:
    """What one rank holds: `local` are its sizes, the same on every rank; `runs` says which rows and columns of the whole they are."""
    args: ModelArgs
    local: ModelArgs
    rank: int
    runs: dict[str, list[Run]]
    quantization: Quantization | None = None
    wo_groupsize: int = 0                # of int4 and published GPTQ: smaller than the checkpoint's where a rank's heads end inside a group

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor of the whole state dict: a view of it where it is in one piece."""
        module, _, kind = name.rpartition(".")
        dim, counts = SPLIT.get(module.split(".", 2)[-1] if module.startswith("layers.") else module, (None, None))
        if dim is None or kind == "order":                   # of the inputs, which are whole where it is kept
            return tensor
        if dim == ROWS:
            return take(tensor, ROWS, self.runs[counts])
        if tensor.dim() == 1:            # partial sums are added up: a bias must be in one of them only; int8 scales belong to rows
            return torch.zeros_like(tensor) if kind == "bias" and self.rank else tensor
        columns = 1                      # that one entry stands for
        if kind in ("scales", "zeros"):
            columns = self.wo_groupsize if counts == "heads" else self.quantization.groupsize
            tensor = tensor.repeat_interleave(self.quantization.groupsize // columns, dim=1)
        elif tensor.dtype == torch.uint8 and self.quantization.mode.startswith("int4"):
            columns = 2
        return take(tensor, COLUMNS, in_units(self.runs[counts], columns))


def take(tensor: Tensor, dim: int, runs: list[Run]) -> Tensor:
    pieces = []
    for first, count in runs:
        shape = (*tensor.shape[:dim], count, *tensor.shape[dim + 1:])
        pieces.append(tensor.new_zeros(shape) if first is None else tensor.narrow(dim, first, count))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def plan(args: ModelArgs, rank: int, world: int, quantization: Quantization | None = None) -> Plan:
    """Errors: UserError, if this number of ranks cannot work."""
    if world > args.n_head:
        raise UserError(f"--nproc_per_node: {world} ranks for {args.n_head} attention heads leave some without work (1 to {args.n_head} work)")
    q_heads, kv_heads = heads_of(args.n_head, args.n_local_heads, rank, world)
    if quantization and any(name.endswith((".wo", ".w2")) for name in quantization.reordered):
        raise UserError("--nproc_per_node: published GPTQ checkpoints whose columns are in an order of their own (desc_act) run in one process only")
    groupsize = quantization.groupsize if quantization and quantization.mode != "int8" else 0
    ffn, vocab = share_of(args.intermediate_size, rank, world, groupsize or 16), share_of(args.vocab_size, rank, world)
    local = replace(args, n_head=len(q_heads), n_local_heads=len(kv_heads),
                    intermediate_size=sum(n for _, n in ffn), vocab_size=sum(n for _, n in vocab))
    runs = {
        "vocab": vocab,
        "qkv": [run for heads, offset in ((q_heads, 0), (kv_heads, args.n_head), (kv_heads, args.n_head + args.n_local_heads))
                for run in head_runs(heads, args.head_dim, offset)],
        "heads": head_runs(q_heads, args.head_dim),
        "gate_up": ffn + [(first if first is None else first + args.intermediate_size, count) for first, count in ffn],
        "ffn": ffn,
    }
    runs = {name: joined_runs(r) for name, r in runs.items()}
    wo_groupsize = groupsize and uncut_groupsize(args, rank, world, groupsize)
    if wo_groupsize % 32:
        work = [n for n in range(1, args.n_head + 1) if not any(uncut_groupsize(args, r, n, groupsize) % 32 for r in range(n))]
        raise UserError(f"--nproc_per_node: attention heads of {args.head_dim} on {world} ranks would cut groups of {groupsize} into groups of "
                        f"{wo_groupsize}, and 32 is the least (these numbers of ranks work: {', '.join(map(str, work))})")
    return Plan(args, local, rank, runs, quantization, wo_groupsize)


def worth_splitting(nbytes: int, n_layer: int, world: int, device: torch.device) -> bool:
    """Whether ranks decode faster with a share of nbytes of weights each than with all of them and no collectives."""
    return nbytes * (1 - 1 / world) > (2 * n_layer + 2) * READ_MEANWHILE[device.type]


def share_of(size: int, rank: int, world: int, unit: int = 16) -> list[Run]:
    """The rank's part of 0 .. size - 1: as many whole units for each rank, padding at the end."""
    part = math.ceil(size / (world * unit)) * unit
    first = min(rank * part, size)
    here = min(part, size - first)
    return [(first, here)] * (here > 0) + [(None, part - here)] * (here < part)


def heads_of(n_head: int, n_local_heads: int, rank: int, world: int) -> tuple[list[int | None], list[int | None]]:
    """The rank's query heads and KV heads; None is padding.

    Every KV head, with the queries that attend to it, may be cut into s parts, each with its own copy of the KV head. The parts are dealt out in
    order, the same number to each rank. s is what leaves a rank the fewest heads: 1 where n_local_heads divides, more where there are too few.
    """
    queries = n_head // n_local_heads                        # of a KV head

    def sizes(s: int) -> tuple[int, int]:
        """Parts of a rank, queries of a part."""
        return math.ceil(n_local_heads * s / world), math.ceil(queries / s)
    s = min(range(1, queries + 1), key=lambda s: (sizes(s)[0] * (sizes(s)[1] + 1), sizes(s)[0]))
    parts, width = sizes(s)
    q_heads: list[int | None] = []
    kv_heads: list[int | None] = []
    for part in range(rank * parts, (rank + 1) * parts):
        kv, begin = part // s, part % s * width
        real = kv < n_local_heads and begin < queries
        kv_heads.append(kv if real else None)
        q_heads += [kv * queries + i if real and i < queries else None for i in range(begin, begin + width)]
    return q_heads, kv_heads


def uncut_groupsize(args: ModelArgs, rank: int, world: int, groupsize: int) -> int:
    """The largest part of wo's int4 groups that no border between the rank's heads and others cuts."""
    runs = head_runs(heads_of(args.n_head, args.n_local_heads, rank, world)[0], args.head_dim)
    return math.gcd(groupsize, *(n for run in runs for n in run if n))


def head_runs(heads: list[int | None], head_dim: int, offset: int = 0) -> list[Run]:
    return joined_runs([(None if h is None else (offset + h) * head_dim, head_dim) for h in heads])


def in_units(runs: list[Run], unit: int) -> list[Run]:
    """The same in units of several columns each, of which the last real one may be incomplete."""
    out, here = [], 0
    for first, count in runs:
        units = math.ceil((here + count) / unit) - math.ceil(here / unit)
        out.append((first if first is None else first // unit, units))
        here += count
    return [run for run in out if run[1]]


def joined_runs(runs: list[Run]) -> list[Run]:
    """Neighbours become one run."""
    out = [runs[0]]
    for first, count in runs[1:]:
        before, n = out[-1]
        if (before is None and first is None) or (None not in (before, first) and before + n == first):
            out[-1] = (before, n + count)
        else:
            out.append((first, count))
    return out


# ---- the sharded model

def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's x. The functional form of the collective is an operator like any other to the compiler."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group))


class AllReduce(nn.Module):
    def __init__(self, ranks: "Ranks"):
        super().__init__()
        self.group = ranks.group

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.group)


def of_first(x: Tensor, group: str) -> Tensor:
    """Rank 0's x, of the same shape everywhere."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.broadcast(x.contiguous(), 0, group))


class GatherVocab(nn.Module):
    """Logits [B, P, local V] of every rank -> [B, P, V]. All ranks get the very same bits, so with the same noise they draw the same tokens."""

    def __init__(self, ranks: "Ranks", vocab_size: int):
        super().__init__()
        self.group, self.world, self.vocab_size = ranks.group, ranks.world, vocab_size

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), self.world, self.group)
        parts = torch.ops._c10d_functional.wait_tensor(parts).view(self.world, *x.shape)
        return parts.movedim(0, 2).flatten(2)[..., :self.vocab_size]


class VocabEmbedding(nn.Module):
    """The rows first .. first + n - 1 of an embedding; other ranks look up the other ids."""

    def __init__(self, weight: nn.Parameter, first: int, ranks: "Ranks"):
        super().__init__()
        self.weight, self.first, self.group = weight, first, ranks.group

    def forward(self, idx: Tensor) -> Tensor:
        local = idx - self.first
        here = (local >= 0) & (local < self.weight.size(0))
        x = F.embedding(torch.where(here, local, 0), self.weight)
        return all_reduce(x.masked_fill(~here[..., None], 0), self.group)


def build(plan: Plan, ranks: "Ranks") -> Transformer:
    """The rank's share of the model, empty on the meta device. Its state dict has the whole model's names."""
    with torch.device("meta"):
        model = Transformer(plan.args, plan.local)
        if plan.quantization:
            replace_linears(model, plan.quantization)
    model.ranks = ranks
    for i, layer in enumerate(model.layers):
        if isinstance(wo := layer.attention.wo, Int4Linear):
            with torch.device("meta"):
                regrouped = replace(plan.quantization, groupsize=plan.wo_groupsize)
                layer.attention.wo = regrouped.linear(f"layers.{i}.attention.wo", wo.in_features, wo.out_features, wo.bias is not None)
        layer.attention.reduce = layer.feed_forward.reduce = AllReduce(ranks)
    model.tok_embeddings = VocabEmbedding(model.tok_embeddings.weight, plan.rank * plan.local.vocab_size, ranks)
    model.gather = GatherVocab(ranks, plan.args.vocab_size)
    return model


def shard(model: Transformer, ranks: "Ranks") -> Transformer:
    """The rank's share of a model that is in memory already (generate.load_model reads no more than the share in the first place)."""
    here = plan(model.args, ranks.rank, ranks.world)
    sharded = build(here, ranks)
    sharded.load_state_dict({name: here.cut(name, tensor).clone() for name, tensor in model.state_dict().items()}, assign=True)
    return sharded.eval()


# ---- the processes

class Agreed(UserError):
    """A mistake that every rank knows of."""


@dataclass(frozen=True)
class Ranks:
    """The processes that hold one model; `group` is the name under which the collectives know them."""
    rank: int
    world: int
    local_rank: int                      # among those on this machine
    local_world: int
    timeout: float
    group: str
    store: dist.Store
    patient: dist.ProcessGroup           # over gloo, for messages that may be long in coming: a user's next prompt, a large file

    @property
    def first(self) -> bool:
        return self.rank == 0

    def take_device(self, device: torch.device) -> torch.device:
        """The rank's own device for a --device cpu or cuda, with the first collective on it: where NCCL cannot start it shows here.

        Errors: UserError."""
        if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":          # what torchrun sets where the user has said nothing
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // self.local_world))
        if device.type == "cuda":
            if device.index is not None:
                raise UserError(f"--device {device}: under torchrun each rank takes a device of its own: say --device cuda")
            if self.local_world > torch.cuda.device_count():
                raise UserError(f"--nproc_per_node {self.local_world}: there are {torch.cuda.device_count()} CUDA devices")
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        self.gather(None)                                    # no rank enters a collective on the device that another cannot join
        try:
            all_reduce(torch.ones(1, device=device), self.group).item()
        except RuntimeError as error:
            raise UserError(f"torchrun: the ranks cannot reach each other from {device}: {one_line(error)}") from error
        return device

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value. Raises Agreed if one of them is a UserError: so all ranks end when one of them cannot go on."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.patient)
        errors = {rank: str(v) for rank, v in enumerate(values) if isinstance(v, UserError)}
        if errors:
            rank, text = next(iter(errors.items()))
            raise Agreed(f"rank {rank}: {text}" if rank else text)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, whatever the others pass."""
        return self.gather(value)[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A UserError in the block reaches all ranks, as Agreed: the others meet it at their next gather, if not in the same way."""
        try:
            yield
        except Agreed:
            raise
        except UserError as error:
            self.gather(error)

    def check_same(self, what: str, value: Any) -> None:
        """Errors: UserError, if value is not the same on every rank."""
        values = self.gather((what, hashlib.sha256(repr(value).encode()).hexdigest()))
        for rank, (its, digest) in enumerate(values):
            if digest != values[0][1]:
                raise Agreed(f"the ranks have different checkpoints: rank 0 {values[0][0]}, rank {rank} {its}")

    def last_words(self, message: str, status: int) -> None:
        """Ends this process at once. The message is printed by the first rank that has one."""
        speak_undisturbed()
        try:
            unsaid = self.store.add("last words", 1) == 1
        except RuntimeError:                                 # the store is gone with the process that held it
            unsaid = True
        if unsaid:
            fail(message)
        leave(status)

    def end_together(self, message: str) -> None:
        """Ends all ranks, which have the same message; rank 0 prints it."""
        speak_undisturbed()
        if self.first:
            fail(message)
        with contextlib.suppress(RuntimeError):              # torchrun stops all ranks when the first one ends: by then it has been said
            self.gather(None)
        leave(2)


def speak_undisturbed() -> None:
    """torchrun's signal, on the same occasion, must not cut the message off, nor is it to be lost on a rank that was silent so far."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stderr = sys.__stderr__


def leave(status: int) -> None:
    sys.__stdout__.flush()
    os._exit(status)                                         # leaving in order would wait for ranks that are no more


def init_dist(timeout: float = 300.0) -> Ranks | None:
    """Joins the other processes that torchrun started, as the environment describes them. None where this is the only one.

    timeout: seconds without an answer from a rank in the midst of computing after which the others give up. Errors: UserError.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    try:
        rank, world, local_rank, local_world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not all that torchrun sets is in the environment: {error}") from None
    limit = datetime.timedelta(seconds=timeout)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"torchrun: rank {rank} of {world} could not join the others: {one_line(error)}") from error
    return Ranks(rank, world, local_rank, local_world, timeout, dist.group.WORLD.group_name, store, patient)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def joined(timeout: float = 300.0) -> Iterator[Ranks | None]:
    """init_dist for a command: only rank 0 prints, and if one rank fails all end, with one message."""
    ranks = init_dist(timeout)
    if ranks is None:
        yield None
        return
    streams = sys.stdout, sys.stderr
    if not ranks.first:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    if not torch.cuda.is_available():    # waiting for a GPU, Python would not come to run a handler: there the signal itself ends the process
        stopped = f"torchrun stopped rank {ranks.rank}: another rank failed, or it was interrupted"
        signal.signal(signal.SIGTERM, lambda *_: ranks.last_words(stopped, 1))
    try:
        with ranks.together():
            yield ranks
    except Agreed as error:
        ranks.end_together(str(error))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        ranks.last_words(f"rank {ranks.rank} lost touch with another rank, which died or did not answer for {timeout:.0f} s ({one_line(error)})", 1)
    finally:
        sys.stdout, sys.stderr = streams
    dist.destroy_process_group()
