"""Writes a checkpoint as a Hugging Face folder, which transformers, vLLM and SGLang load.

    python export.py --checkpoint_path checkpoints/demo/model_int4.g32.pth --out FOLDER
    python export.py --checkpoint_path PATH --out FOLDER --format gptq

A quantized one keeps its integers and scales. What a format cannot hold is refused, such as zeros between two integers:
`quantize.py --export FOLDER` makes symmetric integers, and scales that are exact in bf16. Asymmetric ones (AWQ's) are
written, too; as compressed-tensors, transformers 5.23 loads them only with CompressedTensorsConfig(dequantize=True).
"""
import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import REMAP_BYTES, check_finite, empty_model, read_checkpoint, verify_checkpoint
from cli import UserError
from config import ModelArgs
from convert import TargetSlice, target_slices
from formats import GPTQLinear, Int8Linear, QuantizedLinear
from loading import CONFIG_AND_TOKENIZER, resolve_checkpoint
from packing import CompressedIntegers, Integers, WordPacking, is_exact

Writable = CompressedIntegers | WordPacking
FORMATS = ("compressed-tensors", "gptq")
SHARD_BYTES = 2 << 30                    # of a file; as much is in memory
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXT_MODELS = {"qwen3_5_text": "Qwen3_5ForCausalLM", "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"}
NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json")
AGAIN = "quantize the model again with --export"


def export_checkpoint(path: Path, out: Path, form: str = "compressed-tensors", shard_bytes: int = SHARD_BYTES,
                      progress: bool = True) -> Path:
    """Writes the folder `out`, which must not be there yet, and returns it.

    path: a model.pth or quantized file beside its config.json. form: one of FORMATS. Errors: UserError, where the
    format cannot hold the checkpoint exactly, or that is damaged; then nothing is left behind.
    """
    if form not in FORMATS:
        raise UserError(f"{form!r} is not supported (supported: {', '.join(FORMATS)})", "format")
    cli.check_new(out, "out")
    verify_checkpoint(path, required=False)
    source = Source(path)
    scale_dtype = torch.float16 if form == "gptq" else source.dtype
    check_scales(source, scale_dtype, form)
    packings = choose_packings(source, form)
    check_shapes(source, packings)
    with cli.atomic_folder(out, "out") as partial:
        write_shards(partial, hf_tensors(source, packings, scale_dtype), shard_bytes, progress)
        config = json.dumps(hf_config(source, form, packings), indent=2)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        for file in sorted(path.parent.iterdir()):
            wanted = any(fnmatch(file.name, pattern) for pattern in CONFIG_AND_TOKENIZER)
            if wanted and file.is_file() and file.name not in NOT_COPIED:
                shutil.copyfile(file, partial / file.name)
    return out


# ---- what is exported

class Source:
    """A checkpoint file under Hugging Face's names: the inverse of convert.py, by the same tables.

    linears: the quantized ones. places: source name -> slice of the tensor or, for a quantized linear, of the weight
    that it would be. Errors: UserError.
    """

    def __init__(self, path: Path):
        self.path, self.mapped, self.config = path, 0, cli.read_json(path.parent / "config.json")
        self.state, self.quantization = read_checkpoint(path)
        args = ModelArgs.from_hf(self.config)
        model = empty_model(path, args, self.state, self.quantization)
        self.linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        self.args = replace(args.with_heads_of(self.state), tie_word_embeddings="output.weight" not in self.state)
        prefix = "transformer." if args.model_type == "qwen" else "model."
        self.places = {name if name.startswith(("lm_head.", "mtp.")) else prefix + name: place
                       for name, place in target_slices(self.args, names=()).items()}

    def rows(self, key: str, place: TargetSlice) -> Tensor:
        """A copy of a slice's rows. The file is mapped anew now and then: its pages count as memory."""
        if self.mapped > REMAP_BYTES:
            self.state, self.mapped = read_checkpoint(self.path)[0], 0
        tensor = self.state[key]
        rows = torch.cat([tensor[row:row + count] for _, count, row in place.pieces()])
        self.mapped += rows.nbytes
        return rows

    def packed(self) -> Iterator[tuple[str, TargetSlice, str]]:
        """Module, slice and linear of what is quantized."""
        for name, place in self.places.items():
            if (linear := place.key.removesuffix(".weight")) in self.linears and place.key.endswith(".weight"):
                yield name.removesuffix(".weight"), place, linear

    @property
    def dtype(self) -> torch.dtype:
        """In which engines compute, and hold compressed-tensors' scales."""
        text = self.config.get("text_config")
        holders = [self.config, text] if isinstance(text, dict) else [self.config]
        stated = [holder.get(key) for holder in holders for key in ("dtype", "torch_dtype")]
        found = (DTYPES[name] for name in stated if isinstance(name, str) and name in DTYPES)
        return next(found, self.state["norm.weight"].dtype)


def middle_zero(linear: QuantizedLinear) -> int:
    """As it is stored: that of symmetric weights."""
    return 128 if is_8_bits(linear) else 8 * linear.zero_steps


def is_8_bits(linear: QuantizedLinear) -> bool:
    return isinstance(linear, Int8Linear) or (isinstance(linear, GPTQLinear) and linear.bits == 8)


def check_scales(source: Source, scale_dtype: torch.dtype, form: str) -> None:
    """Errors: UserError, for scales and zeros that the format cannot hold exactly."""
    if form == "gptq" and "output" in source.linears:
        raise UserError(f"{source.path}: its head is quantized, which gptq has no place for: quantize with --lm_head "
                        "none, or export as compressed-tensors")
    if form == "compressed-tensors" and source.quantization and source.quantization.reordered:
        raise UserError(f"{source.path}: columns are quantized in an order of their own, which {form} has given up: "
                        "export as gptq")
    for name, linear in source.linears.items():
        zeros = source.state.get(f"{name}.zeros")
        if zeros is not None and (zeros % linear.zero_steps).any():
            raise UserError(f"{source.path}: {name} has zeros between two integers, which {form} cannot hold: {AGAIN}")
        if not is_exact(source.state[f"{name}.scales"], scale_dtype):
            advice = "export as gptq, which holds fp16" if isinstance(linear, GPTQLinear) else AGAIN
            raise UserError(f"{source.path}: {name} has scales that are not exact in {str(scale_dtype)[6:]}, in which "
                            f"{form} holds them here: {advice}")


def choose_packings(source: Source, form: str) -> dict[str, Writable]:
    """Linear -> how it is written: the head in one way, and all others in one."""
    symmetric = {True: True, False: True}
    for name, linear in source.linears.items():
        zeros = source.state.get(f"{name}.zeros")
        symmetric[name == "output"] &= zeros is None or bool((zeros == middle_zero(linear)).all())
    packings: dict[str, Writable] = {}
    for name, linear in source.linears.items():
        bits, whole = 8 if is_8_bits(linear) else 4, symmetric[name == "output"]
        groupsize = -1 if isinstance(linear, Int8Linear) else linear.groupsize
        if form == "gptq":           # in the older form, of zeros less 1, there is no place for 0
            packings[name] = WordPacking("gptq", bits, groupsize, zero_offset=int(whole))
        else:
            packings[name] = CompressedIntegers(bits, groupsize, whole)
    return packings


def check_shapes(source: Source, packings: dict[str, Writable]) -> None:
    """Errors: UserError, for a linear that is not of whole groups and, in GPTQ, words."""
    for module, place, linear in source.packed():
        (N, K), packing = place.shape, packings[linear]
        per_word = 32 // packing.bits
        if packing.groupsize > 0 and K % packing.groupsize:
            raise UserError(f"{source.path}: {module} has {K} columns, which are no multiple of the group size "
                            f"{packing.groupsize}: no other program's format has a shorter last group")
        if isinstance(packing, WordPacking) and (N % per_word or K % per_word):
            raise UserError(f"{source.path}: {module} [{N}, {K}] is not of whole words of {per_word} integers, as gptq "
                            "needs: export as compressed-tensors")


# ---- what is written

def hf_tensors(source: Source, packings: dict[str, Writable],
               scale_dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder with its name."""
    packed = {f"{module}.weight": linear for module, _, linear in source.packed()}
    for name, place in source.places.items():
        if name not in packed:
            yield name, source.rows(place.key, place).view(place.shape)
            continue
        linear, module = source.linears[packed[name]], name.removesuffix(".weight")
        buffers = {kind: source.state[f"{packed[name]}.{kind}"] if kind == "order" else
                   source.rows(f"{packed[name]}.{kind}", place) for kind, _ in linear.named_buffers()}
        parts = packings[packed[name]].encode(Integers.from_buffers(linear, buffers), scale_dtype)
        yield from ((f"{module}.{part}", tensor) for part, tensor in parts.items())


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int, progress: bool) -> None:
    """model.safetensors, or several files of about shard_bytes and their index."""
    files: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        save_file(shard, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()
    try:
        with tqdm(unit="B", unit_scale=True, desc="Exporting", disable=not progress) as bar:
            for name, tensor in tensors:
                check_finite(name, tensor)
                if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
                    close()
                shard[name] = tensor
                total += tensor.nbytes
                bar.update(tensor.nbytes)
        close()
    except SafetensorError as error:
        raise RuntimeError(f"file write failed: {error}") from error             # as of torch.save, see cli.py
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def hf_config(source: Source, form: str, packings: dict[str, Writable]) -> dict[str, Any]:
    """The contents of config.json."""
    config = dict(source.config)
    if isinstance(text := config.get("text_config"), dict):          # the vision tower is not there
        config = {"dtype": config.get("dtype", config.get("torch_dtype")), **text}
        if text.get("model_type") in TEXT_MODELS:
            config["architectures"] = [TEXT_MODELS[text["model_type"]]]
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    config["tie_word_embeddings"] = source.args.tie_word_embeddings
    if packings:
        packed = {f"{module}.weight" for module, _, _ in source.packed()}
        plain = [name.removesuffix(".weight") for name, place in source.places.items() if len(place.shape) == 2
                 and name not in packed and place.key != "tok_embeddings.weight"]
        to_config = gptq_config if form == "gptq" else compressed_tensors_config
        config["quantization_config"] = to_config(source, packings, plain)
    return config


def compressed_tensors_config(source: Source, packings: dict[str, Any], plain: list[str]) -> dict[str, Any]:
    """plain: the linears that are not quantized, the head but where it is tied."""
    groups = {}
    for target, packing in {"lm_head" if name == "output" else "Linear": p for name, p in packings.items()}.items():
        grouped = packing.groupsize > 0
        weights = {"num_bits": packing.bits, "type": "int", "symmetric": packing.symmetric, "dynamic": False,
                   "strategy": "group" if grouped else "channel", "group_size": packing.groupsize if grouped else None}
        groups[f"group_{len(groups)}"] = {"targets": [target], "weights": weights, "input_activations": None,
                                          "output_activations": None, "format": "pack-quantized"}
    ignore = [*plain, "lm_head"] if source.args.tie_word_embeddings else plain
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": ignore, "kv_cache_scheme": None}


def gptq_config(source: Source, packings: dict[str, Any], plain: list[str]) -> dict[str, Any]:
    packing = next(iter(packings.values()))
    skipped = {f"-:^{re.escape(module)}$": {} for module in plain if module != "lm_head"}
    return {"quant_method": "gptq", "bits": packing.bits, "group_size": packing.groupsize, "lm_head": False,
            "sym": bool(packing.zero_offset), "checkpoint_format": "gptq" if packing.zero_offset else "gptq_v2",
            "desc_act": source.quantization is not None and bool(source.quantization.reordered),
            **({"dynamic": skipped} if skipped else {})}


# ---- the command

def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint_path", "--model", type=Path, required=True, metavar="PATH",
                        help="a model.pth, its folder, or a quantized file")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write: a new folder")
    parser.add_argument("--format", default="compressed-tensors", choices=FORMATS)
    args = parser.parse_args(argv)
    path = resolve_checkpoint(args.checkpoint_path, download=True)
    print("wrote", cli.printable(export_checkpoint(path, args.out, args.format)))


if __name__ == "__main__":
    cli.run(main)
