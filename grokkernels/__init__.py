"""Kernels for mixture-of-experts transformers as Grok has them: the ops, drop-in, and where they run.

Every op is a function here (`grokkernels.rms_norm`), described by its docstring and by `explain`. Optimizers stand in
`grokkernels.optim`, the reference transformer in `grokkernels.models.grok`.
"""

from __future__ import annotations

from grokkernels import waiting

waiting.prepare()  # before anything imports torch

from grokkernels import ops, optim  # noqa: E402
from grokkernels.dispatch import explain, use  # noqa: E402
from grokkernels.ops import *  # noqa: E402, F403
from grokkernels.version import __version__  # noqa: E402

__all__ = ["__version__", "explain", "optim", "use", *ops.__all__]
