"""The build backend pip calls: setuptools, plus one question asked late: is torch already here?

Listing torch in `build-system.requires` would make pip download a second torch, with CUDA, for the build alone. The
kernels use torch's stable ABI, so any torch from 2.10 on will do: an isolated build takes the one of the environment
it was started from (pip runs it with that environment's interpreter) and asks for one only if there is none.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.machinery import PathFinder

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks of PEP 517 and 660 that stay as they are)

_CALLER = [sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")]


def _find_torch() -> bool:
    if PathFinder.find_spec("torch", sys.path) is not None:
        return True
    return PathFinder.find_spec("torch", _CALLER) is not None


def _torch_requirement() -> list[str]:
    return [] if _find_torch() else ["torch>=2.10"]


def _use_callers_torch() -> None:
    """Let the build, and the setup.py it runs, import torch from the calling environment (found last)."""
    for path in _CALLER:
        if path not in sys.path:
            sys.path.append(path)


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _use_callers_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _use_callers_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
