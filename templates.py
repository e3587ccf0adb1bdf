"""Chat templates. They are programs, in Jinja, that come with a checkpoint: so they run in a process of their own, with
limits on time, memory and output.

`render` starts that process (`python templates.py`) with the first conversation and keeps it. The environment is that
of transformers' apply_chat_template, sandboxed, without the second or two that it takes to import transformers.
"""
import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

SECONDS = 10                                     # for one conversation: a real template takes milliseconds
MEMORY = 1 << 30                                 # bytes of the process's address space, of which Python takes 0.1 GB
ADDED_CHARACTERS = 1 << 20                       # that a template may write beside twice the conversation's own


class TemplateFailed(Exception):
    """What went wrong, in a phrase."""


# ---- the side that asks

class TemplateProcess:
    """The process that runs templates, started with the first and kept. One caller at a time."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """In a forked process, which starts one of its own."""
        self.lock, self.process = threading.Lock(), None

    def start(self) -> subprocess.Popen:
        # A process group of its own: Ctrl-C is not for it. It ends when its stdin does, with this process.
        return subprocess.Popen([sys.executable, __file__, str(SECONDS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, process_group=0)

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def ask(self, request: bytes) -> bytes:
        """A line's answer. Errors: TemplateFailed, where the process ends instead."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = self.start()
            process: Any = self.process
            try:
                process.stdin.write(request)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            except BaseException:                # Ctrl-C: the answer must not be taken for the next one's
                self.stop()
                raise
            if not answer:
                status = process.wait()
                raise TemplateFailed(f"did not end within {SECONDS} s" if status == -signal.SIGALRM else
                                     f"ended its process with status {status}")
            return answer


PROCESS = TemplateProcess()
atexit.register(PROCESS.stop)
os.register_at_fork(after_in_child=PROCESS.forget)


def render(template: str, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
    """The text that a template makes of a conversation and further variables, in which anything but JSON is replaced by
    the name of its type. Errors: TemplateFailed, for whatever a template does instead."""
    variables |= dict(messages=[_with_thoughts(message) for message in messages])
    request = json.dumps([template, variables], default=lambda value: f"<{type(value).__name__}>") + "\n"
    text, error = json.loads(PROCESS.ask(request.encode()))
    if error:
        raise TemplateFailed(error)
    return text


def _with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """An answer's reasoning goes by several names: a template finds it under the two that it may ask for."""
    names = ("reasoning_content", "thinking", "reasoning")
    thoughts = next((message[name] for name in names if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


# ---- the process that runs them

def serve(seconds: int) -> None:
    """Answers lines of JSON, [template, variables], by lines of JSON, [text, error]."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)            # which the parent may have ignored
    with contextlib.suppress(ValueError, OSError):                       # not everywhere on macOS
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        signal.alarm(seconds)                    # kills the process, whatever it is busy with
        try:
            template, variables = json.loads(line)
            text, error = compiled(template).render(**variables), ""
            if len(text) > ADDED_CHARACTERS + 2 * len(line):
                text, error = "", f"made {len(text)} characters of a conversation of {len(line)}"
        except Exception as caught:
            kind = "" if type(caught).__name__ == "TemplateError" else f"{type(caught).__name__}: "
            text, error = "", kind + str(caught)[:500]
        signal.alarm(0)
        sys.stdout.write(json.dumps([text, error]) + "\n")
        sys.stdout.flush()


@lru_cache(8)
def compiled(source: str) -> Any:
    """A template in transformers' environment."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks an answer in training: here it shows what is in it."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    class Dict:
        """The name `dict`, without the attributes of the type."""
        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args, **kwargs):           # namespace(self=...) is allowed
            self, *args = args
            content = dict(*args, **kwargs)
            for name in content:
                refuse_private(name)
            jinja2.utils.Namespace.__init__(self, content)

        def __setitem__(self, name, value):
            refuse_private(name)
            super().__setitem__(name, value)

    def refuse_private(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"Chat templates cannot store {name!r} on a namespace")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "dict": Dict(), "namespace": Namespace,
                            "strftime_now": lambda format: datetime.now().strftime(format)}
    return environment.from_string(source)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
