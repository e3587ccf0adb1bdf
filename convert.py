"""Hugging Face checkpoint folder -> model.pth beside it, in this project's names and with fused projections. GPTQ and AWQ checkpoints keep
their numbers, scales and zeros: nothing is quantized again.

Every source tensor is a run of whole rows of one target tensor, so nothing is assembled in memory: the file is first laid out
with empty space for each target, then each source tensor is copied from its memory-mapped shard to its place.
"""
import itertools
import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from config import ModelArgs
import kernels
from cli import UserError, atomic_write
from model import Transformer
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
PACKED, INTEGERS = (".qweight", ".qzeros", ".g_idx"), (torch.int32,)     # of quantized checkpoints
REMAP_BYTES = 1 << 26                    # pages of a mapped file count as memory until the mapping is dropped


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
    """Yields (name, tensor) for the names asked for, never keeping more than about REMAP_BYTES of a mapped file in memory."""
    shard, held = open_shard(path), 0
    for name in names:
        if held > REMAP_BYTES and is_mapped(path):
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


def index_tensors(folder: Path) -> dict[str, Source]:
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
                                    if name in wanted and source.dtype not in (INTEGERS if name.endswith(PACKED) else DTYPES)],
    }
    if any(faults.values()):
        raise UserError(f"{folder}: tensors do not fit its config.json; "
                        + "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names))


def read_one(source: Source) -> Tensor:
    return next(read_shard(source.path, [source.name]))[1]


def drop_tied_head(folder: Path, sources: dict[str, Source], embedding: str) -> None:
    """A tied checkpoint may carry its head all the same; one that differs from the embedding means config.json is wrong about it."""
    head, embed = sources.get("lm_head.weight"), sources.get(embedding)
    if head is None or embed is None:
        return
    a, b = read_one(head), read_one(embed)
    if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
        raise UserError(f"{folder}: config.json ties the head to the embedding, but {head.name} differs from {embed.name}")
    del sources["lm_head.weight"]


def read_plain(sources: dict[str, Source], wanted: dict[str, Slot]) -> Iterator[tuple[Slot, Tensor]]:
    """Every wanted source tensor with its place."""
    by_name = {sources[name].name: slot for name, slot in wanted.items()}
    by_path: dict[Path, list[str]] = {}
    for name in wanted:
        by_path.setdefault(sources[name].path, []).append(sources[name].name)
    for shard, names in by_path.items():
        for name, tensor in read_shard(shard, names):
            yield by_name[name], tensor


def layout_of(sources: dict[str, Source], wanted: dict[str, Slot]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every target tensor."""
    found: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for name, slot in wanted.items():
        shape, dtype = found.get(slot.key, (torch.Size((0,)), sources[name].dtype))
        rows = max(slot.row + slot.shape[0], shape[0])
        found[slot.key] = torch.Size((rows, *slot.shape[1:])), torch.promote_types(dtype, sources[name].dtype)
    return found


def preallocate(path: Path, layout: dict[str, tuple[torch.Size, torch.dtype]], quantization: dict | None) -> dict[str, tuple[int, torch.dtype]]:
    """Writes model.pth with empty space for its tensors. Returns key -> (offset of its first byte, dtype)."""
    with FakeTensorMode():
        state_dict = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in layout.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"version": 1, "quantization": quantization, "state_dict": state_dict}, path)
    saved = torch.load(path, map_location="meta", weights_only=True)["state_dict"]         # a meta storage tells where in the file it is
    return {key: (tensor.untyped_storage()._checkpoint_offset, tensor.dtype) for key, tensor in saved.items()}


def fill(path: Path, tensors: Iterable[tuple[Slot, Tensor]], places: dict[str, tuple[int, torch.dtype]], total: int, progress: bool) -> None:
    """Copies every tensor to its rows of the laid-out file. total: of their bytes."""
    with open(path, "r+b") as file, tqdm(total=total, unit="B", unit_scale=True, desc="Converting", disable=not progress) as bar:
        for slot, tensor in tensors:
            offset, dtype = places[slot.key]
            file.seek(offset + slot.row * slot.shape[1:].numel() * dtype.itemsize)
            file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy())
            bar.update(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())          # a full disk may show only here, and must show before the file gets its name


# ---- GPTQ and AWQ checkpoints
#
# GPTQ: qweight int32 [K * bits / 32, N], the columns of a row from the lowest bits on; qzeros int32 [groups, N * bits / 32], alike;
# scales [groups, N]; g_idx [K], the group of each column. w = scale * (q - zero). "gptq" stores zero - 1 in qzeros, "gptq_v2" the zero itself.
# AWQ (gemm): qweight int32 [K, N / 8], qzeros int32 [groups, N / 8], of eight neighbours first the even ones, then the odd ones; scales [groups, N].

@dataclass(frozen=True)
class PublishedQuantization:
    """How the linears of a published quantized checkpoint are packed."""
    method: str
    bits: int
    groupsize: int                       # -1: a row is one group
    offset: int                          # of the zeros stored: 1 or 0

    @classmethod
    def from_hf(cls, config: dict) -> "PublishedQuantization | None":
        """From config.json. UserError that names what is not supported."""
        quantization = config.get("quantization_config") or config.get("compression_config")
        if not quantization:
            return None

        def refuse_unless(key: str, found, *allowed) -> None:
            if found not in allowed:
                raise UserError(f"config.json: quantization_config: {key} {found!r} is not supported (supported: {', '.join(map(str, allowed))}); "
                                "take the unquantized checkpoint")
        if not isinstance(quantization, dict):
            refuse_unless("quant_method", quantization, "gptq", "awq")
        get = quantization.get
        method, bits, groupsize = get("quant_method", "unnamed"), get("bits", get("w_bit")), get("group_size", get("q_group_size", -1))
        form = get("checkpoint_format") or get("format") or "gptq"
        refuse_unless("quant_method", method, "gptq", "awq")
        if get("is_marlin_format"):
            refuse_unless("checkpoint_format", "marlin", "gptq", "gptq_v2")
        if method == "gptq":
            refuse_unless("checkpoint_format", form, "gptq", "gptq_v2")
        else:
            refuse_unless("version", str(get("version") or get("checkpoint_format") or get("format") or "gemm").lower(), "gemm")
        refuse_unless("bits", bits, *((4, 8) if method == "gptq" else (4,)))
        refuse_unless("group_size", groupsize, -1, 32, 64, 128, 256)
        refuse_unless("lm_head", bool(get("lm_head")), False)
        refuse_unless("dynamic", get("dynamic") or None, None)
        return cls(method, bits, groupsize, int(method == "gptq" and form == "gptq"))

    def shapes(self, N: int, K: int) -> dict[str, torch.Size]:
        """Of the tensors that stand for a weight [N, K]."""
        share, groups = 32 // self.bits, 1 if self.groupsize == -1 else -(-K // self.groupsize)
        qweight = (K // share, N) if self.method == "gptq" else (K, N // share)
        shapes = {"qweight": qweight, "qzeros": (groups, N // share), "scales": (groups, N), "g_idx": (K,)}
        return {key: torch.Size(shape) for key, shape in shapes.items()}

    @property
    def stored_groupsize(self) -> int:
        return 128 if self.groupsize == -1 else self.groupsize           # a row's one scale is repeated

    def unpack(self, packed: Tensor) -> Tensor:
        """int32 [R, C] -> uint8 [R, C * 32 / bits]."""
        values = packed.contiguous().view(torch.uint8)
        if self.bits == 4:
            values = kernels.unpack_int4(values)
        return values if self.method == "gptq" else values.unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1)

    def decode(self, name: str, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None) -> dict[str, Tensor]:
        """The buffers of formats.GPTQLinear: order, of the columns as they are stored, only where it is another than the columns' own."""
        K = len(g_idx) if g_idx is not None else qweight.size(0) * (32 // self.bits if self.method == "gptq" else 1)
        ones = self.offset * sum(1 << shift for shift in range(0, 32, self.bits))
        zeros = self.unpack(qzeros + ones).t() * (16 if self.bits == 4 else 1)           # whole words are added, with carries, as gptqmodel does
        q = self.unpack(qweight.t()) if self.method == "gptq" else self.unpack(qweight).t()
        repeats = -(-K // self.stored_groupsize) if self.groupsize == -1 else 1
        buffers = {"scales": scales.t().repeat(1, repeats), "zeros": zeros.repeat(1, repeats)}
        groups = torch.arange(K) // (self.groupsize if self.groupsize > 0 else K)
        if g_idx is not None and not torch.equal(g_idx.long(), groups):
            order = g_idx.argsort(stable=True)
            if not torch.equal(g_idx[order].long(), groups):
                raise UserError(f"{name}.g_idx: groups of other sizes than {self.groupsize} are not supported")
            q, buffers["order"] = q[:, order], order.int()
        return {"weight": q[:, ::2] | q[:, 1::2] << 4 if self.bits == 4 else q, **buffers}


def packed_sources(packing: PublishedQuantization, sources: dict[str, Source], wanted: dict[str, Slot]) -> tuple[dict[str, Slot], dict[str, dict[str, Slot]]]:
    """Splits what is wanted: source name -> its place, for plain tensors; module -> its packed tensors (their shapes), for packed ones."""
    plain, modules = dict(wanted), {}
    for name, slot in wanted.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and f"{module}.qweight" in sources:
            del plain[name]
            modules[module] = {key: Slot(slot.key.removesuffix(".weight"), slot.row, shape) for key, shape in packing.shapes(*slot.shape).items()
                               if key != "g_idx" or f"{module}.g_idx" in sources}
    if mixed := sorted({slot.key for slot in plain.values()} & {f"{slots['qweight'].key}.weight" for slots in modules.values()}):
        raise UserError(f"parts of {some(mixed)} are quantized and others are not, which is not supported")
    return plain, modules


def drop_zero_biases(sources: dict[str, Source], wanted: dict[str, Slot]) -> None:
    """Quantizers add biases of zeros to linears that have none."""
    for name in [name for name in sources if name.endswith(".bias") and name not in wanted and name.replace(".bias", ".qweight") in sources]:
        if not read_one(sources[name]).any():
            del sources[name]


def layout_of_packed(packing: PublishedQuantization, sources: dict[str, Source], wanted: dict[str, Slot], modules: dict[str, dict[str, Slot]],
                     ) -> tuple[dict[str, tuple[torch.Size, torch.dtype]], list[str]]:
    """Shape and dtype of the target tensors that the packed ones make, and the names of the linears whose columns are stored in another order."""
    layout: dict[str, tuple[torch.Size, torch.dtype]] = {}
    reordered: dict[str, Tensor | None] = {}
    for module, slots in modules.items():
        key, (rows, K) = slots["qweight"].key, wanted[f"{module}.weight"].shape
        rows = max(slots["qweight"].row + rows, layout[f"{key}.weight"][0][0] if f"{key}.weight" in layout else 0)
        groups = -(-K // packing.stored_groupsize)
        layout |= {f"{key}.weight": (torch.Size((rows, K * packing.bits // 8)), torch.uint8),
                   f"{key}.scales": (torch.Size((rows, groups)), sources[f"{module}.scales"].dtype),
                   f"{key}.zeros": (torch.Size((rows, groups)), torch.uint8)}
        g_idx = None
        if "g_idx" in slots and packing.groupsize != -1:
            g_idx = read_one(sources[f"{module}.g_idx"]).clone()
            g_idx = None if torch.equal(g_idx.long(), torch.arange(K) // packing.groupsize) else g_idx
        other = reordered.setdefault(key, g_idx)
        if (g_idx is None) != (other is None) or (g_idx is not None and not torch.equal(g_idx, other)):
            raise UserError(f"{module}.g_idx differs from that of the other parts of {key}, which is not supported")
        if g_idx is not None:
            layout[f"{key}.order"] = torch.Size((K,)), torch.int32
    return layout, sorted(key for key, g_idx in reordered.items() if g_idx is not None)


def read_packed(packing: PublishedQuantization, sources: dict[str, Source], modules: dict[str, dict[str, Slot]]) -> Iterator[tuple[Slot, Tensor]]:
    """Every buffer that the packed tensors make, with its place, module by module."""
    for module, found in modules.items():
        buffers = packing.decode(module, **{key: read_one(sources[f"{module}.{key}"]) for key in found})
        for key, tensor in buffers.items():
            yield Slot(f"{found['qweight'].key}.{key}", 0 if key == "order" else found["qweight"].row, tensor.shape), tensor


def convert(checkpoint_dir: Path | str, progress: bool = True) -> Path:
    """Writes checkpoint_dir/model.pth (and tokenizer.json for a Qwen v1 folder) and returns its path. dtypes stay as they are."""
    folder = Path(checkpoint_dir)
    config = read_json(folder / "config.json")
    packing, args = PublishedQuantization.from_hf(config), ModelArgs.from_hf(config)
    wanted, sources = slots(args), index_tensors(folder)
    if args.tie_word_embeddings:
        drop_tied_head(folder, sources, "wte.weight" if args.model_type == "qwen" else "embed_tokens.weight")
    plain, modules = wanted, {}
    if packing:
        drop_zero_biases(sources, wanted)
        plain, modules = packed_sources(packing, sources, wanted)
    check(folder, sources, plain | {f"{module}.{key}": slot for module, slots in modules.items() for key, slot in slots.items()})
    layout, quantization = layout_of(sources, plain), None
    if packing:
        packed, reordered = layout_of_packed(packing, sources, wanted, modules)
        layout |= packed
        linears = {slot.key.removesuffix(".weight") for name, slot in wanted.items() if name.endswith(".weight") and len(slot.shape) == 2}
        skipped = sorted(linears - {"tok_embeddings", "output"} - {slots["qweight"].key for slots in modules.values()})
        quantization = dict(mode=f"int{packing.bits}-fp16", groupsize=packing.stored_groupsize, lm_head="none", skipped=skipped,
                            source=packing.method, reordered=reordered)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: not writable")
    if (folder / "qwen.tiktoken").exists() and not (folder / "tokenizer.json").exists():
        rebuild_tiktoken(folder)
    target = folder / "model.pth"
    with atomic_write(target) as partial:
        tensors = itertools.chain(read_plain(sources, plain), read_packed(packing, sources, modules))
        total = sum(shape.numel() * dtype.itemsize for shape, dtype in layout.values())
        fill(partial, tensors, preallocate(partial, layout, quantization), total, progress)
    return target
