"""Which files a piece of the tree depends on: followed through #include and import, and to the kernels behind a header.

Nothing is built or imported: the text of the files says it all. tests/test_judge.py holds this against the compiler's
own lists and the linker's symbols; a unit that runs in a copy of the tree (tools/sanitize.py) gets these files and no
others.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
# Where a source finds device/: as PTX, or as C++ with the emulated device. CPU kernels have none.
DEVICE = {"cpu": CSRC, "cuda": CSRC / "cuda", "emulated": CSRC / "emulated"}


def ops() -> list[str]:
    """Every op by the name that its files have in all places."""
    return sorted(path.stem for path in (CSRC / "torch").glob("*.cpp"))


def op_of(table: str) -> str:
    """The op whose contract a case table judges."""
    if table in ops():
        return table
    text = (ROOT / "grokkernels" / "testing" / "cases" / f"{table}.py").read_text(encoding="utf-8")
    return next(op for op in ops() if f"from grokkernels.ops.{op} import" in text)


def kernels(op: str, backend: str) -> list[Path]:
    """The sources of an op's kernels: on the CPU <op>.cpp, <op>_<part>.cpp; in CUDA <op>.cu, or the files of <op>/."""
    if backend != "cpu":
        folder = CSRC / "cuda"
        return sorted([*folder.glob(f"{op}.cu"), *(folder / op).rglob("*.cu")])
    longer = [other for other in ops() if other.startswith(f"{op}_")]
    found = sorted([*(CSRC / "cpu").glob(f"{op}.cpp"), *(CSRC / "cpu").glob(f"{op}_*.cpp")])
    return [path for path in found if not path.stem.startswith(tuple(longer))]


def native(op: str, backend: str) -> set[Path]:
    """All that the op's part of a library is built from: "cpu", "cuda" or "emulated"."""
    own = (CSRC / "torch" / backend).glob("*.cpp")
    runtime = [] if backend == "cuda" else (CSRC / backend / "runtime").glob("*.cpp")
    building = [ROOT / "setup.py", ROOT / "tools" / "cuda_toolkit.py", CSRC / "cpu" / "levels.txt"]
    sources = [*kernels(op, backend), CSRC / "torch" / f"{op}.cpp", *own, *runtime]
    return linked(sources, backend) | set(building)


def compiled(sources: Iterable[Path], backend: str) -> set[Path]:
    """The sources with all that they include."""
    found: set[Path] = set()
    waiting = list(sources)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += included(path, backend)
    return found


def linked(sources: Iterable[Path], backend: str) -> set[Path]:
    """The sources with all that they include, and the kernels whose headers are among that, with what these include."""
    found = compiled(sources, backend)
    while True:
        behind = {source for path in found for source in implementations(path, backend)}
        if behind <= found:
            return found
        found |= compiled(behind, backend)


@functools.cache
def included(path: Path, backend: str) -> list[Path]:
    """The files of the tree that one source or header includes itself."""
    folders = [CSRC, DEVICE[backend], path.parent]
    text = path.read_text(encoding="utf-8")
    found = (next((f / name for f in folders if (f / name).is_file()), None) for name in INCLUDE.findall(text))
    return [one.resolve() for one in found if one is not None]


@functools.cache
def implementations(header: Path, backend: str) -> list[Path]:
    """The sources that define what a header declares: those of its name; in CUDA also those beside it in a folder of
    an op."""
    if header.suffix not in (".h", ".cuh"):
        return []
    if backend == "cpu":
        return kernels(header.stem, "cpu")
    beside = header.parent.glob("*.cu") if header.parent.parent == CSRC / "cuda" else ()
    return sorted({*kernels(header.stem, "cuda"), *beside})


def python(roots: Iterable[Path]) -> set[Path]:
    """The files with all of the tree that they import, the packages that these stand in among them."""
    found: set[Path] = set()
    waiting = [path.resolve() for path in roots]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += imported(path)
    return found


@functools.cache
def imported(path: Path) -> list[Path]:
    """The files of the tree that one file imports itself, the packages that it stands in, and its data."""
    if path.suffix != ".py":
        return []
    found = packages(path)
    data = path.with_suffix(".json")  # that a module of the package reads
    if data.is_file() and path.is_relative_to(ROOT / "grokkernels"):
        found.append(data)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = path.relative_to(ROOT).parts[: -node.level]
                module = ".".join([*base, module] if module else base)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [module for name in names for module in modules(name)]
    return found


def modules(name: str) -> list[Path]:
    """The file of a module of this tree, if the name is one; tools/ is on the path of its own programs."""
    for root in (ROOT, ROOT / "tools"):
        base = root.joinpath(*name.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return [path, *packages(path)]
    return []


def packages(path: Path) -> list[Path]:
    """The __init__.py of every package that a file stands in."""
    return [parent / "__init__.py" for parent in path.parents if (parent / "__init__.py").is_file() and parent != path]


def contract(op: str) -> set[Path]:
    """What judges an op in Python: contract, reference, case tables, the judge, and all that they import."""
    package = ROOT / "grokkernels"
    cases = sorted((package / "testing" / "cases").glob("*.py"))
    own = [path for path in cases if f"grokkernels.ops.{op}" in path.read_text(encoding="utf-8") or path.stem == op]
    roots = [package / "ops" / f"{op}.py", package / "reference" / f"{op}.py", *own, package / "testing" / "judge.py"]
    return python([path for path in roots if path.is_file()])


def triton(op: str) -> set[Path]:
    """The Triton kernels of an op and all that they import; the contract is not among it."""
    return python([ROOT / "grokkernels" / "triton" / f"{op}.py", ROOT / "grokkernels" / "triton" / "interpreter.py"])
