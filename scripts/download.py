"""Downloads what a checkpoint needs from the Hugging Face Hub, or ModelScope, to checkpoints/REPO_ID. Run again, it
resumes.

HF_TOKEN (MODELSCOPE_API_TOKEN) holds the access token of gated repositories, HF_ENDPOINT the address of a mirror.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from loading import CHECKPOINTS, HUBS, download_checkpoint


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("repo_id", metavar="REPO_ID", help="e.g. Qwen/Qwen3-0.6B")
    parser.add_argument("--hub", default="huggingface", choices=HUBS, help="modelscope where its library is installed")
    parser.add_argument("--hf_token", "--token", help="access token, default: that of the environment")
    parser.add_argument("--revision", help="branch, tag or commit, default: the main branch")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="default: the project's checkpoints folder")
    args = parser.parse_args()
    print(f"downloaded {download_checkpoint(args.repo_id, args.out, args.hf_token, args.revision, args.hub)}")


if __name__ == "__main__":
    cli.run(main)
