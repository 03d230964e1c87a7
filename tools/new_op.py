"""Writes the files of a new row: `make new-op NAME=x`. They build and pass as they are (y = x)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

TEMPLATES = Path(__file__).parent / "new_op"
PLACES = {
    "header.h": "csrc/{op}.h",
    "cpu.cpp": "csrc/cpu/{op}.cpp",
    "cuda.cu": "csrc/cuda/{op}.cu",
    "torch.cpp": "csrc/torch/{op}.cpp",
    "reference.py": "grokkernels/reference/{op}.py",
    "triton.py": "grokkernels/triton/{op}.py",
    "contract.py": "grokkernels/ops/{op}.py",
    "cases.py": "grokkernels/testing/cases/{op}.py",
    "test.py": "tests/ops/test_{op}.py",
    "bench.py": "benchmarks/bench_{op}.py",
    "doc.md": "docs/{op}.md",
}


def write_row(op: str, root: Path) -> list[Path]:
    """Writes the files of row `op` under `root`; refuses a bad name and never overwrites."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", op):
        raise SystemExit(f"NAME must be lower-case words joined by underscores, as in rms_norm; got '{op}'")
    places = {template: root / place.format(op=op) for template, place in PLACES.items()}
    taken = [str(path) for path in places.values() if path.exists()]
    if taken:
        raise SystemExit(f"the row {op} exists already: {', '.join(taken)}")
    camel = "".join(word.capitalize() for word in op.split("_"))
    for template, path in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (TEMPLATES / f"{template}.in").read_text(encoding="utf-8")
        path.write_text(text.replace("@op@", op).replace("@Op@", camel), encoding="utf-8")
    return list(places.values())


if __name__ == "__main__":
    for written in write_row(sys.argv[1] if len(sys.argv) > 1 else "", Path.cwd()):
        print(written.relative_to(Path.cwd()))
    print("next: make test; then the mathematics, the contract, the cases, the kernels; and a line in README's grid")
