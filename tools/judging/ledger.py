"""The ledger: the hash under which each unit was last judged and passed. tools/judging/ledger.tsv, a line per unit."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from judging.dependencies import ROOT

LEDGER = Path(__file__).with_name("ledger.tsv")
# One in so many of the units that the ledger calls judged is judged again by every run of CI. A line that should not
# be there is drawn by 44 runs with a chance of 99 in 100.
DRAW = 10


@dataclass(frozen=True)
class Unit:
    """One piece of judging: a command that exits with 0 where all is well, and everything that its verdict hangs on.

    `name` is "kind/which". `files` are what the command reads of the tree, `facts` what is no file: releases of
    compilers, the lines of a budget that concern it.
    """

    name: str
    command: tuple[str, ...]
    files: frozenset[Path]
    facts: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    def hash(self) -> str:
        """Over the command, the facts, and the names and contents of the files."""
        lines = [self.name, *self.command, *self.facts, *(f"{k}={v}" for k, v in sorted(self.environment.items()))]
        lines += [f"{path.relative_to(ROOT).as_posix()} {content_hash(path)}" for path in sorted(self.files)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


_contents: dict[Path, str] = {}


def content_hash(path: Path) -> str:
    if path not in _contents:
        _contents[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _contents[path]


def read(path: Path = LEDGER) -> dict[str, str]:
    """Unit -> hash."""
    if not path.exists():
        return {}
    return dict(line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line)


def write(judged: dict[str, str], path: Path = LEDGER) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{name}\t{hash_}\n" for name, hash_ in sorted(judged.items()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def record(unit: Unit, passed: bool, path: Path = LEDGER) -> None:
    """Writes down what came of a unit: its hash, or nothing. Several may judge at a time."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        judged = read(path)
        judged.pop(unit.name, None)
        write(judged | ({unit.name: unit.hash()} if passed else {}), path)


def is_drawn(name: str, draw: str) -> bool:
    """Whether a unit is among the tenth that `draw` (a commit) picks."""
    return int.from_bytes(hashlib.sha256(f"{draw} {name}".encode()).digest()[:4], "big") % DRAW == 0


def missing(units: Iterable[Unit], judged: dict[str, str]) -> list[Unit]:
    """The units that the ledger does not know as they are now."""
    return [unit for unit in units if judged.get(unit.name) != unit.hash()]


def drawn(units: Iterable[Unit], judged: dict[str, str], draw: str) -> list[Unit]:
    """Of the others, the tenth that is judged again."""
    return [unit for unit in units if judged.get(unit.name) == unit.hash() and is_drawn(unit.name, draw)]
