"""Making the transformer of a run: fresh from settings, or from a checkpoint's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import device as devices
from . import tokenizer as tokenizers
from .checkpoint import Checkpoint
from .config import Settings
from .errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..models.grok import Grok, GrokConfig


def create(settings: Settings, vocab_size: int, device: torch.device | None = None) -> Grok:
    """A model with freshly drawn weights (by `settings.seed`), float32, for a vocabulary of `vocab_size` tokens.

    They are drawn on the CPU, so that a seed means the same weights on every device (the CPU unless given).
    """
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
    except UserError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"the model settings do not fit together: {error}") from None
    device = device or torch.device("cpu")
    check_memory(config, torch.device("cpu"))
    check_memory(config, device, settings)
    torch.manual_seed(settings.seed)
    with devices.memory_explained("choose a smaller --preset"):
        return Grok(config, device="cpu", dtype=torch.float32).to(device)


def check_memory(config: GrokConfig, device: torch.device, settings: Settings | None = None) -> None:
    """Refuse a model that the device's memory cannot hold, before the system kills us for it.

    With `settings` it is to be trained by them: the optimizer's state counts then, and what a step keeps at the least,
    the two residual streams of each layer.
    """
    have = devices.memory(device)
    parameters = config.num_parameters()
    tables = 8 * config.max_position * config.head_dim  # the rotary cos and sin, and what they are made from
    # A weight has four bytes; its gradient and two moments have as many each.
    model = (16 if settings is not None else 4) * parameters + tables
    if model > have:
        what = "training" if settings is not None else "a model of"
        raise UserError(
            f"{what} {parameters / 1e9:.1f} billion parameters and {config.max_position:,} positions needs "
            f"{model / 2**30:,.0f} GiB of memory and there are {have / 2**30:,.0f}: choose a smaller --preset"
        )
    if settings is None:
        return
    tokens = settings.batch * settings.context
    step = tokens * (16 + 2 * 4 * config.d_model * config.num_layers)
    if model + step > have:
        raise UserError(
            f"a step of {settings.batch:,} x {settings.context:,} tokens needs at least {step / 2**30:,.0f} GiB of "
            f"memory beside the model's {model / 2**30:,.1f} and there are {have / 2**30:,.0f}: choose a smaller "
            f"--batch or --context"
        )


def rehearse(model: Grok, device: torch.device) -> None:
    """Run the model on one token, so that what its ops refuse is told before any work."""
    import torch

    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            model.loss(token, token)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"this model cannot run: {error}") from None


def restore_settings(checkpoint: Checkpoint) -> Settings:
    """The settings of the run that wrote a checkpoint."""
    try:
        return Settings.from_dict(checkpoint.about["settings"])
    except UserError as error:
        raise UserError(f"{checkpoint.path} holds settings that this version cannot take: {error}") from None


def restore(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[Grok, tokenizers.Tokenizer]:
    """The model of a checkpoint, and its tokenizer; in the run's own dtype and on the CPU unless given."""
    import torch

    from ..models.grok import Grok, GrokConfig

    device = device or torch.device("cpu")
    try:
        config = GrokConfig.from_dict(checkpoint.about["config"])
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{checkpoint.path} describes a model that this version cannot build: {error}") from None
    # The file's size bounds the model's, before anything is allocated for it.
    described, held = config.num_parameters(), sum(t.numel() for t in checkpoint.part("model").values())
    if described != held:
        raise UserError(
            f"{checkpoint.path} belongs to another model: its header describes {described:,} parameters and it holds "
            f"{held:,}"
        )
    check_memory(config, device)
    words = restore_tokenizer(checkpoint)
    if words.vocab_size > config.vocab_size:
        raise UserError(
            f"{checkpoint.path} does not fit together: its tokenizer has {words.vocab_size:,} ids and its model "
            f"{config.vocab_size:,}"
        )
    own = getattr(torch, restore_settings(checkpoint).dtype)
    with devices.memory_explained("choose another --device"):
        model = Grok(config, device="meta", dtype=dtype or own).to_empty(device=device)
    load_weights(weights(model), checkpoint)
    return model, words


def restore_tokenizer(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """The tokenizer that a checkpoint carries."""
    import torch

    source = checkpoint.tensors.get("tokenizer", torch.empty(0, dtype=torch.uint8))
    if source.dtype != torch.uint8:
        raise UserError(f"{checkpoint.path} is damaged: its tokenizer is {source.dtype} where bytes belong")
    return tokenizers.build(checkpoint.about["tokenizer"], source.numpy().tobytes(), str(checkpoint.path))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    named = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)
    return named | {name: buffer for name, buffer in model.named_buffers() if name in state}


def load_weights(own: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's float32 weights into those of a model (see `weights`) of the same names and shapes."""
    import torch

    saved = checkpoint.part("model")
    check_tensors(saved, {name: tensor.shape for name, tensor in own.items()}, checkpoint)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def check_tensors(saved: dict[str, torch.Tensor], shapes: Mapping[str, Sequence[int]], checkpoint: Checkpoint) -> None:
    """Refuse tensors of a checkpoint that are not those of `shapes`, float32 and finite."""
    import torch

    if saved.keys() != shapes.keys():
        name = min(saved.keys() ^ shapes.keys())
        where = "has no place here" if name in saved else "is missing there"
        raise UserError(f"{checkpoint.path} belongs to another model: {name!r} {where}")
    for name, shape in shapes.items():
        tensor = saved[name]
        if tuple(tensor.shape) != tuple(shape):
            raise UserError(
                f"{checkpoint.path} belongs to another model: {name!r} has the shape {tuple(tensor.shape)} there and "
                f"{tuple(shape)} here"
            )
        if tensor.dtype != torch.float32:
            raise UserError(f"{checkpoint.path} is damaged: {name!r} is {tensor.dtype} where torch.float32 belongs")
        if not tensor.isfinite().all():
            raise UserError(
                f"{checkpoint.path} is of no use: {name!r} holds values that are not finite; delete that file to go "
                f"on from an earlier checkpoint"
            )


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
    from grokkernels.dispatch import BACKENDS

    if name not in BACKENDS:
        raise UserError(f"--backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    try:
        with grokkernels.use(name):
            yield
    except UserError:
        raise
    except ValueError as error:
        if f"'{name}'" not in str(error):  # the library names the backend in such a refusal, and nowhere else
            raise
        raise UserError(str(error)) from None
