"""What every command shares: a user's mistake as one line, and files that appear whole or not at all."""
import contextlib
import errno
import glob
import os
import socket
import sys
from pathlib import Path
from typing import Callable, Iterator


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
