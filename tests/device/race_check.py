"""Runs every kernel of the CUDA column in a random order of its threads, for ThreadSanitizer to watch.

Numbers are judged elsewhere; `tools/sanitize_extension.sh races` builds the column with the sanitizer and runs this.
"""

from __future__ import annotations

import sys
import time

import torch

from grokkernels import native
from grokkernels.testing import judge
from tests.device.launches import ROWS, cheapest_cover


def is_watched(name: str) -> bool:
    """Not those of float16, which are bfloat16's with other conversions: a race has no dtype, and this takes long."""
    return "::float16" not in name


def main() -> None:
    native.emulated.set_seed(1)
    torch.set_num_threads(1)
    for op in sys.argv[1:] or sorted(ROWS):
        for architecture in ROWS[op][0].architectures:
            began = time.monotonic()
            chosen, kernels = cheapest_cover(op, architecture, is_watched)
            for table, case, dtype in chosen:
                arguments = judge.in_dtype(case.arguments(), dtype)
                with judge.at_level(architecture):
                    judge.run(lambda t=table, **kw: t.op(**kw, backend="emulated"), arguments, table.grad, None)
            spent = time.monotonic() - began
            print(f"{op} {architecture}: {len(kernels)} kernels in {len(chosen)} cases, {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
