"""Writing files so that a reader, or a crash at any moment, never meets half of one; and reading what others wrote.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed over its final name;
then the folder is flushed too, since the rename itself lives there. A name without a leading dot is always complete.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_MARK = ".tmp-"
_DEEPEST = 32  # levels of lists and objects in a JSON text of ours: far more than any has


def sync_directory(directory: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it outlives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path, *instead: Path) -> Iterator[None]:
    """Make an OSError from the block name `path`, where it names no file (a full disk) or one of `instead`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename) in map(str, instead):
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new, empty temporary file; when the block ends well, that file becomes `path`.

    On any error it is removed. An OSError from the block that names no file names `path`.
    """
    temporary = path.with_name(f".{path.name}{_MARK}{os.getpid()}-{secrets.token_hex(4)}")
    with naming(path, temporary):
        # The name is new, or this fails: a link that someone put there is not followed.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
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


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, which may be anyone's. Errors: ValueError, also for one that is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deeply")
