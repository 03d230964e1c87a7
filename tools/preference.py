"""Which of the cuda and triton columns the automatic choice tries first, op by op: from what the speed phase measured.

`make gpu` writes it as preference.json beside its report; grokkernels/preference.json is where the library reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from gpu.record import PASSED, Row


def table(rows: Sequence[Row], gpu: str) -> dict[str, Any]:
    """The content of preference.json. Triton's column comes first where all that was measured of both took it less
    time in the sum, and nothing of its own failed; else CUDA's does."""
    seconds: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    failed = {row.op for row in rows if row.where == "triton" and row.kind != PASSED}
    for row in rows:
        if row.kind == PASSED and "seconds_ours" in row.data:
            seconds[row.op][row.case][row.where] = row.data["seconds_ours"]
    first = []
    for op, works in seconds.items():
        both = [times for times in works.values() if {"cuda", "triton"} <= times.keys()]
        if both and op not in failed and sum(t["triton"] for t in both) < sum(t["cuda"] for t in both):
            first.append(op)
    return {"source": f"measured on {gpu}", "triton_first": sorted(first)}
