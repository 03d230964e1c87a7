"""One op under sanitizers: `python tools/sanitize.py memory rms_norm [op ...]`, all ops when none is named.

  memory   AddressSanitizer and UndefinedBehaviorSanitizer: the op's case tables on the CPU at every level
  device   the same for its CUDA kernels on the emulated device, on a few small cases that launch them all
  races    ThreadSanitizer, each emulated thread a fiber of its own: the same kernels and cases, but for float16's

Each op is built in a copy of the tree, build/sanitize-<kind>/<op>, that holds the files the op depends on and no
others: so the libraries in use stay as they are, little is built, and what `judging.dependencies` says is proven to be
enough. Environment: CXX.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from judging import dependencies
from judging.dependencies import ROOT, ops

TESTS = ROOT / "tests"


@dataclass(frozen=True)
class Kind:
    """How a library is built, and what runs in it."""

    column: str
    sanitizer: str
    flags: str
    runtime: str
    options: dict[str, str]


_ASAN = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1"}  # leaks of the interpreter are not ours
KINDS = {
    "memory": Kind("cpu", "address,undefined", "-fno-sanitize-recover=all", "libasan.so", _ASAN),
    # A kernel has the address of a tile before it knows whether there is one, from null too where a tensor is empty:
    # on a GPU that is plain arithmetic, and what is read is what counts.
    "device": Kind(
        "emulated",
        "address,undefined",
        "-fno-sanitize-recover=all -fno-sanitize=pointer-overflow",
        "libasan.so",
        {**_ASAN, "GROKKERNELS_SEEDS": "1"},
    ),
    # One race found is exit code 66.
    "races": Kind("emulated", "thread", "", "libtsan.so", {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}),
}
# The levels with products of bfloat16 are avx512 in every other dtype.
SAME_LEVELS = "(avx512bf16 or amx) and not bfloat16"


def roots(kind: str, op: str) -> list[Path]:
    """The Python files that run."""
    if kind == "memory":
        return [*test_files(op), TESTS / "conftest.py"]
    name = {"device": "test_schedules.py", "races": "race_check.py"}[kind]
    return [TESTS / "device" / name, TESTS / "conftest.py"]


def test_files(op: str) -> list[Path]:
    """tests/ops/test_<op>.py, and those of its other forms: test_flash_attention_varlen.py."""
    longer = [f"test_{other}" for other in ops() if other.startswith(f"{op}_")]
    found = sorted([*(TESTS / "ops").glob(f"test_{op}.py"), *(TESTS / "ops").glob(f"test_{op}_*.py")])
    return [path for path in found if not path.stem.startswith(tuple(longer))]


def files(kind: str, op: str) -> set[Path]:
    """All that the copy holds."""
    building = {ROOT / "pyproject.toml", ROOT / "tools" / "build_backend.py"}
    native = dependencies.native(op, KINDS[kind].column)
    return native | dependencies.python(roots(kind, op)) | dependencies.contract(op) | building


def copy(kind: str, op: str) -> Path:
    """The copy, with nothing in it that does not belong; files that are as they were keep their times."""
    folder = ROOT / "build" / f"sanitize-{kind}" / op
    wanted = {path.relative_to(ROOT) for path in files(kind, op)}
    for old in [path for path in folder.rglob("*") if path.is_file()]:
        place = old.relative_to(folder)
        if place.parts[0] != "build" and place not in wanted:
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("README.md", "LICENSE"):  # named in pyproject.toml, whatever stands in them
        (folder / name).touch()
    for place in wanted:
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (ROOT / place).read_bytes():
            shutil.copyfile(ROOT / place, target)
    return folder


def environment(how: Kind) -> dict[str, str]:
    """Python itself is not built with the sanitizer: its runtime is loaded first."""
    cxx = os.environ.get("CXX", "c++").split()[-1]
    found = [
        subprocess.run([cxx, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in (how.runtime, "libstdc++.so")
    ]
    return {**os.environ, **how.options, "LD_PRELOAD": " ".join(found), "PYTHONDONTWRITEBYTECODE": "1"}


def check(kind: str, op: str) -> None:
    """Builds and runs. Errors: CalledProcessError."""
    how = KINDS[kind]
    folder = copy(kind, op)
    flags = f"-O1 -g -fno-omit-frame-pointer -fsanitize={how.sanitizer} {how.flags}"
    build = {"GROKKERNELS_COLUMNS": how.column, "CXXFLAGS": flags, "LDFLAGS": f"-fsanitize={how.sanitizer}"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env={**os.environ, **build}, check=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    if kind == "memory":
        chosen = f"(float64_rule or layouts or bad_input) and not emulated and not triton and not ({SAME_LEVELS})"
        command += ["tests/ops", "-k", chosen]
    elif kind == "device":
        command += ["tests/device/test_schedules.py", "-k", f"[{op}-"]  # not the ops that its cases call
    else:  # the race checker needs the memory where it expects it: without randomised addresses
        command = ["setarch", "-R", sys.executable, "-m", "tests.device.race_check", op]
    subprocess.run(command, cwd=folder, env=environment(how), check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("op", nargs="*", help=f"all when none is named: {', '.join(ops())}")
    arguments = parser.parse_args()
    for op in arguments.op:
        if op not in ops():
            parser.error(f"op is none: '{op}'; allowed are {', '.join(ops())}")
    for op in arguments.op or ops():
        try:
            check(arguments.kind, op)
        except subprocess.CalledProcessError as error:
            print(f"FAILED {arguments.kind} {op}: exit code {error.returncode}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
