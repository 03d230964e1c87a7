"""Compiles every kernel of csrc/cuda for each architecture and holds what the compiler made of it to a budget.

    python tools/cuda_check.py                            all of them; fails on warnings, spills, numbers over budget
    python tools/cuda_check.py rms_norm --arch 80         what you work on
    python tools/cuda_check.py --write                    tools/cuda_budget.json anew from what is measured

Needs no GPU. docs/cuda_check.md explains the columns.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cuda_toolkit
import ptxas
import sass
import sass_costs
import sass_schedule
from cuda_budget import Budget, Measured, over
from rich.console import Console
from rich.table import Table

ROOT = cuda_toolkit.CSRC.parent
CUDA = cuda_toolkit.CSRC / "cuda"
# Spills are judged by the budget, not by ptxas: it would refuse the kernel before it told the numbers.
CHECK_FLAGS = [*cuda_toolkit.NVCC_FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
INSTALL_NVCC = "pip install 'grokkernels[cuda]', or set CUDA_HOME to a toolkit of CUDA 12.8 or later"
INSTALL_NVDISASM = "pip install 'grokkernels[cuda-check]', or put nvdisasm of a CUDA toolkit on PATH"
# FlashAttention-2 2.8.3 forward, head dim 128, causal, compiled for sm_80 and counted in the same way: tile 128x64 on
# 4 warps has 883 instructions for 256 tensor instructions and spills 224 bytes, 64x64 has 3.63 and spills nothing.
FLASH_ATTENTION_2 = 3.45
FLASH_ATTENTION_2_NO_SPILL = 3.63
HEAD_DIM_128 = re.compile(r"<\D*(?:\w*[a-z]\d+, )*128\b")  # the first number among the template arguments


@dataclass
class Kernel:
    name: str
    resources: ptxas.Resources
    instructions: int
    loop: sass_costs.Loop | None
    wide: float | None
    schedules: list[sass_schedule.Schedule] = field(default_factory=list)


@dataclass
class Compiled:
    """One file for one architecture."""

    file: str  # "rms_norm", "flash_attention/forward_sm80"
    arch: str
    seconds: float
    kernels: list[Kernel] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def measured(self) -> list[Measured]:
        return [
            Measured(
                f"{self.file} {kernel.name}",
                self.arch,
                kernel.resources.registers,
                kernel.resources.shared,
                kernel.resources.spill_stores + kernel.resources.spill_loads,
                kernel.resources.stack,
                kernel.loop.per_tensor if kernel.loop else None,
                min((one.mufu.percent for one in kernel.schedules if one.mufu.all), default=None),
                min((one.arithmetic.percent for one in kernel.schedules if one.arithmetic.all), default=None),
                max((one.late for one in kernel.schedules if one.late is not None), default=None),
            )
            for kernel in self.kernels
        ]


def find_nvdisasm(nvcc: Path) -> Path | None:
    """Beside nvcc, on PATH, or in the packages from pip: NVIDIA's own, or Triton's."""
    beside = [nvcc.parent, *cuda_toolkit.packaged_bins()]
    triton = [Path(path) / "triton" / "backends" / "nvidia" / "bin" for path in sys.path if path]
    on_path = shutil.which("nvdisasm")
    found = [
        beside[0] / "nvdisasm",
        *([Path(on_path)] if on_path else []),
        *(b / "nvdisasm" for b in beside[1:] + triton),
    ]
    return next((path for path in found if path.is_file()), None)


def file_name(source: Path) -> str:
    return str(source.relative_to(CUDA).with_suffix("")) if source.is_relative_to(CUDA) else source.stem


def kernel_names(mangled: list[str]) -> list[str]:
    """Short names; where two would be the same, the whole ones."""
    whole = ptxas.demangle(mangled)
    short = [ptxas.short(name) for name in whole]
    often = Counter(short)
    return [name if often[name] == 1 else full for name, full in zip(short, whole, strict=True)]


def compile_one(source: Path, arch: str, nvcc: Path, nvdisasm: Path) -> Compiled:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [str(nvcc), *CHECK_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", *cuda_toolkit.includes()]
        built = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True, check=False)
        resources, complaints = ptxas.parse(built.stderr)
        result = Compiled(file_name(source), arch, 0.0, errors=complaints)
        if built.returncode != 0:
            spoken = [line for line in built.stderr.splitlines() if line.strip() and "ptxas info" not in line]
            result.errors += spoken[:12] or ["nvcc failed and said nothing"]
        else:
            text = subprocess.run([str(nvdisasm), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
            functions = {function.name: function for function in sass.parse(text)}
            names = kernel_names([one.name for one in resources])
            result.kernels = [
                inspect(name, one, functions[one.name], arch) for name, one in zip(names, resources, strict=True)
            ]
    result.seconds = time.monotonic() - began
    return result


def inspect(name: str, resources: ptxas.Resources, function: sass.Function, arch: str) -> Kernel:
    loop = sass_costs.main_loop(function, arch)
    wide = sass_costs.wide_share(function) if loop is None else None
    return Kernel(name, resources, len(function.instructions), loop, wide, sass_schedule.schedules(function))


def table(file: str, results: list[Compiled]) -> Table:
    """A row per kernel of one file with a number per architecture, or one where all are equal; where kernels have
    tensor instructions, and so many columns, a row per kernel and architecture."""
    rows: dict[str, list[dict[str, str]]] = {}
    for result in results:
        for kernel in result.kernels:
            rows.setdefault(kernel.name, []).append({"sm": result.arch} | cells(kernel))
    heads = list(dict.fromkeys(head for row in rows.values() for one in row for head in one))
    grid = Table(box=None, padding=(0, 1), pad_edge=False)
    grid.add_column(file, no_wrap=True)
    for head in heads:
        grid.add_column(head, justify="right", no_wrap=True)
    for name, row in rows.items():
        if "tensor" in heads:
            for turn, one in enumerate(row):
                grid.add_row("" if turn else name, *(one.get(head, "") for head in heads))
        else:
            columns = [[one.get(head, "") for one in row] for head in heads]
            grid.add_row(name, *(values[0] if len(set(values)) == 1 else "/".join(values) for values in columns))
    return grid


def cells(kernel: Kernel) -> dict[str, str]:
    used, loop = kernel.resources, kernel.loop
    found: dict[str, object] = {"regs": used.registers, "shared": used.shared}
    found |= {"spill": used.spill_stores + used.spill_loads, "stack": used.stack, "code": kernel.instructions}
    if loop is not None:
        found |= {"tensor": loop.tensor, "per tensor": f"{loop.per_tensor:.2f}"}
        for pipe in ("issue", "tensor", "shared", "mufu"):
            found[f"{pipe} cyc"] = f"{loop.pipes.get(pipe, 0):.0f}"
        found["bound"] = loop.bound
    elif kernel.wide is not None:
        found["wide"] = f"{kernel.wide:.0%}"
    if kernel.schedules:
        shares = [one.mufu for one in kernel.schedules if one.mufu.all]
        found["mufu beside"] = " ".join(f"{share.beside}/{share.all}" for share in shares)
        found["math beside"] = " ".join(f"{s.arithmetic.percent}%" for s in kernel.schedules if s.arithmetic.all)
        found["late"] = " ".join(str(one.late) for one in kernel.schedules if one.late is not None)
    return {head: str(value) for head, value in found.items()}


def anchors(results: list[Compiled]) -> list[str]:
    """How the attention forward on sm_80 stands beside FlashAttention-2's."""
    ours = [
        (kernel.loop.per_tensor, result.file, kernel)
        for result in results
        for kernel in result.kernels
        if result.arch == "80" and result.file.startswith("flash_attention") and kernel.loop
        if "fwd" in kernel.name and HEAD_DIM_128.search(kernel.name)
    ]
    if not ours:
        return []
    best, file, kernel = min(ours, key=lambda one: one[0])
    spill = kernel.resources.spill_stores + kernel.resources.spill_loads
    return [
        "flash attention forward, head dim 128, sm_80, instructions per tensor instruction: "
        f"{best:.2f}, {spill} bytes spilled ({file} {kernel.name}); FlashAttention-2 2.8.3 causal: "
        f"{FLASH_ATTENTION_2} with 224 bytes spilled, {FLASH_ATTENTION_2_NO_SPILL} with none",
    ]


def chosen(ops: list[str]) -> list[Path]:
    """Kernel files of the ops named, or all. A path to a .cu stands for itself, without a budget."""
    everything = cuda_toolkit.sources()
    if not ops:
        return everything
    found = []
    for op in ops:
        path = Path(op)
        here = [source for source in everything if op in (file_name(source), file_name(source).split("/")[0])]
        if path.suffix == ".cu" and path.is_file():
            here = [path.resolve()]
        if not here:
            names = sorted({file_name(source).split("/")[0] for source in everything})
            raise SystemExit(f"csrc/cuda has no kernels of '{op}'; it has {', '.join(names)}")
        found += here
    return list(dict.fromkeys(found))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ops", nargs="*", help="ops, or files of csrc/cuda without ending; all when none is named")
    parser.add_argument("--arch", action="append", help="only this architecture: 80, 90a, 100 or 120; may be repeated")
    parser.add_argument("--write", action="store_true", help="write the budget from what is measured")
    parser.add_argument("--brief", action="store_true", help="no tables")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compilers at a time")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, 220)
    nvcc = cuda_toolkit.find_nvcc()
    if nvcc is None:
        raise SystemExit(f"cuda-check needs nvcc and found none of CUDA 12.8 or later: {INSTALL_NVCC}")
    nvdisasm = find_nvdisasm(nvcc)
    if nvdisasm is None:
        raise SystemExit(f"cuda-check needs nvdisasm and found none: {INSTALL_NVDISASM}")
    wanted = None if options.arch is None else {"90a" if arch == "90" else arch for arch in options.arch}
    work = [
        (source, arch)
        for source in chosen(options.ops)
        for arch, _ in cuda_toolkit.architecture_numbers(source)
        if wanted is None or arch in wanted
    ]
    if not work:
        raise SystemExit("cuda-check: nothing to compile")
    compiler = cuda_toolkit.release(nvcc)
    console.print(f"nvcc {compiler} at {nvcc}; {len(work)} files and architectures")
    began = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [(source, pool.submit(compile_one, source, arch, nvcc, nvdisasm)) for source, arch in work]
        results: list[Compiled] = []
        for source in dict.fromkeys(source for source, _ in work):
            of_file = [future.result() for other, future in waiting if other == source]
            results += of_file
            if not options.brief:
                console.print(table(file_name(source), of_file), f"{sum(r.seconds for r in of_file):.1f} s\n")
    errors = [f"{result.file} on sm_{result.arch}: {line}" for result in results for line in result.errors]
    budgeted = {file_name(source) for source, _ in work if source.is_relative_to(CUDA)}
    whole = [(r.file, r.arch) for r in results if r.file in budgeted and (r.kernels or not r.errors)]
    measured = [one for r in results if r.file in budgeted for one in r.measured()]
    budget = Budget.read()
    if options.write:
        budget.replace(measured, whole, compiler)
        budget.write()
    elif measured and budget.compiler not in ("", compiler):
        console.print(f"the budget was written with nvcc {budget.compiler}: another release may use other registers")
    for line in anchors(results):
        console.print(line)
    errors += budget.failures(measured, whole)
    errors += [line for r in results if r.file not in budgeted for one in r.measured() for line in over(one, {})]
    for line in errors:
        console.print(f"FAILED {line}")
    count = sum(len(result.kernels) for result in results)
    verdict = f"{len(errors)} failures" if errors else "no warnings, within budget"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = f"{time.monotonic() - began:.0f} s, compilers {used.ru_utime + used.ru_stime:.0f} s of a core"
    console.print(f"{count} kernels over all architectures: {verdict}; {seconds}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
