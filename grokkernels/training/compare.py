"""One training step of the same model on the same batch, on several backends: the numbers and the time of each."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import Settings
from .data import Tokens
from .device import memory_explained, synchronize, to_device
from .model import make_optimizer, on_backend, weights

if TYPE_CHECKING:
    from ..models.grok import Grok

# How far two correct backends may be apart, relative: sums of some 10^5 float32 roundings of 6e-8 in other orders,
# and a bfloat16 rounding of 4e-3 in places.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True)
class StepResult:
    """One backend's first step from the same weights; `seconds` is the median of the steps after it."""

    backend: str
    loss: float
    grad_norm: float
    seconds: float


def compare_step(
    model: Grok, settings: Settings, tokens: Tokens, backends: Sequence[str], repeats: int = 5
) -> list[StepResult]:
    """Forward, backward and AdamW on each backend, on the model's device, from the same weights.

    `model` is left as it was.

    The backends take turns, so that a change of the machine's speed meets all of them.
    """
    device = model.embedding.device
    batch = tokens.batch(settings.seed, 0, settings.batch, settings.context)
    inputs, targets = (to_device(array, device) for array in batch)
    runs = {}
    for backend in backends:
        own = copy.deepcopy(model)
        runs[backend] = own, make_optimizer(weights_that_learn(own), settings)
    first: dict[str, tuple[float, float]] = {}
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for repeat in range(repeats + 1):
        for backend, (own, optimizer) in runs.items():
            with on_backend(backend), memory_explained("compare fewer backends at a time"):
                synchronize(device)
                began = time.perf_counter()
                out = own.loss(inputs, targets)
                aux = settings.load_balance * out.load_balance_loss + settings.z_loss * out.z_loss
                (out.loss + aux).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                synchronize(device)
                seconds = time.perf_counter() - began
            if repeat == 0:
                first[backend] = out.loss.item(), float(optimizer.grad_norm)
            else:
                times[backend].append(seconds)
    return [StepResult(b, *first[b], statistics.median(times[b])) for b in backends]


def difference(result: StepResult, measure: StepResult) -> float:
    """How far the loss and the gradient norm of `result` are from those of `measure`, the larger one, relative.

    Infinite where any of them is not finite.
    """
    pairs = [(result.loss, measure.loss), (result.grad_norm, measure.grad_norm)]
    if not all(math.isfinite(value) for pair in pairs for value in pair):
        return math.inf
    return max(abs(value - right) / max(abs(right), 1e-30) for value, right in pairs)


def weights_that_learn(model: Grok) -> dict[str, object]:
    """The parameters of `model` by name, without buffers."""
    return {name: tensor for name, tensor in weights(model).items() if tensor.requires_grad}
