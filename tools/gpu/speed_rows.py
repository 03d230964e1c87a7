"""Times on the device: what torch reaches at most; every op beside its peers, forward, and with backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import gpu_formulas as formulas
import torch

from benchmarks.harness import machine, passes, timing
from benchmarks.harness.judging import OTHER_NUMBERS, different, result, right
from benchmarks.harness.passes import BOTH, FORWARD
from benchmarks.harness.peers import Absent, compiled
from gpu.case_rows import brief, unusable
from gpu.contenders import OPS, PROBLEMS, SIZES, Problem
from gpu.device import Device, device_of
from gpu.record import PASSED, WRONG, Row
from gpu.worker import Question
from grokkernels.testing.cases import tables

SECONDS = 0.25  # for each contender
ROUNDS = (5, 100)  # calls that are timed, at least and at most
Answer = tuple[str, str, dict[str, Any]]


@lru_cache(maxsize=1)
def problem(op: str, index: int, size: int, device: str, home: str) -> Problem:
    """The last one asked for alone: they fill much of a GPU's memory."""
    with torch.device(home):
        return PROBLEMS[op][index](SIZES[device][size])


@lru_cache(maxsize=4)
def judged(op: str, column: str) -> str | None:
    """What the float64 rule has against the smallest case of an op's table; None: nothing."""
    table = tables()[op]
    try:
        right(table, *brief(table), column)()
    except AssertionError as error:
        return str(error)
    return None


@lru_cache(maxsize=2)
def peers(op: str, index: int, size: int, device: str, home: str, direction: str) -> dict[str, float | str]:
    """Each peer's median seconds, or why it is absent."""
    one = problem(op, index, size, device, home)
    expected = result(passes.call(one.ours(_first_column(device)), one.tensors, direction))
    functions = dict(one.peers)
    for name, function in one.compiled.items():
        # Compiling takes longer than all else: at one size.
        functions[name] = compiled(function) if device == "cuda" and size == 0 else Absent("left out at this size")
    return {name: _peer(function, one, direction, expected, device) for name, function in functions.items()}


def _first_column(device: str) -> str:
    return "cuda" if device == "cuda" else "emulated"


def _peer(function: Any, one: Problem, direction: str, expected: list[torch.Tensor], device: str) -> float | str:
    if isinstance(function, Absent):
        return function.reason
    if direction == BOTH and getattr(function, "forward_only", False):
        return "it has no backward"
    try:
        call = passes.call(function, one.tensors, direction)
        reason = different(result(call), expected)
        return median(call, device) if reason is None else reason
    except Exception as error:  # a peer's failure is no failure of ours: it is told
        return f"{type(error).__name__}: {error}"[:300]


def wrong_beside(others: dict[str, float | str]) -> str | None:
    """What it means when no peer has the numbers that ours has, at the size that is timed; None: one has."""
    answers = [value for value in others.values() if isinstance(value, float) or value.startswith(OTHER_NUMBERS)]
    if answers and all(isinstance(value, str) for value in answers):
        return f"every peer that runs gives other numbers: {answers[0]}"
    return None


def median(call: Callable[[], object], device: str) -> float:
    """Seconds of a call, warm but for the second-level cache; of one call alone on the stand-in."""
    if device == "stand-in":
        return timing.time_of(call, 1)
    call()
    rounds = int(min(ROUNDS[1], max(ROUNDS[0], SECONDS / max(timing.time_of(call, 1), 1e-6))))
    with timing.undisturbed():
        return timing.time_of(call, rounds)


def model() -> formulas.Device:
    """The GPU that the model knows by a name like this one's; the stand-in is held against an H200."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H200"
    return next((found for key, found in formulas.DEVICES.items() if key in name), formulas.DEVICES["H200"])


def asked(
    device: Device, ceilings: dict[str, float], column: str, at: tuple[str, int, int], direction: str
) -> Callable[[], Answer]:
    def ask() -> Answer:
        one = problem(*at, device.name, device.home)
        if direction not in one.cost:
            return PASSED, "nothing to differentiate", {}
        seconds = median(passes.call(one.ours(column), one.tensors, direction), device.name)
        moved, flops = one.cost[direction]
        limit = max(moved / ceilings["copy"], flops / ceilings["product"])
        works = one.predicted.get(direction)
        others = peers(*at, device.name, device.home, direction)
        timed = {name: value for name, value in others.items() if isinstance(value, float)}
        fault = judged(one.op, column) or wrong_beside(others)
        best = min(timed, key=timed.__getitem__, default=None)
        return (
            PASSED if fault is None else WRONG,
            fault or "",
            {
                "shape": one.shape,
                "direction": direction,
                "dtype": passes.word(one.dtype),
                "column": column,
                "seconds_ours": seconds,
                "share": limit / seconds,
                "best_peer": best,
                "seconds_peer": None if best is None else timed[best],
                "ratio": None if best is None else timed[best] / seconds,
                "seconds_predicted": None if works is None else sum(work.seconds(model()) for work in works),
                "peers": timed,
                "absent": {name: value for name, value in others.items() if isinstance(value, str)},
            },
        )

    return ask


def measured(device: Device) -> dict[str, float]:
    """What torch's copy moves (bytes/s, both directions counted) and its product of matrices does (FLOP/s)."""
    if device.name == "cuda":
        limits = machine.limits()
        return {"copy": limits.copy, "product": limits.flops["bfloat16"], "product float32": limits.flops["float32"]}
    source, side = torch.empty(1 << 20, dtype=torch.uint8), torch.randn(128, 128)
    began = time.perf_counter()
    source.clone()
    copied = time.perf_counter()
    side @ side
    return {"copy": 2 * source.numel() / (copied - began), "product": 2 * 128**3 / (time.perf_counter() - copied)}


def rows(spec: dict[str, Any], say: Callable[..., None]) -> Iterator[Question]:
    device = device_of(spec)
    torch.set_num_threads(1 if device.name == "stand-in" else torch.get_num_threads())
    if spec["kind"] == "ceiling":

        def ask() -> Answer:
            found = measured(device)
            say(facts={f"ceiling, {name}": f"{value / 1e12:.4g} T/s" for name, value in found.items()})
            return PASSED, "", found

        yield Question(Row("ceiling", "torch", device.name, "copy, product"), ask)
        return
    refused = {column: unusable("speed", column, ",".join(spec["ops"])) for column in device.columns()}
    yield from (question for question in refused.values() if question is not None)
    columns = [column for column, question in refused.items() if question is None]
    ceilings = measured(device)
    for op in spec["ops"]:
        for index, make in enumerate(PROBLEMS[op]):
            for turn, size in enumerate(SIZES[device.name]):
                for direction in (FORWARD, BOTH):
                    for column in columns:
                        case = f"{size.name}, {make.__name__}, {direction}"
                        row = Row("speed", OPS.get(make.__name__, make.__name__), column, case)
                        yield Question(row, asked(device, ceilings, column, (op, index, turn), direction))
