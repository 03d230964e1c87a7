"""The emulated column with every launch run as nvcc's own PTX: so whole kernels, inline PTX included, meet the judge.

Inside `ptx_device()` an op called with backend="emulated" goes through its launcher as always; each launch then
comes here, and the PTX interpreter runs it on the memory of the tensors themselves.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests import ptx
from tests.device.launches import Size, executor
from tests.ptx.memory import Memory, Window
from tests.ptx.types import Fault

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402


class ProcessWindow(Window):
    """The memory of this process as global memory; what is not mapped is out of bounds."""

    FIRST = 1 << 12
    SPAN = (1 << 47) - FIRST  # what a process may address

    def __init__(self) -> None:
        everything = (ctypes.c_uint8 * self.SPAN).from_address(self.FIRST)
        super().__init__("global", np.ctypeslib.as_array(everything), self.FIRST)
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        ranges = [line.split()[0].split("-") for line in maps.splitlines() if line.split()[1].startswith("r")]
        self.begins = [int(begin, 16) for begin, _ in ranges]
        self.ends = [int(end, 16) for _, end in ranges]

    def offsets(self, address: np.ndarray, nbytes: int, align: int) -> np.ndarray:
        for first in (int(address.min()), int(address.max())) if address.size else ():
            i = bisect.bisect_right(self.begins, first) - 1
            if i < 0 or first + nbytes > self.ends[i]:
                raise Fault(f"global access of {nbytes} bytes out of bounds at {first:#x}")
        return super().offsets(address, nbytes, align)


class ProcessMemory(Memory):
    def window(self) -> Window:
        return ProcessWindow()


def is_hopper(source: Path) -> bool:
    """Whether a file is compiled for sm_90a and nothing else."""
    return source.stem.endswith(cuda_toolkit.HOPPER_SUFFIX)


@functools.cache
def kernels(source: Path) -> dict[str, tuple[ptx.Module, str]]:
    """The kernels of a source file as sm_80 (or sm_90a) gets them: demangled name -> PTX module and mangled name."""
    nvcc = cuda_toolkit.find_nvcc()
    assert nvcc is not None, "no nvcc: kernels cannot be judged as PTX"
    with tempfile.NamedTemporaryFile(suffix=".ptx") as target:
        flags = [*cuda_toolkit.NVCC_FLAGS, *cuda_toolkit.includes()]
        flags.append("-arch=compute_90a" if is_hopper(source) else "-arch=compute_80")
        subprocess.run([str(nvcc), *flags, "-ptx", "-o", target.name, str(source)], check=True)
        text = Path(target.name).read_text(encoding="utf-8")
    module = ptx.parse(text)
    mangled = re.findall(r"\.entry\s+(\w+)", text)
    names = subprocess.run(["c++filt", *mangled], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: (module, m) for name, m in zip(names, mangled, strict=True)}


def sources(op: str, hopper: bool = False) -> list[Path]:
    """The kernel files of a row: those for every architecture, or Hopper's own."""
    files = [s for s in cuda_toolkit.sources() if s.relative_to(ROOT / "csrc" / "cuda").parts[0].split(".")[0] == op]
    return [source for source in files if is_hopper(source) == hopper]


def _find(name: str) -> tuple[ptx.Module, str]:
    """The kernel of this demangled name, in whichever source file has it."""
    function = re.search(r"(\w+)(?:<.*>)?\(", name.split("(anonymous namespace)::", 1)[-1])
    assert function is not None, name
    for source in cuda_toolkit.sources():
        if function[1] in source.read_text(encoding="utf-8") and name in kernels(source):
            return kernels(source)[name]
    raise LookupError(f"no source file has the kernel {name}")


# TensorMap of csrc/emulated/device/tma.cuh: dtype, data, rank, size[5], stride[5], box[5], swizzle.
EMULATED_MAP = struct.Struct("<i4xQi4x5q5q5ii")


def _tensor_map(raw: bytes, memory: Memory) -> bytes:
    """The interpreter's tensor map for one that a launcher made for the emulated device."""
    dtype, data, rank, *rest = EMULATED_MAP.unpack(raw)
    size, stride, box, swizzle = rest[:5], rest[5:10], rest[10:15], rest[15]
    itemsize = 4 if dtype == 0 else 2
    # As make_tensor_map does it for the driver: a dimension of one element has any legal stride.
    steps, dense = [], itemsize * size[0]
    for i in range(1, rank):
        steps.append((dense + 15) // 16 * 16 if size[i] == 1 else stride[i] * itemsize)
        dense = steps[-1] * size[i]
    return memory.tensor_map(data, size[:rank], steps, box[:rank], itemsize, (0, 32, 64, 128)[swizzle])


def _parameter_types(name: str) -> list[str]:
    """The types of a kernel's parameters, from its demangled name."""
    types, depth = [""], 0
    for letter in name[name.rindex(">(") + 2 if ">(" in name else name.rindex("(") + 1 : name.rindex(")")]:
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            types.append("")
        else:
            types[-1] += letter
    return [one.strip() for one in types]


@contextmanager
def ptx_device() -> Iterator[None]:
    """Launches of the emulated column run as PTX inside."""

    def run(name: str, grid: Size, block: Size, shared_bytes: int, arguments: list[bytes]) -> None:
        module, mangled = _find(name)
        memory = ProcessMemory()
        arguments = [
            _tensor_map(raw, memory) if kind.endswith("::TensorMap") else raw
            for raw, kind in zip(arguments, _parameter_types(name), strict=True)
        ]
        ptx.run(module.kernel(rf"^{mangled}$"), grid, block, shared_bytes, arguments, memory)

    with executor(run):
        yield
