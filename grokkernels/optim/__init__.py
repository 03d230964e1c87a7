"""Optimizers on the ops, subclasses of torch.optim.Optimizer."""

from __future__ import annotations

from grokkernels.optim.adamw import AdamW

__all__ = ["AdamW"]
