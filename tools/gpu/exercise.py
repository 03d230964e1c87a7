"""Runs CUDA kernels, and no more: what compute-sanitizer and ncu look at.

python tools/gpu/exercise.py OP                   the cheapest cover of its kernels, forward and backward
python tools/gpu/exercise.py OP INDEX BACKWARD    three calls of one of its problems (contenders.py) at Grok-1's
                                                  sizes; BACKWARD is 0 or 1
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from gpu.case_rows import chosen  # noqa: E402
from gpu.device import Gpu  # noqa: E402
from gpu.stream_rows import Work  # noqa: E402


def cover(device: Gpu, op: str) -> None:
    for table, _, case, dtype in chosen(device, op, device.column, "cover"):
        print(f"{table.name}, {dtype}, {case.name}", flush=True)
        Work(table, case, dtype, device.column, device.home).call()
        device.synchronize()


def problem(device: Gpu, op: str, index: int, *, backward: bool) -> None:
    from benchmarks.harness import passes
    from gpu.contenders import GROK_1, PROBLEMS

    with torch.device(device.home):
        one = PROBLEMS[op][index](GROK_1)
    call = passes.call(one.ours(device.column), one.tensors, passes.BOTH if backward else passes.FORWARD)
    for _ in range(3):
        call()
    device.synchronize()


def main() -> None:
    op, *rest = sys.argv[1:]
    if rest:
        problem(Gpu(), op, int(rest[0]), backward=rest[1] == "1")
    else:
        cover(Gpu(), op)


if __name__ == "__main__":
    main()
