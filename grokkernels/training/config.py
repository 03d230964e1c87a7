"""The settings of one training run: what `grokkernels train` takes, and what a checkpoint remembers."""

from __future__ import annotations

import dataclasses
import reprlib
import sys
from dataclasses import dataclass, field
from typing import Any

from . import device
from .errors import UserError

# What may change between an interruption and `--resume`: nothing here alters the numbers of a step, except that a
# longer run or another learning rate changes the schedule from there on (a run that diverged goes on with a lower
# one), and that another device, backend or thread count rounds differently.
CHANGEABLE = frozenset(
    {"data", "steps", "minutes", "lr", "threads", "backend", "device"}
    | {"eval_every", "eval_batches", "save_every", "keep"}
)


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be: finite ones of `kind` from `low` to `high`."""

    kind: type[int] | type[float]
    low: float
    high: float
    above: bool = False  # low itself is not allowed
    below: bool = False  # high itself is not allowed
    optional: bool = False  # None is allowed

    def allows(self, value: Any) -> bool:
        """Whether `value` is one of them."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, (int, self.kind)):
            return False
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above else f"at least {self.low}"
        if self.high == _LARGEST[self.kind]:
            high = " and below 2^63" if self.kind is int else ""
        else:
            high = f" and below {self.high}" if self.below else f" and at most {self.high}"
        return f"{'an integer' if self.kind is int else 'a finite number'}, {low}{high}"


_LARGEST = {int: 2**63 - 1, float: sys.float_info.max}


def _count(high: int = _LARGEST[int], optional: bool = False) -> Range:
    return Range(int, 1, high, optional=optional)


def _number(low: float, high: float = _LARGEST[float], **edges: bool) -> Range:
    return Range(float, low, high, **edges)


RANGES = {
    "context": _count(),
    "batch": _count(),
    "steps": _count(optional=True),
    "minutes": _number(0, above=True, optional=True),
    "lr": _number(0, above=True),
    "warmup": _number(0, 1, below=True),
    "floor": _number(0, 1),
    "weight_decay": _number(0),
    "beta1": _number(0, 1, below=True),
    "beta2": _number(0, 1, below=True),
    "clip": _number(0, above=True),
    "load_balance": _number(0),
    "z_loss": _number(0),
    "seed": Range(int, 0, _LARGEST[int]),
    "threads": _count(1024, optional=True),  # a process with many more is refused by the system, or hangs
    "eval_every": _count(optional=True),
    "eval_batches": _count(),
    "save_every": _count(optional=True),
    "keep": _count(),
}
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. Exactly one of `steps` and `minutes` is set; `context` counts tokens.

    Errors: UserError, naming the setting, its value and what is allowed.
    """

    data: tuple[str, ...] = ()  # files and folders; empty: the Python standard library
    tokenizer: str | None = None  # file; None: bytes
    preset: str = "tiny"
    overrides: dict[str, Any] = field(default_factory=dict)  # of GrokConfig fields
    context: int = 256
    batch: int = 8
    steps: int | None = None
    minutes: float | None = None
    lr: float = 3e-3
    warmup: float = 0.05  # share of the run
    floor: float = 0.1  # last learning rate / peak
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    load_balance: float = 0.01
    z_loss: float = 0.001
    dtype: str = "float32"
    seed: int = 0
    threads: int | None = None
    backend: str | None = None
    device: str = "auto"
    eval_every: int | None = None  # steps; None: 20 times per run
    eval_batches: int = 8
    save_every: int | None = None  # steps; None: 10 times per run
    keep: int = 2

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            self._require(name, allowed.allows(getattr(self, name)), str(allowed))
        self._require("data", isinstance(self.data, tuple) and all(isinstance(p, str) for p in self.data), "paths")
        self._require("tokenizer", isinstance(self.tokenizer, (str, type(None))), "a path or None")
        self._require("preset", isinstance(self.preset, str), "a preset's name")
        self._require("overrides", isinstance(self.overrides, dict), "model settings by name")
        self._require("dtype", self.dtype in _DTYPES, " or ".join(_DTYPES))
        self._require("backend", isinstance(self.backend, (str, type(None))), "a backend's name or None")
        self._require("device", device.is_name(self.device), device.NAMES)
        if (self.steps is None) == (self.minutes is None):
            raise UserError(
                f"give the length of the run as steps or as minutes, not both or neither: "
                f"steps={self.steps}, minutes={self.minutes}"
            )

    def _require(self, name: str, allowed: bool, words: str) -> None:
        if not allowed:
            raise UserError(f"{name} must be {words}, got {reprlib.repr(getattr(self, name))}")

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the run that is done after `step` steps and `elapsed` seconds."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return elapsed / (60.0 * self.minutes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of `to_dict`; unknown names are refused."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise UserError(f"unknown training settings {sorted(unknown)}: made by another version of grokkernels?")
        paths = values.get("data", ())
        return cls(**{**values, "data": tuple(paths) if isinstance(paths, list) else paths})

    def resumed_with(self, given: dict[str, Any]) -> Settings:
        """These settings with what the user gave on the command line of `--resume`, where that may change."""
        for name, value in given.items():
            if name not in CHANGEABLE and value != getattr(self, name):
                option = "--" + name.replace("_", "-")
                raise UserError(
                    f"the run to resume was started with {option} {getattr(self, name)}, which {option} {value} "
                    f"contradicts: leave it out to continue, or start a new run in another --out folder"
                )
        changes = {name: value for name, value in given.items() if name in CHANGEABLE}
        if changes.get("steps") is not None:
            changes.setdefault("minutes", None)
        if changes.get("minutes") is not None:
            changes.setdefault("steps", None)
        return dataclasses.replace(self, **changes)
