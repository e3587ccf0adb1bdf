"""Makes the three local tasks' questions, *.json beside this file, from the held-out text.

    python tests/lm_eval_tasks/build.py

heldout_choice: which of four lines comes next.  heldout_rolling: the perplexity of whole documents.
heldout_line: write the next line.
The yaml files name load() and its file, which are found beside them from any working directory.
"""
import json
import random
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def load(file: str, **metadata):
    """The splits of one task, from its file."""
    import datasets
    splits = json.loads((FOLDER / file).read_text("utf-8"))
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})


def questions(lines: list[str], rng: random.Random, number: int) -> list[dict]:
    """Five lines of code and four candidates for the sixth, of which the others are from elsewhere."""
    usable = [i for i in range(5, len(lines))
              if 24 <= len(lines[i].strip()) <= 72 and sum(map(len, lines[i - 5:i])) >= 80]
    rows = []
    for i in rng.sample(usable, number):
        others = rng.sample([j for j in usable if lines[j] != lines[i]], 3)
        answer = rng.randrange(4)
        choices = [lines[j] for j in others]
        choices.insert(answer, lines[i])
        rows.append({"context": "\n".join(lines[i - 5:i]) + "\n", "choices": choices, "answer": answer})
    return rows


def next_lines(lines: list[str], rng: random.Random, number: int) -> list[dict]:
    usable = [i for i in range(6, len(lines)) if 4 <= len(lines[i].strip()) <= 30]
    return [{"context": "\n".join(lines[i - 6:i]) + "\n", "line": lines[i]} for i in rng.sample(usable, number)]


def documents(text: str, rng: random.Random) -> list[dict]:
    sizes = [150, 300, 600, 700, 900, 1200, 1500, 2500, 5000]
    starts = [rng.randrange(len(text) - size) for size in sizes]
    return [{"text": text[start:start + size]} for start, size in zip(starts, sizes, strict=True)]


def main() -> None:
    text, rng = (FOLDER.parent / "data" / "heldout.txt").read_text("utf-8"), random.Random(0)
    lines = [line for line in text.split("\n") if line.strip()]
    files = {"choice.json": {"train": questions(lines, rng, 8), "test": questions(lines, rng, 64)},
             "rolling.json": {"test": documents(text, rng)},
             "line.json": {"train": next_lines(lines, rng, 8), "test": next_lines(lines, rng, 24)}}
    for name, splits in files.items():
        (FOLDER / name).write_text(json.dumps(splits, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
