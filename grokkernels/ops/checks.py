"""Checks that contracts share: each raises with the argument's name, its value and what is allowed."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import derivatives

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, tensor: Any, *, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """`tensor` is a dense tensor of one of `dtypes`."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be one of {allowed}, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")


def integers(name: str, tensor: Any) -> None:
    """`tensor` is an int32 or int64 tensor."""
    floating(name, tensor, dtypes=(torch.int32, torch.int64))


def shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """`tensor` has this shape, where None stands for any size; `meaning` spells it, as in "(N, C)"."""
    sizes = tensor.shape
    if len(sizes) == len(expected):
        for size, wanted in zip(sizes, expected, strict=True):
            if wanted is not None and size != wanted:
                break
        else:
            return
    numbers = "(" + ", ".join("any" if e is None else str(e) for e in expected) + ")"
    raise ValueError(f"{name} must have shape {meaning} = {numbers}, got {tuple(sizes)}")


def same_device(**tensors: torch.Tensor | None) -> torch.device:
    """All tensors given lie on one device, which is returned."""
    device: torch.device | None = None
    first = ""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {device}: all must be on one device")
    assert device is not None
    return device


def readable(*tensors: torch.Tensor | None) -> bool:
    """Whether the numbers of all tensors given can be looked at now, without waiting for a device: not while
    torch.compile or a transform of torch.func is at work, where a kernel sees them first."""
    if torch.compiler.is_compiling() or derivatives.transformed():
        return False
    return all(tensor is None or (type(tensor) is torch.Tensor and tensor.is_cpu) for tensor in tensors)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """`value` is one of a few words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def integer(name: str, value: Any, low: int, high: int) -> None:
    """`value` is an int (a symbolic one in a traced call) from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def at_least(name: str, value: Any, low: float) -> None:
    """`value` is a finite number, `low` or more."""
    if not low <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= {low:g}, got {value!r}")
