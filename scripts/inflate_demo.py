"""A large model that behaves like the small demo: for measuring speculation without published weights.

    python scripts/inflate_demo.py --out checkpoints/inflated

The feed-forward layers get more columns, which lead nowhere, and the model more layers, whose output projections are zero: the function stays the
demo's, the cost of a step becomes that of about 300 million parameters. The demo's draft then drafts for it as it does for the demo.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cli import atomic_write, read_json, run, UserError
from convert import convert
from loading import DEMO

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def inflate(weights: dict[str, Tensor], config: dict, layers: int, width: int) -> tuple[dict[str, Tensor], dict]:
    """A Hugging Face state and config of `layers` layers with feed-forward layers of `width` columns, from smaller ones, computing the same."""
    old_layers, old_width = config["num_hidden_layers"], config["intermediate_size"]
    if layers < old_layers or width < old_width:
        raise UserError(f"--layers {layers} and --width {width} must be at least the checkpoint's {old_layers} and {old_width}")
    source, new = torch.Generator().manual_seed(0), dict(weights)

    def random(like: Tensor, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=source) * like.float().std()).to(like.dtype)
    for layer in range(layers):
        prefix, first = f"model.layers.{layer}.", layer < old_layers
        if not first:                                      # as the first layer, but what it adds to the stream is zero
            new |= {prefix + name.removeprefix("model.layers.0."): w.clone() for name, w in weights.items() if name.startswith("model.layers.0.")}
        for name in ("gate_proj", "up_proj"):
            rows = new[f"{prefix}mlp.{name}.weight"]
            new[f"{prefix}mlp.{name}.weight"] = torch.cat((rows, random(rows, width - old_width, rows.size(1))))
        down = new[f"{prefix}mlp.down_proj.weight"]
        new[f"{prefix}mlp.down_proj.weight"] = torch.cat((down, down.new_zeros(len(down), width - old_width)), dim=1) * first
        new[f"{prefix}self_attn.o_proj.weight"] = new[f"{prefix}self_attn.o_proj.weight"] * first
    config = {**config, "num_hidden_layers": layers, "intermediate_size": width}
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][0]] * layers
    return new, config


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, default=DEMO.parent, help="what to inflate: a folder with config.json and model.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=16384, help="columns of the feed-forward layers")
    args = parser.parse_args(argv)
    if not (args.checkpoint_dir / "model.safetensors").exists():
        raise UserError(f"--checkpoint_dir {args.checkpoint_dir}: no model.safetensors there")
    weights, config = inflate(load_file(args.checkpoint_dir / "model.safetensors"), read_json(args.checkpoint_dir / "config.json"), args.layers, args.width)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (args.checkpoint_dir / name).exists():
            shutil.copy(args.checkpoint_dir / name, args.out / name)
    (args.out / "config.json").write_text(json.dumps(config, indent=2))
    with atomic_write(args.out / "model.safetensors") as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    print(f"{convert(args.out)}: {sum(w.numel() for w in weights.values()) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    run(main)
