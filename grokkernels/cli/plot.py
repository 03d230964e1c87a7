"""`grokkernels plot`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Draw the curves of a run.")
@click.argument("run", type=click.Path(path_type=Path), default=Path("runs/grok"))
def command(run: Path) -> None:
    """Draw the curves of the run in the folder RUN (default runs/grok), also while it is still training."""
    from ..training.trainer import draw_run

    click.echo(f"curves: {click.format_filename(draw_run(run))}")
