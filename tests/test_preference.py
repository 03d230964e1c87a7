"""Which of cuda and triton comes first: predicted until a GPU has measured, for every row that has both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from grokkernels import dispatch, preference

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import preference as tool  # noqa: E402  (of tools/)
from gpu.record import PASSED, WRONG, Row  # noqa: E402


def test_predicted() -> None:
    assert preference.source() == "predicted"
    assert preference.order("rms_norm") == ("cuda", "triton")
    row = dispatch.ROWS["rms_norm"]
    assert row.automatic(torch.device("cuda")) == ("cuda", "triton", "reference")
    assert row.automatic(torch.device("xpu")) == ("triton", "reference")


def rows(**times: tuple[float, float]) -> list[Row]:
    """As the speed phase leaves them: seconds of cuda and triton, by op."""
    return [
        Row("speed", op, column, "Grok-1", PASSED, data={"seconds_ours": seconds})
        for op, both in times.items()
        for column, seconds in zip(("cuda", "triton"), both, strict=True)
    ]


def test_what_is_measured_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if on a GPU on which Triton is faster at one op."""
    table = tool.table(rows(rotary=(1.0, 0.5), rms_norm=(1.0, 2.0)), "Some GPU")
    assert table == {"source": "measured on Some GPU", "triton_first": ["rotary"]}
    monkeypatch.setattr(preference, "PATH", tmp_path / "preference.json")
    preference.PATH.write_text(json.dumps(table), encoding="utf-8")
    monkeypatch.setattr(preference, "_table", preference.read())
    assert preference.source() == "measured on Some GPU"
    assert preference.order("rotary") == ("triton", "cuda")
    assert preference.order("rms_norm") == ("cuda", "triton")


def test_a_column_that_failed_or_was_not_measured_does_not_come_first() -> None:
    found = rows(rotary=(1.0, 0.5), moe_gate=(1.0, 0.5))
    failed = Row("speed", "rotary", "triton", "fine-grained", WRONG)
    alone = Row("speed", "adamw", "triton", "Grok-1", PASSED, data={"seconds_ours": 0.1})
    assert tool.table([*found, failed, alone], "Some GPU")["triton_first"] == ["moe_gate"]


def test_all_that_was_measured_of_an_op_counts() -> None:
    more = [
        Row("speed", "rotary", c, "other", PASSED, data={"seconds_ours": s}) for c, s in (("cuda", 1), ("triton", 3))
    ]
    assert tool.table([*rows(rotary=(1.0, 0.5)), *more], "Some GPU")["triton_first"] == []
