"""The only place where a backend is chosen, and where an op becomes known to PyTorch.

A row of the grid, ops/<op>.py, holds one `Row`: the public name and what each backend supports. `Row.choose` answers
*who runs this call*: the `backend=` argument, else `with use(...)`, else GROKKERNELS_BACKEND, else the first backend
in the device's order that supports the call. An explicit choice that cannot be met raises with the reason; only the
automatic choice moves on.

Below a row stand its native functions, `define`d here: one schema with an overload per kind of kernel, `.native` (CPU
or CUDA, by PyTorch's own dispatch key), `.triton` and `.emulated`; the same shape function and derivative for all of
them. C++ registers the kernels of `.native` and `.emulated`; those of `.triton` are the functions of the same names in
grokkernels/triton/<op>.py, loaded when first called. The reference is never registered: torch.compile sees through it
and its gradient owes nothing to ours.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from grokkernels import derivatives, native, preference
from grokkernels import triton as triton_column

BACKENDS = ("cuda", "triton", "cpu", "emulated", "reference")
# Backends that the automatic choice tries, by device type, in order; `emulated` is never chosen unasked, nor is
# `triton` on the CPU. Between cuda and triton, preference.py decides, row by row.
# A meta tensor has no kernels, only the shape functions that all of them share.
AUTOMATIC = {"cpu": ("cpu", "reference"), "xpu": ("triton", "reference"), "meta": ("cpu", "reference")}
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The overload of a native function that each backend calls.
OVERLOADS = {"cpu": "native", "cuda": "native", "triton": "triton", "emulated": "emulated"}
_CPU = torch.device("cpu")

Supports = Callable[..., "str | None"]


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} names no backend: '{name}'; allowed are {', '.join(BACKENDS)}")
    return name


_environment = os.environ.get("GROKKERNELS_BACKEND") or None
if _environment is not None:
    _checked(_environment, "GROKKERNELS_BACKEND")


class _Forced(threading.local):
    """What `use` asks for in this thread. torch.compile reads it as any attribute; a ContextVar it does not trace."""

    def __init__(self) -> None:
        self.backend = _environment


_forced = _Forced()

ROWS: dict[str, Row] = {}


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op called inside the `with` block on this backend, unless the call names one itself.

    It holds for this thread; the gradient of a call is computed where the call itself was, in whatever thread.

    Errors: ValueError when `backend` is no backend's name; what a backend cannot run, it refuses when called.
    """
    before = _forced.backend
    _forced.backend = _checked(backend, "use()")
    try:
        yield
    finally:
        _forced.backend = before


@dataclass(frozen=True)
class Row:
    """An op: its public name, and per backend a function (same arguments as the op) that returns None or a reason."""

    name: str
    supports: dict[str, Supports]

    def __post_init__(self) -> None:
        ROWS[self.name] = self

    def reason(self, backend: str, device: torch.device, *args: Any, **kwargs: Any) -> str | None:
        """Why `backend` cannot run this call; None when it can."""
        return self._reason(backend, device, args, kwargs)

    def _reason(self, backend: str, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if backend == "reference":
            return None
        # What the emulated device supports is what the CUDA column does: it runs the same kernels.
        supports = self.supports.get("cuda" if backend == "emulated" else backend)
        if supports is None:
            return f"{self.name} has no {backend} kernel"
        reason = _unusable(backend, device)
        return supports(*args, **kwargs) if reason is None else reason

    def automatic(self, device: torch.device) -> tuple[str, ...]:
        """What the automatic choice tries on this device, in order."""
        kind = _kind(device)
        if kind == "cuda":
            return (*preference.order(self.name), "reference")
        return AUTOMATIC.get(kind, ("reference",))

    def choose(self, requested: str | None, device: torch.device, *args: Any, **kwargs: Any) -> str:
        """The backend that runs this call."""
        wanted = requested if requested is not None else _forced.backend
        if wanted is not None:
            reason = self._reason(_checked(wanted, "backend"), device, args, kwargs)
            if reason is not None:
                raise ValueError(f"{self.name} cannot run on backend '{wanted}': {reason}")
            return wanted
        for backend in self.automatic(device):
            if backend == "reference":
                break
            if self._reason(backend, device, args, kwargs) is None:
                return backend
        self._say_plain(device)
        return "reference"

    def _say_plain(self, device: torch.device) -> None:
        """Warns where no kernel of ours can run at all; a single call that none supports is not worth a word."""
        reasons = {backend: _unusable(backend, device) for backend in self.automatic(device) if backend != "reference"}
        if reasons and None not in reasons.values():
            words = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
            _warn_once(self.name, _kind(device), words)


_warned: set[str] = set()


def _warn_once(op: str, kind: str, reasons: str) -> None:
    """Says, once for the process and these reasons, that no kernel of ours runs on this kind of device."""
    if reasons in _warned:
        return
    _warned.add(reasons)
    warnings.warn(
        f"{op} and every other op runs in plain PyTorch (backend 'reference') on {kind} tensors, which is slow: "
        f"{reasons}. `python -m grokkernels doctor` says what is missing; grokkernels.use('reference') asks for plain "
        "PyTorch without this warning.",
        stacklevel=5,  # the line that calls the op
    )


_warn_once._dynamo_marked_constant = (
    True  # torch.compile runs it while it traces, as torch.compiler.assume_constant_result
)


def _kind(device: torch.device) -> str:
    """The device's type, which PyTorch spells anew each time it is asked, in a quarter of a microsecond."""
    return "cpu" if device == _CPU else device.type


# Of each native backend: its library in native.py, the reason there why it is missing, the device it runs on.
_LIBRARIES = {
    "cpu": ("module", "load_error", "cpu"),
    "cuda": ("cuda", "cuda_error", "cuda"),
    "emulated": ("emulated", "emulated_error", "cpu"),
}


def _unusable(backend: str, device: torch.device) -> str | None:
    """Why no kernel of this backend runs on this device here; None when they do, and for meta tensors, which need a
    shape function alone."""
    kind = _kind(device)
    if kind == "meta":
        return None
    if backend == "triton":
        return triton_column.load_error() or triton_column.device_reason(kind)
    library, error, home = _LIBRARIES[backend]
    if getattr(native, library) is None:
        return getattr(native, error)
    if kind != home:
        return f"the tensors are on {device}, not on {'the CPU' if home == 'cpu' else 'a CUDA device'}"
    return None


def home(backend: str) -> str:
    """The type of the device whose tensors a backend takes here: "cuda", "xpu" or "cpu"."""
    if backend in _LIBRARIES:
        return _LIBRARIES[backend][2]
    if backend == "triton" and not triton_column.INTERPRETED:
        return "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
    return "cpu"


def unusable(backend: str) -> str | None:
    """Why no kernel of this backend runs here at all, as a sentence; None when they do."""
    if backend == "reference":
        return None
    if backend == "cuda" and native.cuda is not None and not torch.cuda.is_available():
        return f"built for {native.cuda.architectures}, but torch finds no NVIDIA GPU or driver"
    return _unusable(backend, torch.device(home(backend)))


def native_dtypes(**tensors: torch.Tensor | None) -> str | None:
    """The reason of a native backend against a dtype; all tensors given must share one of NATIVE_DTYPES."""
    first: torch.dtype | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dtype = tensor.dtype
        if dtype not in NATIVE_DTYPES:
            return f"{name} is {dtype}; float32, bfloat16 and float16 are supported"
        if first is None:
            first = dtype
        elif dtype != first:
            return f"{name} is {dtype} beside {first}; they must agree"
    return None


_library = torch.library.Library("grokkernels", "DEF")
FUNCTIONS: dict[str, NativeFunction] = {}


@dataclass(frozen=True)
class NativeFunction:
    """A function of torch.ops.grokkernels, one overload per kind of kernel."""

    name: str
    calls: dict[str, Callable[..., Any]]
    differentiable: bool
    constants: tuple[str, ...]

    def on(self, backend: str) -> Callable[..., Any]:
        """What calls the overload of `backend`."""
        return self.calls[backend]


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    constants: tuple[str, ...] = (),
    backends: tuple[str, ...] = ("cpu", "cuda", "triton", "emulated"),
) -> NativeFunction:
    """Makes `name` known to PyTorch: `schema` is "(arguments) -> returns", `fake` its shape function.

    `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` are as in torch.library.register_autograd; the
    derivative reads `ctx.backend` to stay on the backend of the forward pass. Without them it is refused.
    `constants` are floating tensors that no gradient reaches: one that asks for it is refused.
    """
    calls: dict[str, Callable[..., Any]] = {}
    op = fake.__module__.rsplit(".", 1)[-1]
    for backend in backends:
        overload = OVERLOADS[backend]
        shared = next((b for b in calls if OVERLOADS[b] == overload), None)
        if shared is not None:
            calls[backend] = calls[shared]
            continue
        qualified = f"{name}.{overload}"
        _library.define(f"{qualified}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"grokkernels::{qualified}", fake, lib=_library)
        if backend == "triton":
            launch = _triton_launcher(op, name)
            for key in ("CPU", "CUDA", "XPU"):
                _library.impl(qualified, launch, key)
        calls[backend] = derivatives.register(
            _library,
            getattr(getattr(torch.ops.grokkernels, name), overload),
            fake,
            backend,
            lambda: _public_name(name, op),
            setup_context,
            backward,
            constants,
        )
    FUNCTIONS[name] = NativeFunction(name, calls, backward is not None, constants)
    return FUNCTIONS[name]


def _public_name(function: str, file: str) -> str:
    """The op that a native function belongs to, where one file holds two ops by its own name."""
    stem = re.sub("_(fwd|bwd|inplace)$", "", function)
    return stem if stem in ROWS else file


def _triton_launcher(op: str, name: str) -> Callable[..., Any]:
    """Calls the function `name` of grokkernels/triton/<op>.py, which is loaded by the first call."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        return triton_column.launcher(op, name)(*args, **kwargs)

    return launch


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """A table of the backends for one call of an op: who would run it, and why the others would not.

    `op` is a public op or its name; the rest is what the call would be given.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in ROWS:
        raise ValueError(f"op is no op: '{name}'; allowed are {', '.join(sorted(ROWS))}")
    requested = kwargs.pop("backend", None)
    device = next((a.device for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor)), torch.device("cpu"))
    reasons = {backend: ROWS[name].reason(backend, device, *args, **kwargs) for backend in BACKENDS}
    chosen = ROWS[name].choose(requested, device, *args, **kwargs)
    lines = [f"{name} on {device.type}:"]
    if device.type == "cuda":
        lines[0] += f" (the order of cuda and triton is {preference.source()})"
    for backend, reason in reasons.items():
        mark = "->" if backend == chosen else "  "
        lines.append(f" {mark} {backend:<10} {'supported' if reason is None else reason}")
    return "\n".join(lines)
