"""What every command shares: mistakes told in one line, the argument parser, reading and writing files."""
import argparse
import contextlib
import errno
import glob
import json
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

VERSION = "0.9"
FLAGS = {"world_size": "nproc_per_node"}         # fields that the command line (here torchrun's) calls otherwise
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TORCH_SAVE_FAILED = ("unexpected pos", "iostream error", "PytorchStreamWriter failed", "file write failed")


class UserError(Exception):
    """Something the user can put right, in one line. field: the argument at fault, unless the message names a file."""

    def __init__(self, message: str, field: str = ""):
        super().__init__(message, field)         # both, so that pickling keeps them
        self.message, self.field = message, field

    def __str__(self) -> str:
        return f"{self.field} {self.message}".strip()


@contextlib.contextmanager
def fields(**names: str) -> Iterator[None]:
    """Renames the field of a UserError raised inside: fields(checkpoint_path="draft_checkpoint_path")."""
    try:
        yield
    except UserError as error:
        error.field = names.get(error.field, error.field)
        raise


def run(main: Callable[[], None]) -> None:
    """Calls main(); a UserError becomes one line on stderr and exit status 2. A bug keeps its traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:                      # the reader of a pipe has gone: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(error: UserError | str) -> int:
    """Prints a mistake as a command tells it, with its flag; returns the exit status."""
    flag = f"--{FLAGS.get(error.field, error.field)} " if isinstance(error, UserError) and error.field else ""
    message = error.message if isinstance(error, UserError) else error
    print(f"error: {flag}{' '.join(message.split())}", file=sys.stderr)
    return 2


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as written; defaults beside the flags that have one worth telling."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        quiet = action.default in (None, False, [], argparse.SUPPRESS) or "default" in (action.help or "")
        return action.help if quiet else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Flags are spelt with hyphens or underscores alike, and mistakes are told in one line."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=HelpFormatter)
        self.add_argument("--version", action="version", version=version())

    def parse_known_args(self, args=None, namespace=None):
        spellings = {option.replace("-", "_"): option for option in self._option_string_actions}

        def spelt(argument: str) -> str:
            name, equals, value = argument.partition("=")
            is_flag = argument.startswith("--")
            return spellings.get(name.replace("-", "_"), name) + equals + value if is_flag else argument
        return super().parse_known_args([spelt(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(message.removeprefix("argument ")))


def version() -> str:
    import torch  # heavy, and rarely asked for
    return f"qwen-fast {VERSION} (PyTorch {torch.__version__}, Python {platform.python_version()})"


def read_text(path: Path | str, field: str = "") -> str:
    """Errors: UserError, for a file that cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: cannot be read: {reason}", field) from None


def read_stdin() -> str:
    """Errors: UserError, for what is not text in the terminal's encoding."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"- : stdin cannot be read: {error}", "prompt") from None


def read_json(path: Path) -> dict[str, Any]:
    """Errors: UserError, for a file that cannot be read or is not a JSON object."""
    if not path.exists():
        raise UserError(f"{path.parent} holds no {path.name}: not a Hugging Face checkpoint folder")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yields a temporary name beside `path`, renamed to `path` on success, else removed. A full disk is a UserError."""
    path = Path(path)
    prefix = f".{path.name}.{socket.gethostname()}."
    for abandoned in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):          # by a process that was killed
        if not _is_running(abandoned.name.removeprefix(prefix).removesuffix(".tmp")):
            abandoned.unlink(missing_ok=True)
    partial = path.with_name(f"{prefix}{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in DISK_FULL or any(text in str(error) for text in TORCH_SAVE_FAILED):
            raise UserError(f"could not write {path}: is the disk full? Nothing was left behind") from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
