"""The benchmark's arithmetic against figures worked out by hand, its table and plot, and what its workers report."""
import contextlib
import io
import json
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import formats
from cli import UserError
from config import ModelArgs
from conftest import ROOT
from generate import bytes_read_per_token
from model import Transformer
from shapes import PUBLISHED

sys.path.insert(0, str(ROOT / "scripts"))

import benchmark
import benchmark_peers
import benchmark_worker

QWEN3, LLAMA2 = ModelArgs.from_name("Qwen3-0.6B"), ModelArgs.from_name("Llama-2-7B")
BF16, SLOT = 1_192_099_840, 114_688              # of Qwen3-0.6B, see below
RESULT = ROOT / "benchmarks" / "Qwen3-0.6B-cpu.json"


def weight_bytes(args: ModelArgs, quantization="none", groupsize=32, lm_head="int8", dtype=torch.bfloat16) -> int:
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
    if quantization != "none":
        formats.replace_linears(model, formats.Quantization(quantization, groupsize, lm_head))
    return bytes_read_per_token(model)


# ---- arithmetic

# Qwen3-0.6B, a layer: qkv 4096 x 1024, o 1024 x 2048, gate and up 6144 x 1024, down 1024 x 3072 = 15,728,640; 28 of
# them and the tied head of 151936 x 1024 make 595,984,384; norms 28 x (2 x 1024 + 2 x 128) + 1024 = 65,536.
# A cache slot: 28 x 2 x 8 x 128 x 2 bytes = 114,688.
def test_bytes_per_step_of_qwen3():
    assert weight_bytes(QWEN3) == 2 * (595_984_384 + 65_536) == BF16
    assert weight_bytes(QWEN3, dtype=torch.float32) == 2 * BF16
    assert benchmark.bytes_per_step(BF16, QWEN3, position=0) == BF16 + SLOT
    assert benchmark.bytes_per_step(BF16, QWEN3, position=4095) == BF16 + 4096 * SLOT
    assert benchmark.bytes_per_step(BF16, QWEN3, position=63, batch=4) == BF16 + 4 * 64 * SLOT
    assert benchmark.bytes_per_step(0, QWEN3, position=0, kv_dtype=torch.float32) == 2 * SLOT


def test_bytes_of_quantized_qwen3():
    layers, head, norms = 440_401_920, 155_582_464, 2 * 65_536       # the matrices' weights, and the norms' bytes
    rows = 28 * (4096 + 1024 + 6144 + 1024)
    assert weight_bytes(QWEN3, "int8") == layers + head + 4 * (rows + 151_936) + norms
    assert weight_bytes(QWEN3, "int4") == layers * 19 // 32 + head + 4 * 151_936 + norms
    assert weight_bytes(QWEN3, "int4", 128, "int4") == (layers + head) * 67 // 128 + norms
    assert weight_bytes(QWEN3, "int8", 32, "none") == layers + 2 * head + 4 * rows + norms


# Llama-2-7B, a layer: qkv 12288 x 4096, o 4096 x 4096, gate and up 22016 x 4096, down 4096 x 11008 = 202,375,168; 32 of
# them, the head of 32000 x 4096 and 65 norms of 4096 make 6,607,343,616 = 6.74 G parameters less the input embedding.
# A cache slot: 32 x 2 x 4096 x 2 bytes.
def test_bytes_per_step_of_llama2():
    assert weight_bytes(LLAMA2) == 2 * 6_607_343_616
    assert benchmark.bytes_per_step(0, LLAMA2, position=511, batch=2) == 1024 * 524_288


def test_a_window_ends_the_cache():
    config = dict(PUBLISHED["Qwen2.5-0.5B"], use_sliding_window=True, sliding_window=100, max_window_layers=20)
    args, slot = ModelArgs.from_hf(config), 2 * 2 * 64 * 2
    assert benchmark.bytes_per_step(0, args, position=999) == (20 * 1000 + 4 * 100) * slot
    assert benchmark.bytes_per_step(0, args, position=99) == 24 * 100 * slot
    assert benchmark.bytes_per_step(0, args, position=99, kv_dtype=torch.int8) == 24 * 100 * 2 * 2 * (64 + 4)


# Of 24 layers 6 have a cache; what 18 DeltaNets remember is read and written: 16 heads of 128 x 128 fp32 numbers each.
def test_bytes_per_step_of_a_hybrid():
    args = ModelArgs.from_name("Qwen3.5-0.8B")
    assert benchmark.bytes_per_step(0, args, position=99, batch=2) == 2 * 100 * 6 * 2 * 2 * 256 * 2
    small = Transformer(replace(args, vocab_size=64, dim=32, intermediate_size=32)).bfloat16()
    before = bytes_read_per_token(small)
    small.setup_caches(3, 8)
    remembered = 3 * 18 * 2 * 16 * 128 * 128 * 4
    assert bytes_read_per_token(small) - before - small.inv_freq.nbytes == remembered


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen2.5-0.5B", "Qwen-1.8B", "Llama-3.2-1B", "Qwen3.5-0.8B"])
def test_the_gguf_holds_as_many_weights(name):
    args = ModelArgs.from_name(name)
    sizes = {key: torch.Size(shape).numel() for key, shape in benchmark_peers.gguf_tensors(args).items()}
    embedding = 0 if args.tie_word_embeddings else sizes["token_embd.weight"]
    assert 2 * (sum(sizes.values()) - embedding) == weight_bytes(args)


def test_gguf_formats_have_as_many_bits():
    def types(quantization, lm_head):
        return benchmark_peers.gguf_types(job(quantization=quantization, lm_head=lm_head))
    assert types("none", "int8") == ("BF16", "BF16") and types("int8", "int8") == ("Q8_0", "Q8_0")
    assert types("int4", "int8") == ("Q4_0", "Q8_0") and types("int4", "none") == ("Q4_0", "BF16")


def test_percentile_is_one_of_the_values():
    assert benchmark.percentile([float(i) for i in range(1, 11)], 90) == 9.0
    assert benchmark.percentile([3.0, 1.0, 2.0], 90) == 3.0
    assert benchmark.percentile([5.0], 90) == 5.0


# ---- rows

def job(program="qwen-fast", quantization="none", compile=False, **more) -> dict:
    return dict(program=program, label=program, quantization=quantization, compile=compile, ranks=1, dtype="bfloat16",
                kv_cache="none", groupsize=32, lm_head="int8", prompt_length=256, batch_size=1, neighbours=0,
                max_seq_length=512, tokens=64) | more


def raw(seconds: list[float], ttft: float = 0.5, **more) -> dict:
    return dict(seconds=seconds, ttft_s=ttft, peak_bytes=2_000_000_000, version="v 1", **more)


def test_rows_take_the_median_of_rounds():
    """One slow round does not count; the first round's compilation is the cold one."""
    rounds = [raw([0.02, 0.04, 0.9], 0.4, compile_s=20.0, weight_bytes=BF16, bandwidth=40e9, load_s=1.0),
              raw([0.4, 0.5, 0.6], 2.0, compile_s=4.0, weight_bytes=BF16, bandwidth=30e9, load_s=2.0),
              raw([0.05, 0.05, 0.05], 0.5, compile_s=3.0, weight_bytes=BF16, bandwidth=40e9, load_s=9.0)]
    row = benchmark.summarize(job(compile=True), rounds, QWEN3)
    assert row["decode_ms"] == pytest.approx(50) and row["decode_tok_s"] == pytest.approx(20)
    assert row["decode_ms_p90"] == pytest.approx(600)
    assert row["prefill_tok_s"] == pytest.approx(512) and row["ttft_ms"] == pytest.approx(500)
    assert (row["compile_cold_s"], row["compile_warm_s"], row["load_s"], row["peak_gb"]) == (20.0, 3.5, 2.0, 2.0)
    assert row["bytes_per_step"] == BF16 + 289 * SLOT and row["bandwidth_gb_s"] == 40
    assert row["mbu"] == pytest.approx((BF16 + 289 * SLOT) / 0.05 / 40e9)


def test_several_sequences_count_together():
    row = benchmark.summarize(job(batch_size=4), [raw([0.1], 0.5, weight_bytes=BF16, bandwidth=20e9)], QWEN3)
    assert row["decode_tok_s"] == pytest.approx(40) and row["prefill_tok_s"] == pytest.approx(2048)
    assert row["mbu"] == pytest.approx((BF16 + 4 * 289 * SLOT) / 0.1 / 20e9)


def test_what_was_not_measured_is_not_made_up():
    row = benchmark.summarize(job("llama.cpp"), [raw([0.1])], QWEN3)
    assert {key for key, value in row.items() if value is None} == {
        "mbu", "bandwidth_gb_s", "bytes_per_step", "load_s", "compile_cold_s", "compile_warm_s"}


def result(rows: list[dict], **more) -> dict:
    machine = dict(cpu="A CPU", cores=2, threads=2, flags="avx2", gpu="", memory_gb=16.0, date="2025-01-01")
    return dict(model="Qwen3-0.6B", dtype="bf16", lm_head="int8", groupsize=32, tokens=64, rounds=1, machine=machine,
                rows=rows, skipped=["a: is not there"], **more)


def cells_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_the_table_gives_ratios_at_the_same_format_and_sizes():
    def row(program, quantization, ms, **more):
        return benchmark.summarize(job(program, quantization, **more), [raw([ms / 1000])], QWEN3)
    rows = [row("qwen-fast", "none", 40.0), row("llama.cpp", "none", 50.0), row("plain", "none", 100.0),
            row("qwen-fast", "int4", 12.5), row("llama.cpp", "int4", 10.0),
            row("qwen-fast", "none", 60.0, prompt_length=4096), row("llama.cpp", "none", 90.0, prompt_length=4096)]
    benchmark.compare(rows)
    text = benchmark.report(result(rows))
    columns, *cells = cells_of(text)

    def column(name):
        return [line[columns.index(name)] for line in cells]
    assert column("x llama.cpp") == ["1.25", "-", "0.50", "0.80", "-", "1.50", "-"]
    assert column("x plain") == ["2.50", "2.00", "-", "-", "-", "-", "-"]
    assert column("prefill x llama.cpp") == ["1.00", "-", "1.00", "1.00", "-", "1.00", "-"]
    assert column("decode tokens/s") == ["25.0", "20.0", "10.0", "80.0", "100.0", "16.7", "11.1"]
    assert column("format") == ["bf16", "bf16", "bf16", "int4", "int4", "bf16", "bf16"]
    assert "of the limit" not in columns and "after a prompt of 256 or 4096" in text
    assert text.splitlines()[-1] == "skipped: a: is not there"


def test_ratios_are_medians_of_the_rounds_own():
    """The machine was twice as slow in one round: 2, 1.5 and 1.25 times."""
    rows = [benchmark.summarize(job(program), [raw([s]) for s in seconds], QWEN3)
            for program, seconds in (("qwen-fast", (0.1, 0.4, 0.2)), ("llama.cpp", (0.2, 0.6, 0.25)))]
    benchmark.compare(rows)
    assert rows[0]["ratios"]["llama.cpp"]["decode"] == pytest.approx(1.5) and rows[1]["ratios"] == {}


# ---- the committed result

def test_the_committed_result_is_what_the_readme_plots(tmp_path, capsys):
    (tmp_path / RESULT.name).write_text(RESULT.read_text())
    benchmark.main(["--plot", str(tmp_path / RESULT.name)])
    drawn = (tmp_path / RESULT.with_suffix(".svg").name).read_text()
    assert drawn == RESULT.with_suffix(".svg").read_text(), "benchmark.py --plot draws it again"
    assert drawn.count("<rect") == 1 + 8 and drawn.count("<path") == 3 + 1
    for words in ("bf16", "int8", "int4", ">32.3<", ">20.6<", ">63.1<", "llama.cpp", "plain PyTorch", "AMD EPYC"):
        assert words in drawn
    columns, *cells = cells_of(capsys.readouterr().out)
    assert columns == ["program", "format", "decode tokens/s", "of the limit", "x llama.cpp", "prefill tokens/s",
                       "prefill x llama.cpp", "peak GB"]
    assert cells[0] == ["qwen-fast --compile", "bf16", "32.3", "87 %", "1.46", "333", "1.53", "1.67"]


def test_the_committed_result_has_the_fields_that_are_written():
    known, row = json.loads(RESULT.read_text()), benchmark.summarize(job(), [raw([0.1])], QWEN3)
    assert all(set(given) == set(row) for given in known["rows"])
    assert set(known) == {*result([]), "device", "note"} and set(known["machine"]) == set(result([])["machine"])


def test_bars_are_as_long_as_the_figures_and_the_limit_as_far(tmp_path):
    bandwidth = 2 * (BF16 + 289 * SLOT) / 0.05
    rows = [benchmark.summarize(job(), [raw([0.05], weight_bytes=BF16, bandwidth=bandwidth)], QWEN3),
            benchmark.summarize(job("A <b> & c"), [raw([0.1])], QWEN3)]
    benchmark.plot(result(rows), tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert 'width="240.0"' in drawn and 'width="120.0"' in drawn         # 20 and 10 tokens/s; the limit of 40 is at 480
    assert 'd="M700.0 ' in drawn and "A &lt;b&gt; &amp; c" in drawn


@pytest.mark.parametrize("content", ["nothing", "[]", "{}", '{"rows": [1], "machine": {}}'])
def test_what_is_no_result_is_refused(content, tmp_path):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match="plot .*bad.json: not a result"):
        benchmark.main(["--plot", str(tmp_path / "bad.json")])


# ---- planning and running

def test_fewer_layers_of_a_model_with_experts():
    args = benchmark.parse_args(["--model", "Qwen3-30B-A3B", "--layers", "6", "--modes", "eager"])
    (job,), skipped = benchmark.plan(args)
    assert job["config"]["num_hidden_layers"] == 6 and job["name"] == "Qwen3-30B-A3B-6-layers" and not skipped


def test_a_missing_peer_is_named_and_left_out(monkeypatch):
    monkeypatch.setitem(benchmark.NEEDS, "llama.cpp", ("a_package_that_is_not_there",))
    monkeypatch.setitem(benchmark.NEEDS, "transformers", ())
    args = benchmark.parse_args(["--peers", "llama.cpp", "transformers", "--modes", "eager"])
    jobs, skipped = benchmark.plan(args)
    assert [j["program"] for j in jobs] == ["qwen-fast", "transformers", "plain"]
    assert len(skipped) == 1 and "llama.cpp" in skipped[0] and "a_package_that_is_not_there" in skipped[0]
    args = benchmark.parse_args(["--peers", "transformers", "--quant", "int4", "--modes", "eager"])
    jobs, skipped = benchmark.plan(args)
    assert [j["program"] for j in jobs] == ["qwen-fast"] and "without quantization" in skipped[0]


def test_ik_llama_cpp_runs_one_sequence_and_needs_its_program(monkeypatch):
    monkeypatch.setitem(benchmark.NEEDS, "ik_llama.cpp", ())
    args = benchmark.parse_args(["--peers", "ik_llama.cpp", "--modes", "eager", "--no_plain", "--batch_size", "1", "4",
                                 "--quant", "int4", "--llama_bench", "/bin/llama-bench"])
    jobs, skipped = benchmark.plan(args)
    assert [j["program"] for j in jobs] == ["qwen-fast", "ik_llama.cpp", "qwen-fast"] and not skipped
    args.llama_bench = None
    jobs, skipped = benchmark.plan(args)
    assert [j["program"] for j in jobs] == ["qwen-fast"] * 2 and "--llama_bench" in skipped[0]


def test_all_combinations_are_measured(monkeypatch):
    monkeypatch.setitem(benchmark.NEEDS, "llama.cpp", ())
    args = benchmark.parse_args(["--modes", "eager", "--ranks", "2", "4", "--batch_size", "1", "4", "--no_plain",
                                 "--peers", "llama.cpp", "--quant", "none", "int4"])
    of_batch = [("qwen-fast, batch_size {}, ranks 2", 2), ("llama.cpp, batch_size {}", 1),
                ("qwen-fast, batch_size {}, ranks 4", 4)]
    assert [(j["label"], j["quantization"], j["ranks"]) for j in benchmark.plan(args)[0]] == [
        (label.format(batch), kind, ranks) for kind in ("none", "int4") for batch in (1, 4)
        for label, ranks in of_batch]


def test_neighbours_keep_cores_busy_until_the_worker_has_ended(monkeypatch, tmp_path):
    monkeypatch.setitem(benchmark.NEEDS, "llama.cpp", ())
    args = benchmark.parse_args(["--modes", "eager", "--neighbours", "0", "2", "--no_plain", "--peers", "llama.cpp"])
    labels = [j["label"] for j in benchmark.plan(args)[0]]
    assert labels == [f"{program}, neighbours {n}" for n in (0, 2) for program in ("qwen-fast", "llama.cpp")]
    started, popen = [], subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]
    monkeypatch.setattr(benchmark.subprocess, "Popen", start)
    assert "failed" in benchmark.work(job(neighbours=2, threads=1), str(tmp_path))       # it has no model to run
    assert [process.returncode for process in started] == [-signal.SIGKILL, -signal.SIGKILL, 1]


def test_kv_caches_are_compared():
    args = benchmark.parse_args(["--modes", "eager", "--kv_cache", "none", "int8"])
    assert [(j["label"], j["kv_cache"]) for j in benchmark.plan(args)[0]] == [
        ("qwen-fast", "none"), ("qwen-fast --kv_cache int8", "int8"), ("plain PyTorch", "none")]


def test_a_worker_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    calls = []

    def work(job, caches):
        calls.append(job["program"])
        return dict(failed="RuntimeError: no") if job["program"] == "plain" else raw([0.05])
    monkeypatch.setattr(benchmark, "work", work)
    benchmark.main(["--modes", "eager", "--rounds", "2", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "Qwen3-0.6B-cpu.json").read_text())
    assert calls == ["qwen-fast", "plain", "qwen-fast"] and [row["label"] for row in written["rows"]] == ["qwen-fast"]
    assert written["skipped"] == ["plain PyTorch none failed: RuntimeError: no"] and written["machine"]["cores"] >= 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == written
    assert "| qwen-fast |" in (tmp_path / "Qwen3-0.6B-cpu.md").read_text()
    assert (tmp_path / "Qwen3-0.6B-cpu.svg").read_text().startswith("<svg ")


@pytest.mark.parametrize("flags, field, said", [
    (["--model", "Llama-2-7B", "--prompt_length", "4050"], "prompt_length", "4050 and 65 new tokens exceed"),
    (["--max_seq_length", "512", "50000"], "max_seq_length", "50000 .* exceed"),
    (["--rounds", "0"], "rounds", "0 must"), (["--batch_size", "0", "2"], "batch_size", "0 must"),
    (["--neighbours", "-1"], "neighbours", "-1 must"),
    (["--ranks", "0", "2"], "ranks", "0 must be 1 or more"),
    (["--ranks", "1", "32"], "ranks", "32 .*16 attention heads")])
def test_flags_that_cannot_be_are_refused(flags, field, said):
    with pytest.raises(UserError, match=said) as refused:
        benchmark.main(flags)
    assert refused.value.field == field


def test_the_cause_of_a_failure_is_found():
    report = "====\nscripts/benchmark_worker.py FAILED\n===="
    assert benchmark.cause(f"[W1] noise\nerror: --device cuda:0: no\n{report}") == "error: --device cuda:0: no"
    assert benchmark.cause(f"[rank0]: Traceback\n[rank0]: ValueError: no\n{report}") == "[rank0]: ValueError: no"
    assert benchmark.cause("Traceback\nValueError: no") == "ValueError: no"


def test_the_cores_are_divided_among_the_ranks(monkeypatch):
    jobs = []
    monkeypatch.setattr(benchmark, "work", lambda job, caches: jobs.append(job) or dict(failed="no"))
    monkeypatch.setattr(benchmark.torch, "get_num_threads", lambda: 8)
    benchmark.main(["--ranks", "1", "4", "--rounds", "1"])
    assert {job["threads"] for job in jobs} == {2} and {job["ranks"] for job in jobs} == {1, 4}


# ---- workers

TINY = dict(model_type="qwen3", num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, intermediate_size=128, vocab_size=8192, rope_theta=1e6, max_position_embeddings=1024,
            tie_word_embeddings=True)


def tiny_job(tmp_path, program="qwen-fast", quantization="none", **more) -> dict:
    return job(program, quantization) | dict(config=TINY, name="tiny", device="cpu", threads=1, prompt_length=12,
                                             tokens=5, work_dir=str(tmp_path)) | more


def serve(module, task, monkeypatch) -> dict:
    """A worker's report, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["worker", json.dumps(task)])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        module.main()
    return json.loads(out.getvalue())


@pytest.mark.parametrize("program, quantization", [
    ("qwen-fast", "none"), ("qwen-fast", "int4"), ("plain", "none"), ("llama.cpp", "none"), ("llama.cpp", "int4"),
    pytest.param("transformers", "none", marks=pytest.mark.slow)])
def test_workers_measure_a_tiny_shape(program, quantization, tmp_path, monkeypatch):
    if benchmark.missing(program):
        pytest.skip(f"{benchmark.missing(program)} is not installed")
    module = benchmark_worker if program == "qwen-fast" else benchmark_peers
    for batch in (1, 3):
        task = tiny_job(tmp_path, program, quantization, batch_size=batch)
        done = serve(module, task, monkeypatch)
        assert len(done["seconds"]) == 5 and done["ttft_s"] > 0 and done["peak_bytes"] > 1e6
        row = benchmark.summarize(task, [done], ModelArgs.from_hf(TINY))
        assert row["decode_tok_s"] == pytest.approx(1e3 * batch / row["decode_ms"])
        if program == "qwen-fast":
            assert done["recompiles"] == 0 and done["load_s"] > 0 and done["bandwidth"] > 1e8 and 0 < row["mbu"]
            expected = weight_bytes(ModelArgs.from_hf(TINY), quantization)
            assert expected <= done["weight_bytes"] < 1.05 * expected


def test_llama_cpp_is_given_every_position_once(monkeypatch, tmp_path):
    """A stand-in for the library: two sequences, a prompt of 300 tokens in passes of 512 of both, then 3 steps."""
    calls = []

    def decode(context, batch):
        rows = list(zip(batch.pos, batch.seq_id, batch.logits, strict=True))[:batch.n_tokens]
        calls.append([(position, sequence, logits) for position, [sequence], logits in rows])

    def init_batch(n, *_):
        return SimpleNamespace(token=[0] * n, pos=[0] * n, n_seq_id=[0] * n, seq_id=[[0] for _ in range(n)],
                               logits=[0] * n)
    params = SimpleNamespace()
    module = MagicMock(__version__="0")
    module.llama_cpp.configure_mock(llama_decode=decode, llama_batch_init=init_batch, **{
        "llama_context_default_params.return_value": params,
        "llama_memory_clear.side_effect": lambda *_: calls.append("clear")})
    module.llama_cpp.llama_synchronize.side_effect = lambda context: None
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(benchmark_peers, "write_gguf", lambda args, types, path: path.write_text(""))
    monkeypatch.setattr(benchmark_peers, "measured", lambda seconds, ttft_s, version, **more: len(seconds))
    task = tiny_job(tmp_path, "llama.cpp", batch_size=2, prompt_length=300, tokens=3)
    assert benchmark_peers.run_llama_cpp(task, ModelArgs.from_hf(TINY)) == 3
    assert params.n_ctx == 2 * 512 and params.n_seq_max == 2 and (tmp_path / "tiny-BF16-BF16.gguf").exists()
    assert calls[0] == calls[3] == "clear"
    assert len(calls[1]) == 64 and calls[2] == [(32, 0, True), (32, 1, True)]
    assert [row[:2] for call in calls[4:] for row in call] == [(p, s) for p in range(303) for s in range(2)]
    assert [len(call) for call in calls[4:]] == [512, 88, 2, 2, 2]
    assert all(logits == (position == call[-1][0]) for call in calls[4:] for position, _, logits in call)


def test_ik_llama_cpp_is_asked_for_prefill_and_for_decoding_after_it(monkeypatch, tmp_path):
    """A stand-in for its llama-bench: what it is called with, and what it prints."""
    program, called = tmp_path / "llama-bench", tmp_path / "called"
    results = [dict(samples_ns=[2_000_000_000], build_commit="abc"), dict(samples_ns=[500_000_000], build_commit="abc")]
    program.write_text(f"#!/bin/sh\necho \"$@\" > {called}\necho 'warning'\necho '{json.dumps(results)}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(benchmark_peers, "write_gguf", lambda args, types, path: path.write_text(""))
    done = serve(benchmark_peers, tiny_job(tmp_path, "ik_llama.cpp", "int4", llama_bench=str(program)), monkeypatch)
    assert (done["seconds"], done["ttft_s"], done["version"]) == ([0.1] * 5, 2.0, "ik_llama.cpp abc")
    assert done["peak_bytes"] > 1e6
    assert called.read_text().split() == (f"-m {tmp_path}/tiny-Q4_0-Q8_0.gguf -t 1 -p 12 -n 0 -gp 12,5 -r 1 -rtr 1 "
                                          "-fa 1 -o json").split()


def test_the_gguf_can_be_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    args = ModelArgs.from_hf(TINY)
    benchmark_peers.write_gguf(args, ("Q4_0", "Q8_0"), tmp_path / "model.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    shapes = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in tensors.items()}
    assert shapes == benchmark_peers.gguf_tensors(args)
    embedding, matrix = tensors["token_embd.weight"], tensors["blk.1.attn_q.weight"]
    assert (embedding.tensor_type.name, matrix.tensor_type.name) == ("Q8_0", "Q4_0")
    assert (tensors["output_norm.weight"].data == 1).all()
    values = gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    assert values.std() == pytest.approx(0.012, rel=0.05)


def test_plain_pytorch_computes_what_the_model_does(monkeypatch):
    """With the same random weights: the yardstick does the same work."""
    args, weights = ModelArgs.from_hf(TINY), {}

    def values(self, *normal):
        return self.copy_(weights.setdefault(len(weights), torch.randn(self.shape) / 8))
    monkeypatch.setattr(torch.Tensor, "normal_", values)
    plain = benchmark_peers.plain_model(args, 2, 16, "cpu", torch.float32)
    monkeypatch.undo()
    embedding, model = list(weights.values())[-1], Transformer(args)
    state = dict.fromkeys(model.state_dict(), torch.ones(()))
    for i in range(2):
        wqkv, wo, w1, w3, w2 = list(weights.values())[5 * i:5 * i + 5]
        state |= {f"layers.{i}.attention.wqkv.weight": wqkv, f"layers.{i}.attention.wo.weight": wo,
                  f"layers.{i}.feed_forward.w13.weight": torch.cat((w1, w3)), f"layers.{i}.feed_forward.w2.weight": w2}
    state = {name: value.expand(model.get_parameter(name).shape) for name, value in state.items() if name in state}
    model.load_state_dict(state | {"tok_embeddings.weight": embedding})
    model.setup_caches(2, 16)
    idx = torch.randint(0, 512, (2, 7))
    with torch.inference_mode():
        for begin, end in ((0, 5), (5, 6), (6, 7)):
            input_pos = torch.arange(begin, end)
            torch.testing.assert_close(plain(idx[:, begin:end], input_pos), model(idx[:, begin:end], input_pos),
                                       rtol=1e-4, atol=1e-4)


def test_random_rows_are_all_different(tmp_path):
    benchmark_worker.write_random_checkpoint(ModelArgs.from_hf(TINY), torch.bfloat16, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth")["state_dict"]
    matrix = state["tok_embeddings.weight"]
    assert len(matrix.unique(dim=0)) == 8192 and matrix.float().std() == pytest.approx(0.012, rel=0.05)
    assert all(tensor.isfinite().all() for tensor in state.values()) and (state["norm.weight"] == 1).all()


def test_what_is_done_between_tokens_is_not_measured(monkeypatch):
    """Three tokens, 2, 3 and 4 s apart, and 100 s of something else after each."""
    clock = [0.0]
    monkeypatch.setattr(benchmark_worker.time, "perf_counter", lambda: clock[0])

    def wait(seconds):
        clock[0] += seconds
    assert benchmark_worker.token_times((wait(n) for n in (2, 3, 4)), 0.0, lambda: wait(100)) == (2, [3, 4])


def test_a_worker_runs_in_a_process_of_its_own(monkeypatch, tmp_path):
    """Its last line counts, or the cause of its failure; several ranks go through torchrun."""
    commands = []

    class Process:
        def __init__(self, command, env, **options):
            commands.append((command, env))
            self.returncode = int("plain" in command[-1])

        def communicate(self):
            return "noise\n{\"seconds\": [1]}\n", "Traceback\nValueError: no\n"
    monkeypatch.setattr(subprocess, "Popen", Process)
    assert benchmark.work(tiny_job(tmp_path, ranks=2), str(tmp_path)) == dict(seconds=[1])
    assert benchmark.work(tiny_job(tmp_path, "plain"), str(tmp_path)) == dict(failed="ValueError: no")
    assert "--nproc_per_node=2" in commands[0][0] and commands[0][0][-2].endswith("benchmark_worker.py")
    assert commands[1][0][1].endswith("benchmark_peers.py") and commands[1][1]["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
@pytest.mark.long
def test_compiled_workers_do_not_recompile_while_they_are_measured(tmp_path):
    done = benchmark.work(tiny_job(tmp_path, compile=True), str(tmp_path))
    assert "failed" not in done, done
    assert done["recompiles"] == 0 and done["compile_s"] > 0 and done["bandwidth"] > 1e8 and len(done["seconds"]) == 5


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_measure_a_tiny_shape(tmp_path):
    done = benchmark.work(tiny_job(tmp_path, quantization="int8", ranks=2), str(tmp_path))
    assert "failed" not in done, done
    assert len(done["seconds"]) == 5 and done["peak_bytes"] > 1e6 and "bandwidth" not in done
    assert 0.5 < done["weight_bytes"] / weight_bytes(ModelArgs.from_hf(TINY), "int8") < 0.52
