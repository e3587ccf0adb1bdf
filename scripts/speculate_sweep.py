"""Speculative decoding against plain decoding: pairs of models, formats, k and prompts, in one table with a verdict.

    python scripts/speculate_sweep.py --checkpoint_path checkpoints/inflated --draft_checkpoint_path checkpoints/demo-draft --speculate_k auto 1 2 4 8
    python scripts/speculate_sweep.py --configs experiments.json --out results

experiments.json is a list of objects with the fields of Experiment. Every experiment runs in processes of its own; plain and speculative samples take
turns; the speed-up is that of decoding, after the first token. The table and a verdict go to stdout, sweep.csv, sweep.json and sweep.png to --out.
"""
import argparse
import csv
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import formats
import tp
from cli import UserError, run
from generate import bytes_read_per_token, DEMO, Engine, memory_used, stream, warm_up
from loading import load_model, parse_device
from sampling import Sampling
from speculate import Speculator, Statistics, predicted_speedup

ROOT = Path(__file__).resolve().parent.parent
NGRAM = "ngram"
FUNCTION = '''def read_items(path, separator=","):
    """Return the items of every line of a file."""
    items = []
    with open(path) as file:
        for line in file:
            line = line.strip()
            if not line:
                continue
            for item in line.split(separator):
                items.append(item.strip())
    return items
'''
PROMPTS = {
    "code": ['class Stack:\n    """A list of items, the last one first."""\n\n    def __init__(self, items=()):\n        self.items = list(items)\n\n    def push(self, item):\n',
             "import unittest\n\n\nclass TestQueue(unittest.TestCase):\n\n    def setUp(self):\n        self.queue = Queue(maxsize=3)\n\n    def test_put(self):\n"],
    "prose": ['"""This module provides a simple way to read and write the files of a project.\n\nThe most important class is Project, which holds the names of all files and',
              "# The old behaviour was to raise an error when the file could not be found.  This has been changed, because most of\n# the users"],
    "copying": [f"# Edit this function: rename it to read_all.\n\n{FUNCTION}\n\n# The same function again:\n\n{FUNCTION}\n\n# The same function again:\n\ndef",
                f"{FUNCTION}\n\n{FUNCTION.replace('read_items', 'read_names')}\n\n{FUNCTION.replace('read_items', 'read_words')}\n\ndef read_all("],
}
HELDOUT = [ROOT / "tests" / "data" / "heldout.txt", (20_000, 60_000, 100_000, 140_000), 600]     # a file, where prompts begin in it, characters
COLUMNS = {"number": "", "draft_model": "DRAFT_MODEL", "draft_quantization": "draft quantization", "speculate_k": "speculate_k", "model": "MODEL",
           "model_quantization": "model quantization", "device": "device", "nproc_per_node": "nproc_per_node", "compile": "compile", "prompt": "prompt",
           "compile_prefill": "compile_prefill", "rate": "average tokens/sec", "memory": "memory used GB", "bandwidth": "bandwidth GB/s",
           "mean_accepted": "Mean Accepted", "max_new_tokens": "max_new_tokens", "num_samples": "num_samples", "temperature": "temperature",
           "torch": "torch version", "speedup": "speed-up", "predicted": "formula", "best_k": "predicted best k"}


@dataclass(frozen=True)
class Experiment:
    """checkpoint_path and draft_checkpoint_path: files or folders; the latter may be "ngram". speculate_k: a number or "auto". prompt: of PROMPTS."""
    checkpoint_path: str = str(DEMO)
    draft_checkpoint_path: str = NGRAM
    speculate_k: int | str = "auto"
    prompt: str = "code"
    temperature: float = 0.0
    compile: bool = True
    compile_prefill: bool = False
    max_new_tokens: int = 200
    num_samples: int = 3
    nproc_per_node: int = 1
    device: str = "cpu"


# ---- one experiment, in its own process

def measure(experiment: Experiment, ranks: tp.Ranks | None) -> dict:
    device = parse_device(experiment.device)
    device = ranks.take_device(device) if ranks else device
    model, tokenizer = load_model(experiment.checkpoint_path, device, None, ranks)
    draft = None
    if experiment.draft_checkpoint_path != NGRAM:
        draft = Engine(*load_model(experiment.draft_checkpoint_path, device, model.dtype, ranks, may_replicate=True), compile_prefill=experiment.compile_prefill)
    speculator = Speculator(model, tokenizer, draft, None, experiment.compile, experiment.compile_prefill)
    sampling, rounds = Sampling(experiment.temperature), []
    for text in texts_of(experiment.prompt):
        request = dict(max_new_tokens=experiment.max_new_tokens, sampling=sampling, stop_ids=frozenset())
        prompts, speculator.k = [tokenizer.encode(text)], None
        warm_up(speculator, prompts, request)                    # measures the costs of every k
        speculator.k = None if experiment.speculate_k == "auto" else int(experiment.speculate_k)
        warm_up(speculator, prompts, request)
        for sample in range(experiment.num_samples):
            timing = {}
            for enabled in (False, True) if sample % 2 else (True, False):
                speculator.enabled, before = enabled, speculator.statistics
                speculator.statistics = Statistics([])
                timing[enabled] = stream(speculator, tokenizer, prompts, show=False, **request, seed=sample)[1]
                if not enabled:
                    speculator.statistics = before
            rounds.append(dict(plain=timing[False].total, seconds=timing[True].total, speedup=timing[True].decode_rate / timing[False].decode_rate,
                               counts=list(speculator.statistics.counts), tested=speculator.statistics.tested,
                               passes=speculator.statistics.passes + 1))
        speculator.enabled = True
    costs = speculator.costs
    return dict(rounds=rounds, plain=costs.plain, draft=costs.draft, verify=list(costs.verify.items()), weights=bytes_read_per_token(model),
                memory=memory_used(device))


def texts_of(kind: str) -> list[str]:
    if kind != "held out":
        return PROMPTS[kind]
    path, starts, length = HELDOUT
    text = path.read_text("utf-8")
    return [text[start:start + length] for start in starts]


def worker(path: Path) -> None:
    with tp.joined() as ranks:
        content = json.loads(path.read_text())
        result = measure(Experiment(**content), ranks)
        if not ranks or ranks.first:
            path.write_text(json.dumps(result))


def run_apart(experiment: Experiment) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experiment.json"
        path.write_text(json.dumps(asdict(experiment)))
        launch = [sys.executable]
        if experiment.nproc_per_node > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(experiment.nproc_per_node)]
        done = subprocess.run([*launch, __file__, "--worker", str(path)], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"experiment {experiment}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}")
        return json.loads(path.read_text())


# ---- the table

def row_of(number: int, experiment: Experiment, found: dict) -> dict:
    """One line of the table. The speed-up is the median over the samples, the prompt's pass included in both times."""
    rounds, new = found["rounds"], experiment.max_new_tokens
    counts = [sum(column) for column in itertools.zip_longest(*(r["counts"] for r in rounds), fillvalue=0)]
    accepted, tested = sum(n * count for n, count in enumerate(counts)), sum(r["tested"] for r in rounds)
    a, c = accepted / tested if tested else 0.0, found["draft"] / found["plain"]
    v = {int(k): seconds / found["plain"] for k, seconds in found["verify"]}
    by_k = {k: predicted_speedup(a, k, c, v[k]) for k in v} if tested else {}
    best_k = max([0, *by_k], key=lambda k: by_k.get(k, 1.0))
    asked = best_k if experiment.speculate_k == "auto" else int(experiment.speculate_k)
    seconds = sum(r["seconds"] for r in rounds)
    return dict(number=number, draft_model=name_of(experiment.draft_checkpoint_path), draft_quantization=format_of(experiment.draft_checkpoint_path),
                speculate_k=experiment.speculate_k, model=name_of(experiment.checkpoint_path), model_quantization=format_of(experiment.checkpoint_path),
                device=experiment.device, nproc_per_node=experiment.nproc_per_node, compile=experiment.compile, prompt=experiment.prompt,
                compile_prefill=experiment.compile_prefill, rate=len(rounds) * new / seconds, plain_rate=len(rounds) * new / sum(r["plain"] for r in rounds),
                memory=found["memory"], bandwidth=found["weights"] * sum(r["passes"] for r in rounds) / seconds / 1e9,
                mean_accepted=accepted / sum(counts) if counts and sum(counts) else 0.0, max_new_tokens=new, num_samples=experiment.num_samples,
                temperature=experiment.temperature, torch=torch.__version__, speedup=statistics.median(r["speedup"] for r in rounds),
                predicted=by_k.get(asked, 1.0), best_k=best_k, acceptance=a, draft_cost=c, verify_cost=v, by_k=by_k)


def name_of(path: str) -> str:
    return path if path == NGRAM else Path(path).parent.name if Path(path).suffix == ".pth" else Path(path).name


def format_of(path: str) -> str:
    """As the checkpoint itself says."""
    if path == NGRAM:
        return "none"
    file = Path(path) if Path(path).suffix == ".pth" else Path(path) / "model.pth"
    quantization = loading.read_checkpoint(file)[1]
    return quantization.mode if quantization else "none"


def table(rows: list[dict]) -> str:
    def text(value) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)
    lines = [list(COLUMNS.values())] + [[text(row[key]) for key in COLUMNS] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(COLUMNS), *lines[1:]])


def verdict(rows: list[dict]) -> str:
    """In a sentence: the best that was measured, or what stands in the way."""
    best = max(rows, key=lambda row: row["speedup"])
    if best["speedup"] >= 1.03:
        k = f"k={best['speculate_k']}" + (f", which is mostly {best['best_k']}" if best["speculate_k"] == "auto" else "")
        return f"pays: {best['speedup']:.2f}x at {k} ({best['draft_model']} for {best['model']}, {best['prompt']})"
    a, c = best["acceptance"], best["draft_cost"]
    bearable = max(((predicted_speedup(a, k, 0, 1) - v) / k for k, v in best["verify_cost"].items()), default=0.0)
    if bearable <= 0:
        return f"does not pay: of the drafted tokens {100 * a:.0f} % are accepted, too few for any draft"
    return f"does not pay: the draft costs {c:.2f} of a target step; it would have to cost less than {bearable:.2f}"


def write(rows: list[dict], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "sweep.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(COLUMNS.values())
        lines.writerows([row[key] for key in COLUMNS] for row in rows)
    (out / "sweep.json").write_text(json.dumps(dict(rows=rows, verdict=verdict(rows)), indent=1))
    if importlib.util.find_spec("matplotlib"):
        plot(rows, out / "sweep.png")
    else:
        print("skipped: the plot: matplotlib is not installed (pip install -r requirements-bench.txt)", file=sys.stderr)


def plot(rows: list[dict], path: Path) -> None:
    """tokens/s against k, a line for each pair and prompt; auto and plain decoding as levels."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5))
    def of(row: dict) -> tuple:
        return row["model"], row["model_quantization"], row["draft_model"], row["draft_quantization"], row["prompt"], row["temperature"]
    for (model, _, draft, kind, prompt, temperature), same in itertools.groupby(sorted(rows, key=of), key=of):
        same = list(same)
        points = sorted([(0, statistics.mean(r["plain_rate"] for r in same))] + [(r["speculate_k"], r["rate"]) for r in same if r["speculate_k"] != "auto"])
        (line,) = axes.plot(*zip(*points), marker="o", label=f"{draft}{'' if kind == 'none' else ' ' + kind} for {model}, {prompt}, T={temperature:g}")
        for row in same:
            if row["speculate_k"] == "auto":
                axes.axhline(row["rate"], linestyle="--", color=line.get_color(), linewidth=1)
    axes.set(xlabel="k (0: plain decoding; dashed: auto)", ylabel="tokens/s", ylim=(0, None))
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")


# ---- the command

def experiments_from(args: argparse.Namespace) -> list[Experiment]:
    if args.configs:
        try:
            known, given = {f.name for f in fields(Experiment)}, json.loads(args.configs.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--configs {args.configs}: {error}") from None
        if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
            raise UserError(f"--configs {args.configs}: not a list of experiments")
        if unknown := sorted({key for one in given for key in one} - known):
            raise UserError(f"--configs {args.configs}: unknown field {unknown[0]!r} (known: {', '.join(sorted(known))})")
        found = [Experiment(**one) for one in given]
    else:
        shared = dict(checkpoint_path=args.checkpoint_path, compile=args.compile, compile_prefill=args.compile_prefill, num_samples=args.num_samples,
                      max_new_tokens=args.max_new_tokens, device=args.device, nproc_per_node=args.nproc_per_node)
        found = [Experiment(draft_checkpoint_path=draft, speculate_k=k if k == "auto" else number(k), prompt=prompt, temperature=temperature, **shared)
                 for draft in args.draft_checkpoint_path for prompt in args.prompts for temperature in args.temperature for k in args.speculate_k]
    for one in found:
        if one.prompt not in (*PROMPTS, "held out"):
            raise UserError(f"prompt {one.prompt!r} is not known (known: {', '.join(PROMPTS)})")
    return found


def number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--speculate_k {text!r} must be a number from 1 on, or auto")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, help="a JSON file of experiments, in place of the flags below")
    parser.add_argument("--checkpoint_path", default=str(DEMO))
    parser.add_argument("--draft_checkpoint_path", nargs="+", default=[NGRAM], help=f"checkpoints, or {NGRAM}")
    parser.add_argument("--speculate_k", nargs="+", default=["auto"])
    parser.add_argument("--prompts", nargs="+", choices=[*PROMPTS, "held out"], default=list(PROMPTS))
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0])
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--num_samples", type=int, default=3, help="for each of a kind's prompts")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compile_prefill", action="store_true")
    parser.add_argument("--nproc_per_node", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args.worker)
    rows = []
    for experiment in experiments_from(args):
        rows.append(row_of(len(rows) + 1, experiment, run_apart(experiment)))
        print(f"{len(rows)}: {rows[-1]['speedup']:.2f} x, formula {rows[-1]['predicted']:.2f} x", file=sys.stderr)
        write(rows, args.out)
    print(table(rows))
    print(verdict(rows))


if __name__ == "__main__":
    run(main)
