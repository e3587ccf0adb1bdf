"""The head for multi-token prediction against a plain fp32 reference, from its formulas (transformers has none), and
as a draft."""
import copy
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
import tiny
from cli import UserError
from conftest import ROOT
from convert import convert
from generate import Engine
from loading import load_model
from sampling import Sampling

sys.path.insert(0, str(ROOT / "scripts"))
import train_demo

GREEDY = Sampling(temperature=0)
FAMILIES = ["qwen3-next", "qwen3.5", "qwen3.5-moe"]


def normed(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def reference(theirs, tensors, ids, hidden):
    """What the head makes of tokens 1 .. n - 1 and the model's hidden states of 0 .. n - 2, [n - 1, C]."""
    embedded = theirs.model.embed_tokens.weight[ids[1:]]
    x = torch.cat((normed(embedded, tensors["mtp.pre_fc_norm_embedding.weight"]),
                   normed(hidden[:len(ids) - 1], tensors["mtp.pre_fc_norm_hidden.weight"])), dim=-1)
    x = (x @ tensors["mtp.fc.weight"].t())[None]
    block = copy.deepcopy(theirs.model.layers[theirs.config.layer_types.index("full_attention")])
    weights = {name.removeprefix(tiny.MTP_PREFIX): t for name, t in tensors.items() if name.startswith(tiny.MTP_PREFIX)}
    if "mlp.experts.0.gate_proj.weight" in weights:                              # in memory they are joined
        experts = [[weights.pop(f"mlp.experts.{e}.{kind}_proj.weight") for kind in ("gate", "up", "down")]
                   for e in range(theirs.config.num_experts)]
        weights["mlp.experts.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
        weights["mlp.experts.down_proj"] = torch.stack([down for *_, down in experts])
    block.load_state_dict(weights)
    positions, mask = torch.arange(x.size(1))[None], torch.full((x.size(1),) * 2, -torch.inf).triu(1)[None, None]
    y = block(x, position_embeddings=theirs.model.rotary_emb(x, positions), attention_mask=mask, position_ids=positions)
    return normed((y[0] if isinstance(y, tuple) else y)[0], tensors["mtp.norm.weight"])


def reference_drafts(theirs, tensors, text, k):
    """Greedy drafts after a text: the head takes its own guesses for the hidden states of drafted tokens."""
    hidden, drafts = theirs.model(torch.tensor([text[:-1]])).last_hidden_state[0], []
    for _ in range(k):
        y = reference(theirs, tensors, torch.tensor([*text, *drafts]), hidden)[-1:]
        drafts.append(int((y @ theirs.lm_head.weight.t())[0, :320].argmax()))
        hidden = torch.cat((hidden, y))
    return drafts


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    theirs = tiny.reference(request.param)
    tiny.save(theirs, folder)
    tensors = tiny.add_mtp_head(folder)
    ours = load_model(folder, dtype=torch.float32, mtp=True)[0]
    return theirs, tensors, ours, load_model(folder, dtype=torch.float32)[0], folder


def new_ids(engine, prompt, n, sampling=GREEDY, **options):
    return [row[0] for row in engine.generate(prompt, n, sampling, stop_ids=frozenset(), **options)]


PROMPT = torch.randint(256, (70,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("chunk", [1024, 30])
@pytest.mark.parametrize("length", [1, 2, 17, 70])
def test_drafts_are_the_references_whatever_was_accepted(models, length, chunk, monkeypatch):
    theirs, tensors, ours, plain, _ = models
    monkeypatch.setitem(generate.PREFILL_CHUNK, "cpu", chunk)
    prompt, k = PROMPT[:length], 3
    text = prompt + new_ids(Engine(plain), prompt, 24)
    engine = Engine(ours, draft="mtp", speculate_k=k)
    drafter, seen, rounds = engine.speculator.drafter, [], []
    propose = drafter.propose

    def propose_right_up_to_a_point(k, choice, rng):
        """Notes what the head drafts, and submits 0, 1, 2 .. right tokens."""
        draft, n, right = propose(k, choice, rng), len(drafter.text), len(rounds) % (k + 1)
        seen.append((list(drafter.text), draft.tokens[0].tolist()))
        rounds.append(right)
        true = text[n:n + right]
        draft.tokens[0, :len(true)] = torch.tensor(true, dtype=torch.int64)
        draft.tokens[0, len(true):] = (draft.tokens[0, len(true):] + 1) % 256
        return draft
    monkeypatch.setattr(drafter, "propose", propose_right_up_to_a_point)
    assert prompt + new_ids(engine, prompt, 24) == text
    with torch.inference_mode():
        for before, drafts in seen:
            assert drafts == reference_drafts(theirs, tensors, before, len(drafts))
    assert engine.speculator.statistics.mean_accepted > 0.5


@pytest.mark.parametrize("k", [1, 3, 20, None])
def test_greedy_text_is_that_of_plain_decoding(models, k):
    _, _, ours, plain, _ = models
    engine = Engine(ours, draft="mtp", speculate_k=k)
    for length in (1, 2, 17, 70):
        assert new_ids(engine, PROMPT[:length], 48) == new_ids(Engine(plain), PROMPT[:length], 48)


def test_a_chat_goes_on_from_what_was_read(models):
    theirs, tensors, ours, plain, _ = models
    engine = Engine(ours, draft="mtp", speculate_k=2)
    answer = new_ids(engine, PROMPT, 20, keep_cache=True)
    drafter = engine.speculator.drafter
    for prompt in (PROMPT + answer[:8] + [3, 4, 5], PROMPT[:-3] + [7], PROMPT[:5], PROMPT + answer + [9]):
        expected = new_ids(Engine(plain), prompt, 20)
        assert new_ids(engine, prompt, 1, keep_cache=True) == expected[:1]
        drafter.begin([*prompt, expected[0]], True)
        drafts = drafter.propose(2, GREEDY.choice(320), torch.Generator()).tokens[0].tolist()
        with torch.inference_mode():
            assert drafts == reference_drafts(theirs, tensors, drafter.text, 2)
        assert new_ids(engine, prompt, 20, keep_cache=True) == expected


def test_a_shortlist_drafts_the_first_tokens_only(models, monkeypatch):
    import drafts
    _, _, ours, plain, _ = models
    monkeypatch.setattr(drafts, "DRAFT_ROWS", 64)
    for sampling in (GREEDY, Sampling(top_k=None), Sampling(top_k=5)):
        engine = Engine(ours, draft="mtp", speculate_k=3)
        drafter, drafted = engine.speculator.drafter, []
        propose = drafter.propose
        monkeypatch.setattr(drafter, "propose", lambda *args: drafted.append(propose(*args)) or drafted[-1])
        ids = new_ids(engine, PROMPT, 16, sampling, seed=1)
        assert drafted and all(bool((draft.tokens < 64).all()) for draft in drafted)
        assert sampling is not GREEDY or ids == new_ids(Engine(plain), PROMPT, 16)


def test_what_is_not_there_is_said(models, tmp_path):
    *_, folder = models
    tiny.save(tiny.reference("qwen3"), tmp_path)
    with pytest.raises(UserError, match="no head for multi-token prediction"):
        load_model(tmp_path, mtp=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["mtp.fc.weight"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="missing: mtp.fc.weight"):
        convert(tmp_path)


@pytest.mark.slow
def test_a_head_is_trained_as_it_is_used(tmp_path):
    """What scripts/train_demo.py trains and saves, a hybrid with a head, computes the same when it is loaded."""
    torch.manual_seed(0)
    theirs, ids = train_demo.build_model("demo-hybrid"), torch.randint(0, 4096, (1, 40))
    hidden = theirs.model(input_ids=ids, use_cache=False).last_hidden_state
    expected = theirs.mtp(theirs.model.embed_tokens(ids[:, 1:]), hidden[:, :-1], theirs.model.rotary_emb)
    theirs.save_pretrained(tmp_path)
    for file in (ROOT / "checkpoints" / "demo").glob("tokenizer*.json"):
        shutil.copy(file, tmp_path)
    ours, _ = load_model(tmp_path, dtype=torch.float32, mtp=True)
    ours.setup_caches(1, 64)
    positions = torch.arange(40)
    with torch.inference_mode():
        logits = ours(ids, positions, positions)
        drafts = ours.draft(ids[:, 1:], ours.hidden_states[:1, :39], positions[None, :39])
    assert (logits - theirs.lm_head(hidden)).abs().max() < 1e-4 and (drafts - expected).abs().max() < 1e-4
