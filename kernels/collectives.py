"""The sum over ranks: by NCCL or gloo or, where GPUs reach one another's memory, in one launch.

A decoding step's sums are a few kilobytes, over which NCCL takes several times as long as a launch. Each rank writes
its part to memory that all of them map (symmetric memory), waits for the others, and adds up all parts itself.
"""
import importlib
import sys
from typing import Any

import torch
from torch import Tensor

ONE_SHOT_BYTES = 128 << 10           # each rank reads all of every rank: for more, NCCL shares the work (assumed)
ONE_SHOT_RANKS = 8                   # of one machine
symmetric: dict[str, Tensor] = {}    # by process group: ONE_SHOT_BYTES of memory that passed enable_one_shot's test


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's x, of the same shape everywhere: the same bits on all ranks."""
    if x.is_cuda and group in symmetric and fits(x):
        return torch.ops.qwen_fast.one_shot_all_reduce(x.contiguous(), group)
    return all_reduce_reference(x, group)


def all_reduce_reference(x: Tensor, group: str) -> Tensor:
    """By operators that the compiler takes for any other, and CUDA graphs record."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


def fits(x: Tensor) -> bool:
    nbytes = x.numel() * x.itemsize
    return x.dtype in (torch.bfloat16, torch.float32) and nbytes <= ONE_SHOT_BYTES and nbytes % 16 == 0


@torch.library.custom_op("qwen_fast::one_shot_all_reduce", mutates_args=())
def one_shot_all_reduce(x: Tensor, group: str) -> Tensor:
    """Opaque to the compiler, which would copy the symmetric memory as it does inputs. The kernel ends when all ranks
    have read, so that the next one may write."""
    memory = symmetric[group][:x.nbytes].view(x.dtype).view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(memory, x, "sum", group)


@one_shot_all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


# ---- whether it is used

def enable_one_shot(ranks: Any, device: torch.device) -> None:
    """Where every rank's device offers it and a test finds the right sums; else NCCL stays, and one line says why.

    ranks: tp.Ranks, all of which call this, each with its own device.
    """
    if not all(ranks.gather(reaches_all(ranks, device))):
        return
    for attempt in (share_memory, add_up):             # none waits in a kernel for a rank that has no memory
        try:
            problem = attempt(ranks, device)
        except Exception as error:                     # of an interface that may change, and of drivers
            problem = f"{type(error).__name__}: {error}"
        problems = [problem for problem in ranks.gather(problem) if problem]
        if problems:
            symmetric.pop(ranks.group, None)
            print(f"all-reduce by NCCL, not by symmetric memory: {problems[0]:.200}", file=sys.stderr)
            return


def reaches_all(ranks: Any, device: torch.device) -> bool:
    """Whether a device may map the memory of all others; its own kernels add bf16 from compute capability 8.0 on."""
    if device.type != "cuda" or torch.version.hip or not ranks.local_world_size == ranks.world_size <= ONE_SHOT_RANKS:
        return False
    others = (i for i in range(ranks.world_size) if i != device.index)
    return torch.cuda.get_device_capability(device) >= (8, 0) and all(
        torch.cuda.can_device_access_peer(device, i) for i in others)


def share_memory(ranks: Any, device: torch.device) -> str | None:
    module: Any = importlib.import_module("torch.distributed._symmetric_memory")
    symmetric[ranks.group] = module.empty(ONE_SHOT_BYTES, dtype=torch.uint8, device=device)
    module.rendezvous(symmetric[ranks.group], ranks.group)


def add_up(ranks: Any, device: torch.device) -> str | None:
    """Sums of small integers, which are exact, twice in the same memory; the problem if there is one."""
    n = ranks.world_size
    for dtype, size in ((torch.bfloat16, 8), (torch.bfloat16, 4096), (torch.float32, ONE_SHOT_BYTES // 4)) * 2:
        x = torch.arange(size, device=device) % 7
        y = one_shot_all_reduce((x + ranks.rank).to(dtype), ranks.group)
        if not torch.equal(y, (n * x + n * (n - 1) // 2).to(dtype)):
            return f"wrong sums of {size} numbers in {str(dtype)[6:]}"
