"""Kernels for mixture-of-experts transformers as Grok has them: the ops, drop-in, and where they run.

Every op is a function here (`grokkernels.rms_norm`), described by its docstring and by `explain`. Optimizers stand in
`grokkernels.optim`, the reference transformer in `grokkernels.models.grok`.
"""

from __future__ import annotations

from grokkernels import ops, optim
from grokkernels.dispatch import explain, use
from grokkernels.ops import *  # noqa: F403
from grokkernels.version import __version__

__all__ = ["__version__", "explain", "optim", "use", *ops.__all__]
