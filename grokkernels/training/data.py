"""Text files to a memory-mapped array of tokens, a held-out part, and batches that depend on (seed, step) alone.

Documents are read twice: once to check and hash them, which names the cache file, and, if that file is not there yet,
once more to write it. The cache file is one header of 4096 bytes (JSON) and the ids: training documents first, then
the held-out ones, each document followed by the tokenizer's separator. The header holds a CRC-32 of all that follows
and of itself, which is checked whenever the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .files import open_replacing, parse_json
from .tokenizer import Tokenizer, check_ids, fingerprint

HELD_OUT = 0.05  # share of the text kept for validation
_HEADER = 4096
_FORMAT = "grokkernels tokens 1"  # how text becomes tokens: part of the name that a checkpoint remembers
_LAYOUT = 2  # of the cache file: part of the file's name
# Parts of the standard library that are not prose-like source: other people's packages, tests, tables of characters.
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text: its file, its size in bytes, and the sha256 of its content."""

    path: Path
    size: int
    digest: bytes


@dataclass(frozen=True)
class Tokens:
    """The prepared text. `train` and `held_out` are 1-D read-only arrays of ids; `name` is the hash of all content."""

    train: np.ndarray
    held_out: np.ndarray
    name: str
    vocab_size: int
    documents: int
    skipped: int
    path: Path

    def batch(self, seed: int, step: int, batch: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and next tokens of training step `step`, each (batch, context) int64: windows at random starts.

        The starts are Philox numbers with key `seed` and counter `step` (Salmon et al. 2011), so any step's batch can
        be had without the ones before it.
        """
        raw = np.random.Philox(key=seed, counter=[0, step, 0, 0]).random_raw(batch)
        return _windows(self.train, raw % np.uint64(len(self.train) - context), context)

    def held_out_batches(self, count: int, batch: int, context: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same evenly spaced windows of the held-out text at every call: at most `count` batches."""
        last = len(self.held_out) - context - 1
        windows = min(count * batch, last // context + 1)
        starts = np.linspace(0, last, windows).astype(np.int64)
        for first in range(0, windows, batch):
            yield _windows(self.held_out, starts[first : first + batch], context)

    def unigram_loss(self) -> float:
        """Cross entropy in nats per token of the held-out text under the training text's token frequencies.

        This is what a model that knows how often each token occurs, and nothing of its surroundings, would reach.
        One is added to each count, so that a token unseen in training has a probability.
        """
        seen = _counts(self.train, self.vocab_size) + 1.0
        held_out = _counts(self.held_out, self.vocab_size)
        return float(-(held_out * np.log(seen / seen.sum())).sum() / held_out.sum())

    def check_context(self, context: int) -> None:
        """Refuse a context that does not fit into either part of the text."""
        for part, ids in (("training", self.train), ("held-out", self.held_out)):
            if len(ids) <= context:
                raise UserError(
                    f"a context of {context} tokens does not fit into the {part} text of {len(ids)} tokens: "
                    f"give more text or a smaller --context"
                )


def prepare(paths: Sequence[str], tokenizer: Tokenizer, cache: Path | None = None) -> Tokens:
    """Find, check and tokenize the documents in `paths` (the Python standard library if empty), or reuse the cache.

    A file must be UTF-8 text without NUL bytes; in a folder, other files and hidden ones are left out. Documents with
    the same content count once.
    """
    cache = cache or default_cache()
    documents, skipped = _documents(paths)
    total = sum(document.size for document in documents)
    if total == 0:
        raise UserError(f"no text found in {_names(paths)}: every file is empty or not UTF-8 text")
    name = hashlib.sha256(
        b"".join([_FORMAT.encode(), fingerprint(tokenizer).encode(), *(document.digest for document in documents)])
    ).hexdigest()
    path = cache / f"{name[:32]}.{_LAYOUT}.tokens"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _write(path, documents, tokenizer, name)
    return _open(path, name, skipped)


def default_cache() -> Path:
    """Where tokens are kept: $GROKKERNELS_CACHE, else grokkernels/ in the user's cache folder."""
    named = os.environ.get("GROKKERNELS_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grokkernels"


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _documents(paths: Sequence[str]) -> tuple[list[Document], int]:
    """Documents in the order of their content's hash, without duplicates, and how many files of folders were skipped.

    That order is the same on every machine and wherever the files lie; held-out documents are its first ones.
    """
    found: dict[bytes, Document] = {}
    skipped = 0
    for path, named in _files(paths):
        try:
            content = path.read_bytes()
            _check_text(content, path)
        except OSError as error:
            if named:
                raise UserError(f"cannot read {path}: {error.strerror}") from None
            skipped += 1
            continue
        except UserError:
            if named:
                raise
            skipped += 1
            continue
        if content:
            digest = hashlib.sha256(content).digest()
            found[digest] = Document(path, len(content), digest)
    return [found[digest] for digest in sorted(found)], skipped


def _files(paths: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """Each file, and whether the user named it (rather than a folder around it)."""
    if not paths:
        library = standard_library()
        for folder, folders, names in os.walk(library):
            folders[:] = sorted(set(folders) - _NOT_SOURCE)
            yield from ((Path(folder, name), False) for name in sorted(names) if name.endswith(".py"))
        return
    for name in paths:
        path = Path(name)
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
                files = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
                yield from ((file, False) for file in files if file.is_file())
        elif path.is_file():
            yield path, True
        elif path.exists():
            raise UserError(f"--data {name} is neither a file nor a folder")
        else:
            raise UserError(f"--data {name} does not exist")


def _check_text(content: bytes, path: Path) -> None:
    at = content.find(b"\0")
    if at >= 0:
        raise UserError(f"{path} is not text: it has a zero byte at offset {at}")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {content[error.start]:#04x} at offset {error.start}") from None


def _split(documents: list[Document]) -> tuple[list[tuple[Document, int, int]], list[tuple[Document, int, int]]]:
    """Training and held-out parts as (document, first byte, end byte).

    Whole documents are held out while they fit into the share; where that leaves less than half of the share (one
    long file, say), the end of each document is held out instead.
    """
    budget = HELD_OUT * sum(document.size for document in documents)
    chosen: set[bytes] = set()
    used = 0
    for document in documents:
        if used + document.size <= budget:
            chosen.add(document.digest)
            used += document.size
    if used >= budget / 2:
        train = [(d, 0, d.size) for d in documents if d.digest not in chosen]
        return train, [(d, 0, d.size) for d in documents if d.digest in chosen]
    cuts = [(d, _cut(d.path.read_bytes(), d)) for d in documents]
    return [(d, 0, cut) for d, cut in cuts], [(d, cut, d.size) for d, cut in cuts if cut < d.size]


def _cut(content: bytes, document: Document) -> int:
    """Where the held-out end of a document begins: after the next line end, else between two characters."""
    at = int(document.size * (1.0 - HELD_OUT))
    line = content.find(b"\n", at, at + max(80, document.size // 50))
    if line >= 0:
        return line + 1
    while at < len(content) and content[at] & 0xC0 == 0x80:
        at += 1
    return at


def _write(path: Path, documents: list[Document], tokenizer: Tokenizer, name: str) -> None:
    dtype = next(t for t in (np.uint8, np.uint16, np.uint32) if tokenizer.vocab_size <= np.iinfo(t).max + 1)
    separator = np.array([tokenizer.separator], dtype=dtype)
    with open_replacing(path) as file:
        file.write(b"\0" * _HEADER)
        lengths = []
        crc = 0
        for part in _split(documents):
            length = 0
            for document, first, end in part:
                content = document.path.read_bytes()
                if hashlib.sha256(content).digest() != document.digest:
                    raise UserError(f"{document.path} changed while it was read: run again")
                ids = tokenizer.encode(content[first:end].decode("utf-8"))
                check_ids(ids, tokenizer)
                for piece in (ids.astype(dtype, copy=False).tobytes(), separator.tobytes()):
                    file.write(piece)
                    crc = zlib.crc32(piece, crc)
                length += len(ids) + 1
            lengths.append(length)
        header = {
            "format": _FORMAT,
            "name": name,
            "dtype": np.dtype(dtype).name,
            "vocab_size": tokenizer.vocab_size,
            "train": lengths[0],
            "held_out": lengths[1],
            "documents": len(documents),
        }
        file.seek(0)
        file.write(json.dumps({**header, "crc32": _with_header(crc, header)}).encode().ljust(_HEADER, b"\n"))


def _with_header(crc: int, header: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(header).encode(), crc)


def _open(path: Path, name: str, skipped: int) -> Tokens:
    damaged = UserError(f"the token cache {path} is damaged: delete it and run again")
    try:
        with open(path, "rb") as file:
            header = parse_json(file.read(_HEADER))
            crc = 0
            while piece := file.read(1 << 20):
                crc = zlib.crc32(piece, crc)
        # The checksum is that of a header that this module wrote: what it covers need not be checked one by one.
        if header.pop("crc32") != _with_header(crc, header) or header["name"] != name:
            raise damaged
        ids = np.memmap(path, dtype=np.dtype(header["dtype"]), mode="r", offset=_HEADER)
        train = header["train"]
        return Tokens(ids[:train], ids[train:], name, header["vocab_size"], header["documents"], skipped, path)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged from None


def _windows(ids: np.ndarray, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    at = starts.astype(np.int64)[:, None] + np.arange(context + 1)
    windows = ids[at].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]


def _counts(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.float64)
    for first in range(0, len(ids), 1 << 22):
        counts += np.bincount(ids[first : first + (1 << 22)], minlength=vocab_size)
    return counts


def _names(paths: Sequence[str]) -> str:
    return ", ".join(str(path) for path in paths) if paths else f"the standard library at {standard_library()}"
