"""Tensor parallelism: the plan on paper for every published shape; 2 and 4 processes over gloo against one process."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from conftest import ROOT
from published import publish

import tp
from config import PUBLISHED, ModelArgs
from cli import UserError
from formats import Quantization, replace_linears, set_quantize_activations
from generate import Engine, Sampling, command, load_model, main, parse_args
from model import Transformer
from quantize import quantize_checkpoint
from speculate import Speculator

GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111]]


# ---- the plan

def whole_model(args, quantization=None):
    with torch.device("meta"):
        model = Transformer(args)
        if quantization:
            replace_linears(model, quantization)
    return model


@pytest.mark.parametrize("quantization", [None, Quantization("int8"), Quantization("int4", 32), Quantization("int4", 128)],
                         ids=["bf16", "int8", "g32", "g128"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_shape_can_be_split(name, quantization):
    args = ModelArgs.from_name(name)
    one_layer = tp.replace(args, n_layer=1, windows=())
    state = whole_model(one_layer, quantization).state_dict()
    for world in (2, 3, 4, 8):
        plans = [tp.plan(one_layer, rank, world, quantization) for rank in range(world)]
        assert len({plan.local for plan in plans}) == 1
        group = args.n_head // args.n_local_heads
        for counts, size in (("vocab", args.vocab_size), ("ffn", args.intermediate_size), ("heads", args.n_head * args.head_dim)):
            held = tp.joined_runs([run for plan in plans for run in plan.runs[counts] if run[0] is not None])
            assert held == [(0, size)], f"{counts} on {world} ranks"                       # each once, in order
        for rank in range(world):                              # and every query meets its own keys and values
            q_heads, kv_heads = tp.heads_of(args.n_head, args.n_local_heads, rank, world)
            for i, head in enumerate(q_heads):
                assert head is None or head // group == kv_heads[i // (len(q_heads) // len(kv_heads))]
        local = plans[0].local
        assert local.n_local_heads >= args.n_local_heads / world
        work = [(2 * a.n_head + 2 * a.n_local_heads) * a.head_dim + 3 * a.intermediate_size for a in (args, local)]
        assert work[0] / world > 0.89 * work[1], "more than a ninth of a rank's work is padding"
        for plan in (plans[0], plans[-1]):                     # the modules are what the parts of the tensors fit into
            sharded = tp.build(plan, tp.Ranks(plan.rank, world, 0, world, 0, "", None, None))
            expected = {key: value.shape for key, value in sharded.state_dict().items()}
            assert {key: plan.cut(key, value).shape for key, value in state.items()} == expected


# What a rank holds on 2, 3, 4 and 8 ranks: query / KV heads by (query, KV) heads of the whole, and of the feed-forward width and the vocabulary.
# With a star where some of that is padding.
HEADS = {
    (12, 2): "6/1 4/2 3/1 2/1*", (14, 2): "7/1 7/1* 4/1* 2/1*", (16, 2): "8/1 6/2* 4/1 2/1", (16, 8): "8/4 6/3* 4/2 2/1",
    (16, 16): "8/8 6/6* 4/4 2/2", (20, 20): "10/10 7/7* 5/5 3/3*", (24, 8): "12/4 9/3* 6/2 3/1", (28, 4): "14/2 12/3* 7/1 4/1*",
    (32, 8): "16/4 12/3* 8/2 4/1", (32, 32): "16/16 11/11* 8/8 4/4", (40, 8): "20/4 15/3* 10/2 5/1", (40, 40): "20/20 14/14* 10/10 5/5",
    (64, 8): "32/4 24/3* 16/2 8/1", (64, 64): "32/32 22/22* 16/16 8/8",
}
SIZES = {
    2816: "1408 944* 704 352", 3072: "1536 1024 768 384", 4864: "2432 1632* 1216 608", 5504: "2752 1840* 1376 688", 6144: "3072 2048 1536 768",
    6912: "3456 2304 1728 864", 8192: "4096 2736* 2048 1024", 8960: "4480 2992* 2240 1120", 9728: "4864 3248* 2432 1216",
    11008: "5504 3680* 2752 1376", 12288: "6144 4096 3072 1536", 13696: "6848 4576* 3424 1712", 13824: "6912 4608 3456 1728",
    14336: "7168 4784* 3584 1792", 17408: "8704 5808* 4352 2176", 18944: "9472 6320* 4736 2368", 22016: "11008 7344* 5504 2752",
    24576: "12288 8192 6144 3072", 25600: "12800 8544* 6400 3200", 27392: "13696 9136* 6848 3424", 27648: "13824 9216 6912 3456",
    28672: "14336 9568* 7168 3584", 29568: "14784 9856 7392 3696", 32000: "16000 10672* 8000 4000", 128256: "64128 42752 32064 16032",
    151936: "75968 50656* 37984 18992", 152064: "76032 50688 38016 19008",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_of_published_sizes(name):
    args = ModelArgs.from_name(name)
    tables = HEADS[args.n_head, args.n_local_heads], SIZES[args.intermediate_size], SIZES[args.vocab_size]
    for world, heads, ffn, vocab in zip((2, 3, 4, 8), *(line.split() for line in tables)):
        plans = [tp.plan(args, rank, world) for rank in range(world)]
        local = plans[0].local
        padded = {counts: "*" * any(first is None for plan in plans for first, _ in plan.runs[counts]) for counts in ("heads", "ffn", "vocab")}
        assert heads == f"{local.n_head}/{local.n_local_heads}{padded['heads']}"
        assert (ffn, vocab) == (f"{local.intermediate_size}{padded['ffn']}", f"{local.vocab_size}{padded['vocab']}")


def test_few_heads_on_many_ranks():
    assert tp.heads_of(14, 2, 0, 2) == ([0, 1, 2, 3, 4, 5, 6], [0])
    assert [tp.heads_of(14, 2, rank, 4) for rank in range(4)] == [
        ([0, 1, 2, 3], [0]), ([4, 5, 6, None], [0]), ([7, 8, 9, 10], [1]), ([11, 12, 13, None], [1])]
    assert tp.heads_of(32, 8, 7, 8) == ([28, 29, 30, 31], [7])
    assert tp.heads_of(4, 4, 2, 3) == ([None, None], [None, None])


def test_numbers_of_ranks_that_cannot_work_are_refused():
    args = ModelArgs.from_name("Qwen2-0.5B")
    with pytest.raises(UserError, match="16 ranks for 14 attention heads .*1 to 14 work"):
        tp.plan(args, 0, 16)
    with pytest.raises(UserError, match="would cut groups of 128 into groups of 16, and 32 is the least .these numbers of ranks work: 1."):
        tp.plan(tp.replace(args, head_dim=16), 0, 2, Quantization("int4", 128))


def test_published_checkpoints_with_permuted_columns_are_refused():
    """Their columns would have to be sorted first; where all ranks have all columns their order does not matter."""
    args = ModelArgs.from_name("Qwen2-7B")
    with pytest.raises(UserError, match="desc_act"):
        tp.plan(args, 0, 2, Quantization("int4-fp16", 128, "none", reordered=("layers.0.feed_forward.w2",)))
    assert tp.plan(args, 0, 2, Quantization("int4-fp16", 128, "none", reordered=("layers.0.attention.wqkv",))).wo_groupsize == 128


def test_int4_groups_are_cut_where_a_head_ends_inside_one():
    """14 heads of 64 columns: half of them is three groups and a half."""
    args = tp.replace(ModelArgs.from_name("Qwen2-0.5B"), n_layer=1, windows=())
    plan = tp.plan(args, 1, 2, Quantization("int4", 128))
    assert plan.wo_groupsize == 64
    scales = torch.arange(7.0)[None]
    assert plan.cut("layers.0.attention.wo.scales", scales).tolist() == [[3, 4, 4, 5, 5, 6, 6]]


def test_the_last_int4_group_of_a_row_may_be_short():
    assert tp.in_units([(0, 96), (None, 32)], 128) == [(0, 1)]
    assert tp.in_units([(128, 101), (None, 155)], 2) == [(64, 51), (None, 77)]


# ---- several processes

FOLDERS = {
    "qwen-v1": lambda folder: tiny.save_qwen_v1(tiny.reference("qwen2", num_key_value_heads=4), folder),
    "qwen2": lambda folder: tiny.save(tiny.reference("qwen2"), folder),
    "qwen2-tied": lambda folder: tiny.save(tiny.reference("qwen2-tied"), folder),
    "qwen3": lambda folder: tiny.save(tiny.reference("qwen3"), folder),
    "qwen3-tied": lambda folder: tiny.save(tiny.reference("qwen3-tied", head_dim=32), folder),
    "llama3.1": lambda folder: tiny.save(tiny.reference("llama3.1"), folder),
    "llama-biases": lambda folder: tiny.save(tiny.reference("llama-biases", head_dim=32), folder),
    "mistral-window": lambda folder: tiny.save(tiny.reference("mistral-window"), folder),
    # sizes that nothing divides: three groups of two heads, and the one KV head that all ranks share
    "uneven": lambda folder: tiny.save(tiny.reference(
        "qwen3", num_attention_heads=6, num_key_value_heads=3, intermediate_size=100, vocab_size=331), folder),
    # published, in groups of 128, which the ranks' heads cut
    **{f"{method}-{bits}": lambda folder, method=method, bits=bits: make_published(folder, method, bits)
       for method, bits in (("gptq", 4), ("gptq", 8), ("awq", 4))},
    "one-kv": lambda folder: tiny.save(tiny.reference("qwen2", num_attention_heads=8, num_key_value_heads=1), folder),
}
FORMATS = {"int8": ("int8", 32), "g32": ("int4", 32), "g128": ("int4", 128)}
QUANTIZED = {f"{family}/{name}": (family, *how) for family in ("llama-biases", "qwen3-tied") for name, how in FORMATS.items()}
COMPILED = ("qwen2-tied",)            # test_torchrun_prints_what_one_process_prints compiles an untied one
LARGE = dict(model_type="llama", num_hidden_layers=4, hidden_size=2048, num_attention_heads=16, num_key_value_heads=8, intermediate_size=6144,
             vocab_size=32000, max_position_embeddings=512)


def make_published(folder: Path, method: str, bits: int) -> None:
    tiny.save(tiny.reference("qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=2), folder)
    publish(folder, method, bits=bits, groupsize=128, sym=False)


def make_large(folder: Path) -> None:
    """Half a gigabyte of weights (zeros)."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LARGE))
    tiny.add_tokenizer(folder)
    state = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in whole_model(ModelArgs.from_hf(LARGE)).state_dict().items()}
    torch.save({"version": 1, "quantization": None, "state_dict": state}, folder / "model.pth")


def results(path: Path, ranks: tp.Ranks | None, compiled: bool) -> dict:
    """What a checkpoint computes: logits of a batch's prompt and of six steps, greedy text, sampled text."""
    model, tokenizer = load_model(path, "cpu", torch.float32, ranks)
    set_quantize_activations(model, False)
    generator = Engine(model, tokenizer)
    idx = torch.tensor([row[:3] for row in PROMPTS])
    model.setup_caches(3, 64)
    with torch.inference_mode():
        logits = [model(idx, torch.arange(3), torch.arange(3))]
        for step in range(6):
            logits.append(model((idx[:, :1] + 7 * step) % 256, torch.tensor([[3 + step]] * 3)))
    out = {"logits": torch.cat(logits, dim=1)}

    def tokens(generator, prompts, n, sampling, **more):
        return list(generator.generate(prompts, n, sampling, stop_ids=frozenset(), **more))
    out["greedy"] = tokens(generator, PROMPTS, 16, GREEDY)
    out["sampled"] = tokens(generator, PROMPTS[0], 16, Sampling(1.0, 50, 0.95), seed=7)
    out["unseeded"] = tokens(generator, PROMPTS[0], 16, Sampling(1.0, None))
    if compiled:
        out["alone"] = tokens(generator, PROMPTS[0], 12, GREEDY, max_seq_length=64)
        fast = Engine(model, tokenizer, compile=True)
        out["compiled"] = tokens(fast, PROMPTS[0], 12, GREEDY, max_seq_length=64)
        torch._dynamo.utils.counters.clear()
        tokens(fast, PROMPTS[1], 12, GREEDY, max_seq_length=64)
        out["recompiled"] = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return out


def speculation(folder: Path, ranks: tp.Ranks) -> dict[str, list]:
    """Text with drafts of a model that is split, or that each rank holds: then slightly another one on each, as if they rounded in other ways."""
    model, tokenizer = load_model(folder / "qwen3", "cpu", torch.float32, ranks)
    out = {}
    for name, meanwhile in (("split", 0), ("whole", 1e9)):
        with mock.patch.dict(tp.READ_MEANWHILE, cpu=meanwhile):
            draft, _ = load_model(folder / "qwen2", "cpu", torch.float32, ranks, may_replicate=True)
        assert (draft.ranks is None) == (name == "whole")
        if name == "whole":
            draft.norm.weight.data += 0.5 * torch.randn(draft.norm.weight.shape, generator=torch.Generator().manual_seed(ranks.rank))
        for k in (3, None):
            speculator = Speculator(model, tokenizer, Engine(draft, tokenizer), k)
            for kind, sampling in (("greedy", GREEDY), ("sampled", Sampling(1.0, 50))):
                out[f"{kind} {name} {k}"] = list(speculator.generate(PROMPTS[0], 48, sampling, seed=5, stop_ids=frozenset()))
    return out


def mistakes(folder: Path, ranks: tp.Ranks) -> dict[str, str]:
    """What each mistake is called, by this rank."""
    good = ["--checkpoint_path", str(folder / "qwen3" / "model.pth"), "--device", "cpu"]
    missing, other = str(folder / "nowhere" / "model.pth"), str(folder / "qwen2" / "model.pth")
    cases = {
        "flag": [*good, "--max_new_tokens", "0"],
        "missing": ["--checkpoint_path", missing, "--device", "cpu"],
        "missing on rank 1": ["--checkpoint_path", missing if ranks.rank == 1 else good[1], "--device", "cpu"],
        "missing on rank 0": ["--checkpoint_path", missing if ranks.rank == 0 else good[1], "--device", "cpu"],
        "different": ["--checkpoint_path", other if ranks.rank == 1 else good[1], "--device", "cpu"],
        "too many ranks": ["--checkpoint_path", str(folder / "one-head" / "model.pth"), "--device", "cpu"],
        "prompt on rank 1": [*good, *(["--prompt", ""] if ranks.rank == 1 else [])],
        "devices": [*good[:2], "--device", "cuda"],
    }
    found, one_gpu = {}, mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1)
    for name, argv in cases.items():
        try:
            with ranks.together(), one_gpu if name == "devices" else contextlib.nullcontext():
                command(parse_args(argv), ranks)
        except tp.Agreed as error:
            found[name] = str(error)
    return found


def peak_memory() -> int:
    """Bytes of this process, pages of mapped files included."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def worker(folder: Path) -> None:
    ranks = tp.init_dist(timeout=120)
    found = {}
    if ranks.world == 2:
        model, _ = load_model(folder / "large", "cpu", torch.bfloat16, ranks)
        found["memory"] = (peak_memory(), sum(t.nbytes for t in model.state_dict().values()))
        found["mistakes"] = mistakes(folder, ranks)
        del model
    for name in FOLDERS:
        found[name] = results(folder / name / "model.pth", ranks, name in COMPILED and ranks.world == 2)
    for name, (family, mode, groupsize) in QUANTIZED.items():
        found[name] = results(folder / family / ("model_int8.pth" if mode == "int8" else f"model_int4.g{groupsize}.pth"), ranks, False)
    found["speculation"] = speculation(folder, ranks)
    logits = {name: r.pop("logits") for name, r in found.items() if "logits" in r}
    everyone = ranks.gather(found)
    if ranks.first:
        torch.save({"found": everyone, "logits": logits}, folder / f"{ranks.world}.pt")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(world: int, *argv) -> list[subprocess.Popen]:
    port = free_port()
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen([sys.executable, *(str(arg).replace("{rank}", str(rank)) for arg in argv)], **pipes, env=environment(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)))
        for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp")
    for name, make in FOLDERS.items():
        (folder / name).mkdir()
        make(folder / name)
    (folder / "one-head").mkdir()
    tiny.save(tiny.reference("qwen2", num_attention_heads=1, num_key_value_heads=1), folder / "one-head")
    for rank, name in enumerate(("qwen3", "qwen2")):         # a checkpoint path that is not the same on two machines
        (folder / f"rank{rank}").symlink_to(folder / name)
    make_large(folder / "large")
    for name in ("qwen3", "qwen2", "one-head"):              # the others are converted by the ranks
        load_model(folder / name)
    for family, mode, groupsize in QUANTIZED.values():
        load_model(folder / family)
        quantize_checkpoint(folder / family / "model.pth", mode, groupsize, progress=False)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def parallel(request, folder):
    """All checks of one number of ranks, in one start of the processes."""
    done = [p.communicate(timeout=300) + (p.returncode,) for p in start_ranks(request.param, __file__, folder)]
    assert [code for *_, code in done] == [0] * request.param, "\n".join(err for _, err, _ in done)
    return torch.load(folder / f"{request.param}.pt", weights_only=True)


@pytest.fixture(scope="module")
def single(folder):
    cache = {}

    def of(name):
        if name not in cache:
            family, mode, groupsize = QUANTIZED.get(name, (name, None, None))
            file = {None: "model.pth", "int8": "model_int8.pth", "int4": f"model_int4.g{groupsize}.pth"}[mode]
            cache[name] = results(folder / family / file, None, False)
        return cache[name]
    return of


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOLDERS, *QUANTIZED])
def test_equals_one_process(name, parallel, single):
    expected, found = single(name), [of_rank[name] for of_rank in parallel["found"]]
    assert parallel["logits"][name].shape == expected["logits"].shape
    assert (parallel["logits"][name] - expected["logits"]).abs().max() < 1e-4
    assert found[0]["greedy"] == expected["greedy"]
    assert found[0]["sampled"] == expected["sampled"]
    assert all(rank == found[0] for rank in found), "the ranks drew different tokens"


@pytest.mark.slow
def test_speculation_writes_the_models_own_text(folder, parallel):
    plain = Engine(*load_model(folder / "qwen3", "cpu", torch.float32))
    expected = list(plain.generate(PROMPTS[0], 48, GREEDY, stop_ids=frozenset()))
    found = [of_rank["speculation"] for of_rank in parallel["found"]]
    assert all(rank == found[0] for rank in found), "the ranks drew different tokens"
    assert len(found[0]) == 8
    for name, text in found[0].items():
        assert (text == expected) == name.startswith("greedy"), name


def test_a_draft_is_split_if_that_pays():
    """A 0.6B model's 58 collectives take longer than its bytes; a 7B model's do not; on CPUs, where bytes take longer, neither do a 1.7B model's."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not tp.worth_splitting(1_192_000_000, 28, 8, gpu) and tp.worth_splitting(15_200_000_000, 28, 8, gpu)
    assert not tp.worth_splitting(1_192_000_000, 28, 2, cpu) and tp.worth_splitting(3_440_000_000, 28, 2, cpu)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager(name, parallel):
    if len(parallel["found"]) != 2:
        pytest.skip("compiled on two ranks only")
    found = parallel["found"][0][name]
    assert found["compiled"] == found["alone"]
    assert found["recompiled"] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_reads_its_share_only(folder, parallel):
    if len(parallel["found"]) != 2:
        pytest.skip("on two ranks only")
    for peak, share in (of_rank["memory"] for of_rank in parallel["found"]):
        assert 0.49 < share / (folder / "large" / "model.pth").stat().st_size < 0.51
        assert peak < 1.2 * share + 0.5e9


@pytest.mark.slow
def test_a_mistake_reaches_all_ranks(parallel):
    if len(parallel["found"]) != 2:
        pytest.skip("on two ranks only")
    first, second = (of_rank["mistakes"] for of_rank in parallel["found"])
    assert first == second
    for name, text in {"flag": "--max_new_tokens 0", "missing": "--checkpoint_path ", "missing on rank 1": "rank 1: --checkpoint_path ",
                       "missing on rank 0": "--checkpoint_path ", "different": "the ranks have different checkpoints: rank 0 ",
                       "too many ranks": "--nproc_per_node: 2 ranks for 1 attention heads", "prompt on rank 1": "rank 1: --prompt is empty",
                       "devices": "--nproc_per_node 2: there are 1 CUDA devices"}.items():
        assert first[name].startswith(text)


def test_more_ranks_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ranks = tp.Ranks(0, 2, 0, 2, 0, "", None, None)
    with pytest.raises(UserError, match="--nproc_per_node 2: there are 1 CUDA devices"):
        ranks.take_device(torch.device("cuda"))
    with pytest.raises(UserError, match="--device cuda:1: under torchrun"):
        ranks.take_device(torch.device("cuda", 1))


def test_an_environment_that_is_not_torchruns(monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but not all that torchrun sets is in the environment: 'LOCAL_WORLD_SIZE'"):
        tp.init_dist()


def test_one_process_needs_no_ranks(monkeypatch):
    assert tp.init_dist() is None
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    assert tp.init_dist() is None


# ---- the command

def torchrun(*argv, how=("--standalone", "--nproc_per_node=2")) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *how, str(ROOT / "generate.py"), "--device", "cpu", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def text_of(out: str) -> str:
    """What was generated: from the line that reports loading (and the one that reports compiling) to the first sample's report."""
    lines = out.split("Time for inference 1")[0].splitlines()
    return "\n".join(line for line in lines if not line.startswith(("Time to load", "Compilation time")))


@pytest.mark.slow
def test_torchrun_prints_what_one_process_prints(folder, capsys):
    request = ["--checkpoint_path", str(folder / "qwen3" / "model.pth"), "--dtype", "fp32", "--prompt", "hello", "--num_samples", "1",
               "--max_new_tokens", "24", "--temperature", "0.9", "--seed", "3"]
    main([*request, "--device", "cpu"])
    expected = text_of(capsys.readouterr().out)
    process = torchrun("--compile", *request)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert text_of(out) == expected and len(expected) > 5
    assert out.count("Time to load model") == 1 and out.count("Average tokens/sec") == 1


@pytest.mark.slow
def test_two_machines_print_what_one_process_prints(folder, capsys):
    """As two of torchrun on this one; only the first prints."""
    request = ["--checkpoint_path", str(folder / "qwen3" / "model.pth"), "--dtype", "fp32", "--prompt", "hello", "--num_samples", "1", "--seed", "3"]
    main([*request, "--device", "cpu"])
    how = ("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}")
    done = [process.communicate(timeout=200) for process in [torchrun(*request, how=how) for _ in range(2)]]
    said = [out for out, _ in done if out]
    assert len(said) == 1 and text_of(said[0]) == text_of(capsys.readouterr().out), done


@pytest.mark.slow
def test_rank_0_reads_the_prompts():
    """A conversation, whose second turn finds the first in every rank's cache."""
    request = ["--device", "cpu", "--dtype", "fp32", "--interactive", "--chat", "--max_new_tokens", "8", "--temperature", "0", "--ignore_eos"]
    alone = subprocess.run([sys.executable, ROOT / "generate.py", *request], input="hello\nmore\n", capture_output=True, text=True, env=environment())
    first, second = start_ranks(2, ROOT / "generate.py", *request)
    out, err = first.communicate("hello\nmore\n", timeout=300)
    assert (first.returncode, second.wait(60)) == (0, 0), err
    assert out.split("\n", 1)[1] == alone.stdout.split("\n", 1)[1]
    assert second.communicate() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint, flags, told", [
    ("qwen3", ["--top_p", "3"], "--top_p 3.0 must be more than 0 and at most 1"),
    ("one-head", [], "--nproc_per_node: 2 ranks for 1 attention heads leave some without work (1 to 1 work)"),
    ("rank{rank}", [], "the ranks have different checkpoints: rank 0 "),
    ("qwen3", ["--device", "cuda:99"], "--device cuda:99: "),
], ids=["flag", "heads", "checkpoints", "device"])
def test_a_mistake_is_told_once(folder, checkpoint, flags, told):
    """One line from rank 0, exit status 2 on all ranks, and nobody waits for another."""
    ranks = start_ranks(2, ROOT / "generate.py", "--device", "cpu", "--checkpoint_path", folder / checkpoint / "model.pth", *flags)
    (out, err), second = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert (out, second) == ("", ("", ""))
    assert err.startswith(f"error: {told}") and err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_dies_all_end(folder, victim):
    process = torchrun("--checkpoint_path", folder / "qwen3" / "model.pth", "--dtype", "fp32", "--ignore_eos", "--max_new_tokens", "300",
                       "--num_samples", "100000")
    for line in process.stdout:                              # decoding is under way
        if line.startswith("Time for inference"):
            break
    workers = {int(pid): environ_of(int(pid)) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()}
    workers = {environ["RANK"]: pid for pid, environ in workers.items() if "RANK" in environ}
    started = time.monotonic()
    os.kill(workers[str(victim)], signal.SIGKILL)
    err = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert time.monotonic() - started < 60
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
    assert f"rank {1 - victim}" in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP")
def test_a_rank_that_hangs_is_given_up():
    first, second = start_ranks(2, __file__, "hang")
    try:
        assert first.stdout.readline() == "computing\n"
        second.send_signal(signal.SIGSTOP)
        err = first.communicate(timeout=60)[1]
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 1
    assert err.startswith("error: rank 0 lost touch with another rank, which died or did not answer for 3 s") and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM")
def test_a_silent_rank_that_is_stopped_says_so():
    """torchrun's signal may reach the survivors before they miss the one that died."""
    first, second = start_ranks(2, __file__, "hang")
    assert first.stdout.readline() == "computing\n"
    second.terminate()
    told = [rank.communicate(timeout=60)[1] for rank in (second, first)]
    assert told == ["error: torchrun stopped rank 1: another rank failed, or it was interrupted\n", ""]
    assert (first.returncode, second.returncode) == (1, 1)


def test_a_signal_does_not_cut_the_last_words_off():
    """The signal comes when the rank has made itself the one to speak."""
    done = subprocess.run([sys.executable, __file__, "interrupted"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: rank 1 lost touch\n")


def speak_when_stopped() -> None:
    class Store:
        said = 0

        def add(self, key: str, amount: int) -> int:
            self.said += amount
            said = self.said
            os.kill(os.getpid(), signal.SIGTERM)
            return said
    ranks = tp.Ranks(1, 2, 1, 2, 0, "", Store(), None)
    sys.stderr = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, lambda *_: ranks.last_words("stopped", 1))
    ranks.last_words("rank 1 lost touch", 1)


def compute_forever() -> None:
    with tp.joined(timeout=3) as ranks:
        for step in range(10**9):
            tp.all_reduce(torch.ones(1), ranks.group)
            if step == 10:
                print("computing", flush=True)


def environ_of(pid: int) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry)


if __name__ == "__main__":
    modes = {"hang": compute_forever, "interrupted": speak_when_stopped}
    modes[sys.argv[1]]() if sys.argv[1] in modes else worker(Path(sys.argv[1]))
