"""Which configuration runs: measured once, kept in a file, pinned; never measured in the interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grokkernels.triton import tuning
from grokkernels.triton.kernel import executing
from grokkernels.triton.tuning import Config

CONFIGS = (Config({"BLOCK": 32}), Config({"BLOCK": 64}, num_warps=8), Config({"BLOCK": 128}, num_stages=3))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Config]:
    """As if there was a GPU on which the second is fastest; what is returned lists the configurations measured."""
    measured: list[Config] = []

    def bench(launch) -> float:
        launch()
        return {32: 3.0, 64: 1.0, 128: 2.0}[measured[-1].tiles["BLOCK"]]

    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_file", lambda: tmp_path / "cache" / "triton.json")
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    return measured


def test_measured_once_per_key(gpu: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        assert tuning.choose("kernel", (64, "bf16"), CONFIGS, gpu.append) == CONFIGS[1]
    assert gpu == list(CONFIGS)
    tuning.choose("kernel", (128, "bf16"), CONFIGS, gpu.append)
    assert gpu == 2 * list(CONFIGS)
    monkeypatch.setattr(tuning, "_known", {})  # another process
    assert tuning.choose("kernel", (64, "bf16"), CONFIGS, gpu.append) == CONFIGS[1]
    assert len(gpu) == 6


def test_the_file(gpu: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two entries; what is no longer in the list, and a file that is no JSON, is measured again."""
    tuning.choose("kernel", (1,), CONFIGS, gpu.append)
    tuning.choose("other", (), CONFIGS, gpu.append)
    path = tuning._file()
    assert list(json.loads(path.read_text())) == ["kernel(1)", "other()"]
    assert [p.name for p in path.parent.iterdir()] == ["triton.json"]
    monkeypatch.setattr(tuning, "_known", {})
    assert tuning.choose("kernel", (1,), CONFIGS[::2], gpu.append) == CONFIGS[2]
    for content in ("{ half", "[]"):
        path.write_text(content)
        monkeypatch.setattr(tuning, "_known", {})
        assert tuning.choose("kernel", (1,), CONFIGS, gpu.append) == CONFIGS[1]
        assert list(json.loads(path.read_text())) == ["kernel(1)"]


def test_a_folder_that_cannot_be_written(gpu: list[Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "_file", lambda: tmp_path / "file" / "triton.json")
    for _ in range(2):
        assert tuning.choose("kernel", (1,), CONFIGS, gpu.append) == CONFIGS[1]
    assert len(gpu) == 3


def test_pinned(gpu: list[Config]) -> None:
    mine = Config({"BLOCK": 16})
    with tuning.pin("kernel", mine):
        with tuning.pin("kernel", CONFIGS[0]):
            assert tuning.choose("kernel", (1,), CONFIGS, gpu.append) == CONFIGS[0]
        assert tuning.choose("kernel", (1,), CONFIGS, gpu.append) == mine
        assert tuning.choose("other", (1,), CONFIGS, gpu.append) == CONFIGS[1]
    assert tuning.choose("kernel", (1,), CONFIGS, gpu.append) == CONFIGS[1]


def test_nothing_is_measured(gpu: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one configuration, when told so, in the interpreter; whoever compiles instead of running sees them all."""
    assert tuning.choose("kernel", (1,), CONFIGS[:1], gpu.append) == CONFIGS[0]
    monkeypatch.setenv("GROKKERNELS_TUNING", "off")
    assert tuning.choose("kernel", (1,), CONFIGS, gpu.append) == CONFIGS[0]
    monkeypatch.delenv("GROKKERNELS_TUNING")
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    assert tuning.choose("kernel", (1,), CONFIGS, gpu.append) == CONFIGS[0]
    assert gpu == []
    with executing(print):
        assert tuning.choose("kernel", (1,), CONFIGS, gpu.append) == CONFIGS[0]
    assert gpu == list(CONFIGS[1:])


def test_meta() -> None:
    assert CONFIGS[1].meta() == {"BLOCK": 64, "num_warps": 8, "num_stages": 2}
