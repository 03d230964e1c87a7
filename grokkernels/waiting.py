"""How the threads of torch's OpenMP wait for one another: `grokkernels`, the command, makes them sleep early.

libgomp's threads wait by spinning, some milliseconds at the end of each parallel region. On a machine with nothing else
to do this is free; beside other busy processes it takes the time of the very thread that is waited for. A thousand
rounds, some microseconds, then sleep: as fast when idle, and near the fair share when not (docs/training.md).

libgomp reads its settings when it is loaded, with torch; so `prepare` comes first of all that the package imports. A
library does not change the settings of the program that imports it: only the command's process is prepared.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SETTING, ROUNDS = "GOMP_SPINCOUNT", "1000"
# Whoever sets one of these has decided; the first one set is the one that libgomp follows.
SETTINGS = (SETTING, "OMP_WAIT_POLICY")
_prepared = False


def is_command(arguments: Sequence[str]) -> bool:
    """Whether a process with these arguments (sys.orig_argv) is `grokkernels` or `python -m grokkernels`."""
    if "-m" in arguments:
        return arguments[arguments.index("-m") + 1 :][:1] == ["grokkernels"]
    script = [argument for argument in arguments[1:] if not argument.startswith("-")][:1]
    return any(Path(argument).name == "grokkernels" for argument in script)


def prepare() -> None:
    """Sets what libgomp reads, in the command's process, unless the user has or torch is loaded already."""
    global _prepared
    if is_command(sys.orig_argv) and "torch" not in sys.modules and not any(name in os.environ for name in SETTINGS):
        os.environ[SETTING] = ROUNDS
        _prepared = True


def policy(environment: Mapping[str, str] = os.environ) -> str:
    """Which policy is in force, and who set it, in words."""
    advice = f"on a machine that is shared, set {SETTING}={ROUNDS} before Python starts"
    for name in SETTINGS:
        value = environment.get(name)
        if value is not None:
            return f"{name}={value}, set by {'the grokkernels command' if _prepared else 'the user'}"
    return f"OpenMP's own: threads spin for milliseconds; {advice}"
