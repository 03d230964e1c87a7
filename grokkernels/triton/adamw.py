"""adamw in Triton: one step of Adam with decoupled weight decay over lists of tensors; global_norm, the norm of many
tensors as one vector.

A launch for each tensor: tables of addresses would have to be copied to the device before. 28 bytes per float32
parameter (read and write p, m, v, read g), 22 with 16-bit parameters; 4 or 2 for the norm. Clipping is a factor inside
the update: gradients are never written. The host learns nothing: a first kernel reads the norm, decides whether there
is a step, raises the step counts and leaves what an update needs of them.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED
from grokkernels.triton.kernel import kernel

# Elements of a program: of an update; of a norm, which takes so many several times.
BLOCK = 65536 if INTERPRETED else 4096
TILE = 65536 if INTERPRETED else 8192
TILES = 1 if INTERPRETED else 8


@triton.jit
def power(base, exponent):
    """base (float64, one number) ^ exponent (int32, many), by squaring."""
    result = tl.full(exponent.shape, 1.0, tl.float64)
    factor = result * base
    for _ in tl.static_range(30):
        result = tl.where(exponent % 2 == 1, result * factor, result)
        factor *= factor
        exponent //= 2
    return result


@kernel
def adamw_rates_kernel(
    steps_ptr,  # (count) float32: raised by one, if there is a step
    norm_ptr,  # () float32, or None: of all gradients
    rates_ptr,  # (count, 4) float32: step size, 1 / sqrt(correction of v), factor of the gradient, whether to step
    count: tl.int64,
    max_norm: tl.float32,
    sign: tl.float32,
    lr: tl.float32,
    one_minus_beta1: tl.float32,  # rounded so, 1 - beta^step keeps a relative error of 2^-24 at most
    one_minus_beta2: tl.float32,
    TENSORS: tl.constexpr,
):
    tensor = tl.program_id(0).to(tl.int64) * TENSORS + tl.arange(0, TENSORS)
    there = tensor < count
    live = tl.full((TENSORS,), 1.0, tl.float32)
    factor = live * sign
    if norm_ptr is not None:
        norm = tl.load(norm_ptr)
        live = tl.where(tl.abs(norm) <= 3.4028234663852886e38, live, 0.0)
        clip = tl.div_rn(live * max_norm, norm + 1e-6)
        factor = factor * tl.where(clip < 1.0, clip, 1.0)
    step = tl.load(steps_ptr + tensor, there, 0.0) + live
    made = tl.minimum(step, 1e9).to(tl.int32)
    one = tl.full((TENSORS,), 1.0, tl.float64)
    step_size = lr / (one - power(one - one_minus_beta1, made))
    root_correction = 1.0 / tl.sqrt(one - power(one - one_minus_beta2, made))
    tl.store(steps_ptr + tensor, step, there)
    tl.store(rates_ptr + 4 * tensor, step_size.to(tl.float32), there)
    tl.store(rates_ptr + 4 * tensor + 1, root_correction.to(tl.float32), there)
    tl.store(rates_ptr + 4 * tensor + 2, factor, there)
    tl.store(rates_ptr + 4 * tensor + 3, live, there)


@kernel
def adamw_update_kernel(
    param_ptr,  # numel * UNIT elements, as the others
    grad_ptr,
    exp_avg_ptr,  # float32
    exp_avg_sq_ptr,  # float32
    rates_ptr,  # (count, 4): those of all tensors
    tensor: tl.int64,
    numel: tl.int64,
    beta1: tl.float32,
    one_minus_beta1: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    eps: tl.float32,
    decay: tl.float32,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rates_ptr += 4 * tensor
    if tl.load(rates_ptr + 3) == 0.0:
        return
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < numel * UNIT
    grad = tl.load(grad_ptr + at, inside, 0.0).to(tl.float32) * tl.load(rates_ptr + 2)
    m = beta1 * tl.load(exp_avg_ptr + at, inside, 0.0) + one_minus_beta1 * grad
    v = beta2 * tl.load(exp_avg_sq_ptr + at, inside, 0.0) + one_minus_beta2 * (grad * grad)
    tl.store(exp_avg_ptr + at, m, inside)
    tl.store(exp_avg_sq_ptr + at, v, inside)
    denominator = tl.sqrt_rn(v) * tl.load(rates_ptr + 1) + eps
    param = tl.load(param_ptr + at, inside, 0.0).to(tl.float32)
    param = (param - decay * param) - tl.load(rates_ptr) * tl.div_rn(m, denominator)
    tl.store(param_ptr + at, param.to(param_ptr.dtype.element_ty), inside)


@kernel
def sum_of_squares_kernel(
    x_ptr,  # numel * UNIT elements
    sums_ptr,  # (chunks) float64
    first_chunk: tl.int64,  # this tensor's first
    numel: tl.int64,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Squares are summed in float32 by eights, in float64 from there on."""
    chunk = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE // 8,), tl.float64)
    for tile in range(TILES):
        at = (chunk * TILES + tile) * TILE + tl.arange(0, TILE // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        x = tl.load(x_ptr + at, at < numel * UNIT, 0.0).to(tl.float32)
        total += tl.sum(x * x, 1).to(tl.float64)
    tl.store(sums_ptr + first_chunk + chunk, tl.sum(total, 0))


@kernel
def root_of_sum_kernel(sums_ptr, norm_ptr, count: tl.int64, BLOCK: tl.constexpr):
    """One program, so that the order is always the same."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + at, at < count, 0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, 0)).to(tl.float32))


def _elements(tensor: torch.Tensor) -> dict[str, int]:
    """How many: in units of 16 where it can be, so that the compiler knows that they end where a vector does."""
    unit = 16 if tensor.numel() % 16 == 0 else 1
    return {"numel": tensor.numel() // unit, "UNIT": unit}


def _laid_out_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy whose elements lie in memory in the order of `like`."""
    same = all(size == 1 or a == b for size, a, b in zip(like.shape, tensor.stride(), like.stride(), strict=True))
    return tensor if same or like.numel() == 0 else torch.empty_like(like).copy_(tensor)


def _fills_memory(tensor: torch.Tensor) -> bool:
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    norm: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    maximize: bool,
) -> None:
    if not params:
        return
    count, tensors = len(params), 128
    made = torch.stack(list(steps))
    rates = made.new_empty((count, 4))
    adamw_rates_kernel[(triton.cdiv(count, tensors),)](
        made, norm, rates, count, max_norm, -1.0 if maximize else 1.0, lr, 1 - beta1, 1 - beta2,
        TENSORS=tensors, num_warps=4,
    )  # fmt: skip
    torch._foreach_copy_(list(steps), list(made.unbind()))
    for i, (param, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        adamw_update_kernel[(triton.cdiv(param.numel(), BLOCK),)](
            param, _laid_out_as(grad, param), m, v, rates, i, **_elements(param),
            beta1=beta1, one_minus_beta1=1 - beta1, beta2=beta2, one_minus_beta2=1 - beta2, eps=eps,
            decay=lr * weight_decay, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


def global_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    chunks = [triton.cdiv(tensor.numel(), TILE * TILES) for tensor in tensors]
    sums = tensors[0].new_empty((sum(chunks),), dtype=torch.float64)
    first = 0
    for tensor, count in zip(tensors, chunks, strict=True):
        tensor = tensor if _fills_memory(tensor) else tensor.contiguous()
        sum_of_squares_kernel[(count,)](tensor, sums, first, **_elements(tensor), TILE=TILE, TILES=TILES, num_warps=8)
        first += count
    norm = tensors[0].new_empty((), dtype=torch.float32)
    root_of_sum_kernel[(1,)](sums, norm, first, BLOCK=1024, num_warps=8)
    return norm


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: an embedding, a norm's scale, an odd size."""
    shapes = ((131072, 6144), (6144,), (1000003,))
    params, grads = ([torch.empty(shape, dtype=dtype, device="meta") for shape in shapes] for _ in range(2))
    exp_avgs, exp_avg_sqs = ([torch.empty(shape, device="meta") for shape in shapes] for _ in range(2))
    steps = [torch.empty((), device="meta") for _ in shapes]
    for norm in (global_norm(grads), None):
        adamw(params, grads, exp_avgs, exp_avg_sqs, steps, norm, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0, False)
