"""Runs a kernel, its blocks one after another; decodes its instructions once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import families  # noqa: F401  registers the instructions
from .block import Block
from .decode import Step, decode
from .launch import Launch, parameter_bytes, place
from .memory import Memory
from .parser import Kernel
from .types import UnknownInstruction


def run(
    kernel: Kernel,
    grid: Sequence[int] | int,
    block: Sequence[int] | int,
    shared_bytes: int = 0,
    args: Sequence = (),
    memory: Memory | None = None,
    *,
    delay_copies: bool = True,
    seed: int | None = None,
    max_steps: int = 20_000_000,
) -> int:
    """Runs a kernel to its end; returns how many steps (instructions of a group of lanes) it took.

    `args`: one per parameter: an int (integers and pointers), a float, a numpy scalar, or bytes (anything by value).
    `delay_copies`: an asynchronous copy takes effect only when something waits for it, and its destination is NaN until
    then; with `seed`, at a random time before. Without, at once.
    """
    steps = decoded(kernel)
    memory = memory or Memory()
    grid, block = _three(grid), _three(block)
    if not 0 < int(np.prod(block)) <= 1024:
        raise ValueError(f"a block of {block} threads")
    addresses, static_shared, local_bytes = place(kernel, memory)
    rng = None if seed is None else np.random.default_rng(seed)
    parameters = parameter_bytes(kernel, args)
    launch = Launch(
        kernel, steps, grid, block, memory, memory.window(), parameters, shared_bytes, delay_copies, rng, max_steps,
        addresses, static_shared, local_bytes,
    )  # fmt: skip
    taken = 0
    with np.errstate(all="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    one = Block(launch, (x, y, z))
                    one.run()
                    taken += one.steps_taken
    return taken


def decoded(kernel: Kernel) -> list[Step]:
    """The kernel's steps; an unknown instruction becomes a step that raises, so that only reaching it is an error."""
    if kernel.steps is None:
        steps = []
        for instruction in kernel.instructions:
            try:
                steps.append(decode(instruction))
            except UnknownInstruction as error:
                steps.append(Step(instruction, _raises(error)))
        kernel.steps = steps
    return kernel.steps


def unknown(kernel: Kernel) -> list[str]:
    """The error of every instruction of a kernel that the interpreter does not know, reached or not."""
    out = []
    for instruction in kernel.instructions:
        try:
            decode(instruction)
        except UnknownInstruction as error:
            out.append(str(error))
    return out


def _raises(error: UnknownInstruction):
    def run(b: Block) -> None:
        raise error

    return run


def _three(size: Sequence[int] | int) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, int) else tuple(size)
    return (*size, *(1,) * (3 - len(size)))
