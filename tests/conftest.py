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
