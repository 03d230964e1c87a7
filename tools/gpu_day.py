"""The day a GPU is there: three phases, each a call of at most ten minutes, after which everything is known.

    python tools/gpu_day.py truth|safety|speed [--device cuda|stand-in] [--out FOLDER] [--budget SECONDS]

Plain Python with the packages that are there (torch, numpy, pytest, hypothesis, pybind11, ninja and nvcc): no
environment is made, nothing is fetched, nothing is written but FOLDER ($OUT, else build/gpu) and what is built in
place. PHASE.log has every line that was printed, PHASE.json every row as soon as it is known, PHASE.md the report at
the end; docs/gpu.md explains them. The last line is a summary; the exit code is 1 unless every row passed.
The stand-in is the emulated device on CPU tensors, few cases: that the phases themselves work is seen on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import preference  # noqa: E402  (of tools/)
from gpu.engine import Engine  # noqa: E402
from gpu.phases import DEVICES, PHASES  # noqa: E402
from gpu.record import Record, write  # noqa: E402

WORK = ROOT / "build" / "gpu-work"


def environment(device: str) -> dict[str, str]:
    """What every process is given: caches below build/, no spinning threads, output line by line."""
    own = {
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "2",
        "TRITON_CACHE_DIR": str(WORK / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
        "CUDA_CACHE_PATH": str(WORK / "cuda"),
        "MPLCONFIGDIR": str(WORK / "matplotlib"),
        "CI": "1",  # drawn tests draw the same everywhere
    }
    if device == "stand-in":
        own |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    # The toolkit's usual place, where PATH does not name one.
    return {**os.environ, **own, "PATH": f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"}


def gpu_is_there() -> bool:
    """As torch sees it, in a process of its own: this one holds no context."""
    asked = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--budget", type=float, default=540.0, help="seconds until all ends  [default: 540]")
    parser.add_argument("--limit", type=float, help="seconds of a row, instead of each kind's own")
    parser.add_argument(
        "--install-preference", action="store_true", help="speed: also write grokkernels/preference.json"
    )
    options = parser.parse_args(argv)
    began = time.monotonic()
    if options.device == "cuda" and not gpu_is_there():
        sys.exit("torch finds no NVIDIA GPU or driver here; --device stand-in runs the phases without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what it started, too
    WORK.mkdir(parents=True, exist_ok=True)
    record = Record(options.phase, options.device, options.out)
    engine = Engine(record, environment(options.device), began + options.budget)
    try:
        engine.run(PHASES[options.phase](options.device, options.limit))
    finally:  # also where it is told to end: what is known is reported
        if options.phase == "speed":
            write_preference(record, installed=options.install_preference)
        passed = record.finish()
    return 0 if passed else 1


def write_preference(record: Record, *, installed: bool) -> None:
    """preference.json beside the report, and, where asked, where the library reads it."""
    found = preference.table(list(record.rows.values()), str(record.facts.get("GPU", record.device)))
    text = json.dumps(found, indent=2) + "\n"
    write(record.out / "preference.json", text)
    if installed:
        write(ROOT / "grokkernels" / "preference.json", text)


if __name__ == "__main__":
    sys.exit(main())
