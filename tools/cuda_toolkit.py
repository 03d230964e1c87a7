"""Where nvcc is, the flags every .cu is compiled with, and the architectures it is compiled for.

One module for setup.py, which builds the kernels, and for tools/cuda_check.py, which holds them to their budget. It
imports the standard library alone: setup.py reads it before anything is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
OLDEST_CUDA = (12, 8)  # the first that compiles for sm_100 and sm_120
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0;12.0"
HOPPER_SUFFIX = "_sm90"  # files of this ending hold Hopper's own instructions: sm_90a runs them and nothing else does
# The names that torch allows in TORCH_CUDA_ARCH_LIST besides numbers; the oldest kernel here needs 8.0.
NAMED_ARCHITECTURES = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


def find_nvcc() -> Path | None:
    """The compiler of the first CUDA toolkit that is new enough: $CUDA_HOME, nvcc on PATH, the packages from pip."""
    return next((nvcc for nvcc in candidates() if (version(nvcc) or (0, 0)) >= OLDEST_CUDA), None)


def candidates() -> list[Path]:
    """Every nvcc in the order of preference, whatever its version."""
    found = []
    if os.environ.get("CUDA_HOME"):
        found.append(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        found.append(behind_wrapper(Path(on_path)))
    found += [folder / "nvcc" for folder in packaged_bins()]
    return [nvcc for nvcc in found if nvcc.is_file()]


def packaged_bins() -> list[Path]:
    """bin/ of NVIDIA's compiler packages for CUDA 13 in this Python, newest first. CUDA 12 had no such compiler."""
    roots = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    return sorted((bin for root in roots for bin in Path(root).glob("nvidia/cu[0-9]*/bin")), reverse=True)


def behind_wrapper(nvcc: Path) -> Path:
    """The nvcc of the toolkit itself: a link is followed, and a script on PATH is asked whom it calls."""
    resolved = nvcc.resolve()
    if (resolved.parent / "nvcc.profile").is_file():
        return resolved
    # The dry run of any command opens with the variables of the toolkit; nothing is read or written.
    for line in _words([str(nvcc), "--dryrun", "-E", "none.cu"]).splitlines():
        if line.startswith("#$ _HERE_="):
            return Path(line.partition("=")[2]) / "nvcc"
    return resolved


def version(nvcc: Path) -> tuple[int, int] | None:
    """(13, 0) of a compiler; None where it does not run."""
    found = re.search(r"release (\d+)\.(\d+)", _words([str(nvcc), "--version"]))
    return (int(found[1]), int(found[2])) if found else None


def release(nvcc: Path) -> str:
    """The full release, as in 13.0.88: register counts belong to one of these."""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", _words([str(nvcc), "--version"]))
    return found[1] if found else "unknown"


def toolkit(nvcc: Path) -> Path:
    """The folder that holds bin/, include/ and lib64/ (lib/ in the packages from pip)."""
    return nvcc.parent.parent


def includes(csrc: Path = CSRC) -> list[str]:
    """Where a .cu finds <op>.h, common/ and device/."""
    return [f"-I{csrc}", f"-I{csrc / 'cuda'}"]


def sources(csrc: Path = CSRC) -> list[Path]:
    """Every kernel file: csrc/cuda/<op>.cu, or a folder of the op's name."""
    return sorted((csrc / "cuda").rglob("*.cu"))


def architectures(source: Path, arch_list: str | None = None) -> list[str]:
    """The -gencode flags of a kernel file. `arch_list` is written like TORCH_CUDA_ARCH_LIST: "8.0;9.0a;12.0+PTX"."""
    return [
        f"-gencode=arch=compute_{number},code={kind}_{number}"
        for number, ptx in architecture_numbers(source, arch_list)
        for kind in (["sm", "compute"] if ptx else ["sm"])
    ]


def architecture_numbers(source: Path, arch_list: str | None = None) -> list[tuple[str, bool]]:
    """("90a", False) and the like: the architectures of a kernel file, and whether its PTX is kept for later ones."""
    if source.stem.endswith(HOPPER_SUFFIX):
        return [("90a", False)]
    text = arch_list or DEFAULT_ARCHITECTURES
    for name, meaning in NAMED_ARCHITECTURES.items():
        text = re.sub(rf"\b{name}\b", meaning, text)
    wanted: dict[str, bool] = {}
    for word in re.split(r"[;,\s]+", text.strip()):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if parts is None:
            raise ValueError(
                f"the CUDA architectures are written like TORCH_CUDA_ARCH_LIST='{DEFAULT_ARCHITECTURES}+PTX'; "
                f"'{word}' in '{arch_list}' is none"
            )
        number = parts[1] + parts[2] + parts[3]
        if int(parts[1] + parts[2]) < 80:
            raise ValueError(f"the kernels need an architecture of 8.0 or later; '{word}' in '{arch_list}' is older")
        wanted[number] = wanted.get(number, False) or parts[4] is not None
    return list(wanted.items())


def _words(command: list[str]) -> str:
    """What a command says, on both streams; nothing where it does not start."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
