"""The contracts, one file per op. Importing the package registers them all; there is no list to edit.

What a contract names in `__all__` is public here and at the top of the package: `grokkernels.ops.rms_norm` is the
function; its file is reached with `from grokkernels.ops.rms_norm import ...`.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

__all__: list[str] = []

for _info in iter_modules(__path__):
    _module = import_module(f"{__name__}.{_info.name}")
    for _name in getattr(_module, "__all__", ()):
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)
