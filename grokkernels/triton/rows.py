"""How matrices of independent rows are dealt out to programs, and sums over rows: shared by norms and losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED
from grokkernels.triton.kernel import kernel

# A program holds at most so many elements of a tensor at once.
TILE = 8192
# Short rows lie side by side up to so many elements; the interpreter, slow by the program, takes more together.
TOGETHER = 65536 if INTERPRETED else 2048
# Programs that each sum a share of the rows: four for each multiprocessor of a large GPU.
CHUNKS = 512


@dataclass(frozen=True)
class RowTiles:
    """A tile of `rows` whole rows, or of one row's next `columns` where it is longer than a tile."""

    rows: int
    columns: int
    num_warps: int

    @classmethod
    def of(cls, cols: int, *, per_thread: int = 32) -> RowTiles:
        """Tiles for rows of `cols` elements, so many of them for each thread at most: fewer where much is kept."""
        columns = min(triton.next_power_of_2(max(cols, 1)), TILE)
        rows = max(1, TOGETHER // columns)
        return cls(rows, columns, max(1, min(TILE // 32 // per_thread, rows * columns // (16 * per_thread))))

    def chunk(self, rows: int) -> int:
        """How many rows each of at most CHUNKS programs takes, a multiple of the tile's."""
        return triton.cdiv(triton.cdiv(rows, CHUNKS), self.rows) * self.rows


@kernel
def sum_of_rows_kernel(x_ptr, sum_ptr, rows: tl.int64, cols: tl.int64, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x (rows, cols) float32 -> sum (cols), added up in float64, always in the same order."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * cols + column[None, :], inside, 0.0)
        total += tl.sum(x.to(tl.float64), 0)
    tl.store(sum_ptr + column, total.to(tl.float32).to(sum_ptr.dtype.element_ty), column < cols)


def sum_of_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (rows, cols) float32, contiguous -> (cols) in `dtype`."""
    rows, cols = x.shape
    total = x.new_empty((cols,), dtype=dtype)
    columns = 64
    sum_of_rows_kernel[(triton.cdiv(cols, columns),)](x, total, rows, cols, ROWS=32, COLUMNS=columns, num_warps=4)
    return total
