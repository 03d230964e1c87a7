"""`grokkernels compare`."""

from __future__ import annotations

from pathlib import Path

import click

from ._sections import SectionedCommand, device_option, option, threads_option


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
    metavar="NAME",
    help="Backends to compare, the last one being the measure; may be given several times.  "
    "[default: the device's usable ones, and reference]",
)
@option("Options", "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Arithmetic.")
@option("Options", "--repeats", type=click.IntRange(1), default=5, help="Timed steps; their median is shown.")
@device_option("Options")
@threads_option("Options")
@click.pass_context
def command(
    ctx: click.Context,
    checkpoint: Path,
    backends: tuple[str, ...],
    dtype: str,
    repeats: int,
    device: str,
    threads: int | None,
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
    from ..training import device as devices
    from ..training.compare import TOLERANCE, compare_step, difference
    from ..training.model import check_memory, on_backend, restore, restore_settings

    if threads is not None:
        torch.set_num_threads(threads)
    for backend in backends:
        with on_backend(backend):  # one that does not exist is told before any work
            pass
    place = devices.choose(device, next((name for name in backends if name != "reference"), None))
    backends = backends or devices.backends(place)
    saved = checkpoints.load(checkpoints.resolve(checkpoint), ("model/", "tokenizer"))
    settings = restore_settings(saved)
    model, tokenizer = restore(saved, getattr(torch, dtype), place)
    check_memory(model.config, place, settings)
    tokens = data.prepare(settings.data, tokenizer)
    tokens.check_context(settings.context)
    results = compare_step(model, settings, tokens, backends, repeats)
    measure = results[-1]

    table = Table(
        title=f"One training step, {settings.batch} x {settings.context} tokens, {dtype}, {devices.describe(place)}"
    )
    for heading in ("backend", "loss", "gradient norm", "difference", "time", "speed"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    worst = 0.0
    for result in results:
        apart = difference(result, measure)
        worst = max(worst, apart)
        table.add_row(
            result.backend,
            f"{result.loss:.7f}",
            f"{result.grad_norm:.7f}",
            f"{apart:.1e}",
            f"{1e3 * result.seconds:.1f} ms",
            f"{measure.seconds / result.seconds:.2f} x",
        )
    Console(highlight=False, soft_wrap=True).print(table)
    if not worst <= TOLERANCE[dtype]:
        click.echo(f"the backends DISAGREE: relative difference {worst:.1e}, allowed {TOLERANCE[dtype]:.0e}")
        ctx.exit(1)
    click.echo(f"same loss and gradient norm within rounding: largest relative difference {worst:.1e}")
