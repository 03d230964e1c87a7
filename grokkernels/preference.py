"""Which of cuda and triton the automatic choice tries first, row by row: preference.json.

`make gpu` measures both and writes such a file beside its report (docs/gpu.md); as long as none of a GPU's stands here,
this one says "predicted": the CUDA kernels come first, being tuned for NVIDIA's architectures, and Triton serves where
they do not run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("preference.json")


def read() -> dict[str, Any]:
    """What PATH says."""
    return json.loads(PATH.read_text(encoding="utf-8"))


_table = read()  # at import: torch.compile, which traces the choice of a backend, reads no file


def order(op: str) -> tuple[str, ...]:
    """The two backends, the faster first."""
    return ("triton", "cuda") if op in _table["triton_first"] else ("cuda", "triton")


def source() -> str:
    """`predicted`, or the GPU on which it was measured."""
    return _table["source"]
