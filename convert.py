"""Hugging Face checkpoint folder -> model.pth beside it, with this project's names and fused projections. Quantized
checkpoints keep their integers, scales and zeros: nothing is quantized again. FP8 becomes bf16.

Every source tensor becomes whole rows of one target tensor, so nothing is assembled in memory: the file is preallocated
and each source tensor copied from its memory-mapped shard to its rows.
"""
import itertools
import os
import re
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import (
    FLOATS,
    REMAP_BYTES,
    check_finite,
    check_layers,
    empty_model,
    preallocate,
    read_checkpoint,
    record_checksums,
)
from cli import UserError, atomic_write, read_json
from config import ModelArgs
from formats import FILE_MODES, LM_HEADS, Quantization, linear_names
from model import Transformer
from packing import PARTS, Kind, Packing, Published
from tokenizer import TOKENIZER_FILES, Tokenizer, rebuild_tiktoken

# Source module -> target module[/projection of a fused one]. Source names are without their prefix "model." or
# "transformer.", which the files of base models lack.
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
    "layers.{}.mlp.gate": "layers.{}.feed_forward.router",
    "layers.{}.mlp.experts.{}.gate_proj": "layers.{}.feed_forward.w13/gate",
    "layers.{}.mlp.experts.{}.up_proj": "layers.{}.feed_forward.w13/up",
    "layers.{}.mlp.experts.{}.down_proj": "layers.{}.feed_forward.w2/down",
    "layers.{}.mlp.shared_expert.gate_proj": "layers.{}.feed_forward.shared.w13/gate",
    "layers.{}.mlp.shared_expert.up_proj": "layers.{}.feed_forward.shared.w13/up",
    "layers.{}.mlp.shared_expert.down_proj": "layers.{}.feed_forward.shared.w2",
    "layers.{}.mlp.shared_expert_gate": "layers.{}.feed_forward.shared_gate",
    "layers.{}.linear_attn.in_proj_qkv": "layers.{}.attention.wqkv/qkv",
    "layers.{}.linear_attn.in_proj_z": "layers.{}.attention.wqkv/z",
    "layers.{}.linear_attn.in_proj_b": "layers.{}.attention.wba/b",
    "layers.{}.linear_attn.in_proj_a": "layers.{}.attention.wba/a",
    "layers.{}.linear_attn.conv1d.weight": "layers.{}.attention.conv",
    "layers.{}.linear_attn.A_log": "layers.{}.attention.A_log",
    "layers.{}.linear_attn.dt_bias": "layers.{}.attention.dt_bias",
    "layers.{}.linear_attn.norm": "layers.{}.attention.norm",
    "layers.{}.linear_attn.out_proj": "layers.{}.attention.wo",
    "norm": "norm",
    "lm_head": "output",
}
MTP_NAMES = {                            # multi-token prediction: beside one block, named as a layer is
    "mtp.fc": "mtp.fc",
    "mtp.pre_fc_norm_embedding": "mtp.embedding_norm",
    "mtp.pre_fc_norm_hidden": "mtp.hidden_norm",
    "mtp.norm": "mtp.norm",
}
QWEN3_NEXT_NAMES = {
    **{source: target for source, target in LLAMA_NAMES.items() if ".in_proj_" not in source},
    "layers.{}.linear_attn.in_proj_qkvz": "layers.{}.attention.wqkv/qkvz",
    "layers.{}.linear_attn.in_proj_ba": "layers.{}.attention.wba/ba",
}
MIXTRAL_NAMES = {
    **{source: target for source, target in LLAMA_NAMES.items() if ".mlp." not in source},
    "layers.{}.block_sparse_moe.gate": "layers.{}.feed_forward.router",
    "layers.{}.block_sparse_moe.experts.{}.w1": "layers.{}.feed_forward.w13/gate",
    "layers.{}.block_sparse_moe.experts.{}.w3": "layers.{}.feed_forward.w13/up",
    "layers.{}.block_sparse_moe.experts.{}.w2": "layers.{}.feed_forward.w2/down",
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
PREFIX = re.compile(r"^(model\.language_model|model|transformer)\.")
VISION = re.compile(r"^(model\.)?visual\.")             # towers, which are left out
OLD_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias))$")
ACTIVATION_SCALES = re.compile(r"\.((input|output)_(global_)?|(self_attn|attn)\.[qkv]_)(scale|zero_point)$")


@dataclass(frozen=True)
class TargetSlice:
    """Where a source tensor of a shape goes: to target tensor `key` from row `row` on, or run by run: some rows of the
    source to a row of the target and those after it, the next rows to another. Of a three-dimensional one, all experts
    together, the first two dimensions are rows."""
    key: str
    row: int
    shape: torch.Size
    runs: tuple[tuple[int, int], ...] = ()               # rows, first row in the target

    @property
    def rows(self) -> int:
        return self.shape[:max(1, len(self.shape) - 1)].numel()

    @property
    def columns(self) -> torch.Size:
        return self.shape[max(1, len(self.shape) - 1):]

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Runs of rows: first in the source, how many, first in the target."""
        begin = 0
        for rows, row in self.runs or ((self.rows, self.row),):
            yield begin, rows, row
            begin += rows


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint as found: `name` in `path`."""
    path: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def read(self, empty: bool = False) -> Tensor:
        """The tensor, or an empty one like it on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta") if empty else open_shard(self.path)[self.name]


Layout = dict[str, tuple[torch.Size, torch.dtype]]       # target key -> shape and dtype
Slices = dict[str, TargetSlice]
Tensors = dict[str, SourceTensor]


def target_slices(args: ModelArgs, names: Collection[str]) -> Slices:
    """Source name (without prefix) -> its slice, for every tensor of an unquantized checkpoint of this model.

    names: of the checkpoint's tensors, which say whether all experts' weights are in one tensor or in one each."""
    with torch.device("meta"):
        targets = {key: value.shape for key, value in Transformer(args).state_dict().items()}
    family = {"qwen": QWEN_V1_NAMES, "mixtral": MIXTRAL_NAMES, "qwen3_next": QWEN3_NEXT_NAMES}.get(
        args.model_type, LLAMA_NAMES)
    slices = {}

    def add(source: str, key: str, row: int, shape: tuple[int, ...], runs: tuple[tuple[int, int], ...] = ()) -> None:
        slices[source] = TargetSlice(key, row, torch.Size(shape), runs)
    names_of_layers = [(source, target, layer) for layer in range(args.n_layer) for source, target in family.items()
                       if "{}" in source or not layer]
    names_of_mtp = [(f"mtp.{source}", target.replace("layers.{}.", "mtp.layer."), 0) for source, target
                    in family.items() if source.startswith("layers.")] + [(*names, 0) for names in MTP_NAMES.items()]
    kinds = ".weight", ".bias", ""
    for (source, target, layer), kind in itertools.product(names_of_layers + names_of_mtp, kinds):
        module, _, projection = target.partition("/")
        key, of_expert, of_delta = f"{module.format(layer)}{kind}", source.count("{}") == 2, ".linear_attn." in source
        block = -1 if key.startswith("mtp.") else layer              # as in model.MTPHead
        other_kind = "feed_forward.w" in key and of_expert != args.has_experts(block)
        other_kind |= ".attention." in key and of_delta != (block in args.delta_layers)
        if key not in targets or other_kind:
            continue
        all_rows, *columns = targets[key]
        if not of_expert:
            runs = projection_runs(args, projection, all_rows)
            rows, columns = sum(n for n, _ in runs), [1, *columns] if ".conv" in key else columns
            add(f"{source.format(layer)}{kind}", key, runs[0][1], (rows, *columns), runs if len(runs) > 1 else ())
            continue
        joined = source.partition(".experts.")[0].format(layer)
        joined = f"{joined}.experts.{'down_proj' if projection == 'down' else 'gate_up_proj'}"
        E, rows = args.n_expert, all_rows // args.n_expert               # rows of an expert
        if joined in names:
            add(joined, key, 0, (E, rows, *columns))
            continue
        for expert in range(E):
            of_source = rows if projection == "down" else rows // 2
            row = expert * rows + (of_source if projection == "up" else 0)
            add(f"{source.format(layer, expert)}{kind}", key, row, (of_source, *columns))
    return slices


def projection_runs(args: ModelArgs, projection: str, all_rows: int) -> tuple[tuple[int, int], ...]:
    """Which of a fused tensor's rows a projection's are, see TargetSlice."""
    D, q, kv = args.head_dim, args.n_head * args.head_dim, args.n_local_heads * args.head_dim
    if projection == "q" and args.output_gate:                   # each head's gate follows its query
        return tuple((D, row) for head in range(0, q, D) for row in (head, q + 2 * kv + head))
    Hk, Hv, N = args.delta_key_heads, args.delta_value_heads, args.delta_channels
    if projection in ("qkvz", "ba"):                             # all that belongs to a key head together
        K, V, r = args.delta_key_dim, args.delta_value_dim, Hv // Hk
        sizes = (K, K, r * V, r * V) if projection == "qkvz" else (r, r)
        firsts = (0, Hk * K, 2 * Hk * K, N) if projection == "qkvz" else (0, Hv)
        return tuple((n, first + head * n) for head in range(Hk) for n, first in zip(sizes, firsts))
    half = all_rows // 2
    first, rows = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv), "qkv": (0, N), "z": (N, all_rows - N), "b": (0, Hv),
                   "a": (Hv, Hv), "gate": (0, half), "up": (half, half)}.get(projection, (0, all_rows))
    return ((rows, first),)


# ---- reading the checkpoint's files

def find_shards(folder: Path) -> Mapping[Path, set[str] | None]:
    """Weight file -> the names to take from it (None: all). An index is followed wherever there is one."""
    for kind, pattern in (("safetensors", "*.safetensors"), ("bin", "pytorch_model*.bin")):
        usual = folder / f"model.{kind}.index.json"
        if indices := sorted(folder.glob(f"*.{kind}.index.json")):
            return read_index(usual if usual in indices else indices[0])
        if files := sorted(folder.glob(pattern)):
            whole = folder / "model.safetensors"     # beside which some keep the same weights in another layout
            return dict.fromkeys([whole] if whole in files else files)
    raise UserError(f"{folder}: no weights there (*.safetensors or pytorch_model*.bin)")


def read_index(index: Path) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index}: no weight_map in it")
    shards: defaultdict[Path, set[str]] = defaultdict(set)
    for name, file in sorted(weight_map.items(), key=lambda item: item[1]):
        shards[index.parent / Path(file).name].add(name)
    if absent := [path.name for path in shards if not path.exists()]:
        raise UserError(f"{index.parent}: {some(absent)} named in {index.name} but not there: incomplete download?")
    return shards


def is_mapped(path: Path) -> bool:
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)         # a .bin of torch < 1.6 is no zip file


def open_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped: nothing is read before it is used."""
    if not path.is_file():
        raise UserError(f"{path}: not a regular file")
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


def read_shard(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor), never keeping more than about REMAP_BYTES of a mapped file in memory."""
    shard, mapped = open_shard(path), 0
    for name in names:
        if mapped > REMAP_BYTES and is_mapped(path):
            shard, mapped = open_shard(path), 0
        mapped += shard[name].nbytes
        yield name, shard[name]


def index_tensors(folder: Path) -> Tensors:
    """Name without prefix -> source, for all tensors of the checkpoint but OLD_BUFFERS and VISION. Reads headers
    only."""
    tensors, has_vision = Tensors(), False
    for path, names in find_shards(folder).items():
        for name, tensor in open_shard(path).items():
            if (names is not None and name not in names) or OLD_BUFFERS.search(name):
                continue
            if VISION.match(name):
                has_vision = True
                continue
            short = PREFIX.sub("", name)
            if short in tensors:
                raise UserError(f"{folder}: {name} is in {tensors[short].path.name} and again in {path.name}")
            tensors[short] = SourceTensor(path, name, tensor.shape, tensor.dtype)
    if has_vision:
        print(f"{folder}: vision tower left out: text only", file=sys.stderr)
    return tensors


def read_tensors(tensors: Tensors, slices: Slices) -> Iterator[tuple[TargetSlice, Tensor]]:
    """Every unquantized tensor with its slice, file by file."""
    by_path: defaultdict[Path, Slices] = defaultdict(dict)
    for name, place in slices.items():
        by_path[tensors[name].path][tensors[name].name] = place
    for path, places in by_path.items():
        for name, tensor in read_shard(path, places):
            yield places[name], tensor


# ---- checking them

def some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more ({len(names)} in all)" if len(names) > 8 else "")


def check_tensors(folder: Path, tensors: Tensors,
                  expected: dict[str, tuple[torch.Size, tuple[torch.dtype, ...]]]) -> None:
    """Refuses a checkpoint whose tensors are not exactly those of the model that its config.json describes. expected:
    name -> shape and possible dtypes."""
    known = {name: tensor for name, tensor in tensors.items() if name in expected}
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [tensor.name for name, tensor in tensors.items() if name not in expected],
        "mis-shaped": [f"{tensor.name} {list(tensor.shape)} instead of {list(expected[name][0])}"
                       for name, tensor in known.items() if tensor.shape != expected[name][0]],
        "of an unsupported dtype": [f"{tensor.name} {tensor.dtype}" for name, tensor in known.items()
                                    if tensor.dtype not in expected[name][1]],
    }
    if any(faults.values()):
        raise UserError(f"{folder}: tensors do not fit its config.json; "
                        + "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names))


def drop_tied_head(folder: Path, tensors: Tensors, may_differ: bool) -> None:
    """A tied checkpoint may carry its head all the same. If it differs from the embedding, config.json is wrong."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("embed_tokens.weight", tensors.get("wte.weight"))
    if head is None or embedding is None:
        return
    a, b = head.read(), embedding.read()
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    if not same_kind or not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
        if may_differ:
            return
        raise UserError(f"{folder}: config.json ties the head to the embedding, but {head.name} differs from "
                        f"{embedding.name}")
    del tensors["lm_head.weight"]


# ---- writing model.pth

def layout_of(tensors: Iterable[tuple[TargetSlice, Tensor]]) -> Layout:
    """The targets that these (empty) tensors make up. Where their dtypes differ, the wider one holds them all."""
    layout: Layout = {}
    for place, tensor in tensors:
        shape, dtype = layout.get(place.key, (torch.Size((0,)), tensor.dtype))
        rows = max(shape[0], *(row + rows for _, rows, row in place.pieces()))
        layout[place.key] = torch.Size((rows, *place.columns)), torch.promote_types(dtype, tensor.dtype)
    return layout


def copy_weights(path: Path, layout: Layout, offsets: dict[str, int], tensors: Iterable[tuple[TargetSlice, Tensor]],
                 progress: bool) -> None:
    """Copies every tensor to its rows of the preallocated file."""
    total = sum(shape.numel() * dtype.itemsize for shape, dtype in layout.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Converting", disable=not progress)
    with bar, open(path, "r+b") as file:
        for place, tensor in tensors:
            check_finite(place.key, tensor)
            dtype = layout[place.key][1]
            data = tensor.to(dtype).contiguous().view(torch.uint8).view(place.rows, -1)
            for begin, rows, row in place.pieces():
                file.seek(offsets[place.key] + row * data.size(1))
                file.write(data[begin:begin + rows].numpy().data)
            bar.update(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())          # a full disk may show only here, and must show before the file gets its name


# ---- quantized checkpoints

class ShardReader:
    """Reads tensors in any order, never keeping more than about REMAP_BYTES of mapped files in memory."""

    def __init__(self):
        self.shards, self.mapped = {}, 0

    def read(self, source: SourceTensor) -> Tensor:
        if self.mapped > REMAP_BYTES:
            self.shards, self.mapped = {}, 0
        if source.path not in self.shards:
            self.shards[source.path] = open_shard(source.path)
        tensor = self.shards[source.path][source.name]
        self.mapped += tensor.nbytes
        return tensor


@dataclass(frozen=True)
class PackedLinear:
    """A source module, the slice of its weight [N, K], and the tensors that stand for it."""
    module: str
    place: TargetSlice
    packing: Packing
    parts: Mapping[str, SourceTensor]

    @property
    def linear(self) -> str:
        return self.place.key.removesuffix(".weight")

    def expected(self) -> dict[str, tuple[torch.Size, tuple[torch.dtype, ...]]]:
        """Name -> shape and possible dtypes of each tensor that there must be."""
        expected, dtypes = {}, self.packing.dtypes()
        for part, shapes in self.packing.shapes(*self.place.shape).items():
            if part in self.parts or part not in self.packing.optional:
                found = self.parts[part].shape if part in self.parts else None
                shape = found if found is not None and tuple(found) in shapes else torch.Size(shapes[0])
                expected[f"{self.module}.{part}"] = shape, dtypes[part]
        return expected


class PackedLinears:
    """The packed linears of a published checkpoint.

    plain: source name -> slice of what is not packed. Then, by choose_kinds, kept: those whose integers stay as they
    are, all in one mode of formats.Quantization and one group size; and dequantized: the others.
    """

    def __init__(self, folder: Path, published: Published, tensors: Tensors, slices: Slices):
        self.folder, self.published, self.tensors, self.reader = folder, published, tensors, ShardReader()
        self.packed: list[PackedLinear] = []
        self.kept: list[PackedLinear] = []
        self.dequantized: list[PackedLinear] = []
        self.kind: Kind | None = None
        self.head: Kind | None = None
        self.plain = dict(slices)
        self.drop_activations()
        for name, place in slices.items():
            if packed := self.find(name.removesuffix(".weight"), place) if name.endswith(".weight") else None:
                self.packed.append(packed)
                del self.plain[name]
                bias = f"{packed.module}.bias"
                if bias in tensors and bias not in slices and not tensors[bias].read().any():
                    del tensors[bias]            # quantizers add biases of zeros to linears that have none

    def drop_activations(self) -> None:
        """A model here quantizes its activations as it is run, or not at all."""
        scales = [name for name in self.tensors if ACTIVATION_SCALES.search(name)]
        for name in scales:
            del self.tensors[name]
        if scales or self.published.quantizes_activations:
            print(f"{self.folder}: only its weights are taken as they are quantized, not its activations",
                  file=sys.stderr)

    def find(self, module: str, place: TargetSlice) -> PackedLinear | None:
        """What is packed, and how, shows in the tensors."""
        parts = {part: self.tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in self.tensors}
        packings = [packing for packing in self.published.packings if packing.marker in parts]
        if len(place.shape) != 2 or not packings:
            return None
        (N, K), empty = place.shape, {part: source.read(empty=True) for part, source in parts.items()}
        fitting = (packing for packing in packings if packing.fits(N, K, empty))
        return PackedLinear(module, place, next(fitting, packings[0]), parts)

    def expected(self) -> dict[str, tuple[torch.Size, tuple[torch.dtype, ...]]]:
        return {name: found for packed in self.packed for name, found in packed.expected().items()}

    def choose_kinds(self, linears: Collection[str]) -> None:
        """linears: of the model, those that can be quantized."""
        weights: Counter[Kind] = Counter()
        kinds: defaultdict[str, list[set[Kind]]] = defaultdict(list)     # of each linear's parts
        for packed in self.packed:
            parts = {part: self.reader.read(source) if part in ("scales", "weight_scale") else source.read(empty=True)
                     for part, source in packed.parts.items()}
            kinds[packed.linear].append(found := packed.packing.kinds(parts))
            if packed.linear != "output":
                weights.update(dict.fromkeys(found, packed.place.shape.numel()))
        for place in self.plain.values():
            kinds[place.key.removesuffix(".weight")].append(set())
        by_mode = sorted(weights, key=lambda kind: FILE_MODES.index(kind[0]))
        self.kind = max(by_mode, key=lambda kind: weights[kind], default=None)
        heads = {kind for possible in kinds["output"] for kind in possible if self.kind and kind[0] in LM_HEADS
                 and (not kind[1] or self.kind[1] in (0, kind[1]))}
        self.head = min(heads, default=None)
        chosen = {linear: self.head if linear == "output" else self.kind for linear in linears}
        for packed in self.packed:
            kind = chosen.get(packed.linear)
            stays = kind is not None and all(kind in possible for possible in kinds[packed.linear])
            (self.kept if stays else self.dequantized).append(packed)
        if self.dequantized:
            print(f"{self.folder}: what no number format here holds becomes bf16: "
                  f"{some([packed.module for packed in self.dequantized])}", file=sys.stderr)

    def decode(self, empty: bool = False) -> Iterator[tuple[PackedLinear, dict[str, Tensor]]]:
        """The buffers of those that are kept. empty: on the meta device but for `order`, and only g_idx is read."""
        for packed in self.kept:
            parts = {part: source.read(empty=True) if empty and not part.endswith("g_idx") else self.reader.read(source)
                     for part, source in packed.parts.items()}
            kind = self.head if packed.linear == "output" else self.kind
            assert kind is not None
            yield packed, packed.packing.decode(packed.module, packed.place.shape, parts).to_buffers(kind[0])

    @cached_property
    def skeleton(self) -> list[tuple[PackedLinear, dict[str, Tensor]]]:
        return list(self.decode(empty=True))

    def weights(self, empty: bool = False) -> Iterator[tuple[TargetSlice, Tensor]]:
        """Every buffer and dequantized weight with its slice."""
        for packed, buffers in self.skeleton if empty else self.decode():
            place = packed.place
            for kind, tensor in buffers.items():
                row, runs = (0, ()) if kind == "order" else (place.row, place.runs)
                yield TargetSlice(f"{packed.linear}.{kind}", row, tensor.shape, runs), tensor
        for packed in self.dequantized:
            shape = packed.place.shape
            if empty:
                yield packed.place, torch.empty(shape, dtype=torch.bfloat16, device="meta")
            else:
                parts = {part: self.reader.read(source) for part, source in packed.parts.items()}
                yield packed.place, packed.packing.dequantize(packed.module, shape, parts)

    def quantization(self) -> dict[str, Any] | None:
        """The fields of formats.Quantization."""
        if self.kind is None:
            return None
        orders: dict[str, list[int] | None] = {}
        for packed, buffers in self.skeleton:
            order = buffers["order"].tolist() if "order" in buffers else None
            if orders.setdefault(packed.linear, order) != order:
                raise UserError(f"{packed.module}.g_idx differs from that of the other parts of {packed.linear}: not "
                                "supported")
        places = [*self.plain.values(), *(packed.place for packed in self.dequantized)]
        skipped = {place.key.removesuffix(".weight") for place in places if len(place.shape) == 2}
        groupsize = self.kind[1] or (self.head[1] if self.head else 0) or Quantization.groupsize
        return dict(mode=self.kind[0], groupsize=groupsize, lm_head=self.head[0] if self.head else "none",
                    skipped=sorted(skipped - {"tok_embeddings", "output"}), source=self.published.method,
                    reordered=sorted(linear for linear, order in orders.items() if order is not None))


# ---- the whole

def convert(checkpoint_dir: Path | str, progress: bool = True) -> Path:
    """Writes checkpoint_dir/model.pth (and tokenizer.json for a Qwen v1 folder); returns its path. dtypes are kept.

    Errors: UserError, for a checkpoint that is incomplete, damaged or not supported, or a folder that takes no files.
    """
    folder = Path(checkpoint_dir)
    config = read_json(folder / "config.json")
    published, args = Published.from_hf(config), ModelArgs.from_hf(config)
    tensors = index_tensors(folder)
    if args.tie_word_embeddings:
        drop_tied_head(folder, tensors, may_differ=bool(args.delta_layers))
    args = args.with_heads_of(tensors)
    check_layers(f"{folder}: tensors do not fit its config.json", args, tensors)
    slices = target_slices(args, tensors)
    packed = PackedLinears(folder, published, tensors, slices) if published else None
    plain = packed.plain if packed else slices
    expected = {name: (place.shape, FLOATS) for name, place in plain.items()}
    check_tensors(folder, tensors, expected | packed.expected() if packed else expected)
    empty = [(place, tensors[name].read(empty=True)) for name, place in plain.items()]
    weights, quantization = read_tensors(tensors, plain), None
    if packed:
        with torch.device("meta"):
            linears = linear_names(Transformer(args))
        packed.choose_kinds(linears)
        empty += packed.weights(empty=True)
        weights, quantization = itertools.chain(weights, packed.weights()), packed.quantization()
    layout = layout_of(empty)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: not writable")
    if any((folder / name).exists() for name in TOKENIZER_FILES):            # one may be put there later
        Tokenizer.from_dir(folder).check_fits(args.vocab_size)
    target = folder / "model.pth"
    with atomic_write(target) as partial:
        copy_weights(partial, layout, preallocate(partial, layout, quantization), weights, progress)
        record_checksums(partial)
        written, found = read_checkpoint(partial)
        empty_model(target, args, written, found)        # what is refused there would be refused when it is loaded
        if (folder / "qwen.tiktoken").exists() and not (folder / "tokenizer.json").exists():
            rebuild_tiktoken(folder)
    return target
