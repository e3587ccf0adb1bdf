"""config.json: what is read, what is refused; RoPE's frequencies; published shapes."""
import math

import pytest
import torch

from cli import UserError
from config import PUBLISHED, ModelArgs, rope_frequencies
from model import Transformer

BASE = dict(model_type="qwen2", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            vocab_size=320, max_position_embeddings=128)


@pytest.mark.parametrize("change, named", [
    (dict(model_type="qwen2_moe"), "qwen2_moe"), (dict(model_type="qwen3_next"), "qwen3_next"),
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


def test_every_published_shape_builds():
    for name in PUBLISHED:
        with torch.device("meta"):
            Transformer(ModelArgs.from_name(name))
    with pytest.raises(UserError, match="unknown model name 'Qwen9'"):
        ModelArgs.from_name("Qwen9")
