"""Every kernel of the CUDA column under random schedules: threads in any order, copies at any time before their wait.

The seed that a failure names repeats it: `native.emulated.set_seed(seed)`. GROKKERNELS_SEEDS says how many are tried.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from grokkernels import native
from grokkernels.testing import judge
from tests.device.launches import PLACES, cheapest_cover

SEEDS = range(1, 1 + int(os.environ.get("GROKKERNELS_SEEDS", "3")))


@pytest.fixture(autouse=True)
def _in_order_afterwards() -> Iterator[None]:
    yield
    native.emulated.set_seed(0)


@pytest.mark.long
@pytest.mark.parametrize(("op", "architecture"), PLACES, ids=[f"{op}-{arch}" for op, arch in PLACES])
def test_random_schedules(op: str, architecture: str) -> None:
    chosen, _ = cheapest_cover(op, architecture)
    assert chosen, f"{op} launches nothing"
    for table, case, dtype in chosen:
        for seed in SEEDS:
            native.emulated.set_seed(seed)
            with judge.at_level(architecture):
                verdict = judge.judge(table, case, dtype, "emulated")
            assert verdict.passed, f"seed {seed}, {case.name}, {dtype}: {verdict.where} is {verdict.ratio:.3g} over"
