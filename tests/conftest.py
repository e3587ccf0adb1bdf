import os
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:      # before torch reads it: one core a worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

import tiny

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
hypothesis.settings.register_profile("same examples every time", derandomize=True)
hypothesis.settings.load_profile("same examples every time")
EOS = 256                                    # of tiny's tokenizer


@pytest.fixture(autouse=True, scope="module")
def fresh_compiler():
    """What one file's tests compiled must not count towards another's recompilation limits, which a function has once
    in a process."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """family -> the folder of a tiny random checkpoint with its model.pth. What writes there writes to a copy."""
    import tiny
    from convert import convert
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            if family in tiny.QWEN_V1:
                tiny.save_qwen_v1(tiny.reference("qwen2", num_key_value_heads=4), path, **tiny.QWEN_V1[family])
            else:
                tiny.save(tiny.reference(family), path)
            convert(path, progress=False)
            made[family] = path
        return made[family]
    return folder


# ---- a tiny checkpoint, for test_eval and test_harness

def save_for_eval(family: str, folder: Path) -> Path:
    """A tiny checkpoint that never generates an id which its tokenizer does not have."""
    model = tiny.reference(family, eos_token_id=EOS)
    model.lm_head.weight[EOS + 1:] = 0
    return tiny.save(model, folder)


@pytest.fixture(scope="session")
def eval_folder(tmp_path_factory) -> Path:
    return save_for_eval("qwen3-tied", tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="session")
def eval_model(eval_folder):
    """(model in fp32, tokenizer)"""
    from loading import load_model
    return load_model(eval_folder, "cpu", torch.float32)


@pytest.fixture(scope="session")
def hf_model(eval_folder):
    """The same in transformers."""
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(eval_folder, dtype=torch.float32)


@torch.inference_mode()
def expected_logprobs(hf_model, context, continuation, max_length=512):
    """(log-probability, greedy) of a continuation by transformers, alone and without a cache."""
    tokens = (context + continuation)[-(max_length + 1):]
    logits = hf_model(torch.tensor([tokens[:-1]])).logits[0, -len(continuation):].log_softmax(-1)
    target = torch.tensor(continuation)
    return logits.gather(1, target[:, None]).sum().item(), bool((logits.argmax(-1) == target).all())


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


def peak_growth(statement: str, imports: str) -> int:
    """By how many bytes the resident memory of a new process grows at most, mapped pages included."""
    script = f"""if True:
        import re
        from pathlib import Path
        {imports}

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        before = peak()
        {statement}
        print(peak() - before)"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    return int(done.stdout)
