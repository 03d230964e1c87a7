"""`grokkernels generate`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from ..training.files import naming
from ._sections import Number, SectionedCommand, device_option, option, threads_option

_WHAT, _SAMPLING, _MACHINE = "What to say", "Sampling", "Machine"


@click.command(cls=SectionedCommand, short_help="Let a trained model continue a text.")
@option(
    _WHAT,
    "--checkpoint",
    type=click.Path(path_type=Path),
    default=Path("runs/grok"),
    help="A checkpoint file, or the folder of a run, whose latest one is taken.",
)
@option(_WHAT, "--prompt", default="", show_default=False, help="Text to go on from; without it a new document begins.")
@option(_WHAT, "--max-new-tokens", type=click.IntRange(1), default=400, help="Stop after this many tokens.")
@option(
    _SAMPLING,
    "--temperature",
    type=Number(0),
    default=0.8,
    help="Below 1 more predictable, above 1 more varied; 0 always takes the likeliest token.",
)
@option(_SAMPLING, "--top-k", type=click.IntRange(0), default=0, help="Only the K likeliest tokens; 0 for all.")
@option(
    _SAMPLING,
    "--top-p",
    type=Number(0, 1, min_open=True),
    default=0.95,
    help="Only the likeliest tokens that together have this probability.",
)
@option(
    _SAMPLING, "--seed", type=click.IntRange(0, 2**63 - 1), help="Repeats a sample.  [default: a new one each time]"
)
@device_option(_MACHINE)
@threads_option(_MACHINE)
@option(_MACHINE, "--backend", metavar="NAME", help="Kernels to use; see `grokkernels doctor`.")
def command(
    checkpoint: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    device: str,
    threads: int | None,
    backend: str | None,
) -> None:
    """Let a trained model continue a text. The text goes to standard output as it comes, figures to standard error.

    \b
    Examples:
      grokkernels generate --prompt "def main("
      grokkernels generate --checkpoint runs/books --temperature 0.6 --seed 1
    """
    import torch

    from ..training import checkpoint as checkpoints
    from ..training import device as devices
    from ..training.generate import stream
    from ..training.model import on_backend, restore, restore_settings

    if threads is not None:
        torch.set_num_threads(threads)
    with on_backend(backend):
        place = devices.choose(device, backend)
        saved = checkpoints.load(checkpoints.resolve(checkpoint), ("model/", "tokenizer"))
        settings = restore_settings(saved)
        model, tokenizer = restore(saved, device=place)
        model.eval()
        pieces = stream(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            window=settings.context,
            device=place,
        )
        count = 0
        began = time.perf_counter()
        try:
            for piece in pieces:
                _write(piece if count else prompt + piece)
                count += 1
        finally:
            if count:
                _write("\n")
    seconds = time.perf_counter() - began
    click.echo(f"[{count - 1} tokens, {(count - 1) / seconds:,.0f} per second]", err=True)


def _write(text: str) -> None:
    """Text to standard output as UTF-8, whatever the terminal claims, at once."""
    with naming(Path("standard output")):
        sys.stdout.buffer.write(text.encode("utf-8", errors="replace"))
        sys.stdout.buffer.flush()
