"""Tensor parallelism: one model over several processes (ranks), each with a shard of every layer, started by torchrun.

    torchrun --standalone --nproc_per_node=2 generate.py --compile

wqkv and w13 are split by output rows (whole heads, of a DeltaNet key heads with their value heads; the same rows of
gate and up), wo and w2 by the input columns that meet those rows. So attention and the feed-forward need nothing from
other ranks until their last product, whose partial results are summed over the ranks: two all-reduces a layer
(Megatron-LM, Shoeybi et al. 2019, section 3). The embedding and the output head are split over the vocabulary. A size
that does not divide is padded with zeros, which is exact. On GPUs NCCL's collectives are part of the compiled step and
its CUDA graph, or small sums are taken in one launch (kernels/collectives.py).
"""
import contextlib
import datetime
import hashlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from cli import PARENT, UserError, fail, system_errors
from config import ModelArgs
from formats import Int4Linear, Quantization, replace_linears
from kernels.collectives import all_reduce, enable_one_shot
from model import Transformer

ROWS, COLUMNS = 0, 1
# Module -> which dimension of its weight is split, and what that dimension counts. The norms are whole on every rank.
SPLIT = {
    "tok_embeddings": (ROWS, "vocab"),
    "output": (ROWS, "vocab"),
    "attention.wqkv": (ROWS, "qkv"),
    "attention.wo": (COLUMNS, "heads"),
    "attention.wba": (ROWS, "delta_ba"),
    "attention.conv": (ROWS, "delta_qkv"),
    "attention.A_log": (ROWS, "delta_heads"),
    "attention.dt_bias": (ROWS, "delta_heads"),
    "feed_forward.w13": (ROWS, "gate_up"),
    "feed_forward.w2": (COLUMNS, "ffn"),
    "feed_forward.shared.w13": (ROWS, "shared_gate_up"),
    "feed_forward.shared.w2": (COLUMNS, "shared_ffn"),
}
DELTA = {"qkv": "delta_qkvz", "heads": "delta_values"}                   # of layers with a Gated DeltaNet
EXPERTS = {"gate_up": "expert_gate_up", "ffn": "expert_ffn"}             # every expert is split, not their list
# Bytes of weights that a rank reads in the time of one collective: 0.6 ms (measured, gloo on one machine) at 30 GB/s;
# 15 us (assumed, NCCL) at 2.7 TB/s.
BYTES_PER_COLLECTIVE = {"cpu": 18e6, "cuda": 40e6}
ending = threading.Lock()
MIN_GROUPSIZE = 32                       # of int4 weights: the kernels' least


# ---- the shard plan: which rank holds what

@dataclass(frozen=True)
class Plan:
    """What one rank holds."""
    args: ModelArgs
    local: ModelArgs                     # the rank's sizes, the same on every rank
    rank: int
    indices: dict[str, Tensor]           # int64: the rank's rows or columns in the whole model; -1 is padding
    quantization: Quantization | None
    groupsize: int                       # of int4 and published weights, 0 for other formats
    wo_groupsize: int                    # the same of wo, smaller where a rank's heads end inside a group
    delta_groupsize: int                 # and of a DeltaNet's

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's shard of a tensor of the whole model's state dict, as a view where it is in one piece."""
        module, _, kind = name.rpartition(".")
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1          # also the MTPHead's, see there
        place = name.split(".", 2)[2] if name.startswith(("layers.", "mtp.layer.")) else name
        split = SPLIT.get(place) or SPLIT.get(place.rpartition(".")[0])
        if split is None or kind == "order":                 # the order of columns, where the rows are split
            return tensor
        dim, counted = split
        if self.args.has_experts(layer):
            counted = EXPERTS.get(counted, counted)
        if layer in self.args.delta_layers:
            counted = DELTA.get(counted, counted)
        if dim == ROWS:
            return select(tensor, ROWS, self.indices[counted])
        if tensor.dim() == 1:            # int8 scales, one a row, serve every rank; a bias must enter the sum only once
            return torch.zeros_like(tensor) if kind == "bias" and self.rank else tensor
        columns = 1                      # of the weight that one stored entry stands for
        if kind in ("scales", "zeros"):
            columns = {"heads": self.wo_groupsize, "delta_values": self.delta_groupsize}.get(counted, self.groupsize)
            tensor = tensor.repeat_interleave(self.groupsize // columns, dim=1)
        elif tensor.dtype == torch.uint8 and self.quantization and self.quantization.mode.startswith("int4"):
            columns = 2
        return select(tensor, COLUMNS, self.indices[counted][::columns] // columns)          # -1 stays -1


def plan(args: ModelArgs, rank: int, world_size: int, quantization: Quantization | None = None) -> Plan:
    """Errors: UserError with the field world_size, the same on every rank, if so many cannot share this model."""
    groupsize = quantization.groupsize if quantization and quantization.mode != "int8" else 0
    check_world_size(args, world_size, groupsize, quantization.reordered if quantization else ())
    q_heads, kv_heads = assign_heads(args.n_head, args.n_local_heads, rank, world_size)
    ffn, expert, shared = (assign_units(size, rank, world_size, groupsize or 16)
                           for size in (args.intermediate_size, args.expert_size, args.shared_expert_size))
    heads = head_rows(q_heads, args.head_dim)
    keys = head_rows(kv_heads, args.head_dim, offset=args.n_head)
    values = head_rows(kv_heads, args.head_dim, offset=args.n_head + args.n_local_heads)
    gates = head_rows(q_heads, args.head_dim, offset=args.n_head + 2 * args.n_local_heads)
    delta_keys = assign_units(args.delta_key_heads, rank, world_size, 1)
    indices = {
        "vocab": assign_units(args.vocab_size, rank, world_size),
        "qkv": torch.cat((heads, keys, values, gates) if args.output_gate else (heads, keys, values)),
        "heads": heads,
        "gate_up": gate_up_rows(ffn, args.intermediate_size),
        "ffn": ffn,
        "expert_gate_up": gate_up_rows(expert, args.expert_size, args.n_expert),
        "expert_ffn": expert,
        "shared_gate_up": gate_up_rows(shared, args.shared_expert_size),
        "shared_ffn": shared,
        **delta_indices(args, delta_keys),
    }
    local = replace(args, n_head=len(q_heads), n_local_heads=len(kv_heads), intermediate_size=len(ffn),
                    expert_size=len(expert), shared_expert_size=len(shared), vocab_size=len(indices["vocab"]),
                    delta_key_heads=len(delta_keys), delta_value_heads=len(indices["delta_heads"]))
    wo_groupsize = uncut_groupsize(args, rank, world_size, groupsize) if groupsize else 0
    return Plan(args, local, rank, indices, quantization, groupsize, wo_groupsize, delta_groupsize(args, groupsize))


def check_world_size(args: ModelArgs, world_size: int, groupsize: int, reordered: tuple[str, ...]) -> None:
    def least_groupsize(n: int) -> int:
        of_delta = delta_groupsize(args, groupsize) if n > 1 else groupsize
        return min(of_delta, *(uncut_groupsize(args, rank, n, groupsize) for rank in range(n)))
    if world_size > args.n_head:
        problem = f"leaves some ranks without any of the {args.n_head} attention heads (1 to {args.n_head} work)"
    elif any(name.endswith((".wo", ".w2")) for name in reordered):
        problem = "is not for GPTQ checkpoints with reordered columns (desc_act), which run in one process only"
    elif groupsize and (least := least_groupsize(world_size)) < MIN_GROUPSIZE:
        works = (str(n) for n in range(1, args.n_head + 1) if least_groupsize(n) >= MIN_GROUPSIZE)
        problem = (f"would cut groups of {groupsize} between attention heads of {args.head_dim} into groups of {least} "
                   f"(the least is {MIN_GROUPSIZE}; {', '.join(works)} works)")
    else:
        return
    raise UserError(f"{world_size} {problem}", "world_size")


def worth_splitting(nbytes: int, n_layer: int, world_size: int, device: torch.device) -> bool:
    """Whether ranks decode faster with a share of nbytes of weights each than with all of them and no collectives."""
    per_token = 2 * n_layer + 2          # collectives: two a layer, the embedding's, the logits'
    return nbytes * (1 - 1 / world_size) > per_token * BYTES_PER_COLLECTIVE[device.type]


def assign_units(size: int, rank: int, world_size: int, unit: int = 16) -> Tensor:
    """The rank's indices among 0 .. size - 1: the same number of whole units for every rank, the padding at the end."""
    share = math.ceil(size / (world_size * unit)) * unit
    indices = torch.arange(rank * share, (rank + 1) * share)
    return torch.where(indices < size, indices, -1)


def assign_heads(n_head: int, n_local_heads: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """The rank's query heads and KV heads, int64; -1 is padding.

    A KV head with the query heads that attend to it may be cut into s pieces, each with a copy of the KV head. The
    pieces are dealt out in order, as many to each rank. s is what leaves a rank the fewest heads: 1 where n_local_heads
    divides evenly, more where there are fewer KV heads than ranks.
    """
    group = n_head // n_local_heads      # query heads of a KV head

    def sizes(s: int) -> tuple[int, int]:
        """Pieces of a rank, query heads of a piece."""
        return math.ceil(n_local_heads * s / world_size), math.ceil(group / s)
    s = min(range(1, group + 1), key=lambda s: (sizes(s)[0] * (sizes(s)[1] + 1), sizes(s)[0]))
    pieces, width = sizes(s)
    piece = torch.arange(rank * pieces, (rank + 1) * pieces)[:, None]
    kv, i = piece // s, piece % s * width + torch.arange(width)                  # i: of the query head in its group
    real = (kv < n_local_heads) & (i < group)
    return torch.where(real, kv * group + i, -1).flatten(), torch.where(real[:, :1], kv, -1).flatten()


def head_rows(heads: Tensor, head_dim: int, offset: int = 0) -> Tensor:
    """Indices of all rows of these heads, in a weight where they come after `offset` other heads."""
    heads = heads[:, None]
    return torch.where(heads < 0, -1, (offset + heads) * head_dim + torch.arange(head_dim)).flatten()


def delta_indices(args: ModelArgs, keys: Tensor) -> dict[str, Tensor]:
    """The rows and columns of a Gated DeltaNet with these key heads, and the value heads that go with them."""
    K, V, Hk, per_key = args.delta_key_dim, args.delta_value_dim, args.delta_key_heads, 0
    if Hk:
        per_key = args.delta_value_heads // Hk
    heads = torch.where(keys[:, None] < 0, -1, keys[:, None] * per_key + torch.arange(per_key)).flatten()
    values = head_rows(heads, V)
    v, z = (torch.where(values < 0, -1, values + first) for first in (2 * Hk * K, args.delta_channels))
    qkv = torch.cat((head_rows(keys, K), head_rows(keys, K, offset=Hk), v))
    ba = torch.cat((heads, torch.where(heads < 0, -1, heads + args.delta_value_heads)))
    return {"delta_qkv": qkv, "delta_qkvz": torch.cat((qkv, z)), "delta_ba": ba, "delta_heads": heads,
            "delta_values": values}


def delta_groupsize(args: ModelArgs, groupsize: int) -> int:
    """The largest fraction of wo's groups that ends where a key head's value heads do."""
    if not args.delta_key_heads:
        return groupsize
    return math.gcd(groupsize, args.delta_value_heads // args.delta_key_heads * args.delta_value_dim)


def gate_up_rows(ffn: Tensor, size: int, experts: int = 1) -> Tensor:
    """The rows of w13 that make hidden units ffn, of each of the experts in turn."""
    first = torch.arange(2 * experts)[:, None] * size            # of gate, up; gate ...
    return torch.where(ffn < 0, -1, first + ffn).flatten()


def uncut_groupsize(args: ModelArgs, rank: int, world_size: int, groupsize: int) -> int:
    """The largest fraction of wo's groups that no border between this rank's heads and others cuts."""
    heads, _ = assign_heads(args.n_head, args.n_local_heads, rank, world_size)
    shifts = torch.where(heads < 0, -len(heads), heads - torch.arange(len(heads)))       # equal for adjacent heads
    begins = [0, *(shifts.diff().nonzero()[:, 0] + 1).tolist()]
    borders = [*begins, *heads[begins].clamp(min=0).tolist(), len(heads)]
    return math.gcd(groupsize, *(border * args.head_dim for border in borders))


def select(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """The tensor's rows or columns at these indices, zeros at -1."""
    if indices[0] >= 0 and bool((indices.diff() == 1).all()):
        return tensor.narrow(dim, int(indices[0]), len(indices))
    selected = tensor.index_select(dim, indices.clamp(min=0).to(tensor.device))
    return selected.index_fill_(dim, (indices < 0).nonzero()[:, 0].to(tensor.device), 0)


# ---- the sharded model

collectives = torch.ops._c10d_functional         # to the compiler operators like any other


def broadcast(x: Tensor, group: str) -> Tensor:
    """Rank 0's x, of the same shape everywhere."""
    return collectives.wait_tensor(collectives.broadcast(x.contiguous(), 0, group))


class AllReduce(nn.Module):
    def __init__(self, ranks: "Ranks"):
        super().__init__()
        self.group = ranks.group

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.group)


class GatherLogits(nn.Module):
    """Every rank's logits [B, P, local V] -> [B, P, V], the same bits on all ranks: so all draw the same tokens."""

    def __init__(self, ranks: "Ranks", vocab_size: int):
        super().__init__()
        self.group, self.world_size, self.vocab_size = ranks.group, ranks.world_size, vocab_size

    def forward(self, x: Tensor) -> Tensor:
        shards = collectives.all_gather_into_tensor(x.contiguous(), self.world_size, self.group)
        shards = collectives.wait_tensor(shards).view(self.world_size, *x.shape)
        return shards.movedim(0, 2).flatten(2)[..., :self.vocab_size]


class VocabParallelEmbedding(nn.Module):
    """Rows first .. first + n - 1 of an embedding; other ranks look up the other ids. [B, S] -> [B, S, C]."""

    def __init__(self, weight: Tensor, first: int, ranks: "Ranks"):
        super().__init__()
        self.weight, self.first, self.group = weight, first, ranks.group

    def forward(self, idx: Tensor) -> Tensor:
        local = idx - self.first
        here = (local >= 0) & (local < self.weight.size(0))
        x = F.embedding(torch.where(here, local, 0), self.weight)
        return all_reduce(x.masked_fill(~here[..., None], 0), self.group)


def build(plan: Plan, ranks: "Ranks") -> Transformer:
    """The rank's shard of the model, empty on the meta device. Its state dict has the whole model's names."""
    with torch.device("meta"):
        model: Any = Transformer(plan.args, plan.local)
        if plan.quantization:
            replace_linears(model, plan.quantization)
        blocks = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
        if model.mtp is not None:
            blocks["mtp.layer"] = model.mtp.layer
        for i, (name, layer) in enumerate(blocks.items()):
            wo = layer.attention.wo
            if plan.quantization and isinstance(wo, Int4Linear):
                groupsize = plan.delta_groupsize if i in plan.args.delta_layers else plan.wo_groupsize
                how, name = replace(plan.quantization, groupsize=groupsize), f"{name}.attention.wo"
                layer.attention.wo = how.linear(name, wo.in_features, wo.out_features, wo.bias is not None)
            layer.attention.reduce = layer.feed_forward.reduce = AllReduce(ranks)
    model.ranks = ranks
    first_id = plan.rank * plan.local.vocab_size
    model.tok_embeddings = VocabParallelEmbedding(model.tok_embeddings.weight, first_id, ranks)
    model.gather = GatherLogits(ranks, plan.args.vocab_size)
    return model


# ---- the processes

class SharedError(UserError):
    """A mistake that every rank knows of."""


@dataclass(frozen=True)
class Ranks:
    """The processes that hold one model, as one of them sees them."""
    rank: int
    world_size: int
    local_rank: int                      # among those on this machine
    local_world_size: int
    group: str                           # the process group of the model's collectives
    control_group: Any                   # of what may be long in coming: a user's next prompt, a file's conversion
    store: Any                           # a torch.distributed.Store

    @property
    def first(self) -> bool:
        return self.rank == 0

    def take_device(self, device: torch.device) -> torch.device:
        """This rank's own device of that type, after a first collective to try it. Errors: UserError."""
        if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":    # torchrun's default: use all cores
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // self.local_world_size))
        if device.type == "cuda":
            if device.index is not None:
                raise UserError(f"{device}: torchrun gives each rank a device of its own: say cuda", "device")
            if self.local_world_size > (n := torch.cuda.device_count()):
                raise UserError(f"{self.local_world_size}: there are {n} CUDA devices", "world_size")
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        self.gather(None)                # no rank may wait in the collective below for one that failed above
        try:
            all_reduce(torch.ones(1, device=device), self.group).item()
        except RuntimeError as error:
            raise UserError(f"the ranks cannot reach each other from {device}: {str(error)[:200]}") from error
        if device.type == "cuda":
            enable_one_shot(self, device)
        return device

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, pickled. Errors: SharedError, on all ranks, if one of the values is a UserError."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        for rank, error in enumerate(values):
            if isinstance(error, UserError):
                raise SharedError(f"{error.message} (on rank {rank})" if rank else error.message, error.field)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, whatever the others pass."""
        return self.gather(value)[0]

    def check_same(self, checkpoint: str, content: Any) -> None:
        """Errors: SharedError, if the content (its repr) is not the same on every rank."""
        found = self.gather((checkpoint, hashlib.sha256(repr(content).encode()).hexdigest()))
        for rank, (name, digest) in enumerate(found):
            if digest != found[0][1]:
                raise SharedError(f"the ranks have different checkpoints: rank 0 {found[0][0]}, rank {rank} {name}")

    def abort_all(self, error: SharedError | str) -> NoReturn:
        """Ends this process; all ranks together print one line. Of a SharedError rank 0 does, and the status is 2; of a
        rank that is lost whichever notices first, and the status is 1."""
        if torchrun_is_gone():                               # and the store with it, and then the other ranks
            end_without_torchrun()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)        # torchrun's, for another rank's end: not amid the line
        sys.stderr = sys.__stderr__                          # of a rank that was silent so far
        shared = isinstance(error, SharedError)
        try:
            prints = self.first if shared else self.store.add("abort", 1) == 1
        except RuntimeError:                                 # the store died with the rank that held it
            prints = True
        if prints:
            fail(error)
        if shared:
            with contextlib.suppress(RuntimeError):
                self.gather(None)                            # a rank that ended sooner would have torchrun stop rank 0
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(2 if shared else 1)                         # an orderly exit would wait for ranks that are gone


def init_dist(timeout: float = 300.0) -> Ranks | None:
    """Joins the processes that torchrun started, as the environment describes them; None where this is the only one.

    timeout: seconds without an answer in the model's collectives after which a rank is lost. Errors: UserError.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    limit, week = datetime.timedelta(seconds=timeout), datetime.timedelta(days=7)
    try:
        local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        store, rank, world_size = next(rendezvous("env://", timeout=limit))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        control_group = dist.new_group(backend="gloo", timeout=week)
        assert dist.group.WORLD
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"torchrun: rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} could not join the "
                        f"others: {error!r:.200}") from error
    return Ranks(rank, world_size, local_rank, local_world_size, dist.group.WORLD.group_name, control_group, store)


def torchrun_is_gone() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT


def end_without_torchrun() -> NoReturn:
    """For a torchrun that was killed itself, and so could not end its ranks."""
    ending.acquire()                     # for good: the watching thread and the main one may both come here
    if os.environ.get("RANK") == "0":
        fail("torchrun, which started the ranks, is gone")
    os._exit(1)


def watch_torchrun() -> None:
    """Ends this process soon after torchrun."""
    def watch() -> None:
        while not torchrun_is_gone():
            time.sleep(1)
        end_without_torchrun()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def joined(timeout: float = 300.0) -> Iterator[Ranks | None]:
    """init_dist for a command: only rank 0 prints, and if one rank fails all end, with one line."""
    watch_torchrun()
    ranks = init_dist(timeout)
    if ranks is None:
        yield None
        return
    if not torch.cuda.is_available():    # Python runs no handler while it waits for a GPU; there the signal just kills
        stopped = f"torchrun stopped rank {ranks.rank}: another rank failed, or it was interrupted"
        signal.signal(signal.SIGTERM, lambda *_: ranks.abort_all(stopped))
    silence = None if ranks.first else open(os.devnull, "w")
    try:
        with contextlib.redirect_stdout(silence or sys.stdout), contextlib.redirect_stderr(silence or sys.stderr):
            try:
                with system_errors():
                    yield ranks
                ranks.gather(None)       # a mistake at another's end, say a file that cannot be written, is everybody's
            except UserError as error:
                if not isinstance(error, SharedError):
                    ranks.gather(error)                      # raises SharedError, as the other ranks' next one does
                raise
    except SharedError as error:
        ranks.abort_all(error)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        ranks.abort_all(f"rank {ranks.rank} lost touch with another rank, which died or did not answer for "
                        f"{timeout:.0f} s ({str(error)[:200]})")
    dist.destroy_process_group()
