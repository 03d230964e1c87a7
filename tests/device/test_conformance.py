"""Every name of the device vocabulary, run as nvcc's PTX and on the emulated device: the bits are the same."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys

import numpy as np
import pytest

from tests import ptx
from tests.device import conformance
from tests.device.conformance import ROOT, SOURCES

sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit

KERNELS = [(arch, name) for arch, source in SOURCES.items() for name in conformance.names(source)]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """The kernels built for the emulated device, by architecture."""
    folder = tmp_path_factory.mktemp("conformance")
    return {arch: ctypes.CDLL(str(conformance.build_emulated(source, folder))) for arch, source in SOURCES.items()}


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


def run_ptx(module: ptx.Module, name: str, given: np.ndarray, threads: int) -> np.ndarray:
    memory = ptx.Memory()
    source, target = memory.put(given), memory.put(np.full(given.shape, conformance.UNTOUCHED, np.uint32))
    ptx.run(module.kernel(rf"^{name}$"), 1, threads, 32 * 1024, [source, target], memory)
    return memory.get(target, np.uint32, given.shape)


@pytest.mark.parametrize(("arch", "name"), KERNELS, ids=[name for _, name in KERNELS])
def test_the_ptx_means_what_the_emulation_does(
    arch: str, name: str, emulated: dict[str, ctypes.CDLL], modules: dict[str, ptx.Module]
) -> None:
    for seed in range(conformance.SEEDS):
        given = conformance.words(seed)
        mine = conformance.run_library(emulated[arch], name, given)
        theirs = run_ptx(modules[arch], name, given, conformance.threads(SOURCES[arch], name))
        assert conformance.difference(name, mine, theirs) is None


def test_every_name_is_covered() -> None:
    """Each function of csrc/cuda/device is called by a kernel above, or by one that takes tensor maps or a cluster
    (csrc/tests/emulated), and stands in csrc/emulated/device too."""
    sources = [*SOURCES.values(), *(ROOT / "csrc/tests/emulated").glob("*.cu")]
    used = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    define = re.compile(r"^GK_DEVICE [\w:<>]+\*? (\w+)\(", re.MULTILINE)
    for header in sorted((ROOT / "csrc/cuda/device").glob("*.cuh")):
        here = set(define.findall(header.read_text(encoding="utf-8")))
        there = set(define.findall((ROOT / "csrc/emulated/device" / header.name).read_text(encoding="utf-8")))
        assert here <= there, f"{header.name}: {sorted(here - there)} have no emulated meaning"
        missing = {name for name in here if not re.search(rf"\b{name}\b", used)}
        assert not missing, f"{header.name}: no conformance kernel calls {sorted(missing)}"
