"""What every command shares: mistakes told in one line, the argument parser, reading and writing files."""
import gc
import os
import signal
import sys


def _exit_quietly(*_) -> None:
    os._exit(128 + signal.SIGINT)


def _is_command() -> bool:
    """Whether the running program is one of this project's, rather than one that imports from it."""
    here, file = os.path.dirname(os.path.realpath(__file__)), getattr(sys.modules.get("__main__"), "__file__", None)
    return bool(file) and os.path.dirname(os.path.realpath(file)) in (here, os.path.join(here, "scripts"))


def _spin_briefly() -> None:
    """Before OpenMP is loaded: a thread that waits for the others spins for a moment, which saves waking it again, then
    sleeps. By default it spins for milliseconds, and beside other busy processes keeps the core that the late one
    needs."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


PARENT = os.getppid()                            # before the imports, during which it may end
# Commands import this file first: while they import the others (seconds), Ctrl-C ends them without a traceback.
IS_COMMAND, GC_THRESHOLDS = _is_command(), gc.get_threshold()
if IS_COMMAND:
    _spin_briefly()
    gc.set_threshold(100_000, 50)                # up to run(): looking for garbage amid all that is imported takes long
if IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _exit_quietly)

import argparse
import contextlib
import errno
import glob
import io
import itertools
import json
import platform
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

VERSION = "0.9"
FLAGS = {"world_size": "nproc_per_node"}         # fields that the command line (here torchrun's) calls otherwise
MAX_TEXT = 1 << 27                               # characters of a file: /dev/zero has no end
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SYSTEM_REFUSALS = (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENXIO, errno.ENAMETOOLONG,
                   errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ENFILE)
TORCH_SAVE_FAILED = ("unexpected pos", "iostream error", "PytorchStreamWriter failed", "file write failed")
_counter = itertools.count()


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


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """What the system refuses and no program can mend (a permission, a full disk) becomes a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in SYSTEM_REFUSALS:
            raise
        raise UserError(f"{'the output' if error.filename is None else error.filename}: {error.strerror}") from error


def run(main: Callable[[], None]) -> None:
    """Calls main(). A UserError becomes one line on stderr and exit status 2, Ctrl-C status 130. A bug keeps its
    traceback."""
    status = 0
    if IS_COMMAND:
        gc.freeze()                              # what was imported stays, and is not looked through again
        gc.set_threshold(*GC_THRESHOLDS)
    try:
        with system_errors():
            try:
                with _interruptible():
                    main()
            finally:
                # The interpreter would look through all of it again when it ends. Ranks need that for their threads.
                if IS_COMMAND and "WORLD_SIZE" not in os.environ:
                    gc.freeze()
                sys.stdout.flush()               # here, where a failure can be told
        return
    except UserError as error:
        status = fail(error)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:                      # the reader of a pipe has gone: nothing is left to say
        pass
    try:
        sys.stdout.flush()
    except (OSError, ValueError):                # what is left is lost: the interpreter shall not try again
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """For what makes many objects that stay: an import of a large library, a compilation."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def printable(text: object) -> str:
    """Names of files may be any bytes, and a terminal takes UTF-8 only."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def fail(error: UserError | str) -> int:
    """Prints a mistake as a command tells it, with its flag; returns the exit status."""
    flag = f"--{FLAGS.get(error.field, error.field)} " if isinstance(error, UserError) and error.field else ""
    message = error.message if isinstance(error, UserError) else error
    line = printable(" ".join(message.split()))
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {flag}{line}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in here, and outside ends a command at once."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not _exit_quietly:
        yield
        return
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _raise_again(unraisable: Any) -> None:
    """For a KeyboardInterrupt that came where Python drops exceptions, say in a __del__."""
    if unraisable.exc_type is KeyboardInterrupt:
        timer = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def _prepare_streams() -> None:
    """Streams that were closed become empty ones; a character that the terminal's encoding lacks becomes a ?."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):            # in the order of descriptors
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


if IS_COMMAND:
    sys.unraisablehook = _raise_again
    _prepare_streams()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as written; defaults beside the flags that have one worth telling."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        quiet = action.default in (None, False, [], argparse.SUPPRESS) or "default" in (action.help or "")
        return action.help if quiet else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Flags are spelt with hyphens or underscores alike, and mistakes are told in one line."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=HelpFormatter)
        self.register("type", Path, _path)
        self.add_argument("--version", action="version", version=version())

    def parse_known_args(self, args=None, namespace=None):
        spellings = {option.replace("-", "_"): option for option in self._option_string_actions}

        def spelt(argument: str) -> str:
            name, equals, value = argument.partition("=")
            is_flag = argument.startswith("--")
            return spellings.get(name.replace("-", "_"), name) + equals + value if is_flag else argument
        return super().parse_known_args([spelt(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:                              # argparse's own does not tell that it failed
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _path(text: str) -> Path:
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: a path has no NUL")
    return Path(text)


def version() -> str:
    import torch  # heavy, and rarely asked for
    return f"qwen-fast {VERSION} (PyTorch {torch.__version__}, Python {platform.python_version()})"


def read_text(path: Path | str, field: str = "") -> str:
    """Errors: UserError, for a file that cannot be read, is not UTF-8 or does not end."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: cannot be read: {reason}", field) from None
    if len(text) > MAX_TEXT:
        raise UserError(f"{path}: has more than {MAX_TEXT} characters", field)
    return text


def read_stdin() -> str:
    """Errors: UserError, for what is not text in the terminal's encoding, or does not end."""
    try:
        text = sys.stdin.read(MAX_TEXT + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"- : stdin cannot be read: {error}", "prompt") from None
    if len(text) > MAX_TEXT:
        raise UserError(f"- : stdin has more than {MAX_TEXT} characters", "prompt")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """Errors: UserError, for a file that cannot be read or is not a JSON object."""
    with system_errors():
        found, regular = path.exists(), path.is_file()
    if not found:
        raise UserError(f"{path.parent} holds no {path.name}: not a Hugging Face checkpoint folder")
    if not regular:                              # to open a pipe is to wait for its writer
        raise UserError(f"{path}: not a regular file")
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def check_writable(path: Path | str, field: str = "") -> None:
    """Errors: UserError, unless a file can be written at path: nothing but a regular file is ever replaced."""
    path = Path(path)
    try:
        reason = "" if stat.S_ISREG(os.stat(path).st_mode) else "it is no regular file"
    except FileNotFoundError:
        reason = "" if path.parent.is_dir() else f"{path.parent} is no folder"
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if not reason:
        try:                                     # os.access says yes to root, of any folder
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            reason = f"{path.parent} is not writable: {error.strerror}"
    if reason:
        raise UserError(f"{path}: cannot be written: {reason}", field)


@contextlib.contextmanager
def atomic_write(path: Path | str, field: str = "") -> Iterator[Path]:
    """Yields a temporary name beside `path`, renamed to `path` on success, else removed. Errors: UserError, for a full
    disk, and for what check_writable finds."""
    path = Path(path)
    check_writable(path, field)
    with _write_errors(path):
        partial = _partial_name(path)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, field: str = "") -> Iterator[Path]:
    """The same for a new folder."""
    check_new(path, field)
    with _write_errors(path):
        partial = _partial_name(path)
        partial.mkdir()
        try:
            yield partial
            os.rename(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_new(path: Path, field: str = "") -> None:
    """Errors: UserError, where there is something at path already, or it cannot be written."""
    if os.path.lexists(path):
        raise UserError(f"{path} is there already: name a new folder", field)
    check_writable(path, field)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in DISK_FULL or any(text in str(error) for text in TORCH_SAVE_FAILED):
            raise UserError(f"could not write {path}: is the disk full? Nothing was left behind") from error
        raise


def _partial_name(path: Path) -> Path:
    """A temporary name beside path. What processes that were killed left under such names goes."""
    prefix = f".{path.name[:32]}.{socket.gethostname()}."                          # a name has 255 bytes at most
    for abandoned in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        if not _is_running(abandoned.name.removeprefix(prefix).partition(".")[0]):
            if abandoned.is_dir():
                shutil.rmtree(abandoned, ignore_errors=True)
            else:
                abandoned.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}.{next(_counter)}.tmp")           # threads have names of their own


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
