"""Decoding, sampling and the command, on tiny checkpoints."""
import gc
import gzip
import io
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch

import generate
import kernels
import loading
import tiny
from chat import RowPrinter
from cli import UserError
from conftest import ROOT
from convert import convert
from eval import token_logits
from generate import Engine, Sampling, load_model, main, sample
from harness import Scorer
from kernels.memory import HugePages
from tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
LONG = (pytest.mark.slow, pytest.mark.long)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.save(tiny.reference("qwen3-tied"), tmp_path_factory.mktemp("tiny"))
    convert(folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder / "model.pth", "cpu", torch.float32)


@pytest.fixture(scope="module")
def compiled(loaded):
    return Engine(*loaded, compile=True, compile_prefill=True)


def tokens(engine, prompt, n=32, sampling=GREEDY, **more):
    more.setdefault("stop_ids", frozenset())
    return [row[0] for row in engine.generate(prompt, n, sampling, **more)]


# ---- decoding

def test_compiled_equals_eager_and_does_not_recompile(loaded, compiled):
    eager = Engine(*loaded)
    with torch.inference_mode():
        loaded[0].setup_caches(1, 160)
    expected = [tokens(eager, p) for p in PROMPTS]
    assert tokens(compiled, PROMPTS[0]) == expected[0]
    torch._dynamo.utils.counters.clear()
    assert [tokens(compiled, p) for p in PROMPTS] == expected
    assert tokens(compiled, PROMPTS[1], 100)[:32] == expected[1]
    if compiled.fused:                                             # all layers are one operator: a larger cache too
        assert tokens(compiled, PROMPTS[1], max_seq_length=loaded[0].max_seq_length + 40) == expected[1]
    assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0


@pytest.mark.parametrize("sampling", [Sampling(0.8, 20, None), Sampling(1.0, None, 0.9)])
def test_the_same_seed_gives_the_same_text_compiled_or_not(loaded, compiled, sampling):
    eager = Engine(*loaded)
    first = tokens(eager, PROMPTS[0], sampling=sampling, seed=5)
    assert tokens(eager, PROMPTS[0], sampling=sampling, seed=5) == first
    assert tokens(eager, PROMPTS[0], sampling=sampling, seed=6) != first
    if sampling.top_p is None:
        assert tokens(compiled, PROMPTS[0], sampling=sampling, seed=5) == first


def test_rows_of_a_batch_are_independent(loaded):
    engine = Engine(*loaded)
    alone = [tokens(engine, p, 20) for p in PROMPTS]
    together = list(zip(*engine.generate(PROMPTS, 20, GREEDY, stop_ids=frozenset())))
    assert [list(row) for row in together] == alone


@pytest.mark.skipif(bool(kernels.unavailable_reason()), reason="elsewhere the compiler drops roundings to bf16")
@pytest.mark.parametrize("family", [pytest.param("llama3.1", marks=LONG), pytest.param("qwen2-yarn", marks=LONG),
                                    "qwen3", "qwen-v1-ntk"])
def test_in_bf16_too_the_same_seed_gives_the_same_text_compiled_or_not(tiny_folder, family):
    model, tokenizer = load_model(tiny_folder(family), "cpu", torch.bfloat16)
    eager, compiled = Engine(model, tokenizer), Engine(model, tokenizer, compile=True)
    for seed in range(6):
        prompt = [(7 * i + seed) % 256 for i in range(20 + 15 * seed)]
        for sampling in (GREEDY, Sampling(0.8, 200)):
            assert tokens(compiled, prompt, 100, sampling, seed=seed) == tokens(eager, prompt, 100, sampling, seed=seed)


@torch.inference_mode()
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.QWEN_V1])
def test_rows_of_a_ragged_batch_compute_what_each_computes_alone(tiny_folder, family):
    """For Qwen v1 each with its own dynamic NTK: the training length of qwen-v1-ntk is 64."""
    engine = Engine(load_model(tiny_folder(family), "cpu", torch.float32)[0])
    prompts = [[(7 * i + n) % 256 for i in range(n)] for n in (200, 30, 100, 65, 64)]
    alone = []
    for prompt in prompts:
        alone.append(([i for i, in engine.generate(prompt, 12, GREEDY)], engine.prefill([prompt])))
    rows = [list(row) for row in zip(*engine.generate(prompts, 12, GREEDY))]
    assert rows == [tokens for tokens, _ in alone]
    torch.testing.assert_close(engine.prefill(prompts), torch.cat([logits for _, logits in alone]), atol=1e-4,
                               rtol=1e-4)


def test_each_row_stops_at_its_own_stop_id(loaded):
    engine = Engine(*loaded)
    alone = [tokens(engine, p, 20) for p in PROMPTS]
    stop = frozenset([alone[0][5], alone[1][2]])
    rows = [list(row) for row in zip(*engine.generate(PROMPTS, 20, GREEDY, stop_ids=stop))]
    for row, whole in zip(rows, alone):
        end = next((i for i, t in enumerate(whole) if t in stop), len(whole))
        assert row[:end] == whole[:end] and all(t is None for t in row[end:])


def test_stop_id_is_not_part_of_the_text_and_ends_a_single_row(loaded):
    engine = Engine(*loaded)
    whole = tokens(engine, PROMPTS[0], 20)
    end = whole.index(whole[6])
    assert tokens(engine, PROMPTS[0], 20, stop_ids=frozenset([whole[6]])) == whole[:end]


@pytest.mark.parametrize("n", [1, 2])
def test_few_new_tokens(loaded, n):
    assert len(tokens(Engine(*loaded), PROMPTS[0], n)) == n


def test_prefill_in_chunks_equals_one_pass(loaded, monkeypatch):
    engine, prompts = Engine(*loaded), [list(range(100)), list(range(40, 70))]
    expected = list(engine.generate(prompts, 8, GREEDY, stop_ids=frozenset()))
    monkeypatch.setattr(generate, "PREFILL_CHUNK", {"cpu": 16})
    assert list(engine.generate(prompts, 8, GREEDY, stop_ids=frozenset())) == expected


def test_a_kept_cache_gives_what_a_fresh_one_gives(loaded):
    engine, calls = Engine(*loaded), []
    plain = engine.run_forward
    engine.run_forward = lambda idx, *rest: calls.append(idx.size(1)) or plain(idx, *rest)
    first = tokens(engine, PROMPTS[0], 12, max_seq_length=128)
    second = PROMPTS[0] + first + [50, 51, 52]
    kept = tokens(engine, second, 12, keep_cache=True)
    # the last answer's last token, which was never fed, and the three new ones
    assert calls[-1] == 4
    assert kept == tokens(Engine(*loaded), second, 12)
    changed = PROMPTS[0][:4] + [60, 61]
    assert tokens(engine, changed, 12, keep_cache=True) == tokens(Engine(*loaded), changed, 12)


def test_an_answer_broken_off_leaves_a_usable_cache(loaded):
    engine = Engine(*loaded)
    answer = engine.generate(PROMPTS[0], 30, GREEDY, stop_ids=frozenset(), max_seq_length=128)
    part = [next(answer)[0] for _ in range(5)]
    answer.close()
    longer = PROMPTS[0] + part + [7]
    assert tokens(engine, longer, 12, keep_cache=True) == tokens(Engine(*loaded), longer, 12)


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_ctrl_c_during_prefill_or_a_step_leaves_a_usable_cache(loaded, monkeypatch, chunk):
    """Interrupted in a chunk of the prompt (0, 1) or in a step after it: only what was computed counts as cached."""
    monkeypatch.setattr(generate, "PREFILL_CHUNK", {"cpu": 16})
    engine, prompt, calls = Engine(*loaded), list(range(1, 33)), []
    tokens(engine, [7] * 40, 3, max_seq_length=128)
    plain = engine.model.forward

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == chunk + 1:
            raise KeyboardInterrupt
        return plain(*args, **more)
    with monkeypatch.context() as patched:
        patched.setattr(engine.model, "forward", interrupted)
        patched.setattr(engine, "run_forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens(engine, prompt, 5, keep_cache=True)
    longer = prompt + [50, 51]
    assert tokens(engine, longer, 8, keep_cache=True) == tokens(Engine(*loaded), longer, 8)


def interrupt(engine, prompt):
    answer = engine.generate(prompt, 8, GREEDY, keep_cache=True)
    next(answer)
    answer.close()


def refuse(engine, prompt):
    with pytest.raises(UserError):
        tokens(engine, [*prompt, *[1] * 500], 8, keep_cache=True)


BETWEEN = {
    "nothing": lambda engine, prompt: None, "interrupted": interrupt, "refused": refuse,
    "scored": lambda engine, prompt: Scorer(engine.model).score([(prompt, [1, 2, 3])]),
    "read": lambda engine, prompt: list(token_logits(engine.model, prompt, prompt[1:] + [0])),
    "another engine": lambda engine, prompt: tokens(Engine(engine.model), prompt, 4),
    "a batch": lambda engine, prompt: engine.speculator or list(engine.generate([prompt, prompt[:9]], 4, GREEDY)),
    "its draft": lambda engine, prompt: engine.speculator and tokens(engine.speculator.draft_engine, prompt, 4)}


@pytest.mark.parametrize("speculates", [False, True], ids=["plain", "speculates"])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("family", ["qwen3", "qwen-v1-ntk", "qwen3.5"])
def test_a_kept_cache_is_right_whatever_came_between(tiny_folder, family, between, speculates):
    """Prompts that begin alike, on either side of Qwen v1's training length, after which all keys are others."""
    model, other = (load_model(tiny_folder(family), "cpu", torch.float32)[0] for _ in range(2))
    draft = Engine(load_model(tiny_folder(family), "cpu", torch.float32)[0]) if speculates else None
    engine, text = Engine(model, draft=draft, speculate_k=3), [(11 * i) % 256 for i in range(140)]
    for at, length in enumerate((100, 40, 50, 70, 62, 139, 138, 61, 64, 65)):
        prompt = text[:length] + [at]
        assert tokens(engine, prompt, 6, keep_cache=True) == tokens(Engine(other), prompt, 6)
        BETWEEN[between](engine, text[:(60, 90)[at % 2]] + [9 + at])
    if speculates:                       # a draft that is the model itself is always right, if its cache is
        assert engine.speculator.statistics.acceptance == 1


@pytest.mark.slow
@pytest.mark.parametrize("has_kernels", [True, pytest.param(False, marks=pytest.mark.long)])
def test_requests_of_one_kind_share_a_compilation(loaded, monkeypatch, has_kernels):
    """Whatever the temperature, top_k, top_p and lengths. Without the kernels the graph holds the cache: its size, too,
    is a kind."""
    if not has_kernels:
        monkeypatch.setattr(kernels, "available", lambda: False)
    engine, kinds, draw = Engine(*loaded, compile=True), set(), random.Random(0)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(40):
        sampling = Sampling(draw.choice([0, 1.0, 0.1 + draw.random()]), draw.choice([None, 1, 5, 200, 256, 257, 999]),
                            draw.choice([None, 1.0, 0.01 + 0.9 * draw.random()]))
        prompt = [draw.randrange(256) for _ in range(draw.randrange(1, 200))]
        eager = Engine(*loaded)
        n, capacity, seed = draw.randrange(2, 12), draw.choice([0, draw.randrange(220, 512)]), draw.randrange(1 << 40)
        compiled = tokens(engine, prompt, n, sampling, seed=seed, max_seq_length=capacity)
        assert compiled == tokens(eager, prompt, n, sampling, seed=seed, max_seq_length=capacity)
        candidates, cuts, _ = sampling.choice(257)
        kinds.add((candidates, candidates and cuts, 0 if has_kernels else loaded[0].max_seq_length))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(kinds) >= 4


@pytest.mark.parametrize("asked, given", [(1, 256), (256, 256), (257, 512), (300, 512), (512, 512), (520, 520)])
def test_caches_round_up_to_powers_of_2_and_at_most_to_the_context(loaded, monkeypatch, asked, given):
    model = loaded[0]
    for free, expected in ((1 << 40, given), (2 * generate.cache_bytes(model.args, 2, given, model.dtype) - 2, asked)):
        monkeypatch.setattr(generate, "free_memory", lambda device: free)
        model.max_batch_size = 0
        generate.reserve_caches(model, 2, asked)
        assert model.max_seq_length == expected


@pytest.mark.parametrize("compile", [False, True])
def test_a_model_leaves_memory_with_its_engine(folder, compile):
    """At once, not when Python next looks for cycles."""
    model, tokenizer = load_model(folder / "model.pth", "cpu", torch.float32)
    engine, alive = Engine(model, tokenizer, compile), weakref.ref(model)
    next(engine.generate(PROMPTS[0], 9, GREEDY, stop_ids=frozenset()))
    tokens(engine, PROMPTS[0], 4)
    gc.collect()
    gc.disable()
    try:
        del model, engine
        assert alive() is None
    finally:
        gc.enable()


def resources():
    """(bytes in memory, open files)"""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.long
@pytest.mark.parametrize("speculates", [False, True])
def test_memory_and_open_files_stay_as_they_are(folder, speculates):
    """Over 10,000 tokens, every second text dropped in the middle, and 50 loadings. What is allowed: one chunk of huge
    pages, which is shared by models, and two models of 0.6 MB with their caches."""
    def texts(engine, number):
        for i in range(number):
            steps = engine.generate([1 + i, 2, 3], 250, Sampling(0.8, 200), seed=i, stop_ids=frozenset())
            list(itertools.islice(steps, 125 if i % 2 else 250))

    def load():
        return Engine(*load_model(folder / "model.pth", "cpu", torch.float32), draft="ngram" if speculates else None)
    engine = load()
    texts(engine, 10)
    memory, files = resources()
    texts(engine, 54)
    assert resources()[1] == files and resources()[0] < memory + (4 << 20)
    for _ in range(50):
        texts(load(), 1)
    assert resources()[1] == files and resources()[0] < memory + HugePages.CHUNK + (8 << 20)


# ---- sampling

def chi_square_fits(counts, probs):
    expected = probs * counts.sum()
    assert (counts[probs == 0] == 0).all()
    kept = expected > 5
    statistic = ((counts - expected)[kept].square() / expected[kept]).sum().item()
    degrees = int(kept.sum()) - 1
    return statistic < degrees + 4.5 * (2 * degrees) ** 0.5 + 10


@pytest.mark.parametrize("sampling", [Sampling(1.0, None), Sampling(0.7, None), Sampling(1.3, 7),
                                      Sampling(0.9, None, 0.8), Sampling(1.0, 30, 0.5),
                                      Sampling(1.0, 1), Sampling(1.0, None, 1e-6)])
def test_samples_follow_the_distribution(sampling):
    draws, rng = 40_000, torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=rng) * 2
    choice = sampling.choice(50)
    noise = torch.empty(draws, choice.candidates).exponential_(generator=rng)
    counts = sample(logits.expand(draws, -1), choice, noise).flatten().bincount(minlength=50).double()

    order = (logits.double() / sampling.temperature).softmax(-1).sort(descending=True)
    probs = order.values.clone()
    probs[sampling.top_k or 50:] = 0
    probs /= probs.sum()
    held = 0.0
    for i in range(50):                                  # the smallest set that holds top_p, and the first in any case
        if i and held >= (sampling.top_p or 1.0):
            probs[i] = 0
        held += probs[i].item()
    expected = torch.zeros(50, dtype=torch.double).scatter_(0, order.indices, probs / probs.sum())
    assert chi_square_fits(counts, expected)


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6, 1e30, math.inf])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("top_p", [None, 1e-300, 0.5])
def test_extreme_temperatures(temperature, top_k, top_p):
    """Near zero the most probable token, near infinity any of those that top_k and top_p leave."""
    sampling = Sampling(temperature, top_k, top_p)
    logits, choice = torch.tensor([[1.0, 700.0, -50.0, 699.0, 3.0]]), sampling.choice(5)
    noise = torch.rand(2000, 5, generator=torch.Generator().manual_seed(0)).log().neg()
    drawn = set(sample(logits.expand(2000, -1), choice, noise).flatten().tolist())
    left = 1 if temperature < 1 or top_p == 1e-300 else math.ceil((top_k or 5) * (top_p or 1))
    assert drawn == set([1, 3, 4, 0, 2][:left])


def test_temperature_zero_is_argmax_even_between_near_ties():
    logits = torch.tensor([[1.0, 1.0 + 1e-6, 0.5]])
    assert all(sample(logits, GREEDY.choice(3), torch.empty(1, 0)).item() == 1 for _ in range(20))


def test_ids_past_the_tokenizer_are_never_sampled(loaded):
    model, tokenizer = loaded
    assert tokenizer.vocab_size == 257 < model.args.vocab_size
    engine = Engine(model, tokenizer)
    drawn = [i for seed in range(4) for row in engine.generate([PROMPTS[0]] * 8, 40, Sampling(50.0, None), seed=seed,
                                                               stop_ids=frozenset()) for i in row]
    assert max(drawn) < 257 and len(set(drawn)) > 200


# ---- the command

def run_main(capsys, *argv):
    main(list(map(str, argv)))
    return capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--compile"], ["--batch_size", 3], ["--temperature", 0, "--top_k", 0],
                                     ["--top_p", 0.9], ["--prompt", "20", "--ignore_eos"],
                                     ["--compile_prefill"], ["--dtype", "bf16"]])
def test_report(folder, capsys, options):
    out = run_main(capsys, "--checkpoint_path", folder / "model.pth", "--prompt", "hello", "--num_samples", 2,
                   "--max_new_tokens", 12, "--device", "cpu", *options)
    for label in ("Time to load model: ", "Time for inference 1: ", "Time for inference 2: ", " sec total, ",
                  "Bandwidth achieved: ", "Average tokens/sec: ",
                  "Memory used: ", "Time to first token: "):
        assert label in out
    assert ("Compilation time: " in out) == any("compile" in str(o) for o in options)


def test_seed_and_prompt_file(folder, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("héllo 你好 😀")
    common = ["--checkpoint_path", folder / "model.pth", "--num_samples", 1, "--max_new_tokens", 20, "--seed", 3,
              "--device", "cpu"]

    def text(*more):
        return run_main(capsys, *common, *more).split("\n", 1)[1].split("Time for inference")[0]
    assert text("--prompt_file", tmp_path / "prompt.txt") == text("--prompt", "héllo 你好 😀")
    assert text("--prompt", "a")[0] == "a"


PROFILED = ["--num_samples", 1, "--max_new_tokens", 3, "--device", "cpu", "--profile"]


@pytest.mark.parametrize("name, read", [("trace.json", open), ("trace.json.gz", gzip.open)])
def test_profile_is_a_chrome_trace(folder, capsys, tmp_path, name, read):
    run_main(capsys, "--checkpoint_path", folder / "model.pth", *PROFILED, tmp_path / name)
    with read(tmp_path / name) as file:
        trace = json.load(file)
    assert trace["traceEvents"] and trace["traceName"] == name and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("written", [None, "", '{"traceEvents": ['])
def test_a_profile_that_cannot_be_written_says_so(folder, refusal, tmp_path, monkeypatch, written):
    """PyTorch itself only logs it."""
    (tmp_path / "trace.json").write_text("old")
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace",
                        lambda self, path: written is None or Path(path).write_text(written))
    told = refusal(main, "--model", folder, *PROFILED, tmp_path / "trace.json", "--quiet")
    assert f"--profile {tmp_path}/trace.json: the trace cannot be written" in told
    assert (tmp_path / "trace.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def chat_folder(tmp_path):
    folder = tiny.save(tiny.reference("qwen2"), tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}[assistant]{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_conversation(tmp_path, capsys, monkeypatch):
    folder = chat_folder(tmp_path)
    lines = iter(["hello", "more", "/reset", "x" * 600, "again", ""])
    prompts, plain = [], Engine.generate

    def spy(self, rows, *rest, **more):
        prompts.append(self_tokenizer.decode(rows[0]))
        return plain(self, rows, *rest, **more)
    self_tokenizer = Tokenizer.from_dir(folder)
    monkeypatch.setattr(Engine, "generate", spy)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    out = run_main(capsys, "--checkpoint_path", folder / "model.pth", "--interactive", "--chat", "--system", "be",
                   "--max_new_tokens", 8, "--seed", 1,
                   "--dtype", "fp32", "--device", "cpu")
    assert len(prompts) == 3
    assert prompts[0] == "[system]be[user]hello[assistant]"
    assert prompts[1].startswith("[system]be[user]hello[assistant]") and prompts[1].endswith("[user]more[assistant]")
    assert prompts[2] == "[system]be[user]again[assistant]"
    assert "/reset begins a new conversation" in out     # the long message was answered so


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path, capsys, monkeypatch):
    folder = chat_folder(tmp_path)
    lines, asked = iter(["one", "two", ""]), []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(1) or next(lines))
    plain = Engine.step

    def interrupted(self, *args):
        if len(asked) == 1:
            raise KeyboardInterrupt
        return plain(self, *args)
    monkeypatch.setattr(Engine, "step", interrupted)
    run_main(capsys, "--checkpoint_path", folder / "model.pth", "--interactive", "--chat", "--max_new_tokens", 8,
             "--device", "cpu", "--dtype", "fp32")
    assert len(asked) == 3


def test_spellings(folder, capsys):
    """Short flags, hyphens and aliases are the flags they stand for."""
    common = ["--model", folder, "--device", "cpu", "--num-samples=1", "--seed", 3]
    short = run_main(capsys, *common, "-p", "a", "-n", 12, "--temp", 0.5, "--quiet")
    assert short == run_main(capsys, "--checkpoint_path", folder / "model.pth", "--device", "cpu", "--num_samples", 1,
                             "--seed", 3, "--prompt", "a", "--max_new_tokens", 12, "--temperature", 0.5, "--quiet")


@pytest.mark.parametrize("flag, says", [("--version", "qwen-fast 0."), ("--help", "(default: 200)")])
def test_version_and_help(capsys, flag, says):
    with pytest.raises(SystemExit) as ended:
        main([flag])
    assert ended.value.code == 0 and says in capsys.readouterr().out


def test_list_models(capsys):
    lines = run_main(capsys, "--list-models").splitlines()
    assert "parameters" in lines[0]
    assert any(line.split() == ["Qwen3-8B", "qwen3", "8.19", "B", "16.4", "GB", "40960"] for line in lines)


def test_prompt_from_stdin_and_nothing_but_text(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("héllo"))
    out = run_main(capsys, "--model", folder, "-p", "-", "-n", 8, "--num_samples", 1, "--device", "cpu", "--quiet",
                   "--seed", 1)
    assert out == run_main(capsys, "--model", folder, "-p", "héllo", "-n", 8, "--num_samples", 1, "--device", "cpu",
                           "--quiet", "--seed", 1)
    assert out.startswith("héllo") and "tokens/sec" not in out


def test_a_synthetic_prompt_is_announced(folder, capsys):
    out = run_main(capsys, "--model", folder, "-p", "20", "-n", 2, "--num_samples", 1, "--device", "cpu")
    assert "Synthetic prompt of 20 tokens" in out


def test_rows_of_a_batch_on_a_terminal(capsys, monkeypatch):
    """Each row's end in a line of its own while it grows, all rows whole at the end."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    printer = RowPrinter(["ab", "ab"])
    printer(0, "c\n")
    printer(1, "d" * 300)
    live = capsys.readouterr().out
    assert "\033[2A\r\033[2Kabc \033[2B" in live and "\033[1A\r\033[2Kddd" in live and "d" * 300 not in live
    printer.close()
    assert capsys.readouterr().out == "abc\n\n---\nab" + "d" * 300 + "\n"


def test_prefill_progress(folder, capsys, monkeypatch):
    monkeypatch.setattr(generate, "PREFILL_CHUNK", {"cpu": 16})
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    main(["--model", str(folder), "-p", "40", "-n", "2", "--num_samples", "1", "--device", "cpu"])
    assert "prefill: 16 of 40 tokens\rprefill: 32 of 40 tokens\r\033[2K" in capsys.readouterr().err


def test_interactive_chats_by_default_and_explains_itself(tmp_path, capsys, monkeypatch):
    folder, prompts = chat_folder(tmp_path), []
    plain = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, rows, *rest, **more: prompts.append(
        self.tokenizer.decode(rows[0])) or plain(self, rows, *rest, **more))
    for flags, expected in (([], "[user]one[assistant]"), (["--no-chat"], "one")):
        lines = iter(["/help", "one", ""])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))  # noqa: B023
        out = run_main(capsys, "--model", folder, "--interactive", "-n", 8, "--device", "cpu", "--ignore_eos", *flags)
        assert prompts[-1] == expected and out.count("/reset  begins a new conversation") == 2 and "tokens/sec)" in out


# ---- bad input

@pytest.mark.parametrize("argv, named", [
    (["--prompt", ""], "--prompt is empty"), (["--max_new_tokens", "0"], "--max_new_tokens 0"),
    (["--max_new_tokens", "-3"], "--max_new_tokens -3"),
    (["--batch_size", "0"], "--batch_size 0"), (["--num_samples", "0"], "--num_samples 0"),
    (["--temperature", "-1"], "--temperature -1"),
    (["--temperature", "nan"], "--temperature nan"), (["--top_p", "0"], "--top_p 0"),
    (["--top_p", "1.5"], "--top_p 1.5"), (["--top_k", "-1"], "--top_k -1"),
    (["--max_seq_length", "-5"], "--max_seq_length -5"), (["--seed", "99999999999999999999"], "--seed 9999"),
    (["--prompt", "9" * 5000], "--prompt 99999999999999999999 asks for"),
    (["--device", "tpu9"], "tpu9"), (["--device", "meta"], "meta"),
    (["--prompt", "500"], "exceed the model's context of 512"),
    (["--prompt", "600"], "--prompt 600 asks for a synthetic prompt"),
    (["--prompt", "0"], "--prompt 0 asks for a synthetic prompt"), (["--prompt", "٣", "--top_k", "-1"], "--top_k -1"),
    (["--system", "x"], "--system needs --chat"), (["--no-thinking"], "--no_thinking needs --chat"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--temp", "x"], "--temperature/--temp: invalid"), (["--max_seq_length", "513"], "--max_seq_length 513"),
    (["--max_seq_length", "20"], "--max_seq_length 20 is less"),
    (["--prompt_file", "/nowhere.txt"], "/nowhere.txt"), (["--chat"], "no chat template"),
    (["--device", "cpu", "--dtype", "fp16"], "fp16"),
    (["--checkpoint_path", "/nowhere/model.pth"], "/nowhere/model.pth")])
def test_bad_input_is_refused_in_a_line(folder, argv, named, refusal):
    assert named in refusal(main, "--checkpoint_path", folder / "model.pth", "--num_samples", "1", "--device", "cpu",
                            *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_huge_synthetic_prompt_is_refused_before_it_is_made(folder, tmp_path, refusal):
    """Whatever context config.json claims."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1 << 31}))
    with mock.patch.object(torch, "randint", lambda *args, **more: pytest.fail("a prompt is made")):
        assert "asks for a synthetic prompt" in refusal(generate.main, "--model", copy, "--device", "cpu", "--prompt",
                                                        2_000_000_000)


def test_cuda_asked_for_and_absent(folder):
    with pytest.raises(UserError, match="device cuda: .*sees no CUDA device"):
        main(["--checkpoint_path", str(folder / "model.pth"), "--device", "cuda"])


def test_damaged_checkpoints(tmp_path):
    folder = tiny.save(tiny.reference("qwen2"), tmp_path)
    load_model(folder / "model.pth")
    whole = (folder / "model.pth").read_bytes()
    for bad in (whole[:len(whole) // 2], whole[:100], b"", b"not a checkpoint" * 100):
        (folder / "model.pth").write_bytes(bad)
        with pytest.raises(UserError, match="model.pth is not a checkpoint"):
            load_model(folder / "model.pth")
    torch.save({"version": 99, "quantization": None, "state_dict": {}}, folder / "model.pth")
    with pytest.raises(UserError, match="version 99"):
        load_model(folder / "model.pth")
    torch.save({"layers": torch.zeros(3)}, folder / "model.pth")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_model(folder / "model.pth")


def test_checkpoint_of_another_shape_or_without_config(tmp_path):
    folder = tiny.save(tiny.reference("qwen2"), tmp_path)
    load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    for change in (dict(hidden_size=128), dict(num_hidden_layers=4, layer_types=None),
                   dict(num_hidden_layers=2, layer_types=None),
                   dict(model_type="qwen3")):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match="does not fit its config.json"):
            load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UserError, match="bert"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json"):
        load_model(folder)


def test_out_of_memory_says_what_was_needed(folder, loaded, monkeypatch):
    for module in (loading, generate):
        monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match="out of memory: the weights of .* take .* GB, and .* GB are free"):
        load_model(folder / "model.pth")
    with pytest.raises(UserError, match="out of memory: keys and values of 7 x 500 positions"):
        next(Engine(*loaded).generate([[1]] * 7, 10, max_seq_length=500))


@pytest.mark.slow
@pytest.mark.long
def test_without_a_compiler_it_says_so_and_runs_eagerly(folder):
    """With a real compiler setting that cannot work, in a fresh process: the kernels' build fails too."""
    done = subprocess.run([sys.executable, ROOT / "generate.py", "--checkpoint_path", folder / "model.pth", "--compile",
                           "--num_samples", "1", "--device", "cpu",
                           "--max_new_tokens", "8"], capture_output=True, text=True,
                          env={"PATH": "/nonexistent", "CXX": "/nonexistent/c++", "HOME": str(folder),
                               "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
                               "TORCH_EXTENSIONS_DIR": str(folder / "extensions")})
    assert done.returncode == 0, done.stderr
    assert "Average tokens/sec" in done.stdout
    assert "--compile: no working C++ compiler" in done.stderr


def test_the_command_exits_with_2_and_one_line(folder):
    done = subprocess.run([sys.executable, ROOT / "generate.py", "--checkpoint_path", "/nowhere/model.pth"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --checkpoint_path /nowhere/model.pth")


def test_what_only_compile_needs_is_not_imported_without_it():
    """The compiler takes a second to import, transformers and what the other commands need take seconds."""
    program = """
import runpy, sys
sys.argv = ["generate.py", "--max_new_tokens", "4", "--num_samples", "1", "--quiet"]
runpy.run_path("generate.py", run_name="__main__")
print(*sorted({"torch._dynamo", "torch._inductor", "transformers", "lm_eval", "huggingface_hub"} & {*sys.modules}))
"""
    loading.resolve_checkpoint(loading.DEMO, download=True)              # converting, the first time, imports it
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_default_dtype_never_picks_fp16_on_a_cpu(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loading.kernels, "cpu_has_bf16", lambda: has)
        assert loading.default_dtype(cpu) == expected
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert loading.default_dtype(cuda) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("qwen2-moe", marks=pytest.mark.long), "qwen3-moe-sparse"])
@pytest.mark.parametrize("with_kernels", [True, pytest.param(False, marks=pytest.mark.long)])
def test_experts_compiled(tiny_folder, monkeypatch, family, with_kernels):
    """Steps gather the chosen experts' weights where there are no kernels, and prompts run expert by expert."""
    if not with_kernels:
        monkeypatch.setattr(kernels, "available", lambda: False)
    model, _ = load_model(tiny_folder(family), "cpu", torch.float32)
    eager, compiled = Engine(model), Engine(model, compile=True, compile_prefill=True)
    for prompts in (list(range(40)), PROMPTS):
        assert list(compiled.generate(prompts, 12, GREEDY)) == list(eager.generate(prompts, 12, GREEDY))
