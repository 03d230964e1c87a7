"""Lengths that change from call to call are no reason to compile: 50 of them, forward and backward, op by op."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from grokkernels.testing.cases import tables
from tests.triton.compile_counts import CASES, LENGTHS
from tests.triton.ptx_judge import ROOT

# Kernels of which an op has more than one form, for any length: forward and backward, a sum with and without weights,
# sizes that are multiples of 16 and not; and attention, whose tiles are lower where there are few queries.
FORMS = {
    "flash_attention_fwd_kernel": 2,
    "gather_kernel": 2,
    "grouped_mm_kernel": 3,
    "grouped_mm_dw_kernel": 2,
    "rotary_kernel": 2,
    "adamw_update_kernel": 2,  # whether the number of elements is a multiple of 16
    "sum_of_squares_kernel": 2,
    "list_rows_kernel": 2,
    "reduce_rows_kernel": 2,
}


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    """Of every op, in a process that is not told to interpret: tiles are those of a GPU."""
    command = [sys.executable, "-m", "tests.triton.compile_counts"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_table_is_here() -> None:
    assert {table.name for table, _ in CASES.values()} == {table.name for table in tables().values()}
    assert len(set(LENGTHS)) == 50


@pytest.mark.parametrize("name", CASES)
def test_lengths_do_not_compile(name: str, counts: dict[str, dict[str, int]]) -> None:
    assert counts[name]
    assert all(count <= FORMS.get(kernel, 1) for kernel, count in counts[name].items()), counts[name]
