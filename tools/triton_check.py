"""Compiles every Triton kernel ahead of time for six GPUs and holds the compilers' reports to a budget.

    python tools/triton_check.py [op ...] [--target sm_90] [--write] [--table]

Registers, spills (none is allowed), shared memory and the tensor instruction of each kernel at the sizes of its row's
`example_calls`, against tools/triton_budget.json. No GPU is needed: Triton brings ptxas, and AMD's assembler is in it.

The budget belongs to one release of Triton. Another one is held to less: the same tensor instructions, no more shared
memory than the target has, no spills but those that tools/triton_spills.json knows of that release, where --write puts
them. To move the budget to a newer release, delete both files and --write.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import triton_aot  # noqa: E402
from triton_aot import TARGETS, Compiled  # noqa: E402
from triton_rows import rows  # noqa: E402

BUDGET = Path(__file__).with_name("triton_budget.json")
SPILLS = Path(__file__).with_name("triton_spills.json")
# Shared memory that a block may have on each target.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}  # KiB

# kernel -> target -> [registers, bytes of shared memory, tensor instruction]
Budget = dict[str, dict[str, list]]
# kernel -> target -> what spills there: see Compiled.spills
Spills = dict[str, dict[str, int]]

_launches: dict[str, triton_aot.Launch] = {}  # filled before the workers fork: launches cannot be sent to them


def _examine(work: tuple[str, str]) -> Compiled | str:
    label, target = work
    try:
        return triton_aot.examine(label, _launches[label], target)
    except Exception as error:  # a kernel that does not compile is a finding like any other
        return f"{label} on {target}: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def release(version: str) -> str:
    """ "3.9.1" -> "3.9"."""
    return ".".join(version.split(".")[:2])


def read() -> tuple[str | None, Budget]:
    """The release that the budget belongs to, and the budget."""
    if not BUDGET.exists():
        return None, {}
    found = json.loads(BUDGET.read_text(encoding="utf-8"))
    return release(found["triton"]), found["kernels"]


def read_spills() -> dict[str, Spills]:
    """By release, what is known to spill."""
    return json.loads(SPILLS.read_text(encoding="utf-8")) if SPILLS.exists() else {}


def write(budget: Budget, triton_version: str) -> None:
    """One line for each kernel and target, so that a change reads as one."""
    parts = []
    for kernel, targets in sorted(budget.items()):
        lines = [
            f"      {json.dumps(target)}: {json.dumps(targets[target])}" for target in TARGETS if target in targets
        ]
        parts.append(f"    {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n    }")
    replace(BUDGET, f'{{\n  "triton": "{triton_version}",\n  "kernels": {{\n' + ",\n".join(parts) + "\n  }\n}\n")


def write_spills(found: list[Compiled], triton_version: str) -> None:
    """What spills of these, under this release; the rest of the file stays."""
    spills = read_spills()
    mine = spills.setdefault(release(triton_version), {})
    for one in found:
        targets = mine.setdefault(one.kernel, {})
        targets[one.target] = one.spills
        if one.spills == 0:
            del targets[one.target]
        if not targets:
            del mine[one.kernel]
    replace(SPILLS, json.dumps(spills, indent=2, sort_keys=True) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def failures(found: list[Compiled], budget: Budget, known: Spills | None = None) -> list[str]:
    """One line for each number that is not allowed. `known`, the spills of a release that is not the budget's, says
    that registers and shared memory are another compiler's."""
    lines = []
    for one in found:
        where = f"{one.kernel} on {one.target}"
        if one.spills > (known or {}).get(one.kernel, {}).get(one.target, 0):
            lines.append(f"{where}: spills {one.spills}")
        if one.shared > SHARED[one.target] * 1024:
            lines.append(f"{where}: {one.shared} bytes of shared memory, the target has {SHARED[one.target]} KiB")
        entry = budget.get(one.kernel, {}).get(one.target)
        if entry is None:
            lines.append(f"{where}: not in {BUDGET.name}, --write puts it there")
            continue
        registers, shared, tensor = entry
        if one.tensor != tensor:
            lines.append(f"{where}: its tensor instruction is '{one.tensor}', not '{tensor}'")
        if known is not None:
            continue
        if one.registers > registers:
            lines.append(f"{where}: {one.registers} registers, {registers} allowed")
        if one.shared > shared:
            lines.append(f"{where}: {one.shared} bytes of shared memory, {shared} allowed")
    return lines


def gone(found: list[Compiled], budget: Budget, ops: list[str]) -> list[str]:
    """Budgets of these ops without a kernel."""
    kernels = {one.kernel for one in found}
    return [kernel for kernel in budget if kernel.split(" ")[0] in ops and kernel not in kernels]


def show(console: Console, found: list[Compiled], markdown: bool) -> None:
    """A line for each kernel: registers + spills, shared KiB and the tensor instruction, target by target."""
    by_kernel: dict[str, dict[str, Compiled]] = defaultdict(dict)
    for one in found:
        by_kernel[one.kernel][one.target] = one

    def cell(one: Compiled | None) -> str:
        if one is None:
            return ""
        words = [
            str(one.registers),
            f"+{one.spills} spilled" * (one.spills > 0),
            f"{one.shared / 1024:.0f}K",
            one.tensor,
        ]
        return " ".join(word for word in words if word)

    if markdown:
        console.print(f"| kernel | {' | '.join(TARGETS)} |\n|{'---|' * (len(TARGETS) + 1)}")
        for kernel, targets in by_kernel.items():
            console.print(f"| `{kernel}` | {' | '.join(cell(targets.get(target)) for target in TARGETS)} |")
        return
    table = Table("kernel", *TARGETS, title="registers, spills, shared memory, tensor instruction")
    for kernel, targets in by_kernel.items():
        table.add_row(kernel, *(cell(targets.get(target)) for target in TARGETS))
    console.print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ops", nargs="*", help=f"rows; all when none is named: {', '.join(rows())}")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--write", action="store_true", help="write the budget, or the spills, from what is found")
    parser.add_argument("--version", help="the version of Triton that is meant to run")
    parser.add_argument("--table", action="store_true", help="the table as markdown")
    parser.add_argument("--brief", action="store_true", help="no table")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compilers at a time")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, 240)
    version = triton_aot.triton.__version__
    if version != (options.version or version):
        raise SystemExit(f"triton {version} is imported, not {options.version}")
    ops = options.ops or rows()
    for op in ops:
        if op not in rows():
            raise SystemExit(f"grokkernels/triton has no kernels of '{op}'; it has {', '.join(rows())}")
    began = time.monotonic()
    for op in ops:
        _launches.update(triton_aot.launches(op))
    targets = options.target or list(TARGETS)
    work = [(label, target) for label in _launches for target in targets]
    with triton_aot.reporting(), multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        results = pool.map(_examine, work, chunksize=1)
    found = [one for one in results if isinstance(one, Compiled)]
    errors = [one for one in results if isinstance(one, str)]
    owner, budget = read()
    own = owner in (None, release(version))
    if options.write and not own:
        write_spills(found, version)
    elif options.write:
        for kernel in gone(found, budget, ops):
            del budget[kernel]
        for one in found:
            allowed = [-(-one.registers // 8) * 8, one.shared, one.tensor]  # registers are given out in eights
            budget.setdefault(one.kernel, {})[one.target] = allowed
        write(budget, version)
    if not options.brief:
        show(console, found, options.table)
    errors += failures(found, budget, None if own else read_spills().get(release(version), {}))
    if own:  # other releases have fewer configurations
        lost = gone(found, budget, ops)
        errors += [f"{kernel} is in {BUDGET.name} but no kernel any more: --write" for kernel in lost]
    for line in errors:
        console.print(f"FAILED {line}")
    fine = "no spills, within budget" if own else f"as it should be with triton {version}"
    verdict = f"{len(errors)} failures" if errors else fine
    seconds = time.monotonic() - began
    console.print(f"{len(_launches)} kernels, {len(found)} builds for {len(targets)} GPUs: {verdict}; {seconds:.0f} s")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
