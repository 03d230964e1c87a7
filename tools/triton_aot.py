"""Triton's compiler without a GPU: the launches of a row at real sizes, compiled for targets that are not there."""

from __future__ import annotations

import importlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ptxas
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grokkernels import triton as column
from grokkernels.triton import kernel as kernels
from grokkernels.triton.kernel import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
DTYPES = (torch.float32, torch.bfloat16)  # float16 takes the same instructions as bfloat16
# What a target's matrix units are asked with, the newest first.
TENSOR = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel on one target."""

    kernel: str  # "rms_norm rms_norm_fwd_kernel<bf16, C=6144, ...>"
    target: str
    registers: int  # of a thread; on AMD vector registers, those for accumulation among them
    spills: int  # NVIDIA: bytes stored and loaded; AMD: registers
    shared: int  # bytes
    tensor: str  # "mma.sync", or empty


def launches(op: str) -> dict[str, Launch]:
    """What the row launches at the sizes of its example calls, by the names that tell the compiler's kernels apart."""
    assert not column.INTERPRETED, "kernels that are to be compiled must be loaded without TRITON_INTERPRET"
    module = importlib.import_module(f"grokkernels.triton.{op}")
    found: dict[str, Launch] = {}
    for dtype in DTYPES:
        with kernels.executing(lambda launch: found.setdefault(f"{op} {name(launch)}", launch)):
            module.example_calls(dtype)
    return found


def name(launch: Launch) -> str:
    """`kernel<types of its pointers, constexpr, options>`."""
    pointers = [kind.lstrip("*") for kind in launch.signature().values() if kind.startswith("*")]
    types = "/".join(dict.fromkeys(pointers))
    words = [types]
    for parameter, value in launch.arguments.items():
        if value is None:
            words.append(f"no {parameter.removesuffix('_ptr')}")
        elif parameter in launch.kernel.constexprs and parameter != "PRECISION":
            words.append(f"{parameter}={value}")
    words += [f"{option.removeprefix('num_')}={value}" for option, value in launch.options.items()]
    return f"{launch.kernel.name}<{', '.join(words)}>"


def compile_for(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel."""
    gpu = TARGETS[target]
    if "PRECISION" in launch.arguments:
        precision = "ieee" if gpu.backend == "hip" else "tf32x3"
        launch = replace(launch, arguments={**launch.arguments, "PRECISION": precision})
    signature = launch.signature()
    constants = {key: launch.arguments[key] for key, kind in signature.items() if kind == "constexpr"}
    places = {parameter: i for i, parameter in enumerate(launch.kernel.parameters)}
    attributes = {(places[parameter],): [["tt.divisibility", 16]] for parameter in launch.aligned()}
    source = ASTSource(launch.kernel.jit, signature, constants, attributes)
    return triton.compile(source, target=gpu, options={**launch.options, **kernels.ALWAYS})


def examine(label: str, launch: Launch, target: str) -> Compiled:
    """Compiles, and reads the compiler's own report."""
    said = io.StringIO()
    with redirect_stdout(said):
        compiled = compile_for(launch, target)
    if TARGETS[target].backend == "hip":
        text = compiled.asm["amdgcn"]
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+_count): +(\d+)", text)}
        # Scalar registers that run out are kept in lanes of vector registers, not in memory: those count here.
        registers, spills = numbers["vgpr_count"], numbers["vgpr_spill_count"]
    else:
        text = compiled.asm["ptx"]
        ((report,), _) = ptxas.parse(said.getvalue())
        registers, spills = report.registers, report.spill_stores + report.spill_loads
    tensor = next((word for word in TENSOR if word in text), "")
    return Compiled(label, target, registers, spills, compiled.metadata.shared, tensor)


@contextmanager
def reporting() -> Iterator[None]:
    """Inside, everything is compiled anew, since ptxas reports only when it runs, and it prints its report."""
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as folder:
        before = knobs.cache.dir, knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log
        knobs.cache.dir, knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = folder, True, True
        try:
            yield
        finally:
            knobs.cache.dir, knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = before
