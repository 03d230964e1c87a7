"""Making the transformer of a run: fresh from settings, or from a checkpoint's weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import tokenizer as tokenizers
from .checkpoint import Checkpoint
from .config import Settings
from .errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..models.grok import Grok


def create(settings: Settings, vocab_size: int) -> Grok:
    """A model with freshly drawn weights (by `settings.seed`), float32, for a vocabulary of `vocab_size` tokens."""
    import torch

    from ..models.grok import Grok, GrokConfig

    known = {f.name for f in dataclasses.fields(GrokConfig)}
    for name in settings.overrides:
        if name not in known:
            raise UserError(f"the model has no setting {name!r}; it has {', '.join(sorted(known))}")
    try:
        config = GrokConfig.preset(settings.preset, **{"vocab_size": vocab_size, **settings.overrides})
        if config.vocab_size < vocab_size:
            raise UserError(
                f"the model's vocab_size of {config.vocab_size} is below the tokenizer's {vocab_size} tokens"
            )
        if config.max_position < settings.context:
            config = dataclasses.replace(config, max_position=settings.context)
        _check_memory(config.num_parameters())
        torch.manual_seed(settings.seed)
        return Grok(config)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"the model settings do not fit together: {error}") from None


def _check_memory(parameters: int) -> None:
    """Refuse a model whose training state alone exceeds this machine's memory, before the kernel kills us for it."""
    need = 16 * parameters  # weight, gradient and two moments, four bytes each
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise UserError(
            f"training {parameters / 1e9:.1f} billion parameters needs {need / 2**30:,.0f} GiB of memory and this "
            f"machine has {have / 2**30:,.0f}: choose a smaller --preset"
        )


def restore(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> tuple[Grok, tokenizers.Tokenizer]:
    """The model of a checkpoint, in `dtype` (the run's own if None), and its tokenizer."""
    import torch

    from ..models.grok import Grok, GrokConfig

    try:
        config = GrokConfig.from_dict(checkpoint.about["config"])
        model = Grok(config, dtype=dtype or getattr(torch, checkpoint.about["settings"]["dtype"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint.path} describes a model that this version cannot build: {error}") from None
    load_weights(weights(model), checkpoint)
    return model, restore_tokenizer(checkpoint)


def restore_tokenizer(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """The tokenizer that a checkpoint carries."""
    source = checkpoint.tensors.get("tokenizer")
    return tokenizers.build(
        checkpoint.about["tokenizer"], b"" if source is None else source.numpy().tobytes(), str(checkpoint.path)
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    named = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)
    return named | {name: buffer for name, buffer in model.named_buffers() if name in state}


def load_weights(own: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into those of a model (see `weights`), whose names and shapes must be the same."""
    import torch

    saved = checkpoint.part("model")
    if saved.keys() != own.keys():
        name = min(saved.keys() ^ own.keys())
        where = "the model has no such weight" if name in saved else "it is missing there"
        raise UserError(f"{checkpoint.path} belongs to another model: {name!r}: {where}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != saved[name].shape:
                raise UserError(
                    f"{checkpoint.path} belongs to another model: {name!r} has the shape {tuple(saved[name].shape)} "
                    f"there and {tuple(tensor.shape)} here"
                )
            tensor.copy_(saved[name])


def make_optimizer(parameters: dict[str, torch.Tensor], settings: Settings) -> torch.optim.Optimizer:
    """AdamW over named parameters; matrices decay, gains and other vectors do not."""
    from ..optim import AdamW

    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if params
    ]
    return AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=1e-8, max_norm=settings.clip)


@contextmanager
def on_backend(name: str | None) -> Iterator[None]:
    """The library's `use(name)`, or nothing for None; a backend that does not exist or cannot run is a UserError."""
    if name is None:
        yield
        return
    import grokkernels

    try:
        with grokkernels.use(name):
            yield
    except UserError:
        raise
    except ValueError as error:
        if f"'{name}'" not in str(error):  # the library names the backend in such a refusal, and nowhere else
            raise
        raise UserError(str(error)) from None
