"""Runs jobs, each in a process of its own that says which row it is at: a hang or a crash costs that row alone.

A job's process (worker.py) writes lines of JSON into a pipe: {"plan": [rows]}, then {"begin": key} and {"row": {...}}
for each, and {"end": true}. A row that takes longer than its limit is ended with its process, and one during which the
process dies has crashed; then the job begins anew with the rows that are left. What a process prints goes to the log
line by line. Everything here is done in one thread, with Python's standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.record import CRASHED, HUNG, NOT_REACHED, Record, Row

WORKER = Path(__file__).resolve().parent / "worker.py"
START = 180.0  # seconds that a process may take, beside a row's limit, until it says its plan: it imports and compiles
DYING = 20.0  # seconds that a process gets to be gone
TAIL = 12  # lines of a process that died which the row keeps
POISONED = 70  # the exit code of a worker whose GPU context is lost: the row is told, the rest needs a new process


@dataclass(frozen=True)
class Job:
    """Rows of one kind (see worker.py), asked one after another in one process. `limit`: seconds of a row."""

    name: str
    spec: dict[str, Any]
    limit: float


@dataclass(frozen=True)
class Stage:
    """Jobs that may run beside each other, so many at once; the next stage begins when all have ended."""

    name: str
    jobs: tuple[Job, ...]
    at_once: int


@dataclass
class _Run:
    """A process of a job."""

    job: Job
    process: subprocess.Popen[bytes]
    due: float
    pipe: int  # where it speaks; closed with its end
    output: int
    plan: list[Row] | None = None
    row: Row | None = None
    began: float = 0.0
    progress: int = 0  # rows told by this process
    ended: bool = False
    open: set[int] = field(default_factory=set)  # its pipes
    rest: dict[int, bytes] = field(default_factory=dict)  # of each pipe, the line begun
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))


class Engine:
    """`environment` is given to every process; `until`: the moment of time.monotonic() at which all ends."""

    def __init__(self, record: Record, environment: dict[str, str], until: float) -> None:
        self._record, self._environment, self._until = record, environment, until
        self._selector = selectors.DefaultSelector()
        self._running: list[_Run] = []

    def run(self, stages: list[Stage]) -> None:
        try:
            for stage in stages:
                self._stage(stage)
        finally:
            for run in list(self._running):
                self._stop(run)

    def _stage(self, stage: Stage) -> None:
        waiting = deque(stage.jobs)
        if time.monotonic() < self._until:
            self._record.say(f"--- {stage.name}: {len(waiting)} jobs, {stage.at_once} at once")
        while waiting or self._running:
            if time.monotonic() >= self._until:
                self._out_of_time(waiting)
                return
            while waiting and len(self._running) < stage.at_once:
                self._start(waiting.popleft())
            next_due = min([self._until, *(run.due for run in self._running)])
            for key, _ in self._selector.select(max(0.0, next_due - time.monotonic())):
                self._read(key.data, key.fd)
            for run in list(self._running):
                if run.pipe not in run.open:
                    self._over(run)
                elif time.monotonic() >= run.due:
                    self._hung(run)

    # --- a process's life ---

    def _start(self, job: Job) -> None:
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)
        done = [row.key for row in self._record.rows.values()]
        spec = json.dumps({**job.spec, "done": done})
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            env=self._environment,
            start_new_session=True,
        )
        os.close(writing)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(spec.encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once, which its pipes will tell
        run = _Run(job, process, time.monotonic() + job.limit + START, reading, process.stdout.fileno())
        for fd in (run.pipe, run.output):
            os.set_blocking(fd, False)
            run.open.add(fd)
            run.rest[fd] = b""
            self._selector.register(fd, selectors.EVENT_READ, run)
        self._running.append(run)

    def _read(self, run: _Run, fd: int) -> bool:
        """Takes what is there; whether more may be."""
        if fd not in run.open:
            return False
        try:
            found = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        output = fd == run.output
        *lines, run.rest[fd] = (run.rest[fd] + found).split(b"\n")
        if not found:
            self._close(run, fd)
            lines = [run.rest[fd]] if run.rest[fd] and output else []
        for line in lines:
            if output:
                words = line.decode(errors="replace").rstrip()
                run.tail.append(words)
                self._record.log(f"[{run.job.name}] {words}")
            else:
                self._told(run, json.loads(line))
        return bool(found)

    def _told(self, run: _Run, said: dict[str, Any]) -> None:
        now = time.monotonic()
        if "facts" in said:
            self._record.tell(said["facts"])
        if "plan" in said:
            run.plan = [Row(**fields) for fields in said["plan"]]
        if "begin" in said and run.plan is not None:
            run.row, run.began = next(row for row in run.plan if row.key == said["begin"]), now
        if "row" in said:
            row = Row(**said["row"])
            row.seconds = round(now - run.began, 3)
            self._record.add(row)
            run.row, run.progress = None, run.progress + 1
        run.ended = run.ended or "end" in said
        run.due = now + run.job.limit + (0.0 if run.row is not None else START)

    def _close(self, run: _Run, fd: int) -> None:
        self._selector.unregister(fd)
        run.open.discard(fd)
        if fd == run.output:
            assert run.process.stdout is not None
            run.process.stdout.close()
        else:
            os.close(fd)

    def _stop(self, run: _Run) -> None:
        """Ends the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(run.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it: the day goes on
            run.process.wait(timeout=DYING)
        for fd in list(run.open):
            self._close(run, fd)
        self._running.remove(run)

    # --- how it can end ---

    def _over(self, run: _Run) -> None:
        """It speaks no more: it has ended, or is about to. What it started may still hold its output open."""
        try:
            code = run.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        while self._read(run, run.output):
            pass
        self._stop(run)
        if run.ended:
            return
        if run.row is not None or run.plan is None:
            how = "it spoke no more" if code is None else ending(code)
            self._lost(run, CRASHED, "; ".join([how, *(line for line in run.tail if line)]))
        self._again(run)

    def _hung(self, run: _Run) -> None:
        self._stop(run)
        self._lost(run, HUNG, f"no end within {run.job.limit + (0 if run.row is not None else START):.0f} s")
        self._again(run)

    def _lost(self, run: _Run, kind: str, words: str) -> None:
        row = run.row or Row(run.job.spec["kind"], run.job.name, "start", "")
        row.kind, row.words = kind, words
        if run.row is not None:
            row.seconds = round(time.monotonic() - run.began, 3)
            run.progress += 1
        self._record.add(row)

    def _again(self, run: _Run) -> None:
        """The rows that are left, in a new process; where one did not come as far as any row, no other is tried."""
        if run.plan is None or run.progress == 0:
            self._not_reached(run.plan or [])
        elif any(row.key not in self._record.rows for row in run.plan):
            self._start(run.job)

    def _out_of_time(self, waiting: deque[Job]) -> None:
        for run in list(self._running):
            self._stop(run)
            self._not_reached(run.plan or [Row(run.job.spec["kind"], "", "", run.job.name)])
        for job in waiting:
            self._not_reached([Row(job.spec["kind"], "", "", job.name)])

    def _not_reached(self, rows: list[Row]) -> None:
        for row in rows:
            if row.key not in self._record.rows:
                row.kind = NOT_REACHED
                self._record.add(row)


def ending(code: int) -> str:
    """An exit code in words."""
    if code == POISONED:
        return "the device was lost"
    if code >= 0:
        return f"ended with exit code {code}"
    return f"ended by {signal.Signals(-code).name}"
