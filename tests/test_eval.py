"""Perplexity and comparison, against transformers; the command."""
import math
import shutil

import pytest
import torch

import harness
from cli import UserError
from conftest import EOS, ROOT, expected_logprobs
from eval import compare, main, perplexity, token_logits, windows
from loading import load_model

HELDOUT = (ROOT / "tests" / "data" / "heldout.txt").read_text("utf-8")


# ---- perplexity

@pytest.mark.parametrize("length, window, stride", [(100, 32, 32), (100, 32, 8), (64, 64, 16), (7, 3, 1)])
def test_windows_predict_every_token_once(length, window, stride):
    text = list(range(1, length + 1))
    targets = []
    for tokens, expected in windows(text, 0, window, stride):
        assert len(tokens) <= window and tokens[-len(expected):][1:] == expected[:-1] and tokens[-1] == expected[-1] - 1
        targets += expected
    assert targets == text


def test_windows_are_lm_evals_rolling_windows():
    utils = pytest.importorskip("lm_eval.utils")
    text = list(range(1, 100))
    for stride in (32, 8):
        expected = list(utils.get_rolling_token_windows(text, 0, 32, 32 - stride + 1))
        assert list(windows(text, 0, 32, stride)) == expected


def test_perplexity_equals_transformers(eval_model, hf_model):
    text = HELDOUT[:700]
    score = perplexity(*eval_model, text, 128, 64)
    tokens = [EOS, *eval_model[1].encode(text)]
    nll, begin = 0.0, 0
    for end in [*range(128, 700, 64), 700]:
        nll -= expected_logprobs(hf_model, tokens[max(0, end - 128):begin + 1], tokens[begin + 1:end + 1])[0]
        begin = end
    assert score.tokens == score.bytes == 700
    assert score.perplexity == pytest.approx(math.exp(nll / 700), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nll / math.log(2) / 700, rel=1e-6)
    assert perplexity(*eval_model, text, 128, 64, chunk=16).nll == pytest.approx(score.nll, rel=1e-5)


@torch.inference_mode()
def test_token_logits_equal_one_pass(eval_model, hf_model):
    tokens = torch.randint(256, (90,)).tolist()
    for last, chunk in ((90, None), (20, 16), (1, 7)):
        logits, targets = map(torch.cat, zip(*token_logits(eval_model[0], tokens, tokens[-last:], chunk), strict=True))
        assert targets.tolist() == tokens[-last:]
        torch.testing.assert_close(logits, hf_model(torch.tensor([tokens])).logits[0, -last:], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_compare(eval_model, eval_folder, tmp_path, hf_model):
    other = shutil.copytree(eval_folder, tmp_path / "other")
    checkpoint = torch.load(other / "model.pth", weights_only=True)
    noise = torch.Generator().manual_seed(0)
    state = {name: w + 0.01 * torch.randn(w.shape, generator=noise) for name, w in checkpoint["state_dict"].items()}
    torch.save({**checkpoint, "state_dict": state}, other / "model.pth")
    text = HELDOUT[:300]
    same, changed = compare([eval_folder / "model.pth", other], text, 300, 300, "cpu", torch.float32)
    assert (same.kl, same.agreement) == (0, 1)
    assert same.score.nll == pytest.approx(perplexity(*eval_model, text, 300, 300).nll)

    tokens = torch.tensor([[EOS, *eval_model[1].encode(text)[:-1]]])
    theirs = load_model(other, "cpu", torch.float32)[0]
    theirs.setup_caches(1, 300)
    p = hf_model(tokens).logits[0].log_softmax(-1)
    q = theirs(tokens, torch.arange(300), torch.arange(300))[0].log_softmax(-1)
    assert changed.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3) and changed.kl > 0
    assert changed.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert changed.agreement < 1
    assert changed.size == (other / "model.pth").stat().st_size


# ---- the command

def run_command(*arguments):
    main(["--device", "cpu", "--dtype", "fp32", *map(str, arguments)])


def test_command_perplexity(eval_folder, tmp_path, capsys):
    (tmp_path / "text").write_text(HELDOUT[:600])
    run_command("--checkpoint_path", eval_folder, "--perplexity", tmp_path / "text", "--max_seq_length", 256)
    assert " bits per byte, 600 tokens, 600 bytes" in capsys.readouterr().out
    run_command("--perplexity", tmp_path / "text", "--max_seq_length", 256,
                "--compare", eval_folder, eval_folder / "model.pth")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.split()[-2:] == ["0.00000", "100.00%"] for line in lines[1:])


@pytest.mark.parametrize("arguments, message", [
    ([], "nothing to do"),
    (["--compare", "a.pth"], "--compare needs a text"),
    (["--compare", "a.pth", "--perplexity", "SHORT", "--tasks", "x"], "and no tasks"),
    (["--perplexity", "/nowhere"], "--perplexity /nowhere: cannot be read"),
    (["--perplexity", "EMPTY"], "empty"),
    (["--perplexity", "SHORT"], "--perplexity needs a text of a window of 512"),
    (["--perplexity", "SHORT", "--max_seq_length", "4", "--stride", "5"], "--stride 5"),
    (["--perplexity", "SHORT", "--stride", "0"], "--stride 0"),
    (["--perplexity", "SHORT", "--max_seq_length", "513"], "--max_seq_length 513"),
    (["--perplexity", "SHORT", "--compare", "/nowhere/model.pth"], "/nowhere/model.pth"),
    (["--tasks", "x", "--batch_size", "0"], "--batch_size 0"),
    (["--tasks", "x", "--batch_size", "many"], "--batch_size many"),
    (["--tasks", "x", "--limit", "-1"], "--limit -1"),
    (["--tasks", "x", "--num_fewshot", "-1"], "--num_fewshot -1"),
    (["--tasks", "x", "--seed", "-1"], "--seed -1"),
    (["--tasks", "x", "--dtype", "fp16"], "--dtype fp16"),
    (["--tasks", "x", "--output_path", "SHORT"], "--output_path"),
    (["--tasks", "x", "--include_path", "/nowhere"], "--include_path /nowhere"),
])
def test_bad_input_is_one_line_and_status_2(eval_folder, tmp_path, refusal, arguments, message):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "SHORT").write_text("def f(x):")
    arguments = [tmp_path / a if a in ("EMPTY", "SHORT") else a for a in arguments]
    assert message in refusal(main, "--device", "cpu", "--dtype", "fp32", "--model", eval_folder, *arguments)


TASKS = ROOT / "tests" / "lm_eval_tasks"
GOOD = (TASKS / "choice.yaml").read_text()
BROKEN = {                                   # task files: by name and as a file each is refused, or was fine
    "no YAML": "a: [", "list": "- 1", "empty": "", "bytes": "\xff\0", "no data": "task: heldout_choice\n",
    "output type": GOOD.replace("multiple_choice", "junk"), "data": GOOD.replace("choice.json", "nowhere.json"),
    "function": GOOD + "\nprocess_docs: !function nowhere.f\n", "no metric": GOOD + "\nmetric_list: [{metric: zz}]\n",
    "metrics": GOOD + "\nmetric_list: 5\n", "include": GOOD + "\ninclude: nowhere.yaml\n",
    "itself": GOOD + "\ninclude: task.yaml\n", "group of none": "group: heldout_choice\ntask: [nowhere]\n",
    "group of itself": "group: heldout_choice\ntask: [heldout_choice]\n", "key": GOOD + "\nzzz: 5\n",
    "delimiter": GOOD + "\ntarget_delimiter: 5\n", "template": GOOD.replace('"{{context}}"', '"{{ a.b.c }}"'),
    "split": GOOD.replace("test_split: test", "test_split: zz")}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tasks_are_refused_in_a_line(name, tmp_path):
    folder = shutil.copytree(TASKS, tmp_path / "tasks", ignore=shutil.ignore_patterns("*.yaml"))
    (folder / "task.yaml").write_bytes(BROKEN[name].encode("latin-1"))
    for task in ("heldout_choice", str(folder / "task.yaml")):
        with pytest.raises(UserError, match="heldout_choice|task.yaml") as caught:
            harness.load_tasks([task], folder, include_defaults=False)
        assert caught.value.field == "tasks"


def test_more_examples_than_there_are(eval_folder):
    argv = ["--include_path", TASKS, "--tasks", "heldout_choice", "--limit", "1", "--num_fewshot", "99999999"]
    with pytest.raises(UserError, match="num_fewshot 99999999 examples are more than a task has"):
        main(["--device", "cpu", "--model", str(eval_folder), *map(str, argv)])
