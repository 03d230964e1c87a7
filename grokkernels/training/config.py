"""The settings of one training run: what `grokkernels train` takes, and what a checkpoint remembers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError

# What may change between an interruption and `--resume`: nothing here alters the numbers of a step, except that a
# longer run stretches the learning-rate schedule and that another backend or thread count rounds differently.
CHANGEABLE = frozenset(
    {"data", "steps", "minutes", "threads", "backend", "eval_every", "eval_batches", "save_every", "keep"}
)


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. Exactly one of `steps` and `minutes` is set; `context` counts tokens."""

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
    eval_every: int | None = None  # steps; None: 20 times per run
    eval_batches: int = 8
    save_every: int | None = None  # steps; None: 10 times per run
    keep: int = 2

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise UserError(
                f"give the length of the run as steps or as minutes, not both or neither: "
                f"steps={self.steps}, minutes={self.minutes}"
            )
        for name in ("context", "batch", "steps", "minutes", "eval_every", "eval_batches", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be above zero, got {value}")
        if not 0.0 <= self.warmup < 1.0:
            raise UserError(f"warmup is a share of the run in [0, 1), got {self.warmup}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")

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
        return cls(**{**values, "data": tuple(values.get("data", ()))})

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
