"""Reads what `nvcc -Xptxas -v` says: registers, shared memory, stack and spills of each kernel, and its complaints."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# What ptxas calls information but no kernel here may have: serialized wgmma (C7510), waits for products that it put in
# itself (C7517), an ignored setmaxnreg.
COMPLAINT = re.compile(r"\(C75\d\d\) .*|Potential Performance Loss: .*")


@dataclass
class Resources:
    """Of one kernel on one architecture. Stack is local memory, spills included, of the kernel and what it calls."""

    name: str
    registers: int = 0
    shared: int = 0  # static; dynamic shared memory is the launcher's
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0


def parse(text: str) -> tuple[list[Resources], list[str]]:
    kernels: list[Resources] = []
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Resources(entry[1]))
        elif kernels and (frame := FRAME.search(line)):
            kernels[-1].stack += int(frame[1])
            kernels[-1].spill_stores += int(frame[2])
            kernels[-1].spill_loads += int(frame[3])
        elif kernels and (used := USED.search(line)):
            kernels[-1].registers = int(used[1])
            shared = SHARED.search(line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels, sorted(set(COMPLAINT.findall(text)))


def demangle(names: list[str]) -> list[str]:
    """C++ names of mangled ones; binutils' c++filt comes with g++, which nvcc needs anyway."""
    if not names or shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def short(demangled: str) -> str:
    """`void a::b::kernel<(int)64, __nv_bfloat16>(float*)` as `kernel<64, bf16>`."""
    text = demangled.replace("(anonymous namespace)::", "")
    text = text.replace("__nv_bfloat16", "bf16").replace("__half", "half")
    text = re.sub(r"\((?:int|unsigned int|bool|long|unsigned long)\)", "", text)
    text = re.sub(r"\((?:\w+::)*(\w+)\)(-?\d+)", r"\1(\2)", text)  # an enumerator: Activation(1)
    text = re.sub(r"(?:\w+::)+(?=\w)", "", text)
    depth = 0
    for end, letter in enumerate(text):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            text = text[:end]
            break
    return re.sub(r"(?<=\d)u?l?(?=[,>])", "", text.removeprefix("void ")).strip()
