"""Makes checkpoints/demo, demo-draft and demo-hybrid: small Qwen3 models and a Qwen3.5 of Python code, from scratch.

    python scripts/train_demo.py --name demo                 # more than an hour on two CPU cores
    python scripts/train_demo.py --name demo-draft --teacher checkpoints/demo --steps 800      # half an hour
    python scripts/train_demo.py --name demo-hybrid --steps 800     # with a multi-token head; not bundled
    python scripts/train_demo.py --dump_heldout FILE         # the text that neither has seen

The text is the Python standard library of the interpreter that runs this script, its tests included. The modules in
quantize.HELD_OUT and their tests are left out. Functions with a docstring are also shown as chat turns, so that the
models end a turn. Training runs on transformers' models: the result is an ordinary Hugging Face folder, which
scripts/convert_hf_checkpoint.py converts like any other.
"""
import ast
import copy
import json
import math
import sys
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # first: from here on Ctrl-C ends the command without a traceback

# isort: split
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from kernels.build import cpu_has_bf16
from quantize import read_sources, source_files
from tokenizer import QWEN_SPLIT

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE, CONTEXT = 4096, 1024
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}")
SHAPES = {
    "demo": dict(num_hidden_layers=7, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                 intermediate_size=768),
    "demo-draft": dict(num_hidden_layers=3, hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
                       intermediate_size=384),
    "demo-hybrid": dict(num_hidden_layers=4, hidden_size=192, num_attention_heads=3, num_key_value_heads=1, head_dim=64,
                        intermediate_size=512, linear_num_key_heads=2, linear_num_value_heads=4,
                        linear_key_head_dim=64, linear_value_head_dim=64, mtp_num_hidden_layers=1),
}
MTP_WEIGHT = 0.3                # of the loss of multi-token prediction


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
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
                                                             initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "add_bos_token": False, "clean_up_tokenization_spaces": False,
              "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Corpus:
    """Rows of tokens from the library (seen twice an epoch), its tests and the chat turns (once), shuffled anew each
    epoch."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        library, tests = [], []
        for file in source_files(heldout=False):
            (tests if "/test" in file.as_posix() or "_test" in file.as_posix() else library).append(file)
        library, tests = read_sources(library), read_sources(tests)
        turns = chat_turns(library)
        chats = ["".join(turns[i:i + 4]) for i in range(0, len(turns), 4)]
        # Only the chat turns carry control tokens: source text is encoded as a user's text is, with none.
        self.documents = 2 * self.encode(tokenizer, library, True) + self.encode(tokenizer, tests, True)
        self.documents += self.encode(tokenizer, chats, False)
        self.tokens_per_epoch = sum(map(len, self.documents))
        self.rng, self.rest = np.random.default_rng(seed), np.zeros(0, np.uint16)

    @staticmethod
    def encode(tokenizer: Tokenizer, texts: list[str], special_as_text: bool) -> list[np.ndarray]:
        tokenizer.encode_special_tokens = special_as_text
        end = tokenizer.token_to_id("<|endoftext|>")
        return [np.array(encoding.ids + [end], np.uint16) for encoding in tokenizer.encode_batch(texts)]

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """int64 [rows, length + 1]: inputs are [:, :-1], targets [:, 1:]."""
        needed = rows * (length + 1)
        if len(self.rest) < needed:
            order = self.rng.permutation(len(self.documents))
            stream = np.concatenate([self.rest] + [self.documents[i] for i in order])
            contexts = stream[:len(stream) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
            self.rest = contexts[self.rng.permutation(len(contexts))].reshape(-1)
        taken, self.rest = self.rest[:needed], self.rest[needed:]
        return torch.from_numpy(taken.astype(np.int64)).view(rows, length + 1)


def heldout_text() -> str:
    committed = ROOT / "tests" / "data" / "heldout.txt"
    return committed.read_text("utf-8") if committed.exists() else "\n".join(read_sources(source_files(heldout=True)))


@torch.inference_mode()
def bits_per_byte(model, tokenizer: Tokenizer, text: str, window: int = CONTEXT) -> float:
    """Negative log2-likelihood of text per UTF-8 byte. Windows overlap by half, and each token is scored once."""
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


class MTP(nn.Module):
    """Multi-token prediction as Qwen3.5 has it: from the hidden state of a token and the embedding of the next one, the
    hidden state of that. Parameters have their published names, less `mtp.`"""

    def __init__(self, config):
        super().__init__()
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm
        C, attention = config.hidden_size, copy.copy(config)
        attention.layer_types = ["full_attention"]
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (
            Qwen3_5RMSNorm(C, eps=config.rms_norm_eps) for _ in range(3))
        self.fc, self.layers = nn.Linear(2 * C, C, bias=False), nn.ModuleList([Qwen3_5DecoderLayer(attention, 0)])

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor, rotary) -> torch.Tensor:
        x = self.fc(torch.cat((self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)), dim=-1))
        positions = torch.arange(x.size(1))[None].expand(len(x), -1)
        return self.norm(self.layers[0](x, position_embeddings=rotary(x, positions)))


def build_model(name: str):
    import transformers
    end, im_end = VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE - len(SPECIAL_TOKENS) + 2
    shape: dict = dict(rope_theta=10000.0, **SHAPES[name])
    shape |= dict(vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
                  eos_token_id=im_end, pad_token_id=end)
    if "mtp_num_hidden_layers" in shape:
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**shape))
        model.mtp = MTP(model.config)
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    model.generation_config.eos_token_id = [im_end, end]
    for key, p in model.named_parameters():            # residual outputs start small, the rest at 1/sqrt(fan_in)
        if p.ndim == 2:
            std = 0.02 if "embed" in key else p.size(1) ** -0.5
            small = any(output in key for output in ("o_proj", "down_proj", "out_proj"))
            torch.nn.init.normal_(p, std=std * (0.1 if small else 1.0))
    return model


def mtp_loss(model, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """ids [B, S + 1], hidden [B, S, C]: from that of token i and token i + 1, token i + 2 is predicted."""
    embedded = model.model.embed_tokens(ids[:, 1:-1])
    y = model.mtp(embedded, hidden[:, :-1], model.model.rotary_emb)
    return F.cross_entropy(model.lm_head(y).float().flatten(0, 1), ids[:, 2:].flatten())


def distribution_loss(logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) per token, both [tokens, V]: the closer the two, the more of its drafts are accepted."""
    return F.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="batchmean")


def train(args, folder: Path, state_file: Path) -> None:
    from transformers import AutoModelForCausalLM
    torch.manual_seed(args.seed)
    tokenizer_file = ROOT / "checkpoints" / "demo" / "tokenizer.json"
    tokenizer = (Tokenizer.from_file(str(tokenizer_file)) if tokenizer_file.exists()
                 else train_tokenizer(read_sources(source_files(heldout=False))))
    save_tokenizer(tokenizer, folder)
    corpus, heldout = Corpus(tokenizer, args.seed), heldout_text()
    model = build_model(args.name)
    has_mtp = hasattr(model, "mtp")
    print(f"{args.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {corpus.tokens_per_epoch:,} tokens "
          "an epoch", flush=True)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher).eval().requires_grad_(False) if args.teacher else None

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        inputs, targets = ids[:, :-1], ids[:, 1:].flatten()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_has_bf16()):
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden).float().flatten(0, 1)
            more = MTP_WEIGHT * mtp_loss(model, ids, hidden) if has_mtp else 0.0
            taught = teacher(input_ids=inputs, use_cache=False).logits.float().flatten(0, 1) if teacher else None
        return more + (F.cross_entropy(logits, targets) if taught is None else distribution_loss(logits, taught))

    # The recurrence of a hybrid is a loop, which the compiler would unroll.
    compiled = loss_of if has_mtp else torch.compile(loss_of, dynamic=False)
    optimizers = make_optimizers(model, 0 if args.adam else args.muon_lr, args.adam_lr)
    first = 0
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["step"]
        corpus.rng = np.random.default_rng(args.seed + first)
        print(f"resumed at step {first}", flush=True)
    start, recent = time.perf_counter(), []
    for step in range(first, args.steps):
        length = 256 if step < 0.55 * args.steps else 512 if step < 0.85 * args.steps else CONTEXT
        loss = compiled(corpus.batch(args.batch_tokens // length, length))
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * learning_rate(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        recent = (recent + [loss.item()])[-50:]
        if (step + 1) % 25 == 0:
            speed = (step + 1 - first) * args.batch_tokens / (time.perf_counter() - start)
            print(f"step {step + 1}/{args.steps} loss {sum(recent) / len(recent):.3f} {speed:.0f} tokens/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            bits = bits_per_byte(model.eval(), tokenizer, heldout[:50_000])
            print(f"step {step + 1}/{args.steps} bits per byte of the first 50 kB held out: {bits:.4f}", flush=True)
            model.train()
            with cli.atomic_write(state_file) as partial:
                torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                            "step": step + 1}, partial)
    model.bfloat16().eval()
    print(f"{args.name}: held-out bits per byte in bf16 {bits_per_byte(model, tokenizer, heldout):.4f}", flush=True)
    model.save_pretrained(folder)


def make_optimizers(model, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, unless its rate is 0, AdamW for the embedding and the norms."""
    matrices = [p for key, p in model.named_parameters() if p.ndim == 2 and "embed" not in key and muon_lr]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01), adam] if matrices else [adam]


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--name", choices=SHAPES, default="demo", help="which one to train")
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="tokens a step")
    parser.add_argument("--muon_lr", type=float, default=0.02, help="peak learning rate of the layers' matrices")
    parser.add_argument("--adam_lr", type=float, default=0.004, help="peak learning rate of all else")
    parser.add_argument("--adam", action="store_true",
                        help="without Muon, whose products in bf16 take seconds a step on CPUs that have none")
    parser.add_argument("--seed", type=int, default=1234, help="of weights and batches")
    parser.add_argument("--teacher", type=Path, metavar="FOLDER",
                        help="learn this model's distribution instead of the text alone")
    parser.add_argument("--state", type=Path, metavar="FILE",
                        help="where training can resume from (default: checkpoints/NAME/training.pt)")
    parser.add_argument("--dump_heldout", type=Path, metavar="FILE", help="write the held-out text and stop")
    args = parser.parse_args(argv)
    if args.dump_heldout:
        args.dump_heldout.write_text("\n".join(read_sources(source_files(heldout=True))), "utf-8")
        return
    folder = ROOT / "checkpoints" / args.name
    train(args, folder, args.state or folder / "training.pt")


if __name__ == "__main__":
    cli.run(main)
