"""gated_activation in Triton: y = act(gate) * up over rows of C columns that may lie apart, and both gradients.

One pass over memory in each direction: a program takes a block of one row, and the gradient takes the activation and
its slope from one exponential. Tensors without gaps are one long row. Whether widths and distances are whole 16-byte
vectors is all that a kernel is compiled for: they are handed over in units of VECTOR elements, so that the compiler
knows what divides them. (How the work is shared out is as in csrc/cuda/gated_activation.cu; Shazeer, "GLU Variants
Improve Transformer", 2020.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED
from grokkernels.triton.activation import activate, value_and_slope
from grokkernels.triton.kernel import kernel

# Elements of a program: two vectors of 16 bytes for each of 256 threads (in bfloat16); the interpreter takes more.
BLOCK = 65536 if INTERPRETED else 4096


@triton.jit
def block_of_row(blocks, cols, BLOCK: tl.constexpr):
    """This program's row and its columns, and which of these are inside."""
    program = tl.program_id(0).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return program // blocks, column, column < cols


@kernel
def gated_activation_fwd_kernel(
    gate_ptr,  # (rows, cols), rows gate_stride apart
    up_ptr,  # (rows, cols), rows up_stride apart
    y_ptr,  # (rows, cols)
    blocks: tl.int64,  # of a row
    cols: tl.int64,  # this and the strides in units of VECTOR elements
    gate_stride: tl.int64,
    up_stride: tl.int64,
    KIND: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = block_of_row(blocks, cols * VECTOR, BLOCK)
    gate = tl.load(gate_ptr + row * (gate_stride * VECTOR) + column, inside, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * (up_stride * VECTOR) + column, inside, 0.0).to(tl.float32)
    y = activate(gate, KIND) * up
    tl.store(y_ptr + row * (cols * VECTOR) + column, y.to(y_ptr.dtype.element_ty), inside)


@kernel
def gated_activation_bwd_kernel(
    dy_ptr,  # each (rows, cols) with its stride between rows
    gate_ptr,
    up_ptr,
    dgate_ptr,  # (rows, cols)
    dup_ptr,  # (rows, cols)
    blocks: tl.int64,
    cols: tl.int64,
    dy_stride: tl.int64,
    gate_stride: tl.int64,
    up_stride: tl.int64,
    KIND: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = block_of_row(blocks, cols * VECTOR, BLOCK)
    dy = tl.load(dy_ptr + row * (dy_stride * VECTOR) + column, inside, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * (gate_stride * VECTOR) + column, inside, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * (up_stride * VECTOR) + column, inside, 0.0).to(tl.float32)
    value, slope = value_and_slope(gate, KIND)
    at = row * (cols * VECTOR) + column
    tl.store(dgate_ptr + at, (dy * up * slope).to(dgate_ptr.dtype.element_ty), inside)
    tl.store(dup_ptr + at, (dy * value).to(dup_ptr.dtype.element_ty), inside)


def _matrices(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each as (rows, cols) with neighbouring columns, read where it lies if its rows are an even distance apart."""
    shape = (-1, tensors[0].shape[-1])
    matrices = [t.reshape(shape) for t in tensors]
    matrices = [m if m.stride(1) == 1 else m.contiguous() for m in matrices]
    return [m.view(1, -1) for m in matrices] if all(m.is_contiguous() for m in matrices) else matrices


def _launch(kernel_function, inputs: list[torch.Tensor], outputs: list[torch.Tensor], kind: int) -> None:
    """Launches over the matrices `inputs`; `outputs` have no gaps."""
    rows, cols = inputs[0].shape
    # The distance between the rows of a matrix that has but one is nobody's.
    strides = [m.stride(0) if rows > 1 else 0 for m in inputs]
    vector = 16 // inputs[0].element_size()
    if any(number % vector for number in (cols, *strides)):
        vector = 1
    blocks = triton.cdiv(cols, BLOCK)
    kernel_function[(rows * blocks,)](
        *inputs, *outputs, blocks, cols // vector, *(stride // vector for stride in strides),
        KIND=kind, VECTOR=vector, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def gated_activation_fwd(gate: torch.Tensor, up: torch.Tensor, kind: int) -> torch.Tensor:
    y = gate.new_empty(gate.shape)
    if y.numel() > 0:
        _launch(gated_activation_fwd_kernel, _matrices(gate, up), [y], kind)
    return y


def gated_activation_bwd(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if dgate.numel() > 0:
        _launch(gated_activation_bwd_kernel, _matrices(dy, gate, up), [dgate, dup], kind)
    return dgate, dup


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok-1's hidden layer, whole and as halves."""
    gate, up = torch.empty(2, 4096, 32768, dtype=dtype, device="meta")
    for kind in range(4):
        gated_activation_bwd(gated_activation_fwd(gate, up, kind), gate, up, kind)
    for cols in (32768, 32767):
        gate, up = torch.empty(4096, 2 * cols, dtype=dtype, device="meta").chunk(2, -1)
        gated_activation_bwd(gated_activation_fwd(gate, up, 0), gate, up, 0)
