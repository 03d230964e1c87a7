"""Calls of every op with drawn sizes, options, dtypes, layouts and magnitudes, each judged against float64.

    python tools/fuzz.py                    every op on every backend and level of this machine, some calls of each
    python tools/fuzz.py --times 10         ten times as many
    python tools/fuzz.py --backend cpu --level avx2 --op rms_norm --calls 500 --seed 7

A call is drawn from its seed alone: from a case of the op's table, whose sizes and options are changed (every
function that makes cases takes part: grokkernels.testing.case.builder). What the contract refuses on the reference is
drawn anew.
The judge is that of the tables, `grokkernels.testing.judge.settled`: a failure within reach of luck is judged again on
eight other draws of the numbers. Calls run in a process of their own: one that crashes or hangs is a failure too. Each
failure is printed with the command that repeats it; the exit status is 1 if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from grokkernels import dispatch, native  # noqa: E402
from grokkernels.testing import judge  # noqa: E402
from grokkernels.testing.case import Arguments, Case, Table  # noqa: E402
from grokkernels.testing.cases import tables  # noqa: E402
from grokkernels.testing.fences import LAYOUTS  # noqa: E402

SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 80, 96, 100, 127, 128, 129, 200, 257)
# Elements of all arguments of a call together.
LARGEST = {"cpu": 60_000, "reference": 60_000, "emulated": 6_000, "triton": 1_500}
# Calls of each op on each level, where none are given: half a minute together.
CALLS = {"cpu": 80, "emulated": 30, "triton": 8}
SECONDS_OF_A_CALL = 600
SCALES = (1.0,) * 8 + (2.0**-12, 2.0**-6, 2.0**6, 2.0**12)


@dataclass(frozen=True)
class Call:
    table: Table
    case: Case
    dtype: torch.dtype
    layout: str | dict[str, str]
    scale: float

    def __str__(self) -> str:
        return f"{self.case.name}, {str(self.dtype).removeprefix('torch.')}, layout {self.layout}"


def drawn(op: str, backend: str, seed: int) -> Call:
    """The call of this seed."""
    rng, table = random.Random(f"{op} {backend} {seed}"), tables()[op]
    while True:
        case = _drawn_case(table, rng)
        dtype = rng.choice(table.dtypes)
        scale = rng.choice(SCALES)
        try:
            case = _scaled(case, scale, seed)
            with _NothingLarge(4 * LARGEST[backend]):
                arguments = judge.in_dtype(case.arguments(), dtype)
            tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
            if sum(t.numel() for t in tensors.values()) > LARGEST[backend]:
                continue
            layout: str | dict[str, str] = rng.choice(LAYOUTS)
            if rng.random() < 0.6:  # each tensor in a layout of its own
                names = [*tensors, *(f"cotangent {i}" for i in range(4))]
                layout = {name: _layout(rng) for name in names}
            call = Call(table, case, dtype, layout, scale)
            if well_posed(call, case.arguments()):
                table.op(**arguments, backend="reference")
                return call
        except (TypeError, ValueError, AssertionError, RuntimeError, IndexError, ArithmeticError):
            continue  # sizes and options that do not go together


def well_posed(call: Call, arguments: Arguments) -> bool:
    """Whether every right kernel passes the call with these numbers, by what the reference makes of them."""
    table, hold = call.table, judge.holding(call.layout)
    given = judge.in_dtype(arguments, call.dtype)
    arguments = {name: hold(name, value) for name, value in given.items()}
    shared = [name for name, value in given.items() if arguments[name] is not value]
    outputs, gradients, cotangents = judge.run(table.reference, arguments, table.grad, None, hold)
    finite = all(t.isfinite().all() for t in [*outputs, *gradients] if t is not None)
    if call.scale != 1.0 and not finite:
        return False  # the reference overflows itself
    if not cotangents and any(isinstance(given.get(name), torch.Tensor) for name in table.grad):
        return False  # a sum of no terms: PyTorch derives nothing from it, and there is no gradient to compare with
    oracle, precise, _ = judge.run(table.reference, judge.in_float64(arguments), table.grad, None, hold)
    if any(map(nothing_but_cancellation, gradients, precise)) or any(map(left_to_rounding, outputs, oracle)):
        return False
    return not (shared and hangs_on_equality(table, arguments, shared, hold))


def _posed(call: Call) -> Case:
    """The call's case, of which each draw is well posed where one of ten tries is."""

    def build(generator: torch.Generator) -> Arguments:
        for n in range(10):
            arguments = call.case.build(torch.Generator().manual_seed(generator.initial_seed() + 10_000_000 * n))
            if well_posed(call, arguments):
                break
        return arguments

    return Case(call.case.name, build)


def nothing_but_cancellation(low: torch.Tensor | None, oracle: torch.Tensor | None) -> bool:
    """Whether most numbers of the reference's gradient, zeros apart, have no digit right: they err by more than all.

    Then terms that cancel are all there is (the norm of a single column is +-1 whatever x is), and the rule would
    compare how the reference and the kernel happen to round them. So it is where they cancel to the bit, all of them
    (logits of words that are all the same), and in float64 do not.
    """
    if low is None or oracle is None:
        return False
    wrong = (low.double() - oracle).abs() > oracle.abs()
    return bool(wrong[low != 0].double().mean() > 0.5 if low.any() else oracle.any())


def left_to_rounding(low: torch.Tensor, oracle: torch.Tensor) -> bool:
    """Whether integers of the reference in its dtype are not those in float64: two scores as good as equal, of which
    rounding makes one the larger. A right kernel may round otherwise."""
    return not low.is_floating_point() and not torch.equal(low, oracle)


def hangs_on_equality(table: Table, arguments: Arguments, shared: list[str], hold: Callable[[str, Any], Any]) -> bool:
    """Whether a gradient is what is left where terms cancel because numbers share places, and so are the same.

    A kernel rounds the terms to the dtype, which the reference does not; so the rule would compare what is left of
    them with nothing. It is found in float64: the numbers are moved by half an ulp or less, once as they share places
    and once each for itself, which must not matter 32 times as much.
    """
    exact = judge.in_float64(arguments)
    halves = {name: torch.finfo(arguments[name].dtype).eps / 2 for name in shared}

    def moved(how: Callable[[str, Any], Any]) -> list[torch.Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        noise = {
            name: torch.rand(exact[name].shape, generator=generator, dtype=torch.float64) * 2 - 1 for name in shared
        }
        others = {name: exact[name] * (1 + halves[name] * how(name, noise[name])) for name in shared}
        return judge.run(table.reference, {**exact, **others}, table.grad, None, hold)[1]

    still = judge.run(table.reference, exact, table.grad, None, hold)[1]
    for one, together, apart in zip(still, moved(hold), moved(lambda name, noise: noise), strict=True):
        if one is not None and together is not None and apart is not None:
            least = torch.maximum((together - one).norm(), one.norm() * max(halves.values()))
            if (apart - one).norm() > 32 * least:
                return True
    return False


def _layout(rng: random.Random) -> str:
    """How one tensor lies: offsets beyond 2^31 in one of fifty."""
    return rng.choices(["fenced", "misaligned", f"drawn {rng.random()}", f"far {rng.random()}"], [16, 16, 17, 1])[0]


class _NothingLarge(TorchDispatchMode):
    """Refuses to make a tensor of more elements, before it is made: most of the time of drawing went there."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self._elements = elements

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shape = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        if all(isinstance(size, int) for size in shape) and math.prod(shape) > self._elements:
            raise ValueError(f"{shape} is too large")
        return function(*args, **(kwargs or {}))


def _drawn_case(table: Table, rng: random.Random) -> Case:
    """A case of the table with some of its sizes and options drawn anew."""
    calls = [case.call for case in table.cases if case.call is not None]
    while True:
        make, sizes, options = rng.choice(calls)
        _, _, others = rng.choice(calls)
        options = dict(options)
        for key in sorted({*options, *others} - {"why"}):
            if key in others and rng.random() < 0.3:
                options[key] = others[key]
            if key in options:
                options[key] = _changed(options[key], rng, 0.2)
        options.pop("why", None)
        with contextlib.suppress(TypeError, ValueError, AssertionError, ZeroDivisionError):
            return make(*(_changed(size, rng, 0.5) for size in sizes), **options)


def _changed(value: Any, rng: random.Random, chance: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_changed(part, rng, chance) for part in value)
    if isinstance(value, bool):
        return value != (rng.random() < chance)
    if rng.random() >= chance:
        return value
    if isinstance(value, int):
        return max(value + rng.choice([-1, 1]), 0) if rng.random() < 0.3 else rng.choice(SIZES)
    return value * rng.uniform(0.5, 1.5) if isinstance(value, float) else value


def _scaled(case: Case, scale: float, seed: int) -> Case:
    """The case with other numbers: of this seed, and this many times as large."""

    def build(generator: torch.Generator) -> Arguments:
        arguments = case.build(generator.manual_seed(generator.initial_seed() + 1000 * seed))
        floats = (k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.dtype == torch.float64)
        return {**arguments, **{name: arguments[name] * scale for name in floats}}

    return Case(case.name + (f" times {scale:g}" if scale != 1.0 else ""), build)


@dataclass(frozen=True)
class Place:
    """Where a call of an op runs."""

    op: str
    backend: str
    level: str | None  # of the CPU, or the emulated architecture

    @property
    def column(self) -> str:
        return f"{self.backend} {self.level or ''}".strip()


def planned(given: argparse.Namespace) -> list[tuple[Place, int]]:
    """The calls, each with its seed: every column has made the same share of its own at any time."""
    found = []
    for name, table in tables().items():
        supports = dispatch.ROWS[table.name].supports
        for backend in CALLS:
            needed = "cuda" if backend == "emulated" else backend
            built = native.emulated is not None or backend != "emulated"
            if needed in supports and built and given.op in (None, name) and given.backend in (None, backend):
                calls = given.calls if given.calls is not None else CALLS[backend] * given.times
                for level in judge.levels(table, backend):
                    if given.level in (None, level):
                        found += [(n / calls, Place(name, backend, level), given.seed + n) for n in range(calls)]
    return [(place, seed) for _, place, seed in sorted(found, key=lambda one: one[0])]


def worker(calls: list[tuple[Place, int]], first: int) -> None:
    """Judges the calls from the `first`, and prints a line before and after each."""
    torch.set_num_threads(2)
    for number in range(first, len(calls)):
        place, seed = calls[number]
        print(json.dumps({"number": number}), flush=True)
        with judge.at_level(place.level):
            fault = fault_of(place.op, place.backend, seed)
        print(json.dumps({"number": number, "fault": fault}), flush=True)


def fault_of(op: str, backend: str, seed: int) -> str | None:
    """What is wrong with the call of this seed; None if nothing is."""
    call = drawn(op, backend, seed)
    try:
        verdict = judge.settled(call.table, call.case, call.dtype, backend, call.layout)
    except Exception as error:  # whatever a kernel raises is a fault, and is reported
        if isinstance(error, ValueError) and f"cannot run on backend '{backend}'" in str(error):
            return None  # refused in words
        return f"{call}: {type(error).__name__}: {error}"
    if not verdict.passed:  # by draws after the first, maybe, that are not what was looked at
        verdict = judge.settled(call.table, _posed(call), call.dtype, backend, call.layout)
    return None if verdict.passed else f"{call}: {verdict.where} is {verdict.ratio:.3g} times what is allowed"


def run(calls: int, until: float) -> Iterator[tuple[int, str | None]]:
    """(number, fault) of calls in a process, begun anew after one that dies."""
    first = 0
    while first < calls and time.monotonic() < until:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            at = begun = first
            while first < calls and (time.monotonic() < until or begun == first):
                ready, _, _ = select.select([process.stdout], [], [], SECONDS_OF_A_CALL)
                line = process.stdout.readline() if ready else b""
                if not line:
                    process.kill()
                    words = f"ends the process, {process.wait()}" if ready else f"hangs for {SECONDS_OF_A_CALL} s"
                    yield at, words
                    first = at + 1
                    break
                said = json.loads(line)
                at = said["number"]
                begun = at
                if "fault" in said:
                    yield at, said["fault"]
                    first = at + 1
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(tables()))
    parser.add_argument("--backend", choices=tuple(CALLS))
    parser.add_argument("--level", help="an instruction-set level, or sm_80 and sm_90 of the emulated device")
    parser.add_argument("--calls", type=int, help=f"of each op on each backend and level; when not given, {CALLS}")
    times = int(os.environ.get("GROKKERNELS_FUZZ", "1"))
    parser.add_argument("--times", type=int, default=times, help="as many; $GROKKERNELS_FUZZ when not given")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all together")
    parser.add_argument("--seed", type=int, default=0, help="the first; the calls that follow have the next ones")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    calls = planned(given)
    if given.worker is not None:
        worker(calls, given.worker)
        return 0
    if not calls:
        parser.error("nothing on this machine is that op, backend and level")
    began = time.monotonic()
    made, faults = Counter[str](), Counter[str]()
    for number, fault in run(len(calls), began + given.seconds):
        place, seed = calls[number]
        made[place.column] += 1
        if fault is not None:
            faults[place.column] += 1
            at = f"--op {place.op} --backend {place.backend}" + (f" --level {place.level}" if place.level else "")
            print(f"python tools/fuzz.py {at} --seed {seed} --calls 1\n    {fault}", flush=True)
    for column, count in made.items():
        print(f"{column}: {count} calls, {faults[column]} failures")
    print(f"{made.total()} calls, {faults.total()} failures, {time.monotonic() - began:.0f} s")
    return 1 if faults.total() else 0


if __name__ == "__main__":
    sys.exit(main())
