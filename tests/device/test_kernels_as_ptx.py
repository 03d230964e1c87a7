"""Every kernel of every row, run as nvcc's PTX on the cheapest cases of its table, meets the float64 rule.

But for kernels of clusters, which the interpreter does not have: tests/ops runs these on the emulated device.
"""

from __future__ import annotations

import pytest

from grokkernels.testing import judge
from tests.device.launches import PLACES, cheapest_cover
from tests.device.ptx_device import cuda_toolkit, is_hopper, kernels, ptx_device


def compiled(architecture: str) -> set[str]:
    """The kernels of all files for this architecture: of sm_90 Hopper's own, the others are those of sm_80."""
    found = set()
    for source in cuda_toolkit.sources():
        if is_hopper(source) is (architecture == "sm_90"):
            for name, (module, mangled) in kernels(source).items():
                if not any(i.opcode.startswith("barrier.cluster") for i in module.kernel(f"^{mangled}$").instructions):
                    found.add(name)
    return found


@pytest.mark.long
@pytest.mark.parametrize(("op", "architecture"), PLACES, ids=[f"{op}-{arch}" for op, arch in PLACES])
def test_kernels_as_ptx(op: str, architecture: str) -> None:
    chosen, _ = cheapest_cover(op, architecture, compiled(architecture))
    assert chosen, f"no case of {op} launches a kernel"
    with judge.at_level(architecture), ptx_device():
        for table, case, dtype in chosen:
            verdict = judge.judge(table, case, dtype, "emulated")
            assert verdict.passed, f"{case.name}, {dtype}: {verdict.where} is {verdict.ratio:.3g} times too far"


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_kernel_is_launched(architecture: str) -> None:
    """By a case of some row: its own, or one that shares the file."""
    names = compiled(architecture)
    rows = [op for op, have in PLACES if have == architecture]
    launched = {name for op in rows for name in cheapest_cover(op, architecture, names)[1]}
    assert names == launched, f"no case launches {sorted(names - launched)}"
