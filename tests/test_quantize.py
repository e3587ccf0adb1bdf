"""Number formats, quantized models and the files that hold them, on tiny checkpoints."""
import errno
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import cli
import formats
import kernels
import loading
import quantize
import tiny
from cli import UserError
from config import ModelArgs
from conftest import ROOT
from formats import GPTQLinear, Int4Linear, Int8Linear, QuantizedLinear
from generate import Engine
from loading import load_model
from model import Linear, Transformer
from quantize import quantize_checkpoint
from sampling import Sampling

GREEDY = Sampling(temperature=0)
PROMPT = [(7 * i) % 256 for i in range(24)]
ATOL = 1e-37                             # below it numbers are denormal


# ---- number formats

@st.composite
def weights(draw, dtypes=(torch.float32, torch.bfloat16)):
    """Matrices of any shape and scale: even, with outliers, of one sign, with constant and zero rows."""
    N, K = draw(st.integers(1, 6)), draw(st.integers(1, 300))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    w = torch.randn(N, K, generator=rng) * 10.0 ** draw(st.integers(-20, 20))
    kind = draw(st.sampled_from(["normal", "outlier", "positive", "constant row", "zero row", "zero"]))
    if kind == "outlier":
        w[N // 2, K // 2] *= 1e4
    elif kind == "positive":
        w = w.abs() + w.abs().max()
    elif kind == "constant row":
        w[0] = w[0, 0]
    elif kind == "zero row":
        w[0] = 0
    elif kind == "zero":
        w.zero_()
    return w.to(draw(st.sampled_from(dtypes)))


quick = settings(max_examples=60, deadline=None)
groupsizes = st.sampled_from(formats.GROUPSIZES)


def int8(w):
    """The weight after a round trip, and its buffers."""
    linear = Int8Linear(w.size(1), len(w))
    buffers = linear.quantize(w)
    return linear.dequantize(buffers=buffers), buffers


def int4(w, groupsize):
    linear = Int4Linear(w.size(1), len(w), groupsize=groupsize)
    buffers = linear.quantize(w)
    return linear.dequantize(buffers=buffers), buffers


@quick
@given(weights())
def test_int8_round_trip_is_within_half_a_step(w):
    back, buffers = int8(w)
    q, scales = buffers["weight"], buffers["scales"]
    assert q.dtype == torch.int8 and q.shape == w.shape and q.abs().max() <= 127 and scales.dtype == torch.float32
    assert ((back - w.float()).abs() <= scales[:, None] * 0.50001 + ATOL).all()
    assert (scales <= w.float().abs().amax(1) / 127 * 1.00001).all()


@quick
@given(weights(), groupsizes)
def test_int4_round_trip_is_within_half_a_step(w, groupsize):
    """Of the group's own step where a weight is between the levels' ends; of a step of range / 15 on average where they
    do not reach so far."""
    back, buffers = int4(w, groupsize)
    q, scales, zeros = kernels.unpack_nibbles(buffers["weight"], w.size(1)), buffers["scales"], buffers["zeros"]
    assert q.dtype == zeros.dtype == torch.uint8 and q.shape == w.shape and zeros.max() <= 15 * formats.ZERO_STEPS
    assert scales.dtype == torch.bfloat16 and scales.shape == zeros.shape == (len(w), -(-w.size(1) // groupsize))
    w, back, steps = w.double(), back.double(), scales.double().repeat_interleave(groupsize, dim=1)[:, :w.size(1)]
    past = ((q == 0) & (w < back)) | ((q == 15) & (w > back))
    assert (past | ((back - w).abs() <= steps * 0.50002 + ATOL)).all()
    for group, found in zip(w.split(groupsize, dim=1), back.split(groupsize, dim=1), strict=True):
        span = group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0)
        assert ((found - group).square().mean(1).sqrt() <= span / 15 * 0.55 + ATOL).all()


@quick
@given(weights(dtypes=(torch.bfloat16,)), groupsizes, st.integers(0, 20))
def test_constant_groups_and_zeros_are_exact(w, groupsize, group):
    start = group * groupsize % w.size(1) // groupsize * groupsize
    w[:, start:start + groupsize] = w[:, start:start + 1]
    back = int4(w, groupsize)[0]
    assert torch.equal(back[:, start:start + groupsize], w[:, start:start + groupsize].float())
    assert not back[w == 0].any() and not int8(w)[0][w == 0].any()


def test_int4_parameters_are_nearly_the_best():
    """Weighted or not: within 3 % of what a search over scales and zeros finds."""
    torch.manual_seed(0)
    w, zeros = torch.randn(16, 32), torch.arange(0, 241, 4)[:, None, None] / 16
    for importance in (torch.ones(32), torch.rand(32) + 0.1):
        def error(s, z, importance=importance):
            q = (w / s[..., None] + z).round().clamp(0, 15)
            return ((w - (q - z) * s[..., None]).square() * importance).sum(-1)
        scale, zero = formats.int4_params(w, 32, importance)
        found = error(scale[:, 0].float(), zero.float() / 16)
        full = (w.amax(1) - w.amin(1)) / 15
        best = torch.stack([error(full * shrink, zeros).amin(0) for shrink in torch.linspace(0.6, 1.05, 46)]).amin(0)
        assert found.sum() < 1.03 * best.sum()


def test_portable_parameters():
    """What other programs load: symmetric int4, no worse than by the widest weight; int8 scales that bf16 holds."""
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    w[0], w[1, :32] = 0, -0.25
    linear = Int4Linear(96, 64, groupsize=32)
    linear.portable = True
    buffers = linear.quantize(w)
    assert (buffers["zeros"] == 8 * formats.ZERO_STEPS).all() and buffers["scales"].dtype == torch.bfloat16
    found = linear.dequantize(buffers=buffers)
    groups = w.unflatten(1, (-1, 32))
    scale = torch.maximum(-groups.amin(2) / 8, groups.amax(2) / 7)[:, :, None].clamp(min=1e-9)
    widest = (groups / scale).round().clamp(-8, 7) * scale
    assert (found - w).square().sum() < (widest - groups).square().sum()
    assert torch.equal(found[0], w[0]) and torch.equal(found[1, :32], w[1, :32])
    linear = Int8Linear(96, 64)
    linear.portable = True
    buffers = linear.quantize(w)
    assert torch.equal(buffers["scales"], buffers["scales"].bfloat16().float())
    step = buffers["scales"][:, None]
    assert ((linear.dequantize(buffers=buffers) - w).abs() <= step * 0.76).all()         # the widest may lie at 127.5


def test_an_outlier_disturbs_its_own_group_or_row_only():
    torch.manual_seed(0)
    w = torch.randn(4, 256)
    spoilt = w.clone()
    spoilt[1, 100] = 1000
    same8, same4 = int8(w)[0] == int8(spoilt)[0], int4(w, 32)[0] == int4(spoilt, 32)[0]
    assert same8[[0, 2, 3]].all() and same4[[0, 2, 3]].all()
    assert same4[1, :96].all() and same4[1, 128:].all()


@quick
@given(st.integers(1, 5), st.integers(1, 99), st.integers(0, 999))
def test_unpack_is_the_inverse_of_pack(N, K, seed):
    q = torch.randint(16, (N, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = kernels.pack_nibbles(q)
    assert packed.dtype == torch.uint8 and packed.shape == (N, (K + 1) // 2)
    assert torch.equal(kernels.unpack_nibbles(packed, K), q)
    assert packed[0, 0] & 15 == q[0, 0]


# ---- linears

def linear_of(kind: str, N: int, K: int, groupsize: int = 32) -> tuple[QuantizedLinear, torch.Tensor]:
    """A quantized linear as it is stored, and the weights it stands for."""
    torch.manual_seed(N + K)
    linear = Int8Linear(K, N, True) if kind == "int8" else Int4Linear(K, N, True, groupsize)
    for key, value in quantize.quantize_weight("w", torch.randn(N, K), linear)[0].items():
        setattr(linear, key, value)
    linear.bias.data = torch.randn(N)
    return linear, linear.dequantize()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_is_repacked_need_not_be_copied(kind):
    """pack_for releases what repacks() says it makes anew, and only that."""
    linear, model = linear_of(kind, 20, 96)[0], torch.nn.Module()
    model.linear, model.dtype = linear, torch.bfloat16
    stored, released, cpu = dict(linear.named_buffers()), [], torch.device("cpu")
    formats.pack_for(model, cpu, released.append)
    assert [*map(id, released)] == ([*map(id, stored.values())] if linear.repacks(cpu) else [])
    assert linear.repacks(cpu) == (kind == "int4" and kernels.available())
    assert not {t.data_ptr() for t in released} & {t.data_ptr() for t in linear.buffers()}


@pytest.mark.parametrize("kind,groupsize", [("int8", 32), ("int4", 32), ("int4", 128)])
@pytest.mark.parametrize("N,K", [(48, 128), (20, 96), (5, 33), (3, 300)])
def test_linear_equals_its_dequantized_weights(kind, groupsize, N, K):
    """Within the bound that rounding the activations sets, and without it closely; before and after packing, for few
    tokens and many."""
    linear, w = linear_of(kind, N, K, groupsize)
    for packed in (False, True):
        if packed:
            linear.pack_for(torch.device("cpu"), torch.float32)
        for shape in ((1,), (3,), (2, 8), (40,)):
            x = torch.randn(*shape, K)
            expected = x.double() @ w.double().T + linear.bias
            linear.quantize_activations = False
            assert (linear(x) - expected).abs().max() < 1e-4
            linear.quantize_activations = True
            group = 64 if kind == "int8" else 32
            half_steps = torch.nn.functional.pad(x.abs(), (0, -K % group)).unflatten(-1, (-1, group)).amax(-1) / 254
            bound = half_steps.repeat_interleave(group, dim=-1)[..., :K] @ w.abs().T
            assert ((linear(x) - expected).abs() <= bound * 1.001 + 1e-4).all()
            bf16 = linear(x.bfloat16()) - linear.bias            # the products are summed in fp32 and rounded once
            assert (bf16 - x.bfloat16().double() @ w.double().T).abs().max() < 0.02 * expected.abs().max() + bound.max()


def test_int8_does_not_overflow_in_fp16():
    linear = Int8Linear(4096, 8)
    for key, value in linear.quantize(torch.full((8, 4096), 0.01)).items():
        setattr(linear, key, value)
    y = linear(torch.ones(1, 4096, dtype=torch.float16))
    assert y.dtype == torch.float16 and (y - 40.96).abs().max() < 0.1


@pytest.mark.parametrize("N,K,groupsize", [(48, 256, 128), (16, 96, 128), (4, 192, 128), (3, 300, 128), (5, 33, 32)])
def test_linear_from_the_stored_form(N, K, groupsize):
    """As GPUs compute it, by PyTorch's operators: the last group may be short."""
    linear, w = linear_of("int4", N, K, groupsize)
    stored, x = (linear.weight, linear.scales, linear.zeros), torch.randn(2, 3, K)
    assert torch.equal(kernels.dequantize_int4(*stored, K, torch.float32), w)
    assert torch.equal(kernels.stored_int4_linear(x, *stored), torch.nn.functional.linear(x, w))


@pytest.mark.parametrize("K,groupsize", [(256, 128), (96, 64), (64, 64)])
def test_experts_from_the_stored_form(K, groupsize):
    linear, w = linear_of("int4", 3 * 16, K, groupsize)
    stored, which = [linear.weight, linear.scales, linear.zeros], torch.tensor([2, 0])
    packed = list(kernels.pack_int4(*stored, groupsize))
    for tensors in (stored, packed):
        found = kernels.expert_weights(tensors, which, 3, 16, K, torch.float32)
        assert torch.equal(found, w.unflatten(0, (3, 16))[which])


def test_int4_stays_as_stored_on_a_gpu(monkeypatch):
    """Own and published; the fused layers take it where all groups are of one size. Fake tensors stand for a GPU's."""
    monkeypatch.setattr(kernels, "gpu_layers", object())
    cuda = torch.device("cuda")
    with FakeTensorMode(), cuda:
        for kind, K, bias in itertools.product((Int4Linear, GPTQLinear), (256, 96, 192, 300), (True, False)):
            linear = kind(K, 16, bias, 128)
            stored = [linear.weight, linear.scales, linear.zeros, *([linear.bias] if bias else [])]
            linear.pack_for(cuda, torch.bfloat16)
            found = linear.kernel_args(torch.bfloat16)
            assert linear.layout == "stored" and (found is not None) == (K in (256, 96))
            assert found is None or (len(found) == len(stored) and all(a is b for a, b in zip(found, stored)))
        reordered = GPTQLinear(256, 16, reordered=True)
        reordered.pack_for(cuda, torch.bfloat16)
        assert reordered.layout == "stored" and reordered.kernel_args(torch.bfloat16) is None
        for kind, dtype in itertools.product((Int4Linear, GPTQLinear), (torch.float16, torch.float32)):
            linear = kind(256, 16)
            linear.pack_for(cuda, dtype)
            assert linear.scales.dtype == (torch.float16 if kind is GPTQLinear else dtype)      # Turing has no bf16


# ---- models and files

@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """Family -> folder with model.pth, model_int8.pth and model_int4.g32.pth."""
    @functools.cache
    def folder(family: str):
        path = shutil.copytree(tiny_folder(family), tmp_path_factory.mktemp("quantized") / family)
        for mode in formats.MODES:
            quantize_checkpoint(path / "model.pth", mode, progress=False)
        return path
    return folder


FILES = {"int8": "model_int8.pth", "int4": "model_int4.g32.pth"}


def logits_of(model: Transformer, ids=PROMPT) -> torch.Tensor:
    """[S, V], from one pass over more tokens than the kernels take that round their activations."""
    with torch.inference_mode():
        model.setup_caches(1, len(ids))
        pos = torch.arange(len(ids))
        return model(torch.tensor([ids]), pos, pos)[0]


def stepwise_logits_of(model: Transformer, ids=PROMPT) -> torch.Tensor:
    """The same, token by token and by the fused layers, where there are kernels."""
    with torch.inference_mode():
        model.setup_caches(1, len(ids))
        fused = model.fuse()
        return torch.cat([model(torch.tensor([[i]]), torch.tensor([p]), fused=fused)[0] for p, i in enumerate(ids)])


def dequantized(path) -> Transformer:
    """The plain fp32 model whose weights are those that a quantized file stands for."""
    state, quantization = loading.read_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(ModelArgs.from_hf(json.loads((path.parent / "config.json").read_text())))
    linears = formats.replace_linears(model, quantization)
    model.load_state_dict(state, assign=True)
    for name, linear in linears:
        plain = Linear(linear.in_features, linear.out_features)
        plain.weight.data, plain.bias = linear.dequantize(), linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model.float().eval()


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "qwen-v1"])
def test_every_family_from_int8_and_int4(folders, family):
    for file in FILES.values():
        path = folders(family) / file
        model, tokenizer = load_model(path, "cpu", torch.float32)
        expected = logits_of(dequantized(path))
        formats.set_quantize_activations(model, False)
        assert (logits_of(model) - expected).abs().max() < 2e-4
        assert (stepwise_logits_of(model) - expected).abs().max() < 2e-4
        formats.set_quantize_activations(model, True)
        # 0.6 % in one linear: random models magnify it
        assert (stepwise_logits_of(model) - expected).norm() < 0.1 * expected.norm()
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16:
                model, tokenizer = load_model(path, "cpu", dtype)
                for rounded, limit in ((False, 0.1), (True, 0.15)):     # of bf16 alone, and of activations as well
                    formats.set_quantize_activations(model, rounded)
                    assert model.dtype == dtype and (logits_of(model) - expected).norm() < limit * expected.norm()
            rows = list(Engine(model, tokenizer).generate(PROMPT, 8, GREEDY, stop_ids=frozenset()))
            assert len(rows) == 8 and all(0 <= row[0] < tokenizer.vocab_size for row in rows)


def test_biases_and_heads(folders):
    for family, tied in (("qwen2", False), ("qwen2-tied", True)):
        for mode, file in FILES.items():
            path = folders(family) / file
            state, quantization = loading.read_checkpoint(path)
            plain, _ = loading.read_checkpoint(path.with_name("model.pth"))
            assert torch.equal(state["layers.0.attention.wqkv.bias"], plain["layers.0.attention.wqkv.bias"])
            assert torch.equal(state["tok_embeddings.weight"], plain["tok_embeddings.weight"])
            assert state["output.weight"].dtype == torch.int8 and "layers.0.attention.wqkv.scales" in state
            head = plain["tok_embeddings.weight" if tied else "output.weight"]
            restored = state["output.weight"] * state["output.scales"][:, None]
            assert (restored - head).norm() < 0.01 * head.norm()
            assert quantization.mode == mode and quantization.source == "model.pth" and quantization.skipped == ()


@pytest.mark.parametrize("lm_head", formats.LM_HEADS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied"])
def test_head_formats_and_skipped_layers(folders, tmp_path, family, lm_head):
    folder = shutil.copytree(folders(family), tmp_path / "copy")
    path = quantize_checkpoint(folder / "model.pth", "int4", 64, lm_head, ("layers.0.*", "*.wo"), progress=False)
    assert path.name == "model_int4.g64.pth"
    model, _ = load_model(path, "cpu", torch.float32)
    plain = type(None) if "tied" in family else Linear
    assert isinstance(model.output, {"int8": Int8Linear, "int4": Int4Linear, "none": plain}[lm_head])
    assert type(model.layers[0].feed_forward.w2) is type(model.layers[1].attention.wo) is Linear
    assert type(model.layers[1].attention.wqkv) is Int4Linear
    formats.set_quantize_activations(model, False)
    assert (logits_of(model) - logits_of(dequantized(path))).abs().max() < 2e-4


@pytest.mark.parametrize("mode", formats.MODES)
def test_quantized_in_memory_equals_quantized_file(folders, mode):
    for family in ("qwen2-tied", "llama-biases"):
        model, _ = load_model(folders(family), "cpu", torch.float32)
        assert quantize.quantize_model(model, mode, 32) is model
        assert not any(isinstance(module, Linear) for module in model.modules())
        loaded, _ = load_model(folders(family) / FILES[mode], "cpu", torch.float32)
        assert torch.equal(logits_of(model), logits_of(loaded))
        with pytest.raises(UserError, match="the model is already quantized"):
            quantize.quantize_model(model, mode)


def test_without_the_kernels(folders, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    for file in FILES.values():
        model, _ = load_model(folders("qwen2") / file, "cpu", torch.float32)
        expected = logits_of(dequantized(folders("qwen2") / file))
        assert (stepwise_logits_of(model) - expected).abs().max() < 2e-4


@pytest.mark.slow
def test_compiled_equals_eager(folders, tmp_path):
    """With int4, int8 and plain linears, and layers of two kinds that the compiler must not confuse."""
    folder = shutil.copytree(folders("qwen2-tied"), tmp_path / "copy")
    path = quantize_checkpoint(folder / "model.pth", "int4", skip=("layers.1.*",), progress=False)
    model, tokenizer = load_model(path, "cpu", torch.float32)
    expected, found = ([row[0] for row in engine.generate(PROMPT, 24, GREEDY, stop_ids=frozenset())]
                       for engine in (Engine(model, tokenizer), Engine(model, tokenizer, compile=True)))
    assert found == expected


def test_file_is_small_and_its_size_is_reported(folders, tmp_path, capsys):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "copy")
    cut = {name: tensor.bfloat16() for name, tensor in loading.read_checkpoint(folder / "model.pth")[0].items()}
    torch.save({"version": 1, "quantization": None, "state_dict": cut}, folder / "model.pth")
    quantize.main(["--checkpoint_path", str(folder), "--mode", "int4", "--groupsize", "64", "--lm_head", "int4",
                   "--report", "--round_to_nearest"])
    out, err = capsys.readouterr()
    lines = {line.split()[0]: line for line in out.splitlines()}
    errors = [float(line.split()[-3].rstrip("%")) for name, line in lines.items() if name.startswith("layers.")]
    assert len(errors) == 12 and all(5 < error < 12 for error in errors)
    assert "int4.g64" in lines["output"] and "together" in lines
    assert "3 linears whose columns are no multiple of 64 have a shorter last group: layers.0.feed_forward.w2 (9" in err
    state, _ = loading.read_checkpoint(folder / "model_int4.g64.pth")
    before = {name: t.nbytes for name, t in cut.items() if t.dim() == 2 and name != "tok_embeddings.weight"}
    after = sum(t.nbytes for name, t in state.items() if name.rpartition(".")[0] + ".weight" in before)
    assert after < 0.31 * sum(before.values())
    assert (folder / "model_int4.g64.pth").stat().st_size < sum(t.nbytes for t in state.values()) + 64 * 1024


# ---- bad input

def refused(argv: list, capsys) -> str:
    """The one line that says why, below what may be the progress so far."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: quantize.main([str(a) for a in argv]))
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "weight/s" not in line]
    assert stopped.value.code == 2 and lines[-1].startswith("error: ")
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


@pytest.mark.parametrize("flags,reason", [
    (["--mode", "int4", "--groupsize", 48], r"--groupsize: invalid choice: 48 \(choose from 32, 64, 128, 256\)"),
    (["--mode", "int3"], r"--mode: invalid choice: 'int3' \(choose from '?int8'?, '?int4'?, '?int8-gptq"),
    (["--mode", "int8", "--lm_head", "int2"], r"--lm_head: invalid choice: 'int2'"),
    (["--mode", "int8", "--skip", "layer.*"], r"--skip layer\.\* matches no linear"),
    (["--mode", "int4", "--skip", "layer.*"], r"--skip layer\.\* matches no linear"),
    (["--mode", "int8", "--round_to_nearest"], r"--round_to_nearest is for --mode int4, not int8"),
    (["--mode", "int8", "--device", "abacus"], r"--device 'abacus'"),
])
def test_flags(folders, capsys, flags, reason):
    assert re.search(reason, refused(["--checkpoint_path", folders("qwen3") / "model.pth", *flags], capsys))


def test_the_library_names_the_field(folders):
    path = folders("qwen3") / "model.pth"
    for options, message in ((dict(mode="int3"), "mode 'int3' is not supported (supported: int8, int4, int8-gptq"),
                             (dict(mode="int4", groupsize=48), "groupsize 48 is not supported (supported: 32, 64"),
                             (dict(mode="int8", lm_head="int2"), "lm_head 'int2' is not supported (supported: int8"),
                             (dict(mode="int8", skip=("x",)), "skip x matches no linear")):
        with pytest.raises(UserError, match="^" + re.escape(message)):
            quantize_checkpoint(path, **options, progress=False)
    with pytest.raises(ValueError, match="int4-gptq needs a calibration"):
        quantize_checkpoint(path, "int4-gptq")


def test_an_unquantized_head_has_two_names(folders, tmp_path):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "copy")
    for name in ("none", "unquantized"):
        quantize.main(["--model", str(folder), "--mode", "int8", "--lm-head", name])
        assert loading.read_checkpoint(folder / "model_int8.pth")[1].lm_head == "none"


def test_files_that_cannot_be_quantized(folders, tmp_path, capsys):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "copy")
    before = (folder / "model_int8.pth").read_bytes()

    def reason(file="model.pth", mode="int8"):
        return refused(["--checkpoint_path", folder / file, "--mode", mode], capsys)
    assert "is already quantized (int4)" in reason("model_int4.g32.pth")
    assert "no such file" in reason("absent.pth")
    whole = (folder / "model.pth").read_bytes()
    (folder / "model.pth").write_bytes(whole[:len(whole) // 2])
    assert "was cut short" in reason()
    (folder / "model.pth").write_bytes(whole)
    state = {name: tensor.clone() for name, tensor in loading.read_checkpoint(folder / "model.pth")[0].items()}
    for value in (float("nan"), float("-inf")):
        state["layers.1.feed_forward.w2.weight"][3, 5] = value
        torch.save({"version": 1, "quantization": None, "state_dict": state}, folder / "model.pth")
        for mode in formats.MODES:
            assert "layers.1.feed_forward.w2.weight holds NaN or infinity" in reason(mode=mode)
    (folder / "model.pth").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    assert "does not fit its config.json: layers.0.feed_forward.w13.weight" in reason()
    assert (folder / "model_int8.pth").read_bytes() == before and not list(folder.glob(".*"))


def test_quantized_files_that_cannot_be_loaded(folders, tmp_path):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "copy")
    path = folder / "model_int4.g32.pth"
    whole, config = path.read_bytes(), (folder / "config.json").read_text()
    checkpoint = torch.load(path, weights_only=True)

    def refused(reason, **changes):
        if changes:
            torch.save({**checkpoint, **changes}, path)
        with pytest.raises(UserError, match=reason):
            load_model(path, "cpu")
        path.write_bytes(whole)
    refused("version 2 of the format is not supported", version=2)
    refused("quantization mode 'int3' is not supported", quantization={**checkpoint["quantization"], "mode": "int3"})
    refused("quantization groupsize 48 is not supported", quantization={**checkpoint["quantization"], "groupsize": 48})
    refused("written by a newer version", quantization={**checkpoint["quantization"], "rotation": "hadamard"})
    refused("written by a newer version", quantization="int4")
    refused("does not fit its config.json", quantization={**checkpoint["quantization"], "groupsize": 64})
    path.write_bytes(whole[:len(whole) // 2])
    refused("was cut short")
    for changes in ({"intermediate_size": 128}, {"num_hidden_layers": 9, "layer_types": None}, {"vocab_size": 319},
                    {"num_hidden_layers": 2, "layer_types": None}):
        (folder / "config.json").write_text(json.dumps({**json.loads(config), **changes}))
        refused("does not fit its config.json")
    (folder / "config.json").write_text(config)
    load_model(path, "cpu")


def test_full_disk_leaves_the_old_file(folders, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "copy")
    before = (folder / "model_int8.pth").read_bytes()

    def full(content, file):
        file.write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    assert "is the disk full?" in refused(["--checkpoint_path", folder / "model.pth", "--mode", "int8"], capsys)
    assert (folder / "model_int8.pth").read_bytes() == before and not list(folder.glob(".*"))


@pytest.mark.slow
def test_kill_in_the_middle_leaves_the_old_file(folders, tmp_path):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "copy")
    before = (folder / "model_int8.pth").read_bytes()
    script = ("import os, signal, sys, torch, quantize\n"
              "def save(content, file):\n    file.write(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
              "torch.save = save\nquantize.main(sys.argv[1:])\n")
    killed = subprocess.run([sys.executable, "-c", script, "--checkpoint_path", folder, "--mode", "int8"], cwd=ROOT)
    assert killed.returncode == -9 and (folder / "model_int8.pth").read_bytes() == before
    assert len(list(folder.glob(".*.tmp"))) == 1
    path = quantize_checkpoint(folder / "model.pth", "int8", progress=False)     # which clears away what the other left
    load_model(path, "cpu")
    assert not list(folder.glob(".*.tmp"))
