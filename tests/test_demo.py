"""The bundled checkpoints: what the README says of them."""
import ast
import math
import re

import pytest
import torch
from conftest import ROOT

import formats
from generate import Engine, Sampling, load_model
from tokenizer import same_tokenizer

HELDOUT = (ROOT / "tests" / "data" / "heldout.txt").read_text("utf-8")
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def demo():
    return load_model(ROOT / "checkpoints" / "demo" / "model.pth", "cpu", torch.float32)


@pytest.fixture(scope="module")
def draft():
    return load_model(ROOT / "checkpoints" / "demo-draft" / "model.pth", "cpu", torch.float32)


@torch.inference_mode()
def bits_per_byte(model, tokenizer, text, window=1024):
    """Windows overlap by half; each token is scored once, the first after <|endoftext|>."""
    ids = torch.tensor([tokenizer.control["<|endoftext|>"], *tokenizer.encode(text)])
    model.setup_caches(1, window)
    total, scored = 0.0, 1
    while scored < len(ids):
        begin = max(0, scored - window // 2)
        piece = ids[begin:begin + window]
        pos = torch.arange(len(piece) - 1)
        losses = torch.nn.functional.cross_entropy(model(piece[None, :-1], pos, pos)[0], piece[1:], reduction="none")
        total += losses[scored - begin - 1:].sum().item()
        scored = begin + len(piece)
    return total / math.log(2) / len(text.encode())


@pytest.mark.slow
def test_held_out_bits_per_byte_are_as_the_readme_says(demo, draft):
    said = [float(x) for x in re.search(r"the demo reaches (\d\.\d+) bits per byte and the draft (\d\.\d+)", README).groups()]
    got = [bits_per_byte(*demo, HELDOUT), bits_per_byte(*draft, HELDOUT)]
    assert got[0] < 1.20
    assert got == pytest.approx(said, abs=0.006)


def test_demo_writes_python_after_quicksort(demo):
    """Of six samples of 120 tokens some hold statements, and the lines before the last form a function that Python can parse."""
    model, tokenizer = demo
    generator, parsed = Engine(model, tokenizer), 0
    for seed in range(6):
        text = "def quicksort(arr):\n"
        for row in generator.generate(tokenizer.encode(text), 120, Sampling(0.7), seed=seed):
            text += tokenizer.decode([row[0]])
        lines = text.splitlines()
        function = max(("\n".join(lines[:n]) for n in range(2, len(lines) + 1) if _parses("\n".join(lines[:n]))), key=len, default="")
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
    assert sum(f.stat().st_size for name in ("demo", "demo-draft") for f in (ROOT / "checkpoints" / name).iterdir() if f.suffix != ".pth") < 16e6


def test_int8_decodes_as_bf16_does():
    """On 10 held-out prompts the first 64 greedy tokens are mostly the same; what differs are near-ties."""
    texts = []
    for mode in (None, "int8"):
        model, tokenizer = load_model(ROOT / "checkpoints" / "demo" / "model.pth", "cpu", torch.bfloat16)
        if mode:
            formats.quantize_model(model, mode)
        generator, step = Engine(model, tokenizer), len(HELDOUT) // 10
        prompts = [tokenizer.encode(HELDOUT[i * step:i * step + 400])[:64] for i in range(10)]
        texts.append([list(generator.generate(prompt, 64, Sampling(0), stop_ids=frozenset())) for prompt in prompts])
    assert sum(a == b for a, b in zip(*texts)) >= 8
