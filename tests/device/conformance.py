"""The conformance kernels, csrc/tests/device/conformance*.cu: built, run by name, and compared.

tests/device/test_conformance.py compares nvcc's PTX with the emulated device, `make gpu` a GPU with it.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
# By the architecture they are compiled for.
SOURCES = {
    "80": ROOT / "csrc/tests/device/conformance.cu",
    "90a": ROOT / "csrc/tests/device/conformance_sm90.cu",
}
WORDS = 4096
SEEDS = 3
UNTOUCHED = 0xCDCDCDCD
# The hardware's error bound of an approximation, in units of the last place, and one for the rounding of the exact
# value it is compared with; of tanh the absolute error.
ULPS = {"approx_exp2": 3, "approx_log2": 4, "approx_reciprocal": 2, "approx_rsqrt": 3}
TANH_ERROR = 2.0**-10.9


class TensorTiles(ctypes.Structure):
    """csrc/common/tensor_tiles.h: what a tensor map is made from."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("size", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5),
        ("box", ctypes.c_int * 5),
        ("swizzle", ctypes.c_int),
    )

    def described(self) -> dict[str, object]:
        """As the PTX interpreter's Memory.tensor_map takes it, but for the address."""
        itemsize = (4, 2, 2)[self.dtype]
        # As make_tensor_map has it for the driver: a dimension of one element gets a legal stride.
        strides = [stride * itemsize if n > 1 else 16 for n, stride in zip(self.size, self.stride, strict=True)]
        return {
            "shape": self.size[: self.rank],
            "strides": strides[1 : self.rank],
            "box": self.box[: self.rank],
            "itemsize": itemsize,
            "swizzle": (0, 32, 64, 128)[self.swizzle],
            "dtype": np.float32 if itemsize == 4 else None,
        }


def names(source: Path) -> list[str]:
    """The kernels of a source file."""
    return re.findall(r"^KERNEL(?:_OF|_TILES)?\((\w+)", source.read_text(encoding="utf-8"), re.MULTILINE)


def threads(source: Path, name: str) -> int:
    given = re.search(rf"^KERNEL_OF\({name}, (\d+)", source.read_text(encoding="utf-8"), re.MULTILINE)
    return int(given[1]) if given else 32


def words(seed: int) -> np.ndarray:
    """Random input: half of the words are floats of moderate size, half any finite bits."""
    rng = np.random.default_rng(seed)
    floats = (rng.standard_normal(WORDS) * 8).astype(np.float32).view(np.uint32)
    bits = rng.integers(0, 1 << 32, WORDS, dtype=np.uint64).astype(np.uint32) & np.uint32(0xBF7FFFFF)
    return np.where(rng.random(WORDS) < 0.5, floats, bits).astype(np.uint32)


def build_emulated(source: Path, folder: Path) -> Path:
    """The kernels as a library for the emulated device."""
    target = folder / f"emulated_{source.stem}.so"
    csrc = ROOT / "csrc"
    runtime = [str(path) for path in sorted((csrc / "emulated" / "runtime").glob("*.cpp"))]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{csrc}", f"-I{csrc / 'emulated'}"]
    subprocess.run(["c++", *flags, "-x", "c++", str(source), *runtime, "-o", str(target), "-pthread"], check=True)
    return target


def run_library(library: ctypes.CDLL, name: str, given: np.ndarray) -> np.ndarray:
    """What a kernel writes; words it leaves alone are UNTOUCHED."""
    out = np.full(WORDS, UNTOUCHED, np.uint32)
    message = ctypes.create_string_buffer(1024)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (given, out)]
    size = ctypes.c_size_t
    failed = library.conformance_run(name.encode(), *pointers, size(WORDS), message, size(len(message)))
    if failed:
        raise RuntimeError(f"{name}: {message.value.decode()}")
    return out


def tiles(emulated: ctypes.CDLL, name: str) -> TensorTiles | None:
    """What the tensor maps of a kernel describe, if it takes any."""
    found = TensorTiles()
    return found if emulated.conformance_tiles(name.encode(), None, ctypes.byref(found)) else None


def difference(name: str, mine: np.ndarray, theirs: np.ndarray) -> str | None:
    """None where two runs agree: in every bit, an approximation within its bound; else where they do not."""
    written = mine != UNTOUCHED
    if not written.any():
        return "nothing was written"
    a, b = mine.view(np.float32), theirs.view(np.float32)
    if name in ULPS:
        far = np.abs(mine.view(np.int32).astype(np.int64) - theirs.view(np.int32)) > ULPS[name]
        bad = (far & np.isfinite(b)) | (np.isnan(a) != np.isnan(b))
    elif name == "approx_tanh":
        bad = ~(np.abs(a - b) <= TANH_ERROR)
    else:
        bad = mine != theirs
    bad &= written | (theirs != UNTOUCHED)
    if not bad.any():
        return None
    at = int(np.flatnonzero(bad)[0])
    return f"word {at} is {mine[at]:#010x} ({a[at]:g}) and {theirs[at]:#010x} ({b[at]:g}); {bad.sum()} words differ"
