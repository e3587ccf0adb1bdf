"""OpenAI's protocol, as far as it is spoken: what requests may hold, and what an answer's text says.

A field that would change an answer and is not supported is refused by name, unless it has its neutral value.
"""
import json
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from batching import Output, Scored
from tokenizer import Tokenizer

MAX_STOP = 16                            # strings that end an answer
MAX_CHOICES = 128
LEAST_LOGPROB = -9999.0              # JSON has no infinity


class RequestError(Exception):
    """A request that gets an error for an answer. status: of HTTP."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# ---- requests

class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Lenient(BaseModel):
    """Clients send messages back with whatever else they have put there."""
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0, le=0)]
Id = Annotated[int, Field(ge=0, lt=1 << 31)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Common(Strict):
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None        # not OpenAI's; 0 and -1: all tokens
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # What changes nothing here.
    user: str | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def options_of_a_stream(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Common):
    prompt: Text | Annotated[list[Text] | list[Id] | list[Annotated[list[Id], Field(min_length=1)]],
                             Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None


class TextPart(Lenient):
    type: Literal["text"]
    text: str


class FunctionCall(Lenient):
    name: Text
    arguments: str


class SentToolCall(Lenient):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[SentToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def has_content(self):
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self

    def for_template(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        for key in ("name", "reasoning_content", "tool_call_id"):
            if getattr(self, key) is not None:
                message[key] = getattr(self, key)
        if self.tool_calls:
            message["tool_calls"] = [{"type": "function", "id": call.id, "function": {
                "name": call.function.name, "arguments": arguments_of(call.function)}} for call in self.tool_calls]
        return message


def arguments_of(call: FunctionCall) -> dict[str, Any]:
    """As templates take them. Errors: RequestError."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(400, f"the arguments of {call.name} are not a JSON object", "messages")
    return arguments


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ResponseSchema(Strict):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: ResponseSchema


class TemplateOptions(Strict):
    enable_thinking: bool | None = None


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    chat_template_kwargs: TemplateOptions | None = None          # not OpenAI's, but other servers'
    # What changes nothing here.
    parallel_tool_calls: Literal[True] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def alternatives_of_logprobs(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, ObjectFormat) else None

    @property
    def usable_tools(self) -> list[dict[str, Any]] | None:
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


T = TypeVar("T", bound=BaseModel)


def parse(schema: type[T], body: bytes) -> T:
    """A request's body. Errors: RequestError, which names the field."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        if errors[0]["type"] == "json_invalid":
            raise RequestError(400, f"the body is not JSON: {errors[0]['msg']}") from None
        # Of a union pydantic tells what is wrong with every alternative: the deepest was meant, or that of this type.
        found = [(path_of(e["loc"], json.loads(body), e["type"] == "missing"), e) for e in errors]
        path, first = max(found, key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")))
        param = ".".join(path)[:100] or None
        message = "is not a supported field" if first["type"] == "extra_forbidden" else first["msg"]
        message = message.removeprefix("Value error, ").replace("Input should be", "should be")
        raise RequestError(400, f"{param}: {message}" if param else message, param) from None


def path_of(location: Sequence[str | int], value: Any, missing: bool) -> list[str]:
    """Where in a body an error is, without the names that pydantic gives to a union's alternatives."""
    path = []
    for i, key in enumerate(location):
        if isinstance(value, dict) and key in value or isinstance(value, list) and isinstance(key, int):
            value = cast(Any, value)[key]
            path.append(str(key))
        elif missing and i == len(location) - 1:
            path.append(str(key))
    return path


# ---- answers

class ToolCall(NamedTuple):
    name: str
    arguments: str                       # JSON


class Part(NamedTuple):
    """kind: content, reasoning_content or tool_call."""
    kind: str
    value: Any


class AnswerParser:
    """Splits an answer's text, as it comes, into thoughts, tool calls and the rest.

    thinking: whether the prompt has begun the thoughts. tools: those that may be called, as requests have them.
    """

    def __init__(self, thinking: bool = False, tools: list[dict[str, Any]] | None = None):
        self.tools, self.state, self.buffer = tools, "reasoning_content" if thinking else "start", ""
        self.fresh = thinking                      # whether whitespace that comes now is the template's

    def tags(self) -> dict[str, str]:
        """Which may come, and what begins there."""
        if self.state in ("reasoning_content", "tool_call"):
            return {"</think>" if self.state == "reasoning_content" else "</tool_call>": "content"}
        thoughts = {"<think>": "reasoning_content"} if self.state == "start" else {}
        return thoughts | ({"<tool_call>": "tool_call"} if self.tools else {})

    def push(self, text: str, last: bool = False) -> Iterator[Part]:
        """More of the text. last: whether all of it is there."""
        self.buffer += text
        while tag := min((tag for tag in self.tags() if tag in self.buffer), key=self.buffer.find, default=None):
            before, _, after = self.buffer.partition(tag)
            if self.state == "start" and before.strip():               # no thoughts
                self.state = "content"
                continue
            yield from self.part(before.rstrip(), closed=True)
            self.state, self.buffer, self.fresh = self.tags()[tag], after, True
        if self.state == "tool_call" and not last:
            return
        end = len(self.buffer)
        if not last:
            begun = (n for tag in self.tags() for n in range(1, len(tag)) if self.buffer.endswith(tag[:n]))
            end -= max(begun, default=0)
        if self.tags() and not (last and self.state != "reasoning_content"):
            end = len(self.buffer[:end].rstrip())
        part, self.buffer = self.buffer[:end], self.buffer[end:]
        yield from self.part(part)
        if part.strip() and self.state == "start":
            self.state = "content"

    def part(self, text: str, closed: bool = False) -> Iterator[Part]:
        if self.state == "tool_call":
            call = parse_tool_call(text, self.tools or [])
            tag = "</tool_call>" if closed else ""
            yield Part("tool_call", call) if call else Part("content", f"<tool_call>{text}{tag}")
            return
        text = text.lstrip() if self.fresh else text
        if text:
            self.fresh = False
            yield Part("reasoning_content" if self.state == "reasoning_content" else "content", text)


def parse_tool_call(text: str, tools: list[dict[str, Any]]) -> ToolCall | None:
    """What stands between the tags: {"name": ..., "arguments": {...}}, or <function=NAME> with <parameter=NAME> in it
    (Qwen3-Coder, Qwen3.5). None for anything else."""
    if function := re.fullmatch(r"\s*<function=([^>]+)>(.*?)(</function>)?\s*", text, re.DOTALL):
        name, arguments = function[1].strip(), {}
        functions = [tool["function"] for tool in tools if tool["function"]["name"] == name]
        properties = ((functions[0].get("parameters") or {}).get("properties") if functions else None) or {}
        for key, value in re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", function[2], re.DOTALL):
            declared = properties.get(key)
            is_string = isinstance(declared, dict) and declared.get("type") == "string"
            arguments[key] = value if is_string else read_value(value)
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
    call = read_value(text)
    arguments = call.get("arguments", {}) if isinstance(call, dict) else None
    if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
        return None
    return ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False))


def read_value(text: str) -> Any:
    """JSON, or else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# ---- what an answer looks like

def token_text(piece: bytes) -> str:
    """Of a token by itself, which may be a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class CompletionChoice:
    """One of the answers to /v1/completions: `push` returns what a stream tells of an output, `whole` all there was."""
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, index: int, tokenizer: Tokenizer):
        self.index, self.tokenizer = index, tokenizer
        self.text, self.scored, self.finish_reason, self.offset = "", [], None, 0
        self.tokens = self.cached = 0

    def begin(self) -> list[dict[str, Any]]:
        """What a stream tells before all outputs."""
        return []

    def push(self, output: Output) -> list[dict[str, Any]]:
        self.count(output)
        logprobs = self.logprobs([output.scored]) if output.scored else None
        if not (output.text or logprobs or output.finish_reason):
            return []
        self.text += output.text
        return [dict(index=self.index, text=output.text, logprobs=logprobs, finish_reason=output.finish_reason)]

    def count(self, output: Output) -> None:
        self.finish_reason, self.cached = output.finish_reason, output.cached
        self.tokens += output.tokens
        if output.scored:
            self.scored.append(output.scored)

    def whole(self) -> dict[str, Any]:
        self.offset = 0
        logprobs = self.logprobs(self.scored) if self.scored else None
        return dict(index=self.index, text=self.text, logprobs=logprobs, finish_reason=self.finish_reason)

    def logprobs(self, scored: Sequence[Scored]) -> dict[str, list]:
        told: dict[str, list] = dict(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in scored:
            text = token_text(self.tokenizer.piece(token.id))
            told["tokens"].append(text)
            told["token_logprobs"].append(max(token.logprob, LEAST_LOGPROB))
            told["top_logprobs"].append({token_text(self.tokenizer.piece(id)): max(logprob, LEAST_LOGPROB)
                                         for id, logprob in (*token.top, token[:2])})
            told["text_offset"].append(self.offset)
            self.offset += len(text)
        return told


class ChatChoice(CompletionChoice):
    """The same for /v1/chat/completions."""
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, index: int, tokenizer: Tokenizer, parser: AnswerParser | None):
        super().__init__(index, tokenizer)
        self.parser, self.message = parser, dict[str, Any](role="assistant", content=None)

    def begin(self) -> list[dict[str, Any]]:
        return [self.delta(dict(role="assistant", content=""))]

    def delta(self, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None) -> dict[str, Any]:
        return dict(index=self.index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)

    def push(self, output: Output) -> list[dict[str, Any]]:
        self.count(output)
        deltas = list(self.deltas(output))
        if output.finish_reason == "stop" and "tool_calls" in self.message:
            self.finish_reason = "tool_calls"
        logprobs = self.logprobs([output.scored]) if output.scored else None
        if deltas or logprobs or output.finish_reason:
            first, *others = deltas or [{}]
            chunks = [self.delta(first, logprobs), *map(self.delta, others)]
            return [*chunks, self.delta({}, None, self.finish_reason)] if output.finish_reason else chunks
        return []

    def deltas(self, output: Output) -> Iterator[dict[str, Any]]:
        """What an output adds to the message."""
        if self.parser is None:                    # a grammar's
            parts = [Part("content", output.text)] if output.text else []
        else:
            parts = self.parser.push(output.text, last=output.finish_reason is not None)
        for kind, value in parts:
            if kind == "tool_call":
                calls = self.message.setdefault("tool_calls", [])
                calls.append(dict(id=f"call_{uuid.uuid4().hex}", type="function", function=value._asdict()))
                yield dict(tool_calls=[dict(index=len(calls) - 1, **calls[-1])])
            else:
                self.message[kind] = (self.message.get(kind) or "") + value
                yield {kind: value}

    def whole(self) -> dict[str, Any]:
        message = self.message
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
        logprobs = self.logprobs(self.scored) if self.scored else None
        return dict(index=self.index, message=message, logprobs=logprobs, finish_reason=self.finish_reason)

    def logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        def told(id: int, logprob: float) -> dict[str, Any]:
            piece = self.tokenizer.piece(id)
            return dict(token=token_text(piece), logprob=max(logprob, LEAST_LOGPROB), bytes=list(piece))
        return dict(content=[dict(**told(token.id, token.logprob), top_logprobs=[told(*pair) for pair in token.top])
                             for token in scored], refusal=None)
