"""Rows that share the model's passes: each answer is what it would be alone. References are the Engine's own runs,
which other tests compare with transformers, and eval.py's scores."""
import itertools
import random
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import batching
from batching import Answer, Batcher, QueueFull, Request, StopStrings
from cli import UserError
from conftest import ROOT
from eval import token_logits
from generate import Engine, Sampling, load_model
from rows import block_of
from tokenizer import StreamDecoder

GREEDY = Sampling(temperature=0)
FAMILIES = ["qwen3-tied", "qwen3-tied int8", "qwen3.5", "qwen-v1-ntk", "mistral-window", "qwen3-moe"]  # int8: the cache


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tiny_folder):
    """The same model twice: an engine for a batcher, and one for each request alone."""
    family, _, cache = request.param.partition(" ")
    return [Engine(*load_model(tiny_folder(family), "cpu", torch.float32, int8_kv_cache=bool(cache))) for _ in range(2)]


@pytest.fixture(scope="module")
def tiny_pair(tiny_folder):
    return [Engine(*load_model(tiny_folder("qwen3-tied"), "cpu", torch.float32)) for _ in range(2)]


@pytest.fixture(scope="module")
def demo():
    return Engine(*load_model(ROOT / "checkpoints" / "demo", "cpu", torch.float32))


class Driver:
    """Steps a batcher by hand, and gathers what it makes."""

    def __init__(self, batcher: Batcher):
        self.batcher, self.texts, self.reasons, self.cached, self.scored, self.counts = batcher, {}, {}, {}, {}, {}

    def submit(self, *requests: Request) -> list[int]:
        numbers = self.batcher.submit(requests)
        for number in numbers:
            self.texts[number], self.scored[number], self.counts[number] = "", [], 0
        return numbers

    @torch.inference_mode()
    def tick(self) -> None:
        commands, self.batcher.commands = self.batcher.commands, []
        for output in self.batcher.tick(commands):
            assert output.number not in self.reasons
            self.texts[output.number] += output.text
            self.counts[output.number] += output.tokens
            if output.scored:
                self.scored[output.number].append(output.scored)
            if output.finish_reason:
                self.reasons[output.number] = output.finish_reason
                self.cached[output.number] = output.cached

    def finish(self, *requests: Request) -> list[str]:
        numbers = self.submit(*requests)
        for _ in range(10000):
            if self.reasons.keys() >= {*numbers}:
                return [self.texts[number] for number in numbers]
            self.tick()
        raise AssertionError("no end")


def alone(engine: Engine, request: Request) -> str:
    """What the engine makes of it, without a cache, cut at the first stop string."""
    ids = [row[0] for row in engine.generate(request.prompt, request.max_new_tokens, request.sampling,
                                             seed=request.seed)]
    decoder = StreamDecoder(engine.tokenizer, True, after=request.prompt[-batching.AFTER:])
    text = "".join(map(decoder.push, ids)) + decoder.flush()
    return text[:min((at for stop in request.stop if (at := text.find(stop)) >= 0), default=len(text))]


def random_requests(seed: int, n: int, engine: Engine, sampling: Sampling = GREEDY) -> list[Request]:
    """Some share beginnings; prompts and answers of many lengths."""
    rng = random.Random(seed)
    stems = [[rng.randrange(256) for _ in range(rng.choice([5, 30, 70]))] for _ in range(3)]
    made = []
    for i in range(n):
        prompt = rng.choice(stems)[:rng.randrange(3, 70)] + [rng.randrange(256) for _ in range(rng.randrange(1, 20))]
        made.append(Request(prompt, rng.randrange(1, 25), sampling, seed=i))
    return made


# ---- each answer is its own run's

@pytest.mark.parametrize("max_batch, cache_tokens", [(1, 0), (1, 400), (4, 0), (4, 400), (8, 1000)])
def test_each_equals_its_own_run(pair, max_batch, cache_tokens, monkeypatch):
    monkeypatch.setattr(batching, "SHARED_CHUNK", 8)             # prompts are read between the steps of others
    engine, reference = pair
    requests = random_requests(max_batch, 24, engine)
    driver, rng = Driver(Batcher(engine, max_batch, 128, cache_tokens)), random.Random(1)
    numbers, cancelled = {}, set()
    for request in requests:
        (number,) = driver.submit(request)
        numbers[number] = request
        if rng.random() < 0.2:                                   # and leaves at once, or in the middle
            cancelled.add(number)
        for _ in range(rng.randrange(6)):
            driver.tick()
        for number in cancelled - driver.reasons.keys():
            driver.batcher.cancel(number)
    while any(row.answer for row in driver.batcher.rows) or driver.batcher.waiting or driver.batcher.commands:
        driver.tick()
    assert len(driver.reasons.keys() | cancelled) == len(requests) and "error" not in driver.reasons.values()
    for number, request in numbers.items():
        expected = alone(reference, request)
        if number in driver.reasons:
            assert driver.texts[number] == expected, number
        else:
            assert expected.startswith(driver.texts[number])
    if cache_tokens:
        assert any(driver.cached.values())
    assert not driver.batcher.queued


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5, 20, 0.9), Sampling(1, None), Sampling(1, None, 0.8)])
def test_a_seed_is_the_same_text_beside_any_others(tiny_pair, sampling):
    """The Engine's with that seed, alone and among rows that are greedy or sampled in other ways."""
    engine, reference = tiny_pair
    driver = Driver(Batcher(engine, 4, 128))
    request = Request([5, 6, 7], 20, sampling, seed=11)
    others = [Request([9, 9], 30, GREEDY), Request([8], 25, Sampling(1.3, 5), 3),
              Request([7], 22, Sampling(1, None), 4)]
    expected = alone(reference, request)
    assert driver.finish(request)[0] == driver.finish(*others, request)[-1] == expected
    assert len({alone(reference, Request([5, 6, 7], 20, sampling, seed)) for seed in range(3)}) > 1


def test_choices_of_one_prompt_read_it_once(tiny_pair):
    engine, reference = tiny_pair
    driver = Driver(Batcher(engine, 4, 128))
    requests = [Request(list(range(40)), 10, Sampling(), seed) for seed in range(4)]
    assert driver.finish(*requests) == [alone(reference, request) for request in requests]
    assert [driver.cached[i] for i in range(4)] == [0, 39, 39, 39]


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_an_engine_that_speculates(tiny_folder, tiny_pair, draft):
    """Its text at temperature 0 is the same; a request for log-probabilities in between is answered without drafts."""
    loaded = load_model(tiny_folder("qwen3-tied"), "cpu", torch.float32)
    drafter = Engine(*load_model(tiny_folder("qwen3-tied"), "cpu", torch.float32)) if draft == "model" else draft
    engine, reference = Engine(*loaded, draft=drafter, speculate_k=3), tiny_pair[1]
    driver = Driver(Batcher(engine, 1, 128))
    turn = [1, 2, 3, 1, 2, 3, 1, 2]
    for prompt, logprobs in ((turn, None), (turn + [4, 5], None), (turn, 0), (turn + [1], None), (turn + [1, 2], None)):
        request = Request(prompt, 20, GREEDY, logprobs=logprobs)
        assert driver.finish(request) == [alone(reference, request)]
    assert driver.cached == {0: 0, 1: 8, 2: 0, 3: 0, 4: 9} and len(driver.scored[2]) == driver.counts[2]
    (number,) = driver.submit(Request(turn, 100, GREEDY))
    driver.tick()
    driver.batcher.cancel(number)
    assert driver.finish(Request(turn, 20, GREEDY)) == [alone(reference, Request(turn, 20, GREEDY))]


def test_log_probabilities_are_evals(demo):
    """Of the chosen tokens, the first of which follows the prompt, by eval.py in one pass."""
    tokenizer, model = demo.tokenizer, load_model(ROOT / "checkpoints" / "demo", "cpu", torch.float32)[0]
    requests = [Request(tokenizer.encode(text), 12, sampling, 5, logprobs=3)
                for text, sampling in (("def f(", GREEDY), ("import", Sampling()), ("class A:", Sampling(1, None)))]
    driver = Driver(Batcher(demo, 4, 128))
    driver.finish(*requests)
    for number, request in enumerate(requests):
        scored = driver.scored[number]
        ids = [token.id for token in scored]
        text = request.prompt + ids
        (logits, _), = token_logits(model, text[:-1], ids)
        expected = logits.log_softmax(-1)
        top = expected.topk(3)
        for i, token in enumerate(scored):
            assert token.logprob == pytest.approx(expected[i, token.id].item(), abs=1e-4)
            assert [id for id, _ in token.top] == top.indices[i].tolist()
            assert [value for _, value in token.top] == pytest.approx(top.values[i].tolist(), abs=1e-4)
        assert len(scored) == driver.counts[number]


# ---- stop strings

@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings(text, stop, data):
    """However the text arrives, what is shown is the text before the first stop string, and nothing is shown late
    that could not have become one."""
    stops, shown, end = StopStrings(stop), "", 0
    first = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
    while end < len(text) and not stops.found:
        step = data.draw(st.integers(1, 5))
        shown += stops.push(text[end:end + step])
        end += step
        if not stops.found:
            held = text[:end][len(shown):]
            assert not held or any(s.startswith(held) for s in stop)
    if not stops.found:
        shown += stops.flush()
    assert stops.found == (first is not None)
    assert shown == text[:first] or (stops.found and text[:end].startswith(shown) and len(shown) <= len(text[:end]))
    if stops.found:
        assert shown == text[:min(at for s in stop if (at := text[:end].find(s)) >= 0)]


def test_stop_strings_that_span_tokens(tiny_pair):
    engine, reference = tiny_pair
    request = Request([50, 60, 70], 40, GREEDY)
    whole = alone(reference, request)
    for begin in range(2, 30, 5):
        stop = (whole[begin:begin + 3], "never")
        driver = Driver(Batcher(engine, 1, 128))
        assert driver.finish(Request([50, 60, 70], 40, GREEDY, stop=stop)) == [whole[:whole.find(stop[0])]]
        assert driver.reasons == {0: "stop"}


# ---- rows

@given(st.sets(st.integers(0, 15), min_size=1))
def test_the_smallest_block(indices):
    blocks = [(first, size) for size in (1, 2, 4, 8, 16) for first in range(0, 16, size)]
    fitting = [block for block in blocks if indices <= {*range(block[0], sum(block))}]
    assert block_of(indices) == fitting[0]


def test_steps_take_few_rows(tiny_pair, monkeypatch):
    """As many answers as there are, rounded up to a power of 2, whichever rows they were given."""
    engine = tiny_pair[0]
    driver, sizes = Driver(Batcher(engine, 8, 128)), []
    step = Batcher.step
    monkeypatch.setattr(Batcher, "step", lambda self, ids, *others: sizes.append(len(ids)) or step(self, ids, *others))
    requests = [Request([i, i + 1], 4 if i % 3 else 30, GREEDY) for i in range(8)]
    driver.finish(*requests)
    assert sizes[0] <= 8 and sizes[-20:] == [4] * 20              # three are left, of rows 0, 3 and 6
    sizes.clear()
    driver.finish(requests[0])
    assert sizes == [1] * (driver.counts[8] - 1) or sizes == [1] * driver.counts[8]


CHAT = [[10] * 20, [11] * 15, [12] * 15, [13] * 15]


def turns(reference: Engine, n: int = 4) -> list[Request]:
    """The requests of a chat: each has what went before, with the answers."""
    made, text = [], []
    for user in CHAT[:n]:
        text = text + user
        request = Request(list(text), 10, GREEDY)
        made.append(request)
        text = text + [row[0] for row in reference.generate(request.prompt, 10, GREEDY, stop_ids=frozenset())]
    return made


@pytest.mark.parametrize("max_batch", [1, 2])
def test_the_next_turn_reads_what_is_new(pair, max_batch):
    engine, reference = pair
    requests = turns(reference)
    driver = Driver(Batcher(engine, max_batch, 256))
    for request in requests:
        assert driver.finish(request) == [alone(reference, request)]
    cached = [driver.cached[i] for i in range(4)]
    if engine.model.args.dynamic_ntk:                      # which rotates all keys of longer prompts anew
        assert cached[0] == 0
    else:
        assert cached == [0] + [len(request.prompt) + 9 for request in requests[:-1]]


@pytest.mark.parametrize("cache_tokens, kept", [(0, False), (1000000, True)])
def test_two_chats_in_one_row(pair, cache_tokens, kept):
    """The one that waits is copied, if it may be, and goes on from there."""
    engine, reference = pair
    ours, others = turns(reference, 3), [Request([200 + i] * 30, 5, GREEDY) for i in range(3)]
    driver = Driver(Batcher(engine, 1, 256, cache_tokens))
    for request in itertools.chain.from_iterable(zip(ours, others)):
        assert driver.finish(request) == [alone(reference, request)]
    assert (driver.cached[2] > 0) == kept
    if not engine.model.args.dynamic_ntk:
        assert (driver.cached[4] > 0) == kept


def test_a_dropped_answer_still_begins_at_the_prompts_end(tiny_folder):
    """As where a template leaves out the thoughts of earlier answers: DeltaNets go on from a snapshot."""
    for family in ("qwen3-tied", "qwen3.5"):
        engine, reference = (Engine(*load_model(tiny_folder(family), "cpu", torch.float32)) for _ in range(2))
        driver, prompt = Driver(Batcher(engine, 1, 256)), list(range(50))
        driver.finish(Request(prompt, 40, GREEDY))
        request = Request([*prompt, 200, 201, 202], 10, GREEDY)
        assert driver.finish(request) == [alone(reference, request)]
        assert driver.cached[1] == 50, family


def test_copies_are_dropped_in_the_order_of_their_last_use(tiny_pair):
    engine = tiny_pair[0]
    driver = Driver(Batcher(engine, 1, 128, cache_tokens=100))
    texts = [[i] * 40 for i in range(1, 5)]
    for text in (texts[0], texts[1], texts[2], texts[0], texts[3]):        # two of 40 fit, and 1 was used after 2
        driver.finish(Request(text, 1, GREEDY))
    kept = [kept.tokens[0] for kept in driver.batcher.cache.kept]
    assert kept == [3, 1] and driver.cached[3] == 39
    assert all(len(kept.tokens) == 40 for kept in driver.batcher.cache.kept)


def test_what_deltanets_remember_counts(tiny_folder):
    engine = Engine(*load_model(tiny_folder("qwen3.5"), "cpu", torch.float32))
    driver = Driver(Batcher(engine, 1, 128, cache_tokens=10000))
    driver.finish(Request([1] * 40, 1, GREEDY))
    driver.finish(Request([2] * 40, 1, GREEDY))
    (kept,), cache = driver.batcher.cache.kept, driver.batcher.cache
    states = sum(tensor.nbytes for s in kept.snapshots for state in s.states for tensor in state)
    assert cache.cost(kept) * cache.token_bytes == pytest.approx(40 * cache.token_bytes + states, abs=cache.token_bytes)


# ---- what goes wrong

def test_the_queue_is_bounded(tiny_pair):
    batcher = Batcher(tiny_pair[0], 2, 128, max_queue=3)
    request = Request([1], 5, GREEDY)
    batcher.submit([request] * 4)
    with pytest.raises(QueueFull):
        batcher.submit([request] * 2)
    batcher.submit([request])
    with pytest.raises(QueueFull):
        batcher.submit([request])
    driver = Driver(batcher)
    driver.texts = driver.counts = dict.fromkeys(range(9), 0)
    driver.texts = dict.fromkeys(range(9), "")
    for _ in range(40):
        driver.tick()
    assert len(driver.reasons) == 5 and not batcher.queued


def test_one_answers_error_ends_no_other(tiny_pair, monkeypatch, capfd):
    engine, reference = tiny_pair
    take = Answer.take

    def fail(self, id, logits=None):
        if self.number == 1 and self.tokens == 3:
            raise RuntimeError("broken")
        return take(self, id, logits)
    monkeypatch.setattr(Answer, "take", fail)
    driver, requests = Driver(Batcher(engine, 4, 128)), random_requests(5, 4, engine)
    requests[1] = Request([1, 2, 3], 20, GREEDY)
    texts = driver.finish(*requests)
    assert driver.reasons[1] == "error" and "broken" in capfd.readouterr().err
    for i in (0, 2, 3):
        assert texts[i] == alone(reference, requests[i])


def test_after_an_error_in_the_model_the_next_request_is_answered(pair, monkeypatch, capfd):
    engine, reference = pair
    driver, requests = Driver(Batcher(engine, 2, 128)), random_requests(6, 2, engine)
    driver.submit(Request([1, 2, 3], 20, GREEDY), Request([1, 2, 4], 20, GREEDY))
    driver.tick()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "run_decode", lambda *args: 1 / 0)
        driver.tick()
    assert driver.reasons == {0: "error", 1: "error"} and "ZeroDivisionError" in capfd.readouterr().err
    assert driver.finish(*requests) == [alone(reference, request) for request in requests]


def test_memory_is_checked_at_the_start(tiny_pair):
    with pytest.raises(UserError, match="out of memory: keys and values .*max_batch, max_seq_length, cache_tokens"):
        Batcher(tiny_pair[0], 1, 128, cache_tokens=1 << 40)


def test_the_thread(tiny_pair):
    """`run` waits without work, delivers, and ends when it is told."""
    engine, reference = tiny_pair
    batcher, done, texts = Batcher(engine, 2, 128), threading.Event(), {}

    def deliver(outputs):
        for output in outputs:
            texts[output.number] = texts.get(output.number, "") + output.text
            if output.finish_reason and len(texts) == 3:
                done.set()
    batcher.deliver = deliver
    thread = threading.Thread(target=batcher.run)
    thread.start()
    requests = [Request([i], 5, GREEDY) for i in range(3)]
    batcher.submit(requests)
    assert done.wait(60)
    batcher.close()
    thread.join(60)
    assert not thread.is_alive()
    assert sorted(texts.items())[:2] == list(enumerate(alone(reference, request) for request in requests[:2]))


@pytest.mark.slow
def test_nothing_is_compiled_for_a_request(tiny_folder, tiny_pair):
    """After the warm-up, whatever sizes of the batch, kinds of sampling and lengths there are."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()                                        # what other tests' sizes have taught the compiler
    engine = Engine(*load_model(tiny_folder("qwen3-tied"), "cpu", torch.float32), compile=True)
    batcher, others = Batcher(engine, 2, 128, 200), counters["stats"]["unique_graphs"]
    assert batcher.warm_up() > 0
    before = counters["stats"]["unique_graphs"]
    assert before - others == 4                                  # two sizes, greedy and sampled
    driver = Driver(batcher)
    requests = random_requests(3, 8, engine) + random_requests(4, 8, engine, Sampling(0.7, 20, 0.9))
    requests += [Request([7], 9, Sampling(1, None), 1), Request([8], 9, GREEDY, logprobs=2)]
    random.Random(0).shuffle(requests)
    texts = driver.finish(*requests)
    assert counters["stats"]["unique_graphs"] == before
    assert texts == [alone(tiny_pair[1], request) for request in requests]


