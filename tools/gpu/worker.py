"""A process of the engine: asks the rows of one job, one after another, and says so in a pipe (see engine.py).

python tools/gpu/worker.py FD     FD: where it speaks; the job's spec, JSON, on standard input
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from gpu.engine import POISONED  # noqa: E402
from gpu.record import ERROR, Row  # noqa: E402

_PR_SET_PDEATHSIG = 1  # of Linux's prctl

# Where the rows of a kind come from: rows(spec, say) of the module gpu.<this>, or serve(spec, say), which asks too.
KINDS = {
    "build": "building",
    "conformance": "conformance_rows",
    "float64 rule": "case_rows",
    "tests": "pytest_rows",
    "sanitizer": "sanitizer_rows",
    "stream": "stream_rows",
    "training": "training_rows",
    "ceiling": "speed_rows",
    "speed": "speed_rows",
    "ncu": "ncu_rows",
}


@dataclass(frozen=True)
class Question:
    """A row to be asked. `ask` gives the row's kind, its words, and data for the record."""

    row: Row
    ask: Callable[[], tuple[str, str, dict[str, Any]]]


def end_with_parent() -> None:
    """Where the process that watches is killed, nothing goes on in its name (Linux alone)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def lost() -> bool:
    """Whether this process has a GPU context that answers no more: after some errors every call fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def answered(question: Question) -> Row:
    row = question.row
    try:
        row.kind, row.words, row.data = question.ask()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # an error of this row's kernels is this row's
    except Exception as error:
        row.kind, row.words = ERROR, f"{type(error).__name__}: {error}"
    return row


def main() -> None:
    end_with_parent()
    spec = json.load(sys.stdin)
    os.set_inheritable(int(sys.argv[1]), False)  # closed with this process, whatever it has started
    with os.fdopen(int(sys.argv[1]), "w", buffering=1, encoding="utf-8") as pipe:

        def say(**words: Any) -> None:
            pipe.write(json.dumps(words) + "\n")

        module = import_module(f"gpu.{KINDS[spec['kind']]}")
        if hasattr(module, "serve"):
            module.serve(spec, say)
            return
        questions: Iterable[Question] = module.rows(spec, say)
        left = [question for question in questions if question.row.key not in spec["done"]]
        say(plan=[asdict(question.row) for question in left])
        for question in left:
            say(begin=question.row.key)
            row = answered(question)
            say(row=asdict(row))
            if row.kind == ERROR and lost():
                os._exit(POISONED)
        say(end=True)


if __name__ == "__main__":
    main()
