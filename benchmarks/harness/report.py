"""The report: one HTML page with its pictures inside, the numbers beside it as JSON.

python -m benchmarks.harness.report OUT build/bench/rows.json [other/rows.json]     two files: side by side
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness.work import OURS, Row

COLORS = {
    OURS: "#1b4f9c",
    "torch": "#e08a2e",
    "torch fused": "#c44e1f",
    "torch.compile": "#e6b800",
    "vLLM": "#3a9d5d",
    "onnxruntime": "#8a63a8",
    "DeepSpeed": "#7a7a7a",
}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6em 0 }
td, th { padding: .15em .7em; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap }
th { background: #f4f4f4; position: sticky; top: 0 } td:first-child, th:first-child { text-align: left }
.ahead { color: #176b34; font-weight: 600 } .behind { color: #b3261e; font-weight: 600 }
.absent { color: #777; font-size: 90% } img { max-width: 100% } nav a { margin-right: 1em }
"""


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def means(rows: list[Row]) -> dict[str, float]:
    """Geometric mean of the ratios to the best peer, by op; points of curves left out."""
    ratios = defaultdict(list)
    for row in rows:
        if row.ratio is not None and row.work.curve is None:
            ratios[row.work.op].append(math.log(row.ratio))
    return {op: math.exp(sum(logs) / len(logs)) for op, logs in sorted(ratios.items())}


def picture(figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def bars(rows: list[Row]) -> str:
    """Grouped bars: for each piece of work, every contender's speed over that of the best peer."""
    names = list(dict.fromkeys([OURS, *(name for row in rows for name in row.seconds)]))
    figure, axes = plt.subplots(figsize=(12, 0.8 + 0.13 * sum(1 + len(row.seconds) for row in rows)))
    place, ticks = 0.0, []
    for row in reversed(rows):
        base = row.median(row.best_peer) if row.best_peer else row.median(OURS)
        first = place
        for name in reversed([name for name in names if name in row.seconds]):
            width = base / row.median(name)
            axes.barh(place, width, height=0.9, color=COLORS.get(name, "#999999"))
            axes.text(width, place, f" {duration(row.median(name))}", va="center", fontsize=6.5)
            place += 1
        ticks.append(((first + place - 1) / 2, row.work.name))
        place += 0.8
    axes.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks], fontsize=7.5)
    axes.axvline(1.0, color="#444444", linewidth=0.8)
    axes.set_xlabel("speed, the best peer = 1 (longer is faster)")
    axes.set_ylim(-1, place)
    marks = [plt.Rectangle((0, 0), 1, 1, color=COLORS.get(name, "#999999")) for name in names]
    figure.legend(
        marks, names, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)
    return picture(figure)


def overview(rows: list[Row]) -> str:
    """Every op's mean ratio, and each row's ratio and share of the limit as a dot."""
    averages = means(rows)
    ops = list(averages)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.8 + 0.3 * len(ops)), sharey=True)
    for i, op in enumerate(ops):
        of_op = [row for row in rows if row.work.op == op and row.work.curve is None]
        left.barh(i, averages[op], color=COLORS[OURS], height=0.6)
        left.scatter(
            [row.ratio for row in of_op if row.ratio], [i] * sum(bool(row.ratio) for row in of_op), s=9, c="#222"
        )
        shares = [row.share for row in of_op if row.share]
        right.scatter(shares, [i] * len(shares), s=12, c="#1b4f9c", alpha=0.7)
    left.set_yticks(range(len(ops)), ops)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.axvline(1.0, color="#444444", linewidth=0.8)
    left.set_xlabel("ratio to the best peer (bar: geometric mean)")
    right.set_xlabel("share of the machine's limit")
    right.axvline(1.0, color="#444444", linewidth=0.8)
    left.invert_yaxis()
    return picture(figure)


def curves(rows: list[Row]) -> str:
    """Cost against size, a panel for each thing that grows."""
    panels: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        assert row.work.curve is not None
        panels[row.work.curve[0], row.work.dtype, row.work.direction].append(row)
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for panel, ((what, dtype, direction), points) in zip(axes[0], panels.items(), strict=True):
        points.sort(key=lambda row: row.work.curve[1] if row.work.curve else 0)
        for name in dict.fromkeys(name for row in points for name in row.seconds):
            of_name = [row for row in points if name in row.seconds]
            sizes = [row.work.curve[1] for row in of_name if row.work.curve]
            panel.plot(
                sizes, [row.median(name) for row in of_name], "o-", label=name, color=COLORS.get(name, "#999999")
            )
        sizes = [row.work.curve[1] for row in points if row.work.curve]
        if all(row.limit for row in points):
            panel.plot(sizes, [row.limit for row in points], "--", color="#888888", label="the machine's limit")
        panel.set(xscale="log", yscale="log", xlabel=what, ylabel="seconds", title=f"{dtype}, {direction}")
        panel.legend(fontsize=7)
    return picture(figure)


def table(rows: list[Row], before: dict[tuple, Row]) -> str:
    heads = ["work", "ours", "spread", "rate", "of limit", "best peer", "its time", "ratio"]
    heads += ["before", "before / now"] if before else []
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for row in rows:
        peaks = "; ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in row.peaks.items())
        cells = [
            html.escape(row.work.name) + (f"<br><span class=absent>peak memory: {peaks}</span>" if peaks else ""),
            duration(row.median(OURS)),
            f"{row.spread(OURS):.0%}",
            row.rate,
            "" if row.share is None else f"{row.share:.0%}",
            row.best_peer or "",
            duration(row.median(row.best_peer)) if row.best_peer else "",
        ]
        ratio = (
            ""
            if row.ratio is None
            else f'<span class="{"ahead" if row.ratio >= 1 else "behind"}">{row.ratio:.2f}</span>'
        )
        cells.append(ratio)
        if before:
            old = before.get(key(row))
            cells += ["", ""] if old is None else [
                duration(old.median(OURS)),
                f"{old.median(OURS) / row.median(OURS):.2f}",
            ]  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def key(row: Row) -> tuple:
    return row.work.op, row.work.name, row.work.curve


def page(runs: list[dict[str, Any]]) -> str:
    """`runs`: what rows.json holds; the first is the one reported, a second stands beside it as before."""
    rows = [Row.from_dict(fields) for fields in runs[0]["rows"]]
    before = {key(row): row for run in runs[1:] for row in map(Row.from_dict, run["rows"])}
    facts = "".join(f"<tr><td>{k}</td><td>{html.escape(str(v))}</td></tr>" for k, v in runs[0]["machine"].items())
    ops = sorted({row.work.op for row in rows})
    parts = [f"<h1>grokkernels: benchmarks</h1><table>{facts}</table>"]
    if before:
        parts.append(f"<p>Beside it: commit {html.escape(str(runs[1]['machine']['commit']))}.</p>")
    parts.append(f"<nav>{' '.join(f'<a href=#{op}>{op}</a>' for op in ops)}</nav>")
    parts.append("<h2>At a glance</h2>" + overview(rows))
    behind = [row for row in rows if row.ratio is not None and row.ratio < 1 and row.work.curve is None]
    named = "".join(
        f"<li>{row.work.op}: {html.escape(row.work.name)}: {row.ratio:.2f} of {row.best_peer}</li>" for row in behind
    )
    parts.append(f"<p>Behind a peer: {len(behind)} rows.</p><ul>{named}</ul>")
    for op in ops:
        of_op = [row for row in rows if row.work.op == op]
        plain, curved = [r for r in of_op if r.work.curve is None], [r for r in of_op if r.work.curve is not None]
        parts.append(f"<h2 id={op}>{op}</h2>")
        if plain:
            parts.append(bars(plain) + table(plain, before))
        if curved:
            parts.append(curves(curved) + table(curved, before))
        absent = {f"{name}: {reason}" for row in of_op for name, reason in row.absent.items()}
        if absent:
            parts.append(f"<p class=absent>Absent. {html.escape('; '.join(sorted(absent)))}</p>")
    body = "\n".join(parts)
    head = f"<meta charset=utf-8><title>grokkernels: benchmarks</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>"


def write_report(folder: Path, runs: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "index.tmp"
    temporary.write_text(page(runs), encoding="utf-8")
    os.replace(temporary, folder / "index.html")


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit("python -m benchmarks.harness.report OUT rows.json [rows.json of another commit]")
    write_report(Path(sys.argv[1]), [json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[2:]])


if __name__ == "__main__":
    main()
