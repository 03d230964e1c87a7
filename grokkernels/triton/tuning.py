"""Which of a few configurations a kernel runs with: measured once per kernel, key and GPU, and kept on disk.

    choice = tuning.choose("grouped_mm_kernel", (K, N, dtype), CONFIGS, launch)      # launch(config) runs it once
    launch(choice)

The key holds what the choice depends on, widths and dtypes; never a number of tokens, so lengths that change from call
to call are no reason to measure. The file is `$GROKKERNELS_TUNING_DIR` or `~/.cache/grokkernels`, `triton-<GPU>.json`;
what cannot be written there is measured again by the next process. `pin` overrules both for as long as it is open. In
the interpreter, and where GROKKERNELS_TUNING=off, the first configuration, the one predicted to be best, is taken.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from grokkernels.triton import INTERPRETED
from grokkernels.triton.kernel import executor


@dataclass(frozen=True)
class Config:
    """Tile sizes (constexpr of the kernel, by name) and the compiler's options."""

    tiles: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def meta(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


_pinned: dict[str, Config] = {}


@contextmanager
def pin(kernel: str, config: Config) -> Iterator[None]:
    """The kernel of this name runs with `config` inside, whatever was measured."""
    before = _pinned.get(kernel)
    _pinned[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _pinned[kernel]
        else:
            _pinned[kernel] = before


def choose(kernel: str, key: tuple[Any, ...], configs: Sequence[Config], launch: Callable[[Config], None]) -> Config:
    """The configuration to run with. Measuring calls `launch` many times: it must leave its inputs as they are."""
    if kernel in _pinned:
        return _pinned[kernel]
    if executor() is not None:
        for config in configs[1:]:  # whoever compiles instead of running wants to see them all
            launch(config)
        return configs[0]
    if INTERPRETED or len(configs) == 1 or os.environ.get("GROKKERNELS_TUNING") == "off":
        return configs[0]
    return _measured(kernel, tuple(map(str, key)), tuple(configs), launch)


_known: dict[tuple[str, str], Config] = {}


def _measured(
    kernel: str, key: tuple[str, ...], configs: tuple[Config, ...], launch: Callable[[Config], None]
) -> Config:
    entry = f"{kernel}({', '.join(key)})"
    path = _file()
    if (str(path), entry) not in _known:
        kept = _read(path).get(entry)
        known = [config for config in configs if asdict(config) == kept]
        if not known:
            times = [triton.testing.do_bench(functools.partial(launch, config)) for config in configs]
            known = [configs[times.index(min(times))]]
            _write(path, entry, asdict(known[0]))
        _known[str(path), entry] = known[0]
    return _known[str(path), entry]


def _file() -> Path:
    folder = os.environ.get("GROKKERNELS_TUNING_DIR") or Path.home() / ".cache" / "grokkernels"
    device = getattr(torch, "xpu" if torch.xpu.is_available() else "cuda")
    gpu = re.sub(r"\W+", "-", device.get_device_name(device.current_device()))
    return Path(folder) / f"triton-{triton.__version__}-{gpu}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not ours: measured again
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, entry: str, config: dict[str, Any]) -> None:
    """Adds an entry; to a temporary name first, so that processes side by side never leave half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({**_read(path), entry: config}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError:  # a home that cannot be written to: the choice lives as long as the process
        return
