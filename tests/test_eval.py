"""Perplexity, comparison and the harness, against transformers and lm-eval's own backend for it."""
import json
import math
import shutil

import pytest
import tiny
import torch
from conftest import ROOT

import cli
import eval as evaluation
from cli import UserError
from eval import Scorer, compare, generate_texts, harness_model, load_tasks, main, perplexity, sampling_from, token_logits, windows
from generate import Generator, Sampling, load_model

TASKS = ROOT / "tests" / "lm_eval_tasks"
HELDOUT = (ROOT / "tests" / "data" / "heldout.txt").read_text("utf-8")
EOS = 256
RANDOM = torch.Generator()


def save(family, folder, **changes):
    """A tiny checkpoint that never generates an id which its tokenizer does not have."""
    model = tiny.reference(family, eos_token_id=EOS, **changes)
    model.lm_head.weight[EOS + 1:] = 0
    return tiny.save(model, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("qwen3-tied", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def reference(folder):
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.inference_mode()
def expected_logprobs(reference, context, continuation, max_length=512):
    """(log-probability, greedy) of a continuation by transformers, alone and without a cache."""
    tokens = (context + continuation)[-(max_length + 1):]
    logits = reference(torch.tensor([tokens[:-1]])).logits[0, -len(continuation):].log_softmax(-1)
    target = torch.tensor(continuation)
    return logits.gather(1, target[:, None]).sum().item(), bool((logits.argmax(-1) == target).all())


def ids(n):
    return torch.randint(0, 256, (n,), generator=RANDOM).tolist()


def mixed_requests(seed):
    """Shared contexts, lone ones, one-token continuations, contexts that are cut on the left."""
    RANDOM.manual_seed(seed)
    requests = []
    for question in range(5):
        context = ids(20 + 17 * question)
        requests += [(context, ids(1 + (question + 3 * choice) % 9)) for choice in range(4)]
    requests += [(ids(30 + 11 * i), ids(40 + 3 * i)) for i in range(4)] + [(ids(1), ids(60)), (ids(7), ids(1)), (ids(1), ids(1))]
    context = ids(540)
    return requests + [(context, ids(3)), (context, ids(5)), (ids(300), ids(511))]


# ---- continuations

@pytest.mark.parametrize("batch_size", [None, 1, 6])
def test_scores_equal_transformers(loaded, reference, batch_size):
    requests = mixed_requests(1)
    scorer, done = Scorer(loaded[0], batch_size), []
    scores = scorer.score(requests, done.append)
    for (logprob, greedy), request in zip(scores, requests, strict=True):
        expected = expected_logprobs(reference, *request)
        assert logprob == pytest.approx(expected[0], abs=1e-4, rel=1e-5) and greedy == expected[1]
    assert sum(done) == len(requests) and scorer.cut == 3


def test_the_greedy_continuation_is_recognised(loaded, reference):
    prompt = ids(30)
    new = [row[0] for row in Generator(*loaded).generate(prompt, 5, Sampling(temperature=0), stop_ids=frozenset())]
    scores = Scorer(loaded[0]).score([(prompt, new), (prompt, new[:1]), (prompt, [*new[:4], (new[4] + 1) % 256])])
    assert [greedy for _, greedy in scores] == [True, True, False]


def test_scores_do_not_depend_on_how_many_logits_fit(loaded, monkeypatch):
    requests = mixed_requests(2)
    whole = Scorer(loaded[0], 8).score(requests)
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 320 * 4 * 8 * 32)
    for a, b in zip(whole, Scorer(loaded[0], 8).score(requests)):
        assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]


def test_a_shared_context_is_read_once(loaded):
    model, scorer = loaded[0], Scorer(loaded[0], 8)
    read = []
    scorer.forward = lambda idx, input_pos, at: read.append(idx.numel()) or model(idx, input_pos, at)
    context = ids(100)
    scorer.score([(context, ids(4)) for _ in range(4)])
    assert read == [100, 4 * 3]


def test_compiled_scores_equal_and_new_lengths_compile_nothing(loaded):
    scorer = Scorer(loaded[0], 8, compile=True)
    first, second = mixed_requests(3)[:27], mixed_requests(4)[4:]
    for n, requests in enumerate((first, second)):
        if n:
            torch._dynamo.utils.counters.clear()
        for a, b in zip(scorer.score(requests), Scorer(loaded[0]).score(requests), strict=True):
            assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
    assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0


# ---- perplexity

@pytest.mark.parametrize("length, window, stride", [(100, 32, 32), (100, 32, 8), (64, 64, 16), (7, 3, 1)])
def test_windows_predict_every_token_once(length, window, stride):
    text = list(range(1, length + 1))
    targets = []
    for tokens, expected in windows(text, 0, window, stride):
        assert len(tokens) <= window and tokens[-len(expected):][1:] == expected[:-1] and tokens[-1] == expected[-1] - 1
        targets += expected
    assert targets == text


def test_windows_are_lm_evals_rolling_windows():
    utils = pytest.importorskip("lm_eval.utils")
    text = list(range(1, 100))
    for stride in (32, 8):
        expected = list(utils.get_rolling_token_windows(text, 0, 32, 32 - stride + 1))
        assert list(windows(text, 0, 32, stride)) == expected


def test_perplexity_equals_transformers(loaded, reference):
    text = HELDOUT[:700]
    score = perplexity(*loaded, text, 128, 64)
    tokens = [EOS, *loaded[1].encode(text)]
    nll, begin = 0.0, 0
    for end in [*range(128, 700, 64), 700]:
        nll -= expected_logprobs(reference, tokens[max(0, end - 128):begin + 1], tokens[begin + 1:end + 1])[0]
        begin = end
    assert score.tokens == score.bytes == 700
    assert score.perplexity == pytest.approx(math.exp(nll / 700), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nll / math.log(2) / 700, rel=1e-6)
    assert perplexity(*loaded, text, 128, 64, chunk=16).nll == pytest.approx(score.nll, rel=1e-5)


@torch.inference_mode()
def test_token_logits_equal_one_pass(loaded, reference):
    tokens = ids(90)
    for last, chunk in ((90, None), (20, 16), (1, 7)):
        logits = torch.cat(list(token_logits(loaded[0], tokens, last, chunk)))
        torch.testing.assert_close(logits, reference(torch.tensor([tokens])).logits[0, -last:], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_compare(loaded, folder, tmp_path, reference):
    other = shutil.copytree(folder, tmp_path / "other")
    checkpoint = torch.load(other / "model.pth", weights_only=True)
    noise = torch.Generator().manual_seed(0)
    state = {name: w + 0.01 * torch.randn(w.shape, generator=noise) for name, w in checkpoint["state_dict"].items()}
    torch.save({**checkpoint, "state_dict": state}, other / "model.pth")
    text = HELDOUT[:300]
    same, changed = compare([folder / "model.pth", other], text, 300, 300, "cpu", torch.float32)
    assert (same.kl, same.agreement) == (0, 1) and same.score.nll == pytest.approx(perplexity(*loaded, text, 300, 300).nll)

    tokens = torch.tensor([[EOS, *loaded[1].encode(text)[:-1]]])
    theirs = load_model(other, "cpu", torch.float32)[0]
    theirs.setup_caches(1, 300)
    p = reference(tokens).logits[0].log_softmax(-1)
    q = theirs(tokens, torch.arange(300), torch.arange(300))[0].log_softmax(-1)
    assert changed.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3) and changed.kl > 0
    assert changed.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item()) and changed.agreement < 1
    assert changed.size == (other / "model.pth").stat().st_size


# ---- generation

def test_texts_end_at_a_stop_string_or_a_stop_id(loaded):
    generator, prompts = Generator(*loaded), [ids(10), ids(25), ids(3)]
    free = generate_texts(generator, loaded[1], prompts, [], 12, Sampling(temperature=0))
    alone = [generate_texts(generator, loaded[1], [p], [], 12, Sampling(temperature=0))[0] for p in prompts]
    assert free == alone
    stop = free[1][3:5]
    stopped = generate_texts(generator, loaded[1], prompts, [stop], 12, Sampling(temperature=0))
    assert stop in stopped[1] and [text.split(stop)[0] for text in stopped] == [text.split(stop)[0] for text in free]


def test_sampling_options():
    assert sampling_from({"do_sample": False, "temperature": 0.0, "num_beams": 1}) == Sampling(temperature=0)
    assert sampling_from({"do_sample": True, "temperature": 0.7, "top_p": 0.9}) == Sampling(0.7, None, 0.9)
    with pytest.raises(UserError, match="num_beams = 4"):
        sampling_from({"do_sample": False, "num_beams": 4})


# ---- the harness, beside lm-eval's own backend

def harness_results(lm, names, shots, limit, **more):
    import lm_eval
    manager, tasks = load_tasks(names, TASKS, include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, num_fewshot=shots, limit=limit, bootstrap_iters=0, **more)


def assert_same_results(ours, theirs, names):
    for name in names:
        answers, expected = ([s["resps"] for s in results["samples"][name]] for results in (ours, theirs))
        metrics, expected_metrics = (results["results"][name] for results in (ours, theirs))
        assert len(answers) == len(expected) > 0
        if name == "heldout_rolling":
            for metric in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
                assert metrics[metric] == pytest.approx(expected_metrics[metric], rel=1e-4)
        elif name == "heldout_choice":
            assert (metrics["acc,none"], metrics["acc_norm,none"]) == (expected_metrics["acc,none"], expected_metrics["acc_norm,none"])
            for a, b in zip(answers, expected):
                assert [c[0][1] for c in a] == [c[0][1] for c in b] and [c[0][0] for c in a] == pytest.approx([c[0][0] for c in b], rel=1e-4)
        else:
            assert answers == expected and metrics["exact_match,none"] == expected_metrics["exact_match,none"]


def both(folder, batch_size=8):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval[hf]")
    ours = harness_model(*load_model(folder, "cpu", torch.float32), batch_size)
    return ours, huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


NAMES = ["heldout_choice", "heldout_rolling", "heldout_line"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3-tied", "llama3.1"])
def test_tiny_checkpoints_score_as_with_lm_evals_backend(family, tmp_path):
    """With 512 positions the two examples do not fit: both cut on the left."""
    ours, theirs = both(save(family, tmp_path))
    for shots in (0, 2):
        assert_same_results(harness_results(ours, NAMES, shots, 6), harness_results(theirs, NAMES, shots, 6), NAMES)
    assert ours.scorer.cut > 0


@pytest.mark.slow
def test_the_demo_scores_as_with_lm_evals_backend(tmp_path):
    demo = ROOT / "checkpoints" / "demo"
    if not (demo / "model.safetensors").exists():
        pytest.skip("the demo's weights are not here")
    ours, theirs = both(shutil.copytree(demo, tmp_path / "demo"), None)
    for options in (dict(shots=0), dict(shots=2), dict(shots=2, apply_chat_template=True),
                    dict(shots=1, apply_chat_template=True, fewshot_as_multiturn=False)):
        names = NAMES if len(options) == 1 else ["heldout_choice", "heldout_line"]
        limit = None if options == dict(shots=0) else 8
        results, expected = (harness_results(lm, names, limit=limit, **options) for lm in (ours, theirs))
        assert_same_results(results, expected, names)
        if options == dict(shots=0):
            assert results["results"]["heldout_choice"]["acc,none"] > 0.4          # chance is 0.25


@pytest.fixture(scope="module")
def with_bos(folder, tmp_path_factory):
    """The same checkpoint with a tokenizer that puts <s> first, and a template that does so too."""
    pytest.importorskip("lm_eval")
    from tokenizers import AddedToken, Tokenizer, processors
    other = shutil.copytree(folder, tmp_path_factory.mktemp("bos") / "bos")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(other / "tokenizer.json"))
    template = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}[assistant] {% endif %}")
    (other / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|endoftext|>", "chat_template": template}))
    return harness_model(*load_model(other, "cpu", torch.float32), 4)


def test_bos_comes_once(with_bos):
    lm, text = with_bos, list(map(lm_ids, "ab"))
    assert lm.prefix_token_id == 257 and lm.eot_token_id == EOS
    assert lm.tok_encode("ab") == [257, *text] and lm.tok_encode("ab", add_special_tokens=False) == text
    chat = lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": "ab"}]))
    assert chat.count(257) == 1 and chat[0] == 257 and chat.count(258) == 1
    from lm_eval.api.instance import Instance
    seen = []
    lm.scorer.score = lambda pairs, progress: seen.extend(pairs) or [(0.0, False)] * len(pairs)
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("abab",), 0)], disable_tqdm=True)
    lm.loglikelihood([Instance("loglikelihood", {}, ("", "ab"), 0)], disable_tqdm=True)
    del lm.scorer.score
    assert seen == [([257], text * 2), ([257], text)]


def lm_ids(character):
    """The byte-level id of a letter of tiny's tokenizer."""
    from tokenizers import pre_tokenizers
    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(character)


def test_a_chat_keeps_its_control_tokens_and_only_those(with_bos):
    lm = with_bos
    messages = [{"role": "user", "content": "<|im_end|> is text <s>"}]
    text, expected = lm.apply_chat_template(messages), lm.tokenizer.render_chat(messages)
    assert lm.tok_encode(text) == expected
    context, continuation = lm._encode_pair(text, "yes")           # the template's last space goes over to the answer
    assert context + continuation == expected + lm.tok_encode("yes", add_special_tokens=False) and context == expected[:-1]
    begun = lm.apply_chat_template([*messages, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert begun.endswith("[assistant]It is")


# ---- the command

def run_command(*arguments):
    main([*map(str, arguments), "--device", "cpu", "--dtype", "fp32"])


def test_command_perplexity(folder, tmp_path, capsys):
    (tmp_path / "text").write_text(HELDOUT[:600])
    run_command("--checkpoint_path", folder, "--perplexity", tmp_path / "text", "--max_seq_length", 256)
    assert " bits per byte, 600 tokens, 600 bytes" in capsys.readouterr().out
    run_command("--perplexity", tmp_path / "text", "--compare", folder, folder / "model.pth", "--max_seq_length", 256)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.split()[-2:] == ["0.00000", "100.00%"] for line in lines[1:])


def test_command_tasks(folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    run_command("--checkpoint_path", folder, "--tasks", "heldout_*", "--include_path", TASKS, "--limit", 3, "--num_fewshot", 2,
                "--output_path", tmp_path / "out")
    captured = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["results"]) == set(NAMES) and 0 <= results["results"]["heldout_choice"]["acc,none"] <= 1
    assert "heldout_rolling" in captured.out and "were cut on the left" in captured.err


@pytest.mark.parametrize("arguments, message", [
    ([], "nothing to do"),
    (["--compare", "a.pth"], "--compare needs a text"),
    (["--perplexity", "/nowhere"], "--perplexity /nowhere"),
    (["--perplexity", "EMPTY"], "empty"),
    (["--perplexity", "SHORT"], "fewer than a window"),
    (["--perplexity", "SHORT", "--max_seq_length", "4", "--stride", "5"], "--stride 5"),
    (["--perplexity", "SHORT", "--stride", "0"], "--stride 0"),
    (["--perplexity", "SHORT", "--max_seq_length", "513"], "--max_seq_length 513"),
    (["--perplexity", "SHORT", "--compare", "/nowhere/model.pth"], "/nowhere/model.pth"),
    (["--tasks", "x", "--batch_size", "0"], "--batch_size 0"),
    (["--tasks", "x", "--batch_size", "many"], "--batch_size many"),
    (["--tasks", "x", "--limit", "-1"], "--limit -1"),
    (["--tasks", "x", "--num_fewshot", "-1"], "--num_fewshot -1"),
    (["--tasks", "x", "--include_path", "/nowhere"], "--include_path /nowhere"),
])
def test_bad_input_is_one_line_and_status_2(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "SHORT").write_text("def f(x):")
    if "--include_path" in arguments:
        pytest.importorskip("lm_eval")
    arguments = [str(tmp_path / a) if a in ("EMPTY", "SHORT") else a for a in arguments]
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda: run_command("--checkpoint_path", folder, *arguments))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_an_unknown_task_and_missing_data_are_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="--tasks no_such_task"):
        load_tasks(["no_such_task"], TASKS, include_defaults=False)
    (tmp_path / "task.yaml").write_text("task: far_away\ndataset_path: someone/something\noutput_type: multiple_choice\ntest_split: test\n"
                                        "doc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\n")

    def unreachable(path, **more):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (LocalEntryNotFoundError)")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="(?s)far_away.*someone/something.*--include_path"):
        load_tasks(["far_away"], tmp_path, include_defaults=False)
