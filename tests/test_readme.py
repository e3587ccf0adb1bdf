"""What the README tells people to type exists as it says."""
import re
import subprocess
import sys

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if "python " in line or line.startswith("torchrun")]


def test_two_commands_come_first():
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL)[1].splitlines()
    assert len(first) == 2 and first[0].startswith("pip install -r requirements.txt && python generate.py") and first[1].startswith("pytest")
    assert (ROOT / ".ci" / "run").exists()


@pytest.mark.parametrize("script", sorted({re.search(r"(\S+\.py)", c)[1] for c in COMMANDS}))
def test_flags_exist(script):
    """Every flag that the README gives to a script is in the script's own help."""
    help_text = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True).stdout
    for command in COMMANDS:
        if script in command:
            for flag in re.findall(r"\s(--\w+)", command.split(script, 1)[1]):
                assert flag in help_text, f"{command}: {script} has no {flag}"


def test_files_in_the_table_exist():
    for name in re.findall(r"^\| `([\w./]+)`", README, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_the_python_example_runs(tmp_path):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].replace("compile=True", "compile=False").replace("=100", "=5")
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
