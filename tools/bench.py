"""`make bench`: runs the benchmarks and writes one report; with --compare REV, those of another commit beside them.

    python tools/bench.py [--compare REV] [--only bench_rotary.py ...] [-- options of pytest]

Both commits are measured on this machine in this run, file by file in turn. The other one is checked out and built
below build/compare; its benchmarks are its own, and rows of the same name are set side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "bench"
sys.path.insert(0, str(ROOT))


def run(tree: Path, file: str, options: list[str]) -> list[dict[str, Any]]:
    """The runs that one file of benchmarks gives in a tree; none where the tree has no such file."""
    if not (tree / "benchmarks" / file).exists():
        return []
    report = OUT / "parts" / tree.name / file
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"benchmarks/{file}",
        "--benchmark-only",
        "--report",
        str(report),
        *options,
    ]
    subprocess.run(command, cwd=tree, check=True)
    return [json.loads((report / "rows.json").read_text(encoding="utf-8"))]


def checked_out(revision: str) -> Path:
    """The other commit as a tree of its own, built."""
    found = subprocess.run(
        ["git", "rev-parse", "--short=10", "--verify", f"{revision}^{{commit}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode != 0:
        raise SystemExit(f"--compare names no commit: '{revision}'")
    tree = ROOT / "build" / "compare" / found.stdout.strip()
    if not tree.exists():
        subprocess.run(
            ["git", "worktree", "add", "--detach", "--quiet", str(tree), found.stdout.strip()], cwd=ROOT, check=True
        )
    if not (tree / "benchmarks" / "harness").exists():
        raise SystemExit(f"--compare: commit {tree.name} is older than the benchmarks' report")
    environment = {**os.environ, "GROKKERNELS_COLUMNS": "cpu"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=environment, check=True)
    return tree


def joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"machine": runs[0]["machine"], "rows": [row for run in runs for row in run["rows"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--compare", metavar="REV", help="a commit to be measured beside this tree")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="files of benchmarks/; all when none is named")
    parser.add_argument("options", nargs="*", help="options of pytest, after --")
    chosen = parser.parse_args()
    files = chosen.only or sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))
    trees = [ROOT, *([checked_out(chosen.compare)] if chosen.compare else [])]
    runs: dict[Path, list[dict[str, Any]]] = {tree: [] for tree in trees}
    from benchmarks.harness import report

    for file in files:  # the report grows file by file: one that is interrupted holds what was measured
        for tree in trees:
            runs[tree] += run(tree, file, chosen.options)
        sides = [joined(found) for found in runs.values() if found]
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "rows.json").write_text(json.dumps(sides[0], indent=1) + "\n", encoding="utf-8")
        report.write_report(OUT, sides)
        print(f"the report: {OUT / 'index.html'}", flush=True)


if __name__ == "__main__":
    main()
