"""One block: its lanes, what each of them stands at, and the memory that they see.

Every lane has its own pc. Of the lanes that can run, those with the lowest pc run, as far as no other lane's pc is
reached: so paths that parted meet again. Lanes at a warp collective wait for the others that it names; lanes at a
barrier wait for its warps; a wait that polls (mbarrier.try_wait, nanosleep) lets all others go first.
"""

from __future__ import annotations

import numpy as np

from .asynchronous import Asynchronous
from .barrier import Barriers
from .decode import Kind, Step, bad
from .launch import Launch
from .mbarrier import Mbarriers
from .memory import GENERIC, SHARED_FIRST, SPACE_BIT, LocalWindow, Window
from .parser import Instruction
from .proxy import Proxies, is_needed
from .registers import RegisterFile
from .types import Fault, PtxError

RUNNING, WAITING, SLEEPING, EXITED = range(4)
FAR = 1 << 60
PATIENCE = 4_000
"""Steps that one group of lanes may take while others could run: a spin lets go after this many."""


class Block(RegisterFile):
    """One block: registers, memory, and which lane stands where. Lanes are padded to whole warps."""

    def __init__(self, launch: Launch, ctaid: tuple[int, int, int]) -> None:
        self.launch, self.memory = launch, launch.memory
        threads = int(np.prod(launch.block))
        n = -(-threads // 32) * 32
        super().__init__(n, launch.kernel.registers)
        self.warps = n // 32
        self.pc = np.zeros(n, np.int64)
        self.state = np.full(n, RUNNING, np.int8)
        self.state[threads:] = EXITED
        self.ran_at = np.zeros(n, np.int64)
        self.steps_taken = 0
        self.events = 0
        """Counts what another lane could be waiting for: a deadlock is a time without."""
        self.looked_at, self.rounds = -1, 0
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


def _first(count: int, size: int) -> np.ndarray:
    """Marks the first `count` of `size`."""
    return np.arange(size) < count
