"""`grokkernels verify`: the case tables against float64, on the user's own machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from grokkernels.testing.verify import Result


@click.command("verify", short_help="Check every kernel against float64 on this machine.")
@click.option("--backend", metavar="NAME", help="Backend to judge.  [default: cpu]")
@click.option("--op", metavar="NAME", help="Judge this op alone.  [default: all]")
@click.option(
    "--quick/--full",
    help="A few small cases of every op in every dtype, at the CPU level in use, in under 30 seconds; or all of them.  "
    "[default: full]",
)
def command(backend: str | None, op: str | None, quick: bool) -> None:
    """Run every kernel on its table of cases and compare with float64.

    A kernel may err twice as much as plain PyTorch does in the same dtype, for outputs and for gradients. "worst" is
    the largest error over what that rule allows: 1 is the limit. Without --quick every CPU instruction-set level that
    this machine has is judged. The exit code is 1 if any case fails.
    """
    from itertools import groupby

    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from grokkernels.testing import verify

    try:
        todo = verify.plan(backend, op, quick)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a log has no edge
    progress = track(todo, description="judging", console=console, transient=True, disable=not console.is_terminal)
    results = [verify.run(*item, quick=quick) for item in progress]

    table = Table(box=None, pad_edge=False, expand=True)
    for name in ("op", "backend", "dtype", "cases", "worst", "verdict"):
        table.add_column(name, no_wrap=True, min_width=len(name))
    table.add_column("where it is worst", no_wrap=True, ratio=1)
    for _, group in groupby(sorted(results, key=_line), key=_line):
        same = list(group)
        worst = max(same, key=lambda r: r.worst)
        failed = sum(len(r.failures) for r in same)
        verdict = f"[red]{failed} failed[/]" if failed else "[green]ok[/]"
        where = worst.worst_case if worst.level is None else f"{worst.level}: {worst.worst_case}"
        cases = str(sum(r.cases for r in same))
        table.add_row(worst.op, worst.backend, worst.dtype, cases, f"{worst.worst:.2f}", verdict, where)
    console.print(table)
    failures = [f"{r.op} ({r.backend} {r.level or ''} {r.dtype}) {words}" for r in results for words in r.failures]
    for words in failures:
        console.print(f"[red]FAILED[/] {words}", soft_wrap=True)
    cases = sum(r.cases for r in results)
    few = f" of {sum(r.of for r in results)}" if quick else ""
    worst_of_all = max((r.worst for r in results), default=0)
    console.print(f"{cases}{few} cases, {len(failures)} failed; worst ratio {worst_of_all:.2f}")
    raise SystemExit(1 if failures or not cases else 0)


def _line(result: Result) -> tuple[str, str, str]:
    """What the results of several CPU levels share: one line of the table."""
    return result.op, result.backend, result.dtype
