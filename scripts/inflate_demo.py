"""A large model that behaves like the small demo: for measuring speculation without published weights.

    python scripts/inflate_demo.py --out checkpoints/inflated

The feed-forward layers get more columns, which lead nowhere, and the model more layers, whose output projections are
zero: it computes what the demo does, at the cost of about 300 million parameters. The demo's draft then drafts for it
as it does for the demo.
"""
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cli import UserError
from convert import convert
from loading import DEMO

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def inflate(weights: dict[str, Tensor], config: dict, layers: int, width: int) -> tuple[dict[str, Tensor], dict]:
    """From a Hugging Face state and config, those of `layers` layers with feed-forward layers of `width` columns that
    compute the same."""
    old_layers, old_width = config["num_hidden_layers"], config["intermediate_size"]
    if layers < old_layers or width < old_width:
        raise UserError(f"{layers} and width {width} must be at least the checkpoint's {old_layers} and {old_width}",
                        "layers")
    rng, new = torch.Generator().manual_seed(0), dict(weights)

    def random(like: Tensor, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=rng) * like.float().std()).to(like.dtype)
    zero = "model.layers.0."
    first_layer = {name.removeprefix(zero): w for name, w in weights.items() if name.startswith(zero)}
    for layer in range(layers):
        prefix, is_old = f"model.layers.{layer}.", layer < old_layers
        if not is_old:                                     # as the first layer, but what it adds to the stream is zero
            new |= {prefix + name: w.clone() for name, w in first_layer.items()}
        for name in ("gate_proj", "up_proj"):
            rows = new[f"{prefix}mlp.{name}.weight"]
            new[f"{prefix}mlp.{name}.weight"] = torch.cat((rows, random(rows, width - old_width, rows.size(1))))
        down, o_proj = f"{prefix}mlp.down_proj.weight", f"{prefix}self_attn.o_proj.weight"
        columns = new[down]
        new[down] = torch.cat((columns, columns.new_zeros(len(columns), width - old_width)), dim=1) * is_old
        new[o_proj] = new[o_proj] * is_old
    config = {**config, "num_hidden_layers": layers, "intermediate_size": width}
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][0]] * layers
    return new, config


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint_dir", type=Path, default=DEMO.parent, metavar="FOLDER",
                        help="what to inflate: a folder with config.json and model.safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument("--layers", type=int, default=24, help="number of layers")
    parser.add_argument("--width", type=int, default=16384, help="columns of the feed-forward layers")
    args = parser.parse_args(argv)
    source, out = args.checkpoint_dir, args.out
    if not (source / "model.safetensors").exists():
        raise UserError(f"{source}: no model.safetensors there", "checkpoint_dir")
    weights, config = inflate(load_file(source / "model.safetensors"), cli.read_json(source / "config.json"),
                              args.layers, args.width)
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, out / name)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    with cli.atomic_write(out / "model.safetensors") as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    print(f"{convert(out)}: {sum(w.numel() for w in weights.values()) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    cli.run(main)
