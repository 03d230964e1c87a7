"""Builds the native libraries with ninja, one per column of the grid.

grokkernels._C           csrc/cpu, compiled once per line of csrc/cpu/levels.txt
grokkernels._C_emulated  csrc/cuda, compiled by the C++ compiler for the emulated device: for tests, when asked for

csrc/torch/<op>.cpp is compiled into each of them (csrc/torch/column.h). GROKKERNELS_COLUMNS names the columns to build,
as in "cpu,emulated"; by default cpu. CMakeLists.txt builds the CPU column without torch or Python. Environment
besides: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# Oldest torch whose stable ABI the extension speaks: 2.10, in the form TORCH_TARGET_VERSION wants.
TORCH_TARGET = "2.10"
TORCH_TARGET_VERSION = "0x020a000000000000"
CXXFLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # a*b+c rounds as written, wherever the compiler puts it: rows are the same in every batch
    "-Wall",
    "-Wextra",
]


def levels() -> dict[str, list[str]]:
    """Instruction-set levels by name with the flags each adds; only the baseline away from x86-64."""
    lines = [line.split() for line in (CSRC / "cpu" / "levels.txt").read_text().splitlines() if line and line[0] != "#"]
    if platform.machine() not in ("x86_64", "AMD64"):
        lines = lines[:1]
    return {name: flags for name, *flags in lines}


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[-1]) is None:
        raise SystemExit(
            f"grokkernels needs a C++20 compiler and found no '{command[-1] if command else 'c++'}': install the "
            "package g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or name one with CXX."
        )
    return command


def ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise SystemExit("grokkernels is built with ninja and found none: pip install ninja.") from None
    return str(Path(BIN_DIR) / "ninja")


def torch_paths() -> tuple[list[str], str, str]:
    """Include directories and library directory of the installed torch, and its version."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"grokkernels is built against torch, which does not import here ({error}): pip install torch."
        ) from error
    root = Path(torch.__file__).parent
    include = root / "include"
    return [str(include), str(include / "torch" / "csrc" / "api" / "include")], str(root / "lib"), torch.__version__


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        raise SystemExit("grokkernels is built with pybind11 and found none: pip install pybind11.") from None
    return pybind11.get_include()


def escape(text: str) -> str:
    """A path or command as ninja spells it."""
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def define(name: str, value: str) -> str:
    return shlex.quote(f"-D{name}={value}")


@dataclass(frozen=True)
class Object:
    """One source compiled one way."""

    source: Path
    name: str  # of the object file, below the build directory
    flags: str = ""


def cpu_objects() -> list[Object]:
    found = []
    for level, level_flags in levels().items():
        flags = f"-DGK_CPU_LEVEL={level} -DGK_CPU_IS_BASELINE={int(level == 'baseline')} " + " ".join(level_flags)
        found += [Object(p, f"cpu/{p.stem}.{level}.o", flags) for p in sorted((CSRC / "cpu").glob("*.cpp"))]
    return found + [Object(p, f"runtime/{p.stem}.o") for p in sorted((CSRC / "cpu" / "runtime").glob("*.cpp"))]


def cuda_sources() -> list[Path]:
    """The kernels of the CUDA column: csrc/cuda/<op>.cu, or the files of csrc/cuda/<op>/ where an op has several."""
    return sorted((CSRC / "cuda").glob("*.cu")) + sorted((CSRC / "cuda").glob("*/*.cu"))


def cuda_ops() -> set[str]:
    parts = [path.relative_to(CSRC / "cuda").parts[0] for path in cuda_sources()]
    return {part.removesuffix(".cu") for part in parts}


def emulated_objects() -> list[Object]:
    flags = f"-x c++ -I{shlex.quote(str(CSRC / 'emulated'))} -O2 -march=x86-64-v3 -Wno-unknown-pragmas"
    found = [Object(p, "cuda/" + str(p.relative_to(CSRC / "cuda").with_suffix(".o")), flags) for p in cuda_sources()]
    return found + [Object(p, f"runtime/{p.stem}.o") for p in sorted((CSRC / "emulated" / "runtime").glob("*.cpp"))]


class NinjaBuild(build_ext):
    """One ninja file per library: incremental, parallel, with header dependencies."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        column = COLUMNS[ext.name]
        build_dir = Path(self.build_temp).resolve() / column
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        ninja_file = build_dir / "build.ninja"
        ninja_file.write_text(self.ninja_text(target, column))
        command = [ninja(), "-C", str(build_dir), "-f", str(ninja_file)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        try:
            subprocess.run(command, check=True, stdout=None if self.verbose else subprocess.DEVNULL)
        except subprocess.CalledProcessError:
            # ninja prints the compiler's words on stdout: show them when they were kept back.
            if not self.verbose:
                subprocess.run(command, check=False)
            raise SystemExit(
                "grokkernels: the native library did not build; the compiler's words stand above."
            ) from None
        database = subprocess.run([*command[:5], "-t", "compdb", "cxx"], check=True, capture_output=True, text=True)
        (build_dir / "compile_commands.json").write_text(database.stdout)

    def ninja_text(self, target: Path, column: str) -> str:
        cxx = " ".join(shlex.quote(part) for part in compiler())
        torch_include, torch_lib, torch_version = torch_paths()
        python_include = [sysconfig.get_paths()["include"], pybind11_include()]
        common = " ".join([*CXXFLAGS, f"-I{shlex.quote(str(CSRC))}", os.environ.get("CXXFLAGS", "")])
        system = " ".join(f"-isystem {shlex.quote(path)}" for path in [*torch_include, *python_include])
        torch_flags = f"{system} -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -DGK_COLUMN_{column.upper()}"
        facts = " ".join(
            [
                define("GK_COMPILER", f'"{self.compiler_version()}"'),
                define("GK_TORCH_TARGET", f'"{TORCH_TARGET}"'),
                define("GK_TORCH_BUILT_WITH", f'"{torch_version}"'),
            ]
        )
        objects = cpu_objects() if column == "cpu" else emulated_objects()
        ops = sorted((CSRC / "torch").glob("*.cpp"))
        objects += [Object(p, f"torch/{p.stem}.o", torch_flags) for p in ops if column == "cpu" or p.stem in cuda_ops()]
        own = sorted((CSRC / "torch" / column).glob("*.cpp"))
        objects += [Object(p, f"torch/{column}/{p.stem}.o", f"{torch_flags} {facts}") for p in own]
        text = [
            "ninja_required_version = 1.5",
            f"rule cxx\n  command = {cxx.replace('$', '$$')} -MMD -MF $out.d {common} $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = $out",
            f"rule link\n  command = {cxx} -shared $in -o $out {os.environ.get('LDFLAGS', '')} "
            f"-L{shlex.quote(torch_lib)} -ltorch_cpu -ltorch -pthread\n  description = $out",
        ]
        for o in objects:
            text.append(f"build {o.name}: cxx {escape(str(o.source))}\n  flags = {o.flags}")
        text.append(f"build {escape(str(target))}: link {' '.join(o.name for o in objects)}")
        text.append(f"default {escape(str(target))}")
        return "\n".join(text) + "\n"

    @staticmethod
    def compiler_version() -> str:
        words = subprocess.run([*compiler(), "--version"], check=True, capture_output=True, text=True).stdout
        return words.splitlines()[0].replace('"', "")


def source_files() -> list[str]:
    """Everything the sdist must carry to build: setuptools takes the list from the extension."""
    found = [path for kind in ("*.cpp", "*.h", "*.txt", "*.cu", "*.cuh") for path in CSRC.rglob(kind)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


# The libraries, by the column each serves.
COLUMNS = {"grokkernels._C": "cpu", "grokkernels._C_emulated": "emulated"}


def wanted() -> list[str]:
    """The columns to build. Errors: SystemExit for a word that names none."""
    named = [word.strip() for word in os.environ.get("GROKKERNELS_COLUMNS", "cpu").split(",")]
    for word in named:
        if word not in COLUMNS.values():
            raise SystemExit(
                f"GROKKERNELS_COLUMNS names no column: '{word}'; allowed are {', '.join(COLUMNS.values())}"
            )
    return named


if __name__ == "__main__":
    sources = [s for s in source_files() if s.endswith(".cpp")]
    setup(
        ext_modules=[
            Extension(name, sources=sources, depends=source_files())
            for name, column in COLUMNS.items()
            if column in wanted()
        ],
        cmdclass={"build_ext": NinjaBuild},
    )
