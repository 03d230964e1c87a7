"""`grokkernels compare`."""

from __future__ import annotations

from pathlib import Path

import click

from ._sections import SectionedCommand, option


@click.command(cls=SectionedCommand, short_help="Time one training step on several backends.")
@option(
    "Options",
    "--checkpoint",
    type=click.Path(path_type=Path),
    default=Path("runs/grok"),
    help="A checkpoint file, or the folder of a run, whose latest one is taken.",
)
@option(
    "Options",
    "--backend",
    "backends",
    multiple=True,
    default=("cpu", "reference"),
    metavar="NAME",
    help="Backends to compare, the last one being the measure; may be given several times.",
)
@option("Options", "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Arithmetic.")
@option("Options", "--repeats", type=click.IntRange(1), default=5, help="Timed steps; their median is shown.")
@option("Options", "--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's choice]")
@click.pass_context
def command(
    ctx: click.Context, checkpoint: Path, backends: tuple[str, ...], dtype: str, repeats: int, threads: int | None
) -> None:
    """Make one training step on several backends from the same weights and text: same loss, time of each.

    Ends with exit status 1 if the losses or gradient norms differ by more than rounding explains.

    \b
    Example:
      grokkernels compare --checkpoint runs/grok --backend cpu --backend reference
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..training import checkpoint as checkpoints
    from ..training import data
    from ..training.compare import TOLERANCE, compare_step
    from ..training.config import Settings
    from ..training.model import restore

    if threads is not None:
        torch.set_num_threads(threads)
    saved = checkpoints.load(checkpoints.resolve(checkpoint), ("model/", "tokenizer"))
    settings = Settings.from_dict(saved.about["settings"])
    model, tokenizer = restore(saved, getattr(torch, dtype))
    tokens = data.prepare(settings.data, tokenizer)
    results = compare_step(model, settings, tokens, backends, repeats)
    measure = results[-1]

    table = Table(
        title=f"One training step, {settings.batch} x {settings.context} tokens, {dtype}, "
        f"{torch.get_num_threads()} threads"
    )
    for heading in ("backend", "loss", "gradient norm", "difference", "time", "speed"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    worst = 0.0
    for result in results:
        difference = max(
            abs(result.loss - measure.loss) / abs(measure.loss),
            abs(result.grad_norm - measure.grad_norm) / max(abs(measure.grad_norm), 1e-30),
        )
        worst = max(worst, difference)
        table.add_row(
            result.backend,
            f"{result.loss:.7f}",
            f"{result.grad_norm:.7f}",
            f"{difference:.1e}",
            f"{1e3 * result.seconds:.1f} ms",
            f"{measure.seconds / result.seconds:.2f} x",
        )
    Console(highlight=False, soft_wrap=True).print(table)
    if not worst <= TOLERANCE[dtype]:
        click.echo(f"the backends DISAGREE: relative difference {worst:.1e}, allowed {TOLERANCE[dtype]:.0e}")
        ctx.exit(1)
    click.echo(f"same loss and gradient norm within rounding: largest relative difference {worst:.1e}")
