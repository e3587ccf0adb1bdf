"""Hugging Face checkpoint folder -> model.pth beside it, with this project's names and fused projections. GPTQ and AWQ
checkpoints keep their integers, scales and zeros: nothing is quantized again.

Every source tensor becomes whole rows of one target tensor, so nothing is assembled in memory: the file is preallocated
and each source tensor copied from its memory-mapped shard to its rows.
"""
import itertools
import os
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import kernels
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
from formats import ZERO_STEPS
from model import Transformer
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
PACKED, INTEGERS = (".qweight", ".qzeros", ".g_idx"), (torch.int32,)     # of quantized checkpoints


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


def check_tensors(folder: Path, tensors: Tensors, expected: dict[str, torch.Size]) -> None:
    """Refuses a checkpoint whose tensors are not exactly those of the model that its config.json describes."""
    known = {name: tensor for name, tensor in tensors.items() if name in expected}
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [tensor.name for name, tensor in tensors.items() if name not in expected],
        "mis-shaped": [f"{tensor.name} {list(tensor.shape)} instead of {list(expected[name])}"
                       for name, tensor in known.items() if tensor.shape != expected[name]],
        "of an unsupported dtype": [f"{tensor.name} {tensor.dtype}" for name, tensor in known.items()
                                    if tensor.dtype not in (INTEGERS if name.endswith(PACKED) else FLOATS)],
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


# ---- GPTQ and AWQ checkpoints
#
# Both stand for w[n, k] = scales[g, n] * (q[k, n] - zero[g, n]), where g is the group of column k: g_idx[k] in GPTQ,
# k // G in AWQ (and in GPTQ without desc_act). An int32 word holds P = 32 / bits integers, the first one lowest.
#
#   GPTQ   qweight [K / P, N]        q[i * P + j, n] = bits of qweight[i, n] from j * bits on
#          qzeros [groups, N / P]    zero[g, i * P + j] = those of qzeros[g, i], plus 1 but in the format "gptq_v2"
#   AWQ    qweight [K, N / 8]        q[k, i * 8 + (0 2 4 6 1 3 5 7)[j]] = those of qweight[k, i]     ("gemm", 4 bits)
#          qzeros [groups, N / 8]    zero[g, ...] alike, from qzeros[g, i]

@dataclass(frozen=True)
class PublishedQuantization:
    """How the linears of a published GPTQ or AWQ checkpoint are packed."""
    method: str
    bits: int
    groupsize: int                       # -1: a row is one group
    zero_offset: int                     # zero - stored zero

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "PublishedQuantization | None":
        """From the contents of config.json. UserError that names what is not supported."""
        stated = config.get("quantization_config") or config.get("compression_config")
        if not stated:
            return None
        get = (stated if isinstance(stated, dict) else {"quant_method": stated}).get
        method, form = get("quant_method", "unnamed"), get("checkpoint_format") or get("format")
        bits: Any = get("bits", get("w_bit"))
        groupsize: Any = get("group_size", get("q_group_size", -1))
        if method == "awq":
            layout = "version", str(get("version") or form or "gemm").lower(), ("gemm",)
        else:
            layout = "checkpoint_format", form or "gptq", ("gptq", "gptq_v2")
        marlin = "checkpoint_format", "marlin" if get("is_marlin_format") else "gptq", ("gptq", "gptq_v2")
        for key, value, supported in (("quant_method", method, ("gptq", "awq")), marlin, layout,
                                      ("bits", bits, (4,) if method == "awq" else (4, 8)),
                                      ("group_size", groupsize, (-1, 32, 64, 128, 256)),
                                      ("lm_head", bool(get("lm_head")), (False,)),
                                      ("dynamic", other_numbers(get("dynamic"), bits, groupsize), (None,))):
            if value not in supported:
                raise UserError(f"config.json: quantization_config: {key} {value!r:.80} is not supported (supported: "
                                f"{', '.join(map(str, supported))}); take the unquantized checkpoint")
        return cls(method, int(bits), int(groupsize), int(method == "gptq" and form != "gptq_v2"))

    @property
    def stored_groupsize(self) -> int:
        return 128 if self.groupsize == -1 else self.groupsize           # a row's one scale is repeated

    def source_shapes(self, N: int, K: int) -> dict[str, torch.Size]:
        """Of the tensors that stand for a weight [N, K]."""
        per_word, groups = 32 // self.bits, 1 if self.groupsize == -1 else -(-K // self.groupsize)
        qweight = (K // per_word, N) if self.method == "gptq" else (K, N // per_word)
        shapes = {"qweight": qweight, "qzeros": (groups, N // per_word), "scales": (groups, N), "g_idx": (K,)}
        return {kind: torch.Size(shape) for kind, shape in shapes.items()}

    def is_reordered(self, g_idx: Tensor) -> bool:
        K = len(g_idx)
        return not torch.equal(g_idx.long(), torch.arange(K) // (K if self.groupsize == -1 else self.groupsize))

    def unpack(self, words: Tensor) -> Tensor:
        """int32 [R, C] -> uint8 [R, C * 32 / bits]."""
        values = words.contiguous().view(torch.uint8)
        if self.bits == 4:
            values = kernels.unpack_nibbles(values)
        return values if self.method == "gptq" else values.unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1)

    def decode(self, name: str, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None,
               ) -> dict[str, Tensor]:
        """The buffers of formats.GPTQLinear; `order`, the columns as they are stored, only where they are reordered."""
        q = self.unpack(qweight.t()) if self.method == "gptq" else self.unpack(qweight).t()          # [N, K]
        ones = self.zero_offset * sum(1 << shift for shift in range(0, 32, self.bits))
        zeros = self.unpack(qzeros + ones).t()           # whole words are added, 15 + 1 carries over, as in gptqmodel
        repeats = -(-q.size(1) // self.stored_groupsize) if self.groupsize == -1 else 1
        buffers = {"weight": q, "scales": scales.t().repeat(1, repeats), "zeros": zeros.repeat(1, repeats)}
        if g_idx is not None and self.is_reordered(g_idx):
            order = g_idx.argsort(stable=True)
            if self.is_reordered(g_idx[order]):
                raise UserError(f"{name}.g_idx: groups of other sizes than {self.groupsize} are not supported")
            buffers |= {"weight": q[:, order], "order": order.int()}
        if self.bits == 4:
            buffers |= {"weight": kernels.pack_nibbles(buffers["weight"]), "zeros": buffers["zeros"] * ZERO_STEPS}
        return buffers


def other_numbers(dynamic: Any, bits: Any, groupsize: Any) -> Any:
    """What a map of patterns to settings asks for beside leaving modules as they are (which shows in their tensors)."""
    if not isinstance(dynamic, dict):
        return dynamic or None
    own = {"bits": bits, "group_size": groupsize}
    settings = (value for pattern, value in dynamic.items() if not pattern.startswith("-:"))
    return next((value for value in settings
                 if not isinstance(value, dict) or any(value.get(key, own[key]) != own[key] for key in own)), None)


class PackedLinears:
    """The packed linears of a published checkpoint.

    places: source module -> slice of the weight [N, K] that it stands for. plain: source name -> slice of the rest.
    """

    def __init__(self, published: PublishedQuantization, tensors: Tensors, slices: Slices):
        self.published, self.tensors = published, tensors
        self.places = {name.removesuffix(".weight"): place for name, place in slices.items()
                       if name.removesuffix("weight") + "qweight" in tensors}
        self.plain = {name: place for name, place in slices.items() if name.removesuffix(".weight") not in self.places}
        if mixed := {place.key for place in self.places.values()} & {place.key for place in self.plain.values()}:
            raise UserError(f"parts of {some(sorted(mixed))} are quantized and others are not, which is not supported")
        for name in [f"{module}.bias" for module in self.places]:
            if name in tensors and name not in slices and not tensors[name].read().any():
                del tensors[name]                # quantizers add biases of zeros to linears that have none

    def sources(self, module: str) -> dict[str, str]:
        """qweight, qzeros, scales and, where there is one, g_idx -> name in the checkpoint."""
        names = {kind: f"{module}.{kind}" for kind in ("qweight", "qzeros", "scales", "g_idx")}
        return {kind: name for kind, name in names.items() if kind != "g_idx" or name in self.tensors}

    def source_shapes(self) -> dict[str, torch.Size]:
        return {name: self.published.source_shapes(*place.shape)[kind]
                for module, place in self.places.items() for kind, name in self.sources(module).items()}

    def decode(self, empty: bool = False) -> Iterator[tuple[str, TargetSlice, dict[str, Tensor]]]:
        """Module, slice of its weight, buffers. empty: on the meta device but for `order`, and only g_idx is read."""
        for module, place in self.places.items():
            sources = {kind: self.tensors[name] for kind, name in self.sources(module).items()}
            stored = {kind: source.read(empty and kind != "g_idx") for kind, source in sources.items()}
            yield module, place, self.published.decode(module, **stored)

    @cached_property
    def skeleton(self) -> list[tuple[str, TargetSlice, dict[str, Tensor]]]:
        return list(self.decode(empty=True))

    def buffers(self, empty: bool = False) -> Iterator[tuple[TargetSlice, Tensor]]:
        """Every buffer with its slice."""
        for _, place, buffers in self.skeleton if empty else self.decode():
            for kind, tensor in buffers.items():
                key = place.key.removesuffix("weight") + kind
                yield (TargetSlice(key, 0, tensor.shape) if kind == "order" else
                       TargetSlice(key, place.row, tensor.shape, place.runs)), tensor

    def quantization(self) -> dict[str, Any]:
        """The fields of formats.Quantization."""
        orders: dict[str, list[int] | None] = {}
        for module, place, buffers in self.skeleton:
            linear, order = place.key.removesuffix(".weight"), buffers["order"].tolist() if "order" in buffers else None
            if orders.setdefault(linear, order) != order:
                raise UserError(f"{module}.g_idx differs from that of the other parts of {linear}: not supported")
        skipped = {place.key.removesuffix(".weight") for place in self.plain.values() if len(place.shape) == 2}
        return dict(mode=f"int{self.published.bits}-fp16", groupsize=self.published.stored_groupsize, lm_head="none",
                    skipped=sorted(skipped - {"tok_embeddings", "output"}), source=self.published.method,
                    reordered=sorted(linear for linear, order in orders.items() if order is not None))


# ---- the whole

def convert(checkpoint_dir: Path | str, progress: bool = True) -> Path:
    """Writes checkpoint_dir/model.pth (and tokenizer.json for a Qwen v1 folder); returns its path. dtypes are kept.

    Errors: UserError, for a checkpoint that is incomplete, damaged or not supported, or a folder that takes no files.
    """
    folder = Path(checkpoint_dir)
    config = read_json(folder / "config.json")
    published, args = PublishedQuantization.from_hf(config), ModelArgs.from_hf(config)
    tensors = index_tensors(folder)
    if args.tie_word_embeddings:
        drop_tied_head(folder, tensors, may_differ=bool(args.delta_layers))
    args = args.with_heads_of(tensors)
    check_layers(f"{folder}: tensors do not fit its config.json", args, tensors)
    slices = target_slices(args, tensors)
    packed = PackedLinears(published, tensors, slices) if published else None
    plain = packed.plain if packed else slices
    shapes = {name: place.shape for name, place in plain.items()}
    check_tensors(folder, tensors, shapes | packed.source_shapes() if packed else shapes)
    layout = layout_of((place, tensors[name].read(empty=True)) for name, place in plain.items())
    weights, quantization = read_tensors(tensors, plain), None
    if packed:
        layout |= layout_of(packed.buffers(empty=True))
        weights, quantization = itertools.chain(weights, packed.buffers()), packed.quantization()
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
