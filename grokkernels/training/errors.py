"""The error that the command line shows to a person as one sentence, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something the caller can mend: a missing file, an option that does not fit, a damaged checkpoint.

    The message is one sentence that names the thing, its value and what would be right.
    """
