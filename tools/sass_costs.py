"""What a kernel's main loop asks of one quarter of a multiprocessor, counted from its instructions.

Static counts: a block that the loop rarely enters counts in full, memory latency and bank conflicts not at all. So the
cycles are a floor, and the busiest pipe says what would have to shrink first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sass import Function, Instruction, innermost

# One warp's instruction holds its pipe for 32 lanes / (results per clock and multiprocessor / 4): the table "Throughput
# of Native Arithmetic Instructions" in NVIDIA's CUDA C++ Programming Guide. The first pattern that fits counts.
PIPES = {
    "tensor": r"(H|Q|I|B|O)G?MMA|UTC\w*MMA",
    "shared": r"LDSM|STSM|LDS|STS|ATOMS|LDGSTS",
    "global": r"LDG|STG|LD|ST|REDG?|ATOMG?|UBLKCP|UTMA\w*",
    "local": r"LDL|STL",
    "mufu": r"MUFU|F2F|F2I|I2F|FRND|POPC|FLO|BREV",
    "fma": r"FFMA2?|FADD2?|FMUL2?|HFMA2|HADD2|HMUL2|IMAD|IMUL",
    "alu": r"IADD3?|LOP3?|SHF|[IFH]SETP2?|F?SEL|\w*MNMX3?|PRMT|LEA|MOV|F2FP|VIADD|PLOP3|IABS|P2R|R2P|I2FP|SGXT|BMSK",
    "shuffle": r"SHFL|VOTE|REDUX|MATCH",
}
PATTERNS = {name: re.compile(pattern) for name, pattern in PIPES.items()}
# Dense bf16 multiply-adds per clock and quarter. A100: 312 TFLOP/s on 108 multiprocessors at 1.41 GHz. H100: 989 on 132
# at 1.83, by wgmma; mma.sync reaches about half. RTX 5090: 209 on 170 at 2.41. For mma.sync on B200 nothing is
# published: taken as on sm_80.
MMA_RATE = {"80": 256, "90a": 256, "100": 256, "120": 64}
WGMMA_RATE = 512
# 128 float lanes per multiprocessor; 64 on sm_80.
FMA_CYCLES = {"80": 2}


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel with tensor instructions: counts and cycles of one warp and one turn."""

    instructions: int
    tensor: int
    pipes: dict[str, float]  # cycles by pipe, and "issue"

    @property
    def per_tensor(self) -> float:
        return self.instructions / self.tensor

    @property
    def bound(self) -> str:
        return max(self.pipes, key=lambda name: self.pipes[name])


def pipe(instruction: Instruction) -> str:
    return next((name for name, pattern in PATTERNS.items() if pattern.fullmatch(instruction.opcode)), "other")


def lane_bytes(instruction: Instruction) -> int:
    """Bytes of one lane's load or store."""
    found = re.search(r"\.(256|128|64|[US]16|[US]8)(?=\.|$)", instruction.name)
    return int(found[1].lstrip("US")) // 8 if found else 4


def mma_shape(name: str) -> tuple[int, int, int] | None:
    found = re.search(r"GMMA\.(\d+)x(\d+)x(\d+)", name) or re.search(r"MMA\.(16|8)(8)(\d+)", name)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def cycles(instruction: Instruction, arch: str) -> dict[str, float]:
    """By pipe, for one warp. Shared memory serves all four quarters 128 bytes a clock: 512 bytes cost each warp 16."""
    kind = pipe(instruction)
    if kind == "tensor":
        return tensor_cycles(instruction, arch)
    if instruction.opcode in ("LDSM", "STSM"):
        return {"shared": {"4": 16.0, "2": 8.0}.get(instruction.name[-1], 4.0)}
    if kind == "shared":
        return {"shared": float(max(4, lane_bytes(instruction)))}
    if kind == "fma":
        return {"fma": fma_cycles(instruction.opcode, arch)}
    return {kind: {"mufu": 8.0, "shuffle": 4.0, "alu": 2.0}.get(kind, 1.0)}


def fma_cycles(opcode: str, arch: str) -> float:
    if opcode.startswith("H"):
        return 1.0
    if opcode in ("IMAD", "IMUL") or opcode.endswith("2"):  # half rate; two products in one instruction
        return 2.0
    return FMA_CYCLES.get(arch, 1.0)


def tensor_cycles(instruction: Instruction, arch: str) -> dict[str, float]:
    shape = mma_shape(instruction.name)
    if shape is None:
        return {"tensor": 1.0}
    rows, cols, depth = shape
    eight_bit = instruction.opcode[0] in "QI"
    speed = 2.0 if eight_bit else 0.5 if "TF32" in instruction.name else 1.0
    if "GMMA" not in instruction.opcode:
        return {"tensor": rows * cols * depth / (MMA_RATE.get(arch, 256) * speed)}
    # Four warps work on one product, each on its quarter. B comes from shared memory, A too unless registers hold it.
    width = 1 if eight_bit else 4 if "TF32" in instruction.name else 2
    read = cols if re.match(r"R\d+, R\d+,", instruction.operands) else cols + rows
    return {
        "tensor": rows * cols * depth / 4 / (WGMMA_RATE * speed),
        "shared": read * depth * width / 128,
    }


def main_loop(function: Function, arch: str) -> Loop | None:
    """The loop that a kernel with tensor instructions spends its time in.

    Of its innermost loops those that hold at least half as many tensor instructions as the largest are versions of one
    loop (with and without a mask, say); the version with the fewest instructions per tensor instruction runs most.
    """
    wanted = [i for i, instruction in enumerate(function.instructions) if pipe(instruction) == "tensor"]
    if not wanted:
        return None
    found = [measure([function.instructions[i] for i in loop], arch) for loop in innermost(function, wanted)]
    most = max(loop.tensor for loop in found)
    return min((loop for loop in found if 2 * loop.tensor >= most), key=lambda loop: loop.per_tensor)


def measure(instructions: list[Instruction], arch: str) -> Loop:
    total: dict[str, float] = {"issue": float(len(instructions))}
    for instruction in instructions:
        for name, cost in cycles(instruction, arch).items():
            if name in PIPES and name not in ("global", "local"):  # those wait on memory, not on a pipe
                total[name] = total.get(name, 0.0) + cost
    tensor = sum(pipe(instruction) == "tensor" for instruction in instructions)
    return Loop(len(instructions), tensor, total)


def wide_share(function: Function) -> float | None:
    """Share of the bytes to and from global memory that the main loop moves in accesses of 16 bytes or more.

    A kernel has other loops for rows that are not aligned: the loop with the largest share runs most.
    """

    def moved(instructions: list[Instruction]) -> list[int]:
        return [lane_bytes(i) for i in instructions if i.opcode in ("LDG", "STG", "LD", "ST", "LDGSTS")]

    wanted = [i for i, one in enumerate(function.instructions) if moved([one])]
    if not wanted:
        return None
    loops = [[function.instructions[i] for i in loop] for loop in innermost(function, wanted)]
    every = [moved(loop) for loop in [*loops, function.instructions]]
    return max(sum(n for n in loop if n >= 16) / sum(loop) for loop in every)
