"""The table and the plot of what benchmark.py measured: a `result` as its JSON holds it, None where not known."""
import html
from pathlib import Path

OURS = "qwen-fast"
PEERS = ("llama.cpp", "ik_llama.cpp", "transformers", "plain")
LABELS = {"plain": "plain PyTorch"}


def shown(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, with aligned columns."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [[cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
             for line in [header, rule, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_of(result: dict, row: dict) -> str:
    return result["dtype"] if row["quantization"] == "none" else row["quantization"]


def main_table(result: dict) -> str:
    rows = result["rows"]
    peers = [peer for peer in PEERS if any(peer in row["ratios"] for row in rows)]
    header = ["program", "format", "decode tokens/s", "ms", "p90 ms", "of the limit", *(f"x {peer}" for peer in peers),
              "prefill tokens/s", "TTFT ms", *(f"prefill x {peer}" for peer in peers), "peak GB", "load s",
              "compile cold s", "warm s"]
    lines = []
    for row in rows:
        def cell(key: str, digits: int = 1, row: dict = row) -> str:
            return shown(row.get(key), digits)
        decode, prefill = ([shown(row["ratios"].get(peer, {}).get(what), 2) for peer in peers]
                           for what in ("decode", "prefill"))
        mbu = shown(row["mbu"] and 100 * row["mbu"], 0, " %")
        lines.append([row["label"], format_of(result, row), cell("decode_tok_s"), cell("decode_ms", 2),
                      cell("decode_ms_p90", 2), mbu, *decode, cell("prefill_tok_s", 0), cell("ttft_ms", 0), *prefill,
                      cell("peak_gb", 2), cell("load_s"), cell("compile_cold_s"), cell("compile_warm_s")])
    known = [i for i in range(len(header)) if any(line[i] != "-" for line in lines)]
    return table([header[i] for i in known], [[line[i] for i in known] for line in lines])


def report(result: dict) -> str:
    machine, rows = result["machine"], result["rows"]
    lengths = " or ".join(dict.fromkeys(str(row["prompt_length"]) for row in rows))
    rates = [row["bandwidth_gb_s"] for row in rows if row["bandwidth_gb_s"]]
    facts = [f"{result['model']}, {machine['cpu']}, {machine['cores']} cores ({machine['flags']})", machine["gpu"],
             f"{machine['threads']} threads" if machine["threads"] else "",
             f"{machine['memory_gb']:.0f} GB" if machine["memory_gb"] else "",
             f"memory read at {min(rates):.1f} to {max(rates):.1f} GB/s" if rates else "",
             *dict.fromkeys(row["version"] for row in rows), machine["date"]]
    text = (f"{'; '.join(filter(None, facts))}.\nDecode: {result['tokens']} tokens after a prompt of {lengths}; "
            f"medians of {result['rounds']} interleaved rounds. int4 in groups of {result['groupsize']}; output head "
            f"of the quantized models: {result['lm_head']}. Of the limit: of what the same process read meanwhile.")
    skipped = [f"skipped: {line}" for line in result["skipped"]]
    return "\n".join([text, "", main_table(result), "", result.get("note", ""), *skipped]).rstrip()


def plot(result: dict, path: Path) -> None:
    """An SVG of decode tokens/s, a group of bars for each format; where the share of the memory's limit is known, the
    limit (tokens/s divided by it) is a mark."""
    formats = list(dict.fromkeys(format_of(result, row) for row in result["rows"]))
    rows = sorted(result["rows"], key=lambda row: formats.index(format_of(result, row)))
    limits = [row["decode_tok_s"] / row["mbu"] if row["mbu"] else 0 for row in rows]
    scale, y, before, shapes = 480 / max(limits + [row["decode_tok_s"] for row in rows]), 50, None, []

    grey, inside = 'fill="#555"', 'text-anchor="end" font-weight="bold" fill="white"'  # the bar, out of the mark's way

    def text(x: float, y: int, content: str, style: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y}" {style}>{html.escape(content)}</text>'
    for row, limit in zip(rows, limits, strict=True):
        kind = format_of(result, row)
        if kind != before:
            y += 12
            shapes.append(text(16, y + 16, kind, 'font-weight="bold"'))
        before, width, value = kind, scale * row["decode_tok_s"], f"{row['decode_tok_s']:.1f}"
        fill = "#2a6fbb" if row["program"] == OURS else "#8f8f8f"
        shapes += [f'<rect x="220" y="{y}" width="{width:.1f}" height="22" fill="{fill}"/>',
                   text(212, y + 16, row["label"], 'text-anchor="end"'),
                   text(214 + width, y + 16, value, inside) if width > 50 else text(226 + width, y + 16, value)]
        if limit:
            shapes.append(f'<path d="M{220 + scale * limit:.1f} {y - 3}v28" stroke="#c0392b" stroke-width="3"/>')
        y += 27
    machine = result["machine"]
    shapes += [text(16, 26, f"{result['model']}: decoded tokens/s", 'font-size="18" font-weight="bold"'),
               text(16, 48, f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['date']}", grey),
               f'<path d="M226 {y + 10}v18" stroke="#c0392b" stroke-width="3"/>',
               text(236, y + 24, "limit: the memory's measured bandwidth / bytes per step", grey)]
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {y + 40}" font-family="sans-serif" '
            'font-size="15">')
    path.write_text("\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *shapes, "</svg>\n"]))
