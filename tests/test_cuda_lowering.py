"""Every compiled step lowers for CUDA, in every format: needs PyTorch's build for CUDA, and no GPU."""
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

STEPS = {"decode, greedy", "decode, top_k", "verify, greedy", "verify, top_k, model", "batch", "prefill"}
SAMPLED = {"decode, top_p", "decode, all", "verify, top_k, ngram"}               # of one kind
FUSED = {"decode, fused", "verify, fused", "batch, fused", "prefill, fused"}
FEW = {"experts", "hybrid", "hybrid of experts"}         # whose operator takes up to 16 tokens
UNFUSED = {"act-order", "ranks", "one launch"}           # whose layers do not run as one operator


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(torch.version.cuda is None, reason="this build of PyTorch is not for CUDA")
@pytest.mark.parametrize("kind, dtype", [("none", "bf16"), ("none", "fp16"), ("int8", "bf16"), ("int8", "fp16"),
                                         ("int4", "bf16"), ("int4", "fp16"), ("int4-fp16", "bf16"),
                                         ("int4-fp16", "fp16"), ("int8-fp16", "bf16"), ("act-order", "bf16"),
                                         ("act-order", "fp16"), ("experts", "bf16"), ("ranks", "bf16"),
                                         ("ranks", "fp16"), ("one launch", "bf16"), ("hybrid", "bf16"),
                                         ("hybrid", "fp16"), ("hybrid of experts", "bf16")])
def test_steps_lower_for_cuda(kind, dtype, tmp_path, monkeypatch):
    """Each whole, without waiting for the device; two ranks with their sums inside; settings and lengths as data."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = subprocess.run([sys.executable, ROOT / "tests" / "cuda_lowering.py", kind, dtype], capture_output=True,
                          text=True)
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    fused = set() if kind in UNFUSED else FUSED - {"prefill, fused"} if kind in FEW else FUSED
    expected = dict.fromkeys(STEPS | fused | (SAMPLED if kind == "none" else set()), "lowered")
    if kind in ("none", "int4"):
        expected["40 requests"] = "compiled 1 and 1 times"
    assert found == expected, done.stderr[-2000:]
