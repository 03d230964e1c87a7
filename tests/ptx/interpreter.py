"""Runs a kernel: blocks one after another, and in a block all lanes that stand at the same instruction together.

Every lane has its own pc. Of the lanes that can run, those with the lowest pc run, as far as no other lane's pc is
reached: so paths that parted meet again. Lanes at a warp collective wait for the others that it names; lanes at a
barrier wait for its warps; a wait that polls (mbarrier.try_wait, nanosleep) lets all others go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import families  # noqa: F401  registers the instructions
from .asynchronous import Asynchronous
from .barrier import Barriers
from .decode import Kind, Step, bad, decode
from .mbarrier import Mbarriers
from .memory import GENERIC, LOCAL_FIRST, SHARED_FIRST, SPACE_BIT, LocalWindow, Memory, Window
from .parser import Instruction, Kernel, Parameter
from .proxy import Proxies, is_needed
from .types import Fault, PtxError, UnknownInstruction

RUNNING, WAITING, SLEEPING, EXITED = range(4)
FAR = 1 << 60
PATIENCE = 4_000
"""Steps that one group of lanes may take while others could run: a spin lets go after this many."""


@dataclass
class Launch:
    """What all blocks of a run have in common."""

    kernel: Kernel
    steps: list[Step]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    memory: Memory
    globals: Window
    parameters: np.ndarray
    shared_bytes: int
    delay_copies: bool
    rng: np.random.Generator | None
    max_steps: int
    addresses: dict[str, int]
    static_shared: int
    local_bytes: int


def run(
    kernel: Kernel,
    grid: Sequence[int] | int,
    block: Sequence[int] | int,
    shared_bytes: int = 0,
    args: Sequence = (),
    memory: Memory | None = None,
    *,
    delay_copies: bool = True,
    seed: int | None = None,
    max_steps: int = 20_000_000,
) -> int:
    """Runs a kernel to its end; returns how many steps (instructions of a group of lanes) it took.

    `args`: one per parameter: an int (integers and pointers), a float, a numpy scalar, or bytes (anything by value).
    `delay_copies`: an asynchronous copy takes effect only when something waits for it, and its destination is NaN until
    then; with `seed`, at a random time before. Without, at once.
    """
    steps = decoded(kernel)
    memory = memory or Memory()
    grid, block = _three(grid), _three(block)
    if not 0 < int(np.prod(block)) <= 1024:
        raise ValueError(f"a block of {block} threads")
    addresses, static_shared, local_bytes = _place(kernel, memory)
    rng = None if seed is None else np.random.default_rng(seed)
    parameters = _parameters(kernel, args)
    launch = Launch(
        kernel, steps, grid, block, memory, memory.window(), parameters, shared_bytes, delay_copies, rng, max_steps,
        addresses, static_shared, local_bytes,
    )  # fmt: skip
    taken = 0
    with np.errstate(all="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    one = Block(launch, (x, y, z))
                    one.run()
                    taken += one.steps_taken
    return taken


def decoded(kernel: Kernel) -> list[Step]:
    """The kernel's steps; an unknown instruction becomes a step that raises, so that only reaching it is an error."""
    if kernel.steps is None:
        steps = []
        for instruction in kernel.instructions:
            try:
                steps.append(decode(instruction))
            except UnknownInstruction as error:
                steps.append(Step(instruction, _raises(error)))
        kernel.steps = steps
    return kernel.steps


def unknown(kernel: Kernel) -> list[str]:
    """The error of every instruction of a kernel that the interpreter does not know, reached or not."""
    out = []
    for instruction in kernel.instructions:
        try:
            decode(instruction)
        except UnknownInstruction as error:
            out.append(str(error))
    return out


def _raises(error: UnknownInstruction):
    def run(b: Block) -> None:
        raise error

    return run


def _three(size: Sequence[int] | int) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, int) else tuple(size)
    return (*size, *(1,) * (3 - len(size)))


def _parameters(kernel: Kernel, args: Sequence) -> np.ndarray:
    if len(args) != len(kernel.parameters):
        raise TypeError(f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(args)}")
    out = np.zeros(-(-kernel.parameter_bytes // 16) * 16 or 16, np.uint8)
    for parameter, value in zip(kernel.parameters, args, strict=True):
        raw = _raw(parameter, value)
        out[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(raw, np.uint8)
    return out


def _raw(parameter: Parameter, value) -> bytes:
    if isinstance(value, (bool, int)) and parameter.size <= 8 and parameter.type.kind != "f":
        return (int(value) % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
    if isinstance(value, float) and parameter.type.kind == "f":
        return np.array(value, parameter.type.dtype).tobytes()
    raw = value.tobytes() if isinstance(value, (np.generic, np.ndarray)) else None
    if raw is None and not isinstance(value, (bool, int, float)):
        raw = bytes(value)
    if raw is None or len(raw) != parameter.size:
        raise TypeError(f"{parameter.name} is {parameter.size} bytes of .{parameter.type.name}, not {value!r:.60}")
    return raw


def _place(kernel: Kernel, memory: Memory) -> tuple[dict[str, int], int, int]:
    """Addresses of all variables, each in its space; bytes of static shared memory; bytes of local memory."""
    addresses: dict[str, int] = {p.name: p.offset for p in kernel.parameters}
    shared, local, dynamic = SHARED_FIRST, LOCAL_FIRST, []
    names = "\0".join(i.text for i in kernel.instructions)
    for variable in [*kernel.module.variables.values(), *kernel.variables.values()]:
        if variable.space == "shared":
            if variable.dynamic:
                dynamic.append(variable)
            elif variable.name in kernel.variables or variable.name in names:
                addresses[variable.name] = -(-shared // variable.align) * variable.align
                shared = addresses[variable.name] + variable.size
        elif variable.space == "local":
            addresses[variable.name] = -(-local // variable.align) * variable.align
            local = addresses[variable.name] + variable.size
        else:
            if variable.name not in names:
                continue
            symbols = memory.symbols.setdefault(id(kernel.module), (kernel.module, {}))[1]
            if variable.name not in symbols:
                data = variable.data or bytes(variable.size)
                symbols[variable.name] = memory.put(np.frombuffer(data, np.uint8))
            addresses[variable.name] = symbols[variable.name]
    align = max((v.align for v in dynamic), default=16)
    end = -(-shared // align) * align
    addresses |= {v.name: end for v in dynamic}
    return addresses, end - SHARED_FIRST if dynamic else shared - SHARED_FIRST, local - LOCAL_FIRST


class Block:
    """One block: registers, memory, and which lane stands where. Lanes are padded to whole warps."""

    def __init__(self, launch: Launch, ctaid: tuple[int, int, int]) -> None:
        self.launch, self.memory = launch, launch.memory
        threads = int(np.prod(launch.block))
        self.lanes = n = -(-threads // 32) * 32
        self.shape = (n,)
        self.warps = n // 32
        self.lane_ids = np.arange(n)
        self.pc = np.zeros(n, np.int64)
        self.state = np.full(n, RUNNING, np.int8)
        self.state[threads:] = EXITED
        self.ran_at = np.zeros(n, np.int64)
        self.steps_taken = 0
        self.events = 0
        """Counts what another lane could be waiting for: a deadlock is a time without."""
        self.looked_at, self.rounds = -1, 0
        self.mask = self.everyone = np.ones(n, np.bool_)
        self.full = True
        registers = launch.kernel.registers
        zero = {t: np.zeros(n, np.bool_ if t == 1 else f"u{t}") for t in (1, 2, 4, 8)}
        self.registers: list[np.ndarray] = [zero[r.type.size] for r in registers]
        self.unwritten: dict[int, np.ndarray] = {r.index: self.everyone for r in registers}
        self.odd = [True] * len(registers)
        """Registers that need a look before they are read: unwritten in some lane, or in flight."""
        self.in_flight: dict[int, Promise] = {}
        self.carry: np.ndarray | None = None
        nbytes = launch.static_shared + launch.shared_bytes
        self.shared = Window("shared", np.full(nbytes + 16, 0xFF, np.uint8), SHARED_FIRST, _first(nbytes, nbytes + 16))
        self.local = LocalWindow(n, launch.local_bytes)
        size = launch.parameters.size
        self.param = Window("param", launch.parameters, 0, _first(launch.kernel.parameter_bytes, size))
        self.globals = launch.globals
        self.specials = self._specials(threads, ctaid)
        self.proxies = Proxies(nbytes + 16, n) if is_needed(launch.kernel) else None
        self.barriers = Barriers(self)
        self.mbarriers = Mbarriers(self)
        self.asynchronous = Asynchronous(self)
        self.meeting = np.zeros(n, np.bool_)

    def _specials(self, threads: int, ctaid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        (x, y, _), grid = self.launch.block, self.launch.grid
        t, lane = np.minimum(self.lane_ids, threads - 1), self.lane_ids % 32
        one = np.uint64(1)
        bit = one << lane.astype(np.uint64)
        out = {"%tid.x": t % x, "%tid.y": t // x % y, "%tid.z": t // (x * y)}
        for axis, i in zip("xyz", range(3), strict=True):
            out |= {f"%ntid.{axis}": self.launch.block[i], f"%ctaid.{axis}": ctaid[i], f"%nctaid.{axis}": grid[i]}
            out |= {f"%cluster_ctaid.{axis}": 0, f"%cluster_nctaid.{axis}": 1}
            out |= {f"%clusterid.{axis}": ctaid[i], f"%nclusterid.{axis}": grid[i]}
        out |= {"%laneid": lane, "%warpid": self.lane_ids // 32, "%nwarpid": self.warps, "%smid": 0, "%nsmid": 1}
        out |= {"%lanemask_eq": bit, "%lanemask_lt": bit - one, "%lanemask_le": 2 * bit - one}
        out |= {"%lanemask_gt": 0xFFFFFFFF - (2 * bit - one), "%lanemask_ge": 0xFFFFFFFF - (bit - one)}
        out |= {"%cluster_ctarank": 0, "%cluster_nctarank": 1, "%is_explicit_cluster": 0, "%gridid": 0}
        shared = self.launch.static_shared + self.launch.shared_bytes
        out |= {"%total_smem_size": shared, "%dynamic_smem_size": self.launch.shared_bytes, "%aggr_smem_size": shared}
        out = {name: np.asarray(value).astype(np.uint32) for name, value in out.items()}
        return out | {"%is_explicit_cluster": np.array(False)}

    def special(self, name: str) -> np.ndarray:
        if name in self.specials:
            return self.specials[name]
        if name in ("%clock", "%clock64", "%globaltimer", "%globaltimer_lo"):
            return np.array(self.steps_taken, np.uint64)
        raise Fault(f"{name} is not known")

    def address_of(self, name: str) -> int:
        if name not in self.launch.addresses:
            raise Fault(f"{name} is not known")
        return self.launch.addresses[name]

    # Registers

    def value(self, index: int) -> np.ndarray:
        """A register's bits in all lanes; unwritten in an active lane is an error."""
        if self.odd[index]:
            self._look(index)
        return self.registers[index]

    def _look(self, index: int) -> None:
        name = self.launch.kernel.registers[index].name
        if index in self.in_flight and self._settle(index, "read"):
            del self.in_flight[index]
        holes = self.unwritten.get(index)
        if holes is not None and (holes & self.mask).any():
            raise Fault(f"{name} is read before it is written")
        self.odd[index] = index in self.in_flight or holes is not None

    def put(self, index: int, bits: np.ndarray) -> None:
        """Writes a register in the active lanes. Arrays in registers are never changed in place, so may be shared."""
        if self.odd[index]:
            if index in self.in_flight:
                if self._settle(index, "written"):
                    del self.in_flight[index]
                else:
                    self.in_flight[index] = Promise(self.mask, self.in_flight[index], result=bits)
            self._written(index)
        self.registers[index] = bits if self.full else np.where(self.mask, bits, self.registers[index])

    def _settle(self, index: int, what: str) -> bool:
        """A register in flight gets what is already computed; whether that is all. In an active lane it must be."""
        promise = self.in_flight[index]
        pending = promise.pending()
        if (pending & self.mask).any():
            name = self.launch.kernel.registers[index].name
            raise Fault(f"{name} is {what} while a wgmma that writes it is in flight")
        self.registers[index] = promise.current()
        return not pending.any()

    def _written(self, index: int) -> None:
        if index in self.unwritten:
            left = self.unwritten[index] & ~self.mask
            if left.any():
                self.unwritten[index] = left
            else:
                del self.unwritten[index]
        self.odd[index] = index in self.in_flight or index in self.unwritten

    def peek(self, index: int) -> np.ndarray | Promise:
        """A register's value, or the promise of it if an active lane's is in flight."""
        promise = self.in_flight.get(index)
        if promise is None or not (promise.pending() & self.mask).any():
            return self.value(index)
        return promise

    def promise(self, index: int, source: Promise | None = None) -> Promise:
        """A value to come for the active lanes of a register: its own, or a copy of another's."""
        before = self.in_flight.get(index, self.registers[index])
        promise = self.in_flight[index] = Promise(self.mask, before, source)
        self._written(index)
        return promise

    def copy(self, destination: int, source: int) -> None:
        """A register to a register. Compilers copy what was never written, so that alone is no error: using it is."""
        if self.odd[source]:
            if source in self.in_flight:
                promise = self.peek(source)
                if isinstance(promise, Promise):
                    self.promise(destination, promise)
                    return
            holes = self.unwritten.get(source)
            if holes is not None and (holes & self.mask).any():
                self.put(destination, self.registers[source])
                before = self.unwritten.get(destination)
                self.unwritten[destination] = holes & self.mask if before is None else before | (holes & self.mask)
                self.odd[destination] = True
                return
        self.put(destination, self.value(source))

    def activate(self, mask: np.ndarray) -> None:
        """What runs from here on concerns these lanes."""
        self.full = bool(mask.all())
        self.mask = self.everyone if self.full else mask

    def compress(self, value: np.ndarray) -> np.ndarray:
        """(lanes, ...) or a scalar -> the active lanes'."""
        if value.shape[:1] != self.shape:
            value = np.broadcast_to(value, self.shape)
        return value if self.full else value[self.mask]

    def expand(self, value: np.ndarray) -> np.ndarray:
        """The active lanes' values -> (lanes, ...), zeros elsewhere."""
        if self.full:
            return value
        out = np.zeros((self.lanes, *value.shape[1:]), value.dtype)
        out[self.mask] = value
        return out

    # Memory

    def spaces(self, space: str | None, address: np.ndarray):
        """The parts of the active lanes' addresses: (space, selection or None for all, address in that space)."""
        if space is not None:
            return [(space, None, address)]
        kinds = address >> SPACE_BIT
        out = []
        for name, first in GENERIC.items():
            chosen = kinds == (first >> SPACE_BIT)
            if chosen.all():
                return [(name, None, address - first)]
            if chosen.any():
                out.append((name, chosen, address[chosen] - first))
        if sum(int(chosen.sum()) for _, chosen, _ in out) != address.size:
            raise Fault("an address in no memory at all")
        return out

    def load(self, space: str | None, address: np.ndarray, size: int, count: int = 1) -> np.ndarray:
        """The active lanes' addresses -> (active, count) unsigned ints."""
        parts = self.spaces(space, address)
        if len(parts) == 1:
            return self._load(parts[0][0], parts[0][2], self.active_ids(None), size, count)
        out = np.zeros((address.size, count), f"u{size}")
        for name, chosen, at in parts:
            out[chosen] = self._load(name, at, self.active_ids(chosen), size, count)
        return out

    def active_ids(self, chosen: np.ndarray | None) -> np.ndarray:
        ids = self.lane_ids if self.full else self.lane_ids[self.mask]
        return ids if chosen is None else ids[chosen]

    def _load(self, space: str, address: np.ndarray, lanes: np.ndarray, size: int, count: int) -> np.ndarray:
        if space == "local":
            return self.local.load(address, lanes, size, count)
        return self.window(space).load(address, size, count)

    def store(self, space: str | None, address: np.ndarray, values: np.ndarray) -> None:
        """The active lanes' addresses and (active, count) unsigned ints."""
        self.events += 1
        for name, chosen, at in self.spaces(space, address):
            part = values if chosen is None else values[chosen]
            if name == "local":
                self.local.store(at, self.active_ids(chosen), part)
            elif name == "param":
                raise Fault("a store to a parameter")
            else:
                self.window(name).store(at, part)
                if name == "shared":
                    self.wrote_shared(at - SHARED_FIRST, part.dtype.itemsize * part.shape[1], self.active_ids(chosen))

    def wrote_shared(self, offsets: np.ndarray, nbytes: int, lanes: np.ndarray) -> None:
        """Lanes have written `nbytes` at each offset by ordinary means."""
        if self.proxies is not None:
            self.proxies.write(offsets, nbytes, lanes, self.steps_taken)

    def window(self, space: str) -> Window:
        if space == "global":
            return self.globals
        return self.shared if space == "shared" else self.param

    # Schedule

    def run(self) -> None:
        steps = self.launch.steps
        end = len(steps)
        instruction: Instruction | None = None
        try:
            while (group := self._choose()) is not None:
                pc, limit, budget = group
                mask = self.mask
                while True:
                    if pc >= end:
                        self._exit(mask)
                        break
                    step = steps[pc]
                    instruction = step.instruction
                    self.steps_taken += 1
                    budget -= 1
                    active = mask
                    if step.guard >= 0:
                        taken = self.value(step.guard)
                        active = mask & (~taken if step.negated else taken)
                        if step.kind is not Kind.BRANCH and not active.any():
                            pc += 1
                            if pc >= limit or budget <= 0:
                                self.pc[mask] = pc
                                break
                            continue
                        self.activate(active)
                        active = self.mask
                    kind = step.kind
                    if kind is Kind.COLLECTIVE and self._together(step):
                        kind = Kind.PLAIN
                    if kind is Kind.PLAIN:
                        step.run(self)
                        pc += 1
                        if step.guard >= 0:
                            self.activate(mask)
                            mask = self.mask
                        if pc >= limit or budget <= 0:
                            self.pc[mask] = pc
                            break
                    elif kind is Kind.BRANCH:
                        if step.target < 0:
                            step.run(self)
                            break
                        if active is mask or (active == mask).all():
                            pc = step.target
                            self.activate(mask)
                            if pc >= limit or budget <= 0:
                                self.pc[mask] = pc
                                break
                        elif not active.any():
                            pc += 1
                            self.activate(mask)
                            if pc >= limit or budget <= 0:
                                self.pc[mask] = pc
                                break
                        else:
                            self.pc[mask] = pc + 1
                            self.pc[active] = step.target
                            break
                    elif kind is Kind.SCHEDULE:
                        self.pc[mask] = pc + 1
                        step.run(self)
                        break
                    elif kind is Kind.COLLECTIVE or kind is Kind.BARRIER:
                        self.pc[mask] = pc + 1
                        self._meet(step, pc, active)
                        break
                    else:
                        self.pc[mask] = pc + 1
                        self._exit(active)
                        break
                self.ran_at[mask] = self.steps_taken
                if self.steps_taken > self.launch.max_steps:
                    raise Fault(f"more than {self.launch.max_steps} steps")
            instruction = None
            self.asynchronous.finish()
        except Fault as fault:
            if instruction is None:
                raise PtxError(str(fault)) from None
            raise bad(instruction, f"{fault} ({self._who()})") from None

    def _who(self) -> str:
        lanes = self.lane_ids[self.mask]
        span = f"thread {lanes[0]}" if lanes.size == 1 else f"{lanes.size} threads from {lanes[0]}"
        return f"{span} of block {self.specials['%ctaid.x']},{self.specials['%ctaid.y']},{self.specials['%ctaid.z']}"

    def _choose(self) -> tuple[int, int, int] | None:
        """Activates the lanes that run next; their pc, the pc at which to stop, and after how many steps."""
        while True:
            patience = self.steps_taken - self.ran_at
            asleep = self.state == SLEEPING
            if asleep.any() and (patience[asleep] > PATIENCE).any():
                self.wake()
            running = self.state == RUNNING
            if running.any():
                break
            if (self.state == EXITED).all():
                return None
            self._stuck()
        pcs = self.pc[running]
        pc = int(pcs.min())
        others = pcs[pcs > pc]
        if not others.size:
            self.activate(running)
            return pc, FAR, PATIENCE
        starved = running & (patience > PATIENCE)
        if starved.any():
            pc = int(self.pc[np.argmax(np.where(running, patience, -1))])
            self.activate(running & (self.pc == pc))
            return pc, FAR, PATIENCE // 8
        self.activate(running & (self.pc == pc))
        return pc, int(others.min()), PATIENCE

    def _stuck(self) -> None:
        """Nobody can run: what is still on its way arrives, sleepers look again; else it is a deadlock."""
        asleep = bool((self.state == SLEEPING).any())
        if asleep and self.looked_at != self.events:
            # Whoever polls looks once more before anything arrives: polling once is no wait.
            self.looked_at, self.rounds = self.events, 0
            self.wake()
            return
        if self.asynchronous.advance():
            self.events += 1
            self.wake()
            return
        self.rounds += 1
        if asleep and self.rounds < 1000:
            self.wake()
            return
        lines: dict[str, list[int]] = {}
        for lane in np.flatnonzero(self.state != EXITED):
            pc = int(self.pc[lane])
            at = pc if self.meeting[lane] else pc - 1
            i = self.launch.steps[min(max(at, 0), len(self.launch.steps) - 1)].instruction
            lines.setdefault(f"line {i.line}: `{i.text}`", []).append(int(lane))
        where = "; ".join(f"{len(v)} threads from {v[0]} at {k}" for k, v in lines.items())
        raise PtxError(f"deadlock: {where}")

    def wake(self) -> None:
        self._run_again(self.state == SLEEPING)

    def _run_again(self, mask: np.ndarray) -> None:
        """Who was not able to run has not been starved."""
        self.state[mask] = RUNNING
        self.ran_at[mask] = self.steps_taken

    def sleep(self, mask: np.ndarray) -> None:
        """These lanes go on only when something has happened, or when nobody else can run."""
        self.state[mask] = SLEEPING

    def wait(self, mask: np.ndarray) -> None:
        self.state[mask] = WAITING

    def resume(self, mask: np.ndarray) -> None:
        self.events += 1
        self._run_again(mask & (self.state == WAITING))

    def _exit(self, mask: np.ndarray) -> None:
        self.state[mask] = EXITED
        # Whoever waits for these lanes looks again.
        self.resume(self.meeting)
        self.meeting = np.zeros(self.lanes, np.bool_)
        self.barriers.exited()

    def alive(self) -> np.ndarray:
        return self.state != EXITED

    # Warp collectives

    def _together(self, step: Step) -> bool:
        """The common case: the whole block is here, and everyone names everyone."""
        if not self.full or self.meeting.any():
            return False
        return step.members is None or bool((step.members(self) == 0xFFFFFFFF).all())

    def _meet(self, step: Step, pc: int, arrived: np.ndarray) -> None:
        """The lanes whose partners have all arrived execute; the others wait here."""
        here = arrived | (self.meeting & (self.pc == pc) & (self.state == WAITING))
        self.activate(here)
        missing = self._missing(step, here)
        ready, late = here & ~missing, here & missing
        self.pc[late] = pc
        self.wait(late)
        self.meeting = (self.meeting & ~ready) | late
        if ready.any():
            self.state[ready] = RUNNING
            self.pc[ready] = pc + 1
            self.activate(ready)
            step.run(self)

    def _missing(self, step: Step, here: np.ndarray) -> np.ndarray:
        """(lanes,): whose partners are not all here."""
        alive = self.alive()
        if step.warpgroup:
            if self.lanes % 128:
                raise Fault(f"a block of {self.lanes} threads has no whole warpgroups")
            return np.repeat((alive & ~here).reshape(-1, 128).any(1), 128)
        if step.members is None:
            return np.repeat((alive & ~here).reshape(-1, 32).any(1), 32)
        bits = np.uint64(1) << (self.lane_ids % 32).astype(np.uint64)
        named = np.broadcast_to(step.members(self).astype(np.uint64), self.shape)
        if ((named & bits) == 0)[here].any():
            raise Fault("a lane is not in its own membermask")
        return (named & self.warp_bits(alive) & ~self.warp_bits(here)) != 0

    def warp_bits(self, mask: np.ndarray) -> np.ndarray:
        """(lanes,): which lanes of a lane's warp are in the mask, as the bits of a uint64."""
        bits = np.uint64(1) << np.arange(32, dtype=np.uint64)
        words = (mask.reshape(-1, 32) * bits).sum(1, dtype=np.uint64)
        return np.repeat(words, 32)

    def active_warps(self) -> np.ndarray:
        return self.mask.reshape(-1, 32).any(1)


class Promise:
    """A register's value of which a wgmma still has to compute some lanes, those of `mask`.

    The other lanes are as before, which can be a promise too. Copying a register copies the promise: `source`.
    """

    def __init__(
        self,
        mask: np.ndarray,
        before: np.ndarray | Promise,
        source: Promise | None = None,
        result: np.ndarray | None = None,
    ) -> None:
        self.mask, self.before, self.source, self.result = mask, before, source, result

    def pending(self) -> np.ndarray:
        """Which lanes are not computed yet."""
        if self.result is not None:
            own = np.zeros_like(self.mask)
        else:
            own = self.mask if self.source is None else self.source.pending() & self.mask
        return own | (self.before.pending() & ~self.mask) if isinstance(self.before, Promise) else own

    def current(self) -> np.ndarray:
        """The value as far as it is computed."""
        before = self.before.current() if isinstance(self.before, Promise) else self.before
        value = self.result if self.source is None else self.source.current()
        return before if value is None else np.where(self.mask, value, before)


def _first(count: int, size: int) -> np.ndarray:
    """Marks the first `count` of `size`."""
    return np.arange(size) < count
