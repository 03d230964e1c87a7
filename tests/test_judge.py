"""tools/judge.py: what a unit hangs on is complete, what changed is judged, and a forged line is found."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.plant import ROOT, emulated_build

sys.path.append(str(ROOT / "tools"))

import judge
from judging import dependencies, ledger, units
from judging.dependencies import CSRC
from judging.ledger import Unit

NINJA = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
BUILDS = {"emulated": emulated_build(), "cpu": emulated_build().parent / "cpu"}


@pytest.fixture(scope="module")
def known() -> list[Unit]:
    return units.every()


def built(backend: str) -> dict[str, list[Path]]:
    """Object -> the files of csrc that the compiler read for it, its source first: ninja's own book of a build."""
    said = subprocess.run([NINJA, "-C", str(BUILDS[backend]), "-t", "deps"], capture_output=True, text=True, check=True)
    found: dict[str, list[Path]] = {}
    name = ""
    for line in said.stdout.splitlines():
        if line.startswith("    "):
            path = (BUILDS[backend] / line.strip()).resolve()
            if path.is_relative_to(CSRC):
                found[name].append(path)
        elif ": #deps" in line:
            name = line.partition(":")[0]
            found[name] = []
    return {name: paths for name, paths in found.items() if paths}


@pytest.mark.parametrize("backend", BUILDS)
def test_includes_are_the_compilers(backend: str) -> None:
    """Nothing that the compiler read is missing."""
    objects = built(backend)
    assert len(objects) > 20
    for name, (source, *headers) in objects.items():
        if not all(path.exists() for path in (source, *headers)):
            continue  # an object of an older tree
        missing = set(headers) - dependencies.compiled([source], backend)
        assert not missing, f"{name}: {sorted(map(str, missing))}"


def symbols(folder: Path, objects: list[str], kind: str) -> dict[str, set[str]]:
    """The functions of ours that each object defines, or leaves to others."""
    said = subprocess.run(["nm", kind, *objects], cwd=folder, capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    name = ""
    for line in said.splitlines():
        if line.endswith(".o:"):
            name = line[:-1]
            found[name] = set()
        elif words := re.search(r"\b([TUuVWBDR]) (_Z\w*grokkernels\w*)", line):
            found[name].add(words[2])
    return found


@pytest.mark.parametrize("backend", BUILDS)
def test_links_are_the_linkers(backend: str) -> None:
    """Whatever an op's objects need of other objects stands among the files that the op depends on."""
    sources = {name: paths[0] for name, paths in built(backend).items() if (BUILDS[backend] / name).exists()}
    sources = {name: source for name, source in sources.items() if source.exists()}
    if backend == "cpu":  # every level is the same sources
        sources = {name: source for name, source in sources.items() if not re.search(r"\.(avx|amx)\w*\.o$", name)}
    objects = sorted(sources)
    defines = symbols(BUILDS[backend], objects, "--defined-only")
    needs = symbols(BUILDS[backend], objects, "--undefined-only")
    home = {symbol: name for name, those in defines.items() for symbol in those}
    crossed = 0
    for op in dependencies.ops():
        files = dependencies.native(op, backend)
        waiting, seen = [name for name, source in sources.items() if source in dependencies.kernels(op, backend)], set()
        waiting.append(next(name for name, source in sources.items() if source == CSRC / "torch" / f"{op}.cpp"))
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            assert sources[name] in files, f"{op} on {backend} needs {sources[name]}"
            waiting += [home[symbol] for symbol in needs[name] if symbol in home]
        crossed += len(seen)
    assert crossed > 3 * len(dependencies.ops())


def changed(path: str, known: list[Unit], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The units that the ledger does not know after a change of one file."""
    judged = {unit.name: unit.hash() for unit in known}
    target, contents = ROOT / path, ledger.content_hash
    assert target.is_file()
    monkeypatch.setattr(ledger, "content_hash", lambda p: "changed" if p == target else contents(p))
    return {unit.name for unit in ledger.missing(known, judged)}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "csrc/cuda/flash_attention/scores.cuh",
            r"(cuda-check|ptx|schedules|table|device|races|no-bug)/flash_attention"
            r"|bug/(keys-are|values-are|nobody|no-fence-(after-the|between-(copied|clearing-(values|queries|keys))))",
        ),
        ("csrc/cpu/norm.h", r"memory/(dual_)?rms_norm|cpp/"),
        ("grokkernels/triton/rotary.py", r"(table|triton-check|triton-ptx|triton-version)/rotary"),
        ("grokkernels/ops/moe_gate.py", r".*/moe_gate"),
        ("tools/cuda_check.py", "cuda-check/"),
        ("docs/design.md", "none"),
    ],
)
def test_a_change_leads_to_the_units_that_hang_on_it(
    path: str, expected: str, known: list[Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = changed(path, known, monkeypatch)
    assert found == {unit.name for unit in known if ROOT / path in unit.files}
    assert all(re.match(expected, name) for name in found), sorted(found)
    assert bool(found) == (expected != "none")


def test_a_header_leads_to_every_unit_that_runs_it(known: list[Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    found = changed("csrc/cuda/flash_attention/scores.cuh", known, monkeypatch)
    wanted = {f"{kind}/flash_attention-sm_{n}" for kind in ("ptx", "schedules") for n in (80, 90)}
    wanted |= {f"{kind}/flash_attention" for kind in ("device", "races", "no-bug")} | {"table/flash_attention-emulated"}
    wanted |= {f"cuda-check/flash_attention/{way}_sm{n}" for way in ("forward", "backward") for n in (80, 90)}
    assert wanted <= found


def test_a_budget_line_leads_to_its_file(known: list[Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    judged = {unit.name: unit.hash() for unit in known}
    lines = units.budget
    monkeypatch.setattr(units, "budget", lambda file, prefix: lines(file, prefix) + "!" * (prefix == "rotary "))
    found = {unit.name for unit in ledger.missing(units.every(), judged)}
    others = {f"triton-version/rotary-{release}" for release in ("3.6.0", "3.7.1", "3.8.0")}
    assert found == {"cuda-check/rotary", "triton-check/rotary", *others}


def test_no_source_is_left_out(known: list[Unit]) -> None:
    """Every kernel, and all that judges it, stands in some unit."""
    files = {path for unit in known for path in unit.files}
    sources = [p for p in CSRC.rglob("*") if p.suffix in (".cu", ".cuh", ".cpp", ".h") and p.parent.name != "cuda"]
    sources += [p for p in CSRC.rglob("cuda/*") if p.suffix in (".cu", ".cuh")]
    # Conformance of the vocabulary is part of `make test`; what only a GPU's library has, nvcc and a GPU judge.
    elsewhere = ("csrc/tests/device/", "csrc/torch/cuda/", "csrc/cuda/device/")
    sources = [p for p in sources if not str(p.relative_to(ROOT)).startswith(elsewhere)]
    sources += (ROOT / "grokkernels" / "triton").glob("*.py")
    missing = sorted(str(p.relative_to(ROOT)) for p in sources if p not in files)
    assert len(sources) > 150
    assert not missing


def test_every_long_test_is_a_unit(known: list[Unit]) -> None:
    """What `make test` leaves out for its length stands in the ledger."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "long", "tests/device", "tests/triton"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    nodes = {line for line in said.splitlines() if "::" in line}
    assert len(nodes) > 60
    assert nodes <= {word for unit in known for word in unit.command}


def test_the_draw() -> None:
    """A tenth each time, another one each time; a line that should not stand there is drawn by 44 runs in 99 of 100."""
    names = [f"kind/{n}" for n in range(500)]
    commits = [f"commit {n}" for n in range(200)]
    tenth = [sum(ledger.is_drawn(name, commit) for name in names) for commit in commits]
    assert 40 <= sum(tenth) / len(tenth) <= 60
    found = [next(n for n, commit in enumerate(commits, 1) if ledger.is_drawn(name, commit)) for name in names]
    assert sum(n <= 44 for n in found) >= 0.98 * len(names)


@pytest.fixture
def two_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A unit that passes and one that fails, both in a ledger that says they passed. Returns the ledger."""
    pair = [
        Unit("good/one", ("true",), frozenset([ROOT / "setup.py"])),
        Unit("bad/one", ("false",), frozenset([ROOT / "setup.py"])),
    ]
    book = tmp_path / "ledger.tsv"
    ledger.write({unit.name: unit.hash() for unit in pair}, book)
    monkeypatch.setattr(judge, "every", lambda: pair)
    monkeypatch.setattr(ledger.read, "__defaults__", (book,))
    monkeypatch.setattr(ledger.write, "__defaults__", (book,))
    monkeypatch.setattr(ledger.record, "__defaults__", (book,))
    return book


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["judge.py", *arguments])
    return judge.main()


def test_a_forged_line_is_found(two_units: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first draw that takes it, and not before: and CI never writes."""
    before = two_units.read_text()
    codes = [run("--draw", f"commit {n}", monkeypatch=monkeypatch) for n in range(44)]
    assert codes == [int(ledger.is_drawn("bad/one", f"commit {n}")) for n in range(44)]
    assert 1 in codes
    assert two_units.read_text() == before


def test_the_ledger_holds_what_passed(two_units: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--write", monkeypatch=monkeypatch) == 0  # nothing is unknown
    assert run("--all", monkeypatch=monkeypatch) == 1
    assert set(ledger.read(two_units)) == {"good/one"}
    assert run("--write", monkeypatch=monkeypatch) == 1
    assert set(ledger.read(two_units)) == {"good/one"}
