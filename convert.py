"""Hugging Face checkpoint folder -> model.pth beside it, in this project's names and with fused projections.

Every source tensor is a run of whole rows of one target tensor, so nothing is assembled in memory: the file is first laid out
with empty space for each target, then each source tensor is copied from its memory-mapped shard to its place.
"""
import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from cli import UserError, written_whole
from model import ModelArgs, Transformer
from tokenizer import rebuild_tiktoken

# Source module -> target module[/part of a fused one]. Source names are without their "model." or "transformer.", which base models lack.
LLAMA_NAMES = {                          # Llama, Mistral, Qwen1.5 to Qwen3
    "embed_tokens": "tok_embeddings",
    "layers.{}.input_layernorm": "layers.{}.attention_norm",
    "layers.{}.self_attn.q_proj": "layers.{}.attention.wqkv/q",
    "layers.{}.self_attn.k_proj": "layers.{}.attention.wqkv/k",
    "layers.{}.self_attn.v_proj": "layers.{}.attention.wqkv/v",
    "layers.{}.self_attn.o_proj": "layers.{}.attention.wo",
    "layers.{}.self_attn.q_norm": "layers.{}.attention.q_norm",
    "layers.{}.self_attn.k_norm": "layers.{}.attention.k_norm",
    "layers.{}.post_attention_layernorm": "layers.{}.ffn_norm",
    "layers.{}.mlp.gate_proj": "layers.{}.feed_forward.w13/gate",
    "layers.{}.mlp.up_proj": "layers.{}.feed_forward.w13/up",
    "layers.{}.mlp.down_proj": "layers.{}.feed_forward.w2",
    "norm": "norm",
    "lm_head": "output",
}
QWEN_V1_NAMES = {
    "wte": "tok_embeddings",
    "h.{}.ln_1": "layers.{}.attention_norm",
    "h.{}.attn.c_attn": "layers.{}.attention.wqkv",
    "h.{}.attn.c_proj": "layers.{}.attention.wo",
    "h.{}.ln_2": "layers.{}.ffn_norm",
    "h.{}.mlp.w2": "layers.{}.feed_forward.w13/gate",
    "h.{}.mlp.w1": "layers.{}.feed_forward.w13/up",
    "h.{}.mlp.c_proj": "layers.{}.feed_forward.w2",
    "ln_f": "norm",
    "lm_head": "output",
}
PREFIX = re.compile(r"^(model|transformer)\.")
HARMLESS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias))$")      # buffers older programs saved
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RENEW_BYTES = 1 << 26                    # pages of a mapped file count as memory until the mapping is dropped


@dataclass(frozen=True)
class Slot:
    """Where a source tensor goes: `shape[0]` rows of target `key` from `row` on."""
    key: str
    row: int
    shape: torch.Size


def slots(args: ModelArgs) -> dict[str, Slot]:
    """Source name (without prefix) -> its place, for every source tensor that this model needs."""
    with torch.device("meta"):
        targets = {key: value.shape for key, value in Transformer(args).state_dict().items()}
    q, kv, ffn = args.n_head * args.head_dim, args.n_local_heads * args.head_dim, args.intermediate_size
    parts = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv), "gate": (0, ffn), "up": (ffn, ffn)}
    found = {}
    for source, target in (QWEN_V1_NAMES if args.model_type == "qwen" else LLAMA_NAMES).items():
        module, _, part = target.partition("/")
        for layer in range(args.n_layer if "{}" in source else 1):
            for kind in ("weight", "bias"):
                key = f"{module.format(layer)}.{kind}"
                if key in targets:
                    row, rows = parts[part] if part else (0, targets[key][0])
                    found[f"{source.format(layer)}.{kind}"] = Slot(key, row, torch.Size((rows, *targets[key][1:])))
    return found


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no {path.name}: not a Hugging Face checkpoint folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def find_shards(folder: Path) -> dict[Path, set[str] | None]:
    """Weight file -> the names to take from it (None: all). An index is followed wherever there is one."""
    for kind in ("safetensors", "bin"):
        indices = sorted(folder.glob(f"*.{kind}.index.json"), key=lambda path: (path.name != f"model.{kind}.index.json", path.name))
        if indices:
            weight_map = read_json(indices[0]).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
                raise UserError(f"{indices[0]}: no weight_map in it")
            shards: dict[Path, set[str] | None] = {folder / Path(file).name: set() for file in sorted(set(weight_map.values()))}
            for name, file in weight_map.items():
                shards[folder / Path(file).name].add(name)
            if absent := [path.name for path in shards if not path.exists()]:
                raise UserError(f"{folder}: {some(absent)} named in {indices[0].name} but not there: incomplete download?")
            return shards
        whole = folder / "model.safetensors"         # beside which some repositories keep the same weights in another layout
        pattern = "*.safetensors" if kind == "safetensors" else "pytorch_model*.bin"
        if files := [whole] if kind == "safetensors" and whole.exists() else sorted(folder.glob(pattern)):
            return dict.fromkeys(files)
    raise UserError(f"{folder}: no weights there (*.safetensors or pytorch_model*.bin)")


def holds_weights(folder: Path) -> bool:
    """Whether there is something to convert in a folder, be it incomplete."""
    return any(path for pattern in ("*.safetensors", "pytorch_model*.bin", "*.index.json") for path in folder.glob(pattern))


def is_mapped(path: Path) -> bool:
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)         # .bin files of torch < 1.6 are not zip files


def open_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped: nothing is read before it is used."""
    try:
        with open(path, "rb") as file:
            if file.read(8) == b"version ":
                raise UserError(f"{path}: a git-lfs pointer, not the weights: run `git lfs pull` there")
        if path.suffix == ".safetensors":
            return load_file(path)
        shard = torch.load(path, map_location="cpu", mmap=is_mapped(path), weights_only=True)
    except (MemoryError, UserError):
        raise
    except Exception as error:           # whatever the two readers make of arbitrary bytes
        reason = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise UserError(f"{path}: corrupt or truncated: {reason}") from error
    if not isinstance(shard, dict) or not all(isinstance(tensor, Tensor) for tensor in shard.values()):
        raise UserError(f"{path}: expected a state dict, names to tensors")
    return shard


def read_shard(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for the names asked for, never keeping more than about RENEW_BYTES of a mapped file in memory."""
    shard, held = open_shard(path), 0
    for name in names:
        if held > RENEW_BYTES and is_mapped(path):
            shard, held = open_shard(path), 0
        held += shard[name].nbytes
        yield name, shard[name]


def some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more ({len(names)} in all)" if len(names) > 8 else "")


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint as found: `name` in `path`."""
    path: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype


def survey(folder: Path) -> dict[str, Source]:
    """Name without prefix -> source, for all tensors of the checkpoint but harmless buffers. Reads headers only."""
    found: dict[str, Source] = {}
    for path, names in find_shards(folder).items():
        for name, tensor in open_shard(path).items():
            if (names is not None and name not in names) or HARMLESS.search(name):
                continue
            short = PREFIX.sub("", name)
            if short in found:
                raise UserError(f"{folder}: {name} is in {found[short].path.name} and again in {path.name}")
            found[short] = Source(path, name, tensor.shape, tensor.dtype)
    return found


def check(folder: Path, sources: dict[str, Source], wanted: dict[str, Slot]) -> None:
    """Refuses a checkpoint whose tensors are not exactly those of the model its config.json describes."""
    faults = {
        "missing": [name for name in wanted if name not in sources],
        "unexpected": [source.name for name, source in sources.items() if name not in wanted],
        "mis-shaped": [f"{sources[name].name} {list(sources[name].shape)} instead of {list(slot.shape)}"
                       for name, slot in wanted.items() if name in sources and sources[name].shape != slot.shape],
        "of an unsupported dtype": [f"{source.name} {source.dtype}" for name, source in sources.items()
                                    if name in wanted and source.dtype not in DTYPES],
    }
    if any(faults.values()):
        raise UserError(f"{folder}: tensors do not fit its config.json; "
                        + "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names))


def drop_tied_head(folder: Path, sources: dict[str, Source], embedding: str) -> None:
    """A tied checkpoint may carry its head all the same; one that differs from the embedding means config.json is wrong about it."""
    head, embed = sources.get("lm_head.weight"), sources.get(embedding)
    if head is None or embed is None:
        return
    a, b = (next(read_shard(source.path, [source.name]))[1] for source in (head, embed))
    if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
        raise UserError(f"{folder}: config.json ties the head to the embedding, but {head.name} differs from {embed.name}")
    del sources["lm_head.weight"]


def lay_out(path: Path, sources: dict[str, Source], wanted: dict[str, Slot]) -> dict[str, tuple[int, torch.dtype]]:
    """Writes model.pth with empty space for its tensors. Returns key -> (offset of its first byte, dtype)."""
    shapes: dict[str, torch.Size] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, slot in wanted.items():
        rows = max(slot.row + slot.shape[0], shapes[slot.key][0] if slot.key in shapes else 0)
        shapes[slot.key] = torch.Size((rows, *slot.shape[1:]))
        dtypes[slot.key] = torch.promote_types(dtypes.get(slot.key, sources[name].dtype), sources[name].dtype)
    with FakeTensorMode():
        state_dict = {key: torch.empty(shape, dtype=dtypes[key]) for key, shape in shapes.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"version": 1, "quantization": None, "state_dict": state_dict}, path)
    saved = torch.load(path, map_location="meta", weights_only=True)["state_dict"]         # a meta storage tells where in the file it is
    return {key: (tensor.untyped_storage()._checkpoint_offset, tensor.dtype) for key, tensor in saved.items()}


def fill(path: Path, sources: dict[str, Source], wanted: dict[str, Slot], places: dict[str, tuple[int, torch.dtype]], progress: bool) -> None:
    """Copies every source tensor to its rows of the laid-out file."""
    by_name = {sources[name].name: slot for name, slot in wanted.items()}
    by_path: dict[Path, list[str]] = {}
    for name in wanted:
        by_path.setdefault(sources[name].path, []).append(sources[name].name)
    total = sum(sources[name].shape.numel() * sources[name].dtype.itemsize for name in wanted)
    with open(path, "r+b") as file, tqdm(total=total, unit="B", unit_scale=True, desc="Converting", disable=not progress) as bar:
        for shard, names in by_path.items():
            for name, tensor in read_shard(shard, names):
                slot = by_name[name]
                offset, dtype = places[slot.key]
                file.seek(offset + slot.row * slot.shape[1:].numel() * dtype.itemsize)
                file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy())
                bar.update(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())          # a full disk may show only here, and must show before the file gets its name


def convert(checkpoint_dir: Path | str, progress: bool = True) -> Path:
    """Writes checkpoint_dir/model.pth (and tokenizer.json for a Qwen v1 folder) and returns its path. dtypes stay as they are."""
    folder = Path(checkpoint_dir)
    config = read_json(folder / "config.json")
    if quantization := config.get("quantization_config") or config.get("compression_config"):
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise UserError(f"{folder / 'config.json'}: already quantized checkpoints ({method}) are not supported: take the unquantized one")
    args = ModelArgs.from_hf(config)
    wanted, sources = slots(args), survey(folder)
    if args.tie_word_embeddings:
        drop_tied_head(folder, sources, "wte.weight" if args.model_type == "qwen" else "embed_tokens.weight")
    check(folder, sources, wanted)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: not writable")
    if (folder / "qwen.tiktoken").exists() and not (folder / "tokenizer.json").exists():
        rebuild_tiktoken(folder)
    target = folder / "model.pth"
    with written_whole(target) as partial:
        fill(partial, sources, wanted, lay_out(partial, sources, wanted), progress)
    return target
