"""What the README tells people to type works, and what it says of files and flags is true."""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import tiny
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
TABLE_NAMES = re.compile(r"^\| (`.*?) \|", re.MULTILINE)           # files
SHORTER = {                                          # what a command gets so that it ends soon
    "generate.py": ["-n", "4", "--num_samples", "1", "--device", "cpu"],
    "eval.py": ["--device", "cpu", "--max_seq_length", "256"],
    "quantize.py": []}


def test_the_chinese_readme_has_the_same_code():
    """All blocks of code in the same order, so that the tests below run its commands too, and the same files and
    links."""
    chinese = (ROOT / "README_zh.md").read_text()
    blocks = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    assert blocks.findall(chinese) == blocks.findall(README)
    headings, tables = re.compile(r"^#+ ", re.MULTILINE), re.compile(r"^\|.*", re.MULTILINE)
    assert headings.findall(chinese) == headings.findall(README)
    assert [row.count("|") for row in tables.findall(chinese)] == [row.count("|") for row in tables.findall(README)]
    assert TABLE_NAMES.findall(chinese) == TABLE_NAMES.findall(README)
    assert "](README_zh.md)" in README and "](README.md)" in chinese
    for name in re.findall(r"\]\(([\w./-]+)[)#]", chinese):
        assert (ROOT / name).exists(), name


def test_two_commands_come_first():
    first = BLOCKS[0].splitlines()
    assert len(first) == 2 and first[0] == "pip install -r requirements.txt && python generate.py --compile"
    assert first[1] == "pytest" and (ROOT / ".ci" / "run").exists()


def test_it_is_short():
    assert len(README.split()) <= 1300


def test_files_in_the_table_exist():
    rows = TABLE_NAMES.findall(README)
    names = [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    files = [name for name in names if name.endswith((".py", "/"))]
    assert len(files) > 12
    for name in [*files, *re.findall(r"\]\(([\w./-]+)[)#]", README)]:
        assert (ROOT / name).exists(), name
    for path in ROOT.glob("*.py"):
        assert path.name in files, f"{path.name} is not in the README's table"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project with tiny checkpoints, one of them as if it had been downloaded, and a short text."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("demo", "demo-draft", "Qwen/Qwen3-0.6B"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        reference = tiny.reference("qwen3-tied", seed=len(name), max_position_embeddings=2048)
        tiny.save(reference, folder / "checkpoints" / name)
    (folder / "tests" / "data").mkdir(parents=True)
    (folder / "tests" / "data" / "heldout.txt").write_text((ROOT / "tests" / "data" / "heldout.txt").read_text()[:600])
    shutil.copytree(ROOT / "tests" / "lm_eval_tasks", folder / "tests" / "lm_eval_tasks")
    return folder


@pytest.fixture
def inside(project, monkeypatch):
    import loading
    import quantize
    monkeypatch.chdir(project)
    monkeypatch.setattr(loading, "CHECKPOINTS", project / "checkpoints")
    monkeypatch.setattr(quantize, "DEMOS", (project / "checkpoints" / "demo",))
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    return project


PYTHON = [command for command in COMMANDS if command.startswith("python ") and "serve.py" not in command]


@pytest.mark.slow
@pytest.mark.parametrize("command", PYTHON)
def test_command(inside, command, capsys):
    script, *argv = shlex.split(command.removeprefix("python "))
    shorter = ["--calibration_limit", "8", "--calibration_seq_length", "64"] if "int4-gptq" in argv else SHORTER[script]
    importlib.import_module(script.removesuffix(".py")).main(argv + shorter)
    assert capsys.readouterr().out


@pytest.mark.slow
def test_torchrun(inside):
    (command,) = [command for command in COMMANDS if command.startswith("torchrun ")]
    command = command.replace("generate.py", str(ROOT / "generate.py")).removeprefix("torchrun")
    launch = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command), *SHORTER["generate.py"]]
    done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "Average tokens/sec" in done.stdout, done.stderr


def test_no_other_commands():
    """What the tests above do not run is the first block, which CI runs as it stands, and what test_serve.py runs."""
    assert all(command.startswith(("python ", "torchrun ", "curl ")) for command in COMMANDS[2:])


def test_the_python_example_streams_text(inside, capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert "😀" in example
    example = example.replace("compile=True", "compile=False").replace("=100", "=5")
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out
