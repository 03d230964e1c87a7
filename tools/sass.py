"""Reads nvdisasm's text: the instructions of each kernel and its loops."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

SECTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),")
LABEL = re.compile(r"^(\S+):\s*$")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,6}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_a-z.]*)\s*(.*?)\s*;")
TARGET = re.compile(r"\.L_x_\d+")


@dataclass(frozen=True)
class Instruction:
    guard: str  # "@P0", or empty
    name: str  # "LDSM.16.M88.4"
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]


@dataclass(eq=False)
class Function:
    """A kernel's instructions in order, and where its labels stand among them."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> list[Function]:
    functions: list[Function] = []
    for line in text.splitlines():
        section = SECTION.match(line)
        if section:
            functions.append(Function(section[1]))
        elif functions and (label := LABEL.match(line)):
            functions[-1].labels[label[1]] = len(functions[-1].instructions)
        elif functions and (found := INSTRUCTION.match(line)):
            functions[-1].instructions.append(Instruction(found[1] or "", found[2], found[3]))
    return functions


def successors(function: Function, index: int) -> list[int]:
    """The instructions that may run after this one; a call comes back."""
    instruction, following = function.instructions[index], index + 1
    jumps = instruction.opcode in ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "UBRA")
    ends = instruction.opcode in ("EXIT", "RET", "KILL") or jumps
    targets = [function.labels[label] for label in TARGET.findall(instruction.operands)] if jumps else []
    # A condition is a guard, or a predicate among the operands: "@P0 BRA", "BRA P1, `(.L_x_8)", "BRA.U UP0, ...".
    conditional = bool(instruction.guard) or (jumps and re.match(r"!?U?P\d", instruction.operands) is not None)
    if not ends or conditional:
        targets.append(following)
    return [target for target in targets if target < len(function.instructions)]


@lru_cache(maxsize=1)  # several counts are taken of one function after another
def loops(function: Function) -> list[frozenset[int]]:
    """The natural loops, as sets of instruction numbers. A loop's slow paths count where they lie, however far away."""
    count = len(function.instructions)
    after = [successors(function, index) for index in range(count)]
    starts = sorted(
        {0, *(t for i in range(count) if after[i] != [i + 1] for t in after[i])}
        | {i + 1 for i in range(count - 1) if after[i] != [i + 1]}
    )
    block_of = {start: number for number, start in enumerate(starts)}
    spans = [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]
    follow = [[block_of[target] for target in after[span[-1]]] for span in spans]
    order = reachable(follow)
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in follow[block]:
            before[target].append(block)
    dominators = dominating(order, before)
    bodies: dict[int, set[int]] = {}
    for block in order:
        for head in follow[block]:
            if head in dominators[block]:
                bodies.setdefault(head, {head}).update(body_of(head, block, before))
    return [frozenset(i for block in body for i in spans[block]) for body in bodies.values()]


def reachable(follow: list[list[int]]) -> list[int]:
    """Blocks that the first leads to, in an order that helps `dominating`: reverse postorder."""
    seen, done, stack = {0}, [], [(0, iter(follow[0]))] if follow else []
    while stack:
        block, rest = stack[-1]
        target = next((t for t in rest if t not in seen), None)
        if target is None:
            done.append(block)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(follow[target])))
    return done[::-1]


def dominating(order: list[int], before: dict[int, list[int]]) -> dict[int, frozenset[int]]:
    """For each block, the blocks that every way to it passes."""
    every = frozenset(order)
    found = dict.fromkeys(order, every)
    found[order[0]] = frozenset([order[0]])
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            now = frozenset.intersection(*(found[b] for b in before[block])) | {block}
            if now != found[block]:
                found[block], changed = now, True
    return found


def body_of(head: int, tail: int, before: dict[int, list[int]]) -> set[int]:
    body, stack = {tail}, [tail]
    while stack:
        block = stack.pop()
        if block == head:
            continue
        for earlier in before[block]:
            if earlier not in body:
                body.add(earlier)
                stack.append(earlier)
    return body


def innermost(function: Function, wanted: Iterable[int]) -> list[list[int]]:
    """The smallest loops that hold any of the instructions `wanted`, as their numbers in order; the whole function
    where none does."""
    holding = [loop for loop in loops(function) if not loop.isdisjoint(wanted)]
    inner = [loop for loop in holding if not any(other < loop for other in holding)]
    return sorted(sorted(loop) for loop in inner) or [list(range(len(function.instructions)))]
