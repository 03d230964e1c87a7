"""Judges what takes longer than `make test` may, and keeps a ledger of it.

    python tools/judge.py                 what CI does: every unit that the ledger does not know as it is now, and a
                                          tenth of the others, drawn by the commit; the ledger stays as it is
    python tools/judge.py --write         every unit that the ledger does not know; those that pass are written down
    python tools/judge.py --all           every unit, whatever the ledger says; the ledger is written anew
    python tools/judge.py ptx/rms_norm    those whose names begin so;  --list prints them and judges nothing

A unit is a kernel's build held to its budget, a kernel as PTX, a planted bug, an op under a sanitizer, and so on
(tools/judging/units.py). Its hash covers the command, the releases of the compilers and all files that the verdict
hangs on (tools/judging/dependencies.py). docs/judging.md says what this promises and what not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from judging import ledger
from judging.dependencies import ROOT
from judging.ledger import Unit
from judging.units import PYTHON, every

LIMIT = 1800  # seconds for one unit


@dataclass(frozen=True)
class Verdict:
    """What came of a unit."""

    unit: Unit
    passed: bool
    seconds: float
    output: str


def judge(unit: Unit) -> Verdict:
    """Runs the unit's command in this tree."""
    began = time.monotonic()
    words = [sys.executable if word == PYTHON else word for word in unit.command]
    environment = {**os.environ, **unit.environment}
    try:
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LIMIT,
            check=False,
        )
        passed, output = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        passed, output = False, f"{error.stdout or ''}\nnot done after {LIMIT} s"
    return Verdict(unit, passed, time.monotonic() - began, output)


def commit() -> str:
    """What draws: the commit, or that of nobody in a tree without git."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def judge_all(units: list[Unit], jobs: int, *, record: bool) -> list[Verdict]:
    """`jobs` at a time, a line for each as it ends; it is written down then."""
    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(judge, unit) for unit in units]):
            verdict = done.result()
            verdicts.append(verdict)
            if record:
                ledger.record(verdict.unit, verdict.passed)
            print(f"{'passed' if verdict.passed else 'FAILED'} {verdict.unit.name} {verdict.seconds:.0f} s", flush=True)
            if not verdict.passed:
                print(verdict.output[-6000:], flush=True)
    return verdicts


def chosen(options: argparse.Namespace, known: list[Unit], judged: dict[str, str]) -> tuple[list[Unit], list[Unit]]:
    """The units to judge because the ledger does not know them, and because they were drawn."""
    known = [unit for unit in known if not options.units or unit.name.startswith(tuple(options.units))]
    if options.all:
        return known, []
    drawn = [] if options.write else ledger.drawn(known, judged, options.draw or commit())
    return ledger.missing(known, judged), drawn


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("units", nargs="*", help="only units whose names begin with one of these")
    parser.add_argument("--write", action="store_true", help="judge what the ledger does not know, and write it down")
    parser.add_argument("--all", action="store_true", help="judge everything, and write the ledger anew")
    parser.add_argument("--draw", help="what draws the tenth; the commit when not given")
    parser.add_argument("--list", action="store_true", help="print what would be judged")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="units at a time")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    known, judged = every(), ledger.read()
    unknown, drawn = chosen(options, known, judged)
    draw = options.draw or commit()
    print(f"{len(known)} units; {len(unknown)} to judge, {len(drawn)} of the others drawn by {draw}")
    if options.list:
        for unit in unknown + drawn:
            print(unit.name)
        return 0
    for unit in drawn:
        print(f"drawn {unit.name}")
    began = time.monotonic()
    if options.write or options.all:  # units that are no more
        names = {unit.name for unit in known}
        ledger.write({name: hash_ for name, hash_ in ledger.read().items() if name in names})
    verdicts = judge_all(unknown + drawn, options.jobs, record=options.write or options.all)
    failed = [verdict.unit.name for verdict in verdicts if not verdict.passed]
    print(f"{len(verdicts) - len(failed)} passed, {len(failed)} failed, {time.monotonic() - began:.0f} s")
    for name in failed:
        print(f"FAILED {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
