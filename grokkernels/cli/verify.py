"""`grokkernels verify`: the case tables against float64, on the user's own machine."""

from __future__ import annotations

import click


@click.command("verify", short_help="Check every kernel against float64 on this machine.")
@click.option("--backend", metavar="NAME", help="Backend to judge.  [default: cpu]")
@click.option("--op", metavar="NAME", help="Judge this op alone.  [default: all]")
@click.option("--quick", is_flag=True, help="A third of the cases, at the CPU level in use; under 30 seconds.")
def command(backend: str | None, op: str | None, quick: bool) -> None:
    """Run every kernel on its table of cases and compare with float64.

    A kernel may err twice as much as plain PyTorch does in the same dtype, for outputs and for gradients. "worst" is
    the largest error over what that rule allows: 1 is the limit. Without --quick every CPU instruction-set level that
    this machine has is judged. The exit code is 1 if any case fails.
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from grokkernels.testing import verify

    try:
        todo = verify.plan(backend, op, quick)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    console = Console()
    progress = track(todo, description="judging", console=console, transient=True, disable=not console.is_terminal)
    results = [verify.run(*item, quick=quick) for item in progress]

    table = Table("op", "backend", "dtype", "cases", "worst", "verdict", "worst case", box=None, pad_edge=False)
    for r in results:
        where = r.backend if r.level is None else f"{r.backend} {r.level}"
        verdict = "[green]ok[/]" if r.passed else f"[red]{len(r.failures)} failed[/]"
        table.add_row(r.op, where, r.dtype, str(r.cases), f"{r.worst:.2f}", verdict, r.worst_case)
    console.print(table)
    failures = [f"{r.op} ({r.backend} {r.level or ''} {r.dtype}) {words}" for r in results for words in r.failures]
    for words in failures:
        console.print(f"[red]FAILED[/] {words}", soft_wrap=True)
    cases = sum(r.cases for r in results)
    console.print(
        f"{cases} cases, {len(failures)} failed; worst ratio {max((r.worst for r in results), default=0):.2f}"
    )
    raise SystemExit(1 if failures or not cases else 0)
