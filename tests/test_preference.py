"""Which of cuda and triton comes first: predicted until a GPU has measured, for every row that has both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from grokkernels import dispatch, preference
from grokkernels.testing.cases import tables

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import preference as tool  # noqa: E402  (of tools/)


def test_predicted() -> None:
    assert preference.source() == "predicted"
    assert preference.order("rms_norm") == ("cuda", "triton")
    row = dispatch.ROWS["rms_norm"]
    assert row.automatic(torch.device("cuda")) == ("cuda", "triton", "reference")
    assert row.automatic(torch.device("xpu")) == ("triton", "reference")


def test_every_table_has_a_shape() -> None:
    assert tool.SHAPES.keys() == tables().keys()


def test_what_is_measured_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if on a GPU on which Triton is faster at one op."""
    times = {name: {"cuda": 1.0, "triton": 2.0} for name in tool.SHAPES}
    times["rotary"] = {"cuda": 1.0, "triton": 0.5}
    monkeypatch.setattr(tool, "measured", times.__getitem__)
    monkeypatch.setattr(tool.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool.torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(preference, "PATH", tmp_path / "preference.json")
    preference._table.cache_clear()
    tool.main()
    try:
        assert json.loads(preference.PATH.read_text())["triton_first"] == ["rotary"]
        assert preference.source() == "measured on Some GPU"
        assert preference.order("rotary") == ("triton", "cuda")
        assert preference.order("rms_norm") == ("cuda", "triton")
    finally:
        preference._table.cache_clear()


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no NVIDIA GPU or driver here"):
        tool.main()
