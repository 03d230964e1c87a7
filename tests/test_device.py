"""A run on a device that is not the CPU: everything is made there, and goes there once.

No GPU is needed: on the device "meta" tensors have shapes and a device and no storage, so a whole training step can be
walked through the library's own code, with its shape functions in place of the kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grokkernels import dispatch, doctor
from grokkernels.training import data, device, model, tokenizer
from grokkernels.training.config import Settings
from grokkernels.training.errors import UserError
from grokkernels.training.trainer import Trainer

SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "ffn_dim": 32}
META = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Notes each operation that sees tensors of two devices; one of no dimensions on the CPU counts as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.crossed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        self.operations += 1
        if len({t.device.type for t in tensors if t.dim() or t.device.type != "cpu"}) > 1:
            self.crossed.append(func.name())
        return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_leaves_the_device_for_its_batch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    unusable = dispatch._unusable

    def on_meta(backend: str, place: torch.device) -> str | None:
        return None if (backend, place.type) == ("cuda", "meta") else unusable(backend, place)

    # The automatic choice for meta tensors becomes the CUDA column, whose shape functions then run.
    monkeypatch.setattr(dispatch, "_unusable", on_meta)
    monkeypatch.setitem(dispatch.AUTOMATIC, "meta", ("cuda",))
    monkeypatch.setenv("GROKKERNELS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    overrides = {**SMALL, "num_experts": 4, "top_k": 2}
    given = Settings((str(tmp_path / "text.txt"),), overrides=overrides, context=16, batch=2, steps=3, dtype=dtype)
    words = tokenizer.ByteTokenizer()
    tokens = data.prepare(given.data, words)

    trainer = Trainer(given, model.create(given, words.vocab_size, META), tokens, words, tmp_path)
    drawn_for_meta = torch.get_rng_state()
    with Crossings() as stepping:
        out = trainer.update(1e-3)
        trainer.update(1e-3)
    assert stepping.crossed == ["aten::_to_copy"] * 4  # inputs and targets, twice
    assert stepping.operations > 200
    with Crossings() as reading, torch.no_grad():
        cache = trainer.model.new_cache(2, 8)
        trainer.model(torch.zeros((2, 7), dtype=torch.int64, device=META), cache=cache)
        trainer.model(torch.zeros((2, 1), dtype=torch.int64, device=META), cache=cache)
    assert reading.crossed == []
    held = [*trainer.masters.values(), *trainer.model.parameters(), *trainer.model.buffers(), *out, *cache.keys]
    held += [t for state in trainer.optimizer.state.values() for t in state.values()]
    assert {t.device for t in held} == {META}
    assert len(trainer.optimizer.state) == len(trainer.parameters)

    # The weights are drawn on the CPU whatever the device, and nothing else is.
    model.create(given, words.vocab_size)
    assert torch.equal(torch.get_rng_state(), drawn_for_meta)


def pretend(monkeypatch: pytest.MonkeyPatch, count: int, usable: set[str]) -> list[torch.device]:
    """A machine of `count` CUDA devices and these usable backends; the devices that become the current one."""
    current: list[torch.device] = []
    backends = {name: {"usable": name in usable, "reason": ""} for name in dispatch.BACKENDS}
    monkeypatch.setattr(doctor, "report", lambda: {"backends": backends})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(
    ("name", "backend", "count", "usable", "expected"),
    [
        ("auto", None, 0, {"cpu"}, "cpu"),
        ("auto", None, 1, {"cpu"}, "cpu"),
        ("auto", None, 1, {"cpu", "cuda"}, "cuda:0"),
        ("auto", None, 1, {"cpu", "triton"}, "cuda:0"),
        ("auto", "cpu", 1, {"cpu", "cuda"}, "cpu"),
        ("auto", "triton", 1, {"cpu", "cuda"}, "cpu"),
        ("auto", "reference", 1, set(), "cuda:0"),
        ("cpu", None, 1, {"cuda"}, "cpu"),
        ("cuda", None, 2, {"cuda"}, "cuda:0"),
        ("cuda:1", None, 2, set(), "cuda:1"),
    ],
)
def test_the_device_of_a_name(
    monkeypatch: pytest.MonkeyPatch, name: str, backend: str | None, count: int, usable: set[str], expected: str
) -> None:
    current = pretend(monkeypatch, count, usable)
    found = device.choose(name, backend)
    assert found == torch.device(expected)
    assert current == ([found] if found.type == "cuda" else [])


@pytest.mark.parametrize(
    ("name", "count", "reason"),
    [
        ("cuda", 0, "--device cuda needs a CUDA device and .*: give --device cpu"),
        ("cuda:2", 2, "--device cuda:2 does not exist: this machine has 2, numbered from cuda:0"),
        ("cuda:", 2, "must be auto, cpu, cuda or cuda:N, got 'cuda:'"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str, count: int, reason: str) -> None:
    pretend(monkeypatch, count, {"cuda"})
    with pytest.raises(UserError, match=reason):
        device.choose(name)
