"""convert.py: checkpoints of every family and layout against their source tensors, bit for bit, and their faults."""
import errno
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert as convert_module
from cli import UserError
from config import ModelArgs
from conftest import ROOT, peak_growth
from convert import convert
from loading import load_model
from model import Transformer

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64)
FAMILIES = {
    "llama": ("Llama", dict(num_key_value_heads=2)),
    "llama-biased": ("Llama", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=1)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=16)),
    "mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=8)),
}


def tiny(family: str = "qwen2", tied: bool = False, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **extra, tie_word_embeddings=tied)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    for parameter in model.parameters():             # norms and biases too, or a swapped one would not show
        parameter.data.copy_(torch.randn(parameter.shape))
    return model


def tensors_of(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """State dict in which no two names share memory, without a tied head."""
    tied = model.config.tie_word_embeddings
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight" or not tied}


def check(folder: Path, source: dict[str, Tensor], layers: int = 2) -> None:
    """Every tensor of folder/model.pth equals the source's rows, and each source tensor is there once."""
    saved = torch.load(folder / "model.pth", mmap=True, weights_only=True)
    assert (saved["version"], saved["quantization"]) == (1, None)
    state, left = saved["state_dict"], dict(source)

    def equal(target: Tensor, *names: str) -> None:
        row = 0
        for name in names:
            rows = left.pop(name)
            assert target.dtype == rows.dtype and torch.equal(target[row:row + len(rows)], rows), name
            row += len(rows)
        assert row == len(target)

    equal(state.pop("tok_embeddings.weight"), "model.embed_tokens.weight")
    equal(state.pop("norm.weight"), "model.norm.weight")
    if "lm_head.weight" in source:
        equal(state.pop("output.weight"), "lm_head.weight")
    for i in range(layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for target in [name for name in state if name.startswith(ours)]:
            module, kind = target.removeprefix(ours).rsplit(".", 1)
            names = {"attention.wqkv": [f"self_attn.{p}_proj" for p in "qkv"], "attention.wo": ["self_attn.o_proj"],
                     "attention.q_norm": ["self_attn.q_norm"], "attention.k_norm": ["self_attn.k_norm"],
                     "feed_forward.w13": ["mlp.gate_proj", "mlp.up_proj"], "feed_forward.w2": ["mlp.down_proj"],
                     "attention_norm": ["input_layernorm"], "ffn_norm": ["post_attention_layernorm"]}[module]
            equal(state.pop(target), *(f"{theirs}{name}.{kind}" for name in names))
    assert not state and not left


def write_bin(folder: Path, source: dict[str, Tensor], shards: int = 1, legacy: bool = False) -> None:
    names, weight_map = list(source), {}
    for number in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        weight_map.update(dict.fromkeys(names[number::shards], file))
        shard = {name: source[name] for name in names[number::shards]}
        torch.save(shard, folder / file, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid single-file checkpoint, untied Qwen2."""
    tiny().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_tying(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny(family, tied)
    model.save_pretrained(tmp_path)
    assert convert(tmp_path, progress=False) == tmp_path / "model.pth"
    check(tmp_path, tensors_of(model))
    with torch.device("meta"):
        ours = Transformer(ModelArgs.from_hf(json.loads((tmp_path / "config.json").read_text())))
    ours.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True)["state_dict"], strict=True, assign=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["single", "shards", "shards without index", "other index name",
                                    "bin", "bin shards", "legacy bin"])
def test_layouts_and_dtypes(tmp_path: Path, layout: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(convert_module, "REMAP_BYTES", 5000)       # mappings are renewed within a file
    model = tiny(dtype=dtype)
    if "bin" in layout:
        model.config.save_pretrained(tmp_path)
        write_bin(tmp_path, tensors_of(model), shards=3 if "shards" in layout else 1, legacy="legacy" in layout)
    else:
        model.save_pretrained(tmp_path, max_shard_size="5GB" if layout == "single" else "20KB")
        index = tmp_path / "model.safetensors.index.json"
        assert layout == "single" or len(list(tmp_path.glob("*.safetensors"))) > 2 and index.exists()
        if layout == "shards without index":
            index.unlink()
        if layout == "other index name":
            index.rename(tmp_path / "weights.safetensors.index.json")
    convert(tmp_path, progress=False)
    check(tmp_path, tensors_of(model))


def test_qwen_v1(tmp_path: Path, monkeypatch) -> None:
    """w2 is the gate and w1 is up; c_attn comes fused; the FFN width in config.json counts both."""
    model = tiny("qwen2")
    source = tensors_of(model)
    for i in range(2):                               # Qwen v1 has as many KV heads as heads
        for kind in ("weight", "bias"):
            for p in "kv":
                shape = (32, 32) if kind == "weight" else (32,)
                source[f"model.layers.{i}.self_attn.{p}_proj.{kind}"] = torch.randn(shape)
    v1 = {"transformer.wte.weight": source["model.embed_tokens.weight"],
          "transformer.ln_f.weight": source["model.norm.weight"],
          "lm_head.weight": source["lm_head.weight"], "transformer.rotary_emb.inv_freq": torch.ones(4)}
    for i in range(2):
        ours, v1_layer = f"model.layers.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            v1[f"{v1_layer}attn.c_attn.{kind}"] = torch.cat([source[f"{ours}self_attn.{p}_proj.{kind}"] for p in "qkv"])
        names = {"attn.c_proj": "self_attn.o_proj", "mlp.w2": "mlp.gate_proj", "mlp.w1": "mlp.up_proj",
                 "mlp.c_proj": "mlp.down_proj", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
        for theirs, name in names.items():
            v1[f"{v1_layer}{theirs}.weight"] = source[f"{ours}{name}.weight"]
        v1[f"{v1_layer}attn.masked_bias"] = torch.tensor(-1e4)
    save_file(v1, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="qwen", architectures=["QWenLMHeadModel"], hidden_size=32, intermediate_size=96,
        num_attention_heads=4, num_hidden_layers=2, kv_channels=8, vocab_size=96, seq_length=64,
        max_position_embeddings=64, layer_norm_epsilon=1e-6, rotary_emb_base=10000, no_bias=True,
        use_logn_attn=True, use_dynamic_ntk=True,
        tie_word_embeddings=False)))
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\n")
    rebuilt = []
    monkeypatch.setattr(convert_module, "rebuild_tiktoken", rebuilt.append)
    monkeypatch.setattr(convert_module, "Tokenizer", mock.MagicMock())     # one token is none
    convert(tmp_path, progress=False)
    check(tmp_path, source)
    assert rebuilt == [tmp_path]


def test_base_model_without_prefix_and_with_old_buffers(tmp_path: Path) -> None:
    model = tiny("llama", tied=True)
    source = tensors_of(model)
    model.config.save_pretrained(tmp_path)
    bare = {name.removeprefix("model."): tensor for name, tensor in source.items()}
    save_file({**bare, "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    convert(tmp_path, progress=False)
    check(tmp_path, source)


def test_tied_head_that_is_there_all_the_same(tmp_path: Path) -> None:
    model = tiny(tied=True)
    source = tensors_of(model)
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**source, "lm_head.weight": source["model.embed_tokens.weight"].clone()}, file)
    convert(tmp_path, progress=False)
    check(tmp_path, source)
    save_file({**source, "lm_head.weight": source["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        convert(tmp_path, progress=False)


def test_fused_projections_of_different_dtypes_take_the_wider(folder: Path) -> None:
    file = folder / "model.safetensors"
    source = load_file(file)
    name = "model.layers.0.self_attn.k_proj.weight"
    source[name] = source[name].half()
    save_file(source, file)
    convert(folder, progress=False)
    check(folder, {**source, name: source[name].float()})


def test_index_is_followed(tmp_path: Path) -> None:
    """A second copy of the weights beside the index is not read, nor a name that the index puts elsewhere."""
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "consolidated.safetensors")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(tmp_path / file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    save_file({**load_file(other), "model.norm.weight": torch.zeros(32)}, other)
    convert(tmp_path, progress=False)
    check(tmp_path, tensors_of(model))


def fuse_experts(folder: Path) -> None:
    """The experts of a checkpoint in one tensor a layer, as some are published."""
    weights = load_file(folder / "model.safetensors")
    layers: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name in list(weights):
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name):
            layers.setdefault(match[1], {})[int(match[2]), match[3]] = weights.pop(name)
    for name, parts in layers.items():
        E = 1 + max(number for number, _ in parts)
        weights[f"{name}.gate_up_proj"] = torch.stack([torch.cat([parts[e, "gate"], parts[e, "up"]]) for e in range(E)])
        weights[f"{name}.down_proj"] = torch.stack([parts[e, "down"] for e in range(E)])
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe", "qwen3-moe-sparse", "qwen3-next", "qwen3.5-moe"])
def test_experts_in_one_tensor_or_in_many(tiny_folder, tmp_path: Path, family: str) -> None:
    source = tiny_folder(family)
    expected = (source / "model.pth").read_bytes()
    copy = shutil.copytree(source, tmp_path / "fused")
    fuse_experts(copy)
    assert any(name.endswith("gate_up_proj") for name in load_file(copy / "model.safetensors"))
    convert(copy, progress=False)
    assert (copy / "model.pth").read_bytes() == expected


def wrapped(folder: Path, outer: bool | None = None, inner: bool | None = None) -> None:
    """The same text model as a part of one with a vision tower, in a shard that only the index can find."""
    config, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    weights = {name.replace("model.", "model.language_model.", 1): t for name, t in load_file(file).items()}
    weights |= {f"model.visual.blocks.0.{name}": torch.ones(4, 4) for name in ("attn.qkv.weight", "mlp.bias")}
    file.unlink()
    shard = "model.safetensors-00001-of-00001.safetensors"
    save_file(weights, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, shard)}))
    tied = config.pop("tie_word_embeddings", None)
    text = {**config, "tie_word_embeddings": tied if inner is None else inner}
    whole = dict(model_type=config["model_type"].removesuffix("_text"), text_config=text, vision_config=dict(depth=1),
                 image_token_id=5, tie_word_embeddings=tied if outer is None else outer)
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3.5-moe"])
def test_text_models_with_a_vision_tower(tiny_folder, tmp_path: Path, capsys, family: str) -> None:
    """The same bytes as from a text-only folder, and a word about what is left out. A head is there, or it is tied,
    whatever config.json says of either model."""
    expected = (tiny_folder(family) / "model.pth").read_bytes()
    for number, flags in enumerate(((None, None), (True, False), (False, True), (False, False), (True, True))):
        copy = shutil.copytree(tiny_folder(family), tmp_path / str(number))
        wrapped(copy, *flags)
        capsys.readouterr()
        convert(copy, progress=False)
        assert (copy / "model.pth").read_bytes() == expected
        assert capsys.readouterr().err == f"{copy}: vision tower left out: text only\n"
        model, _ = load_model(copy)
        assert (model.output is None) == (family == "qwen3.5")


def test_a_tied_hybrid_with_a_head_all_the_same(tiny_folder, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder("qwen3.5"), tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    edit_weights(lambda w: w.update({"lm_head.weight": head}))(copy)
    convert(copy, progress=False)
    assert (copy / "model.pth").read_bytes() == (tiny_folder("qwen3.5") / "model.pth").read_bytes()
    edit_weights(lambda w: w.update({"lm_head.weight": head + 1}))(copy)
    convert(copy, progress=False)
    assert torch.equal(load_model(copy, "cpu", torch.float32)[0].output.weight, head + 1)


def test_numbers_of_the_recurrence_stay_fp32(tiny_folder, tmp_path: Path) -> None:
    """As published: A_log and the gated norm in fp32, all else in bf16."""
    copy = shutil.copytree(tiny_folder("qwen3.5"), tmp_path / "copy")
    exact = ("linear_attn.A_log", "linear_attn.norm.weight")
    edit_weights(lambda w: w.update({name: t.bfloat16() for name, t in w.items() if not name.endswith(exact)}))(copy)
    source = load_file(copy / "model.safetensors")
    convert(copy, progress=False)
    state = torch.load(copy / "model.pth", weights_only=True)["state_dict"]
    model, _ = load_model(copy, "cpu", torch.bfloat16)
    loaded = model.state_dict()
    for ours, theirs in (("A_log", "A_log"), ("norm.weight", "norm.weight")):
        original = source[f"model.layers.0.linear_attn.{theirs}"]
        assert original.dtype == torch.float32 and torch.equal(state[f"layers.0.attention.{ours}"], original)
        assert torch.equal(loaded[f"layers.0.attention.{ours}"], original)
    assert state["layers.0.attention.conv"].dtype == loaded["layers.0.attention.wba.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("gone", ["conv1d.weight", "A_log", "dt_bias", "norm.weight", "in_proj_ba.weight"])
def test_a_missing_tensor_of_a_recurrence_is_named(tiny_folder, tmp_path: Path, gone: str) -> None:
    copy = shutil.copytree(tiny_folder("qwen3-next"), tmp_path / "copy")
    edit_weights(lambda w: w.pop(f"model.layers.2.linear_attn.{gone}"))(copy)
    with pytest.raises(UserError, match=rf"missing: layers\.2\.linear_attn\.{gone}") as error:
        convert(copy, progress=False)
    assert "\n" not in str(error.value)


EXPERT = "model.layers.0.mlp.experts.{}.{}_proj.weight"
BAD_EXPERTS = {
    "top-k": (dict(num_experts_per_tok=9), None, "num_experts_per_tok 9 of 8 experts"),
    "no experts": (dict(num_experts=0), None, "num_experts 0"),
    "not as many": (dict(num_experts=7), None, r"unexpected: model\.layers\.0\.mlp\.experts\.7"),
    "more": (dict(num_experts=9), None, r"missing: .*\.mlp\.experts\.8.*mis-shaped: model\.layers\.0\.mlp\.gate"),
    "one missing": ({}, lambda w: w.pop(EXPERT.format(3, "up")), r"missing: layers\.0\.mlp\.experts\.3\.up_proj"),
    "unequal": ({}, lambda w: w.update({EXPERT.format(3, "up"): torch.ones(40, 64)}),
                r"mis-shaped: .*experts\.3\.up_proj"),
    "router missing": ({}, lambda w: w.pop("model.layers.1.mlp.gate.weight"), r"missing: layers\.1\.mlp\.gate"),
}


@pytest.mark.parametrize("case", BAD_EXPERTS)
def test_bad_experts_are_named(tiny_folder, tmp_path: Path, case: str) -> None:
    config, change, message = BAD_EXPERTS[case]
    copy = shutil.copytree(tiny_folder("qwen3-moe"), tmp_path / "copy")
    content = json.loads((copy / "config.json").read_text())
    content["num_experts"] = content.pop("num_local_experts", content.get("num_experts"))
    (copy / "config.json").write_text(json.dumps({**content, **config}))
    if change:
        edit_weights(change)(copy)
    with pytest.raises(UserError, match=message) as error:
        convert(copy, progress=False)
    assert "\n" not in str(error.value)


def test_an_index_that_names_some_experts_only(tiny_folder, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_folder("qwen3-moe"), tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    weight_map = {name: "model.safetensors" for name in weights if ".experts.5." not in name}
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"missing: layers\.0\.mlp\.experts\.5\.gate_proj"):
        convert(copy, progress=False)


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "tokenizer.json").write_text("{}"),
    lambda folder: (folder / "tokenizer_config.json").write_text('{"bos_token": 3}'),
    lambda folder: edit_config(vocab_size=200)(folder) or edit_weights(lambda w: w.update({
        name: w[name][:200] for name in ("model.embed_tokens.weight", "lm_head.weight")}))(folder)])
def test_what_its_tokenizer_keeps_from_loading_is_not_written(tiny_folder, tmp_path: Path, spoil) -> None:
    copy = shutil.copytree(tiny_folder("qwen3"), tmp_path / "copy")
    (copy / "model.pth").unlink()
    spoil(copy)
    with pytest.raises(UserError, match="copy"):
        convert(copy, progress=False)
    assert not (copy / "model.pth").exists() and not list(copy.glob(".*"))


def edit_config(**changes):
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return edit


def edit_weights(change):
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
    return edit


def put(name: str, content: bytes | str, remove: bool = True):
    def edit(folder: Path) -> None:
        if remove:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return edit


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1000)


def truncated_bin(folder: Path) -> None:
    write_bin(folder, load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    os.truncate(folder / "pytorch_model.bin", 20000)


def rename_layer(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        weights[name.replace(".layers.1.", ".layers.7.")] = weights.pop(name)


INDEX = "model.safetensors.index.json"
BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "config is not JSON": (put("config.json", "{", remove=False), "config.json: not valid JSON"),
    "config is a list": (put("config.json", "[]", remove=False), "config.json: expected a JSON object"),
    "unsupported model": (edit_config(model_type="gpt2"), "gpt2"),
    "no experts": (edit_config(model_type="qwen3_moe"), "no 'num_experts'"),
    "quantized": (edit_config(quantization_config={"quant_method": "gptq", "bits": 3}),
                  "config.json: quantization_config: bits 3 is not supported"),
    "quantized by a name": (edit_config(quantization_config="hqq"), "quant_method 'hqq' is not supported"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights there"),
    "shard absent": (put(INDEX, json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})),
                     "model-00001-of-00002.safetensors named in model.safetensors.index.json but not there"),
    "index without map": (put(INDEX, "{}", remove=False), "index.json: no weight_map"),
    "index is not JSON": (put(INDEX, "<html>", remove=False), "index.json: not valid JSON"),
    "truncated safetensors": (truncate, "model.safetensors: corrupt or truncated"),
    "garbage safetensors": (put("model.safetensors", b"garbage" * 100), "model.safetensors: corrupt or truncated"),
    "empty safetensors": (put("model.safetensors", b""), "model.safetensors: corrupt or truncated"),
    "git-lfs pointer": (put("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
                        "a git-lfs pointer"),
    "truncated bin": (truncated_bin, "pytorch_model.bin: corrupt or truncated"),
    "garbage bin": (put("pytorch_model.bin", b"garbage" * 100), "pytorch_model.bin: corrupt or truncated"),
    "empty bin": (put("pytorch_model.bin", b""), "pytorch_model.bin: corrupt or truncated"),
    "missing head": (edit_weights(lambda w: w.pop("lm_head.weight")), r"missing: lm_head\.weight"),
    "unexpected": (edit_weights(lambda w: w.update({"model.layers.0.mlp.router.weight": torch.ones(2)})),
                   r"unexpected: model\.layers\.0\.mlp\.router\.weight"),
    "mis-shaped": (edit_weights(lambda w: w.update({"model.norm.weight": torch.ones(31)})),
                   r"mis-shaped: model\.norm\.weight \[31\] instead of \[32\]"),
    "dtype": (edit_weights(lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
              r"unsupported dtype: model\.norm\.weight torch.int8"),
    "many missing": (edit_weights(rename_layer),
                     r"missing: layers\.1\..* and 4 more \(12 in all\); "
                     r"unexpected: model\.layers\.7\..* and 4 more \(12 in all\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_named(folder: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message) as error:
        convert(folder, progress=False)
    assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before        # nothing left behind


def test_bin_runs_no_code(folder: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "evil"),)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin"):
        convert(folder, progress=False)
    assert not (folder / "evil").exists()


def forked(work: Callable[[], Any]) -> tuple[int | None, Any]:
    """Exit code and result of work() in a process of its own, which saves importing everything again."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def main() -> None:
        torch.set_num_threads(1)             # OpenMP's threads do not survive a fork
        sender.send(work())
    process = context.Process(target=main)
    process.start()
    sender.close()
    process.join()
    return process.exitcode, receiver.recv() if process.exitcode == 0 else None


@pytest.mark.slow
def test_command(folder: Path, monkeypatch, capsys) -> None:
    command = [str(ROOT / "scripts/convert_hf_checkpoint.py"), "--checkpoint-dir", str(folder)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and str(folder / "model.pth") in done.stdout and "Converting" in done.stderr
    check(folder, load_file(folder / "model.safetensors"))
    os.truncate(folder / "model.safetensors", 5000)
    before = (folder / "model.pth").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(command[0], run_name="__main__")
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and error.startswith(f"error: {folder}/model.safetensors: corrupt")
    assert (folder / "model.pth").stat().st_mtime_ns == before


@pytest.mark.parametrize("limit", [4096, 60000])
def test_file_that_cannot_grow(folder: Path, limit: int) -> None:
    """What torch.save (4096) and a plain write (60000) really raise when the file system takes no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(UserError, match="could not write .*model.pth"):
            convert(folder, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder.glob("*.pth")) and not list(folder.glob(".*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk(folder: Path, code: int, monkeypatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="could not write .*model.pth"):
        convert(folder, progress=False)
    assert not list(folder.glob("*.pth")) and not list(folder.glob(".*"))


def test_killed_conversion_leaves_no_checkpoint(folder: Path) -> None:
    def dies_at_the_fifth_tensor() -> None:
        read_shard = convert_module.read_shard

        def dying(path, names):
            for number, item in enumerate(read_shard(path, names)):
                if number == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item
        convert_module.read_shard = dying
        convert(folder, progress=False)
    assert forked(dies_at_the_fifth_tensor)[0] == -signal.SIGKILL
    assert not (folder / "model.pth").exists() and len(list(folder.glob(".model.pth.*.tmp"))) == 1
    convert(folder, progress=False)
    check(folder, load_file(folder / "model.safetensors"))
    assert not list(folder.glob(".*"))               # what the killed one left is gone too


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
@pytest.mark.parametrize("layout", ["single", "shards", "bin"])
def test_memory(tmp_path: Path, layout: str) -> None:
    """Resident memory, mapped pages included, grows by less than the checkpoint's size."""
    config = transformers.Qwen3Config(vocab_size=8192, hidden_size=1024, intermediate_size=3072, num_hidden_layers=5,
                                      num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                                      tie_word_embeddings=True)
    with torch.device("meta"):
        shapes = transformers.Qwen3ForCausalLM(config).state_dict()
    source = {name: torch.full(value.shape, 0.5, dtype=torch.bfloat16) for name, value in shapes.items()
              if name != "lm_head.weight"}
    config.save_pretrained(tmp_path)
    if layout == "bin":
        write_bin(tmp_path, source)
    else:
        names = list(source)
        for number in range(count := 1 if layout == "single" else 3):
            save_file({name: source[name] for name in names[number::count]}, tmp_path / f"model-{number}.safetensors")
    size = sum(tensor.nbytes for tensor in source.values())
    del source

    setup = "import torch._dynamo; from convert import convert"          # which PyTorch imports for empty checkpoints
    grown = peak_growth(f"convert({str(tmp_path)!r}, progress=False)", setup)
    assert 0.1 * size < grown < size, f"{grown / size:.2f} times"
