"""`grokkernels train`."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import click
from click import format_filename as _shown

from ._sections import SectionedCommand, device_option, option, setting, threads_option

_TEXT, _MODEL, _LENGTH = "Text", "Model", "Length and saving"
_LEARNING, _MACHINE = "Learning", "Machine"
_NOT_SETTINGS = {"out", "resume", "overwrite", "require_below_unigram"}


def _override(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    result = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{value!r} is not of the form NAME=VALUE, such as num_layers=4")
        try:
            result[name.strip()] = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two for what is nested too deeply
            result[name.strip()] = text
    return result


@click.command(cls=SectionedCommand, short_help="Train a small Grok on text.")
@option(
    _TEXT,
    "--data",
    multiple=True,
    metavar="PATH",
    help="A text file, or a folder whose text files are all read; may be given several times. Without it: the source "
    "text of this Python's standard library, so that nothing need be downloaded.",
)
@option(
    _TEXT,
    "--tokenizer",
    metavar="FILE",
    help="A SentencePiece .model or a `tokenizers` .json file. Without it each byte is a token.",
)
@option(_MODEL, "--preset", default="tiny", help="Size of the model: tiny (minutes on a CPU), small, grok-1.")
@option(
    _MODEL,
    "--set",
    "overrides",
    multiple=True,
    callback=_override,
    metavar="NAME=VALUE",
    help="Change one of the model's settings, such as num_layers=4; may be given several times.",
)
@option(_MODEL, "--context", type=setting("context"), default=256, help="Tokens that the model sees at once.")
@option(
    _MODEL,
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="Arithmetic of the forward and backward passes; weights are kept and updated in float32 either way.",
)
@option(
    _LENGTH,
    "--minutes",
    type=setting("minutes"),
    help="Train for this long.  [default: 3]",
)
@option(
    _LENGTH,
    "--steps",
    type=setting("steps"),
    help="Train for this many steps instead. Only then does --resume repeat an uninterrupted run bit for bit, since "
    "with --minutes the learning rate follows the clock.",
)
@option(
    _LENGTH,
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/grok"),
    help="Folder for checkpoints, metrics.jsonl and curves.png.",
)
@option(_LENGTH, "--resume", is_flag=True, help="Continue the run in --out; its settings need not be given again.")
@option(_LENGTH, "--overwrite", is_flag=True, help="Replace the run in --out.")
@option(
    _LENGTH,
    "--require-below-unigram",
    is_flag=True,
    help="End with exit status 1 unless the held-out loss is below the unigram baseline.",
)
@option(_LENGTH, "--save-every", type=setting("save_every"), help="Steps between checkpoints.  [default: 10 per run]")
@option(_LENGTH, "--keep", type=setting("keep"), default=2, help="How many checkpoints to keep.")
@option(_LENGTH, "--eval-every", type=setting("eval_every"), help="Steps between validations.  [default: 20 per run]")
@option(_LENGTH, "--eval-batches", type=setting("eval_batches"), default=8, help="Batches per validation.")
@option(_LEARNING, "--batch", type=setting("batch"), default=8, help="Sequences per step.")
@option(_LEARNING, "--lr", type=setting("lr"), default=3e-3, help="Highest learning rate.")
@option(
    _LEARNING,
    "--warmup",
    type=setting("warmup"),
    default=0.05,
    help="Share of the run in which the learning rate rises; then it falls along a cosine.",
)
@option(
    _LEARNING,
    "--floor",
    type=setting("floor"),
    default=0.1,
    help="Last learning rate, as a share of --lr.",
)
@option(_LEARNING, "--weight-decay", type=setting("weight_decay"), default=0.1, help="AdamW's, on matrices only.")
@option(_LEARNING, "--beta1", type=setting("beta1"), default=0.9, help="AdamW's.")
@option(_LEARNING, "--beta2", type=setting("beta2"), default=0.95, help="AdamW's.")
@option(
    _LEARNING,
    "--clip",
    type=setting("clip"),
    default=1.0,
    help="Largest global norm of the gradients; larger ones are scaled down to it.",
)
@option(
    _LEARNING,
    "--load-balance",
    type=setting("load_balance"),
    default=0.01,
    help="Weight of the loss that spreads tokens evenly over experts.",
)
@option(
    _LEARNING,
    "--z-loss",
    type=setting("z_loss"),
    default=0.001,
    help="Weight of the loss that keeps the router's logits small.",
)
@option(_LEARNING, "--seed", type=setting("seed"), default=0, help="Of the first weights and the batches.")
@device_option(_MACHINE)
@threads_option(_MACHINE)
@option(
    _MACHINE,
    "--backend",
    metavar="NAME",
    help="Kernels to use: cpu (native), reference (plain PyTorch), ...; `grokkernels doctor` lists them.  "
    "[default: the fastest that can run]",
)
@click.pass_context
def command(ctx: click.Context, **values: Any) -> None:
    """Train a small Grok-1-shaped mixture-of-experts transformer on text.

    Shows the loss on held-out text as it goes, and compares it at the end with the unigram baseline: the loss of a
    model that knows only how often each token occurs. Ctrl-C saves and stops; --resume goes on from there. Prepared
    text is kept in ~/.cache/grokkernels, or in the folder that GROKKERNELS_CACHE names.

    \b
    Examples:
      grokkernels train
      grokkernels train --data book.txt --data notes/ --minutes 30 --out runs/books
      grokkernels train --steps 2000 --preset small --dtype bfloat16
      grokkernels train --resume
    """
    from click.core import ParameterSource

    from ..training.progress import OnConsole, duration
    from ..training.run import train

    if values["minutes"] is not None and values["steps"] is not None:
        raise click.UsageError("--minutes and --steps exclude each other: give one")
    if values["resume"] and values["overwrite"]:
        raise click.UsageError("--resume and --overwrite exclude each other: give one")
    settings = {name: value for name, value in values.items() if name not in _NOT_SETTINGS}
    if values["resume"]:
        settings = {
            name: value
            for name, value in settings.items()
            if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
        }
    elif values["minutes"] is None and values["steps"] is None:
        settings["minutes"] = 3.0
    if "data" in settings:
        settings["data"] = tuple(str(Path(path).absolute()) for path in settings["data"])
    if settings.get("tokenizer") is not None:
        settings["tokenizer"] = str(Path(settings["tokenizer"]).absolute())

    out = values["out"]
    summary = train(out, settings, resume=values["resume"], overwrite=values["overwrite"], show=OnConsole())
    click.echo(f"{summary.steps} steps in {duration(summary.elapsed)}; saved {_shown(summary.checkpoint)}")
    if summary.stopped is not None:
        again = "" if out == Path("runs/grok") else f" --out {_shown(out)}"
        click.echo(f"stopped by {summary.stopped.name}; `grokkernels train{again} --resume` continues")
        ctx.exit(128 + summary.stopped)
    if summary.held_out_loss is not None:
        gain = summary.unigram_loss - summary.held_out_loss
        click.echo(
            f"held-out loss {summary.held_out_loss:.3f}, unigram baseline {summary.unigram_loss:.3f} nats per token: "
            f"{abs(gain):.3f} {'below' if gain >= 0 else 'ABOVE'} it"
        )
    click.echo(f"curves: {_shown(summary.picture)}")
    if values["require_below_unigram"] and not (summary.held_out_loss or float("inf")) < summary.unigram_loss:
        raise click.ClickException("the held-out loss is not below the unigram baseline: train longer")
