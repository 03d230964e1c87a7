"""The three phases as stages of jobs, the cheapest proof first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gpu.engine import Job, Stage

ROOT = Path(__file__).resolve().parent.parent.parent
DEVICES = ("cuda", "stand-in")
# The ops, by their files; those whose kernels matter most first.
FIRST = ("flash_attention", "grouped_mm", "moe_experts", "linear_cross_entropy", "rms_norm")
NOT_OPS = ("__init__", "checks")
TOOLS = ("memcheck", "synccheck", "racecheck")
PIECES = 3  # of the ops for each tool of compute-sanitizer, beside each other


def ops() -> list[str]:
    found = sorted(path.stem for path in (ROOT / "grokkernels" / "ops").glob("*.py") if path.stem not in NOT_OPS)
    return [*FIRST, *(op for op in found if op not in FIRST)]


def job(device: str, kind: str, name: str, limit: float, **spec: Any) -> Job:
    return Job(f"{kind}: {name}" if name else kind, {"kind": kind, "device": device, **spec}, limit)


def truth(device: str, limit: float | None) -> list[Stage]:
    """Whether the kernels are right."""
    cores = os.cpu_count() or 2
    if device == "stand-in":
        short, few = limit or 30.0, "merge_attention_states"
        cases = job(device, "float64 rule", "emulated", short, ops=ops(), column="emulated", part="brief")
        return [
            Stage(
                "build, conformance, tests and cases",
                (
                    cases,
                    job(device, "build", "", short),
                    job(device, "conformance", "80", short, architecture="80"),
                    job(device, "tests", few, short, file=test_file(few), options=["-k", "emulated and parts"]),
                ),
                2,
            ),
        ]

    def cases_of(part: str, *columns: str) -> tuple[Job, ...]:
        return tuple(
            job(device, "float64 rule", f"{op}, {column}, {part}", limit or 60.0, ops=[op], column=column, part=part)
            for column in columns
            for op in ops()
        )

    files = [path.stem.removeprefix("test_") for path in sorted((ROOT / "tests" / "ops").glob("test_*.py"))]
    return [
        Stage(
            "build and conformance",
            (
                job(device, "build", "", limit or 300.0),
                *(job(device, "conformance", kind, limit or 10.0, architecture=kind) for kind in ("80", "90a")),
            ),
            3,
        ),
        Stage("cases that launch every kernel", cases_of("cover", "cuda", "triton"), max(2, cores // 2)),
        Stage("the whole case table of the CUDA column", cases_of("all", "cuda"), max(2, cores - 2)),
        Stage(
            "tests of the ops",
            tuple(job(device, "tests", name, limit or 60.0, file=test_file(name)) for name in files),
            max(2, cores - 2),
        ),
        # Triton compiles for minutes: what stands before it is known by then.
        Stage("the whole case table of Triton's column", cases_of("all", "triton"), max(2, cores - 2)),
    ]


def test_file(name: str) -> str:
    return f"tests/ops/test_{name}.py"


def safety(device: str, limit: float | None) -> list[Stage]:
    """Whether they keep to their memory, their order and their stream."""
    cores = os.cpu_count() or 2
    if device == "stand-in":
        short = limit or 60.0
        streams: tuple[Job, ...] = (
            job(device, "stream", "emulated", short, ops=ops(), column="emulated", part="brief"),
        )
    else:
        streams = tuple(
            job(device, "stream", f"{op}, {column}", limit or 60.0, ops=[op], column=column, part="cover")
            for column in ("cuda", "triton")
            for op in ops()
        )
    pieces = [ops()[i::PIECES] for i in range(PIECES)] if device == "cuda" else [ops()]
    sanitizers = tuple(
        job(device, "sanitizer", f"{tool}, {i}", limit or 120.0, ops=piece, tool=tool)
        for tool in TOOLS
        for i, piece in enumerate(pieces)
    )
    training = job(device, "training", "", limit or 120.0)
    return [
        Stage("training, graphs, streams, devices, repeats", (training, *streams), max(2, cores // 2)),
        Stage("compute-sanitizer", sanitizers, max(2, min(len(sanitizers), cores // 2))),
    ]


def speed(device: str, limit: float | None) -> list[Stage]:
    """How fast they are. One process at a time: nothing runs beside what is timed."""
    pieces = [[op] for op in ops()] if device == "cuda" else [ops()]
    return [
        Stage("ceilings", (job(device, "ceiling", "", limit or 60.0),), 1),
        Stage(
            "ops beside their peers",
            tuple(job(device, "speed", ", ".join(piece), limit or 90.0, ops=piece) for piece in pieces),
            1,
        ),
        Stage("ncu", (job(device, "ncu", "", limit or 60.0),), 1),
    ]


PHASES = {"truth": truth, "safety": safety, "speed": speed}
