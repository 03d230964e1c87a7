"""One case table per op, in the file of the op's name, as `TABLE`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from grokkernels.testing.case import Table


def tables() -> dict[str, Table]:
    """Every case table by the name of its file."""
    return {m.name: import_module(f"{__name__}.{m.name}").TABLE for m in iter_modules(__path__)}
