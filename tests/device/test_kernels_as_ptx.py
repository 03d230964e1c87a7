"""Every kernel of every row, run as nvcc's PTX on the cheapest cases of its table, meets the float64 rule; of Hopper's
kernels those that take no cluster."""

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


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(op for op, of in ROWS.items() if any("sm_90" in t.architectures for t in of)))
def test_hopper_kernels_as_ptx(op: str) -> None:
    compiled = {name for source in sources(op, hopper=True) for name in kernels(source)}
    chosen, launched = cheapest_cover(op, "sm_90", compiled)
    assert launched, f"no case of {op} launches a kernel of its Hopper files"
    with judge.at_level("sm_90"), ptx_device():
        for table, case, dtype in chosen:
            verdict = judge.judge(table, case, dtype, "emulated")
            assert verdict.passed, f"{case.name}, {dtype}: {verdict.where} is {verdict.ratio:.3g} times too far"
