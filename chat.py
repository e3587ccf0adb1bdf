"""The terminal: the rows of a batch as they grow, the progress of prefill, and conversations."""
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import tp
from cli import UserError
from tokenizer import StreamDecoder, Tokenizer

HELP = """Ctrl-C stops an answer; at the prompt it ends the program, as Ctrl-D or an empty line do.
/reset  begins a new conversation
/help   shows this"""


def dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


class RowPrinter:
    """Shows the texts of a batch. One row is printed as it grows; of several, a terminal shows the end of each in a
    line of its own, and `close` prints them whole, one after the other."""

    def __init__(self, prompts: Sequence[str]):
        self.prompts, self.texts = prompts, ["" for _ in prompts]
        self.live = len(prompts) > 1 and sys.stdout.isatty()
        if len(prompts) == 1:
            print(dim(prompts[0]), end="", flush=True)
        elif self.live:
            print("\n" * (len(prompts) - 1), flush=True)

    def __call__(self, row: int, text: str) -> None:
        """More text of a row."""
        self.texts[row] += text
        if len(self.texts) == 1:
            print(text, end="", flush=True)
        elif self.live and text:
            up, width = len(self.texts) - row, shutil.get_terminal_size().columns - 1
            tail = (self.prompts[row] + self.texts[row])[-width:].replace("\n", " ")
            tail = tail if tail.isascii() else tail[-width // 2:]                # there may be wide characters
            print(f"\033[{up}A\r\033[2K{tail}\033[{up}B\r", end="", flush=True)

    def close(self) -> None:
        if len(self.texts) == 1:
            print(flush=True)
        else:
            rows = (dim(prompt) + text for prompt, text in zip(self.prompts, self.texts))
            print("\n---\n".join(rows), flush=True)


def show_prefill(done: int, total: int) -> None:
    """A line on the terminal that is gone when the prompt has been read."""
    if sys.stderr.isatty():
        line = f"\rprefill: {done} of {total} tokens" if done < total else "\r\033[2K"
        print(line, end="", file=sys.stderr, flush=True)


def chat(generate: Callable[..., Iterator[list[int | None]]], tokenizer: Tokenizer, ranks: tp.Ranks | None,
         request: dict[str, Any], use_template: bool, system: str | None = None, enable_thinking: bool = True,
         quiet: bool = False) -> None:
    """Answers lines from the terminal by `generate` (an Engine's), with the arguments in `request`.

    use_template: a conversation in the checkpoint's chat template, which stays in the KV cache from turn to turn;
    otherwise each line is a prompt to continue.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and a history
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    if not quiet:
        print(dim(HELP))
    while text := next_line(ranks):
        if text in ("/reset", "/help"):
            messages = list(beginning) if text == "/reset" else messages
            print(dim("a new conversation" if text == "/reset" else HELP))
            continue
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.render_chat(messages, enable_thinking) if use_template else tokenizer.encode(text)
        capacity = request["max_seq_length"]
        if len(prompt) >= capacity:
            messages.pop()
            print(f"This makes {len(prompt)} tokens, and the KV cache holds {capacity} (--max_seq_length)"
                  f"{': /reset begins a new conversation' if use_template else ''}")
            continue
        limited = {**request, "max_new_tokens": min(capacity - len(prompt), request["max_new_tokens"])}
        steps = generate([prompt], **limited, keep_cache=True, progress=show_prefill)
        answer, rate = print_answer(steps, StreamDecoder(tokenizer, skip_special=True, after=prompt))
        if not quiet:
            print(dim(f"({rate:.1f} tokens/sec)"))
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})


def next_line(ranks: tp.Ranks | None) -> str:
    """What the user typed, on every rank; empty at the end."""
    try:
        text = input("> ") if not ranks or ranks.first else ""
    except (EOFError, KeyboardInterrupt):
        print()
        text = ""
    except (UnicodeDecodeError, MemoryError) as error:           # the latter for a line without an end
        raise UserError(f"stdin cannot be read: {str(error) or 'out of memory'}") from None
    text = text if text.strip() else ""
    return ranks.from_first(text) if ranks else text


def print_answer(steps: Iterator[list[int | None]], decoder: StreamDecoder) -> tuple[list[int], float]:
    """Prints an answer as it comes, until its end or Ctrl-C: its ids, and the tokens/s after the first."""
    answer, times = [], []
    with contextlib.suppress(KeyboardInterrupt):
        for row in steps:
            i = cast(int, row[0])                    # None comes from batches only
            answer.append(i)
            times.append(time.perf_counter())
            print(decoder.push(i), end="", flush=True)
    print(decoder.flush(), flush=True)
    return answer, (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
