"""Converts a Hugging Face checkpoint folder to model.pth beside it."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from convert import convert


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint_dir", type=Path, required=True,
                        help="folder with config.json and *.safetensors or pytorch_model*.bin")
    print(f"wrote {convert(parser.parse_args().checkpoint_dir)}")


if __name__ == "__main__":
    cli.run(main)
