"""What a row of a benchmark is: a piece of work, who did it, in what time."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

OURS = "grokkernels"


@dataclass(frozen=True)
class Work:
    """One call to be timed, counted from its shapes.

    `read` and `written` are the bytes that must pass between memory and the chip, `flops` the arithmetic of matrix
    products (a multiply-add is two), both as an ideal implementation would have them. `curve` is ("tokens", 512) for a
    point of a curve of cost against size.
    """

    op: str
    shape: str
    dtype: str
    direction: str = "forward"  # or "forward + backward"
    read: int = 0
    written: int = 0
    flops: int = 0
    curve: tuple[str, int] | None = None
    fresh_memory: bool = False  # outputs in pages that the operating system gives anew every time

    @property
    def name(self) -> str:
        words = [self.shape, self.dtype, self.direction]
        return ", ".join(words + ["fresh memory"] * self.fresh_memory)


@dataclass
class Row:
    """Work with the seconds of each contender's rounds, or the reason why one is absent."""

    work: Work
    limit: float  # seconds that the machine's limits would allow
    seconds: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # bytes of memory that a call takes at its peak, where measured

    def median(self, contender: str) -> float:
        return statistics.median(self.seconds[contender])

    def spread(self, contender: str) -> float:
        """Half the distance of the quartiles over the median."""
        if len(self.seconds[contender]) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds[contender], n=4)
        return (third - first) / 2 / self.median(contender)

    @property
    def peers(self) -> list[str]:
        return [name for name in self.seconds if name != OURS]

    @property
    def best_peer(self) -> str | None:
        return min(self.peers, key=self.median, default=None)

    @property
    def ratio(self) -> float | None:
        """Time of the best peer over ours: above 1 we are ahead."""
        return None if self.best_peer is None else self.median(self.best_peer) / self.median(OURS)

    @property
    def share(self) -> float | None:
        """Of the machine's limit; None where nothing was counted."""
        return self.limit / self.median(OURS) if self.limit else None

    @property
    def rate(self) -> str:
        """What we reach, in the unit of what bounds the work; empty where nothing was counted."""
        seconds, work = self.median(OURS), self.work
        if work.flops:
            return f"{work.flops / seconds / 1e9:.0f} GFLOP/s"
        if not work.read + work.written:
            return ""
        return f"{(work.read + work.written) / seconds / 1e9:.1f} GB/s"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Row:
        work = dict(fields["work"])
        work["curve"] = None if work["curve"] is None else tuple(work["curve"])
        return cls(**{**fields, "work": Work(**work)})
