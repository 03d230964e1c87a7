"""Cases of adamw: a step from some state, judged as a function that returns the updated copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grokkernels.ops.adamw import adamw as contract
from grokkernels.reference.adamw import adamw_step
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


def _stepped(
    step: Callable[..., torch.Tensor | None], made: int, tensors: dict[str, torch.Tensor], **options: Any
) -> tuple[torch.Tensor, ...]:
    """Parameters, first and second moments after `step`, each kind as one vector, and the norm if there is one."""
    count = len(tensors) // 4
    params, exp_avgs, exp_avg_sqs = ([tensors[f"{kind}{i}"].clone() for i in range(count)] for kind in "pmv")
    grads = [tensors[f"g{i}"] for i in range(count)]
    steps = [param.new_full((), made, dtype=torch.float32) for param in params]
    norm = step(params, grads, exp_avgs, exp_avg_sqs, steps, **options)
    kinds = [torch.cat([t.flatten() for t in tensors]) for tensors in (params, exp_avgs, exp_avg_sqs)]
    return (*kinds, *([] if norm is None else [norm]))


def adamw(*, steps_made: int, options: dict[str, Any], backend: str | None = None, **tensors: torch.Tensor) -> Any:
    """grokkernels.ops.adamw on copies; tensors p0, g0, m0, v0, p1 ... are parameters, gradients and moments."""
    return _stepped(contract, steps_made, tensors, backend=backend, **options)


def reference(*, steps_made: int, options: dict[str, Any], **tensors: torch.Tensor) -> Any:
    """The same with the reference."""

    def step(params, grads, exp_avgs, exp_avg_sqs, steps, **options):
        return adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps_made + 1, **options)

    return _stepped(step, steps_made, tensors, **options)


@builder
def case(*shapes: tuple[int, ...], steps_made: int = 3, grad_std: float = 1.0, why: str = "", **options: Any) -> Case:
    """Parameters of these shapes after some steps; moments as gradients of size grad_std leave them."""

    def build(generator: torch.Generator) -> Arguments:
        arguments: Arguments = {"steps_made": steps_made, "options": options}
        for i, shape in enumerate(shapes):
            arguments[f"p{i}"] = normal(generator, *shape)
            arguments[f"g{i}"] = normal(generator, *shape, std=grad_std)
            arguments[f"m{i}"] = normal(generator, *shape, std=0.3 * grad_std * (steps_made > 0), dtype=torch.float32)
            # Never far below the squares of the gradients that made m: the update would be cancellation over nothing.
            second = 1 + normal(generator, *shape, dtype=torch.float32).square()
            arguments[f"v{i}"] = second * (0.1 * grad_std) ** 2 * (steps_made > 0)
        return arguments

    words = ["+".join("x".join(map(str, shape)) or "scalar" for shape in shapes), f"after {steps_made}"]
    words += [f"grad_std={grad_std:g}"] * (grad_std != 1) + [f"{k}={v}" for k, v in options.items()]
    return Case(" ".join(words), build, why)


TABLE = Table(
    op=adamw,
    reference=reference,
    grad=(),
    cases=(
        case((64, 48), steps_made=0, why="the first step, from empty moments"),
        case((64, 48), (100,), (33, 7), lr=0.1, why="several tensors, tails in two of them"),
        case((5,), (), (0, 3), (1,), why="shorter than a vector, a scalar, an empty tensor in the middle"),
        case((8192 * 2 + 5,), (8191,), (8192,), (0,), why="tensors around the size of a chunk, an empty one last"),
        case((200, 333), lr=0.01, weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-4, why="every hyperparameter shows"),
        case((50, 40), (999,), max_norm=1.0, lr=0.1, why="clipped"),
        case((50, 40), (999,), max_norm=1e4, why="a norm below the limit"),
        case((300,), (17, 3), max_norm=0.5, maximize=True, lr=0.1),
        case((300,), maximize=True, weight_decay=0.0, lr=1.0),
        case((4000,), steps_made=100000, lr=0.1, why="both corrections gone"),
        case((4000,), grad_std=1e-3, lr=0.1, why="small gradients, where eps and the moments' own roundings matter"),
        case((64,), lr=0.0, why="only the moments move"),
    ),
)
