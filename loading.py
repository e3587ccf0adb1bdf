"""From what a user names, a file, a folder or a repository of the Hugging Face Hub, to a model in memory."""
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

import kernels
import tp
from checkpoint import check_finite, empty_model, read_checkpoint, read_weights, verify_checkpoint
from cli import UserError, read_json
from config import ModelArgs
from convert import convert
from formats import QuantizedLinear, pack_for, set_quantize_activations
from model import Transformer
from tokenizer import Tokenizer

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
DEMO = CHECKPOINTS / "demo" / "model.pth"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.pth)")
CONFIG_AND_TOKENIZER = ("config.json", "generation_config.json", "quantize_config.json", "quant_config.json",
                        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
                        "added_tokens.json", "special_tokens_map.json", "chat_template.*", "qwen.tiktoken",
                        "LICENSE*", "NOTICE*")
WEIGHTS = (("*.safetensors", "*.safetensors.index.json"),                # the first of these that is there
           ("pytorch_model*.bin", "pytorch_model*.bin.index.json"))
NEVER = ("*.py", "consolidated*", "adapter_model*")      # code; the weights in another layout; not a model by itself


def load_model(checkpoint_path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
               ranks: tp.Ranks | None = None, may_replicate: bool = False, quantize_activations: bool = True,
               verify: bool = False, mtp: bool = False, int8_kv_cache: bool = False) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer, quantized if the file says so.

    checkpoint_path: as in resolve_checkpoint; what is missing is downloaded and converted first.
    dtype: of the computation and of the weights that are not quantized; by default what the device computes best.
    ranks: the processes to spread the model over (tp.init_dist): each of them calls this and reads its own shard, or,
    with may_replicate, all of a model that is too small to be spread.
    verify: whether to compare the file's checksums first, which reads all of it.
    mtp: whether to load the checkpoint's head for multi-token prediction, too.
    int8_kv_cache: whether keys and values are kept in int8. Errors: UserError.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)       # where Triton starts its kernels, and CUDA graphs are recorded
    if ranks and ranks.local_rank:
        ranks.gather(None)                  # each machine's first rank downloads, converts and builds for the others
    path = resolve_checkpoint(checkpoint_path, download=True)
    kernels.describe(device)
    if verify and not (ranks and ranks.local_rank):
        verify_checkpoint(path)
    if ranks and not ranks.local_rank:
        ranks.gather(None)
    args, tokenizer = ModelArgs.from_hf(read_json(path.parent / "config.json")), Tokenizer.from_dir(path.parent)
    tokenizer.check_fits(args.vocab_size)
    state, quantization = read_checkpoint(path)
    if mtp and "mtp.norm.weight" not in state:
        raise UserError(f"mtp: {path} has no head for multi-token prediction (mtp.*)", "draft")
    state = state if mtp else {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    args = args.with_heads_of(state)
    model = empty_model(path, args, state, quantization)
    dtype = dtype or default_dtype(device)
    dtypes = {name: loaded_dtype(name, tensor, dtype) for name, tensor in state.items()}
    plan, nbytes = None, sum(tensor.numel() * dtypes[name].itemsize for name, tensor in state.items())
    if ranks:
        size, shapes = path.stat().st_size, [(name, tensor.shape, tensor.dtype) for name, tensor in state.items()]
        ranks.check_same(f"{path} ({size} bytes)", (size, args, shapes))
        if not may_replicate or tp.worth_splitting(nbytes, args.n_layer, ranks.world_size, device):
            plan = tp.plan(args, ranks.rank, ranks.world_size, quantization)
            model = tp.build(plan, ranks)
    needed = sum(tensor.numel() * dtypes[name].itemsize for name, tensor in model.state_dict().items())
    sharing = ranks.local_world_size if ranks and device.type == "cpu" else 1
    check_memory(device, needed * sharing, f"the weights of {path}")
    repacked = {f"{name}.{key}" for name, module in model.named_modules() for key in ("weight", "scales", "zeros")
                if isinstance(module, QuantizedLinear) and module.repacks(device)}
    loaded = {}
    for name, tensor in zip(dtypes, read_weights(state, dtypes), strict=True):
        shard = plan.shard(name, tensor) if plan else tensor
        loaded[name] = shard if name in repacked else kernels.copy_to(shard, device, dtypes[name])
        check_finite(name, loaded[name])
    model.load_state_dict(loaded, assign=True)
    pack_for(model, device, kernels.release_mapped)
    set_quantize_activations(model, quantize_activations)
    model.int8_kv_cache = int8_kv_cache
    kernels.trim_memory()
    kernels.keep_freed_memory()
    return model.eval(), tokenizer


def loaded_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of a stored tensor in a model that computes in `dtype`: the numbers of the quantized formats stay as they are.
    Those of a DeltaNet's recurrence are fp32."""
    if name.endswith(("attention.A_log", "attention.dt_bias", "attention.norm.weight")):
        return torch.float32
    return tensor.dtype if not tensor.is_floating_point() or name.endswith(".scales") else dtype


# ---- devices and memory

def parse_device(name: str) -> torch.device:
    """Errors: UserError, for what is not a device, not supported or not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{name!r} is not a device (cpu, cuda, cuda:1)", "device") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{name!r} is not supported (cpu, cuda, cuda:1)", "device")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{name}: this PyTorch ({torch.__version__}) sees no CUDA device", "device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{name}: there are {torch.cuda.device_count()} CUDA devices", "device")
    return device


def parse_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    if device.type == "cpu" and name == "fp16":
        raise UserError("fp16 is not for CPUs, which emulate it hundreds of times slower: use bf16 or fp32", "dtype")
    return None if name is None else DTYPES[name]


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it; else fp16 on a GPU, fp32 on a CPU (where fp16 is 400 times slower)."""
    if device.type == "cuda":
        has_bf16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    return torch.bfloat16 if device.type != "cpu" or kernels.cpu_has_bf16() else torch.float32


def check_memory(device: torch.device, needed: int, what: str) -> None:
    """needed: in bytes. Errors: UserError, where less is free."""
    free = free_memory(device)
    if needed > free:
        raise UserError(f"out of memory: {what} take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on "
                        f"{device}")


def free_memory(device: torch.device) -> int:
    """In bytes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return sys.maxsize                  # not Linux: let the allocation itself fail


# ---- finding the checkpoint, on the Hugging Face Hub too

def resolve_checkpoint(checkpoint_path: Path | str, field: str = "checkpoint_path", download: bool = False) -> Path:
    """The file that a user names: itself, the model.pth in a folder or, for a Hub id such as Qwen/Qwen3-0.6B where
    there is no such path, the model.pth in this project's checkpoints/<id>.

    download: whether to make a model.pth that is missing, from the Hugging Face checkpoint in its folder or on the Hub.
    Errors: UserError, for a file that is still missing.
    """
    path, name, is_hub_id = Path(checkpoint_path), str(checkpoint_path), False
    if HUB_ID.fullmatch(name) and not path.exists():
        is_hub_id = (CHECKPOINTS / name).exists() or not path.parent.exists()      # else a slip in a local path
    if path.is_dir() or is_hub_id:
        path = (CHECKPOINTS / name if is_hub_id else path) / "model.pth"
    config = path.with_name("config.json")
    if download and is_hub_id and not path.exists() and not config.exists():
        print(f"{name}: downloading from the Hugging Face Hub to {path.parent}", file=sys.stderr)
        download_checkpoint(name)
    if download and path.name == "model.pth" and not path.exists() and config.exists():
        print(f"{path} is missing: converting the Hugging Face checkpoint beside it", file=sys.stderr)
        convert(path.parent)
    if not path.exists():
        raise UserError(f"{path}: no such file; name a .pth file, a Hugging Face checkpoint's folder, or a Hub id such "
                        "as Qwen/Qwen3-0.6B, which is downloaded and converted (beforehand: scripts/prepare.sh)", field)
    return path


def download_checkpoint(repo_id: str, out: Path | None = None, token: str | None = None,
                        revision: str | None = None, hub: str = "huggingface") -> Path:
    """Downloads what a checkpoint needs to the folder out/repo_id, by default in CHECKPOINTS; returns it. It resumes.

    token: by default the environment's (HF_TOKEN, MODELSCOPE_API_TOKEN) or the stored one. hub: of HUBS. Errors:
    UserError.
    """
    folder, where = (out or CHECKPOINTS) / repo_id, f"{repo_id} (revision {revision})" if revision else repo_id
    open_repository, library_errors = HUBS[hub]
    with library_errors(repo_id, where, revision, folder):
        files, fetch = open_repository(repo_id, revision, token)
        files = wanted_files(files)
        if "config.json" not in files:
            raise UserError(f"{where}: no config.json with *.safetensors or pytorch_model*.bin in that repository")
        for names in (sorted({*files} - {"config.json"}), ["config.json"]):    # config.json last: then all is there
            fetch(names, folder)
            if absent := [name for name in names if not (folder / name).exists()]:       # the library may skip some
                raise UserError(f"could not download all of {where}: {', '.join(absent[:8])} missing; run this again")
    return folder


Fetch = Callable[[list[str], Path], object]          # names of files, to a folder


def open_huggingface(repo_id: str, revision: str | None, token: str | None) -> tuple[list[str], Fetch]:
    """The names of a repository's files, and what downloads some of them."""
    import huggingface_hub as hub

    info = hub.HfApi(token=token).model_info(repo_id, revision=revision)
    return [sibling.rfilename for sibling in info.siblings or []], lambda names, folder: hub.snapshot_download(
        repo_id, revision=info.sha or revision, local_dir=folder, allow_patterns=names, token=token)


@contextlib.contextmanager
def huggingface_errors(repo_id: str, where: str, revision: str | None, folder: Path) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repo_id!r} is not a Hub id: {error}") from error
    except errors.GatedRepoError as error:
        raise UserError(f"{where} is gated: accept its terms on its page and put a token into HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{where}: no such repository or a private one that needs a token in HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{revision}: {repo_id} has no such revision", "revision") from error
    except (errors.HTTPError, OSError) as error:           # pyright: ignore[reportPrivateImportUsage]
        raise UserError(f"could not download {where}: {first_line(error)}; run scripts/prepare.sh {repo_id} where "
                        f"there is a network (it resumes), or copy the checkpoint's files to {folder}") from error


def open_modelscope(repo_id: str, revision: str | None, token: str | None) -> tuple[list[str], Fetch]:
    """The same of ModelScope."""
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports]
        from modelscope.hub.api import HubApi  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("modelscope needs its library: pip install modelscope", "hub") from None
    api = HubApi()
    if token:
        api.login(token)
    files = api.get_model_files(repo_id, **({"revision": revision} if revision else {}), recursive=True)
    return [file["Path"] for file in files if file["Type"] != "tree"], lambda names, folder: snapshot_download(
        repo_id, revision=revision, local_dir=str(folder), allow_patterns=names)


@contextlib.contextmanager
def modelscope_errors(repo_id: str, where: str, revision: str | None, folder: Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:           # its library has no class of its own for them
        raise UserError(f"could not download {where} from ModelScope: {first_line(error)}; is there such a repository, "
                        f"and a network? Run this again, or copy the checkpoint's files to {folder}") from error


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


HUBS = {"huggingface": (open_huggingface, huggingface_errors), "modelscope": (open_modelscope, modelscope_errors)}


def wanted_files(files: list[str]) -> list[str]:
    """The files to take of all those in a repository: nothing from subfolders, one format of weights."""
    def matching(patterns: tuple[str, ...]) -> list[str]:
        return [file for file in files if "/" not in file and any(fnmatch(file, pattern) for pattern in patterns)
                and not any(fnmatch(file, pattern) for pattern in NEVER)]
    found = [matching(patterns) for patterns in WEIGHTS]
    weights = next((names for names in found if any(not name.endswith(".json") for name in names)), [])
    return matching(CONFIG_AND_TOKENIZER) + weights if weights else []
