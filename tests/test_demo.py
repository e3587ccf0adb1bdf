"""The bundled checkpoints: what BENCHMARKS.md says of them."""
import ast
import math
import re

import pytest
import torch

from conftest import ROOT
from generate import Engine
from loading import load_model
from quantize import quantize_model
from sampling import Sampling
from tokenizer import same_tokenizer

HELDOUT = (ROOT / "tests" / "data" / "heldout.txt").read_text("utf-8")
DEMO, DRAFT = (ROOT / "checkpoints" / name for name in ("demo", "demo-draft"))


@pytest.fixture(scope="module")
def demo():
    return load_model(DEMO, "cpu", torch.float32)


@pytest.fixture(scope="module")
def draft():
    return load_model(DRAFT, "cpu", torch.float32)


@torch.inference_mode()
def bits_per_byte(model, tokenizer, text, window=1024):
    """Windows overlap by half; each token is scored once, the first after <|endoftext|>."""
    ids = torch.tensor([tokenizer.control["<|endoftext|>"], *tokenizer.encode(text)])
    model.setup_caches(1, window)
    total, scored = 0.0, 1
    while scored < len(ids):
        begin = max(0, scored - window // 2)
        chunk = ids[begin:begin + window]
        pos = torch.arange(len(chunk) - 1)
        logits = model(chunk[None, :-1], pos, pos[scored - begin - 1:])[0]
        total += torch.nn.functional.cross_entropy(logits, ids[scored:begin + window], reduction="sum").item()
        scored = begin + len(chunk)
    return total / math.log(2) / len(text.encode())


@pytest.mark.slow
@pytest.mark.long
def test_held_out_bits_per_byte_are_as_stated(demo, draft):
    stated = " ".join((ROOT / "BENCHMARKS.md").read_text().split())
    stated = re.search(r"the demo reaches (\d\.\d+) bits per byte and the draft (\d\.\d+)", stated).groups()
    got = [bits_per_byte(*demo, HELDOUT), bits_per_byte(*draft, HELDOUT)]
    assert got[0] < 1.20
    assert got == pytest.approx([float(x) for x in stated], abs=0.006)


def test_demo_writes_python_after_quicksort(demo):
    """Of twelve samples of 120 tokens some hold statements, and the lines before the last form a function that Python
    can parse."""
    model, tokenizer = demo
    engine, parsed = Engine(model, tokenizer), 0
    for seed in range(12):
        text = "def quicksort(arr):\n"
        for row in engine.generate(tokenizer.encode(text), 120, Sampling(0.7), seed=seed):
            text += tokenizer.decode([row[0]])
        lines = text.splitlines()
        beginnings = ["\n".join(lines[:n]) for n in range(2, len(lines) + 1)]
        function = max(filter(_parses, beginnings), key=len, default="")
        parsed += bool(re.search(r"^ +(return|for|if|while|self|\w+ =)", function, re.MULTILINE))
    assert parsed >= 2


def _parses(source):
    try:
        return bool(ast.parse(source).body[0].body)
    except (SyntaxError, IndexError):
        return False


def test_demo_ends_its_turn(demo):
    model, tokenizer = demo
    prompt = tokenizer.render_chat([{"role": "user", "content": "Write the function push: Add an item to the list."}])
    answer = [row[0] for row in Engine(model, tokenizer).generate(prompt, 400, Sampling(temperature=0))]
    assert 5 < len(answer) < 400 and tokenizer.decode(answer).lstrip().startswith("def ")


def test_draft_shares_the_tokenizer_and_is_much_smaller(demo, draft):
    assert same_tokenizer(demo[1], draft[1]) is None
    sizes = [sum(p.numel() for p in model.parameters()) for model, _ in (demo, draft)]
    assert 5e6 < sizes[0] < 7.5e6 and sizes[1] < sizes[0] / 5
    files = [file for folder in (DEMO, DRAFT) for file in folder.iterdir() if file.suffix != ".pth"]
    assert sum(file.stat().st_size for file in files) < 16e6


@pytest.mark.slow
@torch.inference_mode()
def test_int8_decodes_as_bf16_does(demo):
    """64 greedy tokens after each of 10 held-out prompts: int8 would choose most of them, else fp32 nearly ties."""
    model, tokenizer = load_model(DEMO, "cpu", torch.bfloat16)
    exact, _ = demo
    step = len(HELDOUT) // 10
    prompts = [tokenizer.encode(HELDOUT[i * step:i * step + 400])[:64] for i in range(10)]

    engine = Engine(model, tokenizer)
    texts = [prompt + sum(engine.generate(prompt, 64, Sampling(0), stop_ids=frozenset()), []) for prompt in prompts]
    quantize_model(model, "int8")
    model.setup_caches(1, 128)
    exact.setup_caches(1, 128)
    same, everywhere = 0, torch.arange(127)
    for text in texts:
        ids, chosen = torch.tensor([text[:-1]]), torch.tensor(text[64:])
        passes = [everywhere[:64], *everywhere[64:, None]]                     # the prompt, then token by token
        best = torch.cat([model(ids[:, positions], positions)[0] for positions in passes]).argmax(-1)
        logits = exact(ids, everywhere, everywhere)[0, 63:]
        gaps = logits.gather(1, chosen[:, None]) - logits.gather(1, best[:, None])
        assert gaps.abs().max() < 0.2
        same += int((best == chosen).sum())
    assert same >= 0.98 * 10 * 64, same
