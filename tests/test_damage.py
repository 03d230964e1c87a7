"""A checkpoint that is damaged, in every way that a header, a tensor or a file can be, is told in one sentence.

Each damage goes through all that reads a checkpoint: resuming a run, and generating text. Either both work, since the
damage changes nothing that they need (another seed, say), or the one that does not raises a UserError of one line.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grokkernels.training import checkpoint
from grokkernels.training.errors import UserError
from grokkernels.training.generate import stream
from grokkernels.training.model import restore, restore_settings
from grokkernels.training.run import train
from grokkernels.training.trainer import Trainer

SIZES = {"d_model": 16, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "ffn_dim": 8}
OVERRIDES = {**SIZES, "num_experts": 2, "top_k": 1, "max_position": 32}
FIELDS = ("format", "step", "crc32", "settings", "config", "tokenizer", "data", "elapsed", "optimizer")

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[checkpoint.Checkpoint]:
    """The checkpoint of a run of two steps, in the run's folder; its text is cached beside it."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROKKERNELS_CACHE", str(folder / "cache"))
        # What is tested ends where the loop begins.
        given = {"data": (str(folder / "text.txt"),), "overrides": OVERRIDES, "context": 8, "batch": 1, "steps": 2}
        given |= {"keep": 1, "eval_batches": 1, "threads": torch.get_num_threads(), "device": "cpu"}
        summary = train(folder / "out", given)
        patch.setattr(Trainer, "run", lambda self: None)
        loaded = checkpoint.load(summary.checkpoint)
        # What is loaded is the file's own memory, and the file will be written to.
        loaded.tensors = {name: tensor.clone() for name, tensor in loaded.tensors.items()}
        yield loaded


def read(path: Path) -> str | None:
    """Resume from the checkpoint `path`, and let it speak; what went wrong, in a sentence, or None."""

    def resume() -> None:
        train(path.parent, {}, resume=True)

    def generate() -> None:
        one = checkpoint.load(path, ("model/", "tokenizer"))
        context = restore_settings(one).context
        "".join(stream(*restore(one), "ab", max_new_tokens=2, seed=0, window=context))

    told = []
    for reader in (resume, generate):
        try:
            reader()
        except UserError as error:
            told.append(str(error))
    for words in told:
        assert words.strip() == words != "", words
        assert "\n" not in words, words
        assert len(words) < 600, words
    return told[0] if told else None


def write(path: Path, tensors: Tensors, about: dict[str, Any], crc: bool = True) -> None:
    """A checkpoint file as `save` writes it, with any header."""
    if crc:
        about = {**about, "crc32": {name: checkpoint._crc(tensor) for name, tensor in tensors.items()}}
    with open(path, "wb") as file:
        checkpoint._write(file, tensors, json.dumps(about))


@pytest.fixture
def damaged(saved: checkpoint.Checkpoint) -> Iterator[Callable[..., str | None]]:
    """Puts a changed header or other tensors into the checkpoint and reads it; the good one is back afterwards."""
    assert saved.path is not None
    content = saved.path.read_bytes()

    def change(about: Any = saved.about, tensors: Tensors = saved.tensors, crc: bool = True) -> str | None:
        write(saved.path, tensors, about, crc)
        return read(saved.path)

    yield change
    saved.path.write_bytes(content)


def test_what_is_whole_is_read(saved: checkpoint.Checkpoint, damaged: Callable[..., str | None]) -> None:
    assert damaged() is None
    assert saved.about.keys() > set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_header_without_a_field(saved: checkpoint.Checkpoint, damaged: Callable[..., str | None], field: str) -> None:
    words = damaged({name: value for name, value in saved.about.items() if name != field}, crc=False)
    assert words is not None
    assert field in words


def nested(levels: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


# One of each kind that JSON has, at its edges. The settings and the configuration get them in turn.
VALUES = [None, True, "x", "", -5, 10**30, 10**400, 2.5, math.nan, math.inf, [], {}, [1], {"a": None}, nested(25)]


@pytest.mark.parametrize("field", FIELDS)
def test_a_header_of_other_kinds(saved: checkpoint.Checkpoint, damaged: Callable[..., str | None], field: str) -> None:
    for value in VALUES:
        words = damaged({**saved.about, field: value}, crc=False)
        still_right = (field == "step" and value == 10**30) or (field == "elapsed" and value in (2.5, 10**30))
        assert still_right or words is not None, (field, value)


@pytest.mark.parametrize("part", ["settings", "config", "optimizer"])
def test_what_is_inside_of_a_header(
    saved: checkpoint.Checkpoint, damaged: Callable[..., str | None], part: str
) -> None:
    inside: list[tuple[Any, Any]] = []  # (object, key), as paths into a copy
    own = saved.about[part]
    inside = [(own, key) for key in own]
    if part == "optimizer":
        inside += [(group, key) for group in own["groups"] for key in group]
        inside += [(own["groups"], index) for index in range(len(own["groups"]))]
    refused = 0
    for place, (holder, key) in enumerate(inside):
        before = holder[key]
        for turn in range(3):
            holder[key] = copy.deepcopy(VALUES[(4 * place + turn) % len(VALUES)])
            try:
                refused += damaged() is not None
            finally:
                holder[key] = before
    if part != "optimizer":
        for key in list(own):
            refused += damaged({**saved.about, part: {k: v for k, v in own.items() if k != key}}) is not None
    assert refused > 2 * len(inside)


def test_models_that_no_memory_holds(saved: checkpoint.Checkpoint, damaged: Callable[..., str | None]) -> None:
    for name, value in (
        ("num_layers", 10**6),
        ("vocab_size", 10**13),
        ("max_position", 10**13),
        ("num_experts", 10**9),
    ):
        words = damaged({**saved.about, "config": {**saved.about["config"], name: value}})
        assert words is not None, name
    words = damaged({**saved.about, "settings": {**saved.about["settings"], "batch": 10**12}})
    assert words is not None
    assert "a step of" in words


def test_tensors_that_do_not_fit(saved: checkpoint.Checkpoint, damaged: Callable[..., str | None]) -> None:
    """Each is missing, or of another dtype or shape, or holds a NaN, in turn; and there is one more."""
    for place, (name, tensor) in enumerate(saved.tensors.items()):
        others = {
            "missing": None,
            "int64": tensor.to(torch.int64),
            "bfloat16": tensor.to(torch.bfloat16),
            "shape": torch.ones(1, dtype=tensor.dtype),
            "nan": torch.full(tensor.shape, math.nan),
        }
        for what in (list(others)[(2 * place + turn) % len(others)] for turn in range(2)):
            other = others[what]
            tensors = {k: v for k, v in saved.tensors.items() if k != name}
            words = damaged(tensors=tensors if other is None else {**tensors, name: other})
            assert words is not None, (name, what)
    for name in ("model/more", "optimizer/more/exp_avg", "optimizer/more"):
        assert damaged(tensors={**saved.tensors, name: torch.zeros(3)}) is not None, name


def test_files_cut_short_nested_or_strange(saved: checkpoint.Checkpoint, damaged: Callable[..., str | None]) -> None:
    path = saved.path
    assert path is not None
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    for length in (0, 7, 8, 9, size // 2, size + 7, size + 8, len(content) - 1):
        path.write_bytes(content[:length])
        assert read(path) is not None, length
    path.write_bytes(content + b"\0")
    assert read(path) is not None
    for deep in ("[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "9" * 5000, "", "\0", "[1"):
        for text in (deep, json.dumps({"__metadata__": {"grokkernels": deep}})):
            path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
            assert read(path) is not None
    path.write_bytes((1 << 63).to_bytes(8, "little") + content[8:])
    assert read(path) is not None
    for about in (None, 7, [], "x", {}):
        with open(path, "wb") as file:
            checkpoint._write(file, saved.tensors, json.dumps(about))
        assert read(path) is not None
    if os.geteuid() != 0:  # root may read anything
        path.chmod(0)
        assert read(path) is not None
        path.chmod(0o644)
