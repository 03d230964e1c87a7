"""Line coverage of csrc/cuda on the emulated device: `make coverage`.

Builds the emulated column with gcov in a copy of the tree, runs every case table forward and backward and what else
tests/ops has for a device, and prints, per file, the lines that hold code, how many of them ran, and which did not.
`--at-least` makes a lower figure an error.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "coverage"


def copy_tree() -> None:
    """A copy whose unchanged files keep their times, so that only what changed is compiled again."""
    COPY.mkdir(parents=True, exist_ok=True)
    parts = ["csrc", "grokkernels", "tests", "tools", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-ru", *parts, str(COPY)], cwd=ROOT, check=True)


def build() -> None:
    for library in (COPY / "grokkernels").glob("_C_*.so"):
        library.unlink()
    flags = "-O1 --coverage -fprofile-update=atomic"
    environment = {**os.environ, "GROKKERNELS_COLUMNS": "emulated", "CXXFLAGS": flags, "LDFLAGS": "--coverage"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, env=environment, check=True)


def run() -> None:
    for counts in (COPY / "build").rglob("*.gcda"):
        counts.unlink()
    command = [sys.executable, "-m", "pytest", "tests/ops", "-n", "2", "-p", "no:cacheprovider"]
    subprocess.run([*command, "-k", "emulated or not TestCases"], cwd=COPY, check=True)


def lines() -> dict[str, dict[int, int]]:
    """Per file of csrc/cuda: line number -> how often it ran, over all instantiations of templates."""
    found: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    objects = [str(path) for path in (COPY / "build").rglob("*.gcda") if "/cuda/" in str(path)]
    reports = COPY / "build" / "gcov"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    subprocess.run(["gcov", "--json-format", *objects], cwd=reports, check=True, stdout=subprocess.DEVNULL)
    for report in reports.glob("*.gcov.json.gz"):
        for file in json.loads(gzip.decompress(report.read_bytes()))["files"]:
            path = file["file"]
            if "csrc/cuda/" not in path:
                continue
            name = path[path.index("csrc/cuda/") :]
            for line in file["lines"]:
                found[name][line["line_number"]] += line["count"]
    return found


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at-least", type=float, default=0.0, help="percent below which the exit code is 1")
    arguments = parser.parse_args()
    copy_tree()
    build()
    run()
    total = ran = 0
    for name, counts in sorted(lines().items()):
        missing = [n for n, count in counts.items() if count == 0]
        total += len(counts)
        ran += len(counts) - len(missing)
        share = 100 * (1 - len(missing) / len(counts))
        print(f"{name:<55} {len(counts):5d} lines  {share:6.1f} %  {'not run: ' + ranges(missing) if missing else ''}")
    percent = 100 * ran / total if total else 0.0
    print(f"csrc/cuda: {ran} of {total} lines ran, {percent:.1f} %")
    if percent < arguments.at_least:
        sys.exit(f"coverage is {percent:.1f} %, at least {arguments.at_least:g} % is wanted")


if __name__ == "__main__":
    main()
