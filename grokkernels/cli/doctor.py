"""`grokkernels doctor`: what this installation can do, and why not more."""

from __future__ import annotations

import click


@click.command("doctor", short_help="Show versions, CPU level and usable backends.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(as_json: bool) -> None:
    """Show versions, the CPU's instruction-set level, and which backends are usable.

    For a backend that is not, the reason is given. Exit code 1 when not even the native CPU kernels load.
    """
    import json

    from grokkernels.doctor import report

    facts = report()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)
    raise SystemExit(0 if facts["backends"]["cpu"]["usable"] else 1)


def _print(facts: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    for section in ("versions", "native", "cpu", "settings", "system"):
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in (facts[section] or {"library": "not loaded"}).items():
            table.add_row(
                f"  {name}", "-" if value is None else ", ".join(value) if isinstance(value, list) else str(value)
            )
        console.print(table)
    table = Table(title="backends", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, state in facts["backends"].items():
        table.add_row(
            f"  {name}", "[green]usable[/]" if state["usable"] else "[yellow]not usable[/]", state["reason"] or ""
        )
    console.print(table)
