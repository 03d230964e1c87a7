"""Bugs put into the kernels on purpose: each is caught by the emulated device under at least one of a few seeds.

With -s, one line for each says how. A bug that escapes means that a judge has gone blind.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.device import plant
from tests.device.bugs import BUGS


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS, ids=[bug.kind for bug in BUGS])
def test_bug_is_caught(bug: plant.Bug, tmp_path: Path) -> None:
    caught = plant.run(bug, plant.build_with(bug, tmp_path))
    how = f"reported {caught.report}, numbers {caught.numbers} of {plant.SEEDS}"
    print(f"\n{bug.kind:48} {bug.file:30} {how:32} {caught.words:.100}")
    assert caught.seeds > 0, f"not caught: {bug}"


@pytest.mark.long
@pytest.mark.parametrize("table", sorted({bug.table for bug in BUGS}))
def test_correct_kernels_are_never_accused(table: str) -> None:
    runs = {(bug.case, bug.dtype, bug.architecture): bug for bug in BUGS if bug.table == table}
    for bug in runs.values():
        accused = plant.run(bug, None)
        assert accused.seeds == 0, f"{bug.table} {bug.case}: {accused.words}"
    print(f"\nno accusation in {len(runs) * plant.SEEDS} runs of correct kernels")
