"""The KV cache in int8: as good as one in the model's dtype, and the same whatever the way through the model."""
import math
from pathlib import Path

import pytest
import torch

import eval
import generate
import kernels
import tiny
from config import ModelArgs
from conftest import ROOT
from generate import Engine, cache_bytes
from harness import Scorer
from loading import load_model
from model import Transformer
from sampling import Sampling

GREEDY = Sampling(temperature=0)
DEMO, DRAFT = (ROOT / "checkpoints" / name / "model.pth" for name in ("demo", "demo-draft"))
HELDOUT = ROOT / "tests" / "data" / "heldout.txt"
PROMPTS = [[(7 * i + n) % 256 for i in range(length)] for n, length in enumerate((30, 9, 47))]
FAMILIES = ("llama2", "mistral-window", "qwen2", "qwen3", "qwen2-moe", "qwen3.5", "qwen3-next", "qwen-v1")


def load(path: Path, int8: bool = True, dtype: torch.dtype = torch.float32, **more) -> Transformer:
    return load_model(path, "cpu", dtype, int8_kv_cache=int8, **more)[0]


def tokens(engine: Engine, prompt: list[int], n: int = 32, **more) -> list[int]:
    return [row[0] for row in engine.generate(prompt, n, GREEDY, stop_ids=frozenset(), **more)]


@torch.inference_mode()
def all_logits(model: Transformer, ids: torch.Tensor, chunk: int, fuse: bool = True) -> torch.Tensor:
    model.setup_caches(*ids.shape)
    fused = model.fuse() if fuse else None
    return torch.cat([model(part, torch.arange(at, at + part.size(1)), torch.arange(part.size(1)), fused)
                      for at, part in zip(range(0, ids.size(1), chunk), ids.split(chunk, dim=1))], dim=1)


# ---- as good

@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_close_to_those_of_an_exact_cache(tiny_folder, family):
    """Keys and values are off by 1/254 of the largest in each at most, 1/440 in the mean square: so are the scores and
    what is attended to. Three layers of that, relative to the spread of the logits; by decoding, prefill and the plain
    layers."""
    exact, rounded = (load(tiny_folder(family), int8) for int8 in (False, True))
    ids = torch.randint(256, (2, 60), generator=torch.Generator().manual_seed(1))
    expected = all_logits(exact, ids, 60)
    for chunk, fuse in ((60, True), (1, True), (60, False), (7, False)):
        off = all_logits(rounded, ids, chunk, fuse) - expected
        assert 0 < off.square().mean().sqrt() < 0.02 * expected.std(), (chunk, fuse)


@pytest.mark.parametrize("chunk, characters", [(512, 12_000), (16, 4_000)])
def test_perplexity_of_the_demo_stays_within_a_thousandth(chunk, characters):
    """By prefill and by the kernels that decode."""
    text, scores = HELDOUT.read_text("utf-8")[:characters], []
    for int8 in (False, True):
        model, tokenizer = load_model(DEMO, "cpu", torch.float32, int8_kv_cache=int8)
        scores.append(eval.perplexity(model, tokenizer, text, 1024, chunk=chunk).perplexity)
    assert scores[0] != scores[1] and scores[1] / scores[0] == pytest.approx(1, abs=1e-3)


def test_scores_of_tasks_are_close():
    """The adapter to lm-eval, which makes caches of its own and copies their rows."""
    exact, rounded = load(DEMO, False), load(DEMO)
    requests = [(context, rest) for context in PROMPTS for rest in ([5, 6, 7], [9], [200, 201])]
    expected, found = (Scorer(model).score(requests) for model in (exact, rounded))
    for (a, _), (b, _) in zip(expected, found, strict=True):
        assert a != b and b == pytest.approx(a, rel=0.01)


# ---- half the size

@pytest.mark.parametrize("family", ["qwen3", "qwen3.5"])
def test_memory_is_what_cache_bytes_says(tiny_folder, family):
    for int8 in (False, True):
        model = load(tiny_folder(family), int8, torch.bfloat16)
        model.setup_caches(3, 64)
        caches = [cache for layer in model.full_layers() for cache in layer.attention.caches()]
        per_position = (cache_bytes(model.args, 3, 64, model.kv_dtype) - cache_bytes(model.args, 3, 0, model.kv_dtype))
        assert sum(cache.nbytes for cache in caches) == per_position
        assert len(caches) == (4 if int8 else 2) * len(model.full_layers())


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3.5-0.8B", "Llama-3.2-1B"])
def test_it_is_half_the_size(name):
    args = ModelArgs.from_name(name)
    exact, int8 = (cache_bytes(args, 1, 5000, dtype) - cache_bytes(args, 1, 0, dtype)
                   for dtype in (torch.bfloat16, torch.int8))
    assert int8 / exact == (args.head_dim + 4) / (2 * args.head_dim) < 0.54


def test_the_setting_takes_effect_with_the_next_request():
    model = load(DEMO, False)
    engine = Engine(model)
    expected = tokens(engine, PROMPTS[0], 4)
    for int8 in (True, False):
        model.int8_kv_cache = int8
        tokens(engine, PROMPTS[0], 4, keep_cache=True)
        assert model.layers[0].attention.kv_cache.k_cache.dtype == model.cache_dtype == model.kv_dtype
    assert tokens(engine, PROMPTS[0], 4, keep_cache=True) == expected


# ---- the same, whatever the way

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_equal_the_layers(tiny_folder, family, dtype, tolerance):
    """Relative to the largest logit; a few keys and values fall to the other side of a step. bf16: as in test_model."""
    model = load(tiny_folder(family), dtype=dtype)
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(2))
    for chunk in (40, 5):
        fused, plain = (all_logits(model, ids, chunk, fuse).float() for fuse in (True, False))
        off = (fused - plain).abs().amax(-1).flatten().sort().values
        if model.args.n_expert and dtype == torch.bfloat16:        # rounding may choose another expert for a few
            off = off[:-(len(off) // 3)]
        assert off[-1] < tolerance * plain.abs().max()
    if not kernels.unavailable_reason():
        model.setup_caches(1, 40)
        assert kernels.accepts(model.fuse(), torch.zeros(1, 1, model.args.dim, dtype=dtype))


@pytest.mark.parametrize("family", ["qwen3", "mistral-window", "qwen3.5", "qwen-v1"])
def test_rows_of_a_batch_are_independent(tiny_folder, family):
    engine = Engine(load(tiny_folder(family)))
    alone = [tokens(engine, prompt, 16) for prompt in PROMPTS]
    together = list(zip(*engine.generate(PROMPTS, 16, GREEDY, stop_ids=frozenset())))
    assert [list(row) for row in together] == alone


@pytest.mark.parametrize("family", ["qwen3", "mistral-window", "qwen3.5"])
def test_a_chat_goes_on_as_a_fresh_run_would(tiny_folder, family, monkeypatch):
    monkeypatch.setitem(generate.PREFILL_CHUNK, "cpu", 32)
    engine, prompt = Engine(load(tiny_folder(family))), PROMPTS[2]
    for _ in range(3):
        text = tokens(engine, prompt, 12, keep_cache=True, max_seq_length=256)
        assert text == tokens(Engine(load(tiny_folder(family))), prompt, 12)
        prompt = prompt + text + [50, 51, 52]
        assert engine.reusable(prompt) > len(prompt) - 10


@pytest.mark.parametrize("kind", ["model", "ngram"])
@pytest.mark.parametrize("k", [1, 4, None])
def test_speculation_writes_the_text_of_plain_decoding(kind, k):
    model, tokenizer = load_model(DEMO, "cpu", torch.float32, int8_kv_cache=True)
    prompt = tokenizer.encode(HELDOUT.read_text("utf-8")[5000:5600])
    draft = "ngram" if kind == "ngram" else Engine(load(DRAFT))
    engine = Engine(model, tokenizer, draft=draft, speculate_k=k)
    assert tokens(engine, prompt, 96) == tokens(Engine(load(DEMO)), prompt, 96)
    if kind == "model":
        assert engine.speculator.draft_engine.model.cache_dtype == torch.int8


def test_a_models_own_head_drafts(tmp_path):
    tiny.save(tiny.reference("qwen3.5"), tmp_path)
    tiny.add_mtp_head(tmp_path)
    model = load(tmp_path, mtp=True)
    engine = Engine(model, draft="mtp", speculate_k=3)
    for prompt in PROMPTS:
        assert tokens(engine, prompt, 24) == tokens(Engine(load(tmp_path)), prompt, 24)
    assert model.mtp.layer.attention.kv_cache.k_cache.dtype == torch.int8 and model.fuse_mtp() is not None


@pytest.mark.parametrize("family, fused", [("qwen3", True), ("qwen3", False), ("qwen3.5", True)])
def test_compiled_equals_eager(tiny_folder, family, fused, monkeypatch):
    """The layers as one operator and, as on a GPU, one by one."""
    if not fused:
        monkeypatch.setattr(Transformer, "fuse", lambda self: None)
    model = load(tiny_folder(family))
    expected = [tokens(Engine(model), prompt, 12, max_seq_length=64) for prompt in PROMPTS]
    engine = Engine(model, compile=True)
    assert [tokens(engine, prompt, 12, max_seq_length=64) for prompt in PROMPTS] == expected


def test_without_kernels_pytorch_computes_the_same(tiny_folder, monkeypatch):
    expected = [tokens(Engine(load(tiny_folder("mistral-window"))), prompt, 12) for prompt in PROMPTS]
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert [tokens(Engine(load(tiny_folder("mistral-window"))), prompt, 12) for prompt in PROMPTS] == expected


# ---- the commands

def test_commands_take_it(capsys, tmp_path):
    text = tmp_path / "text"
    text.write_text(HELDOUT.read_text("utf-8")[:2000])
    generate.main(["--kv_cache", "int8", "-n", "8", "--num_samples", "1", "--temp", "0", "--quiet"])
    assert "def quicksort" in capsys.readouterr().out
    perplexities = []
    for flags in ([], ["--kv_cache", "int8"]):
        eval.main(["--perplexity", str(text), "--max_seq_length", "256", "--dtype", "fp32", *flags])
        perplexities.append(float(capsys.readouterr().out.split("perplexity ")[1].split(",")[0]))
    assert perplexities[0] != perplexities[1] and math.isclose(*perplexities, rel_tol=2e-3)


@pytest.mark.parametrize("main", [generate.main, eval.main])
@pytest.mark.parametrize("value", ["int4", "bf16", ""])
def test_other_formats_are_refused(refusal, main, value):
    assert "--kv_cache" in refusal(main, "--kv_cache", value)
