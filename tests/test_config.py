"""config.json: what is read, what is refused; RoPE's frequencies; published shapes."""
import dataclasses
import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cli import UserError
from config import FAMILIES, ModelArgs, rope_frequencies
from model import Transformer
from shapes import PUBLISHED

BASE = dict(model_type="qwen2", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=96, vocab_size=320, max_position_embeddings=128)


@pytest.mark.parametrize("change, named", [
    (dict(model_type="qwen4_exp"), "qwen4_exp .* hyper-connections"),
    (dict(model_type="qwen4_exp", text_config=dict(BASE, model_type="qwen4_exp_text")), "qwen4_exp"),
    (dict(model_type="qwen3_5", text_config=dict(BASE, model_type="qwen3_vl_text")), "qwen3_vl_text"),
    (dict(model_type=None), "None"), (dict(hidden_act="gelu"), "gelu"),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "dynamic"),
    (dict(rope_parameters=dict(rope_type="longrope", factor=2.0)), "longrope"),
    (dict(partial_rotary_factor=0.25), "partial_rotary_factor 0.25"), (dict(num_experts=8), "num_experts 8"),
    (dict(use_sliding_window=True, sliding_window=4, layer_types=["chunked_attention"] * 2), "chunked_attention"),
    (dict(model_type="qwen", no_bias=False), "no_bias")])
def test_unsupported_values_are_refused_by_name(change, named):
    with pytest.raises(UserError, match=named):
        ModelArgs.from_hf({**BASE, **change})


def test_a_missing_key_is_named():
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        with pytest.raises(UserError, match=key):
            ModelArgs.from_hf({k: v for k, v in BASE.items() if k != key})


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen"])
def test_defaults_are_those_of_transformers(family):
    theirs = transformers.CONFIG_MAPPING[family]
    for name, field in FAMILIES[family].model_fields.items():
        if not field.is_required() and name in theirs.__dataclass_fields__:
            assert field.default == theirs.__dataclass_fields__[name].default, name


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_file_without_defaults_reads_as_transformers_reads_it(family):
    config = {**BASE, "model_type": family, "num_attention_heads": 32, "hidden_size": 256, "use_sliding_window": True,
              "num_hidden_layers": 30}
    del config["num_key_value_heads"]
    theirs = transformers.CONFIG_MAPPING[family](**config)
    ours = ModelArgs.from_hf(config)
    default = ["sliding_attention" if family == "mistral" else "full_attention"] * 30
    layer_types = getattr(theirs, "layer_types", None) or default
    assert ours.windows == tuple(4096 if kind == "sliding_attention" else 0 for kind in layer_types)
    assert (ours.n_local_heads, ours.head_dim) == (theirs.num_key_value_heads, getattr(theirs, "head_dim", 8))
    assert (ours.norm_eps, ours.rope_base) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])


@pytest.mark.parametrize("change", [
    {}, dict(factor=None), dict(factor=None, original_max_position_embeddings=None), dict(beta_fast=None),
    dict(attention_factor=2.0), dict(mscale=0.7, mscale_all_dim=0.3), dict(mscale=0.7), dict(truncate=False),
    dict(beta_fast=16, beta_slow=2)])
def test_yarn_as_in_transformers(change):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0, **change}
    yarn = {key: value for key, value in yarn.items() if key != "original_max_position_embeddings" or value}
    config = {**BASE, "rope_parameters": yarn}
    args = ModelArgs.from_hf(config)
    theirs = transformers.Qwen2Config(**config)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    torch.testing.assert_close(rope_frequencies(args), frequencies)
    assert args.rope.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize("change, named", [
    (dict(head_dim=5), "head_dim is odd"), (dict(head_dim=2), "too small"), (dict(num_key_value_heads=3), "multiple"),
    (dict(num_hidden_layers=0), "num_hidden_layers 0"), (dict(rope_theta=0), "rope_theta 0"),
    (dict(rope_theta=-1e4), "rope_theta"), (dict(tie_word_embeddings="false"), "tie_word_embeddings 'false'"),
    (dict(hidden_size=64.0), "hidden_size 64.0"), (dict(vocab_size=10 ** 12), "vocab_size"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps nan"), (dict(num_attention_heads=True), "num_attention_heads True"),
    (dict(rope_scaling=dict(type="linear")), "need a factor"), (dict(rope_scaling="x"), "rope_scaling 'x'"),
    (dict(rope_parameters=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
    (dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), "full_attention"),
    (dict(use_sliding_window=True, layer_types=["full_attention"] * 3), "layer_types has 3 entries"),
    (dict(model_type="mistral", layer_types=["full_attention"] * 2), "layer_types"),
    (dict(rope_scaling=dict(type="yarn", factor=4.0, beta_slow=5e-324)), "beta_slow 5e-324"),
    (dict(model_type="mixtral", num_local_experts=1 << 20, num_experts_per_tok=2), "num_local_experts 1048576"),
    (dict(model_type="qwen3_moe", num_experts=1 << 20, num_experts_per_tok=2, moe_intermediate_size=1 << 20),
     "num_experts 1048576"),
    (dict(model_type=["qwen2"]), "model_type")])
def test_what_cannot_run_is_refused(change, named):
    with pytest.raises(UserError, match=named) as error:
        ModelArgs.from_hf({**BASE, **change})
    assert "\n" not in str(error.value)


HYBRID = {**BASE, "model_type": "qwen3_5_text", "head_dim": 32, "num_hidden_layers": 4}


@pytest.mark.parametrize("change, named", [
    (dict(linear_num_key_heads=3, linear_num_value_heads=4), "linear_num_value_heads 4 are no multiple of .* 3"),
    (dict(num_attention_heads=4, num_key_value_heads=3), "no multiple of num_key_value_heads 3"),
    (dict(sliding_window=8), "sliding_window 8"), (dict(use_sliding_window=True), "use_sliding_window True"),
    (dict(layer_types=["full_attention"] * 3), "layer_types has 3 full_attention in 3 entries, and there are 4 layers"),
    (dict(layer_types=["linear_attention"] * 4), "layer_types has 0 full_attention"),
    (dict(layer_types=["full_attention", "sliding_attention"] * 2), "layer_types.1 'sliding_attention'"),
    (dict(layer_types="full_attention"), "layer_types 'full_attention'"), (dict(layer_types=[]), "layer_types has 0"),
    (dict(full_attention_interval=0), "full_attention_interval 0"),
    (dict(full_attention_interval=8), "layer_types has 0 full_attention"),
    (dict(linear_conv_kernel_dim=1), "linear_conv_kernel_dim 1"), (dict(linear_key_head_dim=0), "linear_key_head_dim"),
    (dict(linear_num_value_heads=1 << 20), "channels of linear attention are too many"),
    (dict(partial_rotary_factor=0.05), "RoPE cannot turn 1 of 32"), (dict(partial_rotary_factor=1.5), "partial_rot"),
    (dict(attn_output_gate=False), "attn_output_gate False"), (dict(output_gate_type="sigmoid"), "output_gate_type"),
    (dict(mtp_num_hidden_layers=2), "mtp_num_hidden_layers 2"), (dict(attention_bias=True), "attention_bias True")])
@pytest.mark.parametrize("nested", [False, True])
def test_hybrids_that_cannot_run_are_refused(change, named, nested):
    config = {**HYBRID, **change}
    with pytest.raises(UserError, match=named) as error:
        ModelArgs.from_hf(dict(model_type="qwen3_5", text_config=config) if nested else config)
    assert "\n" not in str(error.value)


def test_layer_kinds_and_rope_of_hybrids():
    assert ModelArgs.from_hf(HYBRID).delta_layers == (0, 1, 2)
    own = ModelArgs.from_hf({**HYBRID, "layer_types": ["full_attention", *["linear_attention"] * 3],
                             "full_attention_interval": 2})
    assert own.delta_layers == (1, 2, 3)
    for change, turned in (({}, 8), (dict(partial_rotary_factor=0.5), 16),
                           (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=1.0)), 32),
                           (dict(rope_scaling=dict(rope_type="yarn", factor=4.0,
                                                   original_max_position_embeddings=32)), 8)):
        args = ModelArgs.from_hf({**HYBRID, **change})
        assert args.rotary_dim == turned and len(rope_frequencies(args)) == turned // 2
    assert args.rope and args.max_position == 128


def test_a_nested_config_is_the_text_models():
    flat = ModelArgs.from_hf(HYBRID)
    for outer, inner, tied in ((True, False, True), (False, True, False), (None, True, True), (None, None, False)):
        text = HYBRID if inner is None else {**HYBRID, "tie_word_embeddings": inner}
        config = dict(model_type="qwen3_5", text_config=text, vision_config=dict(depth=1), image_token_id=7)
        args = ModelArgs.from_hf(config if outer is None else {**config, "tie_word_embeddings": outer})
        assert dataclasses.replace(args, tie_word_embeddings=False) == flat and args.tie_word_embeddings == tied


def test_both_spellings_of_rope_agree():
    yarn = dict(factor=4.0, original_max_position_embeddings=32)
    old = ModelArgs.from_hf({**BASE, "rope_theta": 5e5, "rope_scaling": {"type": "yarn", **yarn}})
    new = ModelArgs.from_hf({**BASE, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **yarn}})
    assert old == new and old.rope_base == 5e5 and old.rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_dynamic_ntk_by_hand():
    args = ModelArgs.from_name("Qwen-7B")
    for length, alpha in ((100, 1), (8192, 1), (8193, 3), (16384, 3), (16385, 7), (32768, 7)):
        expected = (10000.0 * alpha ** (128 / 126)) ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
        torch.testing.assert_close(rope_frequencies(args, length).double(), expected, rtol=1e-5, atol=0)


def test_published_shapes_count_their_parameters():
    """Parameter counts as published on the model cards (embeddings included)."""
    for name, billions in {"Qwen-1.8B": 1.84, "Qwen-7B": 7.72, "Qwen1.5-0.5B": 0.46, "Qwen2.5-0.5B": 0.49,
                           "Qwen2.5-7B": 7.62, "Qwen3-0.6B": 0.60, "Qwen3-8B": 8.19, "Llama-2-7B": 6.74,
                           "Llama-3.2-1B": 1.24, "Llama-3.1-8B": 8.03}.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in Transformer(ModelArgs.from_name(name)).parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.006), name


def test_hybrid_shapes_count_their_parameters():
    """In billions, of the text model without its draft head."""
    for name, billions in {"Qwen3-Next-80B-A3B": 79.67, "Qwen3.5-0.8B": 0.75, "Qwen3.5-2B": 1.88, "Qwen3.5-4B": 4.21,
                           "Qwen3.5-9B": 8.95, "Qwen3.6-27B": 26.90, "Qwen3.5-35B-A3B": 34.66,
                           "Qwen3.5-122B-A10B": 122.1, "Qwen3.5-397B-A17B": 396.4}.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in Transformer(ModelArgs.from_name(name)).parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.006 if billions < 100 else 0.06), name


def test_every_published_shape_builds():
    for name in PUBLISHED:
        with torch.device("meta"):
            Transformer(ModelArgs.from_name(name))
    with pytest.raises(UserError, match="unknown model name 'Qwen9'"):
        ModelArgs.from_name("Qwen9")
