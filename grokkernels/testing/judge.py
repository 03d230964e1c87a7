"""The float64 rule: ``err(kernel) <= 2 * err(reference in that dtype) + tiny``, for outputs and gradients.

The oracle is the reference computed in float64 on the very numbers the kernel sees. Errors are measured twice, as
the largest absolute error and as the root mean square error, each over one whole tensor. `tiny` is what no kernel can
avoid and the reference may by luck (on a scalar often does): the rounding of the result, half an ulp of the tensor's
dtype, and one rounding of the float32 arithmetic before it, half an ulp of float32; of the tensor's largest value, for
the second measure of its root mean square. No tolerance is ever set by hand. Integers and booleans must equal those of
the reference in the same dtype; infinities and NaNs must stand where the oracle has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from grokkernels import dispatch, native
from grokkernels.testing.case import Arguments, Case, Table
from grokkernels.testing.fences import APART, Fence, Layout, held, layout_of


@dataclass(frozen=True)
class Verdict:
    """Of one case: the worst error over what the rule allows (1 is the limit), and which tensor it was."""

    ratio: float
    where: str

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The arguments with float64 tensors rounded to `dtype`."""
    return {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value
        for key, value in arguments.items()
    }


def in_float64(arguments: Arguments) -> Arguments:
    """The arguments with every floating tensor widened: what the oracle sees."""
    return {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }


def on_device(arguments: Arguments, device: str) -> Arguments:
    """The arguments with every tensor on a device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors of an op's result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in tensors_of(part)]
    return []


Place = Callable[[str, torch.Tensor], torch.Tensor]


def run(
    function: Callable[..., Any],
    arguments: Arguments,
    grad: tuple[str, ...],
    cotangents: list[torch.Tensor] | None,
    place: Place = lambda name, tensor: tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor]]:
    """Outputs, gradients of the arguments named in `grad`, and the cotangents used (drawn when None are given).

    Gradients come from sum(output * cotangent) over all differentiable outputs; outputs that are not finite have none.
    `place` is called with the name of each cotangent, "cotangent 0" and so on, and gives it another layout.
    """
    leaves = dict(arguments)
    wanted = [name for name in grad if isinstance(arguments.get(name), torch.Tensor)]
    for name in wanted:
        leaves[name] = arguments[name].detach().requires_grad_(True)
    outputs = tensors_of(function(**leaves))
    floats = [out for out in outputs if out.is_floating_point() and out.requires_grad]
    if cotangents is None:
        generator = torch.Generator().manual_seed(len(floats))
        # Sixteenths are exact in every dtype: all runs see the same cotangent.
        cotangents = [
            torch.randint(-32, 33, out.shape, generator=generator, dtype=torch.float64).div(16) for out in floats
        ]
    gradients: list[torch.Tensor | None] = []
    if floats and wanted:
        placed = []
        for i, (output, cotangent) in enumerate(zip(floats, cotangents, strict=True)):
            finite, cotangent = torch.isfinite(output.detach()), cotangent.to(output.device, output.dtype)
            placed.append(place(f"cotangent {i}", cotangent) if finite.all() else torch.where(finite, cotangent, 0))
        gradients = list(torch.autograd.grad(floats, [leaves[name] for name in wanted], placed, allow_unused=True))
    return [out.detach() for out in outputs], gradients, cotangents


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().max()


def _root_mean_square(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().mean().sqrt()


def ratio(got: torch.Tensor, low: torch.Tensor, oracle: torch.Tensor, *, few: bool) -> float:
    """Worst of the error measures over what the rule allows; infinity for a wrong integer, infinity or NaN."""
    if not got.is_floating_point():
        return 0.0 if torch.equal(got, low) else float("inf")
    if got.numel() == 0:
        return 0.0
    finite = torch.isfinite(oracle)
    wide, low = got.double(), low.double()
    special_equal = torch.equal(torch.nan_to_num(wide[~finite], nan=7.0), torch.nan_to_num(oracle[~finite], nan=7.0))
    if not special_equal or not torch.isfinite(wide[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    error, allowed = (wide - oracle)[finite], (low - oracle)[finite]
    unavoidable = (torch.finfo(got.dtype).eps + torch.finfo(torch.float32).eps) / 2
    smallest = torch.finfo(got.dtype).smallest_normal
    ratios = []
    for measure in (_root_mean_square,) if few else (_largest, _root_mean_square):
        bound = 2 * measure(allowed) + unavoidable * measure(oracle[finite]) + smallest
        ratios.append((measure(error) / bound).item())
    return max(ratios)


# A tensor of fewer elements is judged over several draws together, by the root mean square alone: whether the reference
# rounds one number well or badly is luck, which evens out, and the largest of a few errors is luck too. (One wrong
# element of so few shows in the mean.) Where elements share places in memory it is different numbers that count.
FEW, DRAWS = 64, 8

Compared = list[tuple[str, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]


def judge(
    table: Table,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    *,
    layout: Layout = "fenced",
    draws: Sequence[int] = range(1),
) -> Verdict:
    """Runs one case forward and backward on `backend` and compares; see the module's docstring.

    `layout` is how the tensors handed to the kernel, cotangents among them, lie in memory: see `Fence`.
    `draws` are the draws of the case's numbers that are judged together.
    Outputs start as NaN, and the memory around the inputs is NaN too: see `nan_outputs` and `Fence`.
    """

    def few(got: torch.Tensor | None, oracle: torch.Tensor | None) -> bool:
        if got is None or oracle is None or not got.is_floating_point():
            return False
        if got.numel() < FEW:
            return True
        shared = layout not in APART and oracle.flatten()[: 64 * FEW].unique().numel() < FEW
        return shared and oracle.unique().numel() < FEW

    try:
        compared = [_compared(table, case.arguments(n), dtype, backend, layout) for n in draws]
        if len(compared) < DRAWS and any(few(got, oracle) and got.numel() for _, got, _, oracle in compared[0]):
            more = range(draws[-1] + 1, draws[-1] + 1 + DRAWS - len(compared))
            compared += [_compared(table, case.arguments(n), dtype, backend, layout) for n in more]
    except _Defect as defect:
        return Verdict(float("inf"), str(defect))
    worst = Verdict(0.0, "nothing to compare")
    for same in zip(*compared, strict=True):
        where, got, low, oracle = same[0]
        if got is None:
            continue
        if got.shape != oracle.shape or got.dtype != low.dtype:
            kind = f"{tuple(got.shape)} {got.dtype} instead of {tuple(oracle.shape)} {low.dtype}"
            return Verdict(float("inf"), f"{where} is {kind}")
        little = few(got, oracle)
        together = same if little else same[: len(draws)]
        worse = ratio(*(torch.stack([part[i] for part in together]) for i in (1, 2, 3)), few=little)
        if worse >= worst.ratio:
            worst = Verdict(worse, where)
    return worst


def settled(table: Table, case: Case, dtype: torch.dtype, backend: str, layout: Layout = "fenced") -> Verdict:
    """What `judge` says, but an error over the rule by less than ten times is looked at again, on DRAWS other draws of
    the numbers together: for the many calls of a fuzzer, and layouts that leave few different numbers.

    One draw in some hundreds is over the rule by luck. Luck does not come again in eight draws together; a fault does.
    """
    verdict = judge(table, case, dtype, backend, layout=layout)
    if verdict.passed or verdict.ratio > 10:
        return verdict
    return judge(table, case, dtype, backend, layout=layout, draws=range(DRAWS, 2 * DRAWS))


class _Defect(Exception):
    """A fault that needs no measuring."""


def _compared(table: Table, arguments: Arguments, dtype: torch.dtype, backend: str, layout: Layout) -> Compared:
    """Each output and gradient: what it is, from the kernel, from the reference in the dtype and in float64."""

    def hold(name: str, value: Any) -> Any:
        return held(value, layout_of(layout, name)) if isinstance(value, torch.Tensor) else value

    arguments = {name: hold(name, value) for name, value in in_dtype(arguments, dtype).items()}
    oracle_out, oracle_grad, cotangents = run(table.reference, in_float64(arguments), table.grad, None, hold)
    low_out, low_grad, _ = run(table.reference, arguments, table.grad, cotangents, hold)
    fence = Fence(arguments, layout, dispatch.home(backend))
    with nan_outputs():
        got_out, got_grad, _ = run(
            lambda **kw: table.op(**kw, backend=backend),
            fence.arguments,
            table.grad,
            cotangents,
            lambda name, cotangent: fence.place(name, hold(name, cotangent)),
        )
    if not fence.intact():
        raise _Defect("an input, or the memory around it, was written to")
    got_out = [out.cpu() for out in got_out]
    got_grad = [None if grad is None else grad.cpu() for grad in got_grad]
    if len(got_out) != len(low_out):
        raise _Defect(f"{len(got_out)} outputs instead of {len(low_out)}")
    names = [name for name in table.grad if isinstance(arguments.get(name), torch.Tensor)]
    compared = [
        *((f"output {i}", *trio) for i, trio in enumerate(zip(got_out, low_out, oracle_out, strict=True))),
        *((f"gradient of {n}", *trio) for n, *trio in zip(names, got_grad, low_grad, oracle_grad, strict=False)),
    ]
    for where, got, low, _ in compared:
        if (got is None) != (low is None):
            raise _Defect(f"{where} is missing on one side")
    return compared


@contextmanager
def nan_outputs() -> Iterator[None]:
    """Every tensor that is allocated without content starts as NaN (integers as their maximum) inside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def levels(table: Table, backend: str) -> list[str | None]:
    """What a backend can be run as on this machine: CPU levels, emulated architectures; else [None]."""
    if backend == "cpu":
        assert native.module is not None, native.load_error
        return list(native.module.cpu_levels())
    return list(table.architectures) if backend == "emulated" else [None]


@contextmanager
def at_level(level: str | None) -> Iterator[None]:
    """Run the CPU backend at this instruction-set level inside, or the emulated one as this architecture ("sm_90").

    None leaves both as they are.
    """
    if level is None:
        yield
        return
    if level.startswith("sm_"):
        assert native.emulated is not None, native.emulated_error
        get, put, value = native.emulated.architecture, native.emulated.set_architecture, int(level[3:])
    else:
        assert native.module is not None, native.load_error
        get, put, value = native.module.cpu_level, native.module.set_cpu_level, level
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)
