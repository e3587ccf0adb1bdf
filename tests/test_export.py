"""Exported folders: transformers computes the same logits from them, and convert.py makes the same file again."""
import json
import resource
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

import cli
import eval as evaluate
import export
import loading
import quantize
import tiny
from checkpoint import write_checkpoint
from conftest import ROOT, peak_growth
from convert import convert
from export import export_checkpoint
from loading import load_model
from quantize import quantize_checkpoint
from test_quantize import dequantized

compressed_tensors = pytest.importorskip("compressed_tensors")
IDS = torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(0))
SIZES = {"qwen2-moe": dict(moe_intermediate_size=64, shared_expert_intermediate_size=64),
         "qwen3-moe": dict(moe_intermediate_size=64), "qwen3-moe-sparse": dict(moe_intermediate_size=64),
         "qwen3-next": dict(moe_intermediate_size=64, shared_expert_intermediate_size=64),
         "qwen3.5-moe": dict(moe_intermediate_size=64, shared_expert_intermediate_size=64)}
DENSE = [family for family in tiny.FAMILIES if family not in SIZES and family != "mixtral"]
EVERY = [*tiny.FAMILIES, "qwen-v1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(family, mode, head) -> a quantized file of a tiny model."""
    made = {}

    def path(family, mode="int4", lm_head="none", portable=True):
        key = family, mode, lm_head, portable
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            if family in tiny.QWEN_V1:
                tiny.save_qwen_v1(tiny.reference("qwen2", num_key_value_heads=4), folder, **tiny.QWEN_V1[family])
            else:
                tiny.save(tiny.reference(family, **SIZES.get(family, {})), folder)
            made[family] = convert(folder, progress=False)
        if mode is None:
            return made[family]
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized") / "copy"
            shutil.copytree(made[family].parent, folder)
            made[key] = quantize_checkpoint(folder / "model.pth", mode, 32, lm_head, progress=False, portable=portable)
        return made[key]
    return path


def logits_of(path):
    model, _ = load_model(path, "cpu", torch.float32, quantize_activations=False)
    pos = torch.arange(IDS.size(1))
    model.setup_caches(len(IDS), IDS.size(1))
    with torch.inference_mode():
        return model(IDS, pos, pos)


def same_file(path, folder):
    """Whether convert.py makes of an exported folder the file that was exported."""
    (state, quantization), (again, found) = map(loading.read_checkpoint, (path, convert(folder, progress=False)))
    assert state.keys() == again.keys()
    for name, tensor in state.items():
        assert tensor.dtype == again[name].dtype and torch.equal(tensor, again[name]), name
    if quantization is not None:
        for field in ("mode", "lm_head", "reordered"):
            assert getattr(quantization, field) == getattr(found, field), field
        assert quantization.mode.startswith("int8") or quantization.groupsize == found.groupsize
    return True


@pytest.mark.parametrize("family, mode", [*((family, "int4") for family in EVERY), ("llama-biases", "int8"),
                                          ("mixtral", "int8"), ("qwen3-next", "int8"), ("qwen-v1", "int8")])
def test_every_family_is_the_same_after_a_round_trip(checkpoint, tmp_path, family, mode):
    path = checkpoint(family, mode)
    out = export_checkpoint(path, tmp_path / "out", progress=False)
    assert same_file(path, out)


@pytest.mark.parametrize("family, mode", [*((family, "int4") for family in DENSE), ("llama-biases", "int8"),
                                          ("qwen3-tied", "int8"), ("qwen3.5", "int8")])
def test_transformers_computes_the_same_logits(checkpoint, tmp_path, family, mode):
    path = checkpoint(family, mode)
    out = export_checkpoint(path, tmp_path / "out", progress=False)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert (theirs(IDS).logits - logits_of(path)).abs().max() < 1e-3


@pytest.mark.parametrize("mode, lm_head", [("int4", "int8"), ("int4", "int4"), ("int8", "int8")])
def test_quantized_heads(checkpoint, tmp_path, mode, lm_head):
    """A tied one is a head of its own."""
    path = checkpoint("qwen3-tied", mode, lm_head)
    out = export_checkpoint(path, tmp_path / "out", progress=False)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    groups = config["quantization_config"]["config_groups"].values()
    assert {target: group["weights"]["num_bits"] for group in groups for target in group["targets"]} == {
        "Linear": int(mode[-1]), "lm_head": int(lm_head[-1])}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(IDS).logits - logits_of(path)).abs().max() < 1e-3
    assert same_file(path, out)


@pytest.mark.parametrize("family", ["qwen3", "qwen3.5-moe", "mixtral", "qwen-v1", "llama-biases"])
def test_an_unquantized_one_is_the_source_again(checkpoint, tmp_path, family):
    path = checkpoint(family, None)
    out = export_checkpoint(path, tmp_path / "out", progress=False)
    source, written = (load_file(folder / "model.safetensors") for folder in (path.parent, out))
    assert source.keys() == written.keys()
    for name, tensor in source.items():
        assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]), name
    config = json.loads((out / "config.json").read_text())
    assert config == {**json.loads((path.parent / "config.json").read_text()),
                      "tie_word_embeddings": config["tie_word_embeddings"]}


def test_skipped_linears_stay_as_they_are(checkpoint, tmp_path):
    path = checkpoint("qwen3-moe", None)
    path = quantize_checkpoint(path, "int4", 32, "none", ("layers.1.*",), progress=False, portable=True)
    for form in export.FORMATS:
        out = export_checkpoint(path, tmp_path / form, form, progress=False)
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        listed = config["ignore"] if form == "compressed-tensors" else [key[3:-1].replace("\\", "") for key
                                                                          in config["dynamic"]]
        assert {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.3.up_proj",
                "model.layers.0.mlp.gate"} <= {*listed}
        assert not [name for name in listed if "layers.0." in name and not name.endswith("mlp.gate")]
    path.unlink()


# ---- GPTQ

def dequantize_gptq(tensors, module, config):
    """From the format's documentation, in fp32: a word holds 8 integers, the first one lowest; qweight runs along the
    columns, qzeros along the rows; the older form stores zeros less 1."""
    qweight, qzeros, scales, g_idx = (tensors[f"{module}.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx"))
    bits = config["bits"]
    shifts = torch.arange(0, 32, bits)
    q = (qweight[:, None, :] >> shifts[:, None] & (1 << bits) - 1).reshape(-1, qweight.size(1))             # [K, N]
    zeros = (qzeros[:, :, None] >> shifts & (1 << bits) - 1).reshape(qzeros.size(0), -1)
    zeros = zeros + int(config["checkpoint_format"] == "gptq")
    return ((q - zeros[g_idx]) * scales.float()[g_idx]).t()


@pytest.mark.parametrize("mode", ["int4", "int8"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3-tied", "llama-biases", "qwen-v1", "qwen3-moe", "qwen3.5"])
def test_gptq(checkpoint, tmp_path, family, mode):
    path = checkpoint(family, mode)
    out = export_checkpoint(path, tmp_path / "out", "gptq", progress=False)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) == ((4, 32) if mode == "int4" else (8, -1))
    assert (config["sym"], config["checkpoint_format"]) == (True, "gptq")
    tensors, meant = load_file(out / "model.safetensors"), dequantized(path)
    layer = {"qwen-v1": "transformer.h.0.", "qwen3.5": "model.layers.1."}.get(family, "model.layers.0.")
    sources = ["attn.c_attn"] if family == "qwen-v1" else [f"self_attn.{p}_proj" for p in "qkv"]
    if family != "qwen3.5":              # whose queries and their gates are interleaved
        rows = torch.cat([dequantize_gptq(tensors, layer + source, config) for source in sources])
        assert torch.equal(rows, meant.layers[0].attention.wqkv.weight)
    again = convert(out, progress=False)
    (state, _), (found, quantization) = map(loading.read_checkpoint, (path, again))
    assert quantization.mode == f"{mode}-fp16" and quantization.source == "gptq"
    for name, tensor in state.items():
        if name.endswith(".zeros") or name.endswith(".weight") and tensor.dtype == torch.uint8:
            assert torch.equal(tensor, found[name]), name
        elif name.endswith(".weight") and tensor.dtype == torch.int8:
            assert torch.equal(tensor.view(torch.uint8) ^ 128, found[name]), name
        elif name.endswith(".scales") and mode == "int4":
            assert torch.equal(tensor.float(), found[name].float()), name
    assert (logits_of(again) - logits_of(path)).abs().max() < 1e-3


@pytest.mark.parametrize("form", export.FORMATS)
@pytest.mark.parametrize("variant", [dict(), dict(desc_act=True), dict(sym=False), dict(bits=8, groupsize=64),
                                     dict(method="awq", sym=False, groupsize=64)])
def test_published_checkpoints_go_out_again(tmp_path, variant, form):
    from published import publish
    folder = tiny.save(tiny.reference("qwen2", hidden_size=128, intermediate_size=256), tmp_path / "in")
    publish(folder, **variant)
    path = convert(folder, progress=False)
    if form == "compressed-tensors" and "desc_act" in variant:
        refused("columns are quantized in an order of their own, which compressed-tensors", path, tmp_path / "out")
        return
    out = export_checkpoint(path, tmp_path / "out", form, progress=False)
    assert same_file(path, out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    if form == "compressed-tensors":
        symmetric = config["config_groups"]["group_0"]["weights"]["symmetric"]
        assert symmetric == variant.get("sym", True)
        options = {} if symmetric else dict(quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **options)
        with torch.no_grad():
            assert (theirs(IDS).logits - logits_of(path)).abs().max() < 1e-3
    else:
        assert (config["sym"], config["checkpoint_format"]) == ((True, "gptq") if variant.get("sym", True) else
                                                                (False, "gptq_v2"))
        tensors, weights = load_file(out / "model.safetensors"), dequantized(path).layers[1].feed_forward.w2.weight
        assert torch.equal(dequantize_gptq(tensors, "model.layers.1.mlp.down_proj", config), weights)


def test_gptqmodel_loads_it(checkpoint, tmp_path):
    gptqmodel = pytest.importorskip("gptqmodel")
    path = checkpoint("qwen3")
    out = export_checkpoint(path, tmp_path / "out", "gptq", progress=False)
    theirs = gptqmodel.GPTQModel.load(str(out), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float32)
    with torch.no_grad():
        assert (theirs.model(IDS).logits.float() - logits_of(path)).abs().max() < 0.05


# ---- files

def test_shards(checkpoint, tmp_path):
    path = checkpoint("qwen3")
    whole = load_file(export_checkpoint(path, tmp_path / "one", progress=False) / "model.safetensors")
    out = export_checkpoint(path, tmp_path / "many", shard_bytes=60000, progress=False)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3 and {*index["weight_map"].values()} == {shard.name for shard in shards}
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], whole[name])
    assert all(shard.stat().st_size < 90000 for shard in shards) and same_file(path, out)


def test_other_files(checkpoint, tmp_path):
    path = checkpoint("qwen3", "int8")
    for name in ("generation_config.json", "LICENSE", "quantize_config.json", "notes.txt", "modeling.py"):
        (path.parent / name).write_text("{}")
    out = export_checkpoint(path, tmp_path / "out", progress=False)
    names = "LICENSE config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert sorted(file.name for file in out.iterdir()) == names.split()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family, architecture", [("qwen3.5", "Qwen3_5ForCausalLM"),
                                                  ("qwen3.5-moe", "Qwen3_5MoeForCausalLM")])
def test_a_text_model_beside_a_vision_tower_goes_out_alone(checkpoint, tmp_path, family, architecture):
    folder = shutil.copytree(checkpoint(family, "int8").parent, tmp_path / "in")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({
        "model_type": text["model_type"].removesuffix("_text"), "text_config": text, "dtype": "float32",
        "tie_word_embeddings": text["tie_word_embeddings"], "vision_config": {}}))
    out = export_checkpoint(folder / "model_int8.pth", tmp_path / "out", progress=False)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [architecture] and "vision_config" not in config
    assert same_file(folder / "model_int8.pth", out)


@pytest.mark.slow
def test_memory_is_bounded_by_a_shard(tmp_path):
    config = transformers.Qwen3Config(vocab_size=4096, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
                                      num_attention_heads=16, num_key_value_heads=8, head_dim=128, dtype="bfloat16",
                                      tie_word_embeddings=True)
    with torch.device("meta"):
        shapes = transformers.Qwen3ForCausalLM(config).state_dict()
    config.save_pretrained(tmp_path)
    weights = {name: torch.full(value.shape, 0.5, dtype=torch.bfloat16) for name, value in shapes.items()
               if name != "lm_head.weight"}
    tiny.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del weights
    path = quantize_checkpoint(convert(tmp_path, progress=False), "int8", lm_head="none", progress=False, portable=True)
    shard = 16 << 20
    grown = peak_growth(f"export_checkpoint(Path({str(path)!r}), Path({str(tmp_path / 'out')!r}), "
                        f"shard_bytes={shard}, progress=False)", "from export import export_checkpoint")
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size > 150e6 and grown < 64e6 + 4 * shard, f"{grown / 1e6:.0f} MB"
    assert grown < 0.85 * size


# ---- refusals

def refused(match, *args, **options):
    with pytest.raises(cli.UserError, match=match) as error:
        export_checkpoint(*args, progress=False, **options)
    assert "\n" not in str(error.value)


def test_what_a_format_cannot_hold_is_refused(checkpoint, tmp_path):
    out = tmp_path / "out"
    refused("attention.wqkv has zeros between two integers, which gptq cannot hold: quantize the model again with",
            checkpoint("qwen3", portable=False), out, form="gptq")
    path = checkpoint("qwen3", "int8", portable=False)
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    refused("has scales that are not exact in bfloat16, in which compressed-tensors holds them here: q", path, out)
    (path.parent / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    export_checkpoint(path, tmp_path / "exact", progress=False)              # in fp32 they are
    refused("has scales that are not exact in float16, in which gptq", path, out, form="gptq")
    refused("its head is quantized, which gptq has no place for", checkpoint("qwen3", "int4", "int8"), out, form="gptq")
    odd = tiny.save(tiny.reference("qwen3", intermediate_size=100), tmp_path / "odd")
    plain = convert(odd, progress=False)
    path = quantize_checkpoint(plain, "int4", 32, "none", progress=False, portable=True)
    refused("layers.0.mlp.down_proj has 100 columns, which are no multiple of the group size 32", path, out)
    path = quantize_checkpoint(plain, "int4", 32, "none", ("*.w2",), progress=False, portable=True)
    refused(r"model.layers.0.mlp.gate_proj \[100, 64\] is not of whole words of 8", path, out, form="gptq")
    refused("^format 'awq' is not supported", plain, out, form="awq")
    (tmp_path / "there").mkdir()
    refused("^out .*there is there already: name a new folder", plain, tmp_path / "there")
    refused("^out .*cannot be written: .*absent is no folder", plain, tmp_path / "absent" / "out")
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_damaged_checkpoints_are_refused(checkpoint, tmp_path):
    path = checkpoint("qwen3", "int8")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    copy = shutil.copytree(path.parent, tmp_path / "copy") / path.name
    copy.write_bytes(data)
    refused("is damaged", copy, tmp_path / "out")
    copy.write_bytes(data[:1000])
    refused("is damaged|not a checkpoint", copy, tmp_path / "out")
    state, quantization = loading.read_checkpoint(path)
    state["layers.1.attention.wo.scales"][3] = torch.nan
    write_checkpoint(copy, {name: t.clone() for name, t in state.items()}, quantization)
    refused("NaN|exact", copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [4096, 100000])
def test_file_that_cannot_grow(checkpoint, tmp_path, limit):
    path, before = checkpoint("qwen3", "int8"), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        refused("could not write .*out: is the disk full", path, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


# ---- commands

def test_commands(checkpoint, tmp_path, capsys, refusal):
    path = checkpoint("qwen3", None)
    folder = shutil.copytree(path.parent, tmp_path / "copy")
    quantize.main(["--model", str(folder), "--mode", "int4", "--round_to_nearest", "--export", str(tmp_path / "a")])
    assert f"wrote {tmp_path / 'a'}" in capsys.readouterr().out
    export.main(["--model", str(folder / "model_int4.g32.pth"), "--out", str(tmp_path / "b")])
    assert f"wrote {tmp_path / 'b'}" in capsys.readouterr().out
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    argv = ["--mode", "int8", "--export", str(tmp_path / "c"), "--export_format", "gptq"]
    quantize.main(["--model", str(folder), *argv])
    assert "model.layers.0.mlp.up_proj.qweight" in load_file(tmp_path / "c" / "model.safetensors")
    capsys.readouterr()
    for argv, message in [
            (["--mode", "int8", "--export", tmp_path / "a"], f"--export {tmp_path / 'a'} is there already"),
            (["--mode", "int8", "--export_format", "gptq"], "--export_format is for --export"),
            (["--mode", "int4", "--export", tmp_path / "d", "--export_format", "gptq", "--lm_head", "int8"],
             "--lm_head int8: gptq has no place for a quantized head")]:
        assert message in refusal(quantize.main, "--model", folder, *argv)
    quantize.main(["--model", str(folder), "--mode", "int4", "--round_to_nearest"])
    capsys.readouterr()
    message = refusal(export.main, "--model", folder / "model_int4.g32.pth", "--out", tmp_path / "d")
    assert "has zeros between two integers" in message
    assert "--out" in refusal(export.main, "--model", folder, "--out", tmp_path / "a")


@pytest.mark.slow
def test_the_demo_has_the_same_perplexity(tmp_path):
    """eval.py's of the file, and transformers' of the folder, over the same windows of text."""
    folder = shutil.copytree(ROOT / "checkpoints" / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("*.pth"))
    path = quantize_checkpoint(convert(folder, progress=False), "int4", 32, "none", progress=False, portable=True)
    out = export_checkpoint(path, tmp_path / "out", progress=False)
    text = (ROOT / "tests" / "data" / "heldout.txt").read_text()[:4000]
    model, tokenizer = load_model(path, "cpu", torch.float32, quantize_activations=False)
    ours = evaluate.perplexity(model, tokenizer, text, 256, 128)
    theirs, nll = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), 0.0
    for tokens, targets in evaluate.text_windows(model, tokenizer, text, 256, 128):
        with torch.no_grad():
            logprobs = theirs(torch.tensor([tokens])).logits[0, -len(targets):].log_softmax(-1)
        nll -= logprobs.gather(1, torch.tensor(targets)[:, None]).sum().item()
    assert ours.tokens > 500 and abs(ours.nll - nll) < 1e-4 * nll
