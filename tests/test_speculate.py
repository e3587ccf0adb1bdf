"""Speculative decoding: the model's own text and distribution, whatever the draft; the choice of k; bad input."""
import json
import math
import random
import shutil
import subprocess
import sys

import pytest
import torch

import generate
import speculate
import tiny
from cli import UserError
from config import ModelArgs
from conftest import ROOT
from generate import Engine
from loading import load_model
from model import Transformer
from sampling import Sampling
from speculate import KPolicy, PromptLookup, Statistics, accept, predicted_speedup
from tokenizer import Tokenizer

sys.path.insert(0, str(ROOT / "scripts"))
import inflate_demo

GREEDY = Sampling(temperature=0)
HELDOUT = (ROOT / "tests" / "data" / "heldout.txt").read_text("utf-8")
FP32 = torch.float32


def load_demo(name="demo"):
    return load_model(ROOT / "checkpoints" / name / "model.pth", "cpu", FP32)


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def small():
    return load_demo("demo-draft")


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory):
    """Two random models with one tokenizer, whose embeddings are padded differently."""
    target = tiny.save(tiny.reference("qwen3-tied"), tmp_path_factory.mktemp("target"))
    draft = tiny.save(tiny.reference("qwen2", seed=1, vocab_size=288, num_hidden_layers=1),
                      tmp_path_factory.mktemp("draft"))
    return load_model(target, "cpu", FP32), load_model(draft, "cpu", FP32)


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def compile(request, monkeypatch):
    """Compiled: the check and the draft's steps too, which are left alone where they are one operator."""
    if request.param:
        monkeypatch.setattr(speculate, "runs_fused", lambda model: False)
    return request.param


def tokens(generator, prompt, n=32, sampling=GREEDY, **more):
    more.setdefault("stop_ids", frozenset())
    return [row[0] for row in generator.generate(prompt, n, sampling, **more)]


def speculating(model, tokenizer, draft, k=None, compile=False):
    return Engine(model, tokenizer, compile, draft=draft, speculate_k=k)


def draft_of(kind, pair, target):
    return {"model": lambda: Engine(*pair), "itself": lambda: Engine(*target), "ngram": lambda: "ngram"}[kind]()


# ---- greedy: token by token what plain decoding writes, in fp32

PROMPT = list(range(40, 70)) + list(range(40, 52))


@pytest.mark.parametrize("family", ["qwen2-moe", "mixtral"])
def test_a_model_with_experts_verifies(tiny_folder, tiny_pair, family):
    model, tokenizer = load_model(tiny_folder(family), "cpu", FP32)
    prompt = [7, 8, 9, 10, 7, 8, 9]
    plain = tokens(Engine(model, tokenizer), prompt)
    for draft in (lambda: Engine(*tiny_pair[1]), lambda: Engine(model, tokenizer), lambda: "ngram"):
        for k in (3, None):
            assert tokens(speculating(model, tokenizer, draft(), k), prompt) == plain



@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_greedy_equals_plain_decoding(tiny_pair, compile, kind):
    (target, tokenizer), draft = tiny_pair
    expected = tokens(Engine(target, tokenizer), PROMPT, 64)
    engine = speculating(target, tokenizer, draft_of(kind, draft, None), 1, compile)
    for engine.speculator.k in (1, 2, 4, 8):
        assert tokens(engine, PROMPT, 64, max_seq_length=160) == expected
        assert len(engine.speculator.statistics.counts) == engine.speculator.k + 1


@pytest.mark.parametrize("k", [1, 2, 4, 8, None])
@pytest.mark.parametrize("kind", ["model", "itself", "ngram"])
def test_greedy_on_the_demo(demo, small, kind, k):
    prompt = demo[1].encode(HELDOUT[5000:5600])
    engine = speculating(*demo, draft_of(kind, small, load_demo() if kind == "itself" else None), k)
    assert tokens(engine, prompt, 96) == tokens(Engine(*demo), prompt, 96)
    if kind == "itself" and k:
        # its own draft is always right: so the cache is, after full acceptance too
        assert engine.speculator.statistics.acceptance == 1
        assert engine.speculator.statistics.passes == math.ceil(95 / (k + 1))


@pytest.mark.slow
def test_bf16_differs_only_between_near_ties(small):
    """Where the text first differs from plain decoding's, the two tokens' logits are as close as bf16 sums in another
    order may move them."""
    target, tokenizer = load_model(ROOT / "checkpoints" / "demo" / "model.pth", "cpu", torch.bfloat16)
    draft = load_model(ROOT / "checkpoints" / "demo-draft" / "model.pth", "cpu", torch.bfloat16)
    exact = load_demo()[0]
    exact.setup_caches(1, 512)
    for start in range(0, 12_000, 1500):
        prompt = tokenizer.encode(HELDOUT[start:start + 500])
        plain, quick = tokens(Engine(target, tokenizer), prompt, 80), tokens(speculating(target, tokenizer,
                                                                                         Engine(*draft), 4), prompt, 80)
        at = next((i for i, (a, b) in enumerate(zip(plain, quick)) if a != b), None)
        if at is not None:
            text = torch.tensor([prompt + plain[:at]])
            with torch.inference_mode():
                logits = exact(text, torch.arange(text.size(1)))[0, -1]
            assert abs(logits[plain[at]] - logits[quick[at]]) < 0.02 * logits.abs().max()


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_target_and_draft(tmp_path, mode):
    import formats
    import quantize
    models = []
    for name, layers in (("target", 3), ("draft", 1)):
        folder = tiny.save(tiny.reference("qwen2", num_hidden_layers=layers, hidden_size=64), tmp_path / name)
        load_model(folder)
        models.append(load_model(quantize.quantize_checkpoint(folder / "model.pth", mode, progress=False), "cpu", FP32))
        formats.set_quantize_activations(models[-1][0], False)
    (target, tokenizer), draft = models
    expected = tokens(Engine(target, tokenizer), PROMPT, 48)
    assert tokens(speculating(target, tokenizer, Engine(*draft), 3), PROMPT, 48) == expected
    assert tokens(speculating(target, tokenizer, Engine(target, tokenizer), 3), PROMPT, 48)[:1] == expected[:1]


def test_stop_ids_and_length_in_the_middle_of_a_round(tiny_pair):
    """A draft that is always right: rounds of five tokens, cut wherever the text has to end."""
    (target, tokenizer), _ = tiny_pair
    whole = tokens(Engine(target, tokenizer), PROMPT, 24)
    for n in range(1, 13):
        assert tokens(speculating(target, tokenizer, copy_of(target, tokenizer), 4), PROMPT, n) == whole[:n]
    for stop in set(whole):
        got = tokens(speculating(target, tokenizer, copy_of(target, tokenizer), 4), PROMPT, 24,
                     stop_ids=frozenset([stop]))
        assert got == whole[:whole.index(stop)]


def copy_of(model, tokenizer):
    """Another Transformer on the same weights, with a cache of its own."""
    with torch.device("meta"):
        other = Transformer(model.args)
    other.load_state_dict(model.state_dict(), assign=True)
    return Engine(other.eval(), tokenizer)


def test_a_kept_cache_after_a_round_that_was_cut(tiny_pair):
    (target, tokenizer), draft = tiny_pair
    for kind in ("model", "ngram"):
        engine = speculating(target, tokenizer, draft_of(kind, draft, None), 4)
        first = tokens(engine, PROMPT, 13, max_seq_length=160)
        text = PROMPT + first + [50, 51, 52]
        assert tokens(engine, text, 20, keep_cache=True) == tokens(Engine(target, tokenizer), text, 20)
        answer = engine.generate(text, 30, GREEDY, stop_ids=frozenset(), keep_cache=True)
        part = [next(answer)[0] for _ in range(4)]
        answer.close()
        text = text + part + [7]
        assert tokens(engine, text, 12, keep_cache=True) == tokens(Engine(target, tokenizer), text, 12)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind, steps", [("model", 5), ("ngram", 3)])
def test_requests_of_one_kind_share_a_compilation(tiny_pair, monkeypatch, kind, steps):
    """Whatever the temperature, top_k, top_p and lengths. The steps: a plain one, verification of one token and of
    more, drafting after two tokens and after one; the kinds: greedy, 256, all, and all but what top_p cuts."""
    monkeypatch.setattr(speculate, "runs_fused", lambda model: False)
    (target, tokenizer), draft = tiny_pair
    engine, draw = speculating(target, tokenizer, draft_of(kind, draft, None), 4, True), random.Random(0)
    tokens(Engine(target, tokenizer), PROMPT, 1, max_seq_length=510)               # the capacity is the same for all
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(40):
        sampling = Sampling(draw.choice([0, 1.0, 0.1 + draw.random()]), draw.choice([None, 1, 5, 200, 256, 257, 999]),
                            draw.choice([None, 1.0, 0.01 + 0.9 * draw.random()]))
        prompt = PROMPT[:draw.randrange(2, 42)] * draw.randrange(1, 5)
        tokens(engine, prompt, draw.randrange(2, 30), sampling, max_seq_length=draw.choice([0, 220, 500]))
    assert 4 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4 * steps


# ---- sampling: the distribution

DRAWS = 20_000
SETTINGS = [Sampling(1.0, None), Sampling(0.6, None), Sampling(1.5, 5), Sampling(1.0, None, 0.8), Sampling(0.8, 7, 0.9)]


class Chain:
    """In place of a model: the next token's logits depend on the last two, so that a wrong position shows. V = 8."""

    def __init__(self, seed, spread):
        self.table = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(seed)) * spread

    def logits(self, before, last):
        return self.table[before, last]


def drafted_and_accepted(target, draft, before, last, k, choice, rng, accepts):
    """A round from contexts before, last [B] each: n [B] and tokens [B, k + 1]."""
    steps, text = [], [before, last]
    for _ in range(k):
        scaled, ids = speculate.shortlist(draft.logits(text[-2], text[-1]), choice)
        noise = speculate.exponential_noise(*ids.shape, rng)
        text.append(ids.gather(-1, (scaled - noise.log()).argmax(-1, keepdim=True))[:, 0])
        steps.append((scaled.softmax(-1), ids))
    logits = torch.stack([target.logits(*text[i:i + 2]) for i in range(k + 1)], 1)
    probs, ids = (torch.stack(parts, 1) for parts in zip(*steps))
    uniform = torch.rand(len(last), k, generator=rng)
    noise = speculate.exponential_noise(len(last), choice.candidates, rng)[:, None]
    found = torch.vmap(lambda logits, drafted, *rest: accepts(logits, drafted, choice, *rest))(
        logits, torch.stack(text[2:], 1), probs, ids, uniform, noise)
    return found[:, 0], found[:, 1:]


def three_tokens(target, draft, k, choice, rng, accepts, draws):
    """[draws, 3] tokens after the context 0, 1."""
    text, length, rows = torch.zeros(draws, 3 + 3 * (k + 1), dtype=torch.int64), torch.full((draws,),
                                                                                            2), torch.arange(draws)
    text[:, 1] = 1
    for _ in range(3):
        n, new = drafted_and_accepted(target, draft, text[rows, length - 2], text[rows, length - 1], k, choice, rng,
                                      accepts)
        for i in range(k + 1):
            text[rows, length + i] = new[:, i]
        length = (length + n + 1).clamp(max=5)
    return text[:, 2:5]


def kept(logits, sampling):
    """Probabilities [V] by the definition of top_k and top_p, in fp64."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    order, out, held = p.argsort(descending=True)[:sampling.top_k or len(p)], torch.zeros_like(p), 0.0
    for rank, i in enumerate(order):
        if rank and held >= (sampling.top_p or 1.0):
            break
        out[i] = p[i] / p[order].sum()
        held += out[i].item()
    return out / out.sum()


def continuations(logits_after, sampling):
    """Probability of every continuation of three tokens. logits_after(*tokens): of the next one."""
    return {(a, b, c): (pa * pb * pc).item()
            for a, pa in enumerate(kept(logits_after(), sampling)) if pa
            for b, pb in enumerate(kept(logits_after(a), sampling)) if pb
            for c, pc in enumerate(kept(logits_after(a, b), sampling)) if pc}


def p_value(counts, probs):
    """Of the chi-square test; continuations expected fewer than five times are taken together."""
    from scipy.stats import chi2
    total = sum(counts.values())
    assert all(key in probs for key in counts), "a token outside top_k or top_p"
    common = [key for key, p in probs.items() if p * total >= 5]
    observed, expected = [counts.get(key, 0) for key in common], [probs[key] * total for key in common]
    if total - sum(expected) >= 5:
        observed.append(total - sum(observed)), expected.append(total - sum(expected))
    return chi2.sf(sum((o - e) ** 2 / e for o, e in zip(observed, expected)), len(observed) - 1)


def counted(rows):
    found, counts = rows.unique(dim=0, return_counts=True)
    return dict(zip(map(tuple, found.tolist()), counts.tolist()))


def chain_p_value(sampling, draft_spread, accepts, k=2):
    target, draft, rng = Chain(1, 1.5), Chain(2, draft_spread), torch.Generator().manual_seed(3)
    return p_value(counted(three_tokens(target, draft, k, sampling.choice(8), rng, accepts, DRAWS)),
                   continuations(lambda *new: target.logits(*[0, 1, *new][-2:]), sampling))


@pytest.mark.parametrize("draft_spread", [0.3, 1.5, 6.0], ids=["vague", "disagrees", "disagrees strongly"])
@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("k", [1, 3])
def test_samples_follow_the_model_whatever_the_draft(sampling, draft_spread, k):
    assert chain_p_value(sampling, draft_spread, accept, k) > 0.001


def always(logits, drafted, *rest):
    return accept(logits, drafted, *rest[:3], torch.zeros_like(rest[3]), rest[4])


def from_the_model_not_the_rest(logits, drafted, choice, probs, ids, uniform, noise):
    """Refused tokens replaced by a draw from p instead of from max(0, p - q)."""
    n = accept(logits, drafted, choice, probs, ids, uniform, noise)[:1]
    scaled, at = speculate.shortlist(logits, choice)
    last = at[n].gather(1, (scaled[n] - noise.log()).argmax(-1, keepdim=True))[0]
    return torch.cat((n, torch.where(torch.arange(len(drafted) + 1) < n, torch.cat((drafted, last)), last)))


@pytest.mark.parametrize("broken", [always, from_the_model_not_the_rest])
@pytest.mark.parametrize("sampling", SETTINGS[:2])
def test_the_test_of_the_distribution_fails_when_the_rule_is_broken(sampling, broken):
    assert chain_p_value(sampling, 1.5, broken) < 1e-6


def random_model(seed, vocab=8, dim=32, **more):
    args = ModelArgs("llama", dim=dim, n_layer=1, n_head=2, n_local_heads=1, head_dim=16, intermediate_size=48,
                     vocab_size=vocab, max_position=64, **more)
    torch.manual_seed(seed)
    model = Transformer(args)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4) if p.ndim > 1 else torch.nn.init.ones_(p)
    return model.requires_grad_(False).eval()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("sampling", [Sampling(1.0, None), Sampling(0.8, 5, 0.9)])
@pytest.mark.parametrize("drafts", ["model", "ngram", "mtp"])
def test_samples_of_the_whole_program(sampling, drafts):
    """Rounds of a Speculator from the same text, against the model's own probabilities."""
    prompt, rng = [1, 2, 3, 1, 2, 3, 1], torch.Generator().manual_seed(5)
    target = random_model(0, has_mtp=drafts == "mtp")
    engine = speculating(target, None, Engine(random_model(1)) if drafts == "model" else drafts, 2)
    speculator = engine.speculator
    list(engine.generate(prompt, 8, sampling))
    with torch.inference_mode():
        probs = exact_probabilities(target, prompt, sampling)
        engine.prefill([prompt[:-1]])
        at_prompt = dict(vars(speculator.drafter))                       # mtp: the hidden states of its last tokens
        counts = rounds_from(prompt, speculator, sampling, rng, DRAWS,
                             lambda: vars(speculator.drafter).update(at_prompt))
    assert p_value(counts, probs) > 0.001


def rounds_from(prompt, speculator, sampling, rng, draws, reset):
    """How often each continuation of three tokens is drawn; `reset` puts all else back to the prompt's end."""
    counts = {}
    for _ in range(draws):
        text = list(prompt)
        reset()
        speculator.drafter.begin(text, True)
        while len(text) < len(prompt) + 3:
            speculator.round(text, 50, sampling.choice(8), rng)
        key = tuple(text[len(prompt):len(prompt) + 3])
        counts[key] = counts.get(key, 0) + 1
    return counts


def exact_probabilities(target, prompt, sampling):
    def logits_after(*more):
        text = torch.tensor([[*prompt, *more]])
        return target(text, torch.arange(text.size(1)))[0, -1]
    return continuations(logits_after, sampling)


# ---- prompt lookup

def drafted(text, k):
    lookup = PromptLookup(torch.device("cpu"))
    lookup.begin(text, False)
    draft = lookup.propose(k, GREEDY, None)
    return draft and draft.tokens[0].tolist()


@pytest.mark.parametrize("text, k, expected", [
    ([1, 2, 3, 4, 5, 9, 1, 2], 3, [3, 4, 5]), ([1, 2, 3, 4], 2, None), ([7, 1, 2, 8, 7, 1, 2, 9, 7, 1, 2], 2, [9, 7]),
    ([5, 1, 2, 3, 8, 6, 1, 2, 4, 8, 5, 1, 2], 1, [3]), ([4, 6, 6, 6], 4, [6, 6, 6, 6]),
    ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]), ([3], 2, None)])
def test_lookup(text, k, expected):
    """The last occurrence of the last four, three or two tokens; a match that reaches the end goes round."""
    assert drafted(text, k) == expected


def test_lookup_sees_what_is_added():
    lookup, text = PromptLookup(torch.device("cpu")), [1, 2, 3]
    lookup.begin(text, False)
    assert lookup.propose(2, GREEDY, None) is None
    text += [8, 1, 2]
    assert lookup.propose(2, GREEDY, None).tokens.tolist() == [[3, 8]]


# ---- the choice of k

def simulated(policy, acceptance, plain, rounds, tokens=2000, seed=0):
    """Seconds of a run, and the k that were chosen, for true costs of rounds and an acceptance by position."""
    rng, seconds, done, chosen = torch.Generator().manual_seed(seed), 0.0, 0, []
    policy.begin_request()
    while done < tokens:
        k = policy.choose(tokens - done, 0)
        accepted = 0
        while accepted < k and torch.rand((), generator=rng) < acceptance(done):
            accepted += 1
        took = (rounds[k] if k else plain) * (1 + 0.05 * torch.randn((), generator=rng).item())
        policy.record(k, accepted, took)
        seconds, done = seconds + took, done + accepted + 1
        chosen.append(k)
    return seconds, chosen


def policy_for(c, v):
    verify = {k: 1.0 + v * k for k in range(1, 9)}
    return KPolicy(1.0, c, verify), {k: t + k * c for k, t in verify.items()}


@pytest.mark.parametrize("a", [0.3, 0.6, 0.8, 0.95])
def test_auto_comes_near_the_best_fixed_k(a):
    policy, rounds = policy_for(0.05, 0.05)
    seconds, chosen = simulated(policy, lambda at: a, 1.0, rounds)
    best = max(predicted_speedup(a, k, 0.05, 1 + 0.05 * k) for k in rounds)
    assert 2000 / seconds > 0.9 * best


@pytest.mark.parametrize("c, v, a", [(1.0, 0.02, 0.95), (0.5, 0.3, 0.9), (0.05, 0.1, 0.0), (0.02, 0.02, 0.02),
                                     (0.3, 0.1, 0.3)])
def test_auto_costs_next_to_nothing_where_drafts_do_not_pay(c, v, a):
    for tokens in (100, 400, 2000):
        policy, rounds = policy_for(c, v)
        seconds, _ = simulated(policy, lambda at: a, 1.0, rounds, tokens)
        assert seconds < 1.03 * tokens


def test_auto_corrects_what_was_measured_wrongly():
    policy, _ = policy_for(0.05, 0.02)
    _, rounds = policy_for(0.6, 0.4)
    assert simulated(policy, lambda at: 0.5, 1.0, rounds)[0] < 1.03 * 2000


@pytest.mark.parametrize("faster", [3.0, 1 / 3])
def test_auto_is_not_misled_by_a_machine_that_changes_its_speed(faster):
    """All was measured when the machine was slower, or faster: the same choice, no loss where drafts do not pay."""
    policy, rounds = policy_for(0.05, 0.05)
    seconds, chosen = simulated(policy, lambda at: 0.7, 1 / faster, {k: t / faster for k, t in rounds.items()})
    assert 2000 / seconds / faster > 0.85 * max(predicted_speedup(0.7, k, 0.05, 1 + 0.05 * k) for k in rounds)
    policy, rounds = policy_for(0.3, 0.1)
    assert simulated(policy, lambda at: 0.3, 1 / faster, {k: t / faster for k,
                                                          t in rounds.items()})[0] < 1.04 * 2000 / faster


def test_auto_follows_the_text():
    """The first half cannot be guessed, the second is guessed at once; and the other way round."""
    for good in (lambda at: at >= 1000, lambda at: at < 1000):
        policy, rounds = policy_for(0.02, 0.05)
        seconds, chosen = simulated(policy, lambda at: 0.9 if good(at) else 0.0, 1.0, rounds)
        assert seconds < 1000 * 1.03 + 1000 / (0.75 * predicted_speedup(0.9, 8, 0.02, 1.4))


def test_a_draft_that_must_read_a_long_prompt_first_is_not_begun_for_a_few_tokens():
    policy, _ = policy_for(0.3, 0.05)
    policy.read_s, policy.accepted, policy.tested = 0.05, 90, 100
    assert policy.choose(10, 1000) == 0 and policy.choose(10, 0) > 0 and policy.choose(1000, 1000) > 0


def test_statistics_are_those_of_the_rounds():
    found = Statistics()
    for k, accepted in ((4, 4), (4, 0), (4, 2), (0, 0), (2, 2)):
        found.add(k, accepted)
    assert found.counts == [1, 0, 2, 0, 1] and found.plain_steps == 1 and found.mean_accepted == 2
    assert found.acceptance == 8 / 10 and found.passes == 5


@pytest.mark.parametrize("k, n", [(1, 1), (1, 2), (2, 1), (8, 1)])
def test_costs_are_measured_within_the_draft_models_cache(tiny_pair, k, n):
    (target, tokenizer), draft = tiny_pair
    engine = speculating(target, tokenizer, copy_of(*draft), k)
    engine.speculator.measures = True
    assert len(tokens(engine, PROMPT, n)) == n and engine.speculator.policy.draft_s > 0


# ---- the command

def run_main(capsys, *argv):
    generate.main(["--device", "cpu", "--num_samples", "2", *map(str, argv)])
    return capsys.readouterr().out


@pytest.mark.parametrize("options", [["--draft_checkpoint_path", ROOT / "checkpoints" / "demo-draft", "--speculate_k",
                                      5],
                                     ["--draft_checkpoint_path", ROOT / "checkpoints" / "demo-draft"],
                                     ["--draft", "ngram", "--speculate_k", "auto"],
                                     ["--draft", "ngram", "--temperature", 0, "--compile"]])
def test_report(capsys, options):
    out = run_main(capsys, "--prompt", "def f(a, b):", "--max_new_tokens", 40, *options)
    for label in ("Acceptance probs: [", "Mean Accepted: ", "Speed-up over plain decoding: ", "Average tokens/sec: ",
                  "Bandwidth achieved: "):
        assert label in out
    if 5 in options:
        probs = json.loads(out.split("Acceptance probs: ")[1].splitlines()[0])
        assert len(probs) == 6 and sum(probs) == pytest.approx(1, abs=1e-3)
        assert "The formula says: " in out


def test_conversation(capsys, monkeypatch):
    lines = iter(["Write the function push.", "Again.", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    common = ["--interactive", "--chat", "--quiet", "--temperature", 0, "--max_new_tokens", 24, "--dtype", "fp32"]
    quick = run_main(capsys, *common, "--draft_checkpoint_path", ROOT / "checkpoints" / "demo-draft", "--speculate_k",
                     3)
    lines = iter(["Write the function push.", "Again.", ""])
    plain = run_main(capsys, *common)
    assert quick == plain and len(quick) > 40


# ---- bad input

@pytest.mark.parametrize("argv, named", [
    (["--draft", "ngram", "--speculate_k", "0"], "--speculate_k 0 must be 1 or more"),
    (["--draft", "ngram", "--speculate_k", "-2"], "--speculate_k -2"),
    (["--draft", "ngram", "--speculate_k", "many"], "'many' is neither a number nor auto"),
    (["--speculate_k", "5"], "needs --draft_checkpoint_path"),
    (["--draft", "ngram", "--speculate_k", "1024"], "--speculate_k 1024 exceeds the model's context of 1024"),
    (["--draft", "ngram", "--batch_size", "2"], "--batch_size 2: speculative decoding takes one sequence"),
    (["--draft", "ngram", "--draft_checkpoint_path", "x"], "give one"),
    (["--draft_checkpoint_path", "/nowhere"], "--draft_checkpoint_path /nowhere")])
def test_bad_input_is_refused_in_a_line(argv, named, refusal):
    assert named in refusal(generate.main, "--device", "cpu", *argv)


def test_a_draft_of_another_tokenizer_is_refused_and_the_difference_named(demo, tiny_pair, tmp_path):
    with pytest.raises(UserError,
                       match="draft_checkpoint_path has another tokenizer than the model: .* 4096 .* 257"):
        speculating(*demo, Engine(*tiny_pair[1]))
    text = (tiny_pair[1][1].folder / "tokenizer.json").read_text()
    swapped = json.loads(text)
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    for file in tiny_pair[1][1].folder.glob("*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(UserError, match=rf"token {vocab['b']} is b'a' in .* and b'b' in "):
        speculating(*tiny_pair[0], Engine(tiny_pair[1][0], Tokenizer.from_dir(tmp_path)))


def test_a_draft_of_a_shorter_context_is_refused(demo):
    draft = load_demo("demo-draft")
    import dataclasses
    draft[0].args = dataclasses.replace(draft[0].args, max_position=64)
    with pytest.raises(UserError,
                       match="prompt of 60 tokens and max_new_tokens 20 exceed the draft's context of 64 positions"):
        next(speculating(*demo, Engine(*draft)).generate([5] * 60, 20))


# ---- a large model that behaves like the demo

def test_the_inflated_model_computes_what_the_demo_does(demo, tmp_path):
    inflate_demo.main(["--out", str(tmp_path), "--layers", "9", "--width", "1024"])
    (inflated, _), ids = load_model(tmp_path, "cpu", FP32), torch.tensor([demo[1].encode(HELDOUT[:1500])])
    logits = []
    with torch.inference_mode():
        for model in (inflated, demo[0]):
            model.setup_caches(1, 1024)
            logits.append(model(ids, torch.arange(ids.size(1)), torch.arange(ids.size(1))))
    assert torch.allclose(*logits, rtol=1e-5, atol=1e-4)
    assert sum(p.numel() for p in inflated.parameters()) > 1.4 * sum(p.numel() for p in demo[0].parameters())


def test_inflating_to_less_is_refused(tmp_path):
    with pytest.raises(UserError, match="layers 3 and width 16384 must be at least"):
        inflate_demo.main(["--out", str(tmp_path), "--layers", "3"])


# ---- several processes, scripts

@pytest.mark.slow
@pytest.mark.parametrize("k", [pytest.param("3", marks=pytest.mark.long), "auto"])
def test_two_ranks_write_what_one_process_writes(capsys, k):
    options = ["--temperature", "0", "--dtype", "fp32", "--max_new_tokens", "40", "--prompt", "def f(a, b):",
               "--device", "cpu", "--num_samples", "1"]
    generate.main(options)
    plain = capsys.readouterr().out
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           ROOT / "generate.py", *options,
                           "--draft_checkpoint_path", ROOT / "checkpoints" / "demo-draft", "--speculate_k", k],
                           capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert plain[plain.index("def f("):plain.index("Time for")] in done.stdout
