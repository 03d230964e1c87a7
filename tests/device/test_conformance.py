"""Every name of the device vocabulary, run as nvcc's PTX and on the emulated device: the bits are the same.

The kernels are csrc/tests/device/conformance*.cu; `make gpu` runs the same ones on a GPU.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import ptx

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402

SOURCES = {
    "80": ROOT / "csrc/tests/device/conformance.cu",
    "90a": ROOT / "csrc/tests/device/conformance_sm90.cu",
}
WORDS = 4096
SEEDS = 3
# The hardware's error bound of an approximation, in units of the last place, or None where it is absolute.
ULPS = {"approx_exp2": 2, "approx_log2": 4, "approx_reciprocal": 1, "approx_rsqrt": 2, "approx_tanh": 0}


def names(source: Path) -> list[str]:
    return re.findall(r"^KERNEL(?:_OF)?\((\w+)", source.read_text(encoding="utf-8"), re.MULTILINE)


KERNELS = [(arch, name) for arch, source in SOURCES.items() for name in names(source)]


def words(seed: int) -> np.ndarray:
    """Random input: half of the words are floats of moderate size, half any finite bits."""
    rng = np.random.default_rng(seed)
    floats = (rng.standard_normal(WORDS) * 8).astype(np.float32).view(np.uint32)
    bits = rng.integers(0, 1 << 32, WORDS, dtype=np.uint64).astype(np.uint32) & np.uint32(0xBF7FFFFF)
    return np.where(rng.random(WORDS) < 0.5, floats, bits).astype(np.uint32)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """The kernels built for the emulated device, by architecture."""
    built = {}
    for arch, source in SOURCES.items():
        target = tmp_path_factory.mktemp("conformance") / f"emulated_{arch}.so"
        csrc = ROOT / "csrc"
        runtime = csrc / "emulated" / "runtime" / "device.cpp"
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{csrc}", f"-I{csrc / 'emulated'}"]
        command = ["c++", *flags, "-x", "c++", str(source), str(runtime), "-o", str(target), "-pthread"]
        subprocess.run(command, check=True)
        built[arch] = ctypes.CDLL(str(target))
    return built


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ptx.Module]:
    """nvcc's PTX of the kernels, by architecture."""
    nvcc = cuda_toolkit.find_nvcc()
    assert nvcc is not None, "no nvcc: the inline PTX cannot be judged"
    read = {}
    for arch, source in SOURCES.items():
        target = tmp_path_factory.mktemp("conformance") / f"{arch}.ptx"
        flags = [*cuda_toolkit.NVCC_FLAGS, *cuda_toolkit.includes(), f"-arch=compute_{arch}"]
        subprocess.run([str(nvcc), *flags, "-ptx", "-o", str(target), str(source)], check=True)
        read[arch] = ptx.parse(target.read_text(encoding="utf-8"))
    return read


def run_emulated(library: ctypes.CDLL, name: str, given: np.ndarray) -> np.ndarray:
    out = np.full(WORDS, 0xCDCDCDCD, np.uint32)
    message = ctypes.create_string_buffer(1024)
    failed = library.conformance_run(
        name.encode(),
        given.ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_size_t(WORDS),
        message,
        ctypes.c_size_t(1024),
    )
    assert failed == 0, message.value.decode()
    return out


def run_ptx(module: ptx.Module, name: str, given: np.ndarray, threads: int) -> np.ndarray:
    memory = ptx.Memory()
    source, target = memory.put(given), memory.put(np.full(WORDS, 0xCDCDCDCD, np.uint32))
    kernel = module.kernel(rf"^{name}$")
    ptx.run(kernel, 1, threads, 32 * 1024, [source, target], memory)
    return memory.get(target, np.uint32, (WORDS,))


@pytest.mark.parametrize(("arch", "name"), KERNELS, ids=[name for _, name in KERNELS])
def test_the_ptx_means_what_the_emulation_does(
    arch: str, name: str, emulated: dict[str, ctypes.CDLL], modules: dict[str, ptx.Module]
) -> None:
    threads = re.search(rf"^KERNEL_OF\({name}, (\d+)", SOURCES[arch].read_text(encoding="utf-8"), re.MULTILINE)
    for seed in range(SEEDS):
        given = words(seed)
        mine = run_emulated(emulated[arch], name, given)
        theirs = run_ptx(modules[arch], name, given, int(threads[1]) if threads else 32)
        written = mine != 0xCDCDCDCD
        assert written.any()
        if name in ULPS:
            a, b = mine.view(np.float32)[written], theirs.view(np.float32)[written]
            far = np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)) > ULPS[name] + 1
            assert not far[np.isfinite(b)].any(), (given[:32].view(np.float32)[far], a[far], b[far])
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        else:
            np.testing.assert_array_equal(mine, theirs)


def test_every_name_is_covered() -> None:
    """Each function of csrc/cuda/device is called by a kernel above, and stands in csrc/emulated/device too."""
    used = "\n".join(source.read_text(encoding="utf-8") for source in SOURCES.values())
    define = re.compile(r"^GK_DEVICE [\w:<>]+\*? (\w+)\(", re.MULTILINE)
    for header in sorted((ROOT / "csrc/cuda/device").glob("*.cuh")):
        here = set(define.findall(header.read_text(encoding="utf-8")))
        there = set(define.findall((ROOT / "csrc/emulated/device" / header.name).read_text(encoding="utf-8")))
        assert here <= there, f"{header.name}: {sorted(here - there)} have no emulated meaning"
        missing = {name for name in here if not re.search(rf"\b{name}\b", used)}
        assert not missing, f"{header.name}: no conformance kernel calls {sorted(missing)}"
