"""What all blocks of a run have in common: the arguments as bytes, and where every variable lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .decode import Step
from .memory import LOCAL_FIRST, SHARED_FIRST, Memory, Window
from .parser import Kernel, Parameter


@dataclass
class Launch:
    """One run."""

    kernel: Kernel
    steps: list[Step]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    memory: Memory
    globals: Window
    parameters: np.ndarray
    shared_bytes: int
    delay_copies: bool
    rng: np.random.Generator | None
    max_steps: int
    addresses: dict[str, int]
    static_shared: int
    local_bytes: int


def parameter_bytes(kernel: Kernel, args: Sequence) -> np.ndarray:
    if len(args) != len(kernel.parameters):
        raise TypeError(f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(args)}")
    out = np.zeros(-(-kernel.parameter_bytes // 16) * 16 or 16, np.uint8)
    for parameter, value in zip(kernel.parameters, args, strict=True):
        raw = _raw(parameter, value)
        out[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(raw, np.uint8)
    return out


def _raw(parameter: Parameter, value) -> bytes:
    if isinstance(value, (bool, int)) and parameter.size <= 8 and parameter.type.kind != "f":
        return (int(value) % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
    if isinstance(value, float) and parameter.type.kind == "f":
        return np.array(value, parameter.type.dtype).tobytes()
    raw = value.tobytes() if isinstance(value, (np.generic, np.ndarray)) else None
    if raw is None and not isinstance(value, (bool, int, float)):
        raw = bytes(value)
    if raw is None or len(raw) != parameter.size:
        raise TypeError(f"{parameter.name} is {parameter.size} bytes of .{parameter.type.name}, not {value!r:.60}")
    return raw


def place(kernel: Kernel, memory: Memory) -> tuple[dict[str, int], int, int]:
    """Addresses of all variables, each in its space; bytes of static shared memory; bytes of local memory."""
    addresses: dict[str, int] = {p.name: p.offset for p in kernel.parameters}
    shared, local, dynamic = SHARED_FIRST, LOCAL_FIRST, []
    names = "\0".join(i.text for i in kernel.instructions)
    for variable in [*kernel.module.variables.values(), *kernel.variables.values()]:
        if variable.space == "shared":
            if variable.dynamic:
                dynamic.append(variable)
            elif variable.name in kernel.variables or variable.name in names:
                addresses[variable.name] = -(-shared // variable.align) * variable.align
                shared = addresses[variable.name] + variable.size
        elif variable.space == "local":
            addresses[variable.name] = -(-local // variable.align) * variable.align
            local = addresses[variable.name] + variable.size
        else:
            if variable.name not in names:
                continue
            symbols = memory.symbols.setdefault(id(kernel.module), (kernel.module, {}))[1]
            if variable.name not in symbols:
                data = variable.data or bytes(variable.size)
                symbols[variable.name] = memory.put(np.frombuffer(data, np.uint8))
            addresses[variable.name] = symbols[variable.name]
    align = max((v.align for v in dynamic), default=16)
    end = -(-shared // align) * align
    addresses |= {v.name: end for v in dynamic}
    return addresses, end - SHARED_FIRST if dynamic else shared - SHARED_FIRST, local - LOCAL_FIRST
