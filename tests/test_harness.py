"""The harness on our models, beside lm-eval's own backend for transformers."""
import json
import os
import random
import shutil
import socket
import subprocess
import sys

import pytest
import torch

import harness
import tiny
from cli import UserError
from conftest import EOS, ROOT, expected_logprobs, save_for_eval
from eval import main as eval_main
from eval import token_logits
from generate import Engine
from harness import QwenFast, Scorer, generate_texts, is_mentioned, load_tasks, sampling_from
from loading import load_model
from quantize import quantize_checkpoint
from sampling import Sampling
from test_model import qwen_v1_by_hand
from test_quantize import dequantized

TASKS = ROOT / "tests" / "lm_eval_tasks"
HELDOUT = (ROOT / "tests" / "data" / "heldout.txt").read_text("utf-8")
METRICS = {"heldout_choice": ["acc", "acc_norm"], "heldout_line": ["exact_match"],
           "heldout_rolling": ["word_perplexity", "byte_perplexity", "bits_per_byte"]}
NAMES, PROMPTED = list(METRICS), ["heldout_choice", "heldout_line"]      # those that examples and a chat matter to
DEMO_LIMIT = 12                              # the first line that the demo gets right is the 11th
RANDOM = torch.Generator()


@pytest.fixture(autouse=True, scope="module")
def no_report_on_the_machine():
    """lm-eval's, which asks pip and git for seconds at the end of every evaluation."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        yield


def ids(n):
    return torch.randint(256, (n,), generator=RANDOM).tolist()


def mixed_requests(seed):
    """Shared contexts, lone ones, one-token continuations, contexts that are truncated on the left."""
    RANDOM.manual_seed(seed)
    requests = []
    for question in range(5):
        context = ids(20 + 17 * question)
        requests += [(context, ids(1 + (question + 3 * choice) % 9)) for choice in range(4)]
    requests += [(ids(30 + 11 * i), ids(40 + 3 * i)) for i in range(4)]
    requests += [(ids(1), ids(60)), (ids(7), ids(1)), (ids(1), ids(1))]
    context = ids(540)
    return requests + [(context, ids(3)), (context, ids(5)), (ids(300), ids(511))]


# ---- continuations

@pytest.mark.parametrize("batch_size", [None, 1, 6])
def test_scores_equal_transformers(eval_model, hf_model, batch_size):
    requests = mixed_requests(1)
    scorer, done = Scorer(eval_model[0], batch_size), []
    scores = scorer.score(requests, done.append)
    for (logprob, greedy), request in zip(scores, requests, strict=True):
        expected = expected_logprobs(hf_model, *request)
        assert logprob == pytest.approx(expected[0], abs=1e-4, rel=1e-5) and greedy == expected[1]
    assert sum(done) == len(requests) and scorer.num_truncated == 3


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.QWEN_V1])
def test_scores_do_not_depend_on_the_batch(tiny_folder, family):
    """Contexts and continuations on either side of Qwen v1's training length, 64 of qwen-v1-ntk."""
    model, _ = load_model(tiny_folder(family), "cpu", torch.float32)
    RANDOM.manual_seed(4)
    contexts = [ids(n) for n in (1, 50, 63, 64, 65, 129)]
    requests = [(context, ids(n)) for context in contexts for n in (1, 2, 16, 70)] + [(ids(540), ids(3))]
    alone = [Scorer(model, 1).score([request])[0][0] for request in requests]
    for batch_size in (1, 3, None):
        scores = [logprob for logprob, _ in Scorer(model, batch_size).score(requests)]
        assert scores == pytest.approx(alone, abs=2e-4, rel=1e-5)
    if family == "qwen-v1-ntk":
        for (context, continuation), score in zip(requests[:-1], alone):
            text = torch.tensor(context + continuation)
            logits = qwen_v1_by_hand(model, text[:-1], len(text) - 1)[-len(continuation):].log_softmax(-1)
            assert logits.gather(1, text[-len(continuation):, None]).sum().item() == pytest.approx(score, abs=2e-3)


@pytest.mark.parametrize("most", [harness.MAX_LOGITS_BYTES, 320 * 4 * 8 * 16], ids=["at once", "in chunks"])
def test_scores_of_a_hybrid_are_those_of_transformers(tiny_folder, monkeypatch, most):
    """Contexts that several continuations share, each from a state of its own, in rows of other lengths."""
    monkeypatch.setattr(harness, "MAX_LOGITS_BYTES", most)
    model, reference = load_model(tiny_folder("qwen3.5"), "cpu", torch.float32)[0], tiny.reference("qwen3.5")
    requests = [(context, ids(n)) for context in (ids(3), ids(70)) for n in (1, 2, 20)]
    requests += [(context[:-1], continuation) for context, continuation in requests[:1]]
    expected = [expected_logprobs(reference, *request)[0] for request in requests]
    assert [score for score, _ in Scorer(model, 8).score(requests)] == pytest.approx(expected, abs=2e-4, rel=1e-5)


def test_the_greedy_continuation_is_recognised(eval_model, hf_model):
    prompt = ids(30)
    new = [row[0] for row in Engine(*eval_model).generate(prompt, 5, Sampling(temperature=0), stop_ids=frozenset())]
    scores = Scorer(eval_model[0]).score([(prompt, new), (prompt, new[:1]), (prompt, [*new[:4], (new[4] + 1) % 256])])
    assert [greedy for _, greedy in scores] == [True, True, False]


def test_scores_do_not_depend_on_how_many_logits_fit(eval_model, monkeypatch):
    requests = mixed_requests(2)
    whole = Scorer(eval_model[0], 8).score(requests)
    monkeypatch.setattr(harness, "MAX_LOGITS_BYTES", 320 * 4 * 8 * 32)
    for a, b in zip(whole, Scorer(eval_model[0], 8).score(requests), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]


def test_nothing_is_certain_and_follows_from_nothing(eval_model, hf_model):
    """An empty continuation, and an empty context, for which the prefix stands."""
    context, continuation = ids(9), ids(3)
    lm = QwenFast(*eval_model)
    requests = [(None, context, []), (None, [], continuation), (None, context, continuation)]
    scores = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = [expected_logprobs(hf_model, c, continuation)[0] for c in ([EOS], context)]
    assert scores[0] == (0.0, True) and [s for s, _ in scores[1:]] == pytest.approx(expected, rel=1e-5)


def test_a_shared_context_is_read_once(eval_model):
    model, scorer = eval_model[0], Scorer(eval_model[0], 8)
    read = []
    scorer.forward = lambda *inputs, fused: read.append(inputs[0].numel()) or model(*inputs, fused=fused)
    context = ids(100)
    scorer.score([(context, ids(4)) for _ in range(4)])
    assert read == [100, 4 * 3]


def test_a_hook_set_between_two_texts_counts(eval_model):
    """The fused layers, in which it would not, are gathered anew for each."""
    model, calls, request = eval_model[0], [], (ids(9), ids(3))
    scorer = Scorer(model)
    for use in (lambda: scorer.score([request]), lambda: list(token_logits(model, *request))):
        use()
        handle = model.layers[1].register_forward_hook(lambda *_: calls.append(None))
        use()
        handle.remove()
    assert len(calls) == 2


# ---- generation

def test_texts_end_at_a_stop_string_or_a_stop_id(eval_model):
    engine, prompts = Engine(*eval_model), [ids(10), ids(25), ids(3)]

    def generate(prompts, *until):
        return generate_texts(engine, eval_model[1], prompts, until, 12, Sampling(temperature=0), None)
    free = generate(prompts)
    assert free == [generate([prompt])[0] for prompt in prompts]
    stop = free[1][3:5]
    stopped = generate(prompts, stop)
    assert stop in stopped[1] and [text.split(stop)[0] for text in stopped] == [text.split(stop)[0] for text in free]


def test_the_seed_decides_what_is_sampled(eval_model):
    from lm_eval.api.instance import Instance
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []}
    requests = [Instance("generate_until", {}, (text, dict(options)), 0) for text in ("ab", "", "c")]
    texts = {seed: QwenFast(*eval_model, 2, seed=seed).generate_until(requests, disable_tqdm=True) for seed in (1, 2)}
    assert texts[1] == QwenFast(*eval_model, 2, seed=1).generate_until(requests, disable_tqdm=True) != texts[2]
    assert len(texts[1]) == 3 and all(texts[1])
    requests[0].args[1]["max_gen_toks"] = 512
    with pytest.raises(UserError, match="max_seq_length 512 .*asks for 512 new tokens"):
        QwenFast(*eval_model).generate_until(requests, disable_tqdm=True)


def test_sampling_options():
    assert sampling_from({"do_sample": False, "temperature": 0.0, "num_beams": 1}) == Sampling(temperature=0)
    assert sampling_from({"do_sample": True, "temperature": 0.7, "top_p": 0.9}) == Sampling(0.7, None, 0.9)
    with pytest.raises(UserError, match="num_beams = 4"):
        sampling_from({"do_sample": False, "num_beams": 4})


# ---- the harness, beside lm-eval's own backend

def harness_results(lm, names, shots, limit, **more):
    import lm_eval
    manager, tasks = load_tasks(names, TASKS, include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, num_fewshot=shots, limit=limit,
                                   bootstrap_iters=0, **more)


def assert_same_metrics(ours, theirs, names):
    for name in names:
        metrics, expected = (results["results"][name] for results in (ours, theirs))
        tolerance = 1e-4 if name == "heldout_rolling" else 0
        for metric in METRICS[name]:
            assert metrics[f"{metric},none"] == pytest.approx(expected[f"{metric},none"], rel=tolerance, abs=0)


def assert_same_results(ours, theirs, names):
    assert_same_metrics(ours, theirs, names)
    for name in names:
        answers, expected = ([s["resps"] for s in results["samples"][name]] for results in (ours, theirs))
        assert len(answers) == len(expected) > 0
        if name == "heldout_line":
            assert answers == expected
        elif name == "heldout_choice":
            for a, b in zip(answers, expected, strict=True):
                assert [choice[0][1] for choice in a] == [choice[0][1] for choice in b]
                assert [choice[0][0] for choice in a] == pytest.approx([choice[0][0] for choice in b], rel=1e-4)


def both(folder, batch_size=8, file=None):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval[hf]")
    ours = load_model(file or folder, "cpu", torch.float32, quantize_activations=False)
    theirs = huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    return QwenFast(*ours, batch_size), theirs


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3-tied", "llama3.1", "qwen2-moe", "qwen3-moe"])
def test_tiny_checkpoints_score_as_with_lm_evals_backend(family, tmp_path):
    """With 512 positions the two examples do not fit: both truncate on the left."""
    ours, theirs = both(save_for_eval(family, tmp_path))
    for shots, names in ((0, NAMES), (2, PROMPTED)):
        assert_same_results(*(harness_results(lm, names, shots, 3) for lm in (ours, theirs)), names)
    assert ours.scorer.num_truncated > 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(ours, theirs, the results of theirs without examples)"""
    folder = ROOT / "checkpoints" / "demo"
    if not (folder / "model.safetensors").exists():
        pytest.skip("the demo's weights are not here")
    ours, theirs = both(shutil.copytree(folder, tmp_path_factory.mktemp("demo") / "demo"), None)
    return ours, theirs, harness_results(theirs, NAMES, 0, DEMO_LIMIT)


@pytest.mark.slow
def test_the_demo_scores_as_with_lm_evals_backend(demo):
    ours, theirs, expected = demo
    results = harness_results(ours, NAMES, 0, DEMO_LIMIT)
    assert_same_results(results, expected, NAMES)
    assert results["results"]["heldout_choice"]["acc,none"] > 0.4          # chance is 0.25
    assert results["results"]["heldout_line"]["exact_match,none"] > 0
    for shots, options in ((2, {}), (1, {"apply_chat_template": True}),
                           (1, {"apply_chat_template": True, "fewshot_as_multiturn": False})):
        assert_same_results(*(harness_results(lm, PROMPTED, shots, 2, **options) for lm in (ours, theirs)), PROMPTED)


def start_ranks(world_size, *argv):
    """A command on several ranks, as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in map(str, range(world_size)):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
        ranks.append(subprocess.Popen([sys.executable, *map(str, argv)], env={**os.environ, **env}, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return ranks


@pytest.mark.slow
def test_two_ranks_score_as_lm_evals_backend(demo, tmp_path):
    ours, _, expected = demo
    ranks = start_ranks(2, ROOT / "eval.py", "--checkpoint_path", ours.tokenizer.folder, "--device", "cpu",
                        "--dtype", "fp32", "--tasks", *NAMES, "--include_path", TASKS, "--limit", DEMO_LIMIT,
                        "--output_path", tmp_path)
    (out, err), second = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], err
    assert second == ("", "") and out.count("exact_match") == 1
    assert_same_metrics(json.loads((tmp_path / "results.json").read_text()), expected, NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_checkpoints_score_as_their_weights_do(mode, tmp_path):
    folder = save_for_eval("qwen3", tmp_path)
    load_model(folder)
    quantize_checkpoint(folder / "model.pth", mode, 32, progress=False)
    file = next(folder.glob(f"model_{mode}*.pth"))
    ours, theirs = both(folder, file=file)
    plain = dequantized(file)
    theirs.model.lm_head.weight.data.copy_(plain.output.weight)
    for layer, own in zip(theirs.model.model.layers, plain.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        modules = [*projections, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        qkv = own.attention.wqkv.weight.split([projection.weight.size(0) for projection in projections])
        weights = [*qkv, own.attention.wo.weight, *own.feed_forward.w13.weight.chunk(2), own.feed_forward.w2.weight]
        for module, weight in zip(modules, weights, strict=True):
            module.weight.data.copy_(weight)
    assert_same_results(*(harness_results(lm, NAMES, 1, 3) for lm in (ours, theirs)), NAMES)


@pytest.mark.slow
def test_compiled_scores_follow_each_rows_own_ntk(tiny_folder):
    model, _ = load_model(tiny_folder("qwen-v1-ntk"), "cpu", torch.float32)
    requests = [(context, ids(n)) for context in (ids(50), ids(60), ids(120)) for n in (3, 9, 16)] + [(ids(9), ids(70))]
    expected = [Scorer(model, 1).score([request])[0][0] for request in requests]
    for batch_size in (3, 4):
        scores = Scorer(model, batch_size, compile=True).score(requests)
        assert [logprob for logprob, _ in scores] == pytest.approx(expected, abs=2e-4, rel=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_compiled_tasks_score_the_same_and_new_lengths_compile_nothing(eval_model):
    eager, compiled = QwenFast(*eval_model, 4), QwenFast(*eval_model, 4, compile=True)
    for shots, limit in ((1, 2), (0, 3)):
        expected = harness_results(eager, NAMES, shots, limit)
        torch._dynamo.utils.counters.clear()
        assert_same_results(harness_results(compiled, NAMES, shots, limit), expected, NAMES)
        assert (torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) > 0) == bool(shots)


def add_bos(folder, template=None):
    """Makes the tokenizer put <s> first."""
    from tokenizers import AddedToken, Tokenizer, processors
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("family", ["llama2", "qwen3"])
def test_rolling_log_likelihoods_are_those_of_lm_evals_backend(family, adds_bos, tmp_path):
    """Of texts shorter and longer than the context of 512, and of none."""
    from lm_eval.api.instance import Instance
    folder = save_for_eval(family, tmp_path)
    if adds_bos:
        add_bos(folder)
    requests = [Instance("loglikelihood_rolling", {}, (HELDOUT[:n],), 0) for n in (0, 1, 7, 511, 512, 513, 1100)]
    ours, theirs = (lm.loglikelihood_rolling(requests, disable_tqdm=True) for lm in both(folder))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.fixture(scope="module")
def with_bos(eval_folder, tmp_path_factory):
    """The same checkpoint with a tokenizer that puts <s> first, and a template that does so too."""
    other = shutil.copytree(eval_folder, tmp_path_factory.mktemp("bos") / "bos")
    template = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}[assistant] {% endif %}")
    add_bos(other, template)
    return QwenFast(*load_model(other, "cpu", torch.float32), 4)


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
    assert seen == [([257], [257, *text * 2]), ([257], text)]            # rolling: as lm-eval's backend has it


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
    assert context + continuation == expected + lm.tok_encode("yes", add_special_tokens=False)
    assert context == expected[:-1]
    begun = lm.apply_chat_template([*messages, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert begun.endswith("[assistant]It is")


# ---- the command

def test_command_tasks(eval_folder, tmp_path, capsys):
    eval_main(["--model", str(eval_folder), "--device", "cpu", "--dtype", "fp32", "--tasks", "heldout_*",
               "--include_path", str(TASKS), "--limit", "3", "--num_fewshot", "2",
               "--output_path", str(tmp_path / "out")])
    captured = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["results"]) == set(NAMES) and 0 <= results["results"]["heldout_choice"]["acc,none"] <= 1
    assert results["config"]["model"] == "QwenFast"
    assert results["config"]["model_args"] == {"checkpoint_path": str(eval_folder)}
    assert "heldout_rolling" in captured.out and "truncated on the left" in captured.err


@pytest.mark.parametrize("name", ["no_such_task", "hellasswag", "no_such_*", "mmlu_[xyz]_no_such", "mmlu?no_such"])
def test_an_unknown_name_is_refused_without_indexing_lm_evals_own_tasks(name, monkeypatch):
    import lm_eval.tasks
    make, made = lm_eval.tasks.TaskManager, []
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: made.append(options) or make(**options))
    with pytest.raises(UserError, match="no such task"):
        load_tasks([name, "heldout_line"], TASKS)
    assert made == [dict(include_path=TASKS, include_defaults=False)]


@pytest.mark.slow
@pytest.mark.long
def test_lm_evals_own_names_are_found_in_its_files():
    from lm_eval.tasks import TaskManager
    manager = TaskManager()
    names = random.Random(0).sample(manager.all_subtasks, 12) + manager.all_groups[::40] + manager.all_tags[::20]
    assert len(names) > 20 and all(map(is_mentioned, [*names, "hella*", "arc_[ce]*", "m?lu"]))


def test_an_unknown_task_and_missing_data_are_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(UserError, match="tasks no_such_task"):
        load_tasks(["no_such_task"], TASKS, include_defaults=False)
    (tmp_path / "task.yaml").write_text(
        "task: far_away\ndataset_path: someone/something\noutput_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\n")

    def unreachable(path, **more):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (LocalEntryNotFoundError)")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="calibration_tasks far_away.*someone/something.*, or give a text"):
        load_tasks(["far_away"], tmp_path, include_defaults=False, field="calibration_tasks", advice=", or give a text")
