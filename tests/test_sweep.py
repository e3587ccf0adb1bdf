"""The sweep over speculative decoding, its table and verdict; the example scripts."""
import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import generate
from cli import UserError
from conftest import ROOT
from speculate import predicted_speedup

sys.path.insert(0, str(ROOT / "scripts"))

import speculate_sweep

DRAFT = str(ROOT / "checkpoints" / "demo-draft")


@pytest.mark.parametrize("script, model", [
    ("speculate_7B_int4.sh", "Qwen3-8B"), ("speculate_34B_bf16.sh", "Qwen3-32B"),
    ("speculate_70B_int4.sh", "Qwen2.5-72B"), ("speculate_tp_70B_bf16.sh", "Qwen2.5-72B")])
def test_examples_call_what_exists(script, model, tmp_path):
    """With an interpreter that writes down its arguments: the model's name, and flags that the commands take."""
    calls = called(script, tmp_path)
    args = generate.parse_args(shlex.split(calls[-1].split("generate.py ")[1].replace("def quicksort(arr):", "text")))
    assert model in str(args.checkpoint_path) and args.speculate_k == "auto" and args.compile
    assert args.draft_checkpoint_path.name == ("model.pth" if "7B" in script else "model_int4.g32.pth")
    assert ("int4" in script) == ("int4" in args.checkpoint_path.name)
    assert ("_tp_" in script) == ("--nproc_per_node=8 generate.py" in calls[-1])
    quantized = [call.split()[2] for call in calls[:-1]]
    assert quantized == [f"{path.parent}/model.pth" for path in (args.checkpoint_path, args.draft_checkpoint_path)
                         if "int4" in path.name]
    assert ("--round_to_nearest" in calls[0]) == ("70B_int4" in script)


def test_examples_take_another_pair_and_options(tmp_path):
    call = called("speculate_7B_int4.sh", tmp_path, "a/target", "a/draft", "--device", "cuda")[-1]
    assert "--checkpoint_path checkpoints/a/target/model_int4.g32.pth " in call
    assert "--draft_checkpoint_path checkpoints/a/draft/model.pth " in call
    assert call.endswith("--device cuda")


def called(script, tmp_path, *options):
    """The arguments that a script calls Python with, in a folder where nothing has been downloaded."""
    (tmp_path / "scripts").mkdir()
    for name in (script, "speculate.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "scripts" / "prepare.sh").write_text(":")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/calls\n")
    python.chmod(0o755)
    env = {"PYTHON": str(python), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", tmp_path / "scripts" / script, *options], env=env, check=True)
    return (tmp_path / "calls").read_text().splitlines()


def test_sweep(tmp_path, capsys, monkeypatch):
    """A fixed k and auto: the table, and what the formula makes of the costs and the acceptance."""
    monkeypatch.setattr(speculate_sweep, "run_apart", lambda experiment: json.loads(json.dumps(
        speculate_sweep.measure(experiment, None))))
    speculate_sweep.main(["--draft_checkpoint_path", DRAFT, "--speculate_k", "2", "auto", "--prompts", "prose",
                          "--max_new_tokens", "12", "--num_samples", "1", "--device", "cpu", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    for column in ("DRAFT_MODEL", "draft quantization", "speculate_k", "MODEL", "model quantization", "device",
                   "nproc_per_node", "compile", "prompt", "compile_prefill", "average tokens/sec", "memory used GB",
                   "bandwidth GB/s", "Mean Accepted", "max_new_tokens", "num_samples", "temperature", "torch version",
                   "speed-up", "formula", "predicted best k"):
        assert f"| {column} |" in lines[0]
    assert len(lines) == 5 and lines[4].startswith(("pays: ", "does not pay: "))
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [(row["draft_model"], row["speculate_k"]) for row in rows] == [("demo-draft", 2), ("demo-draft", "auto")]
    for row in rows:
        assert row["model"] == "demo" and 0 <= row["acceptance"] <= 1 and 0 <= row["mean_accepted"] <= row["best_k"] + 8
        assert row["rate"] > 0 and row["plain_rate"] > 0 and row["bandwidth"] > 0 and row["draft_cost"] > 0
    a, c, v = rows[0]["acceptance"], rows[0]["draft_cost"], rows[0]["verify_cost"]["2"]
    assert rows[0]["predicted"] == pytest.approx(predicted_speedup(a, 2, c, v))
    assert (tmp_path / "sweep.csv").read_text().count("\n") == 3


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_over_two_ranks(tmp_path, capsys):
    speculate_sweep.main(["--prompts", "prose", "--max_new_tokens", "8", "--num_samples", "1", "--device", "cpu",
                          "--nproc_per_node", "2", "--out", str(tmp_path)])
    row = json.loads((tmp_path / "sweep.json").read_text())["rows"][0]
    assert row["nproc_per_node"] == 2 and row["rate"] > 0


def test_a_failing_experiment_is_told_in_a_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "warning: noise\nerror: /nowhere: no such file\n")
    monkeypatch.setattr(speculate_sweep.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match="'prompt': 'code'.*error: /nowhere: no such file$"):
        speculate_sweep.main(["--checkpoint_path", "/nowhere", "--prompts", "code", "--out", str(tmp_path)])


def test_rows_add_up():
    """Two samples of 10 tokens: of 7 drafted tokens that were tested 6 are accepted; c = 0.1, v = 1.2."""
    rounds = [dict(plain=2.0, seconds=1.0, speedup=1.8, counts=[1, 0, 1], tested=3, passes=5),
              dict(plain=3.0, seconds=1.0, speedup=2.2, counts=[0, 0, 2], tested=4, passes=3)]
    found = dict(rounds=rounds, plain_s=0.1, draft_s=0.01, verify_s=[[2, 0.12]], weights=10**9, memory=1.0)
    experiment = dict(checkpoint_path=DRAFT, draft_checkpoint_path="ngram", speculate_k="auto", max_new_tokens=10)
    row = speculate_sweep.row_of(1, experiment, found)
    assert (row["rate"], row["plain_rate"], row["bandwidth"]) == (10, 4, 4) and row["speedup"] == pytest.approx(2)
    a = 6 / 7
    assert row["acceptance"] == pytest.approx(a) and row["mean_accepted"] == 1.5 and row["best_k"] == 2
    assert row["predicted"] == pytest.approx((1 + a + a * a) / (1.2 + 0.2))
    assert (row["model"], row["model_quantization"], row["draft_quantization"]) == ("demo-draft", "none", "none")
    assert row["torch"] == torch.__version__


def test_verdicts():
    row = dict(speculate_k=2, draft_model="d", model="m", prompt="code", best_k=2, verify_cost={1: 1.1, 2: 1.2},
               acceptance=0.5, draft_cost=0.55, speedup=0.8)
    assert speculate_sweep.verdict([row, {**row, "speedup": 1.9}]) == "pays: 1.90x at k=2 (d for m, code)"
    assert speculate_sweep.verdict([row]) == (
        "does not pay: the draft costs 0.55 of a target step; it would have to cost less than 0.40")
    assert "too few for any draft" in speculate_sweep.verdict([{**row, "acceptance": 0.05}])


@pytest.mark.parametrize("k", ["0", "-1", "many"])
def test_bad_k_is_refused(k):
    with pytest.raises(UserError) as refused:
        speculate_sweep.main(["--speculate_k", "2", k])
    assert refused.value.field == "speculate_k" and k in str(refused.value)
