"""The Triton column under every release of Triton that it runs with, side by side: a table of versions x ops.

    python tools/triton_versions.py [--version 3.7.1 ...] [--op rms_norm ...] [--only interpreted] [--target sm_90 ...]

Wheels that are not installed are brought to build/triton/<version>. Each version and op is judged twice, in processes
of their own: few cases that launch every kernel, interpreted, against float64 (tests/triton/cover.py), and every
kernel compiled ahead of time for sm_90 (tools/triton_check.py). Exit code 1 when anything fails.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from triton_rows import rows  # noqa: E402

# The last of each release that grokkernels.triton.TESTED names.
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
CHECKS = ("interpreted", "compiled")
# Where releases differ most: its products are asynchronous, and its tiles fill the registers.
TARGET = "sm_90"
FOLDER = ROOT / "build" / "triton"


@dataclass(frozen=True)
class Result:
    """Of one op under one version, checked in one way."""

    version: str
    op: str
    check: str
    passed: bool
    said: str
    seconds: float  # of CPU


def bring(version: str) -> list[str]:
    """The folders that PYTHONPATH needs for this version to be the one imported: none when it is installed."""
    try:
        if installed("triton") == version:
            return []
    except PackageNotFoundError:
        pass
    folder = FOLDER / version
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FOLDER.with_suffix(".lock").open("w") as lock:  # several may want it at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return [str(folder)]
        half = Path(tempfile.mkdtemp(dir=FOLDER))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(half)]
        try:
            subprocess.run([*command, f"triton=={version}"], check=True)
            half.rename(folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return [str(folder)]


def environment(folders: list[str], interpreted: bool) -> dict[str, str]:
    """Of a process that imports Triton from these folders, if any, and this tree."""
    path = os.pathsep.join([str(ROOT), *folders])
    return {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": str(int(interpreted))}


def check(version: str, op: str, how: str, targets: list[str]) -> Result:
    """Judges one op under one version."""
    command = [sys.executable, "-m", "tests.triton.cover", op]
    if how == "compiled":
        command = [sys.executable, "tools/triton_check.py", op, "--brief", "--jobs", "1"]
        command += [word for target in targets for word in ("--target", target)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "--version", version],
        cwd=ROOT,
        env=environment(bring(version), how == "interpreted"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
    return Result(version, op, how, done.returncode == 0, done.stdout, seconds)


def table(results: list[Result]) -> str:
    """In markdown: a line for each op, a column for each version, CPU seconds of each check in a cell."""
    versions = list(dict.fromkeys(result.version for result in results))
    cells: dict[tuple[str, str], list[str]] = {}
    for result in results:
        verdict = f"{result.check} {result.seconds:.0f} s" if result.passed else f"{result.check} FAILED"
        cells.setdefault((result.op, result.version), []).append(verdict)
    lines = [f"| op | {' | '.join(versions)} |", f"|---|{'---|' * len(versions)}"]
    for op in dict.fromkeys(result.op for result in results):
        lines.append(f"| {op} | {' | '.join(', '.join(cells[op, version]) for version in versions)} |")
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="append", help=f"may be repeated; by default {', '.join(VERSIONS)}")
    parser.add_argument("--op", action="append", choices=rows(), metavar="OP", help="may be repeated; by default all")
    parser.add_argument("--only", choices=CHECKS, help="one of the two checks")
    parser.add_argument("--target", action="append", help=f"a GPU to compile for; may be repeated; by default {TARGET}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    results = []
    for version in options.version or VERSIONS:
        for op in options.op or rows():
            for how in [options.only] if options.only else CHECKS:
                results.append(check(version, op, how, options.target or [TARGET]))
                verdict = "passed" if results[-1].passed else f"FAILED\n{results[-1].said}"
                print(f"triton {version}, {op}, {how}: {verdict}", flush=True)
    print(table(results))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
