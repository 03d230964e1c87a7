"""What a phase has found out: rows, kept in a JSON file that is whole after every one of them."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# What can become of a row. "absent": it cannot be asked here, and the words say why; "not reached": time ran out.
PASSED, WRONG, ERROR, CRASHED, HUNG, ABSENT, NOT_REACHED = KINDS = (
    "passed",
    "wrong",
    "error",
    "crashed",
    "hung",
    "absent",
    "not reached",
)
FAILURES = (WRONG, ERROR, CRASHED, HUNG)


@dataclass
class Row:
    """One question and its answer. `where` names the column, the architecture, the dtype: whatever tells rows apart."""

    check: str
    op: str
    where: str
    case: str
    kind: str = NOT_REACHED
    words: str = ""
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return " | ".join((self.check, self.op, self.where, self.case))

    @property
    def name(self) -> str:
        """The key as a reader wants it."""
        return ", ".join(part for part in (self.op, self.check, self.where, self.case) if part)


def write(path: Path, text: str) -> None:
    """A whole file, by way of a temporary name: whoever is killed at any moment leaves the one or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
    os.replace(temporary, path)


class Record:
    """The rows of one phase, its log beside them, and the report that they make."""

    def __init__(self, phase: str, device: str, out: Path) -> None:
        self.phase, self.device, self.out = phase, device, out
        self.rows: dict[str, Row] = {}
        self.facts: dict[str, Any] = {}
        self._lines: dict[str, str] = {}
        self._began = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        self._log = (out / f"{phase}.log").open("w", encoding="utf-8", buffering=1)
        self._write()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def say(self, words: str) -> None:
        """A line for the log and for whoever looks on."""
        line = f"{self.seconds:6.1f} {words}"
        self._log.write(line + "\n")
        print(line, flush=True)

    def log(self, words: str) -> None:
        """A line for the log alone."""
        self._log.write(f"{self.seconds:6.1f} {words}\n")

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        self._lines[row.key] = json.dumps(asdict(row))
        shown = f"{row.kind:<11} {row.name}" + (f": {row.words}" if row.words else "")
        self.log(shown) if row.kind in (PASSED, NOT_REACHED) else self.say(shown)
        self._write()

    def tell(self, facts: dict[str, Any]) -> None:
        self.facts.update(facts)
        self._write()

    def _write(self) -> None:
        """The rows are put into words once each: a phase has thousands."""
        head = {"phase": self.phase, "device": self.device, "seconds": round(self.seconds, 1), "facts": self.facts}
        rows = ",\n".join(self._lines.values())
        write(self.out / f"{self.phase}.json", f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n')

    def failures(self) -> list[Row]:
        return [row for row in self.rows.values() if row.kind in FAILURES]

    def summary(self) -> str:
        """One line: how many of each kind, and each failure by its op and kind."""
        counts = Counter(row.kind for row in self.rows.values())
        words = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
        named = Counter(f"{row.op} {row.kind} ({row.check}, {row.where})" for row in self.failures())
        failed = "; ".join(name + (f" x{count}" if count > 1 else "") for name, count in named.items())
        return f"{self.phase}: {words or 'nothing asked'}" + (f". FAILED: {failed}" if failed else "")

    def finish(self) -> bool:
        """Writes the report and says the summary; whether every row that could be asked has passed."""
        self._write()
        write(self.out / f"{self.phase}.md", self.report())
        self.say(self.summary())
        return all(row.kind in (PASSED, ABSENT) for row in self.rows.values())

    def report(self) -> str:
        lines = [f"# {self.phase} on {self.facts.get('GPU', self.device)}", "", self.summary() + ".", ""]
        lines += ["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in self.facts.items()), ""]
        for title, kinds in (("Failed", FAILURES), ("Absent", (ABSENT,)), ("Not reached", (NOT_REACHED,))):
            found = [row for row in self.rows.values() if row.kind in kinds]
            if found:
                lines += [f"## {title}", "", "| op | kind | check | where | case | what |", "|---|---|---|---|---|---|"]
                lines += [
                    f"| {row.op} | {row.kind} | {row.check} | {row.where} | {cell(row.case)} | {cell(row.words)} |"
                    for row in found
                ]
                lines.append("")
        lines += self._counts() + self._times() + self._paths()
        return "\n".join(lines) + "\n"

    def _counts(self) -> list[str]:
        table: dict[tuple[str, str], Counter[str]] = {}
        for row in self.rows.values():
            table.setdefault((row.check, row.op), Counter())[row.kind] += 1
        kinds = [kind for kind in KINDS if any(counts[kind] for counts in table.values())]
        head = ["## Rows", "", f"| check | op | {' | '.join(kinds)} |", "|---|---|" + "---|" * len(kinds)]
        body = [
            f"| {check} | {op} | {' | '.join(str(counts[kind] or '') for kind in kinds)} |"
            for (check, op), counts in table.items()
        ]
        return [*head, *body, ""]

    def _times(self) -> list[str]:
        timed = [row for row in self.rows.values() if "seconds_ours" in row.data]
        if not timed:
            return []
        heads = [
            "op",
            "work",
            "direction",
            "column",
            "time",
            "of ceiling",
            "best peer",
            "its time",
            "ratio",
            "predicted",
        ]
        lines = ["## Times", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in timed:
            data = row.data
            cells = [row.op, data["shape"], data["direction"], data["column"], microseconds(data["seconds_ours"])]
            cells += ["" if data["share"] is None else f"{data['share']:.0%}", data["best_peer"] or ""]
            cells += [microseconds(data["seconds_peer"]), "" if data["ratio"] is None else f"{data['ratio']:.2f}"]
            lines.append(f"| {' | '.join(cell(c) for c in [*cells, microseconds(data['seconds_predicted'])])} |")
        return [*lines, ""]

    def _paths(self) -> list[str]:
        """How many cases went which way: the kernels of which architecture, or a tensor map was refused."""
        table = Counter((row.op, row.where, row.data["path"]) for row in self.rows.values() if row.data.get("path"))
        if not table:
            return []
        body = [f"| {op} | {where} | {cell(path)} | {count} |" for (op, where, path), count in sorted(table.items())]
        return ["## Paths taken", "", "| op | where | path | cases |", "|---|---|---|---|", *body, ""]


def microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.4g} us"


def cell(value: object) -> str:
    """A value as a table of markdown can hold it."""
    words = " ".join(str(value).split())
    return (words if len(words) <= 300 else words[:300] + " ...").replace("|", "\\|")
