"""The emulated column with every launch run as nvcc's own PTX: so whole kernels, inline PTX included, meet the judge.

Inside `ptx_device()` an op called with backend="emulated" goes through its launcher as always; each launch then
comes here, and the PTX interpreter runs it on the memory of the tensors themselves.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests import ptx
from tests.device.conformance import TensorTiles
from tests.device.launches import Size, executor
from tests.ptx.memory import Memory, TensorMap, Window
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
    """What kernels are given are pointers of this process and the emulated device's tensor maps."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[np.ndarray] = []
        self.known_maps: dict[bytes, TensorMap] = {}

    def window(self) -> Window:
        return ProcessWindow()

    def put(self, array: np.ndarray) -> int:
        """A copy that lives as long as this memory: where the constant tables of a kernel lie."""
        room = np.empty(array.nbytes + 256, np.uint8)
        begin = -room.ctypes.data % 256
        room[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.kept.append(room)
        return room.ctypes.data + begin

    def find_map(self, raw: bytes) -> TensorMap:
        if raw not in self.known_maps:
            tiles = TensorTiles.from_buffer_copy(raw)
            self.known_maps[raw] = super().find_map(self.tensor_map(tiles.data, **tiles.described()))
        return self.known_maps[raw]


def is_hopper(source: Path) -> bool:
    return source.stem.endswith(cuda_toolkit.HOPPER_SUFFIX)


@functools.cache
def kernels(source: Path) -> dict[str, tuple[ptx.Module, str]]:
    """The kernels of a source file as sm_80 gets them, Hopper's own as it does: demangled name -> PTX module and
    mangled name."""
    nvcc = cuda_toolkit.find_nvcc()
    assert nvcc is not None, "no nvcc: kernels cannot be judged as PTX"
    with tempfile.NamedTemporaryFile(suffix=".ptx") as target:
        arch = "compute_90a" if is_hopper(source) else "compute_80"
        flags = [*cuda_toolkit.NVCC_FLAGS, *cuda_toolkit.includes(), f"-arch={arch}"]
        subprocess.run([str(nvcc), *flags, "-ptx", "-o", target.name, str(source)], check=True)
        text = Path(target.name).read_text(encoding="utf-8")
    module = ptx.parse(text)
    mangled = re.findall(r"\.entry\s+(\w+)", text)
    names = subprocess.run(["c++filt", *mangled], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: (module, m) for name, m in zip(names, mangled, strict=True)}


@functools.cache
def _text(source: Path) -> str:
    """A source file with the headers of csrc/cuda that it includes."""
    text = source.read_text(encoding="utf-8")
    included = re.findall(r'#include "(cuda/[^"]+\.cuh)"', text)
    return "\n".join([text, *(_text(cuda_toolkit.CSRC / path) for path in included)])


@functools.cache
def source_of(name: str) -> Path:
    """The source file that has the kernel of this demangled name."""
    function = re.search(r"(\w+)(?:<.*>)?\(", name.split("(anonymous namespace)::", 1)[-1])
    assert function is not None, name
    for source in cuda_toolkit.sources():
        if function[1] in _text(source) and name in kernels(source):
            return source
    raise LookupError(f"no source file has the kernel {name}")


def kernel(name: str) -> ptx.Kernel:
    module, mangled = kernels(source_of(name))[name]
    return module.kernel(rf"^{mangled}$")


@contextmanager
def ptx_device() -> Iterator[None]:
    """Launches of the emulated column run as PTX inside."""

    def run(name: str, grid: Size, block: Size, shared_bytes: int, arguments: list[bytes]) -> None:
        ptx.run(kernel(name), grid, block, shared_bytes, arguments, ProcessMemory())

    with executor(run):
        yield
