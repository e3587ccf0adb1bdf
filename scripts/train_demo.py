"""Makes checkpoints/demo and checkpoints/demo-draft: two small Qwen3 models of Python source code, trained from scratch.

    python scripts/train_demo.py --name demo                  # the target: more than an hour on two CPU cores
    python scripts/train_demo.py --name demo-draft --teacher checkpoints/demo --steps 800      # the draft: half an hour, the target is its teacher
    python scripts/train_demo.py --dump_heldout FILE          # the text that neither has seen

The text is the Python standard library of the interpreter that runs this script, its tests included. The modules in
HELD_OUT and their tests are left out. Functions with a docstring are also shown as chat turns, so that the models end a
turn. Training runs on transformers' Qwen3: the result is an ordinary Hugging Face folder, which
scripts/convert_hf_checkpoint.py converts like any other.
"""
import argparse
import ast
import json
import math
import os
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibration import read_sources, source_files
from tokenizer import QWEN_SPLIT

VOCAB_SIZE, CONTEXT = 4096, 1024
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}")
SHAPES = {
    "demo": dict(num_hidden_layers=7, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=768),
    "demo-draft": dict(num_hidden_layers=3, hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=384),
}


def chat_turns(texts: list[str]) -> list[str]:
    """Every documented function of at most 1500 characters, as a question and its answer in ChatML."""
    turns = []
    for text in texts:
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
                continue
            source = textwrap.dedent("\n".join(text.splitlines()[node.lineno - 1:node.end_lineno]))
            if len(source) <= 1500:
                think = "<think>\n\n</think>\n\n" if len(turns) % 2 else ""
                turns.append(f"<|im_start|>user\nWrite the function {node.name}: {doc.splitlines()[0]}<|im_end|>\n"
                             f"<|im_start|>assistant\n{think}{source}<|im_end|>\n")
    return turns


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE tokens with Qwen's normalisation and split."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "add_bos_token": False, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Corpus:
    """Rows of tokens from the library (seen twice an epoch), its tests and the chat turns (once), shuffled anew each epoch."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        files = source_files(heldout=False)
        library = read_sources([f for f in files if "/test" not in f.as_posix() and "_test" not in f.as_posix()])
        tests = read_sources([f for f in files if "/test" in f.as_posix() or "_test" in f.as_posix()])
        turns = ["".join(chunk) for chunk in self._chunks(chat_turns(library), 4)]
        end = tokenizer.token_to_id("<|endoftext|>")
        # Source text is encoded with special tokens as plain text, as a user's text is; only the chat turns carry control tokens.
        tokenizer.encode_special_tokens = True
        plain = [np.array(e.ids + [end], np.uint16) for e in tokenizer.encode_batch(library + tests)]
        tokenizer.encode_special_tokens = False
        chats = [np.array(e.ids + [end], np.uint16) for e in tokenizer.encode_batch(turns)]
        self.documents = plain[:len(library)] * 2 + plain[len(library):] + chats
        self.tokens_per_epoch = sum(map(len, self.documents))
        self.rng, self.rest = np.random.default_rng(seed), np.zeros(0, np.uint16)

    @staticmethod
    def _chunks(items: list, n: int):
        return (items[i:i + n] for i in range(0, len(items), n))

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """int64 [rows, length + 1]: inputs are [:, :-1], targets [:, 1:]."""
        need = rows * (length + 1)
        if len(self.rest) < need:
            order = self.rng.permutation(len(self.documents))
            stream = np.concatenate([self.rest] + [self.documents[i] for i in order])
            pieces = stream[:len(stream) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
            self.rest = pieces[self.rng.permutation(len(pieces))].reshape(-1)
        taken, self.rest = self.rest[:need], self.rest[need:]
        return torch.from_numpy(taken.astype(np.int64)).view(rows, length + 1)


def heldout_text() -> str:
    committed = ROOT / "tests" / "data" / "heldout.txt"
    return committed.read_text("utf-8") if committed.exists() else "\n".join(read_sources(source_files(heldout=True)))


@torch.inference_mode()
def bits_per_byte(model, tokenizer: Tokenizer, text: str, window: int = CONTEXT) -> float:
    """Negative log2-likelihood of text per UTF-8 byte; windows of `window` tokens overlap by half and score each token once."""
    tokenizer.encode_special_tokens = True
    ids = torch.tensor([tokenizer.token_to_id("<|endoftext|>")] + tokenizer.encode(text).ids)
    total, scored = 0.0, 1
    while scored < len(ids):
        begin = max(0, scored - window // 2)
        piece = ids[begin:begin + window]
        logits = model(input_ids=piece[None, :-1]).logits[0].float()
        losses = F.cross_entropy(logits, piece[1:], reduction="none")
        total += losses[scored - begin - 1:].sum().item()
        scored = begin + len(piece)
    return total / math.log(2) / len(text.encode())


def learning_rate(step: int, steps: int, warmup: int = 40, decay: float = 0.6) -> float:
    """Factor in [0, 1]: linear warm-up, constant, then linear decay to zero over the last `decay` of the run."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def build_model(name: str):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    end, im_end = VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE - len(SPECIAL_TOKENS) + 2
    config = Qwen3Config(vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, rope_theta=10000.0, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=im_end, pad_token_id=end, **SHAPES[name])
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = [im_end, end]
    for parameter_name, p in model.named_parameters():      # residual outputs start small, the rest at 1/sqrt(fan_in)
        if p.ndim == 2:
            std = 0.02 if "embed" in parameter_name else p.size(1) ** -0.5
            torch.nn.init.normal_(p, std=std * (0.1 if "o_proj" in parameter_name or "down_proj" in parameter_name else 1.0))
    return model


def distribution_loss(logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) per token, both [tokens, V]: the acceptance of speculative sampling depends on how near the two are."""
    return F.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="batchmean")


def train(name: str, steps: int, batch_tokens: int, muon_lr: float, adam_lr: float, seed: int, state_file: Path, teacher_folder: Path | None) -> None:
    from transformers import AutoModelForCausalLM
    torch.manual_seed(seed)
    folder = ROOT / "checkpoints" / name
    tokenizer_file = ROOT / "checkpoints" / "demo" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_file)) if tokenizer_file.exists() else train_tokenizer(read_sources(source_files(heldout=False)))
    save_tokenizer(tokenizer, folder)
    corpus, heldout = Corpus(tokenizer, seed), heldout_text()
    model = build_model(name)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {corpus.tokens_per_epoch:,} tokens an epoch", flush=True)

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    peak = [muon_lr, adam_lr]

    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval().requires_grad_(False) if teacher_folder else None

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float().flatten(0, 1)
            taught = teacher(input_ids=ids[:, :-1], use_cache=False).logits.float().flatten(0, 1) if teacher else None
        return F.cross_entropy(logits, ids[:, 1:].flatten()) if taught is None else distribution_loss(logits, taught)

    compiled = torch.compile(loss_of, dynamic=False)
    first = 0
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        first = saved["step"]
        corpus.rng = np.random.default_rng(seed + first)
        print(f"resumed at step {first}", flush=True)
    tokens, start, recent = 0, time.perf_counter(), []
    for step in range(first, steps):
        length = 256 if step < 0.55 * steps else 512 if step < 0.85 * steps else CONTEXT
        loss = compiled(corpus.batch(batch_tokens // length, length))
        loss.backward()
        for optimizer, lr in zip(optimizers, peak):
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        tokens, recent = tokens + batch_tokens, (recent + [loss.item()])[-50:]
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}/{steps} loss {sum(recent) / len(recent):.3f} {tokens / (time.perf_counter() - start):.0f} tokens/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            model.eval()
            bits = bits_per_byte(model, tokenizer, heldout[:50_000])
            print(f"step {step + 1}/{steps} bits per byte of the first 50 kB held out: {bits:.4f}", flush=True)
            model.train()
            partial = state_file.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}, partial)
            os.replace(partial, state_file)
    model.to(torch.bfloat16).eval()
    print(f"{name}: held-out bits per byte in bf16 {bits_per_byte(model, tokenizer, heldout):.4f}", flush=True)
    model.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=SHAPES, default="demo")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch_tokens", type=int, default=8192)
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--adam_lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help="learn this model's distribution instead of the text alone")
    parser.add_argument("--state", type=Path, help="where training can resume from (default: checkpoints/NAME/training.pt)")
    parser.add_argument("--dump_heldout", type=Path, metavar="FILE", help="write the held-out text and stop")
    args = parser.parse_args(argv)
    if args.dump_heldout:
        args.dump_heldout.write_text("\n".join(read_sources(source_files(heldout=True))), "utf-8")
        return
    train(args.name, args.steps, args.batch_tokens, args.muon_lr, args.adam_lr, args.seed,
          args.state or ROOT / "checkpoints" / args.name / "training.pt", args.teacher)


if __name__ == "__main__":
    sys.exit(main())
