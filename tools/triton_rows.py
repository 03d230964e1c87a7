"""Which ops have Triton kernels, known without importing torch or triton."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "grokkernels" / "triton"


def rows() -> list[str]:
    """The files of grokkernels/triton that are ops."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if "def example_calls" in path.read_text(encoding="utf-8"))
