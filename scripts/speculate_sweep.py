"""Speculative decoding against plain decoding: pairs of models, formats, k and prompts, in one table with a verdict.

    python scripts/speculate_sweep.py --draft_checkpoint_path checkpoints/demo-draft ngram --speculate_k auto 1 2 4 8

Every combination of the values that the flags list is measured, in processes of its own. Plain and speculative samples
take turns; the speed-up is that of decoding, after the first token. The table and a verdict go to stdout, and to --out
as sweep.csv and sweep.json.
"""
import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import torch

import tp
from cli import UserError
from generate import Engine, bytes_read_per_token, memory_used, stream, warm_up
from loading import DEMO, load_model, parse_device, read_checkpoint
from sampling import Sampling
from speculate import Statistics, predicted_speedup

NGRAM = "ngram"
HELDOUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "heldout.txt"
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
    "code": ['class Stack:\n    """A list of items, the last one first."""\n\n    def __init__(self, items=()):\n'
             "        self.items = list(items)\n\n    def push(self, item):\n",
             "import unittest\n\n\nclass TestQueue(unittest.TestCase):\n\n    def setUp(self):\n"
             "        self.queue = Queue(maxsize=3)\n\n    def test_put(self):\n"],
    "prose": ['"""This module provides a simple way to read and write the files of a project.\n\n'
              "The most important class is Project, which holds the names of all files and",
              "# The old behaviour was to raise an error when the file could not be found.  This has been changed, "
              "because most of\n# the users"],
    "copying": ["# Edit this function: rename it to read_all.\n\n"
                + 2 * f"{FUNCTION}\n\n# The same function again:\n\n" + "def",
                "\n\n".join([FUNCTION, FUNCTION.replace("read_items", "read_names"),
                             FUNCTION.replace("read_items", "read_words"), "def read_all("])],
    "held out": [HELDOUT.read_text("utf-8")[start:start + 600] for start in (20_000, 60_000, 100_000, 140_000)],
}
COLUMNS = {                                      # key of a row: heading
    "number": "", "draft_model": "DRAFT_MODEL", "draft_quantization": "draft quantization",
    "speculate_k": "speculate_k", "model": "MODEL", "model_quantization": "model quantization", "device": "device",
    "nproc_per_node": "nproc_per_node", "compile": "compile", "prompt": "prompt", "compile_prefill": "compile_prefill",
    "rate": "average tokens/sec", "memory": "memory used GB", "bandwidth": "bandwidth GB/s",
    "mean_accepted": "Mean Accepted", "max_new_tokens": "max_new_tokens", "num_samples": "num_samples",
    "temperature": "temperature", "torch": "torch version", "speedup": "speed-up", "predicted": "formula",
    "best_k": "predicted best k"}


# ---- one experiment, in its own process

def measure(experiment: dict, ranks: tp.Ranks | None) -> dict:
    device = parse_device(experiment["device"])
    device = ranks.take_device(device) if ranks else device
    model, tokenizer = load_model(experiment["checkpoint_path"], device, None, ranks)
    draft, compile_prefill = NGRAM, experiment["compile_prefill"]
    if experiment["draft_checkpoint_path"] != NGRAM:
        with cli.fields(checkpoint_path="draft_checkpoint_path"):
            loaded = load_model(experiment["draft_checkpoint_path"], device, model.dtype, ranks, may_replicate=True)
        draft = Engine(*loaded, compile_prefill=compile_prefill)
    engine = Engine(model, tokenizer, experiment["compile"], compile_prefill, draft)
    speculator, rounds, k = engine.speculator, [], experiment["speculate_k"]
    request: dict[str, Any] = dict(max_new_tokens=experiment["max_new_tokens"], stop_ids=frozenset(),
                                   sampling=Sampling(experiment["temperature"]))
    assert speculator
    for text in PROMPTS[experiment["prompt"]]:
        prompts = [tokenizer.encode(text)]
        for speculator.k in (None, None if k == "auto" else k):  # with any k first, for the policy to time them all
            warm_up(engine, prompts, request)
        for sample in range(experiment["num_samples"]):
            timing, found = {}, {}
            for enabled in (False, True) if sample % 2 else (True, False):
                speculator.enabled, found[enabled] = enabled, Statistics()
                speculator.statistics = found[enabled]
                timing[enabled] = stream(engine, prompts, **request, seed=sample)[1]
            rounds.append(dict(plain=timing[False].total, seconds=timing[True].total, counts=found[True].counts,
                               speedup=timing[True].decode_rate / timing[False].decode_rate,
                               tested=found[True].tested, passes=found[True].passes + 1))
        speculator.enabled = True
    policy = speculator.policy
    assert policy
    return dict(rounds=rounds, plain_s=policy.plain_s, draft_s=policy.draft_s, verify_s=list(policy.verify_s.items()),
                weights=bytes_read_per_token(model), memory=memory_used(device))


def worker(path: Path) -> None:
    """Reads the experiment from the file, and writes there what it measured."""
    with tp.joined() as ranks:
        result = measure(json.loads(path.read_text()), ranks)
        if not ranks or ranks.first:
            path.write_text(json.dumps(result))


def run_apart(experiment: dict) -> dict:
    n = experiment["nproc_per_node"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experiment.json"
        path.write_text(json.dumps(experiment))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
        done = subprocess.run([sys.executable, *torchrun, __file__, "--worker", path], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{experiment}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return json.loads(path.read_text())


# ---- the table

def row_of(number: int, experiment: dict, found: dict) -> dict:
    """One line of the table. The speed-up is the median over the samples."""
    rounds, tokens = found["rounds"], len(found["rounds"]) * experiment["max_new_tokens"]
    counts = [sum(column) for column in itertools.zip_longest(*(r["counts"] for r in rounds), fillvalue=0)]
    accepted, tested = sum(n * count for n, count in enumerate(counts)), sum(r["tested"] for r in rounds)
    a, c = accepted / tested if tested else 0.0, found["draft_s"] / found["plain_s"]
    v = {k: seconds / found["plain_s"] for k, seconds in found["verify_s"]}
    by_k = {k: predicted_speedup(a, k, c, v[k]) for k in v} if tested else {}
    best_k = max([0, *by_k], key=lambda k: by_k.get(k, 1.0))
    asked = best_k if experiment["speculate_k"] == "auto" else experiment["speculate_k"]
    seconds, plain_seconds, passes = (sum(r[key] for r in rounds) for key in ("seconds", "plain", "passes"))
    draft, model = experiment["draft_checkpoint_path"], experiment["checkpoint_path"]
    return experiment | dict(
        number=number, draft_model=name_of(draft), draft_quantization=format_of(draft), model=name_of(model),
        model_quantization=format_of(model), rate=tokens / seconds, plain_rate=tokens / plain_seconds,
        memory=found["memory"], bandwidth=found["weights"] * passes / seconds / 1e9, torch=torch.__version__,
        mean_accepted=accepted / sum(counts) if any(counts) else 0.0, predicted=by_k.get(asked, 1.0), best_k=best_k,
        speedup=statistics.median(r["speedup"] for r in rounds), acceptance=a, draft_cost=c, verify_cost=v, by_k=by_k)


def name_of(path: str) -> str:
    return path if path == NGRAM else Path(path).parent.name if Path(path).suffix == ".pth" else Path(path).name


def format_of(path: str) -> str:
    """As the checkpoint itself says."""
    file = Path(path) if Path(path).suffix == ".pth" else Path(path) / "model.pth"
    quantization = None if path == NGRAM else read_checkpoint(file)[1]
    return quantization.mode if quantization else "none"


def table(rows: list[dict]) -> str:
    cells = [[f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(COLUMNS.values()), ["---"] * len(COLUMNS), *cells])


def verdict(rows: list[dict]) -> str:
    """In a sentence: the best that was measured, or what stands in the way."""
    best = max(rows, key=lambda row: row["speedup"])
    if best["speedup"] >= 1.03:                  # two runs of the same program differ by as much
        k = f"k={best['speculate_k']}" + (f", mostly {best['best_k']}" if best["speculate_k"] == "auto" else "")
        return f"pays: {best['speedup']:.2f}x at {k} ({best['draft_model']} for {best['model']}, {best['prompt']})"
    a, c = best["acceptance"], best["draft_cost"]
    affordable = max(((predicted_speedup(a, k, 0, 1) - v) / k for k, v in best["verify_cost"].items()), default=0.0)
    if affordable <= 0:
        return f"does not pay: of the drafted tokens {100 * a:.0f} % are accepted, too few for any draft"
    return f"does not pay: the draft costs {c:.2f} of a target step; it would have to cost less than {affordable:.2f}"


def write(rows: list[dict], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "sweep.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS.values(), *([row[key] for key in COLUMNS] for row in rows)])
    (out / "sweep.json").write_text(json.dumps(dict(rows=rows, verdict=verdict(rows)), indent=1))


# ---- the command

def parse_k(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise UserError(f"{text!r} must be a number from 1 on, or auto", "speculate_k")
    return text if text == "auto" else int(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint_path", nargs="+", default=[str(DEMO)], metavar="PATH", help="models: files or folders")
    add("--draft_checkpoint_path", nargs="+", default=[NGRAM], metavar="PATH", help=f"drafts, or {NGRAM}")
    add("--speculate_k", nargs="+", default=["auto"], metavar="K", help="tokens to draft at a time, or auto")
    add("--prompts", nargs="+", choices=PROMPTS, default=["code", "prose", "copying"])
    add("--temperature", nargs="+", type=float, default=[0.0])
    add("--max_new_tokens", type=int, default=200)
    add("--num_samples", type=int, default=3, help="of each prompt")
    add("--compile", action="store_true", help="compile decoding")
    add("--compile_prefill", action="store_true", help="compile the prompt's pass too")
    add("--nproc_per_node", type=int, default=1, help="ranks")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    add("--out", type=Path, default=Path("results"), help="folder for the results")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.worker:
        return worker(args.worker)
    swept = dict(checkpoint_path=args.checkpoint_path, draft_checkpoint_path=args.draft_checkpoint_path,
                 prompt=args.prompts, temperature=args.temperature, speculate_k=[parse_k(k) for k in args.speculate_k])
    shared = {key: getattr(args, key) for key in ("compile", "compile_prefill", "num_samples", "max_new_tokens",
                                                  "device", "nproc_per_node")}
    rows = []
    for values in itertools.product(*swept.values()):
        experiment = dict(zip(swept, values, strict=True)) | shared
        rows.append(row_of(len(rows) + 1, experiment, run_apart(experiment)))
        print(f"{len(rows)}: {rows[-1]['speedup']:.2f} x, formula {rows[-1]['predicted']:.2f} x", file=sys.stderr)
        write(rows, args.out)
    print(table(rows), verdict(rows), sep="\n")


if __name__ == "__main__":
    cli.run(main)
