"""GPTQ and AWQ checkpoints as others publish them: kept bit for bit, and refused where they are not supported."""
import json
import re
from types import SimpleNamespace

import pytest
import torch

import cli
import kernels
import loading
import tiny
from convert import convert
from formats import GPTQLinear
from loading import load_model
from packing import Published
from published import publish
from test_quantize import dequantized

SOURCES = {"attention.wqkv": [f"self_attn.{p}_proj" for p in "qkv"], "attention.wo": ["self_attn.o_proj"],
           "feed_forward.w13": ["mlp.gate_proj", "mlp.up_proj"], "feed_forward.w2": ["mlp.down_proj"]}
SHAPE = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
IDS = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "gptq": {}, "g64 asym": dict(groupsize=64, sym=False), "v2 asym": dict(form="gptq_v2", sym=False),
    "rows": dict(groupsize=-1), "rows, desc_act": dict(groupsize=-1, desc_act=True),
    "desc_act": dict(desc_act=True, groupsize=128, biases=True), "v2 desc_act": dict(desc_act=True, form="gptq_v2"),
    "8 bits": dict(bits=8, groupsize=128), "8 bits asym": dict(bits=8, sym=False),
    "8 bits v2": dict(bits=8, sym=False, form="gptq_v2", desc_act=True), "8 bits rows": dict(bits=8, groupsize=-1),
    "awq": dict(method="awq", sym=False, groupsize=128), "awq g64": dict(method="awq", sym=False, groupsize=64),
}


@pytest.fixture(scope="module")
def reference():
    return tiny.reference("qwen2", **SHAPE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_checkpoints_keep_their_weights(reference, tmp_path, variant):
    """Bit for bit those of the format's definition in fp16; in fp32, transformers' model with these weights runs."""
    folder = tiny.save(reference, tmp_path)
    meant = publish(folder, **VARIANTS[variant])
    model, tokenizer = load_model(folder, "cpu", torch.float32)
    state, quantization = loading.read_checkpoint(folder / "model.pth")
    reordered = "desc_act" in variant and "rows" not in variant or variant == "8 bits v2"
    assert len(meant) == 14 and bool(quantization.reordered) == reordered
    for layer in range(2):
        for name, sources in SOURCES.items():
            name = f"layers.{layer}.{name}"
            replaced = model.get_submodule(name)
            linear = quantization.linear(name, replaced.in_features, replaced.out_features, False)
            buffers = {key: state[f"{name}.{key}"] for key, _ in linear.named_buffers()}
            for key, value in buffers.items():
                setattr(linear, key, value)
            assert buffers["weight"].dtype == torch.uint8 and buffers["scales"].dtype == torch.float16
            for weights in zip(*(meant[f"model.layers.{layer}.{source}"] for source in sources), strict=True):
                weight = torch.cat(weights)
                found = linear.dequantize(weight.dtype)
                assert torch.equal(found.view(torch.uint8), weight.contiguous().view(torch.uint8)), (name, weight.dtype)
    plain = tiny.reference("qwen2", **SHAPE)
    for module, (_, weight) in meant.items():
        plain.get_submodule(module).weight.data = weight
    expected, pos = plain(IDS).logits, torch.arange(IDS.size(1))
    model.setup_caches(2, IDS.size(1))
    with torch.inference_mode():
        assert (model(IDS, pos, pos) - expected).abs().max() < 2e-4
        model, _ = load_model(folder, "cpu", torch.bfloat16)
        model.setup_caches(2, IDS.size(1))
        assert (model(IDS, pos, pos) - expected).norm() < 0.1 * expected.norm()
        model.setup_caches(1, IDS.size(1))
        fused = model.fuse()
        steps = torch.cat([model(IDS[:1, p:p + 1], pos[p:p + 1], fused=fused)[0] for p in range(8)])
        assert (steps - expected[0, :8]).norm() < 0.1 * expected[0, :8].norm()


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family, left, config", [
    ("qwen3-moe", "", {}),
    ("qwen2-moe", "|shared_expert|attn", {
        "dynamic": {"-:.*shared_expert.*": {}, "-:.*attn.*": {}, "+:.*mlp.*": {"bits": 4}},
        "modules_to_not_convert": ["shared_expert", "attn"]}),
    ("qwen3.5-moe", "|shared_expert|attn", {"dynamic": {
        "lm_head": {}, "model.language_model.embed_tokens": {}, "-:.*attn.*": {}, "-:.*shared_expert.*": {},
        "-:.*mtp.*": {}, "-:.*visual.*": {}}})])
def test_published_experts(tmp_path, family, left, config, method):
    """What is not quantized is what has no integers, as `dynamic` and `modules_to_not_convert` say."""
    sizes = dict(SHAPE, moe_intermediate_size=64)
    folder = tiny.save(tiny.reference(family, **sizes), tmp_path)
    meant = publish(folder, method, sym=False, skip=r"\.mlp\.gate$|shared_expert_gate" + left, **config)
    model, _ = load_model(folder, "cpu", torch.float32)
    plain = tiny.reference(family, **sizes)
    for module, (_, weight) in meant.items():
        if expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj", module):
            experts, number = plain.get_submodule(expert[1]), int(expert[2])
            whole = experts.down_proj if expert[3] == "down" else experts.gate_up_proj
            rows = {"down": slice(None), "gate": slice(0, 64), "up": slice(64, 128)}[expert[3]]
            whole.data[number, rows] = weight
        else:
            plain.get_submodule(module).weight.data = weight
    expected, pos = plain(IDS).logits, torch.arange(IDS.size(1))
    with torch.inference_mode():
        model.setup_caches(2, IDS.size(1))
        assert (model(IDS, pos, pos) - expected).abs().max() < 2e-4
        model, _ = load_model(folder, "cpu", torch.bfloat16)
        model.setup_caches(1, IDS.size(1))
        fused = model.fuse()
        assert fused is not None or kernels.unavailable_reason()
        steps = torch.cat([model(IDS[:1, p:p + 1], pos[p:p + 1], fused=fused)[0] for p in range(8)])
        assert (steps - expected[0, :8]).norm() < 0.15 * expected[0, :8].norm()


def test_whole_numbers_may_be_written_as_floats(reference, tmp_path):
    folder = tiny.save(reference, tmp_path)
    publish(folder)
    expected = convert(folder, progress=False).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"bits": 4.0, "group_size": 32.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert convert(folder, progress=False).read_bytes() == expected
    load_model(folder)


def test_what_is_not_supported_is_refused_by_name(reference, tmp_path):
    folder = tiny.save(reference, tmp_path)
    publish(folder)
    whole = json.loads((folder / "config.json").read_text())
    for options, reason in [
            (dict(bits=3), "bits 3 is not supported"), (dict(lm_head=True), "lm_head True is not supported"),
            (dict(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported"),
            (dict(is_marlin_format=True), "checkpoint_format 'marlin' is not supported"),
            (dict(group_size=48), "group_size 48 is not supported"),
            (dict(quant_method="aqlm"), "quant_method 'aqlm' is not supported"),
            (dict(quant_method="awq", version="gemv"), "version 'gemv' is not supported"),
            (dict(dynamic={"-:x": {}, "+:y": {"bits": 8}}), "dynamic {'bits': 8} is not supported")]:
        config = {**whole, "quantization_config": whole["quantization_config"] | options}
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
        kept = {name: t for name, t in tensors.items() if t is not None}
        tiny.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(cli.UserError, match=match):
            convert(folder, progress=False)
        assert not (folder / "model.pth").exists()
    q = "model.layers.0.self_attn.q_proj"
    refused("missing: layers.0.self_attn.q_proj.qzeros", **{f"{q}.qzeros": None})
    refused("mis-shaped: .*qweight", **{f"{q}.qweight": whole[f"{q}.qweight"][:4].clone()})
    refused("unsupported dtype: .*qweight torch.int64", **{f"{q}.qweight": whole[f"{q}.qweight"].long()})
    other_order = {f"{q}.g_idx": whole[f"{q}.g_idx"].flip(0)}
    refused("g_idx differs from that of the other parts of layers.0.attention.wqkv", **other_order)
    down = "model.layers.0.mlp.down_proj"
    refused("groups of other sizes than 32", **{f"{down}.g_idx": torch.zeros_like(whole[f"{down}.g_idx"])})
    refused("unexpected: .*o_proj.bias", **{"model.layers.0.self_attn.o_proj.bias": torch.ones(128)})


def test_a_fused_linear_of_which_a_part_is_not_quantized_is_dequantized(reference, tmp_path, capsys):
    folder = tiny.save(reference, tmp_path)
    meant = publish(folder, skip=r"layers\.0\.self_attn\.q_proj")
    model, _ = load_model(folder, "cpu", torch.float32)
    said = capsys.readouterr().err
    assert "becomes bf16: layers.0.self_attn.k_proj, layers.0.self_attn.v_proj\n" in said
    k_proj = meant["model.layers.0.self_attn.k_proj"][1]
    assert torch.equal(model.layers[0].attention.wqkv.weight[128:192], k_proj.bfloat16().float())
    q_proj = reference.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(model.layers[0].attention.wqkv.weight[:128], q_proj)
    assert isinstance(model.layers[1].attention.wqkv, GPTQLinear)


def test_qwen_v1_files(tmp_path):
    """Qwen-7B-Chat-Int4 and its like: its own names, query, key and value in one linear."""
    folder = tiny.save_qwen_v1(tiny.reference("qwen2", num_key_value_heads=4, **SHAPE), tmp_path)
    meant = publish(folder, groupsize=128, biases=True)
    load_model(folder)
    weights = dequantized(folder / "model.pth").state_dict()
    assert len(meant) == 10
    for layer in range(2):
        sources = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
        qkv, wo, up, gate, down = (meant[f"transformer.h.{layer}.{source}"][1] for source in sources)
        for name, weight in (("attention.wqkv", qkv), ("attention.wo", wo),
                             ("feed_forward.w13", torch.cat((gate, up))), ("feed_forward.w2", down)):
            assert torch.equal(weights[f"layers.{layer}.{name}.weight"], weight)


# ---- against gptqmodel, where it is installed

@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits,groupsize,desc_act", [(4, 128, False), (4, 32, True), (4, -1, False), (8, 64, False),
                                                     (8, 128, True)])
def test_gptqmodels_gptq(bits, groupsize, desc_act, form):
    """What gptqmodel packs, the ends of the zeros included, is what it dequantizes to, bit for bit."""
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    model = pytest.importorskip("gptqmodel.utils.model")
    torch.manual_seed(bits)
    N, K = 64, 256
    G, most = K if groupsize == -1 else groupsize, 2 ** bits - 1
    g_idx = (torch.arange(K) // G)[torch.randperm(K) if desc_act else torch.arange(K)].int()
    scales = torch.rand(N, K // G).mul(0.1).add(0.01).half().float()
    zeros = torch.randint(most + 1, (N, K // G)).float()
    zeros[0, 0], zeros[1, 0], zeros[8, -1] = 0, most, 0
    source = torch.nn.Linear(K, N, bias=False)
    theirs = module.TorchLinear(bits, groupsize, False, desc_act, K, N).eval()
    source.weight.data = torch.randint(most + 1, (N, K)).sub(zeros[:, g_idx.long()]) * scales[:, g_idx.long()]
    theirs.pack_original(source, scales, zeros, g_idx)
    expected = theirs.dequantize_weight().T
    if form == "gptq":
        model.convert_gptq_v2_to_v1_format_module(theirs, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    config = {"quant_method": "gptq", "bits": bits, "group_size": groupsize, "checkpoint_format": form}
    (packing,) = Published.from_hf({"quantization_config": config}).packings
    parts = {"qweight": theirs.qweight, "qzeros": theirs.qzeros, "scales": theirs.scales, "g_idx": theirs.g_idx}
    buffers = packing.decode("linear", torch.Size((N, K)), parts).to_buffers(f"int{bits}-fp16")
    ours = GPTQLinear(K, N, groupsize=packing.stored_groupsize, bits=bits)
    ours.order = buffers.get("order")
    weight = ours.dequantize(torch.float16, buffers)
    assert expected.dtype == torch.float16 and torch.equal(weight, expected)
    assert (weight - source.weight).abs().max() < 1e-2
    assert desc_act == ("order" in buffers)


@pytest.mark.parametrize("groupsize", [32, 128])
def test_gptqmodels_awq(groupsize):
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    utils = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    torch.manual_seed(groupsize)
    N, K = 64, 256
    scales = torch.rand(N, K // groupsize).mul(0.1).add(0.01).half()
    zeros, groups = torch.randint(16, (N, K // groupsize)), torch.arange(K) // groupsize
    source, theirs = torch.nn.Linear(K, N, bias=False), module.AwqTorchLinear(4, groupsize, False, False, K, N)
    source.weight.data = torch.randint(16, (N, K)).sub(zeros[:, groups]) * scales.float()[:, groups]
    theirs.pack(source, scales.float(), zeros.float())
    expected = utils.dequantize_gemm(theirs.qweight, theirs.qzeros, theirs.scales, 4, groupsize).T
    config = {"quant_method": "awq", "bits": 4, "group_size": groupsize, "version": "gemm"}
    (packing,) = Published.from_hf({"quantization_config": config}).packings
    parts = {"qweight": theirs.qweight, "qzeros": theirs.qzeros, "scales": theirs.scales}
    buffers = packing.decode("linear", torch.Size((N, K)), parts).to_buffers("int4-fp16")
    weight = GPTQLinear(K, N, groupsize=groupsize).dequantize(torch.float16, buffers)
    assert expected.dtype == torch.float16 and torch.equal(weight, expected)
    assert (weight - source.weight).abs().max() < 1e-2
