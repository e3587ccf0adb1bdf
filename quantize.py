"""Writes int8 and int4 checkpoints.

    python quantize.py --checkpoint_path checkpoints/demo/model.pth --mode int4 --groupsize 32
    python quantize.py --checkpoint_path PATH --mode int4-gptq --groupsize 128 --calibration_tasks wikitext
"""
import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import argparse
import contextlib
import gc
import itertools
import math
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import formats
import GPTQ
import harness
from checkpoint import check_finite, empty_model, read_checkpoint, read_weights, verify_checkpoint, write_checkpoint
from cli import UserError
from config import ModelArgs
from export import FORMATS, export_checkpoint
from formats import GROUPSIZES, MODES, Int4Linear, Quantization, QuantizedLinear, replace_linears, skipped_names
from generate import Engine
from kernels import copy_to
from loading import DEMO, load_model, parse_device, resolve_checkpoint
from model import Transformer
from sampling import Sampling
from tokenizer import Tokenizer

GPTQ_MODES = ("int8-gptq", "int4-gptq")       # the same formats, rounded with GPTQ.py
MAX_DOCUMENTS = 10000                         # of a task
OWN_SEQUENCES, OWN_LENGTH = 16, 256           # that a model writes at a time: once is enough for the demo
DEMOS = (DEMO.parent, DEMO.parent.with_name("demo-draft"))
# Of the standard library, the modules that the demos have not seen, and what is no source text.
HELD_OUT = ("bisect calendar configparser contextlib csv fnmatch fractions graphlib heapq queue sched shlex statistics "
            "string textwrap").split()
UNSEEN = re.compile(r"/(test_)?({0})\.py$|test_({0})/|site-packages|config-|pydoc_data|lib2to3/tests/data|test/bad"
                    r"|ensurepip/_bundled".format("|".join(HELD_OUT)))
TEXT_FLAGS = ("calibration_tasks", "calibration_file", "include_path", "calibration_limit", "calibration_seq_length")
LinearBuffers = tuple[str, dict[str, Tensor], float]        # name of a linear, its quantized buffers, relative error


@dataclass(frozen=True)
class Calibration:
    """What GPTQ learns from: int64 [B, S], or what the model writes itself."""
    tokens: Tensor | None = None
    options: GPTQ.Options = GPTQ.Options()


# ---- checkpoints

def quantize_checkpoint(path: Path, mode: str, groupsize: int = 32, lm_head: str = "int8", skip: tuple[str, ...] = (),
                        device: torch.device | str = "cpu", report: bool = False, progress: bool = True,
                        calibration: Calibration | None = None, portable: bool = False) -> Path:
    """Writes model_int8.pth or model_int4.gG.pth beside an unquantized checkpoint and returns its path.

    In memory at a time are the quantized weights and a part of the others, or the model itself while it writes a text.
    Without a calibration weights are rounded to nearest, as the head always is. portable: only numbers that export.py
    can write in other programs' formats. Errors: UserError.
    """
    if mode not in (*MODES, *GPTQ_MODES):
        raise UserError(f"{mode!r} is not supported (supported: {', '.join((*MODES, *GPTQ_MODES))})", "mode")
    if calibration is None and mode in GPTQ_MODES or calibration and mode == "int8":
        raise ValueError(f"{mode} {'needs a' if mode in GPTQ_MODES else 'takes no'} calibration")
    format, device = mode.removesuffix("-gptq"), torch.device(device)
    Quantization(format, groupsize, lm_head).check()
    plain, args = read_unquantized(path)
    model = empty_model(path, args, plain, None)
    verify_checkpoint(path, required=False)
    others = sorted(plain.keys() - {f"{linear}.weight" for linear in formats.linear_names(model)})
    for name, tensor in zip(others, read_weights(plain, others), strict=True):
        check_finite(name, tensor)           # the linears' when they are quantized
    quantization = Quantization(format, groupsize, lm_head, skipped_names(model, skip), path.name)
    linears = dict(replace_linears(model, quantization))
    for linear in linears.values():
        linear.portable = portable
    keys = {name: f"{name}.weight" if f"{name}.weight" in plain else "tok_embeddings.weight" for name in linears}
    state = {key: t for key, t in plain.items() if key not in keys.values() or key == "tok_embeddings.weight"}
    by_gptq = {name: linear for name, linear in linears.items() if calibration and name.startswith("layers.")}
    rounded = {name: linear for name, linear in linears.items() if name not in by_gptq}
    lines = []
    for name, buffers, error in itertools.chain(
            gptq_linears(path, args, by_gptq, calibration, device, report, progress) if calibration else (),
            round_linears(plain, rounded, keys, device, report, progress)):
        state |= {f"{name}.{key}": value for key, value in buffers.items()}
        lines.append((name, linears[name], error, sum(t.nbytes for t in buffers.values()), plain[keys[name]].nbytes))
    target = path.with_name(f"model_{mode}.pth" if format == "int8" else f"model_{mode}.g{groupsize}.pth")
    write_checkpoint(target, state, quantization)
    if uneven := [f"{name} ({linear.in_features})" for name, linear in linears.items()
                  if linear.in_features % linear.groupsize]:
        print(f"{len(uneven)} linears whose columns are no multiple of {groupsize} have a shorter last group: "
              f"{', '.join(uneven[:4])}{' ...' if len(uneven) > 4 else ''}", file=sys.stderr)
    if report:
        print_report(lines)
    return target


def read_unquantized(path: Path) -> tuple[dict[str, Tensor], ModelArgs]:
    """A checkpoint to be quantized, and its configuration. Errors: UserError if it is not there, is quantized already,
    or nothing can be written beside it."""
    resolve_checkpoint(path)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent}: not writable")
    state, already = read_checkpoint(path)
    if already:
        raise UserError(f"{path} is already quantized ({already.mode}): give the model.pth that it was made from",
                        "checkpoint_path")
    return state, ModelArgs.from_hf(cli.read_json(path.parent / "config.json"))


def round_linears(state: dict[str, Tensor], linears: dict[str, QuantizedLinear], keys: dict[str, str],
                  device: torch.device, measure: bool, progress: bool) -> Iterator[LinearBuffers]:
    """Rounded to nearest; the error is that of the weights. keys: under which names the checkpoint has them."""
    sizes = {name: linear.in_features * linear.out_features for name, linear in linears.items()}
    with tqdm(total=sum(sizes.values()), unit="weight", unit_scale=True, desc="Rounding", disable=not progress) as bar:
        weights = read_weights(state, [keys[name] for name in linears])
        for (name, linear), weight in zip(linears.items(), weights, strict=True):
            yield name, *quantize_weight(name, weight, linear, device, measure)
            bar.update(sizes[name])


def gptq_linears(path: Path, args: ModelArgs, linears: dict[str, QuantizedLinear], calibration: Calibration,
                 device: torch.device, measure: bool, progress: bool) -> Iterator[LinearBuffers]:
    """By GPTQ, for linears inside the layers; the error is that of the outputs."""
    with torch.device("meta"):
        model = Transformer(args)

    def load(layer: int) -> dict[str, Tensor]:
        keys = list(model.layers[layer].state_dict())
        weights = read_weights(read_checkpoint(path)[0], [f"layers.{layer}.{key}" for key in keys])
        as_stored = [f"{name}.weight" for name in GPTQ.FEED_FORWARD] if args.has_experts(layer) else []
        return {key: weight.to(device, None if key in as_stored else torch.float32)    # experts become fp32 one by one
                for key, weight in zip(keys, weights, strict=True)}
    tokens = own_text(path, device, progress) if calibration.tokens is None else calibration.tokens
    gc.collect()                         # the model that wrote it
    embedding = read_checkpoint(path)[0]["tok_embeddings.weight"]
    return GPTQ.quantize_layers(model, tokens, embedding, load, linears, calibration.options, device, measure, progress)


@torch.no_grad()
def quantize_weight(name: str, weight: Tensor, linear: QuantizedLinear, device: torch.device | None = None,
                    measure: bool = False) -> tuple[dict[str, Tensor], float]:
    """The buffers that stand for a weight [N, K], rounded to nearest some rows at a time; if measured, the RMS of their
    error over the RMS of the weight."""
    chunks: list[dict[str, Tensor]] = []
    error = total = 0.0
    for rows in weight.split(max(1, formats.CHUNK_WEIGHTS // weight.size(1))):
        rows = rows.to(device or weight.device)
        check_finite(f"{name}.weight", rows)
        buffers = linear.quantize(rows)
        if measure:
            error += (linear.dequantize(buffers=buffers) - rows.float()).square().sum(dtype=torch.float64).item()
            total += rows.float().square().sum(dtype=torch.float64).item()
        chunks.append({key: value.to(weight.device) for key, value in buffers.items()})
    whole = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]} if len(chunks) > 1 else chunks[0]
    return whole, math.sqrt(error / total) if total else 0.0


def print_report(lines: Iterable[tuple[str, QuantizedLinear, float, int, int]]) -> None:
    print(f"{'linear':<36}{'format':<10}{'shape':>16}{'error':>10}{'MB':>10}{'of':>8}")
    for name, linear, error, after, before in lines:
        kind = f"int4.g{linear.groupsize}" if isinstance(linear, Int4Linear) else "int8"
        shape = f"{linear.out_features} x {linear.in_features}"
        print(f"{name:<36}{kind:<10}{shape:>16}{error:>10.3%}{after / 1e6:>10.2f}{after / before:>8.1%}")
    after, before = (sum(sizes) for sizes in list(zip(*lines, strict=True))[3:])
    print(f"{'together':<72}{after / 1e6:>10.2f}{after / before:>8.1%}")


def quantize_model(model: Transformer, mode: str, groupsize: int = 32, lm_head: str = "int8",
                   skip: tuple[str, ...] = ()) -> Transformer:
    """Quantizes a loaded model in place, rounded to nearest, and packs it for its device. skip: patterns of names."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UserError("the model is already quantized")
    quantization = Quantization(mode, groupsize, lm_head, skipped_names(model, skip))
    quantization.check()
    plain = dict(model.named_parameters())
    for name, linear in replace_linears(model, quantization):
        weight = plain.get(f"{name}.weight", plain["tok_embeddings.weight"])
        for key, value in quantize_weight(name, weight, linear)[0].items():
            setattr(linear, key, copy_to(value, value.device, value.dtype))
    formats.pack_for(model, model.device)
    return model


# ---- text to calibrate with

def own_text(path: Path, device: torch.device | str = "cpu", progress: bool = True) -> Tensor:
    """int64 [B, S]: what the model in a checkpoint writes after one token drawn from its vocabulary, at temperature 1.
    It serves about as well as text of its training (Williams, Chrysostomou and Aletras 2024, arXiv 2410.17170).
    Errors: UserError if a weight is NaN or infinite."""
    try:
        engine = Engine(*load_model(path, device, torch.bfloat16 if torch.device(device).type == "cpu" else None))
        for name, weight in engine.model.named_parameters():
            check_finite(name, weight)
        length, texts = min(OWN_LENGTH, engine.model.args.max_position), []
        count = math.ceil(widest_inputs(engine.model.args) / (OWN_SEQUENCES * length))
        first = torch.randint(engine.vocab_size, (count, OWN_SEQUENCES, 1), generator=torch.Generator().manual_seed(0))
        with tqdm(total=count * (length - 1), desc="Writing a text", unit="token", disable=not progress) as bar:
            for seed, begin in enumerate(first):
                written, sampling = [], Sampling(temperature=1.0, top_k=None)
                for ids in engine.generate(begin.tolist(), length - 1, sampling, seed=seed, stop_ids=frozenset()):
                    written.append(ids)
                    bar.update()
                texts.append(torch.cat((begin, torch.tensor(written).t()), dim=1))
    except UserError as error:
        raise UserError(f"{error.message} (round_to_nearest needs no text of the model's own)", error.field) from None
    return torch.cat(texts)


def widest_inputs(args: ModelArgs) -> int:
    """Of a model's linears: fewer tokens than that leave a Hessian without full rank."""
    sizes = [args.dim, args.n_head * args.head_dim, args.delta_value_heads * args.delta_value_dim, args.expert_size,
             args.shared_expert_size]
    return max([*sizes, args.intermediate_size] if args.n_expert == 0 or args.dense_layers else sizes)


def calibration_tokens(tokenizer: Tokenizer, texts: list[str], limit: int, seq_length: int, least: int) -> Tensor:
    """int64 [B, S], B <= limit sequences from all over the texts. Errors: UserError for fewer than `least` tokens."""
    pieces = [text[i:i + 8 * seq_length] for text in texts for i in range(0, len(text), 8 * seq_length)]
    ids: list[int] = []
    for i in torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist():
        if len(ids) >= limit * seq_length:
            break
        ids += tokenizer.encode(pieces[i])
    count = min(limit, len(ids) // seq_length)
    if count * seq_length < least:
        raise UserError(f"too little to calibrate with: {count} sequences of {seq_length} tokens, and the widest "
                        f"linear has {least} inputs: give more text, or raise calibration_limit")
    return torch.tensor(ids[:count * seq_length]).view(count, seq_length)


def texts_of_tasks(names: list[str], include_path: Path | None = None) -> list[str]:
    """The documents of lm-eval's tasks with their answers: those for training, else validation, else test."""
    texts, advice = [], ", or give a text: --calibration_file FILE"
    for task in flatten(harness.load_tasks(names, include_path, field="calibration_tasks", advice=advice)[1]):
        docs = (task.training_docs() if task.has_training_docs() else
                task.validation_docs() if task.has_validation_docs() else task.test_docs())
        for doc in itertools.islice(docs, MAX_DOCUMENTS):
            question, answer = task.doc_to_text(doc), task.doc_to_target(doc)
            if isinstance(question, int):        # the choices are beginnings, of which this is right (winogrande)
                question = task.doc_to_choice(doc)[question]
            elif isinstance(answer, int):
                answer = task.doc_to_choice(doc)[answer]
            texts.append(" ".join(str(text) for text in (question, answer) if text))
    return texts


def flatten(loaded: Iterable) -> Iterator:
    """The tasks of a list that may hold groups of them."""
    for item in loaded:
        if hasattr(item, "doc_to_text"):
            yield item
        else:
            children = getattr(item, "tasks", item)
            yield from flatten(children.values() if isinstance(children, dict) else children)


def source_files(heldout: bool) -> list[Path]:
    """The standard library's .py files: the held-out modules, or all others but their tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    if heldout:
        return [library / f"{name}.py" for name in HELD_OUT]
    return [p for p in sorted(library.rglob("*.py")) if not UNSEEN.search(f"/{p.relative_to(library).as_posix()}")]


def read_sources(files: list[Path]) -> list[str]:
    """Text of each file that is UTF-8 and of ordinary size (the largest files are generated tables)."""
    texts = []
    for raw in map(Path.read_bytes, files):
        with contextlib.suppress(UnicodeDecodeError):
            if 200 < len(raw) < 300_000:
                texts.append(raw.decode("utf-8"))
    return texts


# ---- the command

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    what = parser.add_argument_group("format")
    what.add_argument("--checkpoint_path", "--model", type=Path, required=True, metavar="PATH",
                      help="model.pth or its folder; the quantized file is written beside it")
    what.add_argument("--mode", required=True, choices=(*MODES, *GPTQ_MODES), help="int4 learns from text that the "
                      "model itself writes, int8-gptq and int4-gptq from a calibration text")
    what.add_argument("--groupsize", type=int, default=32, choices=GROUPSIZES, help="columns that share a scale (int4)")
    what.add_argument("--lm_head", choices=(*MODES, "unquantized", "none"), help="of the output head; none is another "
                      "name of unquantized (default: int8; with --export none, as not all programs load another)")
    what.add_argument("--skip", action="append", default=[], metavar="PATTERN",
                      help="linears that stay as they are, e.g. 'layers.0.*'; repeatable")
    what.add_argument("--round_to_nearest", action="store_true", help="int4 without GPTQ: faster, but less faithful")
    what.add_argument("--device", default="cpu", help="where to compute")
    what.add_argument("--report", action="store_true", help="print each linear's size, and the RMS of the error over "
                      "that of its weights (with GPTQ: of its outputs)")
    what.add_argument("--export", type=Path, metavar="FOLDER", help="also write a Hugging Face folder, which "
                      "transformers, vLLM and SGLang load; int4 is symmetric then, and scales are exact in bf16")
    what.add_argument("--export_format", choices=FORMATS, help="default: compressed-tensors")
    gptq = parser.add_argument_group("GPTQ")
    gptq.add_argument("--percdamp", type=float, default=0.01, help="damping, as a part of the Hessian's mean diagonal")
    gptq.add_argument("--blocksize", type=int, default=128, help="columns whose errors reach the others together")
    gptq.add_argument("--act_order", action="store_true", help="groups and columns in decreasing order of activation")
    text = parser.add_argument_group("calibration text of int8-gptq and int4-gptq (the demo has one)")
    source = text.add_mutually_exclusive_group()
    source.add_argument("--calibration_tasks", nargs="+", metavar="TASK", help="lm-eval's tasks, e.g. wikitext")
    source.add_argument("--calibration_file", type=Path, metavar="FILE", help="plain text")
    text.add_argument("--include_path", type=Path, metavar="FOLDER", help="where further tasks are")
    text.add_argument("--calibration_limit", type=int, metavar="N", help="sequences at most (default: 128)")
    text.add_argument("--calibration_seq_length", type=int, metavar="N",
                      help="tokens of a sequence (default: the model's context, at most 2048)")
    return parser.parse_args(argv)


def read_calibration(args: argparse.Namespace, path: Path) -> Calibration:
    """What the flags ask for: --mode int4 learns from the model's own text. Errors: UserError if there is no text, or
    too little of it."""
    model_args = read_unquantized(path)[1]
    for field, least in (("calibration_limit", 1), ("blocksize", 1), ("percdamp", 0)):
        if getattr(args, field) is not None and not getattr(args, field) >= least:
            raise UserError(f"{getattr(args, field)} must be {least} or more", field)
    if args.percdamp == math.inf:
        raise UserError("inf must be a finite number", "percdamp")
    options = GPTQ.Options(args.percdamp, args.blocksize, args.act_order)
    if args.mode == "int4":
        return Calibration(options=options)
    context, seq_length = model_args.max_position, args.calibration_seq_length
    seq_length = min(context, 2048) if seq_length is None else seq_length
    if not 1 <= seq_length <= context:
        raise UserError(f"{seq_length} must be at least 1 and at most the context of {context} positions",
                        "calibration_seq_length")
    tokens = calibration_tokens(Tokenizer.from_dir(path.parent), calibration_texts(args, path),
                                args.calibration_limit or 128, seq_length, widest_inputs(model_args))
    print(f"calibrating with {len(tokens)} sequences of {seq_length} tokens", file=sys.stderr)
    return Calibration(tokens, options)


def calibration_texts(args: argparse.Namespace, path: Path) -> list[str]:
    if args.calibration_tasks:
        return texts_of_tasks(args.calibration_tasks, args.include_path)
    if args.calibration_file:
        return [cli.read_text(args.calibration_file, "calibration_file")]
    if path.parent.resolve() in DEMOS:
        return read_sources(source_files(heldout=False))
    raise UserError("GPTQ needs text like what the model is for: give --calibration_tasks wikitext, or "
                    "--calibration_file FILE (--mode int4 needs none: it learns from what the model writes)")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = parse_device(args.device)
    for field in TEXT_FLAGS:
        if args.mode in MODES and getattr(args, field) is not None:
            raise UserError(f"is for --mode {args.mode}-gptq: --mode {args.mode} takes no calibration text", field)
    if args.round_to_nearest and args.mode != "int4":
        raise UserError(f"is for --mode int4, not {args.mode}", "round_to_nearest")
    lm_head = args.lm_head or ("none" if args.export else "int8")
    lm_head = "none" if lm_head == "unquantized" else lm_head
    if args.export:                                  # what would be refused is refused before the work
        cli.check_new(args.export, "export")
        if args.export_format == "gptq" and lm_head != "none":
            raise UserError(f"{args.lm_head}: gptq has no place for a quantized head", "lm_head")
    elif args.export_format:
        raise UserError("is for --export", "export_format")
    path = resolve_checkpoint(args.checkpoint_path, download=True)
    calibration = None if args.mode == "int8" or args.round_to_nearest else read_calibration(args, path)
    target = quantize_checkpoint(path, args.mode, args.groupsize, lm_head, tuple(args.skip), device, args.report,
                                 calibration=calibration, portable=bool(args.export))
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB ({path.name}: {path.stat().st_size / 1e6:.1f} MB)")
    if args.export:
        with cli.fields(out="export"):
            print("wrote", cli.printable(export_checkpoint(target, args.export, args.export_format or FORMATS[0])))


if __name__ == "__main__":
    cli.run(main)
