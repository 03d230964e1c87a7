"""The Triton column with every launch compiled for sm_80 and run by the PTX interpreter:

    python -m tests.triton.ptx_judge rms_norm

So the compiler's own output meets the float64 rule. It needs a process of its own, since kernels that are to be
compiled cannot be loaded under TRITON_INTERPRET.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from grokkernels.testing import judge
from grokkernels.triton.kernel import Launch, executing
from tests import ptx
from tests.device.ptx_device import ProcessMemory
from tests.triton.cover import cover, threads_of

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import triton_aot  # noqa: E402

_parsed: dict[tuple[str, tuple[str, ...]], tuple[ptx.Kernel, int]] = {}


def compiled(launch: Launch) -> tuple[ptx.Kernel, int]:
    """The kernel as Triton compiles it for sm_80, and its bytes of shared memory."""
    key = triton_aot.name(launch), tuple(launch.aligned())
    if key not in _parsed:
        built = triton_aot.compile_for(launch, "sm_80")
        kernel = ptx.parse(built.asm["ptx"]).kernel(built.metadata.name)
        _parsed[key] = kernel, built.metadata.shared
    return _parsed[key]


def run(launch: Launch) -> None:
    """In the interpreter, on the memory of the tensors themselves."""
    kernel, shared = compiled(launch)
    kinds = {name: kind for name, kind in launch.signature().items() if kind != "constexpr"}
    arguments = [number(launch.arguments[name], kind) for name, kind in kinds.items()]
    arguments += [0] * (len(kernel.parameters) - len(arguments))  # Triton's own: scratch for descriptors and profiles
    ptx.run(kernel, launch.grid, threads_of(launch), shared, arguments, ProcessMemory())


def number(value: Any, kind: str) -> int | float:
    """An argument as the kernel gets it."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return float(value) if kind.startswith("fp") else int(value)


def main(op: str) -> int:
    failed = 0
    for dtype in (torch.float32, torch.bfloat16):
        for table, case in cover(op, dtype):
            with executing(run):
                verdict = judge.judge(table, case, dtype, "triton")
            print(f"{table.name} {case.name}, {dtype}: {verdict.ratio:.3g} times what is allowed, {verdict.where}")
            failed += not verdict.passed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
