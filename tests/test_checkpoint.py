"""Checkpoints: what is written comes back, what is damaged says so, and a kill at any moment loses nothing saved."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grokkernels.training import checkpoint
from grokkernels.training.errors import UserError
from grokkernels.training.files import is_temporary, open_replacing, remove_temporaries

ABOUT = {"config": {"d_model": 8}, "settings": {}, "optimizer": {}, "tokenizer": "bytes", "data": "", "elapsed": 0.5}


def tensors_of(step: int, elements: int = 16) -> dict[str, torch.Tensor]:
    """Content that names its step in every element."""
    return {
        "model/w": torch.arange(elements, dtype=torch.float32) + step,
        "optimizer/w/exp_avg": torch.full((elements,), float(step)),
    }


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    tensors = {
        "f64": torch.randn(3, dtype=torch.float64),
        "f32": torch.randn(2, 3).t(),
        "bf16": torch.randn(5).bfloat16(),
        "f16": torch.randn(1).half(),
        "i64": torch.tensor(7),
        "i32": torch.arange(4, dtype=torch.int32),
        "u8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "nan": torch.tensor([float("nan"), float("inf")]),
    }
    path = checkpoint.save(tmp_path, 3, tensors, ABOUT)
    saved = checkpoint.load(path)
    library = load_file(path)
    assert saved.tensors.keys() == tensors.keys() == library.keys()
    for name, tensor in tensors.items():
        for read in (saved.tensors[name], library[name]):
            assert read.dtype == tensor.dtype
            torch.testing.assert_close(read, tensor, rtol=0, atol=0, equal_nan=True)
    assert saved.about["step"] == 3
    assert saved.about["config"] == ABOUT["config"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_part_can_be_read_alone(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, tensors_of(1), ABOUT)
    assert set(checkpoint.load(path, ("model/",)).tensors) == {"model/w"}
    assert set(checkpoint.load(path).part("optimizer")) == {"w/exp_avg"}


def test_keeps_the_newest_by_number(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100_000_000):
        checkpoint.save(tmp_path, step, tensors_of(step), ABOUT, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000010.safetensors",
        "step-100000000.safetensors",
    ]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100000000.safetensors"


def test_saving_again_from_an_earlier_point_drops_later_steps(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors_of(step), ABOUT, keep=5)
    checkpoint.save(tmp_path, 2, tensors_of(2), ABOUT, keep=5)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [checkpoint.file_name(1), checkpoint.file_name(2)]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_says_so(tmp_path: Path, kept: float) -> None:
    path = checkpoint.save(tmp_path, 1, tensors_of(1, 1000), ABOUT)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.load(path)


def test_a_flipped_bit_says_so(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, tensors_of(1), ABOUT)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"checksum of optimizer/w/exp_avg"):
        checkpoint.load(path)


def test_foreign_files_say_so(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a checkpoint of"):
        checkpoint.load(path)
    path.write_text("hello")
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.resolve(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.resolve(tmp_path / "absent")


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with open_replacing(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    names = [".step-00000001.safetensors.tmp-123", ".lock", "step-00000001.safetensors", "notes.tmp-1"]
    for name in names:
        (tmp_path / name).touch()
    assert [p.name for p in remove_temporaries(tmp_path)] == names[:1]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])


ELEMENTS = 1 << 20  # two tensors of 4 MiB


def save_forever(directory: Path, first: int, told: Connection) -> None:
    """The process to be killed: saves step after step, and tells each one that is safe."""
    for step in range(first, first + 1_000_000):
        checkpoint.save(directory, step, tensors_of(step, ELEMENTS), ABOUT, keep=2)
        told.send(step)


@pytest.mark.slow
def test_survives_kill_at_random_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 at 20 moments: the latest checkpoint is complete, and none that was reported as saved is lost."""
    context = multiprocessing.get_context("forkserver")  # forks are fast and carry no threads of this process
    context.set_forkserver_preload(["grokkernels.training.checkpoint", "torch"])
    chance = random.Random(0)
    during_write = 0
    step = 0
    for _ in range(20):
        hear, tell = context.Pipe(duplex=False)
        child = context.Process(target=save_forever, args=(tmp_path, step + 1, tell))
        child.start()
        tell.close()
        assert hear.poll(60)
        told = hear.recv()
        began = time.perf_counter()
        told = hear.recv()
        time.sleep(chance.uniform(0.0, 2.0) * (time.perf_counter() - began))
        child.kill()
        child.join()
        try:
            while hear.poll():
                told = hear.recv()
        except EOFError:
            pass
        hear.close()
        during_write += any(is_temporary(path) for path in tmp_path.iterdir())

        path = checkpoint.latest(tmp_path)
        assert path is not None
        saved = checkpoint.load(path)
        step = saved.about["step"]
        assert step >= told
        assert path.name == checkpoint.file_name(step)
        for name, tensor in tensors_of(step, ELEMENTS).items():
            assert torch.equal(saved.tensors[name], tensor)
        # The one before, if kept, is complete too.
        for other in tmp_path.glob("step-*.safetensors"):
            checkpoint.load(other)
    with capsys.disabled():
        print(f"[{during_write} of 20 kills came during a write]", end=" ")
    assert during_write >= 1, "no kill came during a write, so this showed nothing"
    checkpoint.save(tmp_path, step + 1, tensors_of(step + 1), ABOUT)
    assert not any(is_temporary(path) for path in tmp_path.iterdir())
