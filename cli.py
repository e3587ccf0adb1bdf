"""What commands share: a user's mistake as one line, files that appear whole or not at all, and lm-eval's tasks by name."""
import contextlib
import errno
import glob
import os
import socket
import sys
from pathlib import Path
from typing import Any, Callable, Iterator


class UserError(Exception):
    """Something the user can put right. The message is one line that names the flag or the file."""


def run(main: Callable[[], None]) -> None:
    """Calls main(); a UserError becomes one line on stderr and exit status 2. Anything else is a bug and keeps its traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:          # the reader of a pipe went away: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TORCH_WRITE_FAILED = ("unexpected pos", "iostream error", "PytorchStreamWriter failed", "file write failed")      # how torch.save says it


@contextlib.contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success it is renamed to `path`, otherwise removed. A full disk is a UserError."""
    path = Path(path)
    prefix = f".{path.name}.{socket.gethostname()}."
    for abandoned in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):          # of a process that was killed while writing
        if not _is_running(abandoned.name.removeprefix(prefix).removesuffix(".tmp")):
            abandoned.unlink(missing_ok=True)
    partial = path.with_name(f"{prefix}{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in DISK_FULL or any(text in str(error) for text in TORCH_WRITE_FAILED):
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


def load_tasks(names: list[str], include_path: Path | None = None, include_defaults: bool = True, flag: str = "--tasks",
               advice: str = ""):
    """(lm-eval's TaskManager, the tasks and groups of tasks that the names stand for). UserError for an unknown name, or data that cannot be had."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include_path {include_path}: no such folder")
    manager = TaskManager(include_path=include_path, include_defaults=False)             # lm-eval's own thousands take it a while to read
    if include_defaults and not all(known(manager, name) for name in names):
        manager = TaskManager(include_path=include_path)
    loaded: dict[str, Any] = {}
    for name in names:
        if not known(manager, name):
            raise UserError(f"{flag} {name}: no such task (`lm-eval ls tasks` lists them; --include_path FOLDER adds a folder's)")
        try:
            found = manager.load(manager.match_tasks([name]) or [name])
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{flag} {name}: its data cannot be had: {reason}. Without a network, write a task whose dataset is a local file "
                            f"and point --include_path to its folder (tests/lm_eval_tasks shows how){advice}") from error
        inner = {child for children in found["group_map"].values() for child in children}
        loaded |= {name: item for name, item in (found["groups"] | found["tasks"]).items() if name not in inner}
    return manager, list(loaded.values())


def known(manager, name: str) -> bool:
    return bool(manager.match_tasks([name])) or (name.endswith((".yaml", ".yml")) and Path(name).is_file())
