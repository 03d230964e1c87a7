"""The fixture `compare`, under which every benchmark runs its contenders, and the report at the end.

pytest benchmarks --benchmark-only                  every row; the report in build/bench/index.html
pytest benchmarks/bench_rotary.py --benchmark-only --quick     the first shape of each, a moment each, no compilation
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine, report, timing
from benchmarks.harness.judging import DEVICE, different, result
from benchmarks.harness.peers import Absent
from benchmarks.harness.work import OURS, Row, Work

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)  # before the benchmarks are imported: they name no device

ROOT = Path(__file__).parent.parent
ROWS: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("grokkernels")
    group.addoption("--report", default=str(ROOT / "build" / "bench"), help="where the report goes")
    group.addoption("--seconds", type=float, default=2.0, help="for each row, warming up and compiling not counted")
    group.addoption("--quick", action="store_true", help="the first row of each benchmark, few rounds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --quick, of each test function the first of its parameters; points of curves need all of theirs."""
    if not config.getoption("--quick"):
        return
    seen: set[str] = set()
    kept = []
    for item in items:
        function = f"{item.path}::{getattr(item, 'originalname', item.name)}"
        if function not in seen:
            kept.append(item)
        seen.add(function)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Row]:
    """compare(work, contenders, right): times all contenders in turn and notes the row.

    `contenders` maps names to calls without arguments, or to `Absent`; "grokkernels" is among them. `right()` is called
    first and raises where ours is wrong: then there is no time to print. Each contender's result is held against ours,
    loosely: it must be the same piece of work. `peaks`, where given, is bytes of memory by contender, for the report.
    """
    quick = request.config.getoption("--quick")
    budget = 0.05 if quick else request.config.getoption("--seconds")

    def run(
        work: Work,
        contenders: dict[str, timing.Call | Absent],
        right: Callable[[], None],
        peaks: dict[str, int] | None = None,
    ) -> Row:
        right()
        row = Row(work, machine.limits().seconds(work), peaks=peaks or {})
        timing.use_memory(fresh=work.fresh_memory)
        calls: dict[str, timing.Call] = {}
        for name, call in contenders.items():
            if isinstance(call, Absent):
                row.absent[name] = call.reason
            elif quick and "compile" in name:
                row.absent[name] = "left out by --quick"
            else:
                calls[name] = call
        expected = result(calls[OURS])
        for name in [name for name in calls if name != OURS]:
            reason = different(result(calls[name]), expected)
            if reason is not None:
                row.absent[name] = reason
                del calls[name]
        repeats, once = zip(*(timing.repeats_of(call) for call in calls.values()), strict=True)
        each = dict(zip(calls, repeats, strict=True))
        rounds = timing.rounds_of(sum(r * s for r, s in zip(repeats, once, strict=True)), budget)
        row.seconds = {name: [] for name in calls}
        others = [name for name in calls if name != OURS]

        def others_first() -> None:
            """One measurement of each other contender, in an order that moves on from round to round."""
            turn = len(row.seconds[OURS]) % max(len(others), 1)
            for name in others[turn:] + others[:turn]:
                row.seconds[name].append(timing.time_of(calls[name], each[name]))

        def ours() -> None:
            row.seconds[OURS].append(timing.time_of(calls[OURS], each[OURS]))

        with timing.undisturbed():
            benchmark.pedantic(ours, setup=others_first, rounds=rounds)
        benchmark.extra_info.update(row.to_dict())
        ROWS.append(row)
        return row

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not ROWS:
        return
    folder = Path(config.getoption("--report"))
    write(folder / "rows.json", {"machine": machine.facts(), "rows": [row.to_dict() for row in ROWS]})
    report.write_report(folder, [json.loads((folder / "rows.json").read_text(encoding="utf-8"))])
    console = Console(width=max(160, terminalreporter._tw.fullwidth), highlight=False)
    table = Table("op", "work", "ours", "rate", "of limit", "best peer", "ratio", "spread")
    for row in ROWS:
        peer = row.best_peer
        table.add_row(
            row.work.op,
            row.work.name,
            report.duration(row.median(OURS)),
            row.rate,
            "" if row.share is None else f"{row.share:.0%}",
            "" if peer is None else f"{peer} {report.duration(row.median(peer))}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            f"{row.spread(OURS):.0%}",
        )
    console.print(table)
    for op, mean in report.means(ROWS).items():
        console.print(f"{op}: {mean:.2f} times as fast as the best peer, geometric mean")
    console.print(f"the report: {folder / 'index.html'}")


def write(path: Path, content: Any) -> None:
    """JSON, by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
