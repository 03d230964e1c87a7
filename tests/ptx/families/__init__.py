"""The instructions, a file per family; importing one registers what it knows."""

from . import (  # noqa: F401
    arithmetic,
    control,
    conversion,
    copies,
    floating,
    matrix,
    mbarriers,
    memory_access,
    move,
    warp,
    warpgroup,
)
