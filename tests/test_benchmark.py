"""The benchmark's arithmetic against figures worked out by hand, its tables, and what it does about programs that are not there."""
import json
import sys

import pytest
from conftest import ROOT

import formats
from config import PUBLISHED, ModelArgs
from cli import UserError

sys.path.insert(0, str(ROOT / "scripts"))

import benchmark
import benchmark_peers
import benchmark_worker

QWEN3, LLAMA2 = ModelArgs.from_name("Qwen3-0.6B"), ModelArgs.from_name("Llama-2-7B")


# Qwen3-0.6B, a layer: qkv 4096 x 1024, o 1024 x 2048, gate and up 6144 x 1024, down 1024 x 3072 = 15,728,640; 28 of them and the tied head
# of 151936 x 1024 make 595,984,384; norms 28 x (2 x 1024 + 2 x 128) + 1024 = 65,536. A cache slot: 28 x 2 x 8 x 128 x 2 bytes = 114,688.
def test_bytes_per_token_of_qwen3():
    assert benchmark.bytes_per_token(QWEN3, "none", position=0) == 2 * (595_984_384 + 65_536) + 114_688
    assert benchmark.bytes_per_token(QWEN3, "none", position=4095) == 1_192_099_840 + 4096 * 114_688
    assert benchmark.bytes_per_token(QWEN3, "none", position=63, batch=4) == 1_192_099_840 + 4 * 64 * 114_688
    assert benchmark.bytes_per_token(QWEN3, "none", position=0, dtype_bytes=4) == 2 * (1_192_099_840 + 114_688)


def test_bytes_per_token_of_quantized_qwen3():
    layers, head, rest = 440_401_920, 155_582_464, 2 * 65_536 + 114_688           # the matrices' weights; in bytes, the norms and one slot
    rows = 28 * (4096 + 1024 + 6144 + 1024)
    assert benchmark.bytes_per_token(QWEN3, "int8") == layers + head + 4 * (rows + 151_936) + rest
    assert benchmark.bytes_per_token(QWEN3, "int4", groupsize=32) == layers * 19 // 32 + head + 4 * 151_936 + rest
    assert benchmark.bytes_per_token(QWEN3, "int4", groupsize=128, lm_head="int4") == (layers + head) * 67 // 128 + rest
    assert benchmark.bytes_per_token(QWEN3, "int8", lm_head="none") == layers + 2 * head + 4 * rows + rest
    assert benchmark.bytes_per_token(QWEN3, "int8", program="llama.cpp") == (layers + head) * 34 // 32 + rest
    assert benchmark.bytes_per_token(QWEN3, "int4", program="llama.cpp") == layers * 18 // 32 + head * 34 // 32 + rest


# Llama-2-7B, a layer: qkv 12288 x 4096, o 4096 x 4096, gate and up 22016 x 4096, down 4096 x 11008 = 202,375,168; 32 of them, the head of
# 32000 x 4096 and 65 norms of 4096 make 6,607,343,616 = 6.74 G parameters less the input embedding. A cache slot: 32 x 2 x 4096 x 2 bytes.
def test_bytes_per_token_of_llama2():
    assert benchmark.bytes_per_token(LLAMA2, "none", position=0) == 2 * 6_607_343_616 + 524_288
    assert benchmark.bytes_per_token(LLAMA2, "none", position=511, batch=2) == 2 * 6_607_343_616 + 1024 * 524_288


def test_biases_count_and_a_window_ends_the_cache():
    qwen2 = ModelArgs.from_name("Qwen2.5-0.5B")
    assert benchmark.vector_elements(qwen2) == 24 * (2 * 896 + 896 + 2 * 128) + 896
    config = dict(PUBLISHED["Qwen2.5-0.5B"], use_sliding_window=True, sliding_window=100, max_window_layers=20)
    windowed = ModelArgs.from_hf(config)
    slot = 2 * 2 * 64 * 2
    assert benchmark.bytes_per_token(qwen2, position=999) - benchmark.bytes_per_token(windowed, position=999) == 4 * 900 * slot
    assert benchmark.bytes_per_token(qwen2, position=99) == benchmark.bytes_per_token(windowed, position=99)


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen2.5-0.5B", "Qwen-1.8B", "Llama-3.2-1B"])
def test_every_format_holds_the_same_number_of_weights(name):
    """The GGUF's tensors and this project's parameters, counted apart from each other."""
    import torch
    from generate import bytes_read_per_token
    from model import Transformer
    args = ModelArgs.from_name(name)
    with torch.device("meta"):
        model = Transformer(args).to(torch.bfloat16)
    slot = 2 * args.n_layer * args.n_local_heads * args.head_dim * 2
    assert bytes_read_per_token(model) == benchmark.bytes_per_token(args) - slot
    for mode, head in (("int8", "int8"), ("int4", "int8"), ("int4", "int4"), ("int4", "none")):
        with torch.device("meta"):
            quantized = Transformer(args).to(torch.bfloat16)
        formats.replace_linears(quantized, formats.Quantization(mode, 64, head))
        assert bytes_read_per_token(quantized) == benchmark.bytes_per_token(args, mode, groupsize=64, lm_head=head) - slot
    sizes = {key: torch.Size(shape).numel() for key, shape in benchmark_peers.gguf_tensors(args).items()}
    embedding = 0 if args.tie_word_embeddings else sizes["token_embd.weight"]
    assert 2 * (sum(sizes.values()) - embedding) == benchmark.bytes_per_token(args) - slot


def test_mbu():
    assert benchmark.mbu(1_200_000_000, 0.04, 40e9) == pytest.approx(0.75)
    assert benchmark.mbu(benchmark.bytes_per_token(LLAMA2), 1 / 104.9, 1700e9) == pytest.approx(0.815, abs=0.001)      # gpt-fast's published figure


def test_percentile_is_one_of_the_values():
    assert benchmark.percentile([float(i) for i in range(1, 11)], 90) == 9.0
    assert benchmark.percentile([3.0, 1.0, 2.0], 90) == 3.0
    assert benchmark.percentile([5.0], 90) == 5.0


def job(program="qwen-fast", quantization="none", compile=False, ranks=1, **more) -> dict:
    return dict(program=program, quantization=quantization, compile=compile, ranks=ranks, dtype_name="bf16", groupsize=32, lm_head="int8",
                prompt_length=256, tokens=64, **more)


def raw(seconds: list[float], ttft: float = 0.5, **more) -> dict:
    return dict(seconds=seconds, ttft_s=ttft, peak_bytes=2_000_000_000, version="v 1", **more)


def test_rows_take_the_median_of_rounds():
    """One slow round does not count; the first round's compilation is the cold one."""
    rounds = [raw([0.02, 0.04, 0.9], 0.4, compile_s=20.0, sweeps=[dict(what="position", at=64, seconds=[0.03, 0.05, 0.05])]),
              raw([0.4, 0.5, 0.6], 2.0, compile_s=4.0, sweeps=[dict(what="position", at=64, seconds=[0.06])]),
              raw([0.05, 0.05, 0.05], 0.5, compile_s=3.0, sweeps=[dict(what="position", at=64, seconds=[0.01])])]
    row = benchmark.summarize(job(compile=True), rounds, QWEN3, bandwidths=[40e9] * 3)
    assert row["decode_ms"] == pytest.approx(50) and row["decode_tok_s"] == pytest.approx(20)
    assert row["decode_ms_p90"] == pytest.approx(600)
    assert row["prefill_tok_s"] == pytest.approx(512) and row["ttft_ms"] == pytest.approx(500)
    assert (row["compile_cold_s"], row["compile_warm_s"]) == (20.0, 3.5)
    assert row["mbu"] == pytest.approx((1_192_099_840 + 289 * 114_688) / 0.05 / 40e9)
    assert row["position"][64]["ms"] == pytest.approx(50)


def result(rows: list[dict]) -> dict:
    machine = dict(cpu="A CPU", cores=2, threads=2, flags="avx2", gpu="", memory_gb=16.0, bandwidth_gb_s=40.0, bandwidth_by="sum", date="2025-01-01")
    return dict(model="Qwen3-0.6B", dtype="bf16", lm_head="int8", groupsize=32, prompt_length=256, tokens=64, rounds=1, machine=machine, rows=rows,
                skipped=["a: is not there"])


def test_the_table_gives_ratios_to_the_same_quantization():
    def row(program, quantization, ms, **more):
        sweeps = [dict(what="position", at=at, seconds=[ms * factor / 1000]) for at, factor in ((64, 1), (4096, 1.5))] if program != "plain" else []
        return benchmark.summarize(job(program, quantization, **more), [raw([ms / 1000], sweeps=sweeps)], QWEN3, bandwidths=[40e9])
    rows = [row("qwen-fast", "none", 40.0), row("llama.cpp", "none", 50.0), row("plain", "none", 100.0),
            row("qwen-fast", "int4", 12.5), row("llama.cpp", "int4", 10.0)]
    lines = benchmark.report(result(rows)).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    columns, cells = table[0], table[2:7]
    assert [line[columns.index("x llama.cpp")] for line in cells] == ["1.25", "-", "0.50", "0.80", "-"]
    assert [line[columns.index("x plain")] for line in cells] == ["2.50", "2.00", "-", "-", "-"]
    assert [line[columns.index("decode tok/s")] for line in cells] == ["25.0", "20.0", "10.0", "80.0", "100.0"]
    assert table[7] == ["program", "quant", "64", "4096", "time, last : first"]
    assert table[9] == ["qwen-fast", "-", "40.00 (1.25 x llama.cpp)", "60.00 (1.25 x llama.cpp)", "1.50"]
    assert len({len(line) for line in lines if line.startswith("|")}) <= 2 and lines[-1] == "skipped: a: is not there"


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [benchmark.summarize(job(), [raw([0.04], sweeps=[dict(what="position", at=64, seconds=[0.04])])], QWEN3, bandwidths=[40e9])]
    benchmark.plot(result(rows), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_peer_is_named_and_left_out(monkeypatch):
    monkeypatch.setitem(benchmark.NEEDS, "llama.cpp", ("a_package_that_is_not_there",))
    monkeypatch.setitem(benchmark.NEEDS, "transformers", ())
    args = benchmark.parse_args(["--peers", "llama.cpp", "transformers", "--modes", "eager"])
    jobs, skipped = benchmark.plan(args, {})
    assert [j["program"] for j in jobs] == ["qwen-fast", "transformers", "plain"]
    assert len(skipped) == 1 and "llama.cpp" in skipped[0] and "a_package_that_is_not_there" in skipped[0]


def test_a_worker_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path):
    def work(job, caches):
        if job["program"] == "bandwidth":
            return dict(rates={"sum": 3e10, "dot": 4e10})
        return dict(failed="RuntimeError: no") if job["program"] == "plain" else raw([0.05])
    monkeypatch.setattr(benchmark, "work", work)
    args = benchmark.parse_args(["--modes", "eager", "--rounds", "2"])
    measured = benchmark.measure(args, PUBLISHED["Qwen3-0.6B"], "Qwen3-0.6B", str(tmp_path), str(tmp_path))
    assert [row["label"] for row in measured["rows"]] == ["qwen-fast"] and measured["machine"]["bandwidth_gb_s"] == 40.0
    assert measured["skipped"] == ["plain none failed: RuntimeError: no"]


@pytest.mark.parametrize("flags, named", [
    (["--model", "Llama-2-7B", "--positions", "4050"], "--positions"), (["--capacities", "64"], "--capacities 64"), (["--rounds", "0"], "--rounds 0"),
    (["--batch_sizes", "0", "2"], "--batch_sizes 0"),
    (["--ranks", "0", "2"], "--ranks 0 must be 1 or more"), (["--ranks", "1", "32"], "--ranks: 32 ranks for 16 attention heads")])
def test_flags_that_cannot_be_are_refused(flags, named):
    with pytest.raises(UserError, match=named):
        benchmark.main(flags)


TINY = dict(model_type="qwen3", num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=128,
            vocab_size=512, rope_theta=1e6, max_position_embeddings=1024, tie_word_embeddings=True)


def tiny_job(tmp_path, quantization: str, program="qwen-fast", ranks=1, **sweeps) -> dict:
    return job(program, quantization, ranks=ranks) | dict(
        config=TINY, name="tiny", device="cpu", dtype="bfloat16", threads=1, prompt_length=12, tokens=5, work_dir=str(tmp_path), checkpoint_path=None,
        **{"positions": [], "capacities": [], "batch_sizes": [], **sweeps})


@pytest.mark.parametrize("program, quantization", [("qwen-fast", "none"), ("qwen-fast", "int4"), ("plain", "none"), ("llama.cpp", "none"),
                                                   ("llama.cpp", "int4"), ("transformers", "none")])
def test_workers_measure_a_tiny_shape(program, quantization, tmp_path):
    if benchmark.missing(program):
        pytest.skip(f"{benchmark.missing(program)} is not installed")
    task = tiny_job(tmp_path, quantization, program, positions=[16, 40], capacities=[64, 128], batch_sizes=[1, 3])
    done = benchmark.work(task, str(tmp_path))
    assert "failed" not in done, done
    assert len(done["seconds"]) == 5 and done["ttft_s"] > 0 and done["peak_bytes"] > 1e6
    row = benchmark.summarize(task, [json.loads(json.dumps(done))], ModelArgs.from_hf(TINY), [4e10])
    if program == "qwen-fast":
        assert sorted(row["position"]) == [16, 40] and sorted(row["capacity"]) == [64, 128] and sorted(row["batch"]) == [1, 3]
        assert done["recompiles"] == 0 and done["load_s"] > 0
    if program == "llama.cpp":
        assert sorted(row["position"]) == [16, 40] and sorted(row["batch"]) == [1, 3]


def test_compiled_workers_do_not_recompile_while_they_are_measured(tmp_path):
    """And meet more shapes of the cache than the compiler takes for one function by default."""
    task = tiny_job(tmp_path, "none", positions=[16, 40], capacities=[64, 128], batch_sizes=list(range(1, 11)), compile=True)
    done = benchmark.work(task, str(tmp_path))
    assert "failed" not in done, done
    assert done["recompiles"] == 0 and done["compile_s"] > 0 and done["bandwidth"] > 1e8
    assert [len(sweep["seconds"]) for sweep in done["sweeps"]] == [8] * 14                     # 5 tokens, in four turns


def test_what_is_done_between_tokens_is_not_measured(monkeypatch):
    """Three tokens, 2, 3 and 4 s apart, and 100 s of something else after each."""
    clock = [0.0]
    monkeypatch.setattr(benchmark_worker.time, "perf_counter", lambda: clock[0])

    def wait(seconds):
        clock[0] += seconds
    assert benchmark_worker.token_times((wait(n) for n in (2, 3, 4)), 0.0, lambda: wait(100)) == (2, [3, 4])


def test_the_share_of_the_limit_is_that_of_its_own_time():
    """Measured at 40 GB/s, read while another program took half of them: 20 GB/s were there to be had."""
    bytes_read = 1_192_099_840 + 289 * 114_688
    row = benchmark.summarize(job(), [raw([0.1], bandwidth=20e9)], QWEN3, bandwidths=[40e9])
    assert row["mbu"] == pytest.approx(bytes_read / 0.1 / 20e9) and row["limit_tok_s"] == pytest.approx(20e9 / bytes_read)


# ---- several ranks

# Qwen3-0.6B on two ranks: 2 x 28 + 1 all-reduces of 1024 numbers and a gather of 151936, in bf16: 57 x 2048 + 303,872 = 420,608 bytes. A rank
# reads half of the bytes. One process takes 40 ms; 40 x 0.5 + 10 of exchange = 30 ms are expected, and 32 measured.
def test_several_ranks_against_one():
    told = dict(all_reduce=57.0, all_gather=1.0, share=0.25, exchange_s=0.01)
    rows = [benchmark.summarize(job(), [raw([0.04], weight_bytes=1_000_000)], QWEN3, bandwidths=[40e9]),
            benchmark.summarize(job(ranks=2), [raw([0.032], weight_bytes=500_000, communication=told)], QWEN3, bandwidths=[40e9])]
    benchmark.add_speedups(rows)
    assert "communication" not in rows[0] and rows[1]["communication"] == pytest.approx(dict(
        all_reduces=57, all_reduces_a_layer=2, all_gathers=1, bytes=420_608, ms=8, exchange_ms=10, speedup=1.25, expected_speedup=4 / 3))
    lines = benchmark.report(result(rows)).splitlines()
    header = next(i for i, line in enumerate(lines) if "expected" in line and line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[header + 2:header + 4]]
    assert cells == [["qwen-fast", "-", "1", "25.0", "40.00", *["-"] * 8],
                     ["qwen-fast, 2 ranks", "-", "2", "31.2", "32.00", "57", "2", "421", "8.00", "25 %", "10.00", "1.25", "1.33"]]


@pytest.mark.slow
def test_two_ranks_measure_a_tiny_shape(tmp_path):
    done = benchmark.work(tiny_job(tmp_path, "int8", ranks=2), str(tmp_path))
    assert "failed" not in done, done
    assert len(done["seconds"]) == 5 and done["peak_bytes"] > 1e6 and "bandwidth" not in done
    told = done["communication"]
    assert (told["all_reduce"], told["all_gather"]) == (2 * 2 + 1, 1) and 0 < told["share"] < 1 and told["exchange_s"] > 0
    alone = benchmark.work(tiny_job(tmp_path, "int8"), str(tmp_path))
    assert 0.5 < done["weight_bytes"] / alone["weight_bytes"] < 0.51


def test_the_cause_of_a_failure_is_found():
    report = "====\nscripts/benchmark_ranks.py FAILED\n===="
    assert benchmark.cause(f"[W1] noise\nerror: --device cuda:0: no\n{report}") == "error: --device cuda:0: no"
    assert benchmark.cause(f"[rank0]: Traceback\n[rank0]: ValueError: no\n{report}") == "[rank0]: ValueError: no"
    assert benchmark.cause("Traceback\nValueError: no") == "ValueError: no"


def test_the_cores_are_divided_among_the_ranks(monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setattr(benchmark, "work", lambda job, caches: jobs.append(job) or dict(failed="no"))
    monkeypatch.setattr(benchmark.torch, "get_num_threads", lambda: 8)
    with pytest.raises(RuntimeError):
        benchmark.main(["--ranks", "1", "4"])
    assert jobs[0]["threads"] == 2
    args = benchmark.parse_args(["--ranks", "1", "4", "--modes", "eager", "--no_plain"])
    assert [(job["ranks"], job["compile"]) for job in benchmark.plan(args, dict(ranks=1))[0]] == [(1, False), (4, False)]
