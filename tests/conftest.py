import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True, scope="module")
def fresh_compiler():
    """What one file's tests compiled must not count towards another's recompilation limits, which hold for a function in a whole process."""
    import torch
    yield
    torch.compiler.reset()


@pytest.fixture
def refusal(capsys):
    """Runs a command that must refuse what it is given: returns its one line on stderr."""
    import cli

    def run(main, *argv):
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: main(list(map(str, argv))))
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error
    return run
