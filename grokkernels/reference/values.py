"""Tensors that have a shape and no numbers."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor


def known(tensor: torch.Tensor) -> bool:
    """Whether the tensor has numbers: on the meta device and under a FakeTensorMode it has none, and any will do, since
    no output's shape depends on them."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
