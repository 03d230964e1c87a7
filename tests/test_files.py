"""Files: nothing is emptied or followed that is not the writer's own, a full disk is named, a flipped byte is seen."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grokkernels.training import checkpoint, data, files, tokenizer
from grokkernels.training.errors import UserError
from grokkernels.training.run import _locked

ABOUT = {"config": {}, "settings": {}, "optimizer": {}, "tokenizer": "bytes", "data": "", "elapsed": 0.5}


def test_a_lock_follows_no_link_and_empties_nothing(tmp_path: Path) -> None:
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_text("kept")
    out.mkdir()
    (out / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match=r"\.lock is a symbolic link"), _locked(out):
        pass
    assert precious.read_text() == "kept"
    (out / ".lock").unlink()
    (out / ".lock").write_text("kept")
    with _locked(out), pytest.raises(UserError, match="another training is writing"), _locked(out):
        pass
    with _locked(out):
        assert (out / ".lock").read_text() == "kept"


def test_a_temporary_file_is_always_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious, path = tmp_path / "precious", tmp_path / "file"
    precious.write_text("kept")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    with files.replacing(path) as temporary:
        name = temporary
    name.symlink_to(precious)
    with pytest.raises(FileExistsError) as told, files.open_replacing(path) as file:
        file.write(b"other")
    assert told.value.filename == str(path)
    assert precious.read_text() == "kept"


def replace_file(folder: Path) -> Path:
    """Writes more than the limit of the test below."""
    with files.open_replacing(folder / "file") as file:
        file.write(b"x" * 10_000)
    return folder / "file"


def save_checkpoint(folder: Path) -> Path:
    """Does so too, and would delete the checkpoint of step 1."""
    return checkpoint.save(folder, 2, {"model/w": torch.zeros(5000)}, ABOUT, keep=1)


@pytest.mark.parametrize("write", [replace_file, save_checkpoint])
def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """A limit on the size of files stands for the full disk: the system's error names no file either."""
    before = checkpoint.save(tmp_path, 1, {"model/w": torch.zeros(5)}, ABOUT)
    content = before.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large") as told:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before.read_bytes() == content
    assert not any(files.is_temporary(path) for path in tmp_path.iterdir())
    assert told.value.filename == str(write(tmp_path))


def test_a_flipped_byte_of_the_token_cache_is_seen(tmp_path: Path) -> None:
    """Any of the header's, and some of the ids."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n" * 200)
    words = tokenizer.ByteTokenizer()
    tokens = data.prepare([str(text)], words, tmp_path / "cache")
    whole = tokens.path.read_bytes()
    header = len(whole[:4096].rstrip())
    for place in [*range(header), *range(4096, len(whole), 101), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        tokens.path.unlink()
        tokens.path.write_bytes(flipped)
        with pytest.raises(UserError, match="damaged"):
            data.prepare([str(text)], words, tmp_path / "cache")
    tokens.path.write_bytes(b"[" * 4096 + whole[4096:])
    with pytest.raises(UserError, match="damaged"):
        data.prepare([str(text)], words, tmp_path / "cache")
    tokens.path.write_bytes(whole)
    assert data.prepare([str(text)], words, tmp_path / "cache").name == tokens.name
