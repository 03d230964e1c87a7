"""What a kernel owes to the stream it is launched on, op by op: CUDA graphs, side streams, other devices, repeats.

Every answer is compared with a plain call's, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu.case_rows import chosen, unusable, where
from gpu.device import Device, Tensors, device_of
from gpu.plant import planted
from gpu.record import ABSENT, PASSED, WRONG, Row
from gpu.worker import Question
from grokkernels.testing import judge
from grokkernels.testing.case import Arguments, Case, Table

REPEATS = {"cuda": 200, "stand-in": 3}
Answer = tuple[str, str, dict[str, Any]]


class Work:
    """A case on the device, forward and backward: its inputs stay where they are, so that a graph can be replayed."""

    def __init__(self, table: Table, case: Case, dtype: torch.dtype, column: str, home: str) -> None:
        self._table, self._case, self._dtype, self._column, self._home = table, case, dtype, column, home
        self.arguments = self.drawn(0)
        self._cotangents: list[torch.Tensor] | None = None

    def drawn(self, draw: int) -> Arguments:
        return judge.on_device(judge.in_dtype(self._case.arguments(draw), self._dtype), self._home)

    def fill(self, draw: int) -> None:
        """Other numbers into the same inputs."""
        with torch.no_grad():
            for name, value in self.drawn(draw).items():
                if isinstance(value, torch.Tensor):
                    self.arguments[name].copy_(value)

    def call(self) -> Tensors:
        """Outputs and gradients. The cotangents stay the same."""
        op = self._table.op
        outputs, gradients, _ = judge.run(
            lambda **kw: op(**kw, backend=self._column), self.arguments, self._table.grad, self._placed()
        )
        return [*outputs, *(gradient for gradient in gradients if gradient is not None)]

    def _placed(self) -> list[torch.Tensor]:
        """Cotangents on the device, since a graph may not copy from the host's memory; drawn by way of the reference,
        so that the first call of the op may be a captured one."""
        if self._cotangents is None:
            arguments = judge.in_dtype(self._case.arguments(), self._dtype)
            *_, drawn = judge.run(self._table.reference, arguments, self._table.grad, None)
            self._cotangents = [cotangent.to(self._home) for cotangent in drawn]
        return self._cotangents


def differing(one: Tensors, other: Tensors) -> str | None:
    """Which tensor differs in any bit; None: none does."""
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        if a.shape != b.shape or not torch.equal(_bits(a), _bits(b).to(a.device)):
            return f"tensor {i} of {len(one)} (outputs, then gradients) differs"
    return None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def verdict(one: Tensors, other: Tensors, words: str) -> Answer:
    differs = differing(one, other)
    return (PASSED, "", {}) if differs is None else (WRONG, f"{words}: {differs}", {})


def copied(tensors: Tensors) -> Tensors:
    return [tensor.clone() for tensor in tensors]


def captured(device: Device, work: Work, *, warm: bool) -> Answer:
    """A graph of some numbers, replayed with others."""
    replay, outputs = device.capture(work.call, warm=warm)
    work.fill(1)
    replay()
    device.synchronize()
    got = copied(outputs)
    return verdict(got, work.call(), "a replay with other numbers")


def side_stream(device: Device, work: Work) -> Answer:
    work.fill(1)
    expected = copied(work.call())
    work.fill(0)
    device.synchronize()
    other = [value for value in work.drawn(1).values() if isinstance(value, torch.Tensor)]
    inputs = [value for value in work.arguments.values() if isinstance(value, torch.Tensor)]

    def fill() -> None:
        with torch.no_grad():
            for into, value in zip(inputs, other, strict=True):
                into.copy_(value)

    return verdict(device.late(fill, work.call), expected, "on a side stream")


def repeats(device: Device, work: Work) -> Answer:
    work.fill(0)
    first = copied(work.call())
    wrong = torch.zeros(len(first), dtype=torch.int64, device=device.home)
    count = REPEATS[device.name]
    with device.busy() as more:
        for _ in range(count):
            more()
            for i, (a, b) in enumerate(zip(first, work.call(), strict=True)):
                wrong[i] += (_bits(a) != _bits(b)).any()
    bad = wrong.tolist()
    if any(bad):
        return WRONG, f"of {count} repeats so many differ, tensor by tensor: {bad}", {}
    return PASSED, "", {}


def elsewhere(device: Device, work: Work, other: str, make: Callable[[str], Work]) -> Answer:
    """On a device that is not the current one."""
    return verdict(work.call(), make(other).call(), f"on {other}, which is not current")


def rows(spec: dict[str, Any], say: Callable[..., None]) -> Iterator[Question]:
    device, column = device_of(spec), spec["column"]
    refused = unusable("stream", column, ",".join(spec["ops"]))
    if refused is not None:
        yield refused
        return
    for op in spec["ops"]:
        for turn, (table, level, case, dtype) in enumerate(chosen(device, op, column, spec["part"])):
            yield from _of_case(device, column, planted(table, device), level, case, dtype, first=turn == 0)


def _of_case(
    device: Device, column: str, table: Table, level: str | None, case: Case, dtype: torch.dtype, *, first: bool
) -> Iterator[Question]:
    place = where(column, level, dtype)

    def make(home: str) -> Work:
        return Work(table, case, dtype, column, home)

    def asked(answer: Callable[[Work], Answer]) -> Callable[[], Answer]:
        def ask() -> Answer:
            with judge.at_level(level):
                return answer(make(device.home))

        return ask

    if first and column != "triton":  # Triton compiles at its first call
        row = Row("first call captured", table.name, place, case.name)
        yield Question(row, asked(lambda work: captured(device, work, warm=False)))
    checks: dict[str, Callable[[Work], Answer]] = {
        "captured and replayed": lambda work: captured(device, work, warm=True),
        "side stream": lambda work: side_stream(device, work),
        "bitwise repeats": lambda work: repeats(device, work),
    }
    for name, answer in checks.items():
        yield Question(Row(name, table.name, place, case.name), asked(answer))
    row = Row("another device", table.name, place, case.name)
    others = device.others()
    if others:
        yield Question(row, asked(lambda work: elsewhere(device, work, others[0], make)))
    elif first:
        yield Question(row, lambda: (ABSENT, "there is one device", {}))
