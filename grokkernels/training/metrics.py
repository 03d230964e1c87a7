"""The metrics of a run as JSON lines: one object per step, appended and flushed at once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .files import open_replacing

FILE = "metrics.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class MetricsWriter:
    """Appends records to a metrics file, after dropping those of steps past `step` (the one a run resumes from)."""

    def __init__(self, path: Path, step: int = 0) -> None:
        kept = [record for record in read(path) if record["step"] <= step]
        with open_replacing(path, "w") as file:
            file.writelines(_line(record) for record in kept)
        self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it reaches the operating system before this returns."""
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Flush to the disk, so that the metrics are never behind the checkpoint that follows."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(record: dict[str, Any]) -> str:
    # JSON has no infinity: a gradient that overflowed is written as null.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
