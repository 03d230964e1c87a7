"""What the compiler left beside a kernel's asynchronous products (wgmma), and when it lets go of what they read.

A warpgroup issues products in groups and goes on; a wait leaves at most so many groups under way. What stands between
issue and wait costs no time while the tensor cores are the bound. ptxas may move a wait up, above arithmetic that does
not need it, and an arrival at a barrier down: the source does not show it, the numbers of registers neither.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from sass import Function, Instruction, innermost, successors

ARITHMETIC = re.compile(r"MUFU|[FH](FMA|ADD|MUL|MNMX|SEL|SETP?|2FP|CHK)\d?")
MOST_GROUPS = 8  # under way, as far as they are counted


@dataclass(frozen=True)
class Share:
    """How many of the loop's instructions of a kind run while a group of products is under way."""

    beside: int
    all: int

    @property
    def percent(self) -> int:
        return 100 * self.beside // self.all if self.all else 100


@dataclass(frozen=True)
class Schedule:
    """Of one loop that issues products."""

    products: int
    mufu: Share
    arithmetic: Share  # MUFU and all on floating-point numbers
    late: int | None  # instructions from a wait to the release that comes longest after one; None without a release


def issues(instruction: Instruction) -> bool:
    return instruction.opcode.endswith("GMMA")


def groups_left(instruction: Instruction) -> int | None:
    """Of a wait: how many groups may still be under way after it."""
    found = re.match(r"gsb0, 0x([0-9a-f]+)", instruction.operands)
    return int(found[1], 16) if instruction.name.startswith("WARPGROUP.DEPBAR") and found else None


def releases(instruction: Instruction) -> bool:
    return instruction.name.startswith("SYNCS.ARRIVE")


def under_way(function: Function) -> list[int]:
    """The groups that are under way when an instruction begins, whatever the way that led there: the fewest.

    A product with the scoreboard among its operands ("gsb0") is the last of its group.
    """
    found = [MOST_GROUPS] * len(function.instructions)
    found[:1] = [0]
    waiting, seen = deque([0] if function.instructions else []), {0}
    while waiting:
        index = waiting.popleft()
        instruction, now = function.instructions[index], found[index]
        left = groups_left(instruction)
        if left is not None:
            now = min(now, left)
        elif issues(instruction) and instruction.operands.endswith("gsb0"):
            now = min(now + 1, MOST_GROUPS)
        for target in successors(function, index):
            if target not in seen or now < found[target]:
                seen.add(target)
                found[target] = min(now, found[target])
                waiting.append(target)
    return found


def schedules(function: Function) -> list[Schedule]:
    """Of each version of the loop that issues most products (with and without a mask, say), in the order of the code.

    As for sass_costs.main_loop, a loop with at least half as many products as the largest is a version of it.
    """
    wanted = [i for i, instruction in enumerate(function.instructions) if issues(instruction)]
    if not wanted:
        return []
    groups = under_way(function)
    found = [schedule(function, loop, groups) for loop in innermost(function, wanted)]
    most = max(one.products for one in found)
    return [one for one in found if 2 * one.products >= most]


def schedule(function: Function, loop: list[int], groups: list[int]) -> Schedule:
    code = function.instructions

    def share(kind: re.Pattern[str]) -> Share:
        of_kind = [i for i in loop if kind.fullmatch(code[i].opcode)]
        return Share(sum(groups[i] > 0 for i in of_kind), len(of_kind))

    late = [steps for i in loop if releases(code[i]) for steps in [since_wait(function, loop, i)] if steps is not None]
    return Schedule(
        sum(issues(code[i]) for i in loop), share(re.compile("MUFU")), share(ARITHMETIC), max(late, default=None)
    )


def since_wait(function: Function, loop: list[int], release: int) -> int | None:
    """Instructions between a release and the last wait before it, by the shortest way; None where there is no wait."""
    before: dict[int, list[int]] = {i: [] for i in loop}
    for i in loop:
        for target in successors(function, i):
            if target in before:
                before[target].append(i)
    waiting, seen = deque([(release, 0)]), {release}
    while waiting:
        index, steps = waiting.popleft()
        for earlier in before[index]:
            if groups_left(function.instructions[earlier]) is not None:
                return steps
            if earlier not in seen:
                seen.add(earlier)
                waiting.append((earlier, steps + 1))
    return None
