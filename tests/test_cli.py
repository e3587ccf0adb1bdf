"""What every command does with mistakes, streams, files and Ctrl-C, on small commands beside a copy of cli.py; and
every flag of the real ones with every kind of value."""
import argparse
import errno
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest

import cli
import eval as eval_command
import generate
import quantize
import serve
import tiny
from cli import UserError, atomic_write, check_writable
from conftest import ROOT


def allow_ctrl_c() -> None:
    """In a new process: where the tests run in the background of a shell, SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def command(tmp_path):
    """Runs a command whose main() has this body, in a folder with its own cli.py."""
    shutil.copy(ROOT / "cli.py", tmp_path)

    def start(body: str, imports: str = "", **options) -> subprocess.Popen:
        indented = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "command.py").write_text(
            f"import cli\nimport os, sys, time\n{imports}\ndef main():\n{indented}\n"
            "if __name__ == '__main__':\n    cli.run(main)\n")
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
        return subprocess.Popen([sys.executable, tmp_path / "command.py"], cwd=tmp_path, preexec_fn=allow_ctrl_c,
                                **options)
    return start


# ---- files

def special(kind: str, folder: Path) -> Path:
    """A path at which no regular file can or should be written."""
    path = folder / "target"
    if kind == "device":
        return Path("/dev/null")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/null")
    elif kind == "in a file":
        path.write_text("")
        path = path / "x"
    elif kind == "in no folder":
        path = path / "x"
    elif kind == "long name":
        path = folder / ("x" * 300)
    return Path(f"{path}\0") if kind == "NUL" else path


@pytest.mark.parametrize("kind", ["device", "fifo", "folder", "link to a device", "in a file", "in no folder",
                                  "long name", "NUL"])
def test_only_regular_files_are_written(kind, tmp_path):
    path = special(kind, tmp_path)
    before = stat.S_IFMT(os.lstat(path).st_mode) if kind != "NUL" and os.path.lexists(path) else None
    for write in (lambda: check_writable(path, "out"), lambda: atomic_write(path, "out").__enter__()):
        with pytest.raises(UserError, match="cannot be written") as caught:
            write()
        assert caught.value.field == "out"
    assert before is None or stat.S_IFMT(os.lstat(path).st_mode) == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["x", "x" * 250, "é" * 120, "[*]"])
def test_writing_replaces_whole_files(name, tmp_path):
    for text in ("old", "new"):
        with atomic_write(tmp_path / name) as partial:
            partial.write_text(text)
    with pytest.raises(RuntimeError), atomic_write(tmp_path / name) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / name).read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's /proc")
def test_a_folder_that_takes_no_files_is_found_beforehand(tmp_path):
    """Where permissions say that it does, as they do to root."""
    with pytest.raises(UserError, match="/proc/x: cannot be written"):
        check_writable("/proc/x")
    check_writable(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pid", ["9" * 30, "-1", "x", ""])
def test_temporary_names_with_no_process_id(pid, tmp_path):
    (tmp_path / f".x.{socket.gethostname()}.{pid}.0.tmp").write_text("")
    with atomic_write(tmp_path / "x") as partial:
        partial.write_text("new")
    assert (tmp_path / "x").read_text() == "new"


def test_threads_have_temporary_names_of_their_own(tmp_path):
    names, barrier = [], threading.Barrier(4)

    def write(number: int) -> None:
        with atomic_write(tmp_path / "x") as partial:
            names.append(partial)
            barrier.wait()
            partial.write_text(str(number))
    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(names)) == 4 and (tmp_path / "x").read_text() in "0123"


@pytest.mark.parametrize("kind", ["folder", "in a file", "in no folder", "long name", "NUL"])
def test_files_that_cannot_be_read_are_named(kind, tmp_path):
    path = special(kind, tmp_path)
    with pytest.raises(UserError, match="cannot be read") as caught:
        cli.read_text(path, "prompt_file")
    assert caught.value.field == "prompt_file"


def test_a_file_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(cli, "MAX_TEXT", 1000)
    with pytest.raises(UserError, match="/dev/zero: has more than 1000 characters"):
        cli.read_text("/dev/zero")


# ---- the system's errors, and bugs

@pytest.mark.parametrize("code", cli.SYSTEM_REFUSALS)
@pytest.mark.parametrize("filename", [None, "some/file"])
def test_what_the_system_refuses_is_one_line(code, filename, refusal):
    def main(argv):
        raise OSError(code, os.strerror(code), filename)
    assert refusal(main) == f"error: {filename or 'the output'}: {os.strerror(code)}\n"


@pytest.mark.parametrize("bug", [ValueError("x"), OSError(errno.ENOENT, "x"), OSError("x"), MemoryError()])
def test_a_bug_keeps_its_traceback(bug):
    def main():
        raise bug
    with pytest.raises(type(bug)):
        cli.run(main)


# ---- streams

@pytest.mark.parametrize("body, status, says", [
    ("print('x' * 99999)", 2, "error: the output: No space left on device\n"),
    ("print('x')", 2, "error: the output: No space left on device\n"),
    ("raise SystemExit(0)", 0, ""),
    ("cli.Parser('x').parse_args(['--help'])", 2, "error: the output: No space left on device\n"),
    ("print('x'); raise cli.UserError('bad', 'flag')", 2, "error: the output: No space left on device\n"),
], ids=["at once", "at the end", "nothing", "help", "beside a mistake"])
def test_a_full_stdout(command, body, status, says):
    with open("/dev/full", "w") as full:
        process = command(body, stdout=full)
    assert (process.communicate()[1], process.returncode) == (says, status)


CLOSED = [("<&-", "print(repr(sys.stdin.read()))", 0, "''\n", ""),
          ("<&-", "input()", 1, "", "EOFError"),
          (">&-", "print('x'); os.write(1, b'x'); sys.stdout.isatty()", 0, "", ""),
          ("2>&-", "print('x', file=sys.stderr); print('y')", 0, "y\n", ""),
          ("2>&-", "raise cli.UserError('bad')", 2, "", ""),
          ("<&- >&- 2>&-", "print('x'); print('x', file=sys.stderr)", 0, "", "")]


@pytest.mark.parametrize("closed, body, status, out, err", CLOSED)
def test_closed_streams(command, tmp_path, closed, body, status, out, err):
    command(body).communicate()
    done = subprocess.run(f"{sys.executable} {tmp_path}/command.py {closed}", shell=True, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (status, out) and err in done.stderr and bool(err) == bool(done.stderr)


def test_a_reader_that_has_gone(command):
    process = command("for i in range(99999): print(i)")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_comes_out_in_any_encoding(command, encoding):
    process = command(r"print('aé你\udcff')", env={**os.environ, "PYTHONIOENCODING": encoding}, text=False)
    out, err = process.communicate()
    assert process.returncode == 0 and not err
    assert out.decode(encoding) == "aé你?\n".encode(encoding, "replace").decode(encoding)


def test_a_badly_encoded_stdin(command):
    process = command("cli.read_stdin()", stdin=subprocess.PIPE, text=False,
                      env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    err = process.communicate(b"\xff\xfe")[1].decode()
    assert process.returncode == 2 and err.startswith("error: --prompt - : stdin cannot be read")
    assert err.count("\n") == 1


# ---- Ctrl-C

SAY = "print('now', flush=True); "
SLEEP = SAY + "time.sleep(60)"
MOMENTS = {                                  # where the command is when the signal comes
    "imports": dict(body="pass", imports=SLEEP),
    "an import that catches everything": dict(body="pass", imports=f"try:\n    {SLEEP}\nexcept BaseException: pass"),
    "main": dict(body=SLEEP),
    "finally": dict(body=f"try:\n    raise ValueError\nfinally:\n    {SLEEP}"),
    "where exceptions are dropped": dict(body="a = A()\ndel a\ntime.sleep(60)",
                                         imports=f"class A:\n    def __del__(self):\n        {SLEEP}"),
    "the exit": dict(body=f"import atexit\n@atexit.register\ndef last():\n    {SLEEP}"),
    "a full stdout": dict(body=f"print('x' * 99999)\n{SLEEP}")}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_is_quiet(command, moment):
    process = command(**MOMENTS[moment])
    while process.stdout.readline() != "now\n":
        pass
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 130


def test_the_handler_is_for_our_commands_alone(command, tmp_path):
    assert not cli.IS_COMMAND and signal.getsignal(signal.SIGINT) is not cli._exit_quietly
    (tmp_path / "elsewhere").mkdir()
    command("pass").communicate()
    (tmp_path / "elsewhere" / "program.py").write_text(
        "import signal, sys; sys.path.insert(0, '..'); import cli; print(signal.getsignal(2).__name__)")
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path / "elsewhere", capture_output=True, text=True,
                          preexec_fn=allow_ctrl_c)
    assert done.stdout == "default_int_handler\n"


@pytest.mark.parametrize("path", [path for path in (*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"))
                                  if "cli.run(" in path.read_text() and path.name != "cli.py"], ids=lambda p: p.name)
def test_commands_import_cli_before_what_takes_long(path):
    imports = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    before = imports[:imports.index("cli")]
    assert not {*before} - {*sys.stdlib_module_names}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("argv", [["generate.py", "--num_samples", "1000"],
                                  ["generate.py", "--compile", "--interactive"],
                                  ["eval.py", "--perplexity", "tests/data/heldout.txt"],
                                  ["quantize.py", "--model", "checkpoints/demo", "--mode", "int4"]])
def test_ctrl_c_at_any_time(argv, tmp_path):
    """Counted from the moment that cli.py has been imported, which Python's report of imports tells."""
    for delay in (0, 0.1, 0.3, 1, 2, 3, 5, 8):
        process = subprocess.Popen([sys.executable, "-X", "importtime", *argv, "--device", "cpu"], cwd=ROOT,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True, preexec_fn=allow_ctrl_c,
                                   env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / str(delay))})
        while (line := process.stderr.readline()) and line.split()[-1:] != ["cli"]:
            pass
        timer = threading.Timer(delay, os.killpg, [process.pid, signal.SIGINT])
        timer.start()
        err = process.communicate(timeout=300)[1]
        timer.cancel()
        assert "Traceback" not in err and process.returncode in (130, 0), (delay, err)


# ---- every flag with every kind of value

NUMBERS = ["0", "-1", "3", "1e20", str(10 ** 20), "9" * 5000, "inf", "-inf", "nan", "٣", "1_0", "x", "", "0x10"]
PATHS = ["\0", "a\0b", "x" * 300, "x" * 5000, "/dev/null", "/dev/zero", "/", ".", "/nowhere/x", "/etc/passwd/x",
         "\udcff", "-"]
COMMANDS = {"generate": generate, "quantize": quantize, "eval": eval_command, "serve": serve}


def flags(module) -> list[argparse.Action]:
    """All that take values."""
    with mock.patch.object(cli.Parser, "parse_args", lambda self, argv: self):
        parser = module.parse_args([])
    return [action for action in parser._actions if action.option_strings and action.nargs != 0]


CASES = [(name, action.option_strings[-1 if action.option_strings[0][1] != "-" else 0])
         for name, module in COMMANDS.items() for action in flags(module)
         if name != "serve" or action.option_strings not in [known.option_strings for known in flags(generate)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import loading
    folder = tiny.save(tiny.reference("qwen3-tied"), tmp_path_factory.mktemp("tiny"))
    loading.load_model(folder)
    return folder


@pytest.fixture
def checked(folder, monkeypatch):
    """The commands, less what they do when everything has been checked."""
    done = []
    monkeypatch.setattr(generate, "run_samples", lambda *args: done.append(1))
    monkeypatch.setattr(generate, "chat", lambda *args: done.append(1))
    monkeypatch.setattr(quantize, "quantize_checkpoint", lambda path, *args, **more: done.append(1) or path)
    monkeypatch.setattr(serve, "serve", lambda server, listening: listening.close() or done.append(1))
    monkeypatch.setattr(eval_command, "perplexity", lambda *args: eval_command.TextScore(1.0, 1, 1))
    monkeypatch.setattr(eval_command.harness, "evaluate", lambda *args, **more: None)
    monkeypatch.setattr(eval_command, "compare", lambda *args: iter(()))
    monkeypatch.setattr(cli, "MAX_TEXT", 1 << 20)
    monkeypatch.setattr(quantize, "calibration_texts", lambda args, path: ["a b c d e f g h " * 9999])
    return {"generate": [], "eval": ["--perplexity", str(ROOT / "tests" / "data" / "heldout.txt")],
            "quantize": ["--mode", "int4-gptq"], "serve": ["--port", "0"]}


@pytest.mark.parametrize("name, flag", CASES, ids=map(" ".join, CASES))
def test_any_value_is_used_or_refused_in_a_line(name, flag, folder, checked, capsys, tmp_path, monkeypatch):
    """Nothing else: no traceback, no endless loop, no allocation that is not checked first."""
    monkeypatch.chdir(tmp_path)
    for value in (*NUMBERS, *PATHS):
        argv = ["--model", str(folder), "--device", "cpu", *checked[name], f"{flag}={value}"]
        try:
            cli.run(lambda: COMMANDS[name].main(argv))  # noqa: B023
        except SystemExit as ended:
            lines = [line for line in capsys.readouterr().err.splitlines() if line] or ["nothing"]
            assert ended.code == 2 and lines[-1].startswith("error: ") and len(lines) < 4, (value[:99], lines)
        except BaseException as error:
            raise AssertionError(f"{flag} {value[:99]!r} raised {error!r}") from error
        capsys.readouterr()
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name, argv, says", [
    ("generate", ["--batch_size", "1000000000"], "--batch_size 1000000000 must be at most 65536"),
    ("generate", ["--prompt_file", "/dev/zero"], "--prompt_file /dev/zero: has more than"),
    ("generate", ["--prompt_file", "/"], "--prompt_file /: cannot be read: Is a directory"),
    ("generate", ["--prompt", ""], "--prompt is empty"), ("generate", ["--seed", str(10 ** 20)], "--seed 1"),
    ("generate", ["--profile", "/dev/null"], "--profile /dev/null: cannot be written"),
    ("generate", ["--profile", "x", "--interactive"], "--profile is of samples"),
    ("generate", ["--draft", "ngram", "--speculate_k", "x"], "--speculate_k 'x' is neither"),
    ("eval", ["--perplexity", "/dev/zero"], "--perplexity /dev/zero: has more than"),
    ("eval", ["--perplexity", "x", "--limit", "inf"], "--limit inf must be"),
    ("eval", ["--perplexity", "x", "--limit", "nan"], "--limit nan must be"),
    ("eval", ["--perplexity", "x", "--seed", str(1 << 32)], "--seed 4294967296 must be less than 2^32"),
    ("eval", ["--tasks", "x", "--batch_size", "9" * 5000], "--batch_size 999"),
    ("eval", ["--tasks", "x", "--include_path", "/nowhere"], "--include_path /nowhere: no such folder"),
    ("eval", ["--tasks", "x", "--output_path", "/dev/null"], "--output_path /dev/null/results.json: cannot be written"),
])
def test_what_needs_no_model_is_checked_before_one_is_loaded(name, argv, says, monkeypatch, refusal):
    monkeypatch.setattr(COMMANDS[name], "load_model", lambda *args, **more: pytest.fail("a model is loaded"))
    monkeypatch.setattr(cli, "MAX_TEXT", 1 << 20)
    assert says in refusal(COMMANDS[name].main, *argv, "--device", "cpu")


def test_process_substitution(folder):
    argv = f"{sys.executable} {ROOT}/generate.py --model {folder} --device cpu -n 1 --num_samples 1 --quiet"
    done = subprocess.run(["bash", "-c", f"{argv} --prompt_file <(echo hello)"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("hello\n"), done.stderr
