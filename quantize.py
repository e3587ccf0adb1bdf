"""Writes int8 and int4 checkpoints.

    python quantize.py --checkpoint_path checkpoints/demo/model.pth --mode int4 --groupsize 32
    python quantize.py --checkpoint_path PATH --mode int4-gptq --groupsize 128 --calibration_tasks wikitext --calibration_seq_length 2048
"""
import argparse
import gc
import itertools
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

import GPTQ
from calibration import calibration_tokens, own_text, read_sources, source_files, texts_of_tasks, widest_inputs
from config import ModelArgs
from cli import atomic_write, read_json, run, UserError
from formats import GROUPSIZES, LM_HEADS, MODES, Int4Linear, Quantization, QuantizedLinear, quantize_weight, replace_linears, skipped_names
from loading import check_fits, parse_device, read_checkpoint, read_weights, VERSION
from model import Transformer
from tokenizer import Tokenizer

GPTQ_MODES = ("int8-gptq", "int4-gptq")  # the same formats, rounded with GPTQ.py
DEMOS = tuple(Path(__file__).resolve().parent / "checkpoints" / name for name in ("demo", "demo-draft"))


@dataclass(frozen=True)
class Calibration:
    """What GPTQ learns from: int64 [B, S], or what the model writes itself."""
    tokens: Tensor | None = None
    options: GPTQ.Options = GPTQ.Options()


def round_linears(path: Path, linears: dict[str, QuantizedLinear], sources: dict[str, str], device: torch.device, measure: bool,
                  progress: bool) -> Iterator[tuple[str, dict[str, Tensor], float]]:
    """(name, buffers, RMS of the weight's error over the RMS of the weight) of each linear, rounded to nearest. sources: name -> its weight's."""
    sizes = {name: linear.in_features * linear.out_features for name, linear in linears.items()}
    with tqdm(total=sum(sizes.values()), unit="weight", unit_scale=True, desc="Rounding", disable=not progress) as bar:
        for name, weight in zip(linears, read_weights(path, [sources[name] for name in linears])):
            yield name, *quantize_weight(name, weight, linears[name], device, measure)
            bar.update(sizes[name])


def gptq_linears(path: Path, args: ModelArgs, linears: dict[str, QuantizedLinear], calibration: Calibration, device: torch.device,
                 measure: bool, progress: bool) -> Iterator[tuple[str, dict[str, Tensor], float]]:
    """The same by GPTQ, for linears inside the layers; the error is that of the outputs."""
    with torch.device("meta"):
        model = Transformer(args)

    def load(layer: int) -> dict[str, Tensor]:
        names = [f"layers.{layer}.{name}" for name in model.layers[layer].state_dict()]
        return {name.split(".", 2)[2]: weight.to(device, torch.float32) for name, weight in zip(names, read_weights(path, names))}
    tokens = own_text(path, device, progress) if calibration.tokens is None else calibration.tokens
    gc.collect()                         # the model that wrote it
    embedding = read_checkpoint(path)[0]["tok_embeddings.weight"]
    return GPTQ.quantize_layers(model, tokens, embedding, load, linears, calibration.options, device, measure, progress)


def quantize_checkpoint(path: Path, mode: str, groupsize: int = 32, lm_head: str = "int8", skip: tuple[str, ...] = (),
                        device: torch.device | str = "cpu", report: bool = False, progress: bool = True,
                        calibration: Calibration | None = None) -> Path:
    """Writes model_int8.pth or model_int4.gG.pth beside an unquantized checkpoint and returns its path. What is in memory at a time is the
    quantized weights and a part of the others, or the model itself while it writes a text. Without a calibration weights are rounded to nearest, as
    the head always is."""
    check_mode(mode)
    if calibration is None and mode in GPTQ_MODES or calibration and mode == "int8":
        raise ValueError(f"{mode} {'needs a' if mode in GPTQ_MODES else 'takes no'} calibration")
    format, device = mode.removesuffix("-gptq"), torch.device(device)
    Quantization(format, groupsize, lm_head).check()
    kept, args = read_unquantized(path)
    with torch.device("meta"):
        model = Transformer(args)
    check_fits(path, model, kept)
    quantization = Quantization(format, groupsize, lm_head, skipped_names(model, skip), path.name)
    linears = dict(replace_linears(model, quantization))
    sources = {name: f"{name}.weight" if f"{name}.weight" in kept else "tok_embeddings.weight" for name in linears}
    state = {name: tensor for name, tensor in kept.items() if name not in sources.values() or name == "tok_embeddings.weight"}
    rounded, by_gptq = dict(linears), {}
    if calibration:
        by_gptq = {name: rounded.pop(name) for name in linears if name.startswith("layers.")}
    lines = []
    for name, buffers, error in itertools.chain(
            gptq_linears(path, args, by_gptq, calibration, device, report, progress) if calibration else (),
            round_linears(path, rounded, sources, device, report, progress)):
        state |= {f"{name}.{key}": value for key, value in buffers.items()}
        lines.append((name, linears[name], error, sum(value.nbytes for value in buffers.values()), kept[sources[name]].nbytes))
    target = path.with_name(f"model_{mode}.pth" if format == "int8" else f"model_{mode}.g{groupsize}.pth")
    with atomic_write(target) as partial:
        recorded = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(quantization).items()}
        torch.save({"version": VERSION, "quantization": recorded, "state_dict": state}, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())      # a full disk may show only here, and must show before the file gets its name
    if uneven := [f"{name} ({linear.in_features})" for name, linear in linears.items()
                  if isinstance(linear, Int4Linear) and linear.in_features % linear.groupsize]:
        print(f"{len(uneven)} linears whose columns are no multiple of {groupsize} have a shorter last group: {', '.join(uneven[:4])}"
              f"{' ...' if len(uneven) > 4 else ''}", file=sys.stderr)
    if report:
        print_report(lines)
    return target


def check_mode(mode: str) -> None:
    if mode not in (*MODES, *GPTQ_MODES):
        raise UserError(f"--mode {mode!r} is not supported (supported: {', '.join((*MODES, *GPTQ_MODES))})")


def read_unquantized(path: Path) -> tuple[dict[str, Tensor], ModelArgs]:
    """What is to be quantized, and its configuration. UserError if it is not there, is quantized already, or nothing can be written beside it."""
    if not path.exists():
        raise UserError(f"--checkpoint_path {path}: no such file (scripts/convert_hf_checkpoint.py makes model.pth from a Hugging Face checkpoint)")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent}: not writable")
    state, already = read_checkpoint(path)
    if already:
        raise UserError(f"--checkpoint_path {path} is already quantized ({already.mode}): give the model.pth that it was made from")
    return state, ModelArgs.from_hf(read_json(path.parent / "config.json"))


def print_report(lines: list[tuple[str, QuantizedLinear, float, int, int]]) -> None:
    print(f"{'linear':<36}{'format':<10}{'shape':>16}{'error':>10}{'MB':>10}{'of':>8}")
    for name, linear, error, after, before in lines:
        kind = f"int4.g{linear.groupsize}" if isinstance(linear, Int4Linear) else "int8"
        shape = f"{linear.out_features} x {linear.in_features}"
        print(f"{name:<36}{kind:<10}{shape:>16}{error:>10.3%}{after / 1e6:>10.2f}{after / before:>8.1%}")
    after, before = (sum(line[i] for line in lines) for i in (3, 4))
    print(f"{'together':<72}{after / 1e6:>10.2f}{after / before:>8.1%}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="a model.pth; the quantized file is written beside it")
    parser.add_argument("--mode", required=True, help=f"one of {', '.join((*MODES, *GPTQ_MODES))}")
    parser.add_argument("--groupsize", type=int, default=32, help=f"columns that share a scale in int4: {', '.join(map(str, GROUPSIZES))}")
    parser.add_argument("--lm_head", default="int8", help=f"format of the output head: {', '.join(LM_HEADS)} (as it is); default %(default)s")
    parser.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="linears that stay as they are, e.g. 'layers.0.*'; repeatable")
    parser.add_argument("--round_to_nearest", action="store_true",
                        help="int4: each weight for itself, without learning from a text that the model writes: sooner done, but less faithful")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--report", action="store_true",
                        help="print each linear's error (RMS of the error / RMS of the weights; with GPTQ, of the outputs) and size")
    gptq = parser.add_argument_group("the modes of GPTQ: what to calibrate with (the demo has a default); all but int8: how")
    gptq.add_argument("--calibration_tasks", nargs="+", default=[], metavar="TASK", help="documents of lm-eval's tasks, e.g. wikitext")
    gptq.add_argument("--include_path", type=Path, metavar="FOLDER", help="where further tasks are")
    gptq.add_argument("--calibration_file", type=Path, metavar="FILE", help="plain text")
    gptq.add_argument("--calibration_limit", type=int, help="sequences at most (128)")
    gptq.add_argument("--calibration_seq_length", type=int, help="tokens of a sequence (the model's context, at most 2048)")
    gptq.add_argument("--percdamp", type=float, default=0.01, help="damping: this part of the Hessian's mean diagonal (%(default)s)")
    gptq.add_argument("--blocksize", type=int, default=128, help="columns whose errors reach the rest of the matrix together (%(default)s)")
    gptq.add_argument("--act_order", action="store_true", help="quantize groups, and the columns in them, by falling activation")
    return parser.parse_args(argv)


def read_calibration(args: argparse.Namespace, path: Path) -> Calibration:
    """What the command's flags ask for: --mode int4 learns from the model's own text. UserError if there is no text, or too little of it."""
    model_args = read_unquantized(path)[1]
    for flag, least in (("calibration_limit", 1), ("blocksize", 1), ("percdamp", 0)):
        if getattr(args, flag) is not None and not getattr(args, flag) >= least:
            raise UserError(f"--{flag} {getattr(args, flag)} must be {least} or more")
    options = GPTQ.Options(args.percdamp, args.blocksize, args.act_order)
    if args.mode == "int4":
        return Calibration(options=options)
    seq_length = min(model_args.max_position, 2048) if args.calibration_seq_length is None else args.calibration_seq_length
    if not 1 <= seq_length <= model_args.max_position:
        raise UserError(f"--calibration_seq_length {seq_length} must be at least 1 and at most the context of {model_args.max_position} positions")
    tokens = calibration_tokens(Tokenizer.from_dir(path.parent), calibration_texts(args, path),
                                128 if args.calibration_limit is None else args.calibration_limit, seq_length, widest_inputs(model_args))
    print(f"calibrating with {len(tokens)} sequences of {seq_length} tokens", file=sys.stderr)
    return Calibration(tokens, options)


def calibration_texts(args: argparse.Namespace, path: Path) -> list[str]:
    if args.calibration_tasks and args.calibration_file:
        raise UserError("--calibration_tasks and --calibration_file exclude each other")
    if args.calibration_tasks:
        return texts_of_tasks(args.calibration_tasks, args.include_path)
    if args.calibration_file:
        return [read_text(args.calibration_file)]
    if path.parent.resolve() in DEMOS:
        return read_sources(source_files(heldout=False))
    raise UserError("GPTQ needs text like what the model is for: give --calibration_tasks wikitext, or --calibration_file FILE "
                    "(--mode int4 needs none: it learns from what the model writes)")


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibration_file {path}: {error}") from None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    path = args.checkpoint_path / "model.pth" if args.checkpoint_path.is_dir() else args.checkpoint_path
    device = parse_device(args.device)
    check_mode(args.mode)
    for flag in ("calibration_tasks", "calibration_file", "calibration_limit", "calibration_seq_length", "include_path"):
        if args.mode in MODES and getattr(args, flag) not in (None, []):
            raise UserError(f"--{flag}: --mode {args.mode} takes no calibration text; --mode {args.mode}-gptq takes one")
    if args.round_to_nearest and args.mode != "int4":
        raise UserError(f"--round_to_nearest is for --mode int4, not {args.mode}")
    calibration = None if args.mode == "int8" or args.round_to_nearest else read_calibration(args, path)
    target = quantize_checkpoint(path, args.mode, args.groupsize, args.lm_head, tuple(args.skip), device, args.report, calibration=calibration)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB ({path.name}: {path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main)
