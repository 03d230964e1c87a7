"""A run's folder: started, continued or replaced, by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoint as checkpoints
from . import data, metrics, model, plot, tokenizer
from . import device as devices
from .config import Settings
from .errors import UserError
from .files import remove_temporaries
from .progress import Silent

if TYPE_CHECKING:
    from .trainer import Summary


def train(
    out: Path,
    given: dict[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    cache: Path | None = None,
    show: Silent | None = None,
) -> Summary:
    """Run or continue the training in `out` and return its `Summary`.

    `given` holds the settings that the caller chose (see `Settings`); on `resume` all others come from the checkpoint.
    """
    import torch

    from .trainer import Trainer

    show = show or Silent()
    with _locked(out):
        remove_temporaries(out)
        found = checkpoints.latest(out)
        if resume:
            if found is None:
                raise UserError(f"there is no checkpoint in {out} to resume from: leave --resume out to start a run")
            saved = checkpoints.load(found)
            before = model.restore_settings(saved)
            settings = before.resumed_with(given)
            words = model.restore_tokenizer(saved)
        else:
            if found is not None and not overwrite:
                raise UserError(
                    f"{out} already holds a run ({found.name}): continue it with --resume, replace it with "
                    f"--overwrite, or choose another --out folder"
                )
            saved = before = None
            settings = Settings.from_dict(given)
            words = tokenizer.load(settings.tokenizer)
        with model.on_backend(settings.backend):  # a backend that does not exist is told before any work
            pass
        device = devices.choose(settings.device, settings.backend)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        tokens = data.prepare(settings.data, words, cache)
        plural = "" if tokens.documents == 1 else "s"
        left_out = f"; {tokens.skipped:,} files that are not text left out" if tokens.skipped else ""
        show.say(
            f"{tokens.documents:,} document{plural}, {len(tokens.train):,} tokens to train on, "
            f"{len(tokens.held_out):,} held out{left_out}"
        )
        tokens.check_context(settings.context)
        grok = model.create(settings, words.vocab_size, device)
        with model.on_backend(settings.backend):
            model.rehearse(grok, device)
        trainer = Trainer(settings, grok, tokens, words, out, show)
        if saved is not None:
            trainer.restore(saved)
            for name in ("steps", "lr"):
                if getattr(settings, name) != getattr(before, name):
                    show.say(f"another --{name} changes the learning-rate schedule from here on")
        elif overwrite:
            _clear(out)
        count = sum(p.numel() for p in trainer.parameters.values())
        show.say(
            f"{settings.preset} model of {count / 1e6:.2f} million parameters, {settings.dtype}, "
            f"{devices.describe(device)}, backend {settings.backend or 'automatic'}; "
            f"unigram baseline {trainer.unigram:.3f} nats per token"
        )
        if saved is not None:
            show.say(f"continuing after step {trainer.step_count}, from {found}")
        return trainer.run()


def _clear(out: Path) -> None:
    while (path := checkpoints.latest(out)) is not None:
        path.unlink()
    for name in (metrics.FILE, plot.FILE):
        (out / name).unlink(missing_ok=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".lock"
    try:
        # The file is opened as it is: nothing is emptied, and a link that someone put there is not followed.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a symbolic link and a training locks a file of its own: remove it") from None
        raise
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another training is writing to {out}: wait for it or choose another --out") from None
        yield
    finally:
        os.close(descriptor)
