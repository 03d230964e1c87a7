"""The metrics of a run as JSON lines: one object per step, appended and flushed at once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .files import naming, open_replacing, parse_json

FILE = "metrics.jsonl"
# Besides `step` and `tokens_per_expert`; null stands for what was not finite, or not measured in that step.
_NUMBERS = ("loss", "val_loss", "lr", "grad_norm", "load_balance_loss", "z_loss", "tokens_per_s")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order. What is no record is left out: a last line cut short by a crash, say."""
    return _parse(_lines(path))


class MetricsWriter:
    """Appends records to a metrics file, after dropping those of steps past `step` (the one a run resumes from).

    `dropped` counts the lines that were no records, which are dropped too.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        lines = _lines(path)
        records = _parse(lines)
        self.dropped = len(lines) - len(records)
        with open_replacing(path, "w") as file:
            file.writelines(_line(record) for record in records if record["step"] <= step)
        self._path = path
        self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it reaches the operating system before this returns."""
        with naming(self._path):
            self._file.write(_line(record))
            self._file.flush()

    def sync(self) -> None:
        """Flush to the disk, so that the metrics are never behind the checkpoint that follows."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _parse(lines: list[str]) -> list[dict[str, Any]]:
    """The lines that are records, with counts of experts of one shape: the first record's."""
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if _is_record(record) and (not records or _shape(record) == _shape(records[0])):
            records.append(record)
    return records


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_number(value.get("step")) or not isinstance(value["step"], int):
        return False
    if not all(name in value and (value[name] is None or _is_number(value[name])) for name in _NUMBERS):
        return False
    layers = value.get("tokens_per_expert")
    return (
        isinstance(layers, list)
        and bool(layers)
        and all(isinstance(row, list) and row and len(row) == len(layers[0]) for row in layers)
        and all(_is_number(count) for row in layers for count in row)
    )


def _is_number(value: Any) -> bool:
    """Whether it is a number that a picture can show; NaN and infinity are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _shape(record: dict[str, Any]) -> tuple[int, int]:
    layers = record["tokens_per_expert"]
    return len(layers), len(layers[0])


def _line(record: dict[str, Any]) -> str:
    # JSON has no infinity: a gradient that overflowed is written as null.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
