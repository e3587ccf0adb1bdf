"""The server, by the official client over real sockets, and what clients do wrong. What batches make of requests is in
test_batching.py."""
import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import openai
import pytest
import torch

import generate
import serve
import tiny
from conftest import ROOT
from convert import convert
from eval import token_logits
from generate import Engine, Sampling, load_model
from protocol import AnswerParser, ChatRequest, CompletionRequest, RequestError, ToolCall, parse, parse_tool_call
from tokenizer import Tokenizer

LONG = (pytest.mark.slow, pytest.mark.long)
DEMO = ROOT / "checkpoints" / "demo"
PROMPTS = ["def quicksort(arr):\n", "import os", "class Node:\n    def", "for i in range(", "# 你好 😀\nx =", "return ",
           "if __name__", "while True:", "x = [", "print(", "from collections", "try:\n    ", "with open(", "a + b ="]
TOOLS = [{"type": "function", "function": {
    "name": "add", "description": "Adds <|im_end|>", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "text": {"type": "string"}}}}}]
# What a model writes that can only go on so: each of these is a token. Two tags are spelt in pieces.
SCRIPT = ["<think>", "\nI need", " the sum.\n", "</think>", "\n\nLook", ": <tool", "!\n", "<tool_call>",
          '\n{"name": "add", ', '"arguments": {"a": 1}}\n', "</tool_call>", "\n<tool_c", "all>\n<function=add>",
          "\n<parameter=a>\n2", "\n</parameter>\n<parameter=text>\n3\n</parameter>\n</function>\n</tool_", "call>"]
TEMPLATE = """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}
{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- if message.tool_calls %}{%- for call in message.tool_calls %}{{- '\\n<tool_call>\\n{"name": "' + call.function.name
+ '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '\\n<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""


def save_scripted(folder: Path) -> Path:
    """A checkpoint whose layers add nothing to the embedding, and whose head knows each token's successor."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    model = tiny.reference("qwen3", max_position_embeddings=1024)
    tiny.add_tokenizer(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in SCRIPT])
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(1)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding.copy_(torch.nn.functional.normalize(torch.randn(embedding.shape, generator=torch.manual_seed(0))))
    head.zero_()
    script = [backend.token_to_id(text) for text in SCRIPT]
    (t,), (newline,) = backend.encode("t").ids, backend.encode("\n").ids
    successors = [(t, script[0]), (newline, script[4]), *zip(script, [*script[1:], backend.token_to_id("<|im_end|>")])]
    for id, successor in successors:
        head[successor] += 10 * embedding[id]
    model.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    convert(folder, progress=False)
    return folder


# ---- servers

class Process:
    """A server on a free port."""

    def __init__(self, *argv, command=(sys.executable, "serve.py")):
        self.process = subprocess.Popen([*command, "--port", "0", "--device", "cpu", *map(str, argv)], cwd=ROOT,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if found := re.search(r"at (http://[^:]+:(\d+)/v1)", line):
                self.url, self.port = found[1], int(found[2])
                break
        else:
            raise AssertionError(self.process.communicate()[1])
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    def post(self, path: str, body: bytes | dict, headers: dict[str, str] | None = None) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, json.loads(content)

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode()

    def metric(self, name: str) -> float:
        return float(re.search(rf"^qwen_fast_{name} (.*)$", self.get("/metrics")[1], re.MULTILINE)[1])

    def wait_until_idle(self) -> None:
        for _ in range(600):
            if not self.metric("requests_running") and not self.metric("requests_waiting"):
                return
            time.sleep(0.1)
        raise AssertionError("rows are not freed")

    def resident(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def stop(self) -> str:
        """What it said on stderr."""
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def demo_server():
    server = Process("--dtype", "fp32", "--max_batch", "8", "--temperature", "0", "--max_queue", "100")
    yield server
    assert "Traceback" not in server.stop() and server.process.returncode == 130


@pytest.fixture(scope="module")
def client(demo_server):
    return demo_server.client


@pytest.fixture(scope="module")
def scripted_folder(tmp_path_factory):
    return save_scripted(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="module")
def scripted_server(scripted_folder):
    """One row, drafts, a key, and one place in the queue."""
    server = Process("--model", scripted_folder, "--draft", "ngram", "--api_key", "secret", "--max_queue", "1",
                     "--max_seq_length", "1000", "--temperature", "0", "--max_body", "100000")
    server.name, server.client = scripted_folder.name, server.client.with_options(api_key="secret")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def demo():
    return Engine(*load_model(DEMO, "cpu", torch.float32))


def alone(engine: Engine, prompt: str, n: int, sampling: Sampling = Sampling(temperature=0), seed: int = 0) -> str:
    ids = engine.tokenizer.encode(prompt)
    return engine.tokenizer.decode([row[0] for row in engine.generate(ids, n, sampling, seed=seed)], skip_special=True)


# ---- completions

def test_completions_of_several_prompts(client, demo):
    answer = client.completions.create(model="demo", prompt=PROMPTS, max_tokens=20)
    assert [choice.text for choice in answer.choices] == [alone(demo, prompt, 20) for prompt in PROMPTS]
    assert [choice.index for choice in answer.choices] == list(range(len(PROMPTS)))
    assert {choice.finish_reason for choice in answer.choices} <= {"length", "stop"}
    lengths = [len(demo.tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert answer.usage.prompt_tokens == sum(lengths)
    assert answer.usage.completion_tokens <= 20 * len(PROMPTS)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_prompt_of_ids(client, demo):
    ids = demo.tokenizer.encode("def f(x):")
    expected = alone(demo, "def f(x):", 16)
    assert client.completions.create(model="demo", prompt=ids).choices[0].text == expected
    assert client.completions.create(model="demo", prompt=[ids, ids]).choices[1].text == expected


def test_streams_say_the_same(client, demo):
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = list(client.completions.create(model="demo", prompt="def f(x):\n", max_tokens=30, stream=True, n=2,
                                                **options))
        texts = ["", ""]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [alone(demo, "def f(x):\n", 30)] * 2
        assert sum(choice.finish_reason is not None for chunk in chunks for choice in chunk.choices) == 2
        assert (chunks[-1].usage is not None) == bool(options) and len({chunk.id for chunk in chunks}) == 1
        if options:
            assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 60
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_seed_and_sampling(client, demo):
    def texts(**more):
        answer = client.completions.create(model="demo", prompt="def ", max_tokens=20, temperature=0.9, **more)
        return [choice.text for choice in answer.choices]
    expected = [alone(demo, "def ", 20, Sampling(0.9), seed) for seed in (7, 8, 9)]
    assert texts(seed=7, n=3) == expected and texts(seed=7) == expected[:1]
    assert texts(seed=7, top_p=0.5, extra_body={"top_k": 3}) == [alone(demo, "def ", 20, Sampling(0.9, 3, 0.5), 7)]
    assert texts(seed=7, extra_body={"top_k": 0}) == [alone(demo, "def ", 20, Sampling(0.9, None), 7)]
    assert len({texts()[0] for _ in range(3)}) > 1


def test_stop_strings(client, demo):
    whole = alone(demo, "def quicksort(arr):\n", 60)
    for begin in range(5, 60, 11):
        stop = whole[begin:begin + 4]
        answer = client.completions.create(model="demo", prompt="def quicksort(arr):\n", max_tokens=60,
                                           stop=[stop, "<<<"])
        assert answer.choices[0].text == whole[:whole.find(stop)] and answer.choices[0].finish_reason == "stop"
        chunks = client.completions.create(model="demo", prompt="def quicksort(arr):\n", max_tokens=60, stop=stop,
                                           stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:whole.find(stop)]


def test_logprobs_are_evals(client, demo):
    """Of a completion and of a chat, whole and streamed."""
    tokenizer, model = demo.tokenizer, load_model(DEMO, "cpu", torch.float32)[0]
    answer = client.completions.create(model="demo", prompt="def f(", max_tokens=10, logprobs=2).choices[0]
    ids, prompt = tokenizer.encode(answer.text), tokenizer.encode("def f(")
    (logits, _), = token_logits(model, (prompt + ids)[:-1], ids)
    expected, told = logits.log_softmax(-1), answer.logprobs
    assert told.tokens == [tokenizer.piece(id).decode() for id in ids] and "".join(told.tokens) == answer.text
    assert told.token_logprobs == pytest.approx([expected[i, id].item() for i, id in enumerate(ids)], abs=1e-4)
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(ids))]
    for i, top in enumerate(told.top_logprobs):
        assert sorted(top.values()) == pytest.approx(sorted(expected[i].topk(2).values.tolist()), abs=1e-4)
    streamed = client.completions.create(model="demo", prompt="def f(", max_tokens=10, logprobs=2, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [p.token_logprobs[0] for p in pieces] == pytest.approx(told.token_logprobs, abs=1e-4)
    assert [p.text_offset[0] for p in pieces] == told.text_offset

    messages = [{"role": "user", "content": "Sort a list"}]
    prompt = tokenizer.render_chat(messages)
    answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=10, logprobs=True,
                                            top_logprobs=3).choices[0]
    told = answer.logprobs.content
    ids = [row[0] for row in demo.generate(prompt, 10, Sampling(temperature=0))]
    (logits, _), = token_logits(model, (prompt + ids)[:-1], ids)
    expected = logits.log_softmax(-1)
    assert b"".join(bytes(token.bytes) for token in told).decode() == answer.message.content
    assert [t.logprob for t in told] == pytest.approx([expected[i, id].item() for i, id in enumerate(ids)], abs=1e-4)
    assert [top.logprob for token in told for top in token.top_logprobs] == pytest.approx(
        [value for row in expected for value in row.topk(3).values.tolist()], abs=1e-4)


# ---- chats

def test_chat_with_the_demos_template(client, demo):
    messages = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": [
        {"type": "text", "text": "Reverse "}, {"type": "text", "text": "a string"}]}]
    expected = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "Reverse a string"}]
    prompt = demo.tokenizer.render_chat(expected)
    text = demo.tokenizer.decode([row[0] for row in demo.generate(prompt, 25, Sampling(temperature=0))])
    answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=25)
    assert answer.choices[0].message.content == text and answer.usage.prompt_tokens == len(prompt)
    chunks = list(client.chat.completions.create(model="demo", messages=messages, max_tokens=25, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_a_chats_next_turn_reads_what_is_new(client):
    messages, cached = [{"role": "system", "content": "You write Python. " * 10}], []
    for turn in range(4):
        messages.append({"role": "user", "content": f"Question {turn}: how?"})
        answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=12)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        cached.append((answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens))
    for (_, before), (reused, _) in zip(cached, cached[1:]):
        assert reused >= before - 2        # where an answer begins, its first characters may make other tokens


def test_thoughts_and_tools(scripted_server):
    """Split as the tags say, streamed and not, with drafts."""
    ask = dict(model=scripted_server.name, messages=[{"role": "user", "content": "1 + 1?"}],
               tools=TOOLS)
    answer = scripted_server.client.chat.completions.create(**ask)
    message = answer.choices[0].message
    assert message.reasoning_content == "I need the sum." and message.content == "Look: <tool!"
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == [
        ("add", {"a": 1}), ("add", {"a": 2, "text": "3"})]
    assert answer.choices[0].finish_reason == "tool_calls" and len({call.id for call in message.tool_calls}) == 2
    assert answer.usage.completion_tokens == len(SCRIPT)

    content = reasoning = ""
    calls = []
    for chunk in scripted_server.client.chat.completions.create(**ask, stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            assert call.index == len(calls)
            calls.append((call.function.name, json.loads(call.function.arguments)))
    assert (content, reasoning) == ("Look: <tool!", "I need the sum.")
    assert calls == [("add", {"a": 1}), ("add", {"a": 2, "text": "3"})]
    assert chunk.choices[0].finish_reason == "tool_calls"

    history = [*ask["messages"], message.model_dump(exclude_none=True),
               {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}]
    again = scripted_server.client.chat.completions.create(**ask | dict(messages=history))
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens
    del ask["tools"]
    plain = scripted_server.client.chat.completions.create(
        **ask, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert plain.choices[0].message.content == "".join(SCRIPT[4:])
    assert plain.choices[0].finish_reason == "stop" and plain.choices[0].message.tool_calls is None
    assert plain.usage.prompt_tokens < answer.usage.prompt_tokens


TEXT = "".join(SCRIPT)


@pytest.mark.parametrize("seed", range(20))
def test_however_an_answer_arrives_it_is_split_alike(seed):
    rng, parser, got, left = random.Random(seed), AnswerParser(tools=TOOLS), [], TEXT
    while left:
        n = rng.randrange(1, 12)
        got += parser.push(left[:n], last=n >= len(left))
        left = left[n:]
    joined = {}
    for kind, value in got:
        joined[kind] = [*joined.get(kind, []), value] if kind == "tool_call" else joined.get(kind, "") + value
    assert joined == {"reasoning_content": "I need the sum.", "content": "Look: <tool!", "tool_call": [
        ToolCall("add", '{"a": 1}'), ToolCall("add", '{"a": 2, "text": "3"}')]}


@pytest.mark.parametrize("text, options, parts", [
    ("a <think> b", {}, [("content", "a <think> b")]),
    (" \n", {}, [("content", " \n")]),
    ("x\n</think>\n\ny", {"thinking": True}, [("reasoning_content", "x"), ("content", "y")]),
    ("never closed \n", {"thinking": True}, [("reasoning_content", "never closed")]),
    ("<tool_call>{broken</tool_call>z", {"tools": TOOLS}, [("content", "<tool_call>{broken</tool_call>"),
                                                           ("content", "z")]),
    ('<tool_call>{"name": 1, "arguments": {}}', {"tools": TOOLS}, [("content",
                                                                    '<tool_call>{"name": 1, "arguments": {}}')]),
    ("<tool_call>x</tool_call>", {}, [("content", "<tool_call>x</tool_call>")])])
def test_parts_of_an_answer(text, options, parts):
    assert list(AnswerParser(**options).push(text, last=True)) == parts


def test_tool_calls_that_are_none():
    for text in ("", "[]", "{}", '{"name": "f", "arguments": 1}', "<function=f>", "{" * 100000):
        assert parse_tool_call(text, TOOLS) is None or text == "<function=f>"


# ---- structured output

def random_schema(rng: random.Random, depth: int = 0) -> dict:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "anyOf", "pattern", "object", "array"]
    kind = rng.choice(kinds if depth < 2 else kinds[:-2])
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 12)}
    if kind == "integer":
        return {"type": "integer", "minimum": -rng.randrange(100), "maximum": rng.randrange(100)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": rng.choice([1, 10, 2.5])}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": rng.sample(["red", "grün", "蓝", 1, 2.5, None, True, "a \"b\""], rng.randrange(1, 5))}
    if kind == "const":
        return {"const": rng.choice(["x", 7, False, [1, 2]])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-c]{2,4}$", "^\\d{3}-\\d{2}$", "^(yes|no)$"])}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 3))]}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": rng.randrange(2), "maxItems": 3}
    return random_object(rng, depth + 1)


def random_object(rng: random.Random, depth: int = 0) -> dict:
    names = rng.sample(["name", "age", "größe", "tags", "a b", "x"], rng.randrange(1, 4))
    return {"type": "object", "properties": {name: random_schema(rng, depth) for name in names},
            "required": names[:rng.randrange(len(names) + 1)], "additionalProperties": False}


@pytest.mark.parametrize("n", [200, pytest.param(1000, marks=LONG)])
def test_every_answer_keeps_to_its_schema(client, n):
    """Whatever the model would rather write: at temperature 1, from 8 clients at a time."""
    rng = random.Random(n)
    schemas = [random_object(rng) for _ in range(n)]

    def ask(i: int) -> tuple[str, str]:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schemas[i], "strict": True}}
        choice = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}], response_format=form,
            max_tokens=150, temperature=1.0, seed=i).choices[0]
        return choice.message.content, choice.finish_reason
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(n)))
    for schema, (text, reason) in zip(schemas, answers):
        assert reason in ("stop", "length")
        if reason == "stop":
            jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
    assert sum(reason == "stop" for _, reason in answers) > 0.9 * n


def test_json_objects(client):
    answer = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x"}], max_tokens=300,
                                            response_format={"type": "json_object"}, temperature=1.0, seed=1)
    assert answer.choices[0].message.content.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    chunks = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x"}], max_tokens=60, stream=True, logprobs=True,
        response_format={"type": "json_schema", "json_schema": {"name": "b", "schema": {"enum": ["only this"]}}})
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == "only this"


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": "object", "properties": 3}, {"$ref": "#/nowhere"},
                                    {"type": "string", "pattern": "("}, {"not": {"type": "string"}, "type": "string"},
                                    {"type": "string", "format": "unheard-of"}, {"enum": []}])
def test_schemas_that_cannot_be_compiled(demo_server, schema):
    status, answer = demo_server.post("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 5,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}})
    assert status == 400 and answer["error"]["param"] == "response_format", answer
    assert "cannot be compiled" in answer["error"]["message"]


# ---- what else is served

def test_models_health_metrics(demo_server, client):
    assert [model.id for model in client.models.list()] == ["demo"] and client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert demo_server.get("/health") == (200, '{"status":"ok"}')
    before = demo_server.metric("new_tokens_total"), demo_server.metric('requests_total{status="200"}')
    client.completions.create(model="demo", prompt="import", max_tokens=9)
    assert demo_server.metric("new_tokens_total") == before[0] + 9
    assert demo_server.metric('requests_total{status="200"}') >= before[1] + 1
    assert demo_server.metric("tokens_per_second") > 0 and demo_server.metric("cached_tokens_total") > 0
    assert demo_server.metric("time_to_first_token_seconds_count") > 0
    assert demo_server.get("/nowhere")[0] == 404 and demo_server.get("/v1/completions")[0] == 405


# ---- load

@pytest.mark.parametrize("seconds", [0, pytest.param(120, marks=LONG)])
def test_64_clients(demo_server, demo, seconds):
    """No answer is lost, mixed up or other than alone. Memory does not grow."""
    prompts = [f"{prompt} {number}" for prompt in PROMPTS for number in range(5)][:64]
    expected = [alone(demo, prompt, 6 + i % 20) for i, prompt in enumerate(prompts)]
    deadline, wrong, done = time.monotonic() + seconds, [], []

    def ask(i: int) -> None:
        rng = random.Random(i)
        while True:
            k = rng.randrange(64)
            status, answer = demo_server.post("/v1/completions", {"prompt": prompts[k], "max_tokens": 6 + k % 20})
            if status != 200 or answer["choices"][0]["text"] != expected[k]:
                wrong.append((k, status, answer))
            done.append(k)
            if time.monotonic() > deadline:
                return
    resident = []
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        asked = [pool.submit(ask, i) for i in range(64)]
        while not all(future.done() for future in asked):
            time.sleep(0.2)
            resident.append(demo_server.resident())
        for future in asked:
            future.result()
    assert not wrong and len(done) >= 64
    demo_server.wait_until_idle()
    if seconds:
        third = len(resident) // 3
        assert max(resident[-third:]) < max(resident[third:2 * third]) + (8 << 20)


KILLED = """
import http.client, os, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
body = '{"prompt": "def f", "max_tokens": 900, "stream": %s, "temperature": 1}' % sys.argv[2]
connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
if sys.argv[2] == "true":
    connection.getresponse().readline()
print("asked", flush=True)
sys.stdin.read()
"""


def test_clients_that_are_killed(demo_server, demo):
    """Their rows become free long before their answers would have ended; others do not notice."""
    clients = [subprocess.Popen([sys.executable, "-c", KILLED, str(demo_server.port), stream], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE) for stream in ("true", "false") * 5]
    for process in clients:
        assert process.stdout.readline() == b"asked\n"
    before = demo_server.metric("new_tokens_total")
    for process in clients:
        process.kill()
        process.communicate()
    demo_server.wait_until_idle()
    assert demo_server.metric("new_tokens_total") - before < 10 * 900 / 2
    status, answer = demo_server.post("/v1/completions", {"prompt": "import os", "max_tokens": 20})
    assert answer["choices"][0]["text"] == alone(demo, "import os", 20)


def test_slow_readers_hold_nothing_up(demo_server, demo):
    """Their answers are made, and wait for them; others get theirs meanwhile."""
    sockets = []
    for _ in range(12):                                     # more than there are rows
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", demo_server.port))
        body = b'{"prompt": "def f", "max_tokens": 300, "stream": true, "logprobs": 20, "temperature": 1}'
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n" % len(body) + body)
        sockets.append(slow)
    status, answer = demo_server.post("/v1/completions", {"prompt": "import os", "max_tokens": 20})
    assert status == 200 and answer["choices"][0]["text"] == alone(demo, "import os", 20)
    demo_server.wait_until_idle()                           # though nothing was read of the slow ones' answers
    slow, text = sockets[0], b""
    slow.settimeout(60)
    while b"[DONE]" not in text:
        text += slow.recv(65536)
    for slow in sockets:
        slow.close()


# ---- what is refused

GOOD = {"/v1/completions": {"prompt": "def", "max_tokens": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}}
WRONG = [None, True, -1, 0.5, 1e300, 10 ** 30, "x", "", [], [[]], {}, {"a": 1}, [None], "\0", [{"role": "user"}]]
KNOWN = {"/v1/completions": CompletionRequest.model_fields, "/v1/chat/completions": ChatRequest.model_fields}


def fuzzed(rng: random.Random) -> tuple[str, bytes]:
    """A body that is wrong, by construction or by the models' own word."""
    path = rng.choice([*GOOD])
    body = json.loads(json.dumps(GOOD[path]))
    text = json.dumps(body).encode()
    kind = rng.randrange(5)
    if kind == 0:                                           # cut short
        return path, text[:rng.randrange(len(text))]
    if kind == 1:                                           # a byte that is no JSON where there was a quote or brace
        at = rng.choice([i for i, byte in enumerate(text) if byte in b'{}[]":'])
        return path, text[:at] + bytes([rng.choice([0, 1, 0xff, 0xc3])]) + text[at + 1:]
    if kind == 2:                                           # deep or endless
        return path, rng.choice([b"[" * 100000, b'{"a":' * 5000, b"9" * 100000, b"", b"\0", b"null", b"[]", b'"x"',
                                 b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"\xff\xfe{}"])
    schema = CompletionRequest if path == "/v1/completions" else ChatRequest
    while True:                                             # a field of another type or range, or an unknown one
        field = rng.choice([*schema.model_fields, "best_offer", "__class__", "messages.0"])
        tried = body | {field: rng.choice(WRONG)}
        try:
            parse(schema, json.dumps(tried).encode())
        except RequestError:
            return path, json.dumps(tried).encode()


def test_500_malformed_bodies(demo_server):
    rng = random.Random(0)
    for _ in range(500):
        path, body = fuzzed(rng)
        status, answer = demo_server.post(path, body)
        assert 400 <= status < 500, (body[:200], answer)
        assert {"message", "type", "param", "code"} == answer["error"].keys() and answer["error"]["message"]
        assert len(answer["error"]["message"]) < 2000


@pytest.mark.parametrize("path, more, status, param, says", [
    ("/v1/completions", {"model": "gpt"}, 404, "model", "does not exist"),
    ("/v1/completions", {"max_tokens": 5000}, 400, "prompt", "exceed the context of"),
    ("/v1/completions", {"prompt": [4095 * 9]}, 400, "prompt", "beyond the vocabulary"),
    ("/v1/completions", {"prompt": ""}, 400, "prompt", "at least 1 character"),
    ("/v1/completions", {"echo": True}, 400, "echo", "should be False"),
    ("/v1/completions", {"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ("/v1/completions", {"stop": ["x"] * 17}, 400, "stop", "at most 16"),
    ("/v1/completions", {"n": 129}, 400, "n", "less than or equal to 128"),
    ("/v1/completions", {"stream_options": {}}, 400, None, "needs stream"),
    ("/v1/completions", {"presence_penalty": 1}, 400, "presence_penalty", "less than or equal to 0"),
    ("/v1/completions", {"min_p": 0.1}, 400, "min_p", "is not a supported field"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages", "at least 1 item"),
    ("/v1/chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role", "should be"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0", "content is missing"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages.0.content.0.type", "should be 'text'"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [
        {"id": "1", "function": {"name": "f", "arguments": "[]"}}]}]}, 400, "messages", "not a JSON object"),
    ("/v1/chat/completions", {"top_logprobs": 2}, 400, None, "needs logprobs"),
    ("/v1/chat/completions", {"tool_choice": "required"}, 400, "tool_choice", "should be 'auto' or 'none'"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 3000}]}, 400, "messages", "exceed")])
def test_requests_that_are_refused(demo_server, path, more, status, param, says):
    got, answer = demo_server.post(path, GOOD[path] | more)
    assert got == status and answer["error"]["param"] == param and says in answer["error"]["message"], answer


def test_a_template_that_refuses_a_conversation(tmp_path):
    """And what it says is told without where on the disk it is."""
    app = make_server(tmp_path, "{{ raise_exception('roles must alternate') }}")
    body = json.dumps(GOOD["/v1/chat/completions"]).encode()
    with pytest.raises(RequestError, match="^the chat template fails on this conversation: roles must alternate"):
        asyncio.run(app.in_thread(app.encode_chat, parse(ChatRequest, body)))


def test_keys_bodies_and_origins(scripted_server, demo_server):
    good = GOOD["/v1/completions"]
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer "}):
        status, answer = scripted_server.post("/v1/completions", good, headers)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert scripted_server.get("/v1/models", headers)[0] == scripted_server.get("/metrics", headers)[0] == 401
    key = {"Authorization": "Bearer secret"}
    assert scripted_server.post("/v1/completions", good, key)[0] == 200
    assert scripted_server.get("/health")[0] == 200
    long = good | {"prompt": "x" * 100000}
    assert scripted_server.post("/v1/completions", long, key)[0] == 413
    assert demo_server.post("/v1/completions", good, {"Content-Type": "text/plain"})[0] == 415
    assert demo_server.post("/v1/completions", good, {"Content-Type": "application/json; charset=utf-8"})[0] == 200
    assert demo_server.get("/v1/models", {"Host": "evil.example"})[0] == 400             # whose name points to us
    connection = http.client.HTTPConnection("127.0.0.1", demo_server.port)
    connection.request("GET", "/v1/models", headers={"Origin": "https://a.example"})
    assert connection.getresponse().getheader("Access-Control-Allow-Origin") is None


def test_a_full_queue(scripted_server):
    """One row and one place: of five at a time some are refused, and the official client knows why."""
    def ask(_) -> str:
        try:
            answer = scripted_server.client.completions.create(model=scripted_server.name, prompt="a", max_tokens=700,
                                                               logprobs=0)
            return answer.choices[0].finish_reason
        except openai.RateLimitError as error:
            assert error.code == "queue_full" and error.response.headers["Retry-After"] == "1"
            return "refused"
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(ask, range(5)))
    assert 1 <= answers.count("refused") <= 3 + 1 and {*answers} - {"refused"} <= {"length", "stop"}
    with pytest.raises(openai.RateLimitError):
        scripted_server.client.completions.create(model=scripted_server.name, prompt="a", n=3)


@pytest.mark.parametrize("argv, says", [
    (["--max_batch", "3"], "--max_batch 3 must be a power of 2"), (["--max_batch", "0"], "--max_batch 0 must be"),
    (["--max_batch", "2", "--draft", "ngram"], "--max_batch 2: speculative decoding takes one sequence at a time"),
    (["--port", "65536"], "--port 65536 must be from 0 to 65535"), 
    (["--host", "nowhere.invalid"], "--port 8000: cannot listen at nowhere.invalid"),
    (["--max_queue", "-1"], "--max_queue -1 must be 0 or more"), (["--cache_tokens", "-1"], "--cache_tokens -1 must"),
    (["--max_body", "0"], "--max_body 0 must be 1 or more"), (["--api_key", "a b"], "--api_key must be of printable"),
    (["--temperature", "-1"], "--temperature -1.0 must be"), (["--speculate_k", "2"], "--speculate_k 2 needs")])
def test_what_needs_no_model_is_checked_before_one_is_loaded(argv, says, monkeypatch, refusal):
    monkeypatch.setattr(generate, "load_model", lambda *args, **more: pytest.fail("a model is loaded"))
    assert says in refusal(serve.main, *argv)


def test_a_port_in_use(demo_server):
    done = subprocess.run([sys.executable, "serve.py", "--port", str(demo_server.port)], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: --port {demo_server.port}: cannot listen at 127.0.0.1: Address already in use\n"


def test_memory_that_is_not_there(refusal):
    assert "out of memory: keys and values" in refusal(serve.main, "--port", 0, "--device", "cpu", "--cache_tokens",
                                                       10 ** 12)


def test_ctrl_c_ends_answers_under_way():
    """A stream, and an answer that is to come whole: at once, without a traceback."""
    server = Process()
    body = json.dumps(dict(prompt="x", max_tokens=900, temperature=0, stop=["\0"])).encode()
    connections = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(2)]
    for connection, sent in zip(connections, (body[:-1] + b', "stream": true}', body)):
        connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
    stream = connections[0].getresponse()
    assert stream.readline().startswith(b"data: ")
    said = server.stop()
    assert "Traceback" not in said and server.process.returncode == 130, said
    assert b"[DONE]" not in stream.read()


# ---- the README, several processes, a compiled server

def test_the_readmes_commands(tmp_path):
    readme = (ROOT / "README.md").read_text()
    start = re.search(r"^python (serve\.py .*)$", readme, re.MULTILINE)[1]
    curl = re.search(r"^curl (.*(?:\\\n.*)*)$", readme, re.MULTILINE)[1].replace("\\\n", " ")
    server = Process(*shlex.split(start.replace("--compile ", ""))[1:])
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    done = subprocess.run(["curl", "-sS", *shlex.split(curl.replace(":8000", f":{server.port}"))], text=True,
                          capture_output=True)
    server.stop()
    assert json.loads(done.stdout)["choices"][0]["message"]["content"], done


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks(demo):
    """The first serves, the other follows: the same texts, whatever is asked for, left or refused in between."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "serve.py")
    server = Process("--dtype", "fp32", "--max_batch", "4", "--temperature", "0", command=command)
    expected = {prompt: alone(demo, prompt, 12) for prompt in PROMPTS}
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda prompt: server.post("/v1/completions", {"prompt": prompt, "max_tokens": 12}),
                               PROMPTS)
            assert {prompt: answer["choices"][0]["text"] for prompt, (_, answer) in zip(PROMPTS, answers)} == expected
        with contextlib.closing(server.client.completions.create(model="demo", prompt="x", max_tokens=900,
                                                                 stream=True)) as stream:
            next(iter(stream))
        server.wait_until_idle()
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["only this"]}}}
        answer = server.client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x"}],
                                                       response_format=schema)
        assert json.loads(answer.choices[0].message.content) == "only this"
    finally:
        os.killpg(server.process.pid, signal.SIGTERM)
        server.process.communicate(timeout=60)


# ---- without sockets

def make_server(folder: Path, template: str) -> serve.Server:
    """The application around a tokenizer with this template."""
    for file in DEMO.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))

    class Batcher:
        class engine:
            tokenizer = Tokenizer.from_dir(folder)
    return serve.Server(Batcher(), serve.parse_args([]))
