"""The checkpoint file, model.pth or a quantized one: {"version", "quantization": None or a dict, "state_dict"}.

It is what torch.save writes, a zip archive with a CRC-32 of every record: `verify_checkpoint` compares them, and so
does `unzip -t`.
"""
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from cli import UserError, atomic_write
from config import ModelArgs
from formats import CHUNK_WEIGHTS, Quantization, replace_linears
from model import Transformer

VERSION = 1
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REMAP_BYTES = 1 << 26                    # pages of a mapped file count as memory for as long as the mapping lives
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


# ---- reading

def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Quantization | None]:
    """The state dict inside a checkpoint file, mapped from it, and how it is quantized. Errors: UserError."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        version, quantization, state = checkpoint["version"], checkpoint["quantization"], checkpoint["state_dict"]
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise TypeError("names")
    except Exception as error:           # torch.load reports a damaged file in many ways
        raise UserError(f"{path} is not a checkpoint that this program wrote, or was cut short "
                        f"({type(error).__name__})") from None
    if version != VERSION:
        raise UserError(f"{path}: version {version!r:.40} of the format is not supported (supported: {VERSION}): "
                        "written by a newer program?")
    if quantization is None:
        return state, None
    try:
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in quantization.items()}
        found = Quantization(**fields)
        found.check(f"{path}: quantization ")
    except (TypeError, AttributeError):
        raise UserError(f"{path}: quantization {quantization!r:.200} is not supported: "
                        "written by a newer version of the program?") from None
    return state, found


def read_weights(state: dict[str, Tensor], names: Iterable[str]) -> Iterator[Tensor]:
    """Tensors of read_checkpoint, in turn. Those that were read no longer count as this process's memory."""
    for name in names:
        yield state[name]
        kernels.release_mapped(state[name])


# ---- checking

def empty_model(path: Path, args: ModelArgs, state: dict[str, Any], quantization: Quantization | None) -> Transformer:
    """The model that a file's tensors are for, on the meta device. Errors: UserError, where it is for another."""
    check_layers(f"{path} does not fit its config.json", args, state)
    args = args.with_heads_of(state)
    with torch.device("meta"):
        model = Transformer(args)
    if quantization:
        replace_linears(model, quantization)
    check_fits(path, model, state)
    return model


def check_layers(where: str, args: ModelArgs, names: Iterable[str]) -> None:
    """Before a model with as many layers as config.json says takes time and memory."""
    found = {int(match[1][:9]) for match in map(LAYER.search, names) if match}
    if len(found) < args.n_layer:
        raise UserError(f"{where}, which says num_hidden_layers {args.n_layer}: it has tensors of {len(found)} layers")


def check_fits(path: Path, model: Transformer, state: dict[str, Any]) -> None:
    """Refuses a state dict whose names, shapes and dtypes are not the model's."""
    expected, parameters = model.state_dict(), dict(model.named_parameters())

    def fits(name: str) -> bool:
        tensor, dtypes = state[name], FLOATS if name in parameters else (expected[name].dtype,)
        return (isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
                and not tensor.is_quantized and tensor.dtype in dtypes and tensor.shape == expected[name].shape)
    wrong = sorted(expected.keys() ^ state.keys()) or [name for name in expected if not fits(name)]
    if wrong:
        more = " ..." if len(wrong) > 4 else ""
        raise UserError(f"{path} does not fit its config.json: {', '.join(wrong[:4])[:200]}{more}")


def check_finite(name: str, weight: Tensor) -> None:
    """Errors: UserError. A row's sum, which the kernels compute at the memory's speed, is finite if all its terms are,
    unless it overflows."""
    if not weight.is_floating_point():
        return
    for rows in weight.reshape(-1, weight.size(-1)).split(max(1, CHUNK_WEIGHTS // weight.size(-1))):
        rows = rows.float() if rows.dtype == torch.float16 else rows         # which CPUs multiply slowly
        sums = kernels.linear(rows.new_ones(1, rows.size(1)), rows)
        if not sums.isfinite().all() and not rows.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity: a damaged checkpoint")


def verify_checkpoint(path: Path, required: bool = True) -> None:
    """Reads the whole file and compares its checksums. Errors: UserError, where they differ or, if required, are not
    there, as in files of older versions."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.file_size and not record.CRC for record in archive.infolist()):
                if required:
                    raise UserError(f"{path} has no checksums: written by an older version of this program")
                return
            damaged = archive.testzip()
    except UserError:
        raise
    except Exception as error:           # whatever zipfile makes of arbitrary bytes
        raise UserError(f"{path} is damaged: {str(error)[:100] or type(error).__name__}") from None
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} does not match its checksum")


# ---- writing

def write_checkpoint(path: Path, state: dict[str, Tensor], quantization: Quantization | None) -> None:
    """The same tensors make the same bytes. Errors: UserError, for a full disk; then the old file is still there."""
    recorded = quantization and {key: list(value) if isinstance(value, tuple) else value
                                 for key, value in asdict(quantization).items()}
    with atomic_write(path) as partial, open(partial, "wb") as file:
        # Into an open file: given a name, torch.save would write it into the archive.
        torch.save({"version": VERSION, "quantization": recorded, "state_dict": state}, file)
        file.flush()
        os.fsync(file.fileno())          # a full disk may show only here, and must before the file gets its name


def preallocate(path: Path, shapes: dict[str, tuple[torch.Size, torch.dtype]],
                quantization: dict[str, Any] | None) -> dict[str, int]:
    """Writes a checkpoint with empty space for its tensors. Returns name -> offset of its first byte in the file."""
    with FakeTensorMode(), open(path, "wb") as file:
        state_dict = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in shapes.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"version": VERSION, "quantization": quantization, "state_dict": state_dict}, file)
    saved = torch.load(path, map_location="meta", weights_only=True)["state_dict"]       # whose storages know offsets
    return {key: tensor.untyped_storage()._checkpoint_offset for key, tensor in saved.items()}


def record_checksums(path: Path) -> None:
    """Of the tensors of a preallocated file, now that they are there: into the zip archive's directory, and after each
    record (PKWARE's APPNOTE 6.3.10, sections 4.3.9 and 4.3.12)."""
    with zipfile.ZipFile(path) as archive:
        entries, entry = archive.infolist(), archive.start_dir                # entry: offset of the directory's next
    with open(path, "r+b") as file:
        for record in entries:
            file.seek(record.header_offset + 26)
            begin = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            file.seek(begin)
            crc, left = 0, record.file_size
            while left:
                data = file.read(min(left, 1 << 24))
                crc, left = zlib.crc32(data, crc), left - len(data)
            for offset in (begin + record.file_size + 4, entry + 16):
                file.seek(offset)
                file.write(struct.pack("<I", crc))
            file.seek(entry + 28)
            entry += 46 + sum(struct.unpack("<HHH", file.read(6)))
