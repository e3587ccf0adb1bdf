"""Downloads what a checkpoint needs from the Hugging Face Hub to checkpoints/REPO_ID. Run again, it resumes.

HF_TOKEN holds the access token of gated repositories, HF_ENDPOINT the address of a mirror.
"""
import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from cli import UserError, run

CONFIG_AND_TOKENIZER = ("config.json", "generation_config.json", "quantize_config.json", "quant_config.json",
                        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
                        "special_tokens_map.json", "chat_template.*", "qwen.tiktoken", "LICENSE*", "NOTICE*")
WEIGHTS = (("*.safetensors", "*.safetensors.index.json"), ("pytorch_model*.bin", "pytorch_model*.bin.index.json"))   # best first
NEVER = ("*.py", "consolidated*", "adapter_model*")      # code; a second copy of the weights in another layout; not a model by itself


def wanted_files(files: list[str]) -> list[str]:
    """The files to take of all those in a repository: nothing from subfolders, one format of weights."""
    def matching(patterns: tuple[str, ...]) -> list[str]:
        return [file for file in files if "/" not in file
                and any(fnmatch(file, pattern) for pattern in patterns) and not any(fnmatch(file, pattern) for pattern in NEVER)]

    weights = next((found for patterns in WEIGHTS if (found := matching(patterns)) and any(not file.endswith(".json") for file in found)), [])
    return matching(CONFIG_AND_TOKENIZER) + weights if weights else []


def download(repo_id: str, out: Path, token: str | None = None, revision: str | None = None) -> Path:
    """Returns the folder out/repo_id with the checkpoint in it. Without a token, the environment's or the stored one is used."""
    where = f"{repo_id} (revision {revision})" if revision else repo_id
    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision)
        files = wanted_files([sibling.rfilename for sibling in info.siblings or []])
        if "config.json" not in files:
            raise UserError(f"{where}: no config.json with safetensors or pytorch_model*.bin weights in that repository")
        snapshot_download(repo_id, revision=info.sha or revision, local_dir=out / repo_id, allow_patterns=files, token=token)
    except HFValidationError as error:
        raise UserError(f"REPO_ID {repo_id!r}: {error}") from error
    except GatedRepoError as error:
        raise UserError(f"{where} is gated: accept its terms on its page, then pass a token of yours with --hf_token or HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{where}: no such repository, or a private one that needs --hf_token or HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UserError(f"--revision {revision}: {repo_id} has no such revision") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set, nothing can be downloaded") from error
    except (HTTPError, OSError) as error:                # no network, a mirror that is down, a full disk
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"could not download {where}: {reason}; what is there already will be kept when you run this again") from error
    if absent := [file for file in files if not (out / repo_id / file).exists()]:          # the Hub's library may make do with a partial folder
        raise UserError(f"could not download all of {where}: {', '.join(absent[:8])} missing; run this again")
    return out / repo_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo_id", metavar="REPO_ID", help="e.g. Qwen/Qwen3-0.6B")
    parser.add_argument("--hf_token", help="access token, default: HF_TOKEN from the environment")
    parser.add_argument("--revision", help="branch, tag or commit, default: the main branch")
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints", help="default: the project's checkpoints folder")
    args = parser.parse_args()
    print(f"downloaded {download(args.repo_id, args.out, args.hf_token, args.revision)}")


if __name__ == "__main__":
    run(main)
