"""Parametrises the classes of tests/suite.py over the case table they name."""

from __future__ import annotations

import os

# Before OpenMP starts: waiting threads sleep. They would spin against each other where tests run in parallel.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Before triton's kernels are defined: on a machine without a GPU they are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

from tests.suite import CaseTableTests, backends

# Drawn tests draw anew on a developer's machine and the same everywhere in CI; neither is timed.
settings.register_profile("explore", deadline=None)
settings.register_profile("repeat", deadline=None, derandomize=True)
settings.load_profile("repeat" if os.environ.get("CI") else "explore")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is None or not issubclass(metafunc.cls, CaseTableTests):
        return
    table = metafunc.cls.table
    wanted = metafunc.fixturenames
    if "case" in wanted:
        metafunc.parametrize("case", table.cases, ids=lambda case: case.name)
    if "dtype" in wanted:
        metafunc.parametrize("dtype", table.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
    if "device" in wanted:  # what runs on tensors of the CPU as a GPU would
        devices = [backend for backend in backends(table) if backend.name in ("emulated", "triton")]
        metafunc.parametrize("device", devices, ids=str)
    if "emulated" in wanted:
        metafunc.parametrize("emulated", [b for b in backends(table) if b.name == "emulated"], ids=str)
    if "backend" in wanted:
        metafunc.parametrize("backend", backends(table), ids=str)
    if "column" in wanted:
        metafunc.parametrize("column", list(dict.fromkeys(backend.name for backend in backends(table))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the float64 rule on backends that are emulated or interpreted, every case in one dtype, the next in another;
    the other dtypes are `long`: units of tools/judge.py."""
    for item in items:
        if item.originalname != "test_float64_rule" or item.callspec.params["backend"].name in ("cpu", "cuda"):
            continue
        table, chosen = item.cls.table, item.callspec.params
        place = table.cases.index(chosen["case"])
        if chosen["dtype"] != table.dtypes[place % len(table.dtypes)]:
            item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """Two threads in every test, so that parallel paths run on any machine."""
    torch.set_num_threads(2)
