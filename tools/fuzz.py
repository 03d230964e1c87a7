"""Calls of every op with drawn sizes, options, dtypes, layouts and magnitudes, each judged against float64.

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
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402

from grokkernels import dispatch, native  # noqa: E402
from grokkernels.testing import judge  # noqa: E402
from grokkernels.testing.case import Arguments, Case, Table  # noqa: E402
from grokkernels.testing.cases import tables  # noqa: E402
from grokkernels.testing.fences import LAYOUTS  # noqa: E402

SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 80, 96, 100, 127, 128, 129, 200, 257)
# Elements of all arguments of a call together.
LARGEST = {"cpu": 60_000, "reference": 60_000, "emulated": 6_000, "triton": 1_500}
SECONDS_OF_A_CALL = 600
SCALES = (1.0,) * 8 + (2.0**-12, 2.0**-6, 2.0**6, 2.0**12)


@dataclass(frozen=True)
class Call:
    table: Table
    case: Case
    dtype: torch.dtype
    layout: str | dict[str, str]

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
            arguments = judge.in_dtype(case.arguments(), dtype)
            tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
            if sum(t.numel() for t in tensors.values()) > LARGEST[backend]:
                continue
            layout: str | dict[str, str] = rng.choice(LAYOUTS)
            if rng.random() < 0.6:  # each tensor in a layout of its own
                names = [*tensors, *(f"cotangent {i}" for i in range(4))]
                layout = {name: rng.choice(["fenced", "misaligned", f"drawn {rng.random()}"]) for name in names}
            _, oracle, _ = judge.run(table.reference, judge.in_float64(arguments), table.grad, None)
            outputs, gradients, cotangents = judge.run(table.reference, arguments, table.grad, None)
            finite = all(t.isfinite().all() for t in [*outputs, *gradients] if t is not None)
            if scale != 1.0 and not finite:
                continue  # the reference overflows itself
            if not cotangents and any(name in tensors for name in table.grad):
                continue  # a sum of no terms: PyTorch derives nothing from it, and there is no gradient to compare with
            if any(map(nothing_but_cancellation, gradients, oracle)):
                continue
            table.op(**arguments, backend="reference")
        except (TypeError, ValueError, AssertionError, RuntimeError, IndexError, ZeroDivisionError):
            continue  # sizes and options that do not go together
        return Call(table, case, dtype, layout)


def nothing_but_cancellation(low: torch.Tensor | None, oracle: torch.Tensor | None) -> bool:
    """Whether most numbers of the reference's gradient, zeros apart, have no digit right: they err by more than all.

    Then terms that cancel are all there is (the norm of a single column is +-1 whatever x is), and the rule would
    compare how the reference and the kernel happen to round them.
    """
    if low is None or oracle is None:
        return False
    wrong = (low.double() - oracle).abs() > oracle.abs()
    return bool(wrong[low != 0].double().mean() > 0.5)


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


def worker(ops: list[str], backend: str, level: str | None, seeds: range) -> None:
    """Judges the calls of these seeds, each of every op, and prints a line before and after each."""
    torch.set_num_threads(2)
    with judge.at_level(level):
        for number in seeds:
            seed, op = divmod(number, len(ops))
            print(json.dumps({"number": number}), flush=True)
            print(json.dumps({"number": number, "fault": fault_of(ops[op], backend, seed)}), flush=True)


def fault_of(op: str, backend: str, seed: int) -> str | None:
    """What is wrong with the call of this seed; None if nothing is."""
    call = drawn(op, backend, seed)
    try:
        verdict = judge.settled(call.table, call.case, call.dtype, backend, call.layout)
    except Exception as error:  # whatever a kernel raises is a fault, and is reported
        if isinstance(error, ValueError) and f"cannot run on backend '{backend}'" in str(error):
            return None  # refused in words
        return f"{call}: {type(error).__name__}: {error}"
    return None if verdict.passed else f"{call}: {verdict.where} is {verdict.ratio:.3g} times what is allowed"


def columns(backend: str | None, level: str | None, op: str | None) -> dict[tuple[str, str | None], list[str]]:
    """The ops of each (backend, level) that is asked for and runs on this machine."""
    found: dict[tuple[str, str | None], list[str]] = {}
    for name, table in tables().items():
        supports = dispatch.ROWS[table.name].supports
        for column in ("cpu", "emulated", "triton"):
            needed = "cuda" if column == "emulated" else column
            built = native.emulated is not None or column != "emulated"
            if needed in supports and built and op in (None, name) and backend in (None, column):
                for one in judge.levels(table, column):
                    if level in (None, one):
                        found.setdefault((column, one), []).append(name)
    return found


def run(
    ops: list[str], backend: str, level: str | None, numbers: range, until: float
) -> Iterator[tuple[int, str | None]]:
    """(number, fault) of calls in a process, begun anew after one that dies. Call n is of op n % len(ops)."""
    first = numbers.start
    while first < numbers.stop and time.monotonic() < until:
        command = [sys.executable, __file__, "--worker", ",".join(ops), "--backend", backend, "--seed", str(first)]
        command += ["--calls", str(numbers.stop - first), *(["--level", level] if level else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            at = begun = first
            while first < numbers.stop and (time.monotonic() < until or begun == first):
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
    parser.add_argument("--backend", choices=("cpu", "emulated", "triton"))
    parser.add_argument("--level", help="an instruction-set level, or sm_80 and sm_90 of the emulated device")
    parser.add_argument("--calls", type=int, default=20, help="of each op on each backend and level")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all together")
    parser.add_argument("--seed", type=int, default=0, help="the first; the calls that follow have the next ones")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker.split(","), given.backend, given.level, range(given.seed, given.seed + given.calls))
        return 0
    found = columns(given.backend, given.level, given.op)
    if not found:
        parser.error("nothing on this machine is that op, backend and level")
    began, calls, faults = time.monotonic(), 0, 0
    for i, ((backend, level), ops) in enumerate(found.items()):
        left = given.seconds - (time.monotonic() - began)
        numbers = range(given.seed * len(ops), (given.seed + given.calls) * len(ops))
        made = 0
        for number, fault in run(ops, backend, level, numbers, time.monotonic() + left / (len(found) - i)):
            made += 1
            if fault is not None:
                faults += 1
                seed, op = divmod(number, len(ops))
                at = f"--op {ops[op]} --backend {backend}" + (f" --level {level}" if level else "")
                print(f"python tools/fuzz.py {at} --seed {seed} --calls 1\n    {fault}", flush=True)
        calls += made
        print(f"{backend} {level or ''}: {made} calls of {len(ops)} ops from seed {given.seed}", flush=True)
    print(f"{calls} calls, {faults} failures, {time.monotonic() - began:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
