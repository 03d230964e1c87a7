"""The device that is asked: a GPU, or its stand-in, the emulated device on CPU tensors, with the same interface."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "build" / "gpu-work"  # what is compiled or saved on the way; ignored by git
TRAFFIC = 512 << 20  # bytes that one copy beside a kernel moves
WAIT = 20_000_000  # clocks by which a side stream is late: about 10 ms

Tensors = list[torch.Tensor]
Call = Callable[[], Tensors]


class Gpu:
    """An NVIDIA GPU, by way of torch.cuda."""

    name, home, column = "cuda", "cuda", "cuda"

    def columns(self) -> tuple[str, ...]:
        return ("cuda", "triton")

    def levels(self, architectures: tuple[str, ...]) -> tuple[str | None, ...]:
        """The architectures that a table is judged as: the GPU's own."""
        return (None,)

    def architecture(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability()

    def others(self) -> list[str]:
        """Devices besides the current one."""
        return [f"cuda:{i}" for i in range(1, torch.cuda.device_count())]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, call: Call, *, warm: bool) -> tuple[Callable[[], None], Tensors]:
        """A CUDA graph of a call: what replays it, and the tensors that it writes."""
        if warm:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        return graph.replay, outputs

    def late(self, fill: Callable[[], None], call: Call) -> Tensors:
        """`call` on a side stream, whose inputs `fill` writes there, late: a launch on another stream would read what
        stood there before."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(WAIT)
            fill()
            outputs = call()
        side.synchronize()
        return outputs

    @contextmanager
    def busy(self) -> Iterator[Callable[[], None]]:
        """A stream beside, and what keeps it busy moving memory for about as long as a kernel takes."""
        side = torch.cuda.Stream()
        source, target = (torch.empty(TRAFFIC, dtype=torch.uint8, device="cuda") for _ in range(2))

        def more() -> None:
            with torch.cuda.stream(side):
                target.copy_(source)

        yield more
        torch.cuda.synchronize()

    def facts(self) -> dict[str, Any]:
        major, minor = self.architecture()
        smi = shutil.which("nvidia-smi")
        driver = said([smi, "--query-gpu=driver_version", "--format=csv,noheader"]) if smi else "no nvidia-smi"
        return {
            "GPU": torch.cuda.get_device_name(),
            "GPUs": torch.cuda.device_count(),
            "compute capability": f"{major}.{minor}",
            "driver": driver,
            "CUDA of torch": torch.version.cuda,
        }


class StandIn:
    """The emulated device on CPU tensors: no streams, no graphs; a capture repeats the call."""

    name, home, column = "stand-in", "cpu", "emulated"

    def columns(self) -> tuple[str, ...]:
        return ("emulated",)

    def levels(self, architectures: tuple[str, ...]) -> tuple[str | None, ...]:
        return architectures

    def architecture(self) -> tuple[int, int]:
        return (9, 0)

    def others(self) -> list[str]:
        return []

    def synchronize(self) -> None:
        pass

    def capture(self, call: Call, *, warm: bool) -> tuple[Callable[[], None], Tensors]:
        outputs = call()

        def replay() -> None:
            for old, new in zip(outputs, call(), strict=True):
                old.copy_(new)

        return replay, outputs

    def late(self, fill: Callable[[], None], call: Call) -> Tensors:
        fill()
        return call()

    def busy(self) -> AbstractContextManager[Callable[[], None]]:
        return nullcontext(lambda: None)

    def facts(self) -> dict[str, Any]:
        return {"GPU": "none: the emulated device stands in", "compute capability": "emulated 8.0 and 9.0"}


Device = Gpu | StandIn


def device_of(spec: dict[str, Any]) -> Device:
    """The device of a job."""
    return Gpu() if spec["device"] == "cuda" else StandIn()


def said(command: list[str]) -> str:
    """What a command prints, or why it prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()
