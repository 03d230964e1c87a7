"""Every unit of judging that takes longer than `make test` may: see tools/judge.py.

A new op gets its units by its files' names; a new planted bug by standing in tests/device/bugs.py.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cuda_toolkit
import sanitize
import triton_versions as triton_releases

from judging import dependencies
from judging.dependencies import CSRC, ROOT, ops
from judging.ledger import Unit

TOOLS = ROOT / "tools"
TESTS = ROOT / "tests"
PYTHON = "python"  # stands for the interpreter that runs tools/judge.py


def every() -> list[Unit]:
    """All of them."""
    found = [unit for kind in KINDS for unit in kind()]
    assert len({unit.name for unit in found}) == len(found)
    return found


def pytest(*arguments: str, marked: str = "") -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-m", marked, *arguments)


def budget(file: str, prefix: str) -> str:
    """The lines of a budget whose kernels begin with `prefix`: a unit hangs on its own lines alone."""
    kernels = json.loads((TOOLS / file).read_text(encoding="utf-8"))["kernels"]
    return json.dumps({name: line for name, line in kernels.items() if name.startswith(prefix)}, sort_keys=True)


@functools.cache
def nvcc() -> str:
    found = cuda_toolkit.find_nvcc()
    return f"nvcc {cuda_toolkit.release(found) if found else 'none'}"


@functools.cache
def cxx() -> str:
    said = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0]


@functools.cache
def package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} none"


def places() -> list[tuple[str, str]]:
    """Each op under each architecture that it has CUDA kernels of its own for."""
    found = []
    for op in ops():
        sources = dependencies.kernels(op, "cuda")
        hopper = any(source.stem.endswith(cuda_toolkit.HOPPER_SUFFIX) for source in sources)
        found += [(op, "sm_80"), *([(op, "sm_90")] if hopper else [])]
    return found


def cuda_check() -> Iterator[Unit]:
    """Each kernel file through nvcc for four architectures, held to its budget."""
    tool = dependencies.python([TOOLS / "cuda_check.py"])
    for source in cuda_toolkit.sources():
        name = str(source.relative_to(CSRC / "cuda").with_suffix(""))
        files = dependencies.compiled([source], "cuda") | tool
        yield Unit(
            f"cuda-check/{name}",
            (PYTHON, "tools/cuda_check.py", name, "--brief", "--jobs", "1"),
            frozenset(files),
            (nvcc(), package("nvidia-cuda-nvdisasm"), budget("cuda_budget.json", f"{name} ")),
        )


def triton_check() -> Iterator[Unit]:
    """Each op's Triton kernels ahead of time for six GPUs, held to their budget."""
    tool = dependencies.python([TOOLS / "triton_check.py"])
    for op in ops():
        yield Unit(
            f"triton-check/{op}",
            (PYTHON, "tools/triton_check.py", op, "--brief", "--jobs", "1"),
            frozenset(dependencies.triton(op) | dependencies.contract(op) | tool),
            (package("triton"), package("torch"), budget("triton_budget.json", f"{op} ")),
            {"TRITON_INTERPRET": "0"},
        )


def case_tables() -> Iterator[Unit]:
    """Each op's case tables where kernels are emulated or interpreted, in the dtypes that `make test` leaves out."""
    for op in ops():
        tests = sanitize.test_files(op)
        judge = dependencies.contract(op) | dependencies.python([*tests, TESTS / "conftest.py"])
        for backend, kernels, facts in (
            ("emulated", dependencies.native(op, "emulated"), (cxx(),)),
            ("triton", dependencies.triton(op), (package("triton"), package("numpy"))),
        ):
            chosen = ("-k", f"float64_rule and {backend}")
            yield Unit(
                f"table/{op}-{backend}",
                pytest(*(str(path.relative_to(ROOT)) for path in tests), *chosen, marked="long"),
                frozenset(judge | kernels),
                (*facts, package("torch")),
            )


def schedules() -> Iterator[Unit]:
    """Each op's CUDA kernels under random schedules of the emulated device."""
    for op, architecture in places():
        test = TESTS / "device" / "test_schedules.py"
        yield Unit(
            f"schedules/{op}-{architecture}",
            pytest(f"tests/device/test_schedules.py::test_random_schedules[{op}-{architecture}]"),
            frozenset(dependencies.native(op, "emulated") | dependencies.contract(op) | dependencies.python([test])),
            (cxx(), package("torch")),
        )


def kernels_as_ptx() -> Iterator[Unit]:
    """Each op's CUDA kernels as nvcc's PTX, interpreted."""
    for op, architecture in places():
        files = dependencies.native(op, "emulated") | dependencies.native(op, "cuda") | dependencies.contract(op)
        yield Unit(
            f"ptx/{op}-{architecture}",
            pytest(f"tests/device/test_kernels_as_ptx.py::test_kernels_as_ptx[{op}-{architecture}]"),
            frozenset(files | dependencies.python([TESTS / "device" / "test_kernels_as_ptx.py", *families()])),
            (nvcc(), cxx(), package("torch")),
        )


def triton_ptx() -> Iterator[Unit]:
    """Each op's Triton kernels as Triton's own PTX, interpreted."""
    for op in ops():
        judge = dependencies.python([TESTS / "triton" / "test_ptx.py", *families()])
        yield Unit(
            f"triton-ptx/{op}",
            pytest(f"tests/triton/test_ptx.py::test_compiled_kernels[{op}]"),
            frozenset(dependencies.triton(op) | dependencies.contract(op) | judge),
            (package("triton"), package("torch")),
        )


def families() -> list[Path]:
    """What the PTX interpreter knows is found by name."""
    return sorted((TESTS / "ptx").rglob("*.py"))


def triton_versions() -> Iterator[Unit]:
    """Each op's Triton kernels under the other releases of Triton: interpreted, and compiled for sm_90."""
    tool = TOOLS / "triton_versions.py"
    judge = dependencies.python([tool, TOOLS / "triton_check.py", TESTS / "triton" / "cover.py"])
    spills = (TOOLS / "triton_spills.json").read_text(encoding="utf-8")
    for release in triton_releases.VERSIONS:
        for op in ops() if package("triton") != f"triton {release}" else []:
            yield Unit(
                f"triton-version/{op}-{release}",
                (PYTHON, "tools/triton_versions.py", "--version", release, "--op", op),
                frozenset(dependencies.triton(op) | dependencies.contract(op) | judge),
                (package("torch"), package("numpy"), spills, budget("triton_budget.json", f"{op} ")),
            )


def planted_bugs() -> Iterator[Unit]:
    """Each planted bug is caught; and the correct kernels are not accused on the cases that tell."""
    test = "tests/device/test_planted_bugs.py"
    planter = dependencies.python([TESTS / "device" / "plant.py", TESTS / "conftest.py"]) | {ROOT / test}
    for bug in planted():
        op = dependencies.op_of(bug.table)
        yield Unit(
            f"bug/{re.sub('[^a-z0-9]+', '-', bug.kind.lower())}",
            pytest(f"{test}::test_bug_is_caught[{bug.kind}]"),
            frozenset(dependencies.native(op, "emulated") | dependencies.contract(op) | planter),
            (repr(bug), cxx(), package("torch")),
        )
    for table in sorted({bug.table for bug in planted()}):
        op = dependencies.op_of(table)
        yield Unit(
            f"no-bug/{table}",
            pytest(f"{test}::test_correct_kernels_are_never_accused[{table}]"),
            frozenset(dependencies.native(op, "emulated") | dependencies.contract(op) | planter),
            (*(repr(bug) for bug in planted() if bug.table == table), cxx(), package("torch")),
        )


def planted() -> list[Any]:
    """The records of tests/device/bugs.py."""
    sys.path.append(str(ROOT))
    from tests.device.bugs import BUGS

    return BUGS


def sanitizers() -> Iterator[Unit]:
    """Each op's kernels under sanitizers, in a copy of the tree that holds the unit's files and no others."""
    tool = dependencies.python([TOOLS / "sanitize.py"])
    for kind in sanitize.KINDS:
        for op in ops():
            yield Unit(
                f"{kind}/{op}",
                (PYTHON, "tools/sanitize.py", kind, op),
                frozenset(sanitize.files(kind, op) | tool),
                (cxx(), package("torch")),
            )


def libraries() -> Iterator[Unit]:
    """The torch-free libraries and their C++ unit tests, as they are and under sanitizers; sdist and wheel."""
    sources = {path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".txt", ".sh")}
    device = set((CSRC / "emulated").rglob("*.cuh")) | set((CSRC / "tests" / "emulated").glob("*.cu"))
    files = {path for path in sources if CSRC / "torch" not in path.parents} | device | {ROOT / "CMakeLists.txt"}
    yield Unit("cpp/release", ("make", "cpp"), frozenset(files), (cxx(),))
    yield Unit("cpp/sanitized", ("make", "cpp-sanitized"), frozenset(files - device), (cxx(),))
    # What an archive holds hangs on the names of the files, not on what stands in them.
    names = sorted(str(path.relative_to(ROOT)) for top in ("csrc", "grokkernels", "tools") for path in tracked(top))
    building = [ROOT / name for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "tools/build_backend.py")]
    yield Unit(
        "dist/check",
        ("make", "dist-check"),
        frozenset([*building, TOOLS / "dist_check.sh", TOOLS / "cuda_toolkit.py"]),
        (*names, cxx()),
    )


def tracked(top: str) -> list[Path]:
    """The sources below a folder, without what builds and runs leave there."""
    kinds = (".py", ".h", ".cuh", ".cpp", ".cu", ".txt", ".sh", ".json", ".tsv", ".in")
    return [path for path in (ROOT / top).rglob("*") if path.suffix in kinds]


KINDS = (
    case_tables,
    schedules,
    kernels_as_ptx,
    triton_ptx,
    cuda_check,
    triton_check,
    triton_versions,
    planted_bugs,
    sanitizers,
    libraries,
)
