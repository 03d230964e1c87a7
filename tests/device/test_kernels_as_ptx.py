"""Every sm_80 kernel of every row, run as nvcc's PTX on the cheapest cases of its table, meets the float64 rule."""

from __future__ import annotations

import pytest

from grokkernels.testing import judge
from tests.device.launches import ROWS, cheapest_cover
from tests.device.ptx_device import kernels, ptx_device, sources


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(ROWS))
def test_kernels_as_ptx(op: str) -> None:
    chosen, launched = cheapest_cover(op, "sm_80")
    compiled = {name for source in sources(op) for name in kernels(source)}
    assert compiled <= launched, f"no case of {op} launches {sorted(compiled - launched)}"
    with judge.at_level("sm_80"), ptx_device():
        for table, case, dtype in chosen:
            verdict = judge.judge(table, case, dtype, "emulated")
            assert verdict.passed, f"{case.name}, {dtype}: {verdict.where} is {verdict.ratio:.3g} times too far"
