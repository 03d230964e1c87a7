"""Every name of the device vocabulary, run as nvcc's PTX and on the emulated device: the bits are the same."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

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
    folder = tmp_path_factory.mktemp("conformance")
    return {arch: ptx.parse(compiled(arch, source, folder)) for arch, source in SOURCES.items()}


def compiled(arch: str, source: Path, folder: Path, *first: str) -> str:
    """The PTX of a source file; `first` are flags before all others."""
    nvcc = cuda_toolkit.find_nvcc()
    assert nvcc is not None, "no nvcc: the inline PTX cannot be judged"
    target = folder / f"{arch}.ptx"
    flags = [*first, *cuda_toolkit.NVCC_FLAGS, *cuda_toolkit.includes(), f"-arch=compute_{arch}"]
    subprocess.run([str(nvcc), *flags, "-ptx", "-o", str(target), str(source)], check=True)
    return target.read_text(encoding="utf-8")


def run_ptx(
    module: ptx.Module, name: str, given: np.ndarray, threads: int, tiles: conformance.TensorTiles | None
) -> np.ndarray:
    memory = ptx.Memory()
    source, target = memory.put(given), memory.put(np.full(given.shape, conformance.UNTOUCHED, np.uint32))
    arguments = [source, target]
    if tiles is not None:
        arguments += [memory.tensor_map(address, **tiles.described()) for address in (source, target)]
    ptx.run(module.kernel(rf"^{name}$"), 1, threads, 32 * 1024, arguments, memory)
    return memory.get(target, np.uint32, given.shape)


def disagreement(arch: str, name: str, emulated: ctypes.CDLL, module: ptx.Module) -> str | None:
    """Where the PTX of a kernel and its emulation differ, for the first of a few inputs on which they do."""
    for seed in range(conformance.SEEDS):
        given = conformance.words(seed)
        mine = conformance.run_library(emulated, name, given)
        threads = conformance.threads(SOURCES[arch], name)
        theirs = run_ptx(module, name, given, threads, conformance.tiles(emulated, name))
        if words := conformance.difference(name, mine, theirs):
            return words
    return None


@pytest.mark.parametrize(("arch", "name"), KERNELS, ids=[name for _, name in KERNELS])
def test_the_ptx_means_what_the_emulation_does(
    arch: str, name: str, emulated: dict[str, ctypes.CDLL], modules: dict[str, ptx.Module]
) -> None:
    assert disagreement(arch, name, emulated[arch], modules[arch]) is None


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


def test_every_instruction_is_covered(modules: dict[str, ptx.Module]) -> None:
    """Each instruction of the inline PTX stands in a kernel above: so each overload and specialisation is called."""
    ran = {word for module in modules.values() for word in re.split(r"[\s;]+", module.text)}
    written = {
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t}" for n in range(16, 257, 16) for t in ("bf16", "f16")
    }
    for header in (ROOT / "csrc/cuda/device").glob("*.cuh"):
        for words in re.findall(r"asm(?: volatile)?\(\s*((?:\"[^\"]*\"\s*)+)[:)]", header.read_text(encoding="utf-8")):
            text = "".join(re.findall(r'"([^"]*)"', words)).replace("\\n", "\n")
            written |= set(re.findall(r"(?:^|[;{\n])\s*([a-z]\w*(?:\.[\w:]+)+)", text))
    assert not written - ran, f"no conformance kernel runs {sorted(written - ran)}"


# Mistakes in the inline PTX, which the emulated device never sees: architecture and kernel that tells; then header of
# csrc/cuda/device, what stands there once, and what is put in its place.
MISTAKES = {
    ("80", "memory_16_streaming"): (
        "memory.cuh",
        "st.global.cs.v4.u32 [%0], {%1, %2,",
        "st.global.cs.v4.u32 [%0], {%2, %1,",
    ),
    ("80", "async_16"): ("async.cuh", "const int bytes = valid ? 16 : 0;", "const int bytes = valid ? 16 : 8;"),
    ("80", "convert_narrow_float16"): ("convert.cuh", "cvt.rn.f16.f32", "cvt.rz.f16.f32"),
    ("80", "convert_narrow_pair_float16"): (
        "convert.cuh",
        "cvt.rn.f16x2.f32 %0, %1, %2",
        "cvt.rn.f16x2.f32 %0, %2, %1",
    ),
    ("80", "matrix_load_x4_trans"): (
        "matrix.cuh",
        "ldmatrix.sync.aligned.m8n8.x4.trans",
        "ldmatrix.sync.aligned.m8n8.x4",
    ),
    ("80", "matrix_mma_float16"): (
        "matrix.cuh",
        ".f16.f16.f32 {%0, %1, %2, %3}, {%4, %5,",
        ".f16.f16.f32 {%0, %1, %2, %3}, {%5, %4,",
    ),
    ("90a", "mbarrier_expects"): ("mbarrier.cuh", "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;", ""),
    ("90a", "tma_load_3"): (
        "tma.cuh",
        "complete_tx::bytes [%0], [%1, {%3, %4, %5}], ",
        "complete_tx::bytes [%0], [%1, {%3, %5, %4}], ",
    ),
    ("90a", "tma_store_4"): (
        "tma.cuh",
        "bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4,",
        "bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%3, %2, %4,",
    ),
    ("90a", "wgmma_layout_plain"): ("wgmma.cuh", 'add, 1, 1, %" #p3 ", %" #p4', 'add, 1, 1, %" #p4 ", %" #p3'),
    ("90a", "wgmma_shared_bfloat16"): ("wgmma.cuh", "X(176, 88, 88, 89,", "X(176, 88, 89, 88,"),
    ("90a", "cluster_of_one"): (
        "cluster.cuh",
        "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}",
        "ld.shared::cluster.v4.u32 {%3, %1, %2, %0}",
    ),
}


@pytest.fixture(scope="session")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ptx.Module]:
    """nvcc's PTX of the kernels, with all mistakes in it at once: no two meet in one kernel."""
    folder = tmp_path_factory.mktemp("mistakes")
    headers = ROOT / "csrc/cuda/device"
    (folder / "device").mkdir()
    for header, old, new in MISTAKES.values():
        copy = folder / "device" / header
        text = (copy if copy.exists() else headers / header).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{header}: {text.count(old)} places read {old!r}"
        copy.write_text(text.replace(old, new), encoding="utf-8")
    return {arch: ptx.parse(compiled(arch, source, folder, f"-I{folder}")) for arch, source in SOURCES.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), MISTAKES, ids=[name for _, name in MISTAKES])
def test_a_mistake_in_the_ptx_is_seen(
    arch: str, name: str, emulated: dict[str, ctypes.CDLL], mistaken: dict[str, ptx.Module]
) -> None:
    try:
        words = disagreement(arch, name, emulated[arch], mistaken[arch])
    except ptx.PtxError as error:
        words = str(error)
    print(f"\n{name:30} {words}")
    assert words is not None
