"""Hybrids of attention and Gated DeltaNet: the recurrence against its formulas, and what cannot be cut short as a KV
cache can: chunks, padding, rejected drafts, chats and interruptions."""
import pytest
import torch

import generate
import kernels
import speculate
import tiny
from config import ModelArgs
from deltanet import CHUNK, MAX_PENDING, DeltaState
from generate import Engine
from loading import load_model
from sampling import Sampling
from test_speculate import DRAWS, continuations, p_value, rounds_from

GREEDY = Sampling(temperature=0)
FP32 = torch.float32
LENGTHS = (1, 2, 3, 63, 64, 65, 150)
RNG = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(256, (length,), generator=RNG).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=tiny.HYBRIDS)
def pair(request, tiny_folder):
    """(transformers' model, ours) with the same weights in fp32."""
    return tiny.reference(request.param), load_model(tiny_folder(request.param), "cpu", FP32)[0]


@pytest.fixture
def model(tiny_folder):
    return load_model(tiny_folder("qwen3.5"), "cpu", FP32)[0]


def tokens(engine, prompt, n, sampling=GREEDY, **more):
    return [row[0] for row in engine.generate(prompt, n, sampling, stop_ids=frozenset(), **more)]


def memories(engine):
    """What the DeltaNets remember of all the tokens that the engine has cached."""
    states, end = engine.model.delta_states(), torch.tensor([len(engine.cached)])
    for state in states:
        state.take_up(end)
        assert state.length == end
    return [state.memory.clone() for state in states]


# ---- the recurrence

ARGS = ModelArgs("qwen3_5", 8, 1, 1, 1, 4, 8, 8, 64, delta_layers=(0,), delta_key_heads=2, delta_value_heads=6,
                 delta_key_dim=8, delta_value_dim=4, conv_size=4)


def one_by_one(qkv, g, b, conv):
    """o [S, Hv, V] and M [Hv, K, V] of one row by the definitions, token by token, in fp64."""
    qkv, g, b, conv = (t.double() for t in (qkv, g, b, conv))
    padded, out = torch.cat((torch.zeros(3, qkv.size(1), dtype=torch.float64), qkv)), []
    M = torch.zeros(6, 8, 4, dtype=torch.float64)
    for t in range(len(qkv)):
        x = torch.nn.functional.silu((padded[t:t + 4] * conv.T).sum(0))
        q, k, v = x[:16].view(2, 8), x[16:32].view(2, 8), x[32:].view(6, 4)
        o = torch.empty(6, 4, dtype=torch.float64)
        for h in range(6):
            q_h, k_h = (u[h // 3] / (u[h // 3].square().sum() + 1e-6).sqrt() for u in (q, k))
            M[h] *= g[t, h].exp()
            M[h] += torch.outer(k_h, b[t, h] * (v[h] - M[h].T @ k_h))
            o[h] = M[h].T @ q_h / 8 ** 0.5
        out.append(o)
    return torch.stack(out), M


def random_tokens(B, S, seed=0):
    """Arguments of DeltaState.run without positions; some tokens forget nearly all, some nothing."""
    rng = torch.Generator().manual_seed(seed)
    g = -torch.rand(B, S, 6, generator=rng).pow(8) * 20
    return (torch.randn(B, S, ARGS.delta_channels, generator=rng), g, torch.rand(B, S, 6, generator=rng),
            torch.randn(ARGS.delta_channels, 4, generator=rng))


def state_for(B):
    return DeltaState(ARGS, B, MAX_PENDING, FP32, torch.device("cpu"))


@pytest.mark.parametrize("sizes", [[150], [1] * 150, [2] * 75, [30] * 5, [64, 64, 22], [63, 65, 22], [1, 100, 49],
                                   [17, 16, 15, 102]], ids=str)
def test_any_chunks_equal_the_formulas(sizes):
    (qkv, g, b, conv), state, at, out = random_tokens(2, 150), state_for(2), 0, []
    for size in sizes:
        part = slice(at, at + size)
        out.append(state.run(qkv[:, part], g[:, part], b[:, part], conv, torch.arange(at, at + size).expand(2, -1)))
        at += size
    state.take_up(torch.tensor([150, 150]))
    for row in range(2):
        o, M = one_by_one(qkv[row], g[row], b[row], conv)
        torch.testing.assert_close(torch.cat(out, 1)[row].double(), o, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state.memory[row].double(), M, atol=1e-5, rtol=1e-5)
    assert 150 > 2 * CHUNK


@pytest.mark.parametrize("taken", range(8))
def test_tokens_that_are_taken_back_leave_nothing(taken):
    """A pass over 8 tokens of which `taken` stay, then others in the place of the rest; also over a chunk's end."""
    for begin in (0, 1, 2, 60, 64):
        qkv, g, b, conv = random_tokens(1, begin + 8)
        other, plain, state = random_tokens(1, begin + 8, seed=1), state_for(1), state_for(1)
        pos = torch.arange(begin + 8)[None]
        run = lambda state, t, part: state.run(*(x[:, part] for x in t[:3]), conv, pos[:, part])
        if begin:
            run(plain, (qkv, g, b), slice(0, begin)), run(state, (qkv, g, b), slice(0, begin))
        run(state, (qkv, g, b), slice(begin, begin + 8))
        if taken:
            run(plain, (qkv, g, b), slice(begin, begin + taken))
        part = slice(begin + taken, begin + 8)
        torch.testing.assert_close(run(state, other, part), run(plain, other, part), atol=1e-6, rtol=1e-5)
        for s in (state, plain):
            s.take_up(torch.tensor([begin + 8]))
        torch.testing.assert_close(state.memory, plain.memory, atol=1e-6, rtol=1e-5)


def test_padding_of_any_kind_leaves_nothing():
    """Rows of 3 to 90 tokens in one pass of 90 with random tokens after them, at one position: the states are those of
    each row alone."""
    lengths = torch.tensor([3, 1, 90, 64, 77])
    qkv, g, b, conv = random_tokens(5, 90)
    pos = torch.arange(90).expand(5, -1)
    pos = torch.where(pos < lengths[:, None], pos, lengths[:, None] + 1)
    together = state_for(5)
    together.run(qkv, g, b, conv, pos)
    following = random_tokens(5, 1, seed=1)
    out = together.run(*following[:3], conv, lengths[:, None])
    for row, n in enumerate(lengths.tolist()):
        alone, mine = state_for(1), slice(row, row + 1)
        alone.run(qkv[mine, :n], g[mine, :n], b[mine, :n], conv, torch.arange(n)[None])
        o = alone.run(*(t[mine] for t in following[:3]), conv, torch.tensor([[n]]))
        torch.testing.assert_close(out[mine], o, atol=1e-6, rtol=1e-5)
        for state in (alone, together):
            state.take_up(torch.full((len(state.length),), n + 1))
        torch.testing.assert_close(together.memory[mine], alone.memory, atol=1e-6, rtol=1e-5)


# ---- against transformers

@torch.inference_mode()
def test_64_greedy_tokens_of_prompts_of_any_length(pair):
    """One request after another in one engine, and all of them as a batch."""
    reference, ours = pair
    engine = Engine(ours)
    texts = [tokens(engine, prompt, 64) for prompt in PROMPTS]
    for prompt, text in zip(PROMPTS, texts):
        logits = reference(torch.tensor([prompt + text])).logits[0]
        assert logits[len(prompt) - 1:-1].argmax(-1).tolist() == text
    together = list(engine.generate(PROMPTS, 64, GREEDY, stop_ids=frozenset()))
    assert [list(row) for row in zip(*together)] == texts


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 2, 30, 64, 1024])
def test_prompts_in_chunks_alone_and_as_a_batch(pair, monkeypatch, chunk):
    reference, ours = pair
    monkeypatch.setattr(generate, "PREFILL_CHUNK", {"cpu": chunk})
    engine = Engine(ours)
    engine.reserve(1, 256)
    expected = torch.cat([reference(torch.tensor([prompt])).logits[:, -1:] for prompt in PROMPTS])
    torch.testing.assert_close(torch.cat([engine.prefill([p]) for p in PROMPTS]), expected, atol=1e-4, rtol=1e-4)
    engine.reserve(len(PROMPTS), 256)
    torch.testing.assert_close(engine.prefill(PROMPTS), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_draft_of_any_kind_leaves_the_text_as_it_is(pair):
    _, model = pair
    plain = Engine(model)
    prompts = PROMPTS[2], PROMPTS[5]
    expected = [tokens(plain, prompt, 32) for prompt in prompts]
    for kind in ("ngram", "itself", "noisy"):
        for k in (1, 4, 20, None):
            draft = "ngram" if kind == "ngram" else Engine(copy_of(model, 0.02 if kind == "noisy" else 0))
            engine = Engine(model, draft=draft, speculate_k=k)
            assert [tokens(engine, prompt, 32) for prompt in prompts] == expected
            if kind == "itself" and k:
                assert engine.speculator.statistics.acceptance == 1
            if kind == "noisy" and k == 4:
                assert 0.02 < engine.speculator.statistics.acceptance < 0.98


def copy_of(model, noise=0.0):
    """Another Transformer with weights of its own."""
    rng = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        other = type(model)(model.args)
    other.load_state_dict({name: t + noise * torch.randn(t.shape, generator=rng) if t.dim() > 1 else t.clone()
                           for name, t in model.state_dict().items()}, assign=True)
    return other.eval()


@torch.inference_mode()
def test_a_dense_draft_for_a_hybrid_and_a_hybrid_for_a_dense_model(model, tiny_folder):
    dense = load_model(tiny_folder("qwen3"), "cpu", FP32)[0]
    for target, draft in ((model, dense), (dense, model)):
        engine = Engine(target, draft=Engine(draft), speculate_k=3)
        for prompt in PROMPTS[::2]:
            assert tokens(engine, prompt, 16) == tokens(Engine(copy_of(target)), prompt, 16)


# ---- what drafting leaves behind

@torch.inference_mode()
@pytest.mark.parametrize("k", [1, 4, 9, 20])
def test_rejected_drafts_leave_memory_as_it_was(model, k):
    """Drafts of which some are accepted, some not."""
    prompt = PROMPTS[5]
    speculating, plain = Engine(model, draft=Engine(copy_of(model, 0.03)), speculate_k=k), Engine(copy_of(model))
    for n in (3, 17, 64):
        text = tokens(speculating, prompt, n)
        assert text == tokens(plain, prompt, n)
        after = memories(speculating)
        for at, expected in zip(after, memories(plain)):
            assert expected.abs().max() > 0.01
            torch.testing.assert_close(at, expected, atol=1e-6, rtol=1e-5)
    counts = speculating.speculator.statistics.counts
    assert counts[0] > 1 and sum(counts[1:]) > 1 and len(speculating.cached) == len(prompt) + 63


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("sampling", [Sampling(1.0, None), Sampling(0.8, 5, 0.9)])
@pytest.mark.parametrize("drafts", ["model", "ngram"])
def test_samples_of_the_whole_program(sampling, drafts):
    """As test_speculate has it, with hybrids for model and draft."""
    target, prompt, rng = random_hybrid(0), [1, 2, 3, 1, 2, 3, 1], torch.Generator().manual_seed(5)
    engine = Engine(target, draft=Engine(random_hybrid(1)) if drafts == "model" else "ngram", speculate_k=2)
    speculator = engine.speculator
    assert speculator
    list(engine.generate(prompt, 8, sampling))
    with torch.inference_mode():
        probs = continuations(lambda *more: last_logits(target, [*prompt, *more]), sampling)
        engine.prefill([prompt[:-1]])
        before = target.save()
        counts = rounds_from(prompt, speculator, sampling, rng, DRAWS // 2, lambda: target.restore(before))
    assert p_value(counts, probs) > 0.001


def last_logits(model, text):
    return model(torch.tensor([text]), torch.arange(len(text)))[0, -1]


def random_hybrid(seed):
    args = ModelArgs("qwen3_5_text", dim=32, n_layer=2, n_head=2, n_local_heads=1, head_dim=16, intermediate_size=48,
                     vocab_size=8, max_position=64, delta_layers=(0,), delta_key_heads=1, delta_value_heads=2,
                     delta_key_dim=16, delta_value_dim=16, conv_size=4, rotary_dim=8, output_gate=True,
                     norm_offset=1.0, qk_norm=True)
    torch.manual_seed(seed)
    model = generate.Transformer(args)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.requires_grad_(False).eval()


# ---- chats

THINK, END_THINK, USER, ASSISTANT = [250], [251], [252], [253]


def read_by(model):
    """How many tokens each pass of a model reads, from now on."""
    seen = []
    model.tok_embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    return seen


@torch.inference_mode()
@pytest.mark.parametrize("draft", [None, "ngram", "model"])
@pytest.mark.parametrize("opens", [[], THINK], ids=["thoughts by the answer", "thoughts opened by the prompt"])
def test_a_chat_whose_template_drops_thoughts_reads_what_is_new(model, draft, opens):
    """Five turns of 60 tokens and answers of 30, of which 20 are thoughts that the next prompt leaves out. Besides
    what is new at most the tokens are read again that a state may take back, and the end of the prompt before."""
    drafter = Engine(copy_of(model)) if draft == "model" else draft
    engine, fresh = Engine(model, draft=drafter, speculate_k=3 if draft else None), Engine(copy_of(model))
    seen, history, known = read_by(model), [], 0
    for turn in range(5):
        asked = torch.randint(240, (60,), generator=torch.Generator().manual_seed(turn)).tolist()
        history = history + USER + asked + ASSISTANT
        prompt = history + opens
        seen.clear()
        answer = engine.generate(prompt, 30, GREEDY, stop_ids=frozenset(), keep_cache=True, max_seq_length=512)
        text = [next(answer)[0]]
        assert sum(seen) <= len(history) - known + 4 and (known == 0) == (turn == 0)
        text += [row[0] for row in answer]
        assert text == tokens(fresh, prompt, 30)
        known = len(history)                           # the next prompt has what was answered after the thoughts only
        history = history + text[20:]
    assert len(engine.snapshots) == generate.MAX_SNAPSHOTS


@torch.inference_mode()
def test_an_exact_extension_reads_only_what_is_new(model):
    engine, seen = Engine(model), read_by(model)
    prompt = PROMPTS[5]
    for _ in range(3):
        text = tokens(engine, prompt, 30, keep_cache=True, max_seq_length=400)
        assert text == tokens(Engine(copy_of(model)), prompt, 30)
        prompt = prompt + text + [7, 8, 9]
        seen.clear()
        assert engine.reusable(prompt) == len(prompt) - 4
        next(engine.generate(prompt, 1, GREEDY, keep_cache=True, max_seq_length=400))
        assert sum(seen) == 4


@torch.inference_mode()
def test_a_question_asked_again_goes_on_from_where_they_differ(model):
    """A prompt that differs from one read before in its last tokens, or after it; and one that differs too early."""
    engine, seen = Engine(model), read_by(model)
    prompt = PROMPTS[6]
    tokens(engine, prompt, 40, keep_cache=True, max_seq_length=400)
    for cut, most in ((0, 3), (5, 8), (MAX_PENDING - 1, MAX_PENDING + 2), (60, 93)):
        other = prompt[:len(prompt) - cut] + [1, 2, 3]
        seen.clear()
        assert tokens(engine, other, 5, keep_cache=True) == tokens(Engine(copy_of(model)), other, 5)
        assert sum(seen) <= most + 5
        tokens(engine, prompt, 40, keep_cache=True, max_seq_length=400)


# ---- interruptions

@torch.inference_mode()
@pytest.mark.parametrize("who", ["model", "draft"])
@pytest.mark.parametrize("at", (0, 1, 4, 7))
def test_ctrl_c_amid_a_pass(model, monkeypatch, who, at):
    """In the last layer, after the first has taken up its tokens: what follows is what a fresh run gives."""
    engine = Engine(model, draft=Engine(copy_of(model)), speculate_k=2)
    prompt, calls = PROMPTS[6], []
    first = tokens(engine, prompt, 9, keep_cache=True, max_seq_length=400)
    prompt = prompt + first + PROMPTS[2]
    victim = (engine if who == "model" else engine.speculator.draft_engine).model.layers[2].feed_forward
    plain = victim.forward

    def interrupted(*args):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return plain(*args)
    with monkeypatch.context() as patched:
        patched.setattr(victim, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens(engine, prompt, 40, keep_cache=True, max_seq_length=400)
    for text in (prompt + [50, 51], prompt[:-2] + [3]):
        expected = tokens(Engine(copy_of(model)), text, 12)
        assert tokens(engine, text, 12, keep_cache=True, max_seq_length=400) == expected
    assert engine.speculator.statistics.acceptance == 1            # the draft's memory is right too


# ---- compiled

@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3-next", "qwen3.5", "qwen3.5-moe"])
def test_compiled_equals_eager(tiny_folder, family, monkeypatch):
    """Decoding, the prompt's pass, and verification."""
    monkeypatch.setattr(speculate, "runs_fused", lambda model: False)
    monkeypatch.setattr(kernels, "available", lambda: False)
    model = load_model(tiny_folder(family), "cpu", FP32)[0]
    eager, compiled = Engine(model), Engine(model, compile=True, compile_prefill=True)
    speculating = Engine(model, compile=True, draft="ngram", speculate_k=3)
    for sampling in (GREEDY, Sampling(0.8, 50)):
        for prompt in PROMPTS:
            expected = tokens(eager, prompt, 24, sampling, seed=1, max_seq_length=256)
            assert tokens(compiled, prompt, 24, sampling, seed=1, max_seq_length=256) == expected
            if sampling is GREEDY:
                assert tokens(speculating, prompt, 24, max_seq_length=256) == expected
