"""The instructions, a file per family; importing one registers what it knows."""

from . import arithmetic, control, conversion, copies, floating, matrix, memory_access, move, warp  # noqa: F401
