"""GPTQ against the algorithm's plain definition, on tiny checkpoints and on the demo; and published GPTQ and AWQ checkpoints."""
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import ROOT
from published import publish
from test_quantize import dequantized
from test_tp import start_ranks, text_of

import calibration
import cli
import formats
import loading
import generate
import GPTQ
import harness
import quantize
from convert import PublishedQuantization, convert
from eval import compare
from eval import main as eval_main
from formats import Int4Linear, Int8Linear, GPTQLinear
from generate import load_model
from quantize import Calibration, quantize_checkpoint

HELDOUT = (ROOT / "tests" / "data" / "heldout.txt").read_text("utf-8")
DEMO = ROOT / "checkpoints" / "demo"
TASKS = ROOT / "tests" / "lm_eval_tasks"


# ---- the algorithm

def plain_gptq(w, hessian, linear, percdamp, act_order):
    """The definition, one column after another in fp64: each error is spread over all later columns through the inverse Hessian of what is left."""
    K, G = w.size(1), linear.groupsize
    diagonal = hessian.diagonal()
    groups = [list(range(i, min(i + G, K))) for i in range(0, K, G)]
    if act_order:
        groups = [sorted(group, key=lambda i: -diagonal[i].item()) for group in groups]
        groups.sort(key=lambda group: -sum(diagonal[i].item() for i in group) / len(group))
    order = sum(groups, [])
    mean = diagonal[diagonal != 0].double().mean()
    H = hessian.double() + torch.diag((diagonal == 0) * mean) + percdamp * mean * torch.eye(K)
    w, H = w.double()[:, order], H[order][:, order]
    left = [torch.linalg.inv(H[j:, j:]) for j in range(K)]
    q = torch.empty_like(w)
    starts = {sum(map(len, groups[:i])): len(group) for i, group in enumerate(groups)}
    for j in range(K):
        if j in starts:
            part = slice(j, j + starts[j])
            importance = torch.tensor([1 / left[i][0, 0] for i in range(j, part.stop)])
            if isinstance(linear, Int8Linear):
                scale, zero = w[:, part].abs().amax(1) / 127, 0
            else:
                scales, zeros = formats.int4_scales(w[:, part].float(), starts[j], importance.float() / importance.float().mean())
                scale, zero = scales[:, 0].double(), zeros[:, 0].double() / 16
        lowest, highest = (-127, 127) if isinstance(linear, Int8Linear) else (0, 15)
        q[:, j] = (w[:, j] / scale + zero).round().clamp(lowest, highest)
        error = (w[:, j] - (q[:, j] - zero) * scale) / left[j][0, 0]
        w[:, j + 1:] -= error[:, None] * left[j][0, 1:]
    return q[:, torch.tensor(order).argsort()]


def inputs_of(K, tokens=400):
    """Correlated, some louder than others."""
    return torch.randn(tokens, K) @ torch.randn(K, K) / K ** 0.5 * torch.rand(K).mul(2).exp() + torch.randn(K)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("kind,N,K,G,blocksize", [
    ("int4", 8, 128, 32, 128), ("int4", 8, 128, 32, 1), ("int4", 5, 90, 32, 40), ("int4", 4, 300, 256, 128), ("int4", 4, 200, 64, 128),
    ("int8", 8, 96, 0, 32)])
def test_same_integers_as_the_definition(kind, N, K, G, blocksize, act_order):
    torch.manual_seed(K + N + 1)
    w, x = torch.randn(N, K), inputs_of(K)
    x[:, 7] = 0                                                  # a dead column
    hessian = GPTQ.hessian_of(x.split(150), K)
    assert torch.allclose(hessian.double(), x.double().T @ x.double(), rtol=1e-4, atol=1e-2)
    linear = Int8Linear(K, N) if kind == "int8" else Int4Linear(K, N, groupsize=G)
    buffers, quantized = GPTQ.quantize_matrix(w, hessian, linear, GPTQ.Options(0.01, blocksize, act_order))
    expected = plain_gptq(w, hessian, linear, 0.01, act_order)
    q = buffers["weight"] if kind == "int8" else formats.unpack(buffers["weight"], K)
    assert torch.equal(q.double(), expected)
    assert torch.equal(linear.dequantize(**buffers), quantized)
    nearest = linear.dequantize(**linear.quantize(w))
    assert ((quantized - w) @ x.T).norm() < 0.9 * ((nearest - w) @ x.T).norm()
    assert (quantized - w)[:, 7].norm() < 0.3 * w[:, 7].norm()        # rounded, not forgotten


def test_the_scale_of_the_activations_does_not_matter():
    """Not even beside a dead column, or where all are dead: then all is rounded."""
    torch.manual_seed(0)
    w, x = torch.randn(8, 64), inputs_of(64)
    x[:, 5] = 0
    linear = Int4Linear(64, 8, groupsize=32)
    one, other, dead = (GPTQ.quantize_matrix(w, GPTQ.hessian_of([x], 64) * scale, linear)[0] for scale in (1, 2.0 ** -40, 0))
    nearest = linear.quantize(w)
    for key in one:
        assert torch.equal(one[key], other[key])
        assert torch.equal(dead[key], nearest[key])


def test_damping_is_raised_and_said(capsys):
    """Two inputs that are always equal, and no damping: the Hessian is singular."""
    torch.manual_seed(0)
    x = torch.randn(100, 32)
    x[:, 1] = x[:, 0]
    hessian = x.T @ x
    hessian[0, 0] *= 1 - 1e-4                                    # as rounding may make it, a little below
    U = GPTQ.inverse_factor(hessian, 0.0, "layers.0.attention.wo")
    err = capsys.readouterr().err
    assert "layers.0.attention.wo: the Hessian is not positive definite; damping raised to 0.0" in err
    assert U.isfinite().all() and torch.equal(U, U.triu())


def test_inverse_factor_of_more_columns_than_are_found_together():
    K = GPTQ.COLUMNS + 100
    torch.manual_seed(0)
    hessian = GPTQ.hessian_of([torch.randn(2 * K, K)], K)
    U = GPTQ.inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(K)
    assert torch.equal(U, U.triu())
    assert (U.T @ U @ damped - torch.eye(K)).abs().max() < 1e-5


# ---- files

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family: str):
        if family not in made:
            path = made[family] = tmp_path_factory.mktemp(family)
            if family == "qwen-v1":
                tiny.save_qwen_v1(tiny.reference("qwen2", num_key_value_heads=4), path)
            else:
                tiny.save(tiny.reference(family), path)
            load_model(path)
        return made[family]
    return folder


TOKENS = torch.randint(256, (12, 64), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits_of(path) -> torch.Tensor:
    model, _ = load_model(path, "cpu", torch.float32)
    model.setup_caches(len(TOKENS), TOKENS.size(1))
    pos = torch.arange(TOKENS.size(1))
    return model(TOKENS, pos, pos)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "qwen-v1"])
def test_every_family(folders, family):
    """Biases, windows, logn and all: what GPTQ minimizes comes out smaller than from rounding."""
    path = folders(family) / "model.pth"
    plain = logits_of(path)
    errors = {}
    for mode in ("int4", "int4-gptq"):
        calibration = Calibration(TOKENS) if "-" in mode else None
        file = quantize_checkpoint(path, mode, 32, skip=("layers.1.feed_forward.w2",), progress=False, calibration=calibration)
        errors[mode] = (logits_of(file) - plain).norm() / plain.norm()
    assert file.name == "model_int4-gptq.g32.pth" and loading.read_checkpoint(file)[1].mode == "int4"
    assert errors["int4-gptq"] < 0.95 * errors["int4"]


def test_each_linear_sees_what_the_quantized_ones_before_it_produce(folders, monkeypatch):
    """The Hessians that GPTQ is given are those of the inputs in the finished quantized model."""
    given = {}
    whole = GPTQ.quantize_matrix

    def keep(weight, hessian, target, options, name):
        given[name] = hessian.clone()
        return whole(weight, hessian, target, options, name)
    monkeypatch.setattr(GPTQ, "quantize_matrix", keep)
    path = quantize_checkpoint(folders("qwen3") / "model.pth", "int4-gptq", 32, progress=False, calibration=Calibration(TOKENS))
    model, _ = load_model(path, "cpu", torch.float32)
    formats.set_quantize_activations(model, False)
    found = {}
    for name in given:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, x, name=name: found.update({name: x[0].flatten(0, 1).T.double() @ x[0].flatten(0, 1).double()}))
    model.setup_caches(len(TOKENS), TOKENS.size(1))
    model.stack = None                                           # the linears are to be called one by one
    model(TOKENS, torch.arange(TOKENS.size(1)))
    assert len(given) == 12 and found.keys() == given.keys()
    for name in given:
        assert (given[name] - found[name]).norm() < 1e-3 * found[name].norm(), name


def test_what_a_model_writes_is_as_probable_as_it_says(folders):
    path = folders("qwen2") / "model.pth"
    tokens = calibration.own_text(path, progress=False)
    assert tokens.shape == (calibration.OWN_SEQUENCES, calibration.OWN_LENGTH) and torch.equal(tokens, calibration.own_text(path, progress=False))
    model, tokenizer = load_model(path, "cpu", torch.float32)
    model.setup_caches(*tokens.shape)
    pos = torch.arange(tokens.size(1) - 1)
    predicted = model(tokens[:, :-1], pos, pos)[:, :, :tokenizer.vocab_size].log_softmax(-1)
    entropy, surprise = -(predicted.exp() * predicted).sum(-1), -predicted.gather(-1, tokens[:, 1:, None])[:, :, 0]
    assert abs((surprise - entropy).mean()) < 4 * (surprise - entropy).std() / surprise.numel() ** 0.5


def test_a_model_with_wide_linears_writes_more(folders, monkeypatch):
    """At least as many tokens as its widest linear has inputs, none of them twice."""
    monkeypatch.setattr(calibration, "OWN_SEQUENCES", 2)
    monkeypatch.setattr(calibration, "OWN_LENGTH", 16)
    path = folders("qwen2") / "model.pth"
    widest = calibration.widest_inputs(load_model(path)[0].args)
    tokens = calibration.own_text(path, progress=False)
    assert widest > 32 and widest <= tokens.numel() < widest + 32 and tokens.size(1) == 16 and len(tokens.unique(dim=0)) == len(tokens)


def test_int4_learns_from_what_the_model_writes(folders, tmp_path, capsys):
    """By the command and from Python, unless rounding is asked for."""
    path = shutil.copytree(folders("qwen2"), tmp_path / "copy") / "model.pth"

    def written(calibration=None, *flags):
        if flags:
            quantize.main(["--checkpoint_path", str(path), *flags])
        else:
            quantize_checkpoint(path, "int4", 32, progress=False, calibration=calibration)
        return torch.load(path.with_name("model_int4.g32.pth"), weights_only=True)["state_dict"]

    def same(one, other):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    learnt, nearest = written(Calibration(calibration.own_text(path, progress=False))), written()
    assert same(learnt, written(Calibration())) and same(learnt, written(None, "--mode", "int4"))
    assert same(nearest, written(None, "--mode", "int4", "--round_to_nearest")) and not same(learnt, nearest)
    (path.parent / "tokenizer.json").unlink()
    assert "--round_to_nearest needs no text" in run_main(["--checkpoint_path", path, "--mode", "int4"], capsys)


@pytest.mark.parametrize("skip", [(), ("layers.1.*", "*.wo")])
def test_inputs_kept_or_computed_again(folders, monkeypatch, skip):
    """The same file either way. Of the layers, one at a time is in memory, and nothing is left of it afterwards."""
    path, files, alive = folders("qwen3") / "model.pth", [], []
    through = GPTQ.quantize_linear

    def watch(linear, inputs, target, options, name, measure):
        alive.append(int(name.split(".")[1]))
        assert [i for i, block in enumerate(models[-1].layers) if any(not p.is_meta for p in block.parameters())] == [alive[-1]]
        return through(linear, inputs, target, options, name, measure)

    def layers(model, *args):
        models.append(model)
        return whole(model, *args)
    whole, models = GPTQ.quantize_layers, []
    monkeypatch.setattr(GPTQ, "quantize_layers", layers)
    monkeypatch.setattr(GPTQ, "quantize_linear", watch)
    monkeypatch.setattr(GPTQ, "BATCH_TOKENS", 5 * TOKENS.size(1))          # the last batch is a smaller one
    for kept in (1 << 30, 0):
        monkeypatch.setattr(GPTQ, "KEPT_BYTES", kept)
        file = quantize_checkpoint(path, "int4-gptq", 32, skip=skip, progress=False, calibration=Calibration(TOKENS))
        files.append(torch.load(file, weights_only=True)["state_dict"])
        assert all(t.is_meta for t in [*models[-1].layers.parameters(), *models[-1].layers.buffers()])
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert alive == sorted(alive[:len(alive) // 2]) * 2 and len(alive) == 2 * (6 if skip else 12)


def test_int8(folders):
    path = folders("qwen2") / "model.pth"
    file = quantize_checkpoint(path, "int8-gptq", progress=False, calibration=Calibration(TOKENS))
    plain, nearest = logits_of(path), logits_of(quantize_checkpoint(path, "int8", progress=False))
    assert file.name == "model_int8-gptq.pth" and (logits_of(file) - plain).norm() < (nearest - plain).norm()


# ---- the command

def run_main(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: quantize.main([str(a) for a in argv]))
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_refusals(folders, tmp_path, capsys):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "copy")
    text = tmp_path / "text.txt"
    text.write_text(HELDOUT[:20000])
    before = sorted(folder.iterdir())

    def refused(*flags):
        err = run_main(["--checkpoint_path", folder, "--mode", "int4-gptq", *flags], capsys)
        assert sorted(folder.iterdir()) == before
        return err
    assert "--calibration_tasks wikitext, or --calibration_file FILE" in refused()
    assert "--calibration_seq_length 513 must be at least 1 and at most the context of 512" in refused(
        "--calibration_file", text, "--calibration_seq_length", 513)
    assert "too little to calibrate with: 1 sequences of 64 tokens" in refused(
        "--calibration_file", text, "--calibration_seq_length", 64, "--calibration_limit", 1)
    (tmp_path / "short.txt").write_text("short")
    assert "too little to calibrate with: 0 sequences" in refused("--calibration_file", tmp_path / "short.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "too little to calibrate with: 0 sequences" in refused("--calibration_file", tmp_path / "empty.txt")
    assert "--calibration_seq_length 0 must be at least 1" in refused("--calibration_file", text, "--calibration_seq_length", 0)
    assert "--calibration_limit 0 must be 1 or more" in refused("--calibration_file", text, "--calibration_limit", 0)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe" * 1000)
    assert f"--calibration_file {tmp_path / 'binary.txt'}: " in refused("--calibration_file", tmp_path / "binary.txt")
    assert f"--calibration_file {tmp_path}: " in refused("--calibration_file", tmp_path)
    assert "--mode int4-gptq takes one" in refused("--mode", "int4", "--calibration_file", text)
    assert "No such file" in refused("--calibration_file", tmp_path / "none.txt")
    assert "--calibration_tasks no_such_task: no such task" in refused("--calibration_tasks", "no_such_task")
    assert "exclude each other" in refused("--calibration_tasks", "x", "--calibration_file", text)
    assert "--percdamp -1.0 must be 0 or more" in refused("--calibration_file", text, "--percdamp", -1)
    assert "--blocksize 0 must be 1 or more" in refused("--calibration_file", text, "--blocksize", 0)
    assert "--mode 'int3-gptq' is not supported (supported: int8, int4, int8-gptq, int4-gptq)" in refused("--mode", "int3-gptq")
    whole = (folder / "model.pth").read_bytes()
    for damaged, message in (("layers.1.attention_norm.weight", "layers.1.attention.wqkv: NaN or infinity among its inputs"),
                             ("layers.2.feed_forward.w2.weight", "layers.2.feed_forward.w2.weight holds NaN or infinity"),
                             ("output.weight", "output.weight holds NaN or infinity")):
        checkpoint = torch.load(folder / "model.pth", weights_only=True)
        checkpoint["state_dict"][damaged].view(-1)[3] = float("nan")
        torch.save(checkpoint, folder / "model.pth")
        assert message in refused("--calibration_file", text)
        (folder / "model.pth").write_bytes(whole)


def test_a_task_whose_data_cannot_be_had(folders, tmp_path, capsys):
    (tmp_path / "far.yaml").write_text("task: far_away\ndataset_path: nobody/nothing-of-that-name\noutput_type: loglikelihood_rolling\n"
                                       "test_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: []\n")
    err = run_main(["--checkpoint_path", folders("qwen3"), "--mode", "int4-gptq", "--calibration_tasks", "far_away", "--include_path", tmp_path],
                   capsys)
    assert "--calibration_tasks far_away: its data cannot be had" in err and "--calibration_file" in err


def test_documents_of_tasks():
    """Texts for rolling, questions with the right choice, prompts with their continuation."""
    rolling = calibration.texts_of_tasks(["heldout_rolling"], TASKS)
    assert rolling == [doc["text"] for doc in json.loads((TASKS / "rolling.json").read_text())["test"]]
    for task, file in (("heldout_choice", "choice.json"), ("heldout_line", "line.json")):
        docs = json.loads((TASKS / file).read_text())
        texts = calibration.texts_of_tasks([task], TASKS)
        assert len(texts) in map(len, docs.values()) and all(len(text) > 10 for text in texts)


def test_command_with_a_text(folders, tmp_path, capsys):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "copy")
    (tmp_path / "text.txt").write_text(HELDOUT[:40000])
    quantize.main(["--checkpoint_path", str(folder), "--mode", "int4-gptq", "--groupsize", "64", "--calibration_file", str(tmp_path / "text.txt"),
                   "--calibration_limit", "8", "--calibration_seq_length", "100", "--act_order", "--report"])
    out, err = capsys.readouterr()
    assert "calibrating with 8 sequences of 100 tokens" in err and "model_int4-gptq.g64.pth" in out
    assert re.search(r"Quantizing: +\d+%.*\[\d\d:\d\d<(\d\d:\d\d|\?)", err)          # the time left
    load_model(folder / "model_int4-gptq.g64.pth")


@pytest.mark.slow
def test_the_file_runs_through_the_commands(folders, tmp_path, capsys):
    """generate.py prints over two processes what one prints; eval.py's tasks score as the weights that the file stands for do in a plain model."""
    file = quantize_checkpoint(folders("qwen3") / "model.pth", "int4-gptq", 32, progress=False, calibration=Calibration(TOKENS))
    request = ["--checkpoint_path", str(file), "--device", "cpu", "--dtype", "fp32"]
    prompt = [*request, "--prompt", "hello", "--num_samples", "1", "--max_new_tokens", "24", "--temperature", "0", "--activations", "bf16"]
    generate.main(prompt)
    alone = text_of(capsys.readouterr().out)
    ranks = start_ranks(2, ROOT / "generate.py", *prompt)
    (out, err), _ = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], err
    assert text_of(out) == alone and len(alone) > 5
    tasks = ["heldout_choice", "heldout_rolling"]
    eval_main([*request, "--tasks", *tasks, "--include_path", str(TASKS), "--limit", "3", "--output_path", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    expected = harness.evaluate(harness.QwenFast(dequantized(file), load_model(file)[1]), tasks, TASKS, limit=3)["results"]
    for task, metric in (("heldout_choice", "acc"), ("heldout_rolling", "bits_per_byte")):
        assert found[task][f"{metric},none"] == pytest.approx(expected[task][f"{metric},none"], rel=1e-4)


# ---- quality on the demo

def layer_errors(path, ids):
    """Mean squared error of each linear's output, its inputs being those of the unquantized model."""
    model, _ = load_model(DEMO / "model.pth", "cpu", torch.float32)
    state, quantization = loading.read_checkpoint(path)
    errors = {}

    def measure(name):
        def hook(module, x, y):
            linear = quantization.linear(name, module.in_features, module.out_features, False)
            weight = linear.dequantize(**{key: state[f"{name}.{key}"] for key in ("weight", "scales", "zeros")})
            errors[name] = (torch.nn.functional.linear(x[0], weight) - y).square().mean().item()
        model.get_submodule(name).register_forward_hook(hook)
    for name in formats.linear_names(model)[:-1]:
        measure(name)
    with torch.inference_mode():
        model.setup_caches(*ids.shape)
        model.stack = None                                       # the linears are to be called one by one
        model(ids, torch.arange(ids.size(1)))
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("groupsize", [32, 128])
def test_much_of_what_rounding_loses_is_won_back(tmp_path, groupsize):
    """On text that the calibration, the demo's default on a smaller scale, has not seen. Half as much would not do: the ratio of
    the perplexities' differences is 0.61 on one half and 0.43 on the other."""
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, tmp_path)
    tokenizer = load_model(DEMO)[1]
    shutil.copy(DEMO / "model.pth", tmp_path)
    tokens = calibration.calibration_tokens(tokenizer, calibration.read_sources(calibration.source_files(heldout=False)), 128, 512, 768)
    path = tmp_path / "model.pth"
    files = [path, *(quantize_checkpoint(path, mode, groupsize, progress=False, calibration=Calibration(tokens) if "-" in mode else None)
                     for mode in ("int4", "int4-gptq"))]
    plain, nearest, gptq = compare(files, HELDOUT[:200_000], 512, 512, dtype=torch.float32)
    assert gptq.kl < 0.6 * nearest.kl
    assert gptq.score.perplexity - plain.score.perplexity < 0.6 * (nearest.score.perplexity - plain.score.perplexity)
    ids = torch.tensor(tokenizer.encode(HELDOUT[:30_000])[:4096]).view(8, 512)
    before, after = (layer_errors(file, ids) for file in files[1:])
    assert len(before) == 28 and sum(after[name] < before[name] for name in before) >= 0.95 * 28


# ---- published checkpoints

PARTS = {"attention.wqkv": [f"self_attn.{p}_proj" for p in "qkv"], "attention.wo": ["self_attn.o_proj"],
         "feed_forward.w13": ["mlp.gate_proj", "mlp.up_proj"], "feed_forward.w2": ["mlp.down_proj"]}
VARIANTS = {
    "gptq": {}, "g64 asym": dict(groupsize=64, sym=False), "v2 asym": dict(form="gptq_v2", sym=False), "rows": dict(groupsize=-1),
    "rows, desc_act": dict(groupsize=-1, desc_act=True), "desc_act": dict(desc_act=True, groupsize=128, biases=True),
    "v2 desc_act": dict(desc_act=True, form="gptq_v2"), "8 bits": dict(bits=8, groupsize=128), "8 bits asym": dict(bits=8, sym=False),
    "8 bits v2": dict(bits=8, sym=False, form="gptq_v2", desc_act=True), "8 bits rows": dict(bits=8, groupsize=-1),
    "awq": dict(method="awq", sym=False, groupsize=128), "awq g64": dict(method="awq", sym=False, groupsize=64),
}


@pytest.fixture(scope="module")
def reference():
    return tiny.reference("qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_checkpoints_keep_their_weights(reference, tmp_path, variant):
    """Bit for bit those of the format's definition in fp16; what runs in fp32 is transformers' model with these weights."""
    folder = tiny.save(reference, tmp_path)
    meant = publish(folder, **VARIANTS[variant])
    model, tokenizer = load_model(folder, "cpu", torch.float32)
    state, quantization = loading.read_checkpoint(folder / "model.pth")
    assert len(meant) == 14 and bool(quantization.reordered) == ("desc_act" in variant and "rows" not in variant or variant == "8 bits v2")
    for layer in range(2):
        for name, parts in PARTS.items():
            name = f"layers.{layer}.{name}"
            linear = quantization.linear(name, model.get_submodule(name).in_features, model.get_submodule(name).out_features, False)
            buffers = {key: state[f"{name}.{key}"] for key, _ in linear.named_buffers()}
            for key, value in buffers.items():
                setattr(linear, key, value)
            expected = [torch.cat(weights) for weights in zip(*(meant[f"model.layers.{layer}.{part}"] for part in parts))]
            assert buffers["weight"].dtype == torch.uint8 and buffers["scales"].dtype == torch.float16
            for weight in expected:
                assert torch.equal(linear.dequantize(weight.dtype).view(torch.uint8), weight.contiguous().view(torch.uint8)), (name, weight.dtype)
    plain = tiny.reference("qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    for module, (_, weight) in meant.items():
        plain.get_submodule(module).weight.data = weight
    ids = TOKENS[:2]
    pos = torch.arange(ids.size(1))
    expected = plain(ids).logits
    model.setup_caches(2, ids.size(1))
    with torch.inference_mode():
        assert (model(ids, pos, pos) - expected).abs().max() < 2e-4
        model, _ = load_model(folder, "cpu", torch.bfloat16)
        model.setup_caches(2, ids.size(1))
        assert (model(ids, pos, pos) - expected).norm() < 0.1 * expected.norm()
        model.setup_caches(1, ids.size(1))
        steps = torch.cat([model(ids[:1, p:p + 1], pos[p:p + 1])[0] for p in range(8)])
        assert (steps - expected[0, :8]).norm() < 0.1 * expected[0, :8].norm()


def test_what_is_not_supported_is_refused_by_name(reference, tmp_path, capsys):
    for number, (options, reason) in enumerate([
            (dict(bits=3), "bits 3 is not supported"), (dict(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported"),
            (dict(is_marlin_format=True), "checkpoint_format 'marlin' is not supported"), (dict(group_size=48), "group_size 48 is not supported"),
            (dict(quant_method="aqlm"), "quant_method 'aqlm' is not supported"), (dict(lm_head=True), "lm_head True is not supported"),
            (dict(quant_method="awq", version="gemv"), "version 'gemv' is not supported"),
            (dict(dynamic={"-:x": {}}), "dynamic {'-:x': {}} is not supported")]):
        (tmp_path / str(number)).mkdir()
        folder = tiny.save(reference, tmp_path / str(number))
        publish(folder, **options) if "bits" not in options else publish(folder, **{"bits": 4})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= options
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(cli.UserError, match="quantization_config: .* is not supported") as refused:
            convert(folder, progress=False)
        assert reason in str(refused.value) and not (folder / "model.pth").exists()


def test_damaged_published_checkpoints_are_refused(reference, tmp_path):
    folder = tiny.save(reference, tmp_path)
    publish(folder, desc_act=True)
    whole = tiny.load_file(folder / "model.safetensors")

    def refused(match, **changes):
        tensors = {**whole, **changes}
        tiny.save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(cli.UserError, match=match):
            convert(folder, progress=False)
        assert not (folder / "model.pth").exists()
    q = "model.layers.0.self_attn.q_proj"
    refused("missing: layers.0.self_attn.q_proj.qzeros", **{f"{q}.qzeros": None})
    refused("mis-shaped: .*qweight", **{f"{q}.qweight": whole[f"{q}.qweight"][:4].clone()})
    refused("unsupported dtype: .*qweight torch.int64", **{f"{q}.qweight": whole[f"{q}.qweight"].long()})
    refused("g_idx differs from that of the other parts of layers.0.attention.wqkv", **{f"{q}.g_idx": whole[f"{q}.g_idx"].flip(0)})
    down = "model.layers.0.mlp.down_proj"
    refused("groups of other sizes than 32", **{f"{down}.g_idx": torch.zeros_like(whole[f"{down}.g_idx"])})
    plain = {f"{q}.{key}": None for key in ("qweight", "qzeros", "scales", "g_idx")}
    refused("parts of layers.0.attention.wqkv.weight are quantized and others are not", **plain, **{f"{q}.weight": torch.zeros(128, 128)})
    refused("unexpected: .*o_proj.bias", **{"model.layers.0.self_attn.o_proj.bias": torch.ones(128)})


def test_qwen_v1_files(tmp_path):
    """Qwen-7B-Chat-Int4 and its like: its own names, query, key and value in one linear."""
    folder = tiny.save_qwen_v1(tiny.reference("qwen2", num_key_value_heads=4, hidden_size=128, intermediate_size=256), tmp_path)
    meant = publish(folder, groupsize=128, biases=True)
    load_model(folder)
    weights = dequantized(folder / "model.pth").state_dict()
    assert len(meant) == 15
    for layer in range(3):
        parts = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
        qkv, wo, up, gate, down = (meant[f"transformer.h.{layer}.{part}"][1] for part in parts)
        for name, weight in (("attention.wqkv", qkv), ("attention.wo", wo), ("feed_forward.w13", torch.cat((gate, up))), ("feed_forward.w2", down)):
            assert torch.equal(weights[f"layers.{layer}.{name}.weight"], weight)


# ---- against gptqmodel, where it is installed

@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits,groupsize,desc_act", [(4, 128, False), (4, 32, True), (4, -1, False), (8, 64, False), (8, 128, True)])
def test_gptqmodels_gptq(bits, groupsize, desc_act, form):
    """What gptqmodel packs, the ends of the zeros included, is what it dequantizes to, bit for bit."""
    module, model = (pytest.importorskip(f"gptqmodel.{name}") for name in ("nn_modules.qlinear.torch", "utils.model"))
    torch.manual_seed(bits)
    N, K = 64, 256
    G, most = K if groupsize == -1 else groupsize, 2 ** bits - 1
    g_idx = (torch.arange(K) // G)[torch.randperm(K) if desc_act else torch.arange(K)].int()
    scales, zeros = torch.rand(N, K // G).mul(0.1).add(0.01).half().float(), torch.randint(most + 1, (N, K // G)).float()
    zeros[0, 0], zeros[1, 0], zeros[8, -1] = 0, most, 0
    source, theirs = torch.nn.Linear(K, N, bias=False), module.TorchLinear(bits, groupsize, False, desc_act, K, N).eval()
    source.weight.data = torch.randint(most + 1, (N, K)).sub(zeros[:, g_idx.long()]) * scales[:, g_idx.long()]
    theirs.pack_original(source, scales, zeros, g_idx)
    expected = theirs.dequantize_weight().T
    if form == "gptq":
        model.convert_gptq_v2_to_v1_format_module(theirs, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    packing = PublishedQuantization.from_hf({"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": groupsize, "checkpoint_format": form}})
    buffers = packing.decode("linear", theirs.qweight, theirs.qzeros, theirs.scales, theirs.g_idx)
    ours = GPTQLinear(K, N, groupsize=packing.stored_groupsize, bits=bits)
    ours.order = buffers.get("order")
    weight = ours.dequantize(torch.float16, **buffers)
    assert expected.dtype == torch.float16 and torch.equal(weight, expected) and (weight - source.weight).abs().max() < 1e-2
    assert desc_act == ("order" in buffers)


@pytest.mark.parametrize("groupsize", [32, 128])
def test_gptqmodels_awq(groupsize):
    module, utils = (pytest.importorskip(f"gptqmodel.{name}") for name in ("nn_modules.qlinear.torch_awq", "quantization.awq.utils.packing_utils"))
    torch.manual_seed(groupsize)
    N, K = 64, 256
    scales, zeros = torch.rand(N, K // groupsize).mul(0.1).add(0.01).half(), torch.randint(16, (N, K // groupsize))
    groups = torch.arange(K) // groupsize
    source, theirs = torch.nn.Linear(K, N, bias=False), module.AwqTorchLinear(4, groupsize, False, False, K, N)
    source.weight.data = torch.randint(16, (N, K)).sub(zeros[:, groups]) * scales.float()[:, groups]
    theirs.pack(source, scales.float(), zeros.float())
    expected = utils.dequantize_gemm(theirs.qweight, theirs.qzeros, theirs.scales, 4, groupsize).T
    packing = PublishedQuantization.from_hf({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": groupsize, "version": "gemm"}})
    buffers = packing.decode("linear", theirs.qweight, theirs.qzeros, theirs.scales)
    weight = GPTQLinear(K, N, groupsize=groupsize).dequantize(torch.float16, **buffers)
    assert expected.dtype == torch.float16 and torch.equal(weight, expected) and (weight - source.weight).abs().max() < 1e-2
