"""What each kernel may use, and whether it does: tools/cuda_budget.json against the compiler's own numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("cuda_budget.json")
PER_TENSOR_SLACK = 1.02
REGISTER_STEP = 8  # the hardware gives a warp registers in steps of 8 per thread
LATE_STEP = 8  # instructions


@dataclass(frozen=True)
class Measured:
    """One kernel on one architecture."""

    kernel: str  # "rms_norm rms_norm_fwd_kernel<bf16>"
    arch: str  # "90a"
    registers: int
    shared: int  # static bytes
    spill: int  # bytes stored and loaded
    stack: int  # bytes of local memory, spills included
    per_tensor: float | None  # instructions per tensor instruction in the main loop
    # of asynchronous products, the least of the main loop's versions (tools/sass_schedule.py)
    mufu_beside: int | None = None  # percent
    math_beside: int | None = None  # percent
    late: int | None = None  # instructions


# kernel -> architecture -> {"registers", "shared", "spill", "stack", "per_tensor", "mufu_beside", "math_beside",
# "late", "reason"}
Kernels = dict[str, dict[str, dict[str, Any]]]


@dataclass
class Budget:
    compiler: str
    kernels: Kernels

    @classmethod
    def read(cls, path: Path = PATH) -> Budget:
        if not path.exists():
            return cls("", {})
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(content["compiler"], content["kernels"])

    def write(self, path: Path = PATH) -> None:
        """One line per kernel and architecture, so that a change reads as one."""
        lines = []
        for kernel, archs in sorted(self.kernels.items()):
            rows = [
                f"      {json.dumps(arch)}: {json.dumps(entry)}" for arch, entry in sorted(archs.items(), key=by_age)
            ]
            lines.append(f"    {json.dumps(kernel)}: {{\n" + ",\n".join(rows) + "\n    }")
        text = f'{{\n  "compiler": {json.dumps(self.compiler)},\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
        path.write_text(text, encoding="utf-8")

    def failures(self, measured: Iterable[Measured], whole: Iterable[tuple[str, str]]) -> list[str]:
        """One line for each number over its budget, each file with kernels without one, each budget without a kernel.

        `whole` names the pairs of file and architecture that were compiled: only there can a kernel be gone.
        """
        found, seen = [], set()
        missing: dict[str, dict[str, None]] = {}
        for one in measured:
            seen.add((one.kernel, one.arch))
            entry = self.kernels.get(one.kernel, {}).get(one.arch)
            if entry is None:
                file, name = one.kernel.split(" ", 1)
                missing.setdefault(file, {})[name] = None
            found += over(one, entry or {})
        for file, names in missing.items():
            found.append(f"{file} has kernels that are not in {PATH.name}, --write puts them there: {'; '.join(names)}")
        compiled = set(whole)
        for kernel, archs in self.kernels.items():
            for arch in archs:
                if (kernel.split(" ")[0], arch) in compiled and (kernel, arch) not in seen:
                    found.append(f"{kernel} on sm_{arch} is in {PATH.name} but no kernel any more: --write removes it")
        return found

    def replace(self, measured: Iterable[Measured], whole: Iterable[tuple[str, str]], compiler: str) -> None:
        """Budgets for what was measured. Allowances for spills stay as they were: those are written by hand."""
        before, compiled = self.kernels, set(whole)
        kept: Kernels = {}
        for kernel, archs in before.items():
            for arch, entry in archs.items():
                if (kernel.split(" ")[0], arch) not in compiled:
                    kept.setdefault(kernel, {})[arch] = entry
        for one in measured:
            entry = allowed(one)
            old = before.get(one.kernel, {}).get(one.arch, {})
            entry |= {name: old[name] for name in ("spill", "stack", "reason") if name in old}
            kept.setdefault(one.kernel, {})[one.arch] = entry
        self.kernels, self.compiler = kept, compiler


def by_age(item: tuple[str, Any]) -> tuple[int, str]:
    return (int(item[0].rstrip("af")), item[0])


def allowed(one: Measured) -> dict[str, Any]:
    """A fresh budget: what was measured, and a little."""
    entry: dict[str, Any] = {"registers": math.ceil(one.registers / REGISTER_STEP) * REGISTER_STEP}
    if one.shared:
        entry["shared"] = one.shared
    if one.per_tensor is not None:
        entry["per_tensor"] = math.ceil(one.per_tensor * PER_TENSOR_SLACK * 100) / 100
    entry |= {name: percent for name, percent in overlap(one) if percent is not None}
    if one.late is not None:
        entry["late"] = math.ceil(one.late / LATE_STEP) * LATE_STEP
    return entry


def overlap(one: Measured) -> list[tuple[str, int | None]]:
    return [("mufu_beside", one.mufu_beside), ("math_beside", one.math_beside)]


def over(one: Measured, entry: dict[str, Any]) -> list[str]:
    """The numbers of one kernel that its budget does not allow. Without a budget spills are refused all the same."""
    where = f"{one.kernel} on sm_{one.arch}"
    found = []
    if (entry.get("spill") or entry.get("stack")) and not entry.get("reason"):
        found.append(f"{where}: {PATH.name} allows spills or stack and gives no reason")
    limits: list[tuple[float, float, str]] = [
        (one.registers, entry.get("registers", one.registers), "registers"),
        (one.shared, entry.get("shared", 0) if entry else one.shared, "bytes of static shared memory"),
        (one.spill, entry.get("spill", 0), "bytes spilled"),
        # Spills lie in local memory: where there are any, their line says it all.
        (0 if one.spill else one.stack, entry.get("stack", 0), "bytes of local memory"),
    ]
    if one.per_tensor is not None:
        limit = entry.get("per_tensor", 0) if entry else math.inf
        limits.append((round(one.per_tensor, 2), limit, "instructions per tensor instruction"))
    elif "per_tensor" in entry:
        found.append(f"{where}: no tensor instructions any more")
    if one.late is not None:
        limits.append((one.late, entry.get("late", 0) if entry else math.inf, "instructions from a wait to a release"))
    for name, percent in overlap(one):
        wanted = entry.get(name, 0)
        if (percent or 0) < wanted:
            kind = "exponentials" if name == "mufu_beside" else "arithmetic"
            found.append(f"{where}: {percent or 0} % of the {kind} beside products, {wanted} wanted")
    return found + [f"{where}: {value} {what}, {limit} allowed" for value, limit, what in limits if value > limit]
