"""Tensor parallelism: the shard plan of published shapes; 2 and 4 ranks over gloo against one process; how ranks end.

Ranks are forked from one process that has imported everything (`serve`); only what is about torchrun itself starts it.
"""
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

import cli
import generate
import speculate
import tiny
import tp
from cli import UserError
from config import ModelArgs
from conftest import ROOT
from formats import Quantization, replace_linears
from generate import Engine, Sampling
from loading import load_model
from model import Transformer
from published import publish
from quantize import quantize_checkpoint
from shapes import PUBLISHED

GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111]]


# ---- the shard plan

def whole_model(args, quantization=None):
    with torch.device("meta"):
        model = Transformer(args)
        if quantization:
            replace_linears(model, quantization)
    return model


def one_layer(name, **changes):
    """Of a hybrid one of each kind."""
    args = ModelArgs.from_name(name)
    delta = args.delta_layers[:1]
    return tp.replace(args, n_layer=1 + len(delta), delta_layers=delta, windows=(), **changes)


def ranks_on_paper(rank, world_size):
    return tp.Ranks(rank, world_size, rank, world_size, "", None, None)


# Published models of the same shape in all that is split count once.
UNSPLIT = dict(model_type="", max_position=0, norm_eps=0, rope=None, rope_base=0, logn=False, dynamic_ntk=False,
               seq_length=0)
SHAPES = list({one_layer(name, **UNSPLIT): name for name in PUBLISHED}.values())


@pytest.mark.parametrize("name", SHAPES)
def test_every_published_shape_can_be_split(name):
    args = one_layer(name)
    formats = [None, Quantization("int8"), Quantization("int4", 32), Quantization("int4", 128)]
    for quantization in formats:
        state = whole_model(args, quantization).state_dict()
        for world_size in (2, 3, 4, 8):
            for rank in (0, world_size - 1):                   # the shards of the tensors fit into the modules
                plan = tp.plan(args, rank, world_size, quantization)
                sharded = tp.build(plan, ranks_on_paper(plan.rank, world_size))
                expected = {key: value.shape for key, value in sharded.state_dict().items()}
                assert {key: plan.shard(key, value).shape for key, value in state.items()} == expected
            if quantization in (formats[0], formats[-1]):
                check_shares(args, [tp.plan(args, rank, world_size, quantization) for rank in range(world_size)])


def check_shares(args, plans):
    assert len({plan.local for plan in plans}) == 1
    sizes = {"vocab": args.vocab_size, "ffn": args.intermediate_size, "heads": args.n_head * args.head_dim,
             "delta_heads": args.delta_value_heads, "delta_values": args.delta_value_heads * args.delta_value_dim}
    for counted, size in sizes.items():
        held = torch.cat([plan.indices[counted] for plan in plans])
        assert torch.equal(held[held >= 0], torch.arange(size)), counted               # each once, in order
    group = args.n_head // args.n_local_heads
    for rank in range(len(plans)):                             # every query head meets its own KV head
        q_heads, kv_heads = tp.assign_heads(args.n_head, args.n_local_heads, rank, len(plans))
        its_kv = kv_heads.repeat_interleave(len(q_heads) // len(kv_heads))
        assert ((q_heads < 0) | (q_heads // group == its_kv)).all()
    local = plans[0].local
    assert local.n_local_heads >= args.n_local_heads / len(plans)
    work = [(2 * a.n_head + 2 * a.n_local_heads) * a.head_dim + 3 * a.intermediate_size for a in (args, local)]
    least = 0.5 if args.delta_layers else 0.89       # attention is a fourth of a hybrid's layers, with 2 or 4 KV heads
    assert work[0] / len(plans) > least * work[1], "more than a ninth of a rank's work is padding"


# What a rank holds on 2, 3, 4 and 8 ranks, with a star where some ranks' share has padding: query / KV heads, by those
# of the whole model; feed-forward width and vocabulary, by that of the whole.
HEADS = {
    (8, 2): "4/1 4/1* 2/1 1/1", (16, 4): "8/2 6/3* 4/1 2/1", (24, 4): "12/2 9/3* 6/1 3/1",
    (32, 2): "16/1 12/2* 8/1 4/1", (12, 2): "6/1 4/2 3/1 2/1*", (14, 2): "7/1 7/1* 4/1* 2/1*",
    (16, 2): "8/1 6/2* 4/1 2/1", (16, 8): "8/4 6/3* 4/2 2/1", (16, 16): "8/8 6/6* 4/4 2/2",
    (20, 20): "10/10 7/7* 5/5 3/3*", (24, 8): "12/4 9/3* 6/2 3/1", (28, 4): "14/2 12/3* 7/1 4/1*",
    (32, 8): "16/4 12/3* 8/2 4/1", (32, 4): "16/2 12/3* 8/1 4/1", (64, 4): "32/2 24/3* 16/1 8/1",
    (96, 8): "48/4 36/3* 24/2 12/1", (32, 32): "16/16 11/11* 8/8 4/4", (40, 8): "20/4 15/3* 10/2 5/1",
    (40, 40): "20/20 14/14* 10/10 5/5", (64, 8): "32/4 24/3* 16/2 8/1", (64, 64): "32/32 22/22* 16/16 8/8",
}
SIZES = {
    512: "256 176* 128 64", 1024: "512 352* 256 128", 3584: "1792 1200* 896 448", 9216: "4608 3072 2304 1152",
    248320: "124160 82784* 62080 31040", 768: "384 256 192 96", 1408: "704 480* 352 176", 1536: "768 512 384 192",
    2560: "1280 864* 640 320", 2816: "1408 944* 704 352", 3072: "1536 1024 768 384", 4864: "2432 1632* 1216 608",
    5504: "2752 1840* 1376 688", 6144: "3072 2048 1536 768", 6912: "3456 2304 1728 864", 8192: "4096 2736* 2048 1024",
    8960: "4480 2992* 2240 1120", 9728: "4864 3248* 2432 1216", 11008: "5504 3680* 2752 1376",
    12288: "6144 4096 3072 1536", 13696: "6848 4576* 3424 1712", 13824: "6912 4608 3456 1728",
    14336: "7168 4784* 3584 1792", 17408: "8704 5808* 4352 2176", 18944: "9472 6320* 4736 2368",
    22016: "11008 7344* 5504 2752", 24576: "12288 8192 6144 3072", 25600: "12800 8544* 6400 3200",
    27392: "13696 9136* 6848 3424", 27648: "13824 9216 6912 3456", 28672: "14336 9568* 7168 3584",
    29568: "14784 9856 7392 3696", 32000: "16000 10672* 8000 4000", 128256: "64128 42752 32064 16032",
    151936: "75968 50656* 37984 18992", 152064: "76032 50688 38016 19008",
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_of_published_sizes(name):
    args = ModelArgs.from_name(name)
    size = "expert_size" if args.n_expert else "intermediate_size"
    tables = HEADS[args.n_head, args.n_local_heads], SIZES[getattr(args, size)], SIZES[args.vocab_size]
    for world_size, heads, ffn, vocab in zip((2, 3, 4, 8), *(line.split() for line in tables), strict=True):
        plans = [tp.plan(args, rank, world_size) for rank in range(world_size)]
        local = plans[0].local
        found = dict(heads=f"{local.n_head}/{local.n_local_heads}", ffn=getattr(local, size), vocab=local.vocab_size)
        counted = {"ffn": "expert_ffn" if args.n_expert else "ffn"}
        padded = {name for name in found
                  if any(bool((plan.indices[counted.get(name, name)] < 0).any()) for plan in plans)}
        assert [heads, ffn, vocab] == [f"{size}{'*' * (name in padded)}" for name, size in found.items()]


@pytest.mark.parametrize("Hk, Hv, found", [(16, 16, "8/8 6/6 4/4 2/2"), (16, 48, "8/24 6/18 4/12 2/6")])
def test_a_deltanet_is_split_by_key_heads(Hk, Hv, found):
    """Each with its value heads; conv, decay and gate with the channels and heads that they belong to."""
    args = tp.replace(ModelArgs.from_name("Qwen3.5-27B"), delta_key_heads=Hk, delta_value_heads=Hv)
    for world_size, sizes in zip((2, 3, 4, 8), found.split()):
        for rank in range(world_size):
            plan = tp.plan(args, rank, world_size)
            assert f"{plan.local.delta_key_heads}/{plan.local.delta_value_heads}" == sizes
            N, n = args.delta_channels, plan.local.delta_channels
            row = torch.arange(N + Hv * 128)
            qkvz = plan.shard("layers.0.attention.wqkv.weight", row[:, None] + 1)[:, 0] - 1
            q, k, v, z = qkvz.split([n // (2 + Hv // Hk)] * 2 + [plan.local.delta_value_heads * 128] * 2)
            real = q >= 0
            assert torch.equal(k[real], q[real] + Hk * 128) and torch.equal(z[v >= 0], v[v >= 0] + Hv * 128)
            heads = (v[v >= 0] - 2 * Hk * 128) // 128
            assert set((heads // (Hv // Hk)).tolist()) == set((q[real] // 128).tolist())
            assert torch.equal(plan.shard("layers.0.attention.conv", row[:N, None] + 1)[:, 0] - 1, qkvz[:n])
            A_log = plan.shard("layers.0.attention.A_log", torch.arange(Hv) + 1) - 1
            assert torch.equal(A_log[A_log >= 0], heads.unique())


def test_few_heads_on_many_ranks():
    def heads(*args):
        return tuple(heads.tolist() for heads in tp.assign_heads(*args))
    assert heads(14, 2, 0, 2) == ([0, 1, 2, 3, 4, 5, 6], [0])
    assert [heads(14, 2, rank, 4) for rank in range(4)] == [
        ([0, 1, 2, 3], [0]), ([4, 5, 6, -1], [0]), ([7, 8, 9, 10], [1]), ([11, 12, 13, -1], [1])]
    assert heads(32, 8, 7, 8) == ([28, 29, 30, 31], [7])
    assert heads(4, 4, 2, 3) == ([-1, -1], [-1, -1])


@pytest.mark.parametrize("rank", [0, 1])
def test_numbers_of_ranks_that_cannot_work_are_refused(rank):
    args = ModelArgs.from_name("Qwen2-0.5B")
    with pytest.raises(UserError, match="16 leaves some .* of the 14 attention heads .1 to 14 work.") as caught:
        tp.plan(args, rank, 16)
    assert caught.value.field == "world_size"
    with pytest.raises(UserError, match="2 would cut groups of 128 .* into groups of 16 .the least is 32; 1 works."):
        tp.plan(tp.replace(args, head_dim=16), rank, 2, Quantization("int4", 128))


def test_published_checkpoints_with_permuted_columns_are_refused():
    """Their columns would have to be sorted first; where all ranks have all columns their order does not matter."""
    args = ModelArgs.from_name("Qwen2-7B")
    with pytest.raises(UserError, match="desc_act"):
        tp.plan(args, 0, 2, Quantization("int4-fp16", 128, "none", reordered=("layers.0.feed_forward.w2",)))
    allowed = Quantization("int4-fp16", 128, "none", reordered=("layers.0.attention.wqkv",))
    assert tp.plan(args, 0, 2, allowed).wo_groupsize == 128


@pytest.mark.parametrize("world_size, rank, groupsize, expected", [
    (2, 1, 64, [3, 4, 4, 5, 5, 6, 6]),                         # 14 heads of 64 columns: half of them is 3.5 groups
    (4, 0, 128, [0, 1]),                                       # heads 0 .. 3, of 4 pieces of 4, 3, 4 and 3 heads
    (4, 2, 64, [3, 4, 4, 5]),
    (4, 3, 64, [5, 6, 6, 0]),                                  # and padding
])
def test_int4_groups_are_cut_where_a_head_ends_inside_one(world_size, rank, groupsize, expected):
    plan = tp.plan(one_layer("Qwen2-0.5B"), rank, world_size, Quantization("int4", 128))
    assert plan.wo_groupsize == groupsize
    assert plan.shard("layers.0.attention.wo.scales", torch.arange(7.0)[None]).tolist() == [expected]


def test_the_last_int4_group_of_a_row_may_be_short():
    """229 columns in groups of 128 on two ranks: the second has 101, then 27 of padding; two are in a byte."""
    plan = tp.plan(one_layer("Qwen2-0.5B", intermediate_size=229), 1, 2, Quantization("int4", 128))
    packed, scales = torch.arange(115, dtype=torch.uint8)[None], torch.tensor([[1.0, 2.0]])
    assert plan.shard("layers.0.feed_forward.w2.weight", packed).tolist() == [[*range(64, 115), *[0] * 13]]
    assert plan.shard("layers.0.feed_forward.w2.scales", scales).tolist() == [[2.0]]


def test_a_draft_is_split_if_that_pays():
    """A 0.6B model's 58 collectives take longer than its bytes, a 7B model's do not; nor on CPUs, where bytes take
    longer, a 1.7B model's."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not tp.worth_splitting(1_192_000_000, 28, 8, gpu) and tp.worth_splitting(15_200_000_000, 28, 8, gpu)
    assert not tp.worth_splitting(1_192_000_000, 28, 2, cpu) and tp.worth_splitting(3_440_000_000, 28, 2, cpu)


def test_more_ranks_than_devices(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ranks = ranks_on_paper(0, 2)
    with pytest.raises(UserError, match="world_size 2: there are 1 CUDA devices") as caught:
        ranks.take_device(torch.device("cuda"))
    assert cli.fail(caught.value) == 2
    assert capsys.readouterr().err == "error: --nproc_per_node 2: there are 1 CUDA devices\n"
    with pytest.raises(UserError, match="device cuda:1: torchrun gives"):
        ranks.take_device(torch.device("cuda", 1))


def test_an_environment_that_is_not_torchruns(monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="rank 0 of 2 could not join .*LOCAL_WORLD_SIZE"):
        tp.init_dist()


def test_one_process_needs_no_ranks(monkeypatch):
    assert tp.init_dist() is None
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    assert tp.init_dist() is None
    with tp.joined() as ranks:
        assert ranks is None


# ---- ranks, forked

def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve() -> None:
    """Requests and answers are lines of JSON: [world size, text for stdin, name of a function here, arguments] runs the
    function in so many ranks, and is answered by the list of their [exit status, stdout, stderr]."""
    for request in iter(sys.stdin.readline, ""):
        world_size, text, name, *args = json.loads(request)
        port, ranks = free_port(), []
        for rank in range(world_size):
            files = [tempfile.TemporaryFile("w+") for _ in range(3)]
            files[0].write("" if rank else text)
            files[0].seek(0)
            if not (pid := os.fork()):
                signal.alarm(500)                              # ends a rank that hangs
                for number, file in enumerate(files):
                    os.dup2(file.fileno(), number)
                sys.stdin = open(0, closefd=False)
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                                  LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                return globals()[name](*args)
            ranks.append((pid, files))
        answer = []
        for pid, files in ranks:
            _, status = os.waitpid(pid, os.WUNTRACED)
            if os.WIFSTOPPED(status):                          # by a test, and all ranks before it have ended
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            [file.seek(0) for file in files]
            answer.append([os.waitstatus_to_exitcode(status), *(file.read() for file in files[1:])])
        print(json.dumps(answer), flush=True)


@pytest.fixture(scope="module")
def run_ranks():
    if not hasattr(os, "fork"):
        pytest.skip("forks")
    server = subprocess.Popen([sys.executable, __file__], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})

    def run(world_size, name, *args, stdin=""):
        server.stdin.write(json.dumps([world_size, stdin, name, *args], default=str) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())
    yield run
    server.stdin.close()
    server.wait(60)


def run_command(*argv: str) -> None:
    """generate.py, in a rank. "{rank}" in an argument stands for the rank."""
    arguments = [arg.replace("{rank}", os.environ["RANK"]) for arg in argv]
    cli.run(lambda: generate.main(["--device", "cpu", "--dtype", "fp32", "--quiet", *arguments]))


# ---- ranks against one process

def reference(family: str, **changes):
    return tiny.reference(family, num_hidden_layers=2, **changes)


def save(folder: Path, family: str, **changes) -> None:
    tiny.save(reference(family, **changes), folder)


def save_published(folder: Path, method: str, bits: int) -> None:
    """In groups of 128, which the ranks' heads cut."""
    save(folder, "qwen2", hidden_size=128, intermediate_size=256)
    publish(folder, method, bits=bits, groupsize=128, sym=False)


FOLDERS = {
    "qwen-v1": lambda folder: tiny.save_qwen_v1(reference("qwen2", num_key_value_heads=4), folder),
    "qwen2": lambda folder: save(folder, "qwen2"),
    "qwen2-tied": lambda folder: save(folder, "qwen2-tied"),
    "qwen3": lambda folder: save(folder, "qwen3"),
    "qwen2-moe": lambda folder: save(folder, "qwen2-moe"),
    "qwen3-moe": lambda folder: save(folder, "qwen3-moe"),
    "qwen3-tied": lambda folder: save(folder, "qwen3-tied", head_dim=32),
    "qwen3-next": lambda folder: save(folder, "qwen3-next"),
    "qwen3.5": lambda folder: save(folder, "qwen3.5"),
    "uneven hybrid": lambda folder: save(folder, "qwen3.5", linear_num_key_heads=3, linear_num_value_heads=9),
    "llama3.1": lambda folder: save(folder, "llama3.1"),
    "llama-biases": lambda folder: save(folder, "llama-biases", head_dim=32),
    "mistral-window": lambda folder: save(folder, "mistral-window"),
    # sizes that nothing divides: three groups of two heads, and the one KV head that all ranks share
    "uneven": lambda folder: save(folder, "qwen3", num_attention_heads=6, num_key_value_heads=3, intermediate_size=100,
                                  vocab_size=331),
    "one-kv": lambda folder: save(folder, "qwen2", num_attention_heads=8, num_key_value_heads=1),
    "gptq-4": lambda folder: save_published(folder, "gptq", 4),
    "gptq-8": lambda folder: save_published(folder, "gptq", 8),
    "awq-4": lambda folder: save_published(folder, "awq", 4),
}
FORMATS = {"int8": ("int8", 32), "g32": ("int4", 32), "g128": ("int4", 128)}
QUANTIZED = {f"{family}/{name}": (family, *how)
             for family in ("llama-biases", "qwen3-tied", "qwen3-moe", "qwen3.5") for name, how in FORMATS.items()}
COMPILED = ("qwen2-tied", "qwen3", "qwen2-moe", "qwen3.5")
LARGE = dict(model_type="llama", num_hidden_layers=2, hidden_size=2048, num_attention_heads=16, num_key_value_heads=8,
             intermediate_size=6144, vocab_size=16000, max_position_embeddings=512)


def save_large(folder: Path) -> None:
    """A third of a gigabyte of weights (zeros)."""
    (folder / "config.json").write_text(json.dumps(LARGE))
    tiny.add_tokenizer(folder)
    shapes = whole_model(ModelArgs.from_hf(LARGE)).state_dict()
    state = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in shapes.items()}
    torch.save({"version": 1, "quantization": None, "state_dict": state}, folder / "model.pth")


def checkpoint(folder: Path, name: str) -> Path:
    family, mode, groupsize = QUANTIZED.get(name, (name, None, None))
    return folder / family / {None: "model.pth", "int8": "model_int8.pth", "int4": f"model_int4.g{groupsize}.pth"}[mode]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp")
    for name, make in FOLDERS.items():
        (folder / name).mkdir()
        make(folder / name)
    (folder / "mtp").mkdir()
    save(folder / "mtp", "qwen3.5-moe")
    tiny.add_mtp_head(folder / "mtp")
    (folder / "one-head").mkdir()
    save(folder / "one-head", "qwen2", num_attention_heads=1, num_key_value_heads=1)
    for rank, name in enumerate(("qwen3", "qwen2")):         # a checkpoint path that is not the same on two machines
        (folder / f"rank{rank}").symlink_to(folder / name)
    (folder / "large").mkdir()
    save_large(folder / "large")
    for name in ("qwen3", "qwen2", "one-head"):              # the others are converted by the ranks
        load_model(folder / name)
    for family, mode, groupsize in QUANTIZED.values():
        load_model(folder / family)
        quantize_checkpoint(folder / family / "model.pth", mode, groupsize, progress=False)
    return folder


def tokens(engine: Engine, prompts, n: int, sampling: Sampling, **more) -> list:
    return list(engine.generate(prompts, n, sampling, stop_ids=frozenset(), **more))


def results(path: Path, ranks: tp.Ranks | None, compiled: bool = False) -> dict:
    """What a checkpoint computes: logits of a batch's prompts, longer than a window, and of two steps; its text."""
    model, tokenizer = load_model(path, "cpu", torch.float32, ranks, quantize_activations=False)
    engine = Engine(model, tokenizer)
    idx, everywhere = (7 * torch.arange(60).view(3, 20)) % 256, torch.arange(20)
    model.setup_caches(3, 64)
    with torch.inference_mode():
        logits = [model(idx, everywhere, everywhere)]
        logits += [model(idx[:, :1] + step, torch.tensor([[20 + step]] * 3)) for step in range(2)]
    out = {"logits": torch.cat(logits, dim=1), "greedy": tokens(engine, PROMPTS, 6, GREEDY),
           "sampled": tokens(engine, PROMPTS[0], 5, Sampling(1.0, 50, 0.95), seed=7),
           "unseeded": tokens(engine, PROMPTS[0], 2, Sampling(1.0, None))}
    model.int8_kv_cache = True
    out["int8 cache"], model.int8_kv_cache = tokens(engine, PROMPTS, 6, GREEDY), False
    if compiled:
        out["alone"] = tokens(engine, PROMPTS[0], 8, GREEDY, max_seq_length=64)
        fast = Engine(model, tokenizer, compile=True)
        out["compiled"] = tokens(fast, PROMPTS[0], 8, GREEDY, max_seq_length=64)
        torch._dynamo.utils.counters.clear()
        tokens(fast, PROMPTS[1], 8, GREEDY, max_seq_length=64)
        out["recompiled"] = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return out


def speculation(folder: Path, ranks: tp.Ranks) -> dict[str, list]:
    """Text with drafts of a model that is split, or that each rank holds: then another one on each, as if they rounded
    differently."""
    path, out = checkpoint(folder, "qwen3"), {}
    model, tokenizer = load_model(path, "cpu", torch.float32, ranks)
    for name, nbytes in (("split", 0), ("whole", 1e9)):
        with mock.patch.dict(tp.BYTES_PER_COLLECTIVE, cpu=nbytes):
            draft, _ = load_model(path, "cpu", torch.float32, ranks, may_replicate=True)
        assert (draft.ranks is None) == (name == "whole")
        if name == "whole":
            noise = torch.randn(draft.norm.weight.shape, generator=torch.Generator().manual_seed(ranks.rank))
            draft.norm.weight.data += 0.5 * noise
        for k in (3, None) if ranks.world_size == 2 else (3,):
            for kind, sampling in (("greedy", GREEDY), ("sampled", Sampling(1.0, 50))):
                engine = Engine(model, tokenizer, draft=Engine(draft, tokenizer), speculate_k=k)
                out[f"{kind} {name} {k}"] = tokens(engine, PROMPTS[0], 17, sampling, seed=5)
                out[f"accepted by {kind} {name} {k}"] = engine.speculator.statistics.mean_accepted
    return out


def drafts_by_mtp(folder: Path, ranks: tp.Ranks | None) -> list:
    """Texts that a hybrid's own head drafts for, greedy and drawn, and how many drafted tokens were accepted."""
    model, tokenizer = load_model(folder / "mtp", "cpu", torch.float32, ranks, mtp=True)
    engine = Engine(model, tokenizer, draft="mtp", speculate_k=3)
    out = [tokens(engine, PROMPTS[0], 17, GREEDY), tokens(engine, PROMPTS[0], 9, Sampling(1.0, 20), seed=3)]
    return [*out, engine.speculator.statistics.mean_accepted]


def mistakes(folder: Path, ranks: tp.Ranks) -> dict[str, str]:
    """What each mistake is called, by this rank."""
    good = ["--device", "cpu", "--checkpoint_path", str(folder / "qwen3" / "model.pth")]
    missing, other = ([*good[:3], str(folder / name / "model.pth")] for name in ("nowhere", "qwen2"))
    cases = {
        "flag": [*good, "--max_new_tokens", "0"],
        "missing": missing,
        "missing on rank 1": missing if ranks.rank == 1 else good,
        "missing on rank 0": missing if ranks.rank == 0 else good,
        "different": other if ranks.rank == 1 else good,
        "too many ranks": [*good[:3], str(folder / "one-head" / "model.pth")],
        "prompt on rank 1": [*good, *(["--prompt", ""] if ranks.rank == 1 else [])],
        "devices": ["--device", "cuda"],
    }
    found, one_gpu = {}, mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1)
    for name, argv in cases.items():
        try:
            with one_gpu if name == "devices" else contextlib.nullcontext():
                try:
                    generate.command(generate.parse_args(argv), ranks)
                except UserError as error:
                    if not isinstance(error, tp.SharedError):
                        ranks.gather(error)
                    raise
        except tp.SharedError as error:
            with contextlib.redirect_stderr(io.StringIO()) as told:
                cli.fail(error)
            found[name] = told.getvalue()
    return found


def memory(field: str) -> int:
    """Bytes of this process, pages of mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def share_and_peak(folder: Path, ranks: tp.Ranks) -> tuple[int, int]:
    """Bytes of the rank's weights, and by how much memory grew at most while they were loaded."""
    Path("/proc/self/clear_refs").write_text("5")            # the peak is that from now on
    before = memory("VmRSS")
    model, _ = load_model(folder / "large", "cpu", torch.bfloat16, ranks)
    return sum(t.nbytes for t in model.state_dict().values()), memory("VmHWM") - before


def check_everything(path: str) -> None:
    """All that one group of ranks computes, in a rank."""
    folder, found = Path(path), {}
    ranks = tp.init_dist(timeout=300)
    if ranks.world_size == 2:
        found["memory"] = share_and_peak(folder, ranks) if sys.platform == "linux" else None
        found["mistakes"] = mistakes(folder, ranks)
    for name in (*FOLDERS, *QUANTIZED):
        found[name] = results(checkpoint(folder, name), ranks, name in COMPILED and ranks.world_size == 2)
    with mock.patch.object(speculate, "AUTO_K", range(1, 3)):
        found["speculation"] = speculation(folder, ranks)
    found["mtp"] = drafts_by_mtp(folder, ranks)
    logits = {name: r.pop("logits") for name, r in found.items() if isinstance(r, dict) and "logits" in r}
    everyone = ranks.gather(found)
    if ranks.first:
        torch.save({"found": everyone, "logits": logits}, folder / f"{ranks.world_size}.pt")


def found_by(world_size, folder, run_ranks):
    done = run_ranks(world_size, "check_everything", folder)
    assert [status for status, *_ in done] == [0] * world_size, "\n".join(err for *_, err in done)
    return torch.load(folder / f"{world_size}.pt", weights_only=True)


@pytest.fixture(scope="module")
def two(folder, run_ranks):
    return found_by(2, folder, run_ranks)


@pytest.fixture(scope="module")
def four(folder, run_ranks):
    return found_by(4, folder, run_ranks)


@pytest.fixture(scope="module", params=["two", pytest.param("four", marks=pytest.mark.long)])
def parallel(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def single(folder):
    return {name: results(checkpoint(folder, name), None) for name in (*FOLDERS, *QUANTIZED)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOLDERS, *QUANTIZED])
def test_equals_one_process(name, parallel, single):
    expected, found = single[name], [of_rank[name] for of_rank in parallel["found"]]
    assert parallel["logits"][name].shape == expected["logits"].shape
    assert (parallel["logits"][name] - expected["logits"]).abs().max() < 1e-4
    assert found[0]["greedy"] == expected["greedy"] and found[0]["int8 cache"] == expected["int8 cache"]
    assert found[0]["sampled"] == expected["sampled"]
    assert all(rank == found[0] for rank in found), "the ranks drew different tokens"


@pytest.mark.slow
def test_speculation_writes_the_models_own_text(folder, parallel):
    expected = tokens(Engine(*load_model(folder / "qwen3", "cpu", torch.float32)), PROMPTS[0], 17, GREEDY)
    found = [of_rank["speculation"] for of_rank in parallel["found"]]
    assert all(rank == found[0] for rank in found), "the ranks drew different tokens"
    texts = {name: text for name, text in found[0].items() if not name.startswith("accepted")}
    assert len(texts) == (8 if len(found) == 2 else 4)
    for name, text in texts.items():
        assert (text == expected) == name.startswith("greedy"), name
    assert found[0]["accepted by greedy split 3"] == 3 > found[0]["accepted by greedy whole 3"]


@pytest.mark.slow
def test_the_models_own_head_drafts_as_in_one_process(folder, parallel):
    expected = drafts_by_mtp(folder, None)
    assert all(of_rank["mtp"] == expected for of_rank in parallel["found"])


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager(name, two):
    found = two["found"][0][name]
    assert found["compiled"] == found["alone"]
    assert found["recompiled"] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_reads_its_share_only(folder, two):
    for share, peak in (of_rank["memory"] for of_rank in two["found"]):
        assert 0.49 < share / (folder / "large" / "model.pth").stat().st_size < 0.51
        assert peak < 1.2 * share + 0.15e9


@pytest.mark.slow
def test_a_mistake_reaches_all_ranks(two):
    first, second = (of_rank["mistakes"] for of_rank in two["found"])
    assert first == second and len(first) == 8
    for name, parts in {
        "flag": ["--max_new_tokens 0 must"], "missing": ["nowhere/model.pth"],
        "missing on rank 1": ["nowhere/model.pth", "(on rank 1)"], "missing on rank 0": ["nowhere/model.pth"],
        "different": ["the ranks have different checkpoints: rank 0 "],
        "too many ranks": ["--nproc_per_node 2 leaves some ranks without any of the 1 attention heads"],
        "prompt on rank 1": ["--prompt is empty (on rank 1)"],
        "devices": ["--nproc_per_node 2: there are 1 CUDA devices"],
    }.items():
        assert first[name].startswith("error: ") and all(part in first[name] for part in parts), first[name]
        assert ("on rank" in first[name]) == name.endswith("on rank 1")


# ---- how ranks end

@pytest.mark.slow
def test_rank_0_reads_the_prompts(run_ranks):
    """A conversation, whose second turn finds the first in every rank's cache."""
    request = ["--interactive", "--chat", "--max_new_tokens", "8", "--temperature", "0", "--ignore_eos"]
    [alone] = run_ranks(1, "run_command", *request, stdin="hello\nmore\n")
    first, second = run_ranks(2, "run_command", *request, stdin="hello\nmore\n")
    assert first[:2] == alone[:2] and first[0] == 0 and len(first[1].splitlines()) > 4
    assert second == [0, "", ""]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint, flags, told", [
    ("qwen3", ["--top_p", "3"], "--top_p 3.0 must be more than 0 and at most 1"),
    ("qwen3", ["--top_p", "{rank}.5"], "--top_p 1.5 must be more than 0 and at most 1 (on rank 1)"),
    ("qwen3", ["--seed", "1e20"], "--seed: invalid int value: '1e20'"),
    ("qwen3", ["--prompt_file", "/proc/self/mem"], "--prompt_file /proc/self/mem: cannot be read"),
    ("qwen3", ["--profile", "/dev/null", "--max_new_tokens", "4"], "--profile /dev/null: cannot be written"),
    ("one-head", [], "--nproc_per_node 2 leaves some ranks without any of the 1 attention heads (1 to 1 work)"),
    ("rank{rank}", [], "the ranks have different checkpoints: rank 0 "),
    ("qwen3", ["--device", "cuda:99"], "--device cuda:99"),
], ids=["flag", "flag of rank 1", "number", "file", "profile", "heads", "checkpoints", "device"])
def test_a_mistake_is_told_once(folder, run_ranks, checkpoint, flags, told):
    """One line from rank 0, exit status 2 on all ranks, and nobody waits for another."""
    first, second = run_ranks(2, "run_command", "--checkpoint_path", folder / checkpoint / "model.pth", *flags)
    assert (first[:2], second) == ([2, ""], [2, "", ""])
    assert first[2].startswith(f"error: {told}") and first[2].count("\n") == 1 and first[2].endswith("\n")


def lose_rank(victim: int, number: int) -> None:
    with tp.joined(timeout=3) as ranks:
        for step in range(10 ** 9):
            tp.all_reduce(torch.ones(1), ranks.group)
            if step == 10 and ranks.rank == victim:
                os.kill(os.getpid(), number)


LOST = "error: rank {} lost touch with another rank, which died or did not answer for 3 s "


@pytest.mark.slow
@pytest.mark.parametrize("victim, name", [(1, "SIGSTOP"), (1, "SIGKILL"), (0, "SIGKILL")])  # rank 0 holds the store
def test_a_rank_that_hangs_or_dies_ends_the_other(run_ranks, victim, name):
    done = run_ranks(2, "lose_rank", victim, getattr(signal, name))
    lost, (status, out, err) = done[victim], done[1 - victim]
    assert lost == [-signal.SIGKILL, "", ""]                 # serve has killed the one that was stopped
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith(LOST.format(1 - victim))
    if victim == 1:                                          # of a store that is gone PyTorch itself warns before
        assert err.count("\n") == 1


@pytest.mark.slow
def test_a_silent_rank_that_is_stopped_says_so(run_ranks):
    """torchrun's signal may reach the survivors before they miss the one that died."""
    stopped = "error: torchrun stopped rank 1: another rank failed, or it was interrupted\n"
    assert run_ranks(2, "lose_rank", 1, signal.SIGTERM) == [[1, "", ""], [1, "", stopped]]


def abort_when_stopped() -> None:
    class Store:
        aborted = 0

        def add(self, key: str, amount: int) -> int:
            self.aborted += amount
            aborted = self.aborted
            os.kill(os.getpid(), signal.SIGTERM)
            return aborted
    ranks = tp.Ranks(1, 2, 1, 2, "", None, Store())
    sys.stderr = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, lambda *_: ranks.abort_all("stopped"))
    ranks.abort_all("rank 1 lost touch")


@pytest.mark.slow
def test_a_signal_does_not_cut_the_message_off(run_ranks):
    """The signal comes when the rank has made itself the one to print."""
    assert run_ranks(1, "abort_when_stopped") == [[1, "", "error: rank 1 lost touch\n"]]


# ---- torchrun

def torchrun(*argv, how=("--standalone", "--nproc_per_node=2")) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *how, ROOT / "generate.py", "--device", "cpu", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def request_and_text(folder, run_ranks):
    """Flags, and what one process prints."""
    request = ["--checkpoint_path", folder / "qwen3" / "model.pth", "--dtype", "fp32", "--prompt", "hello",
               "--temperature", "0.9", "--seed", "3", "--max_new_tokens", "24", "--ignore_eos"]
    [(status, out, err)] = run_ranks(1, "run_command", *request, "--num_samples", "1")
    assert (status, err) == (0, "") and len(out) > 5
    return request, out


@pytest.mark.slow
@pytest.mark.long
def test_two_machines_print_what_one_process_prints(request_and_text):
    """As two of torchrun on this one; only the first prints."""
    request, expected = request_and_text
    how = ("--nnodes", "2", "--nproc_per_node", "1",
           "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}")
    started = [torchrun(*request, "--num_samples", "1", "--quiet", how=how) for _ in range(2)]
    done = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], done
    assert sorted(out for out, _ in done) == ["", expected]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_prints_what_one_process_prints_until_a_rank_dies(request_and_text, victim):
    request, expected = request_and_text
    process, lines = torchrun(*request, "--num_samples", "100000"), []
    for line in process.stdout:
        if line.startswith("Time for inference"):              # the first sample is out
            break
        lines.append(line)
    assert [line.startswith("Time to load model") for line in lines][:2] == [True, False]
    assert "".join(lines[1:]) == expected
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = {environ_of(pid).get("RANK"): int(pid) for pid in children}
    os.kill(workers[str(victim)], signal.SIGKILL)
    err = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
    assert f"rank {1 - victim}" in err
    assert not any(Path(f"/proc/{pid}").exists() for rank, pid in workers.items() if rank)


@pytest.mark.slow
def test_ranks_end_when_torchrun_is_killed(request_and_text):
    process = torchrun(*request_and_text[0], "--num_samples", "100000")
    assert process.stdout.readline().startswith("Time to load model")
    process.kill()
    err = process.communicate(timeout=300)[1]                  # returns when all that hold its pipes have ended
    told = [line for line in err.splitlines() if "rank" in line or "Traceback" in line]
    assert told == ["error: torchrun, which started the ranks, is gone"]


def environ_of(pid: str) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry)


if __name__ == "__main__":
    serve()
