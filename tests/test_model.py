"""Every architecture against transformers in fp32, Qwen v1's own extensions against formulas written out here."""
import copy
import math

import pytest
import torch

import formats
import kernels
import tiny
from generate import Engine, Sampling, load_model
from model import GatedDeltaNet, Linear
from quantize import quantize_model

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


def all_logits(model, ids, chunk=None, fuse=True):
    """Logits [B, S, V] computed `chunk` tokens at a time, as an Engine does it or by the plain loop over the layers."""
    B, S = ids.shape
    model.setup_caches(B, S)
    fused = model.fuse() if fuse else None
    pieces = [model(part, torch.arange(at, at + part.size(1)), torch.arange(part.size(1)), fused)
              for at, part in zip(range(0, S, chunk or S), ids.split(chunk or S, dim=1))]
    return torch.cat(pieces, dim=1)


@torch.inference_mode()
def test_logits_equal_transformers(pair):
    reference, ours = pair
    expected = reference(IDS).logits
    assert expected.std() > 0.3                        # logits that say something: random weights large enough
    for fuse in (True, False):
        torch.testing.assert_close(all_logits(ours, IDS, fuse=fuse), expected, atol=1e-4, rtol=1e-4)


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
@pytest.mark.parametrize("mode,dtype,tolerance", [
    (None, torch.float32, 2e-5), (None, torch.bfloat16, 0.06), ("int8", torch.float32, 2e-5),
    ("int4", torch.float32, 2e-5),
    ("int8", torch.bfloat16, 0.08), ("int4", torch.bfloat16, 0.08)])
def test_fused_layers_equal_the_layers(pair, mode, dtype, tolerance):
    """Relative to the largest logit. bf16: the plain layers round after every step, to 2^-9, some thirty times on the
    way through three layers (in quadrature 1 %; six to eight times that are allowed, for the largest of 30,000
    differences). Quantized: with activations as they are; rounded ones may fall to either side of a step."""
    _, ours = pair
    model = copy.deepcopy(ours).to(dtype)
    if mode:
        quantize_model(model, mode)
        formats.set_quantize_activations(model, False)
    for B, steps in ((1, (1,) * 5), (1, (7, 16)), (3, (1, 2, 5))):
        model.setup_caches(B, 64)
        ids = torch.randint(0, 320, (B, 60), generator=torch.Generator().manual_seed(B))
        fused, outputs = model.fuse(), []
        assert kernels.unavailable_reason() or kernels.accepts(fused, torch.zeros(B, 1, model.args.dim, dtype=dtype))
        for path in (fused, None):
            at = 20
            logits = [model(ids[:, :at], torch.arange(at), None, path)]
            for S in steps:
                logits.append(model(ids[:, at:at + S], torch.arange(at, at + S), torch.arange(S), path))
                at += S
            outputs.append(torch.cat(logits, dim=1).float())
        off = (outputs[0] - outputs[1]).abs().amax(-1).flatten().sort().values           # of each token
        if model.args.n_expert and dtype == torch.bfloat16:        # rounding may choose another expert for a few
            off = off[:-(len(off) // 3)]
        assert off[-1] < tolerance * outputs[1].abs().max()


@torch.inference_mode()
def test_capacity_and_old_contents_of_the_cache_do_not_matter(pair):
    _, ours = pair
    whole = all_logits(ours, IDS)
    ours.setup_caches(2, 400)
    for layer in ours.layers:
        for cache in layer.attention.caches():         # a recurrence forgets all, NaN too
            cache.fill_(float("nan") if isinstance(layer.attention, GatedDeltaNet) and cache.is_floating_point() else 9)
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
    ours.set_prompt_lengths([prompt_length])
    expected = qwen_v1_by_hand(ours, ids, prompt_length)
    got = ours(ids[None, :prompt_length], torch.arange(prompt_length), torch.arange(prompt_length))[0]
    torch.testing.assert_close(got, expected[:prompt_length], atol=1e-4, rtol=1e-4)
    for p in range(prompt_length, 90):                   # decoding keeps the prompt's NTK; logn follows the position
        torch.testing.assert_close(ours(ids[None, p:p + 1], torch.tensor([p]))[0, 0], expected[p], atol=1e-4, rtol=1e-4)


# ---- changes of a loaded model

class Doubled(Linear):
    """A subclass, as a LoRA would be: it has the linear's weight and another forward."""

    def forward(self, x):
        return 2 * super().forward(x)


def new_weight(block):
    block.attention.wqkv.weight = torch.nn.Parameter(torch.zeros_like(block.attention.wqkv.weight), requires_grad=False)


def weight_data(block):
    block.feed_forward.w2.weight.data = torch.zeros_like(block.feed_forward.w2.weight)


def in_place(block):
    block.attention.wo.weight.zero_()


def new_norm(block):
    block.ffn_norm.weight = torch.nn.Parameter(2 * block.ffn_norm.weight, requires_grad=False)


def foreign_module(block):
    linear = block.feed_forward.w13
    block.feed_forward.w13 = torch.nn.Linear(linear.in_features, linear.out_features)


def subclass(block):
    block.attention.wqkv.__class__ = Doubled


def own_forward(block):
    block.feed_forward.forward = torch.zeros_like


def block_hook(block):
    block.register_forward_hook(lambda module, args, output: 0.5 * output)


def linear_hook(block):
    block.attention.wo.register_forward_pre_hook(lambda module, args: (2 * args[0],))


CHANGES = [new_weight, weight_data, in_place, new_norm, foreign_module, subclass, own_forward, block_hook, linear_hook]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(tiny.save(tiny.reference("qwen3"), tmp_path_factory.mktemp("qwen3")), "cpu", torch.float32)[0]


@torch.inference_mode()
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_loaded_model_takes_effect(loaded, change):
    """At once in the model, from the next request on in an Engine: both compute what the changed layers compute."""
    check_change(loaded, change)


def check_change(loaded, change):
    model, prompt = copy.deepcopy(loaded), IDS[0, :30].tolist()
    engine = Engine(model)
    model.setup_caches(1, 64)
    before = model(IDS[:1, :30], torch.arange(30)).clone()
    assert [row[0] for row in engine.generate(prompt, 8, GREEDY)] and (kernels.unavailable_reason() or engine.fused)
    change(model.layers[1])
    after = model(IDS[:1, :30], torch.arange(30)).clone()
    assert (after - before).abs().max() > 1e-3
    list(engine.generate(prompt, 1, GREEDY))
    torch.testing.assert_close(engine.prefill([prompt]), after, atol=1e-4, rtol=1e-4)
    if change not in (new_weight, weight_data, in_place, new_norm, new_experts, new_router):
        assert engine.fused is None


def new_experts(block):
    block.feed_forward.w13.weight = torch.nn.Parameter(-block.feed_forward.w13.weight, requires_grad=False)


def new_router(block):
    block.feed_forward.router.weight.neg_()


def moe_hook(block):
    block.feed_forward.register_forward_hook(lambda module, args, output: 0.5 * output)


@torch.inference_mode()
@pytest.mark.parametrize("change", [new_experts, new_router, moe_hook])
def test_a_change_of_experts_takes_effect(pair, change):
    if not pair[1].args.has_experts(1):
        pytest.skip("no experts there")
    check_change(pair[1], change)


@torch.inference_mode()
def test_hooks_of_experts_linears_are_refused(pair):
    if pair[1].args.n_expert:
        model = copy.deepcopy(pair[1])
        moe = next(layer.feed_forward for layer in model.layers if hasattr(layer.feed_forward, "router"))
        moe.w2.register_forward_hook(lambda module, args, output: output)
        with pytest.raises(RuntimeError, match="hook their MoE"):
            all_logits(model, IDS)


@torch.inference_mode()
def test_the_router_chooses_as_transformers_does(pair):
    """Also in the fused layers: their logits are equal, and a token with another expert has others."""
    reference, ours = pair
    chosen = {}
    for i, layer in enumerate(ours.layers):
        if ours.args.has_experts(i):
            mlp = reference.model.layers[i].mlp
            mlp.gate.register_forward_hook(lambda module, args, out, i=i: chosen.update({i: out[2]}))
            layer.feed_forward.register_forward_hook(lambda module, args, out, i=i: chosen.update(
                {-1 - i: module.route(args[0].flatten(0, 1))[0]}))
    reference(IDS), all_logits(ours, IDS, fuse=False)
    for i in [i for i in chosen if i >= 0]:
        assert torch.equal(chosen[i].sort(-1).values, chosen[-1 - i].sort(-1).values)
    assert bool(chosen) == bool(ours.args.n_expert)
    for layer in ours.layers:
        layer.feed_forward._forward_hooks.clear()


@pytest.mark.parametrize("change", [new_weight, block_hook])
def test_a_change_takes_effect_in_a_compiled_engine(loaded, change):
    model, prompt = copy.deepcopy(loaded), IDS[0, :30].tolist()
    engine = Engine(model, compile=True)
    assert list(engine.generate(prompt, 6, GREEDY))
    change(model.layers[0])
    assert list(engine.generate(prompt, 6, GREEDY)) == list(Engine(model).generate(prompt, 6, GREEDY))
