"""Builds the emulated column with one bug in it, and counts the seeds under which the tests would see it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SEEDS = 6


@dataclass(frozen=True)
class Bug:
    """One change of one place in csrc/cuda, and a case that runs it."""

    kind: str
    file: str  # below csrc/cuda
    old: str  # stands there exactly once, but for white space
    new: str
    source: str  # the .cu below csrc/cuda that is compiled anew
    table: str
    case: str  # the start of its name in the table, or "case(...)" as the table's module makes its own
    dtype: str = "bfloat16"
    architecture: str = "sm_80"


@dataclass(frozen=True)
class Caught:
    """Of SEEDS seeds: by a report of the device, by wrong numbers; and the first report."""

    report: int
    numbers: int
    words: str

    @property
    def seeds(self) -> int:
        return self.report + self.numbers


def emulated_build() -> Path:
    """The folder that the emulated column was built in."""
    found = sorted((ROOT / "build").glob("temp.*/emulated/build.ninja"), key=lambda path: path.stat().st_mtime)
    assert found, (
        "the emulated column was not built in this tree: GROKKERNELS_COLUMNS=emulated python setup.py build_ext"
    )
    return found[-1].parent


def _commands(build: Path) -> list[str]:
    """Every command of the build, the link last."""
    ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    listed = subprocess.run([ninja, "-C", str(build), "-t", "commands"], check=True, capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if line and not line.startswith("ninja:")]


def build_with(bug: Bug, folder: Path) -> Path:
    """The library with the bug in it, built in `folder`; everything but one source is taken from the build in use."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    target = csrc / "cuda" / bug.file
    old = r"\s+".join(re.escape(word) for word in bug.old.split())
    text, places = re.subn(old, lambda _: bug.new, target.read_text(encoding="utf-8"))
    assert places == 1, f"{bug.kind}: {places} places in {bug.file} read {bug.old!r}"
    target.write_text(text, encoding="utf-8")
    build = emulated_build()
    *compiles, link = _commands(build)
    source = str(ROOT / "csrc" / "cuda" / bug.source)
    (compile_it,) = [command for command in compiles if source in shlex.split(command)]
    made = str(Path("cuda") / bug.source).removesuffix(".cu") + ".o"
    bad = folder / "bad.o"
    words = [word.replace(str(ROOT / "csrc"), str(csrc)) for word in shlex.split(compile_it)]
    words[words.index("-o") + 1] = str(bad)
    words[words.index("-MF") + 1] = str(folder / "bad.d")
    subprocess.run([*words, "-w"], cwd=build, check=True)
    words = [str(bad) if word == made else word for word in shlex.split(link)]
    library = folder / "_C_emulated.so"
    words[words.index("-o") + 1] = str(library)
    subprocess.run(words, cwd=build, check=True)
    return library


_RUN = """
import importlib, json, sys, torch
from grokkernels import native
from grokkernels.testing import judge
from grokkernels.testing.cases import tables
table_name, case_name, dtype, architecture, seeds = sys.argv[1:]
table = tables()[table_name]
if case_name.startswith("case("):
    case = eval(case_name, vars(importlib.import_module("grokkernels.testing.cases." + table_name)))
else:
    case = next(case for case in table.cases if case.name.startswith(case_name))
torch.set_num_threads(2)
for seed in range(int(seeds)):
    native.emulated.set_seed(seed)
    try:
        with judge.at_level(architecture):
            verdict = judge.judge(table, case, getattr(torch, dtype), "emulated")
    except Exception as error:
        print(json.dumps({"report": str(error).splitlines()[0]}))
    else:
        print(json.dumps({} if verdict.passed else {"numbers": f"{verdict.where}: {verdict.ratio:.3g}"}))
"""


def run(bug: Bug, library: Path | None) -> Caught:
    """What `SEEDS` seeds, 0 among them, say of a library; None: of the correct one."""
    environment = dict(os.environ)
    if library is not None:
        environment["GROKKERNELS_EMULATED_LIBRARY"] = str(library)
    arguments = [bug.table, bug.case, bug.dtype, bug.architecture, str(SEEDS)]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 and library is not None:  # the kernel took the process with it: that is seen too
        results.append({"report": f"the process ended with {done.returncode}"})
    elif done.returncode != 0:
        raise AssertionError(done.stderr)
    reports = [result["report"] for result in results if "report" in result]
    numbers = [result["numbers"] for result in results if "numbers" in result]
    return Caught(len(reports), len(numbers), (reports + numbers + [""])[0])
