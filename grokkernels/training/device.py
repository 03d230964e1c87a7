"""Where a run computes: on the CPU, or on one CUDA device."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

NAMES = "auto, cpu, cuda or cuda:N"
_PATTERN = re.compile(r"auto|cpu|cuda(?::(\d{1,9}))?", re.ASCII)


def is_name(name: object) -> bool:
    """Whether `name` is one of `NAMES`; a device of that name need not exist."""
    return isinstance(name, str) and _PATTERN.fullmatch(name) is not None


def choose(name: str, backend: str | None = None) -> torch.device:
    """The device called `name`, made the current one if it is a CUDA device.

    `auto` is CUDA where torch finds a device and kernels that run on it are usable: those of `backend`, or of any
    backend if that is None; else it is the CPU. Errors: UserError for a device that this machine does not have.
    """
    import torch

    match = _PATTERN.fullmatch(name)
    if match is None:
        raise UserError(f"--device must be {NAMES}, got {name!r}")
    if name == "cpu" or (name == "auto" and not (torch.cuda.is_available() and _runs_on_cuda(backend))):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} " + ("finds none" if torch.version.cuda else "is built without CUDA")
        raise UserError(f"--device {name} needs a CUDA device and {built}: give --device cpu")
    index, count = int(match[1] or torch.cuda.current_device()), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"--device {name} does not exist: this machine has {count}, numbered from cuda:0")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def backends(device: torch.device) -> tuple[str, ...]:
    """The usable backends with kernels for `device`, fastest first, then the reference."""
    from ..doctor import report

    usable = report()["backends"]
    own = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return (*(name for name in own if usable[name]["usable"]), "reference")


def _runs_on_cuda(backend: str | None) -> bool:
    import torch

    found = backends(torch.device("cuda"))
    return backend in found if backend is not None else found != ("reference",)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`. To a CUDA device it travels from pinned memory, without waiting for it."""
    import torch

    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what was asked of it, so that a clock read afterwards has it in."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> int:
    """Bytes of memory that `device` has, in use or not."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe(device: torch.device) -> str:
    """The device in a few words: the GPU's name, or the number of CPU threads."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{torch.get_num_threads()} threads"


@contextmanager
def memory_explained(advice: str) -> Iterator[None]:
    """Turn an allocation that fails inside into a UserError that ends with `advice`."""
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise UserError(f"the memory does not suffice: {advice}") from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # what torch says of the CPU's memory; it has no type of its own
            raise
        raise UserError(f"the memory does not suffice: {advice}") from None
