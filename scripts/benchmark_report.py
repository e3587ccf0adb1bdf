"""Tables and the plot of what benchmark.py measured: a `result` as it is written to the JSON, with rows as benchmark.summarize makes them."""
import statistics
from pathlib import Path

OURS = "qwen-fast"
PEERS = ("llama.cpp", "transformers", "plain")


def rows_of(rows: list[dict], program: str, quantization: str) -> dict | None:
    return next((r for r in rows if r["program"] == program and r["quantization"] == quantization), None)


def ratio(row: dict, other: dict | None, rates=lambda row: row["decode_tok_s_rounds"]) -> float | None:
    """How many times the other's rate, by the median over the rounds; None where there is nothing to compare."""
    if other is None or other is row:
        return None
    try:
        return statistics.median(one / another for one, another in zip(rates(row), rates(other), strict=True))
    except KeyError:
        return None


# Tables

def shown(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, with aligned columns."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * (w - 1) + ":" if i > 1 else "-" * w for i, w in enumerate(widths)], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |" for line in lines)


def bits(row: dict) -> str:
    return "-" if row["quantization"] == "none" else row["quantization"]


def main_table(rows: list[dict]) -> str:
    peers = [p for p in PEERS if rows_of(rows, p, "none") or rows_of(rows, p, "int8") or rows_of(rows, p, "int4")]
    header = ["program", "quant", "decode tok/s", "ms", "p90 ms", "of limit", *[f"x {p}" for p in peers], "prefill tok/s", "TTFT ms",
              *[f"prefill x {p}" for p in peers], "peak GB", "load s", "compile cold / warm s"]
    lines = []
    for row in rows:
        others = [rows_of(rows, p, row["quantization"]) for p in peers]
        compile_s = "-" if row["compile_cold_s"] is None else f"{row['compile_cold_s']:.1f} / {shown(row['compile_warm_s'])}"
        lines.append([row["label"], bits(row), shown(row["decode_tok_s"]), shown(row["decode_ms"], 2), shown(row["decode_ms_p90"], 2),
                      shown(100 * row["mbu"], 0, " %"), *[shown(ratio(row, o), 2) for o in others], shown(row["prefill_tok_s"], 0),
                      shown(row["ttft_ms"], 0), *[shown(ratio(row, o, lambda r: r["prefill_tok_s_rounds"]), 2) for o in others], shown(row["peak_gb"], 2),
                      shown(row["load_s"]), compile_s])
    return table(header, lines)


def sweep_table(rows: list[dict], what: str) -> str:
    """One column for each position, capacity or batch size, with the ratio to llama.cpp where it was measured too."""
    rows = [r for r in rows if r[what]]
    if not rows:
        return ""
    values = sorted(rows[0][what])
    titles = {"position": "Decode ms at position", "capacity": "Decode ms early in a cache of capacity",
              "batch": "Decode tok/s of all rows, batch size"}
    lines = []
    for row in rows:
        peer, cells = rows_of(rows, "llama.cpp", row["quantization"]), []
        for at in values:
            x = ratio(row, peer, lambda r: r[what][at]["tok_s_rounds"])
            cells.append(shown(row[what][at]["tok_s" if what == "batch" else "ms"], 2) + ("" if x is None else f" ({x:.2f} x llama.cpp)"))
        growth = row[what][values[-1]]["ms"] / row[what][values[0]]["ms"]
        lines.append([row["label"], bits(row), *cells, shown(growth, 2)])
    return f"\n{titles[what]}:\n\n" + table(["program", "quant", *map(str, values), "time, last : first"], lines) + "\n"


def ranks_table(rows: list[dict], threads: int) -> str:
    """One row for each number of ranks."""
    if all(row["ranks"] == 1 for row in rows):
        return ""
    header = ["program", "quant", "ranks", "decode tok/s", "ms", "all-reduces a token", "a layer", "kB a token", "in communication ms", "of the time",
              "exchange alone ms", "speed-up", "expected"]
    lines = []
    for row in [r for r in rows if r["program"] == OURS]:
        told = row.get("communication", {})
        share = 100 * told["ms"] / row["decode_ms"] if told else None
        lines.append([row["label"], bits(row), str(row["ranks"]), shown(row["decode_tok_s"]), shown(row["decode_ms"], 2),
                      shown(told.get("all_reduces"), 0), shown(told.get("all_reduces_a_layer"), 0), shown(told["bytes"] / 1e3 if told else None, 0),
                      shown(told.get("ms"), 2), shown(share, 0, " %"), shown(told.get("exchange_ms"), 2),
                      shown(told.get("speedup"), 2), shown(told.get("expected_speedup"), 2)])
    return (f"\nTensor parallelism, threads of each rank: {threads}. In communication: its part of a profile of decoding, waiting for other ranks "
            "included; exchange alone: as many collectives of the same sizes in the same processes, one after another. Expected: t(1) x the rank's "
            "share of the weights + exchange, if the ranks share no memory bus.\n\n" + table(header, lines) + "\n")


def report(result: dict) -> str:
    machine = result["machine"]
    versions = ", ".join(dict.fromkeys(r["version"] for r in result["rows"]))
    text = (f"{result['model']}, {result['dtype']}, {machine['threads']} threads on {machine['cpu']} ({machine['cores']} cores; {machine['flags']})"
            f"{'; ' + machine['gpu'] if machine['gpu'] else ''}; {machine['memory_gb']:.0f} GB; read bandwidth {machine['bandwidth_gb_s']:.1f} GB/s "
            f"({machine['bandwidth_by']}); {versions}; {machine['date']}.\n"
            f"Decode: {result['tokens']} tokens after a prompt of {result['prompt_length']}, batch 1; "
            f"medians of {result['rounds']} interleaved rounds. int4 in groups of {result['groupsize']}; "
            f"output head of the quantized models: {result['lm_head']}.\n\n")
    text += main_table(result["rows"]) + "\n" + "".join(sweep_table(result["rows"], what) for what in ("position", "capacity", "batch"))
    text += ranks_table(result["rows"], machine["threads"])
    return text + "".join(f"\nskipped: {line}" for line in result["skipped"])


def plot(result: dict, path: Path) -> None:
    """Bars of decode tok/s, each with its own limit as a mark; lines of decode time over position."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows, deep = result["rows"], [r for r in result["rows"] if r["position"]]
    figure, axes = pyplot.subplots(1, 2 if deep else 1, figsize=(14 if deep else 8, 0.4 * len(rows) + 2.5), squeeze=False)
    names = [f"{r['label']} {'' if r['quantization'] == 'none' else r['quantization']}" for r in rows]
    bars = axes[0][0]
    bars.barh(names, [r["decode_tok_s"] for r in rows], color=["tab:blue" if r["program"] == OURS else "tab:gray" for r in rows])
    bars.plot([r["limit_tok_s"] for r in rows], names, "k|", markersize=16, label="memory's limit")
    bars.invert_yaxis()
    machine = result["machine"]
    bars.set(xlabel="decode tokens/s", title=f"{result['model']} {result['dtype']}, {machine['cpu']}, {machine['threads']} threads")
    bars.legend()
    for row, name in zip(rows, names):
        if row["position"]:
            axes[0][1].plot(list(row["position"]), [v["ms"] for v in row["position"].values()], "o-" if row["program"] == OURS else "x--", label=name)
    if deep:
        axes[0][1].set(xlabel="position", ylabel="ms a token", ylim=(0, None))
        axes[0][1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
