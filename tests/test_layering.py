"""Who may import whom: the layers of docs/design.md, read from the sources with ast and a look at #include."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "grokkernels"
CSRC = ROOT / "csrc"

# What each part of the package may import from it. Parts that are not listed sit on top and may import anything.
ALLOWED = {
    "version": set(),
    "waiting": set(),
    "native": set(),
    "preference": set(),
    "triton": set(),
    "reference": set(),
    "derivatives": set(),
    "overlap": set(),
    "dispatch": {"derivatives", "native", "preference", "triton"},
    "ops": {"derivatives", "dispatch", "overlap", "reference"},
    "nn": {"ops"},
    "optim": {"ops"},
    "models": {"nn", "optim", "ops"},
    "compat": {"ops", "nn", "optim"},
    "testing": {"ops", "reference", "dispatch", "native", "optim"},
}
# Third parties that a part may import beside the standard library; None is not held.
THIRD_PARTIES = {
    "reference": {"torch"},
    "derivatives": {"torch"},
    "overlap": {"torch"},
    "dispatch": {"torch"},
    "ops": {"torch"},
    "native": {"torch"},
    "triton": {"torch", "triton", "numpy"},
}


def _part(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = ("grokkernels", *path.relative_to(PACKAGE).parts[: -node.level])
                module = ".".join([*base, module] if module else base)
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
NATIVE_FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_layers(path: Path) -> None:
    part = _part(path)
    allowed = ALLOWED.get(part)
    for name in _imports(path):
        words = name.split(".")
        if words[0] == "grokkernels":
            if allowed is not None:
                assert words[1] in {part, *allowed}, f"{part} imports {name}; it may import {sorted(allowed)}"
        elif part in THIRD_PARTIES and words[0] != "__future__":
            ok = words[0] in sys.stdlib_module_names or words[0] in THIRD_PARTIES[part]
            assert ok, f"{part} imports {words[0]}; it may import {sorted(THIRD_PARTIES[part])}"


@pytest.mark.parametrize("path", NATIVE_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_native_layers(path: Path) -> None:
    includes = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"))
    place = path.relative_to(CSRC).parts[0]
    if place != "torch":
        outside = [i for i in includes if i.startswith(("torch/", "ATen/", "c10/", "pybind11/", "Python.h"))]
        assert not outside, f"only csrc/torch may include {outside}"
    if place == "cpu" or (place not in ("torch", "tests") and path.suffix == ".h"):
        assert not any(i.startswith("torch/") for i in includes)


def test_the_rules_see_something() -> None:
    """The walkers above find imports and includes at all."""
    assert "grokkernels.dispatch" in _imports(PACKAGE / "ops" / "rms_norm.py")
    assert len(PYTHON_FILES) > 10
    assert len(NATIVE_FILES) > 5
