"""The tests of a file of tests/ops that ask a kernel of the GPU, each a row: run by pytest, by way of bridge.py.

Left out: the case tables, which are asked by themselves, and what only the CPU column or the reference answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gpu import worker
from gpu.record import ABSENT, ERROR, PASSED, WRONG, Row

ELSEWHERE = ("cpu", "reference", "native")  # values of a test's parameters that name no kernel of a GPU


class Rows:
    """Runs what was collected row by row, and says how each ended."""

    def __init__(self, file: str, done: list[str], say: Callable[..., None]) -> None:
        self._file, self._done, self._say = file, done, say
        self._reports: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def _row(self, item: pytest.Item) -> Row:
        return Row(
            "tests",
            Path(self._file).stem.removeprefix("test_"),
            "emulated as cuda, triton",
            item.nodeid.partition("::")[2],
        )

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = [item for item in session.items if asks_a_gpu(item) and self._row(item).key not in self._done]
        self._say(plan=[asdict(self._row(item)) for item in items])
        for item, following in zip(items, [*items[1:], None], strict=True):
            row = self._row(item)
            self._say(begin=row.key)
            self._reports.clear()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            row.kind, row.words = outcome(self._reports)
            self._say(row=asdict(row))
            if row.kind == WRONG and worker.lost():
                os._exit(worker.POISONED)
        return True


def asks_a_gpu(item: pytest.Item) -> bool:
    from tests.suite import CaseTableTests

    of_table = getattr(item, "cls", None) is not None and issubclass(item.cls, CaseTableTests)  # type: ignore[attr-defined]
    if of_table:
        return "on_triton" in item.name
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return not any(getattr(value, "name", value) in ELSEWHERE for value in values if hasattr(value, "__hash__"))


def outcome(reports: list[pytest.TestReport]) -> tuple[str, str]:
    failed = next((report for report in reports if report.failed), None)
    if failed is not None:
        crash = getattr(failed.longrepr, "reprcrash", None)
        return WRONG, crash.message if crash is not None else failed.longreprtext[-500:]
    if any(report.skipped for report in reports):
        return ABSENT, "skipped by the test"
    return (PASSED, "") if reports else (ERROR, "pytest said nothing")


def serve(spec: dict[str, Any], say: Callable[..., None]) -> None:
    os.environ["GROKKERNELS_BRIDGE"] = "cuda" if spec["device"] == "cuda" else "cpu"
    # The overload that the bridge answers must have no kernels of its own.
    os.environ["GROKKERNELS_EMULATED_LIBRARY"] = str(worker.ROOT / "build" / "no-such-library.so")
    options = ["-p", "gpu.bridge", "-p", "no:cacheprovider", "--rootdir", str(worker.ROOT), *spec.get("options", [])]
    pytest.main([str(worker.ROOT / spec["file"]), *options], plugins=[Rows(spec["file"], spec["done"], say)])
    say(end=True)
