"""Writing files so that a reader, or a crash at any moment, never meets half of one.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed over its final name;
then the folder is flushed too, since the rename itself lives there. A name without a leading dot is always complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_MARK = ".tmp-"


def sync_directory(directory: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it outlives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, that file becomes `path`, and on any error it is removed."""
    temporary = path.with_name(f".{path.name}{_MARK}{os.getpid()}")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def open_replacing(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Like `replacing`, but yields an open file."""
    with (
        replacing(path) as temporary,
        open(temporary, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "\n") as file,
    ):
        yield file


def is_temporary(path: Path) -> bool:
    """Whether `path` is a file that some writer did not finish (yet)."""
    return path.name.startswith(".") and _MARK in path.name


def remove_temporaries(directory: Path) -> list[Path]:
    """Remove what interrupted writers left in `directory`; call it only while no one else writes there."""
    stale = [path for path in directory.iterdir() if is_temporary(path)]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale
