"""The native libraries, one per column, each loaded once: or the reason why it is not."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from types import ModuleType

import torch  # its libraries must be in the process before ours


def _load_cpu() -> tuple[ModuleType | None, str | None]:
    try:
        found = import_module("grokkernels._C")
    except ImportError as error:
        return None, f"the native library did not load: {error}"
    found.cpu_level()  # raises here, at import, on a GROKKERNELS_CPU_LEVEL that this machine cannot run
    return found, None


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    if torch.version.cuda is None:
        return None, f"this torch ({torch.__version__}) is built without CUDA"
    if find_spec("grokkernels._C_cuda") is None:
        return None, "this installation was built without CUDA kernels: see `grokkernels doctor`"
    try:
        return import_module("grokkernels._C_cuda"), None
    except ImportError as error:
        return None, f"the CUDA library did not load: {error}"


def _load_emulated() -> tuple[ModuleType | None, str | None]:
    """GROKKERNELS_EMULATED_LIBRARY names another build of the library (tests plant bugs in one)."""
    path = os.environ.get("GROKKERNELS_EMULATED_LIBRARY")
    try:
        if path:
            spec = spec_from_file_location("grokkernels._C_emulated", path)
            assert spec is not None
            assert spec.loader is not None
            found = module_from_spec(spec)
            spec.loader.exec_module(found)
            sys.modules[spec.name] = found
            return found, None
        if find_spec("grokkernels._C_emulated") is None:
            return (
                None,
                "this installation was built without the emulated device: GROKKERNELS_COLUMNS=cpu,emulated builds it",
            )
        return import_module("grokkernels._C_emulated"), None
    except ImportError as error:
        return None, f"the emulated device did not load: {error}"


module, load_error = _load_cpu()
cuda, cuda_error = _load_cuda()
emulated, emulated_error = _load_emulated()
