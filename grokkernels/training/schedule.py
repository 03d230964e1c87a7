"""The learning rate over a run: a linear warm-up, then half a cosine (Loshchilov and Hutter 2016, without restarts)."""

from __future__ import annotations

import math


def learning_rate(progress: float, peak: float, *, warmup: float = 0.05, floor: float = 0.1) -> float:
    """Learning rate at `progress` in [0, 1] through the run, where progress counts steps or time alike.

    Rises linearly to `peak` during the first `warmup` share of the run, then falls to `floor * peak` at its end.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return peak * progress / warmup
    along = (progress - warmup) / (1.0 - warmup)
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * along)))
