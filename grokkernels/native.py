"""The native library, loaded once: or the reason why it is not."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch  # noqa: F401  (its libraries must be in the process before ours)

module: ModuleType | None = None
load_error: str | None = None

try:
    module = import_module("grokkernels._C")
except ImportError as error:
    load_error = f"the native library did not load: {error}"
else:
    module.cpu_level()  # raises here, at import, on a GROKKERNELS_CPU_LEVEL that this machine cannot run
