"""Builds the native libraries with ninja, one per column of the grid.

grokkernels._C           csrc/cpu, compiled once per line of csrc/cpu/levels.txt
grokkernels._C_cuda      csrc/cuda, compiled by nvcc for TORCH_CUDA_ARCH_LIST: where torch has CUDA and there is nvcc,
                         whether a GPU is there or not
grokkernels._C_emulated  csrc/cuda, compiled by the C++ compiler for the emulated device: for tests, when asked for

csrc/torch/<op>.cpp is compiled into each of them (csrc/torch/column.h). GROKKERNELS_COLUMNS names the columns to build,
as in "cpu,emulated"; by default cpu, and cuda where it can be. CMakeLists.txt builds the kernels without torch or
Python. Environment besides: CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402  (of this tree; pip does not install tools/)

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
    rule: str = "cxx"


def cpu_objects() -> list[Object]:
    found = []
    for level, level_flags in levels().items():
        flags = f"-DGK_CPU_LEVEL={level} -DGK_CPU_IS_BASELINE={int(level == 'baseline')} " + " ".join(level_flags)
        found += [Object(p, f"cpu/{p.stem}.{level}.o", flags) for p in sorted((CSRC / "cpu").glob("*.cpp"))]
    return found + [Object(p, f"runtime/{p.stem}.o") for p in sorted((CSRC / "cpu" / "runtime").glob("*.cpp"))]


def cuda_ops() -> set[str]:
    """The rows that have CUDA kernels: csrc/cuda/<op>.cu, or the files of csrc/cuda/<op>/."""
    parts = [path.relative_to(CSRC / "cuda").parts[0] for path in cuda_toolkit.sources()]
    return {part.removesuffix(".cu") for part in parts}


def cuda_object_name(source: Path) -> str:
    return "cuda/" + str(source.relative_to(CSRC / "cuda").with_suffix(".o"))


def nvcc() -> Path:
    found = cuda_toolkit.find_nvcc()
    if found is None:
        raise SystemExit(
            "grokkernels: the CUDA column is built with nvcc 12.8 or newer, and none was found: install the CUDA "
            "toolkit and set CUDA_HOME, or pip install 'nvidia-cuda-nvcc>=13'."
        )
    return found


def cuda_objects() -> list[Object]:
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST")
    try:
        flags = {source: " ".join(cuda_toolkit.architectures(source, arch_list)) for source in cuda_toolkit.sources()}
    except ValueError as error:
        raise SystemExit(f"grokkernels: {error}") from None
    return [Object(source, cuda_object_name(source), words, "nvcc") for source, words in flags.items()]


def emulated_objects() -> list[Object]:
    flags = f"-x c++ -I{shlex.quote(str(CSRC / 'emulated'))} -O2 -march=x86-64-v3 -Wno-unknown-pragmas"
    found = [Object(source, cuda_object_name(source), flags) for source in cuda_toolkit.sources()]
    return found + [Object(p, f"runtime/{p.stem}.o") for p in sorted((CSRC / "emulated" / "runtime").glob("*.cpp"))]


class NinjaBuild(build_ext):
    """One ninja file per library: incremental, parallel, with header dependencies."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        column = COLUMNS[ext.name]
        # Always there, also where pip would have it in a folder that it throws away: so `pip install -e .` is
        # incremental, and tests find how the column was built.
        build_dir = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}" / column
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
        facts = {
            "GK_COMPILER": self.compiler_version(),
            "GK_TORCH_TARGET": TORCH_TARGET,
            "GK_TORCH_BUILT_WITH": torch_version,
        }
        libraries = [f"-L{shlex.quote(torch_lib)}", "-ltorch_cpu", "-ltorch", "-pthread"]
        rules = [
            f"rule cxx\n  command = {cxx.replace('$', '$$')} -MMD -MF $out.d {common} $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = $out"
        ]
        if column == "cuda":
            compiler_of_cuda = nvcc()
            rules.append(self.nvcc_rule(compiler_of_cuda))
            toolkit = cuda_toolkit.toolkit(compiler_of_cuda)
            libraries += [f"-L{shlex.quote(str(toolkit / name))}" for name in ("lib64", "lib")]
            libraries += ["-ltorch_cuda", "-lcudart_static", "-ldl", "-lrt"]
            torch_flags += " -DUSE_CUDA"
            facts["GK_COMPILER"] = f"nvcc {cuda_toolkit.release(compiler_of_cuda)}"
            numbers = cuda_toolkit.architecture_numbers(CSRC, os.environ.get("TORCH_CUDA_ARCH_LIST"))
            facts["GK_CUDA_ARCHITECTURES"] = ", ".join(f"sm_{number}" for number, _ in numbers)
        objects = {"cpu": cpu_objects, "cuda": cuda_objects, "emulated": emulated_objects}[column]()
        ops = sorted((CSRC / "torch").glob("*.cpp"))
        objects += [Object(p, f"torch/{p.stem}.o", torch_flags) for p in ops if column == "cpu" or p.stem in cuda_ops()]
        own = sorted((CSRC / "torch" / column).glob("*.cpp"))
        defined = " ".join(define(name, f'"{words}"') for name, words in facts.items())
        objects += [Object(p, f"torch/{column}/{p.stem}.o", f"{torch_flags} {defined}") for p in own]
        text = [
            "ninja_required_version = 1.5",
            *rules,
            f"rule link\n  command = {cxx} -shared $in -o $out {os.environ.get('LDFLAGS', '')} {' '.join(libraries)}\n"
            "  description = $out",
        ]
        for o in objects:
            text.append(f"build {o.name}: {o.rule} {escape(str(o.source))}\n  flags = {o.flags}")
        text.append(f"build {escape(str(target))}: link {' '.join(o.name for o in objects)}")
        text.append(f"default {escape(str(target))}")
        return "\n".join(text) + "\n"

    @staticmethod
    def nvcc_rule(compiler_of_cuda: Path) -> str:
        host = " ".join(f"-Xcompiler {flag}" for flag in ("-fPIC", "-fvisibility=hidden", "-Wall"))
        words = [
            shlex.quote(str(compiler_of_cuda)),
            f"-ccbin {shlex.quote(compiler()[-1])}",
            *cuda_toolkit.NVCC_FLAGS,
            *cuda_toolkit.includes(),
            host,
        ]
        return (
            f"rule nvcc\n  command = {' '.join(words)} $flags -MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = $out"
        )

    @staticmethod
    def compiler_version() -> str:
        words = subprocess.run([*compiler(), "--version"], check=True, capture_output=True, text=True).stdout
        return words.splitlines()[0].replace('"', "")


def source_files() -> list[str]:
    """Everything the sdist must carry to build: setuptools takes the list from the extension."""
    found = [path for kind in ("*.cpp", "*.h", "*.txt", "*.cu", "*.cuh") for path in CSRC.rglob(kind)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


# The libraries, by the column each serves.
COLUMNS = {"grokkernels._C": "cpu", "grokkernels._C_cuda": "cuda", "grokkernels._C_emulated": "emulated"}


def wanted() -> list[str]:
    """The columns to build. Errors: SystemExit for a word that names none."""
    text = os.environ.get("GROKKERNELS_COLUMNS")
    if not text:
        return ["cpu", "cuda"] if torch_has_cuda() and cuda_toolkit.find_nvcc() is not None else ["cpu"]
    named = [word.strip() for word in text.split(",")]
    for word in named:
        if word not in COLUMNS.values():
            raise SystemExit(
                f"GROKKERNELS_COLUMNS names no column: '{word}'; allowed are {', '.join(COLUMNS.values())}"
            )
    return named


def torch_has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False  # the build says so itself, where it needs torch
    return torch.version.cuda is not None


if __name__ == "__main__":
    sources = [s for s in source_files() if s.endswith(".cpp")]
    chosen = wanted()
    setup(
        ext_modules=[
            Extension(name, sources=sources, depends=source_files())
            for name, column in COLUMNS.items()
            if column in chosen
        ],
        cmdclass={"build_ext": NinjaBuild},
    )
