"""An OpenAI-compatible server: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics.

    python serve.py --compile --model Qwen/Qwen3-0.6B --max_batch 8
"""
import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import argparse
import asyncio
import contextlib
import hmac
import json
import random
import re
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import prometheus_client
import uvicorn
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import generate
import tp
from batching import Batcher, Output, QueueFull, Request
from cli import UserError
from loading import CHECKPOINTS
from protocol import (
    AnswerParser,
    ChatChoice,
    ChatRequest,
    Common,
    CompletionChoice,
    CompletionRequest,
    RequestError,
    T,
    parse,
)
from sampling import Sampling
from tokenizer import Tokenizer

DEFAULT_CAPACITY = 4096              # tokens of a row, where the context is longer
DEFAULT_COMPLETION = 16              # tokens, as OpenAI has it
MAX_BATCH = 256
LOCAL = ("127.0.0.1", "localhost")


# ---- between the sockets and the model's thread

class Exchange:
    """The answers to one HTTP request, on their way. Used as a context, at whose end, or when the client has gone, the
    rows of those that are not complete become free."""

    def __init__(self, server: "Server", requests: list[Request], receive: Callable):
        self.server, self.receive, self.start = server, receive, time.perf_counter()
        try:
            numbers = server.batcher.submit(requests)
        except QueueFull:
            raise RequestError(429, "too many requests are waiting: try again later", code="queue_full") from None
        self.index_of = {number: i for i, number in enumerate(numbers)}
        self.queue: asyncio.Queue[Output | None] = asyncio.Queue()
        server.loop = asyncio.get_running_loop()
        server.exchanges.update(dict.fromkeys(numbers, self))

    async def __aenter__(self) -> "Exchange":
        self.watcher = asyncio.create_task(self.watch())
        return self

    async def watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.close()

    def close(self) -> None:
        for number in self.index_of:
            self.server.exchanges.pop(number, None)
            self.server.batcher.cancel(number)
        self.index_of = {}
        self.queue.put_nowait(None)

    async def __aexit__(self, *error: Any) -> None:
        self.watcher.cancel()
        self.close()

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """(which of the requests, what is new), until all are complete. Errors: RequestError; ClientDisconnect."""
        first = True
        while self.index_of:
            output = await self.queue.get()
            if output is None:
                raise ClientDisconnect
            if first:
                self.server.first_token.observe(time.perf_counter() - self.start)
                first = False
            index = self.index_of[output.number]
            if output.finish_reason:
                del self.index_of[output.number], self.server.exchanges[output.number]
            if output.finish_reason == "error":
                raise RequestError(500, "the model failed on this request: see the server's log")
            yield index, output


class EventStream:
    """A response of server-sent events."""
    status_code = 200

    def __init__(self, exchange: Exchange, events: AsyncIterator[str]):
        self.exchange, self.events = exchange, events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        async with self.exchange:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            with contextlib.suppress(ClientDisconnect):
                async for event in self.events:
                    body = f"data: {event}\n\n".encode()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class Server:
    """The application. args: the command's."""

    def __init__(self, batcher: Batcher, args: argparse.Namespace):
        self.batcher, self.args, self.sampling = batcher, args, generate.sampling_of(args)
        self.tokenizer, self.name = batcher.engine.tokenizer, name_of(batcher.engine.tokenizer)
        self.created = int(time.time())
        self.exchanges: dict[int, Exchange] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self.encoder = ThreadPoolExecutor(1)           # of texts, templates and grammars, which would hold up the loop
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(self)                   # for `collect`
        self.requests = prometheus_client.Counter(
            "qwen_fast_requests", "HTTP requests", ["status"], registry=self.registry)
        self.first_token = prometheus_client.Histogram(
            "qwen_fast_time_to_first_token_seconds", "From a request to its first token", registry=self.registry)
        batcher.deliver = self.deliver

    def deliver(self, outputs: list[Output]) -> None:
        """Called by the model's thread."""
        with contextlib.suppress(RuntimeError):        # the loop is closed: the server ends
            if self.loop:
                self.loop.call_soon_threadsafe(self.dispatch, outputs)

    def dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            if exchange := self.exchanges.get(output.number):
                exchange.queue.put_nowait(output)

    def application(self) -> Starlette:
        middleware = []
        if self.args.host in LOCAL and not self.args.api_key:          # a web page may have its name point here
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL)))
        if self.args.cors:
            middleware.append(Middleware(CORSMiddleware, allow_origins=self.args.cors, allow_methods=["GET", "POST"],
                                         allow_headers=["*"]))
        routes = [Route(path, self.endpoint(handler), methods=[method]) for method, path, handler in (
            ("POST", "/v1/chat/completions", self.chat), ("POST", "/v1/completions", self.complete),
            ("GET", "/v1/models", self.models), ("GET", "/v1/models/{name:path}", self.model),
            ("GET", "/metrics", self.metrics))]
        return Starlette(routes=[*routes, Route("/health", self.health)], middleware=middleware, exception_handlers={
            HTTPException: unexpected, Exception: unexpected})

    def endpoint(self, handler: Callable) -> Callable:
        """With what all have in common: the key, the form of errors, the count."""
        async def run(request: HTTPRequest) -> Any:
            try:
                self.check_key(request)
                response = await handler(request)
            except RequestError as error:
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=499)
            self.requests.labels(response.status_code).inc()
            return response
        return run

    def check_key(self, request: HTTPRequest) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if self.args.api_key and not hmac.compare_digest(given, f"Bearer {self.args.api_key}".encode()):
            raise RequestError(401, "wrong or missing API key", code="invalid_api_key")

    async def body(self, request: HTTPRequest, schema: type[T]) -> T:
        # Anything else a web page of another origin might send without being asked for its permission.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "the Content-Type must be application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.args.max_body:
                raise RequestError(413, f"the body has more than {self.args.max_body} bytes")
        return parse(schema, bytes(body))

    # ---- endpoints

    async def health(self, request: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self.card()]})

    async def model(self, request: HTTPRequest) -> Response:
        self.check_name(request.path_params["name"])
        return JSONResponse(self.card())

    def card(self) -> dict[str, Any]:
        return dict(id=self.name, object="model", created=self.created, owned_by="qwen-fast",
                    max_model_len=self.batcher.capacity)

    async def metrics(self, request: HTTPRequest) -> Response:
        told = prometheus_client.generate_latest(self.registry)
        return Response(told, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks a collector for."""
        statistics = self.batcher.statistics
        for name in ("prompt_tokens", "cached_tokens", "new_tokens", "busy_seconds"):
            yield CounterMetricFamily(f"qwen_fast_{name}", name.replace("_", " "), getattr(statistics, name))
        rate = statistics.new_tokens / statistics.busy_seconds if statistics.busy_seconds else 0.0
        running = sum(row.answer is not None for row in self.batcher.rows)
        yield GaugeMetricFamily("qwen_fast_tokens_per_second", "new tokens per busy second", rate)
        yield GaugeMetricFamily("qwen_fast_requests_running", "answers that have a row", running)
        yield GaugeMetricFamily("qwen_fast_requests_waiting", "answers that wait for a row", self.batcher.queued)

    async def complete(self, http: HTTPRequest) -> Any:
        body = await self.body(http, CompletionRequest)
        self.check_name(body.model)
        prompts = await self.in_thread(self.encode_prompts, body.prompt)
        max_tokens = DEFAULT_COMPLETION if body.max_tokens is None else body.max_tokens
        requests = self.requests_for(body, prompts, max_tokens, body.logprobs)
        choices = [CompletionChoice(i, self.tokenizer) for i in range(len(requests))]
        return await self.respond(http, body, requests, choices)

    async def chat(self, http: HTTPRequest) -> Any:
        body = await self.body(http, ChatRequest)
        self.check_name(body.model)
        prompt, grammar = await self.in_thread(self.encode_chat, body)
        max_tokens = body.max_completion_tokens or body.max_tokens or max(1, self.batcher.capacity - len(prompt))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        requests = self.requests_for(body, [prompt], max_tokens, logprobs, grammar)
        thinking = self.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
        choices = [ChatChoice(i, self.tokenizer, None if grammar else AnswerParser(thinking, body.usable_tools))
                   for i in range(len(requests))]
        return await self.respond(http, body, requests, choices)

    def check_name(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise RequestError(404, f"the model {name[:100]!r} does not exist: this is {self.name!r}", "model",
                               "model_not_found")

    async def in_thread(self, work: Callable, *args: Any) -> Any:
        """What takes milliseconds or more. Errors: RequestError, for UserErrors."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.encoder, work, *args)
        except UserError as error:
            message = error.message.removeprefix(f"{self.tokenizer.folder}: ")
            raise RequestError(400, f"{error.field} {message}".strip(), error.field or None) from None

    def encode_prompts(self, prompt: Any) -> list[list[int]]:
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            prompt = [prompt]
        prompts = [self.tokenizer.encode(text) if isinstance(text, str) else list(text) for text in prompt]
        if not all(prompts):
            raise UserError("is empty", "prompt")
        if any(id >= self.batcher.engine.vocab_size for ids in prompts for id in ids):
            raise UserError(f"has ids beyond the vocabulary of {self.batcher.engine.vocab_size}", "prompt")
        return prompts

    def encode_chat(self, body: ChatRequest) -> tuple[list[int], str | None]:
        """The prompt, and the grammar of the answer. Thoughts would not keep to a grammar."""
        schema, options = body.schema_of_answer, body.chat_template_kwargs
        grammar = None if schema is None else self.batcher.grammars.from_schema(schema)
        thinking = not self.args.no_thinking
        if options and options.enable_thinking is not None:
            thinking = options.enable_thinking
        messages = [message.for_template() for message in body.messages]
        return self.tokenizer.render_chat(messages, thinking and grammar is None, tools=body.usable_tools), grammar

    def requests_for(self, body: Common, prompts: list[list[int]], max_tokens: int, logprobs: int | None,
                     grammar: str | None = None) -> list[Request]:
        """n for each prompt. Errors: RequestError."""
        for prompt in prompts:
            if len(prompt) + max_tokens > self.batcher.capacity:
                raise RequestError(400, f"the prompt's {len(prompt)} tokens and {max_tokens} new ones exceed the "
                                   f"context of {self.batcher.capacity}",
                                   "messages" if isinstance(body, ChatRequest) else "prompt", "context_length_exceeded")
        default = self.sampling
        sampling = Sampling(default.temperature if body.temperature is None else body.temperature,
                            default.top_k if body.top_k is None else body.top_k if body.top_k > 0 else None,
                            default.top_p if body.top_p is None else body.top_p)
        seed = random.getrandbits(62) if body.seed is None else body.seed
        return [Request(prompt, max_tokens, sampling, (seed + i) % (1 << 63), body.stop_strings, logprobs, grammar)
                for prompt in prompts for i in range(body.n or 1)]

    # ---- answers

    async def respond(self, http: HTTPRequest, body: Common, requests: list[Request],
                      choices: Sequence[CompletionChoice]) -> Any:
        kind, exchange = choices[0], Exchange(self, requests, http.receive)
        head = dict(id=f"{kind.prefix}-{uuid.uuid4().hex}", created=int(time.time()), model=self.name)
        step = body.n or 1                             # the choices of one prompt, which is counted once

        def usage() -> dict[str, Any]:
            prompt, new = sum(len(r.prompt) for r in requests[::step]), sum(choice.tokens for choice in choices)
            cached = sum(choice.cached for choice in choices[::step])
            return dict(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new,
                        prompt_tokens_details=dict(cached_tokens=cached))
        if body.stream:
            with_usage = body.stream_options and body.stream_options.include_usage
            chunk = head | dict(object=kind.chunk_object)
            return EventStream(exchange, self.events(exchange, choices, chunk, usage if with_usage else None))
        async with exchange:
            async for i, output in exchange.outputs():
                choices[i].push(output)
        return JSONResponse(head | dict(object=kind.whole_object, choices=[choice.whole() for choice in choices],
                                        usage=usage()))

    async def events(self, exchange: Exchange, choices: Sequence[CompletionChoice], chunk: dict[str, Any],
                     usage: Callable[[], dict[str, Any]] | None) -> AsyncIterator[str]:
        def event(told: list[dict[str, Any]], **more: Any) -> str:
            return json.dumps(chunk | dict(choices=told, **more), ensure_ascii=False)
        try:
            for choice in choices:
                for told in choice.begin():
                    yield event([told])
            async for i, output in exchange.outputs():
                for told in choices[i].push(output):
                    yield event([told])
            if usage:
                yield event([], usage=usage())
        except RequestError as error:
            yield json.dumps(error.body())
        yield "[DONE]"


async def unexpected(request: HTTPRequest, error: Exception) -> Response:
    """For a path or method that there is not, or for a bug, whose traceback the log has."""
    if isinstance(error, HTTPException):
        return error_response(RequestError(error.status_code, error.detail))
    return error_response(RequestError(500, "a bug: see the server's log"))


def error_response(error: RequestError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


def name_of(tokenizer: Tokenizer) -> str:
    """What a checkpoint is called: by its folder, or its id on the Hub."""
    folder = tokenizer.folder.resolve()
    return folder.relative_to(CHECKPOINTS).as_posix() if folder.is_relative_to(CHECKPOINTS) else folder.name


# ---- the command

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all")
    add("--port", type=int, default=8000, help="0: any that is free")
    add("--api_key", metavar="KEY", help="which clients must give")
    add("--cors", nargs="+", metavar="ORIGIN", help="of web pages that may ask, or *")
    add("--max_batch", type=int, default=1, metavar="N", help="answers at a time: a power of 2")
    add("--max_queue", type=int, default=128, metavar="N", help="answers that may wait beside those")
    add("--cache_tokens", type=int, metavar="N",
        help="tokens of earlier texts to keep beside those in the KV cache (default: as many as an answer may have)")
    add("--max_body", type=int, default=4 << 20, metavar="BYTES", help="of a request")
    group = parser.add_argument_group("what requests leave open")
    generate.add_sampling_options(group)
    group.add_argument("--no_thinking", action="store_true", help="ask a thinking model to answer at once")
    generate.add_model_options(parser, f"{DEFAULT_CAPACITY}, or the model's context")
    generate.add_speed_options(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """What can be checked without the model. Errors: UserError."""
    generate.check_engine_args(args)
    generate.sampling_of(args)
    for field, least in (("max_queue", 0), ("cache_tokens", 0), ("max_body", 1)):
        if (getattr(args, field) or 0) < least:
            raise UserError(f"{getattr(args, field)} must be {least} or more", field)
    if not 1 <= args.max_batch <= MAX_BATCH or args.max_batch & (args.max_batch - 1):
        raise UserError(f"{args.max_batch} must be a power of 2, at most {MAX_BATCH}", "max_batch")
    if args.max_batch > 1 and (args.draft or args.draft_checkpoint_path):
        raise UserError(f"{args.max_batch}: speculative decoding takes one sequence at a time", "max_batch")
    if args.api_key is not None and not re.fullmatch("[!-~]+", args.api_key):
        raise UserError("must be of printable ASCII characters", "api_key")


def listen(host: str, port: int) -> socket.socket:
    """Errors: UserError, for a port in use among others."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"{port} must be from 0 to 65535", "port")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError, ValueError) as error:
        reason = ((error.strerror if isinstance(error, OSError) else None) or str(error)).partition(" (while")[0]
        raise UserError(f"{port}: cannot listen at {host}: {reason}", "port") from None


def main(argv: list[str] | None = None) -> None:
    with tp.joined() as ranks:
        command(parse_args(argv), ranks)


def command(args: argparse.Namespace, ranks: tp.Ranks | None) -> None:
    check_args(args)
    listening = listen(args.host, args.port) if not ranks or ranks.first else None         # before a model is loaded
    engine = generate.load_engine(args, ranks)
    capacity = args.max_seq_length or min(engine.context, DEFAULT_CAPACITY)
    cache_tokens = capacity if args.cache_tokens is None else args.cache_tokens
    batcher = Batcher(engine, args.max_batch, capacity, 0 if engine.speculator else cache_tokens, args.max_queue)
    print(f"Warm-up time: {batcher.warm_up():.02f} seconds")
    if listening is None:
        return batcher.run()
    server = Server(batcher, args)
    if args.host not in LOCAL and not args.api_key:
        print(f"note: whoever reaches {args.host} can use the model: consider --api_key")
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"Serving {server.name} at http://{host}:{listening.getsockname()[1]}/v1", flush=True)
    serve(server, listening)


class HTTPServer(uvicorn.Server):
    """uvicorn's, which at its end does not wait for answers that nobody will complete."""

    def __init__(self, server: Server):
        super().__init__(uvicorn.Config(server.application(), log_level="warning", lifespan="off", ws="none",
                                        access_log=False, timeout_graceful_shutdown=3))
        self.server, self.interrupted = server, False

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for exchange in {*self.server.exchanges.values()}:
            exchange.close()
        await super().shutdown(sockets)


def serve(server: Server, listening: socket.socket) -> None:
    """Until a signal asks for the end, or the model's thread fails."""
    http = HTTPServer(server)
    with ThreadPoolExecutor(1) as pool:
        loop = pool.submit(server.batcher.run)
        loop.add_done_callback(lambda _: setattr(http, "should_exit", True))
        try:
            http.run(sockets=[listening])
        finally:
            server.batcher.close()
            loop.result()
    if http.interrupted:                           # whether or not the signal was raised again
        raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(main)
