"""Every kernel of every row, run as nvcc's PTX on the cheapest cases of its table, meets the float64 rule.

But for kernels of clusters, which the interpreter does not have: tests/ops runs these on the emulated device.
"""

from __future__ import annotations

import pytest

from grokkernels.testing import judge
from tests.device.launches import PLACES, cheapest_cover, every_kernel
from tests.device.ptx_device import is_hopper, kernel, ptx_device, source_of


@pytest.mark.long
@pytest.mark.parametrize(("op", "architecture"), PLACES, ids=[f"{op}-{arch}" for op, arch in PLACES])
def test_kernels_as_ptx(op: str, architecture: str) -> None:
    def is_judged(name: str) -> bool:
        """Of sm_90 Hopper's own kernels, the others are those of sm_80."""
        if is_hopper(source_of(name)) is not (architecture == "sm_90"):
            return False
        return not any(i.opcode.startswith("barrier.cluster") for i in kernel(name).instructions)

    chosen, _ = cheapest_cover(op, architecture, is_judged)
    assert chosen, f"no case of {op} launches a kernel"
    with judge.at_level(architecture), ptx_device():
        for table, case, dtype in chosen:
            verdict = judge.judge(table, case, dtype, "emulated")
            assert verdict.passed, f"{case.name}, {dtype}: {verdict.where} is {verdict.ratio:.3g} times too far"


def test_every_kernel_is_launched() -> None:
    """By a case of some row."""
    launched = {name for place in PLACES for name in cheapest_cover(*place)[1]}
    missing = every_kernel() - launched
    assert not missing, f"no case launches {sorted(missing)}"
