"""Damaged and hostile files: a command runs, or refuses in one line with status 2, within limits of memory and time."""
import contextlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch

import cli
import generate
import kernels
import quantize

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for every case")
SECONDS, MEMORY = 20, 2 << 30            # of a case; memory beside what the process has mapped already
VALUES = [None, "x", "", "false", [], [1], ["full_attention"], {}, {"rope_type": "yarn"}, True, False, -1, 0, 1, 2, 3,
          7, 0.5, 4.0, -0.5, 1e-300, 1e12, 10 ** 12, 10 ** 30, float("nan"), float("inf"), -float("inf")]
COMMAND = ["--prompt", "ab", "--max_new_tokens", "2", "--num_samples", "1", "--dtype", "fp32"]


def check(cases, main=generate.main) -> Counter:
    """cases: (name, argv). All must run or be refused. They do so one after another in a process with limits; one that
    ends it goes on in another with the next."""
    kernels.available()
    cases, counts, wrong, ended = iter(cases), Counter(), {}, False
    while not ended:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            run_all(cases, main, writer)
        os.close(writer)
        with open(reader) as pipe:
            reports = [json.loads(line) for line in pipe]
        for said in reports:
            ended = said == "the end"
            name = "" if ended else next(cases)[0]               # keeps up with the child's
            counts[said] += said in ("ran", "refused")
            if not ended and said not in ("ran", "refused"):
                wrong[name] = said
        status = os.waitpid(child, 0)[1]
        if not ended:
            wrong[next(cases)[0]] = f"killed by signal {os.WTERMSIG(status)}"
    assert not wrong, f"{counts}: " + "\n".join(f"{name}: {said}" for name, said in itertools.islice(wrong.items(), 20))
    return counts


def run_all(cases, main, writer: int) -> None:
    """In the new process, which it ends: reports a line of JSON for each case."""
    def report(said: str) -> None:
        os.write(writer, json.dumps(said[-3000:]).encode() + b"\n")
    try:
        for output in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
        torch.set_num_threads(1)                                 # OpenMP's threads do not survive a fork
        for _, argv in cases:
            signal.alarm(SECONDS)
            try:
                report(run(main, argv))
            except BaseException:
                report(traceback.format_exc())
        report("the end")
    finally:
        os._exit(0)


def run(main, argv: list[str]) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            cli.run(lambda: main(argv))
            return "ran"
        except SystemExit as end:
            said, code = errors.getvalue(), end.code
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return "refused" if code == 2 and len(lines) == 1 and len(lines[0]) < 1000 else f"exit {code} {said}"


@pytest.fixture
def copy_of(tiny_folder, tmp_path):
    """family -> a copy of its folder, to be damaged."""
    return lambda family: shutil.copytree(tiny_folder(family), tmp_path / family)


# ---- config.json

def mutations(config: dict):
    """(name, config) with one key changed or gone, of the whole or of the RoPE parameters."""
    for key in config:
        yield f"without {key}", {k: v for k, v in config.items() if k != key}
        for value in VALUES:
            yield f"{key} = {value!r}", {**config, key: value}
    for holder in ("rope_parameters", "rope_scaling"):
        inner = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
        for key in [*inner, "low_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
                    "truncate", "partial_rotary_factor", "type", "full_attention"]:
            for value in VALUES:
                for kind in ("yarn", "llama3", "linear"):
                    changed = {**inner, "rope_type": kind, key: value}
                    yield f"{holder}: {kind} {key} = {value!r}", {**config, holder: changed}
    for key in ("use_sliding_window", "sliding_window", "layer_types", "max_window_layers", "num_experts", "mlp_bias",
                "attention_bias", "hidden_act", "kv_channels", "quantization_config", "rotary_pct", "eos_token_id"):
        for value in VALUES:
            yield f"added {key} = {value!r}", {**config, "use_sliding_window": True, key: value}


def config_cases(copy_of, number: int | None):
    """Every third converts the checkpoint first. number: of all cases, chosen at random; None for all of them."""
    cases = []
    for family in ("qwen2-window", "qwen3", "llama3.1", "mistral-window", "qwen-v1", "qwen2-moe", "qwen3.5-moe"):
        folder = copy_of(family)
        original = json.loads((folder / "config.json").read_text())
        cases += [(f"{family}: {name}", folder, config) for name, config in mutations(original)]

    def written():
        for i, (name, folder, config) in enumerate(random.Random(0).sample(cases, number or len(cases))):
            (folder / "config.json").write_text(json.dumps(config))
            if i % 3 == 0:
                (folder / "model.pth").unlink(missing_ok=True)
            yield name, ["--checkpoint_path", str(folder), *COMMAND]
    return written()


@pytest.mark.slow
def test_configs(copy_of):
    counts = check(config_cases(copy_of, 1000))
    assert counts["ran"] > 100 and counts["refused"] > 100, counts


@pytest.mark.slow
@pytest.mark.long
def test_all_configs(copy_of):
    check(config_cases(copy_of, None))


@pytest.mark.parametrize("content", [b"", b"\0", b"null", b"[]", b"{" * 100000, b"[" * 100000, b'{"a":' * 50000,
                                     b'{"model_type": ' + b"9" * 10000 + b"}", b"\xff\xfe{}", b"{} {}",
                                     b'{"model_type": "qwen3", "model_type": "qwen3"}'])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
                                  "special_tokens_map.json", "added_tokens.json"])
def test_what_is_no_json(copy_of, file, content):
    folder = copy_of("qwen3")
    (folder / file).write_bytes(content)
    assert check([(file, ["--checkpoint_path", str(folder), *COMMAND])])


# ---- weights

def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut short, with a run of bytes changed, taken out, doubled or zeroed."""
    begin, size = rng.randrange(len(content)), rng.choice((1, 1, 1, 4, 64, 1000))
    run = content[begin:begin + size]
    return rng.choice((
        content[:begin], content[:begin] + content[begin + size:], content[:begin] + run + content[begin:],
        content[:begin] + bytes(len(run)) + content[begin + size:],
        content[:begin] + rng.randbytes(len(run)) + content[begin + size:],
        content[:begin] + bytes([run[0] ^ 1 << rng.randrange(8)]) + content[begin + 1:]))


def file_cases(folder: Path, file: str, number: int):
    """Half of the damage is in the file's first and last kilobytes, where its structure is."""
    content, rng = (folder / file).read_bytes(), random.Random(0)
    path = folder if file == "model.safetensors" else folder / file

    def written():
        for i in range(number):
            ends = damaged(content[:3000] + content[-3000:], rng)
            changed = damaged(content, rng) if i % 2 else ends[:3000] + content[3000:-3000] + ends[3000:]
            (folder / file).write_bytes(changed)
            if path == folder:
                (folder / "model.pth").unlink(missing_ok=True)         # which the case before has made
            yield f"{file} {i}", ["--checkpoint_path", str(path), *COMMAND]
    return written()


def damaged_files(tiny_folder, tmp_path, number: int) -> Counter:
    """number: of each kind of file."""
    counts = Counter()
    for family, file, mode in (("qwen3", "model.pth", None), ("qwen3", "model.safetensors", None),
                               ("qwen2", "model_int8.pth", "int8"), ("qwen2", "model_int4.g32.pth", "int4")):
        folder = tmp_path / file
        shutil.copytree(tiny_folder(family), folder)
        if mode:
            quantize.quantize_checkpoint(folder / "model.pth", mode, progress=False)
        counts += check(file_cases(folder, file, number))
    return counts


@pytest.mark.slow
def test_damaged_files(tiny_folder, tmp_path):
    counts = damaged_files(tiny_folder, tmp_path, 80)
    assert counts["refused"] > 100, counts


@pytest.mark.slow
@pytest.mark.long
def test_many_damaged_files(tiny_folder, tmp_path):
    damaged_files(tiny_folder, tmp_path, 1000)
