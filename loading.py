"""From a checkpoint's file to a model in memory: devices, memory, weights."""
import sys
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

import kernels
import tp
from cli import UserError, read_json
from config import ModelArgs
from convert import REMAP_BYTES, convert
from formats import Quantization, pack_for, replace_linears, set_quantize_activations
from model import Transformer
from tokenizer import Tokenizer

VERSION = 1                              # of the checkpoint file
DEMO = Path(__file__).resolve().parent / "checkpoints" / "demo" / "model.pth"


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it; else fp16 on a GPU, fp32 on a CPU (fp16 products there are emulated, and 400 times slower)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type != "cpu" or kernels.cpu_has_bf16() else torch.float32


def parse_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device (cpu, cuda, cuda:1)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} is not supported (cpu, cuda, cuda:1)")
    return device


def parse_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    if device.type == "cpu" and name == "fp16":
        raise UserError("--dtype fp16 is not for CPUs, which emulate it hundreds of times slower: use bf16 or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}[name]


def load_model(checkpoint_path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
               ranks: tp.Ranks | None = None, may_replicate: bool = False, quantize_activations: bool = True) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer, quantized if the file says so. A folder that holds a Hugging Face checkpoint but no model.pth yet is converted first.

    dtype: of the computation and of the weights that are not quantized; by default what the device computes best.
    ranks: the processes to spread the model over (tp.init_dist): each of them calls this and reads its own share, or with may_replicate all of a
    model that is too small to be spread. Errors: UserError.
    """
    path, device = Path(checkpoint_path), torch.device(device)
    if path.is_dir():
        path = path / "model.pth"
    if ranks and ranks.local_rank:
        ranks.gather(None)                  # the first rank of each machine converts and builds for the others
    if not path.exists():
        if path.name != "model.pth" or not (path.parent / "config.json").exists():
            raise UserError(f"--checkpoint_path {path}: no such file, and no Hugging Face checkpoint in its folder to convert")
        print(f"{path} is missing: converting the Hugging Face checkpoint beside it", file=sys.stderr)
        convert(path.parent)
    kernels.describe(device)
    if ranks and not ranks.local_rank:
        ranks.gather(None)
    args = ModelArgs.from_hf(read_json(path.parent / "config.json"))
    tokenizer = Tokenizer.from_dir(path.parent)
    state, quantization = read_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(args)
    if quantization:
        replace_linears(model, quantization)
    check_fits(path, model, state)
    dtype = dtype or default_dtype(device)
    dtypes = {name: loaded_dtype(name, tensor, dtype) for name, tensor in state.items()}
    part, nbytes = None, sum(tensor.numel() * dtypes[name].itemsize for name, tensor in state.items())
    if ranks:
        ranks.check_same(f"{path} ({path.stat().st_size} bytes)", (path.stat().st_size, args, [(n, t.shape, t.dtype) for n, t in state.items()]))
        if not may_replicate or tp.worth_splitting(nbytes, args.n_layer, ranks.world, device):
            part = tp.plan(args, ranks.rank, ranks.world, quantization)
            model = tp.build(part, ranks)
    needed = sum(tensor.numel() * dtypes[name].itemsize for name, tensor in model.state_dict().items())
    check_memory(device, needed * (ranks.local_world if ranks and device.type == "cpu" else 1), f"the weights of {path}")
    weights = zip(dtypes, read_weights(path, list(dtypes)))
    parts = weights if part is None else ((name, part.cut(name, tensor)) for name, tensor in weights)
    model.load_state_dict({name: kernels.copy_to(tensor, device, dtypes[name]) for name, tensor in parts}, assign=True)
    pack_for(model, device)
    set_quantize_activations(model, quantize_activations)
    kernels.trim_memory()
    return model.eval(), tokenizer


def check_memory(device: torch.device, needed: int, what: str) -> None:
    free = free_memory(device)
    if needed > free:
        raise UserError(f"out of memory: {what} take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {device}")


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return sys.maxsize                  # not Linux: let the allocation itself fail


# ---- the checkpoint file

def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Quantization | None]:
    """The state dict inside a model.pth or a quantized one, mapped from the file, and how it is quantized."""
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        version, quantization, state = checkpoint["version"], checkpoint["quantization"], checkpoint["state_dict"]
    except Exception as error:              # torch.load reports a damaged file in many ways
        raise UserError(f"{path} is not a checkpoint that this program wrote, or was cut short ({type(error).__name__})") from None
    if version != VERSION:
        raise UserError(f"{path}: version {version} of the format is not supported (supported: {VERSION}): written by a newer program?")
    if quantization is None:
        return state, None
    try:
        found = Quantization(**{key: tuple(value) if isinstance(value, list) else value for key, value in quantization.items()})
    except (TypeError, AttributeError):
        raise UserError(f"{path}: quantization {quantization} is not supported: written by a newer version of the program?") from None
    found.check(f"{path}: quantization ")
    return state, found


def check_fits(path: Path, model: Transformer, state: dict[str, Tensor]) -> None:
    """Refuses a state dict whose names and shapes are not the model's."""
    expected = {name: p.shape for name, p in model.state_dict().items()}
    wrong = sorted(expected.keys() ^ state.keys()) or [n for n in expected if expected[n] != state[n].shape]
    if wrong:
        raise UserError(f"{path} does not fit its config.json: {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}")


def loaded_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of a stored tensor in a model that computes in `dtype`: the numbers of the quantized formats stay as they are."""
    return tensor.dtype if not tensor.is_floating_point() or name.endswith(".scales") else dtype


def read_weights(path: Path, names: list[str]) -> Iterator[Tensor]:
    """One tensor after another. The file is mapped anew now and then, because its pages count as memory as long as the mapping lives."""
    state, held = read_checkpoint(path)[0], 0
    for name in names:
        if held > REMAP_BYTES:
            state, held = read_checkpoint(path)[0], 0
        held += state[name].nbytes
        yield state[name]
