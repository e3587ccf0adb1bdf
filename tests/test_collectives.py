"""When sums over ranks are taken in one launch: a module stands for PyTorch's symmetric memory, and one process for two
ranks. test_tp.py has real ranks, test_cuda_lowering.py the compiled steps."""
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import collectives

CPU = torch.device("cpu")


class Ranks(SimpleNamespace):
    """Rank 0 of 2: what the other one says is prepared, by default the same."""
    rank, world_size, local_world_size, group = 0, 2, 2, "ours"

    def gather(self, value) -> list:
        others = getattr(self, "others", [])
        return [value, others.pop(0) if others else value]


@pytest.fixture
def symmetric_memory(monkeypatch):
    """In memory of this process, where rank 1 has what rank 0 has, plus 1; its field `wrong` is added to sums."""
    shared = SimpleNamespace(wrong=0, rendezvous=lambda tensor, group: None, empty=torch.empty)
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", shared)
    monkeypatch.setattr(collectives, "symmetric", {})
    monkeypatch.setattr(collectives, "reaches_all", lambda ranks, device: True)

    def reduce(memory, x, op, group):
        assert op == "sum" and group == "ours" and memory.shape == x.shape and memory.dtype == x.dtype
        memory.copy_(x)
        return memory + (memory + 1) + shared.wrong
    library = torch.library.Library("symm_mem", "IMPL", "CPU")
    library.impl("one_shot_all_reduce_copy", reduce)
    yield shared
    library._destroy()


def test_it_is_enabled_if_sums_are_right_on_all_ranks(symmetric_memory, capsys):
    collectives.enable_one_shot(Ranks(), CPU)
    assert collectives.symmetric["ours"].numel() == collectives.ONE_SHOT_BYTES and not capsys.readouterr().err


@pytest.mark.parametrize("change, others, problem", [
    (dict(wrong=1), [], "wrong sums of 8 numbers in bfloat16"),
    (dict(rendezvous=lambda *_: 1 / 0), [], "ZeroDivisionError: division by zero"),
    (dict(), [True, "RuntimeError: no such device"], "RuntimeError: no such device"),
    (dict(), [True, None, "wrong sums of 8 numbers in bfloat16"], "wrong sums of 8 numbers in bfloat16")])
def test_else_all_ranks_stay_with_nccl_and_one_line_says_so(symmetric_memory, capsys, change, others, problem):
    vars(symmetric_memory).update(change)
    collectives.enable_one_shot(Ranks(others=others), CPU)
    assert collectives.symmetric == {}
    assert capsys.readouterr().err == f"all-reduce by NCCL, not by symmetric memory: {problem}\n"


def test_a_rank_that_does_not_reach_the_others_keeps_all_from_trying(symmetric_memory, capsys):
    symmetric_memory.empty = None
    collectives.enable_one_shot(Ranks(others=[False]), CPU)
    assert collectives.symmetric == {} and not capsys.readouterr().err


@pytest.mark.parametrize("change, reaches", [
    (dict(), True), (dict(device=CPU), False), (dict(hip="6.4"), False), (dict(capability=(7, 5)), False),
    (dict(world_size=4), False), (dict(world_size=16, local_world_size=16), False), (dict(peers=[0]), False)])
def test_devices_that_reach_one_another(monkeypatch, change, reaches):
    """Of one machine, sm_80 or later, every one by every other."""
    case = dict(device=torch.device("cuda", 0), hip=None, capability=(9, 0), peers=[0, 1]) | change
    monkeypatch.setattr(torch.version, "hip", case["hip"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: peer in case["peers"])
    sizes = {name: change[name] for name in ("world_size", "local_world_size") if name in change}
    assert collectives.reaches_all(Ranks(**sizes), case["device"]) == reaches


@pytest.mark.parametrize("shape, dtype, device, group, expected", [
    ((1, 1, 4096), torch.bfloat16, "cuda", "ours", "one_shot_all_reduce"),
    ((1, 16, 4096), torch.bfloat16, "cuda", "ours", "one_shot_all_reduce"),
    ((1, 1, 4096), torch.float32, "cuda", "ours", "one_shot_all_reduce"),
    ((1, 17, 4096), torch.bfloat16, "cuda", "ours", "all_reduce"),       # more than ONE_SHOT_BYTES
    ((1, 1, 4096), torch.float16, "cuda", "ours", "all_reduce"),         # for which there is no kernel
    ((1, 1, 1), torch.float32, "cuda", "ours", "all_reduce"),            # no whole 16 bytes
    ((1, 1, 4096), torch.bfloat16, "cuda", "theirs", "all_reduce"),      # without symmetric memory
    ((1, 1, 4096), torch.bfloat16, "cpu", "ours", "all_reduce")])
def test_which_sums_are_taken_in_one_launch(monkeypatch, shape, dtype, device, group, expected):
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name().split("::")[1])
            return func(*args, **(kwargs or {}))
    monkeypatch.setattr(collectives, "symmetric", {"ours": None})
    with FakeTensorMode(), Record():
        y = collectives.all_reduce(torch.empty(shape, dtype=dtype, device=device), group)
    assert y.shape == shape and y.dtype == dtype and [name for name in called if "all_reduce" in name] == [expected]
