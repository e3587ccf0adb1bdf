"""Every architecture against transformers in fp32, Qwen v1's own extensions against formulas written out here."""
import copy
import math

import pytest
import tiny
import torch

import formats
from config import PUBLISHED, ModelArgs, rope_frequencies
import kernels
from cli import UserError
from generate import Engine, Sampling, load_model
from model import Transformer

GREEDY = Sampling(temperature=0)
IDS = torch.randint(0, 320, (2, 90), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, "qwen-v1"])
def pair(request, tmp_path_factory):
    """(transformers' model, ours) with the same weights in fp32."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen-v1":
        reference = tiny.reference("qwen2", num_key_value_heads=4)
        tiny.save_qwen_v1(reference, folder)
    else:
        reference = tiny.reference(request.param)
        tiny.save(reference, folder)
    return reference, load_model(folder / "model.pth", "cpu", torch.float32)[0]


def all_logits(model, ids, chunk=None):
    """Logits [B, S, V] computed `chunk` tokens at a time."""
    B, S = ids.shape
    model.setup_caches(B, S)
    pieces = [model(part, torch.arange(at, at + part.size(1)), torch.arange(part.size(1)))
              for at, part in zip(range(0, S, chunk or S), ids.split(chunk or S, dim=1))]
    return torch.cat(pieces, dim=1)


@torch.inference_mode()
def test_logits_equal_transformers(pair):
    reference, ours = pair
    expected = reference(IDS).logits
    assert expected.std() > 0.5                        # logits that say something: random weights large enough
    torch.testing.assert_close(all_logits(ours, IDS), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_64_greedy_tokens_equal_transformers(pair):
    reference, ours = pair
    prompt = IDS[0, :40].tolist()
    new = [row[0] for row in Engine(ours).generate(prompt, 64, GREEDY)]
    logits = reference(torch.tensor([prompt + new])).logits[0]
    assert len(new) == 64 and logits[39:-1].argmax(-1).tolist() == new


@torch.inference_mode()
def test_cached_steps_and_chunks_equal_one_pass(pair):
    _, ours = pair
    whole = all_logits(ours, IDS)
    for chunk in (1, 7, 32):
        torch.testing.assert_close(all_logits(ours, IDS, chunk), whole, atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_logits_only_where_asked(pair):
    _, ours = pair
    whole, pos = all_logits(ours, IDS), torch.arange(IDS.size(1))
    torch.testing.assert_close(ours(IDS, pos), whole[:, -1:], atol=2e-5, rtol=2e-5)
    at = torch.tensor([[3, 80], [50, 2]])
    expected = torch.stack([whole[0, at[0]], whole[1, at[1]]])
    torch.testing.assert_close(ours(IDS, pos, at), expected, atol=2e-5, rtol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("mode,dtype,tolerance", [(None, torch.float32, 2e-5), (None, torch.bfloat16, 0.06), ("int8", torch.float32, 2e-5),
                                                  ("int4", torch.float32, 2e-5), ("int8", torch.bfloat16, 0.08), ("int4", torch.bfloat16, 0.08)])
def test_all_layers_in_one_operator_equal_the_layers(pair, mode, dtype, tolerance):
    """Relative to the largest logit. bf16: the plain layers round after every step, to 2^-9, some thirty times on the way through three layers
    (in quadrature 1 %; six to eight times that are allowed, for the largest of 30,000 differences). Quantized: with activations as they are;
    rounded ones may fall to either side of a step."""
    _, ours = pair
    model = copy.deepcopy(ours).to(dtype)
    if mode:
        formats.quantize_model(model, mode)
        formats.set_quantize_activations(model, False)
    for B, steps in ((1, (1,) * 5), (1, (7, 16)), (3, (1, 2, 5))):
        model.setup_caches(B, 64)
        fused, ids, outputs = model.fuse(), torch.randint(0, 320, (B, 60), generator=torch.Generator().manual_seed(B)), []
        assert kernels.unavailable_reason() or kernels.accepts(fused, torch.zeros(B, steps[0], model.args.dim, dtype=dtype))
        for path in (fused, None):
            at = 20
            logits = [model(ids[:, :at], torch.arange(at), None, path)]
            for S in steps:
                logits.append(model(ids[:, at:at + S], torch.arange(at, at + S), torch.arange(S), path))
                at += S
            outputs.append(torch.cat(logits, dim=1).float())
        assert (outputs[0] - outputs[1]).abs().max() < tolerance * outputs[1].abs().max()


@torch.inference_mode()
def test_capacity_and_old_contents_of_the_cache_do_not_matter(pair):
    _, ours = pair
    whole = all_logits(ours, IDS)
    ours.setup_caches(2, 400)
    for layer in ours.layers:
        layer.attention.kv_cache.k_cache.fill_(9.0)
        layer.attention.kv_cache.v_cache.fill_(9.0)
    torch.testing.assert_close(all_logits(ours, IDS, 33), whole, atol=2e-5, rtol=2e-5)


def qwen_v1_by_hand(model, ids, prompt_length):
    """Qwen v1 written out with dense matrices: no cache, no fused weights; logn and NTK as its authors define them."""
    a, w = model.args, model.state_dict()
    S, D = ids.numel(), a.head_dim
    alpha = max(1, 2 ** math.ceil(math.log(prompt_length / a.seq_length, 2) + 1) - 1)
    base = 10000.0 * alpha ** (D / (D - 2))
    angles = torch.arange(S)[:, None] * (1.0 / base ** (torch.arange(0, D, 2).float() / D))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]                       # [S, 1, D/2]

    def rope(x):
        z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * turn
        return torch.cat((z.real, z.imag), -1)

    def norm(x, g):
        return x / (x.square().mean(-1, keepdim=True) + a.norm_eps).sqrt() * g
    logn = torch.tensor([math.log(p + 1, a.seq_length) if p + 1 > a.seq_length else 1.0 for p in range(S)])
    x = w["tok_embeddings.weight"][ids]
    for i in range(a.n_layer):
        get = lambda name: w[f"layers.{i}.{name}"]
        h = norm(x, get("attention_norm.weight"))
        q, k, v = (h @ get("attention.wqkv.weight").T + get("attention.wqkv.bias")).view(S, 3, a.n_head, D).unbind(1)
        q, k = rope(q) * logn[:, None, None], rope(k)
        scores = torch.einsum("shd,thd->hst", q, k) / math.sqrt(D) + torch.full((S, S), -torch.inf).triu(1)
        x = x + torch.einsum("hst,thd->shd", scores.softmax(-1), v).reshape(S, -1) @ get("attention.wo.weight").T
        h = norm(x, get("ffn_norm.weight"))
        gate, up = get("feed_forward.w13.weight").chunk(2)
        x = x + (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ get("feed_forward.w2.weight").T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@torch.inference_mode()
@pytest.mark.parametrize("prompt_length", [20, 33, 70, 90])
def test_qwen_v1_beyond_its_training_length(prompt_length, tmp_path):
    folder = tiny.save_qwen_v1(tiny.reference("qwen2", num_key_value_heads=4), tmp_path, seq_length=32)
    ours, _ = load_model(folder / "model.pth", "cpu", torch.float32)
    ids = IDS[0]
    ours.setup_caches(1, 90)
    ours.set_prompt_length(prompt_length)
    expected = qwen_v1_by_hand(ours, ids, prompt_length)
    got = ours(ids[None, :prompt_length], torch.arange(prompt_length), torch.arange(prompt_length))[0]
    torch.testing.assert_close(got, expected[:prompt_length], atol=1e-4, rtol=1e-4)
    for p in range(prompt_length, 90):                   # NTK stays frozen at the prompt's length while decoding, logn follows the position
        torch.testing.assert_close(ours(ids[None, p:p + 1], torch.tensor([p]))[0, 0], expected[p], atol=1e-4, rtol=1e-4)


def test_published_shapes_count_their_parameters():
    """Parameter counts as published on the model cards (embeddings included)."""
    for name, billions in {"Qwen-1.8B": 1.84, "Qwen-7B": 7.72, "Qwen1.5-0.5B": 0.46, "Qwen2.5-0.5B": 0.49, "Qwen2.5-7B": 7.62, "Qwen3-0.6B": 0.60,
                           "Qwen3-8B": 8.19, "Llama-2-7B": 6.74, "Llama-3.2-1B": 1.24, "Llama-3.1-8B": 8.03}.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in Transformer(ModelArgs.from_name(name)).parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.006), name


def test_every_published_shape_builds():
    for name in PUBLISHED:
        with torch.device("meta"):
            Transformer(ModelArgs.from_name(name))
    with pytest.raises(UserError, match="unknown model name 'Qwen9'"):
        ModelArgs.from_name("Qwen9")


BASE = dict(model_type="qwen2", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=320, max_position_embeddings=128)


@pytest.mark.parametrize("change, named", [
    (dict(model_type="qwen2_moe"), "qwen2_moe"), (dict(model_type="qwen3_next"), "qwen3_next"), (dict(model_type=None), "None"),
    (dict(hidden_act="gelu"), "gelu"), (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "dynamic"),
    (dict(rope_parameters=dict(rope_type="longrope", factor=2.0)), "longrope"), (dict(partial_rotary_factor=0.25), "partial_rotary_factor 0.25"),
    (dict(num_experts=8), "num_experts 8"), (dict(use_sliding_window=True, sliding_window=4, layer_types=["chunked_attention"] * 2), "chunked_attention"),
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
