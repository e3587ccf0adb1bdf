"""The text that GPTQ learns from: files, the standard library, lm-eval's tasks, or what the model writes itself."""
import itertools
import sysconfig
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from config import ModelArgs
from cli import UserError
from generate import Engine
from formats import check_finite
from loading import load_model
from sampling import Sampling
from tokenizer import Tokenizer

MOST_DOCUMENTS = 10000            # of a task
OWN_SEQUENCES, OWN_LENGTH = 16, 256        # that a model writes at a time: once is enough for the demo
# Of the standard library: the modules that the demo checkpoints have not seen, and what is no source text.
HELD_OUT = ["bisect", "calendar", "configparser", "contextlib", "csv", "fnmatch", "fractions", "graphlib", "heapq", "queue", "sched",
            "shlex", "statistics", "string", "textwrap"]
SKIPPED = ("site-packages", "config-", "pydoc_data", "lib2to3/tests/data", "test/bad", "ensurepip/_bundled")


def source_files(heldout: bool) -> list[Path]:
    """The standard library's .py files: the held-out modules, or all others but their tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    if heldout:
        return [library / f"{name}.py" for name in HELD_OUT]
    names = set(HELD_OUT) | {f"test_{name}" for name in HELD_OUT}
    files = []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library).as_posix()
        if path.stem not in names and not any(s in relative for s in SKIPPED) and not any(f"test_{n}/" in relative for n in HELD_OUT):
            files.append(path)
    return files


def read_sources(files: list[Path]) -> list[str]:
    """Text of each file that is UTF-8 and of ordinary size (the largest files are generated tables)."""
    texts = []
    for path in files:
        raw = path.read_bytes()
        if 200 < len(raw) < 300_000:
            try:
                texts.append(raw.decode("utf-8"))
            except UnicodeDecodeError:
                continue
    return texts


def texts_of_tasks(names: list[str], include_path: Path | None = None) -> list[str]:
    """The documents of lm-eval's tasks, each with its answer: those for training where there are such, else those for validation or the test."""
    from tasks import load_tasks             # lm_eval takes seconds to import
    texts = []
    for task in tasks_in(load_tasks(names, include_path, flag="--calibration_tasks", advice=", or give a text: --calibration_file FILE")[1]):
        docs = task.training_docs() if task.has_training_docs() else task.validation_docs() if task.has_validation_docs() else task.test_docs()
        for doc in itertools.islice(docs, MOST_DOCUMENTS):
            question, answer = task.doc_to_text(doc), task.doc_to_target(doc)
            if isinstance(question, int):        # the choices are beginnings, of which this is the right one (winogrande)
                question, answer = task.doc_to_choice(doc)[question], answer
            elif isinstance(answer, int):
                answer = task.doc_to_choice(doc)[answer]
            texts.append(" ".join(str(part) for part in (question, answer) if part))
    return texts


def tasks_in(loaded: list) -> Iterator:
    """The tasks themselves, of a list that may hold groups of them."""
    for item in loaded:
        if hasattr(item, "doc_to_text"):
            yield item
        else:
            children = getattr(item, "tasks", item)
            yield from tasks_in(list(children.values() if isinstance(children, dict) else children))


def calibration_tokens(tokenizer: Tokenizer, texts: list[str], limit: int, seq_length: int, least: int) -> Tensor:
    """int64 [B, S] of B <= limit sequences from all over the texts. UserError if they come to fewer than `least` tokens."""
    pieces = [text[i:i + 8 * seq_length] for text in texts for i in range(0, len(text), 8 * seq_length)]
    ids: list[int] = []
    for i in torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist():
        if len(ids) >= limit * seq_length:
            break
        ids += tokenizer.encode(pieces[i])
    count = min(limit, len(ids) // seq_length)
    if count * seq_length < least:
        raise UserError(f"too little to calibrate with: {count} sequences of {seq_length} tokens, and the widest linear has {least} inputs: "
                        "give more text (--calibration_file, --calibration_tasks), or raise --calibration_limit")
    return torch.tensor(ids[:count * seq_length]).view(count, seq_length)


def widest_inputs(args: ModelArgs) -> int:
    """Of a model's linears: fewer tokens than that leave a Hessian without full rank."""
    return max(args.dim, args.intermediate_size, args.n_head * args.head_dim)


def own_text(path: Path, device: torch.device | str = "cpu", progress: bool = True) -> Tensor:
    """int64 [B, S]: what the model in a checkpoint writes after one token drawn from its vocabulary, at temperature 1. It serves about as well as
    text of its training (Williams, Chrysostomou and Aletras 2024, arXiv 2410.17170). UserError if a weight is NaN or infinite."""
    try:
        generator = Engine(*load_model(path, device, torch.bfloat16 if torch.device(device).type == "cpu" else None))
        for name, weight in generator.model.named_parameters():
            check_finite(name, weight)
        args, texts = generator.model.args, []
        length = min(OWN_LENGTH, args.max_position)
        batches = -(-widest_inputs(args) // (OWN_SEQUENCES * length))
        first = torch.randint(generator.vocab, (batches, OWN_SEQUENCES, 1), generator=torch.Generator().manual_seed(0))
        with tqdm(total=batches * (length - 1), desc="Writing a text", unit="token", disable=not progress) as bar:
            for seed, begin in enumerate(first):
                written = []
                for ids in generator.generate(begin.tolist(), length - 1, Sampling(temperature=1.0, top_k=None), seed=seed, stop_ids=frozenset()):
                    written.append(ids)
                    bar.update()
                texts.append(torch.cat((begin, torch.tensor(written).t()), dim=1))
    except UserError as error:
        raise UserError(f"{error} (--round_to_nearest needs no text of the model's own)") from None
    return torch.cat(texts)
