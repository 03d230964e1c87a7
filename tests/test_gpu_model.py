"""The time model against the figures it claims to be held to, and against arithmetic done by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import gpu_formulas as formulas  # noqa: E402
import gpu_model  # noqa: E402

A100, H100, H200, B200 = (formulas.DEVICES[name] for name in ("A100", "H100", "H200", "B200"))
ANCHORS = gpu_model.anchors()


def ratios(source: str, *words: str) -> list[float]:
    found = [
        one.predicted / one.published
        for one in ANCHORS
        if one.source.startswith(source) and all(word in one.label for word in words)
    ]
    assert found
    return found


@pytest.mark.parametrize(("dim", "predicted", "published"), [(64, 495, 497), (128, 659, 648), (256, 791, 756)])
def test_attention_on_long_sequences(dim: int, predicted: float, published: float) -> None:
    rate = formulas.series_form(H100, dim) / 1e12
    assert rate == pytest.approx(predicted, abs=1)
    assert rate == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(
    ("source", "words", "error"),
    [
        ("FlashAttention-3", ("D64 causal",), 0.04),
        ("FlashAttention-3", ("D128 causal",), 0.14),
        ("FlashAttention-3", ("D128 full", "backward"), 0.03),
        ("FlashAttention-2", (), 0.06),
        ("FlashAttention-3", ("decode",), 0.01),
        ("TensorRT-LLM", (), 0.06),
        ("QuACK", (), 0.05),
    ],
)
def test_published_figures(source: str, words: tuple[str, ...], error: float) -> None:
    assert all(abs(ratio - 1) <= error for ratio in ratios(source, *words))


def test_known_misses_are_as_the_docs_say() -> None:
    full = [ratio for ratio in ratios("FlashAttention-3", "D128 full") if ratio < 1]
    assert min(full) == pytest.approx(0.91, abs=0.01)
    wide = ratios("FlashAttention-3", "D256 causal")
    assert (max(wide), min(wide)) == (pytest.approx(1.47, abs=0.01), pytest.approx(1.17, abs=0.01))


def test_causal_attention_computes_whole_tiles() -> None:
    assert formulas.attention_pairs(256, (128, 128), True) == 3 * 128 * 128
    assert formulas.attention_pairs(256, (128, 128), False) == 4 * 128 * 128
    assert formulas.attention_pairs(130, (128, 128), True) == (1 + 2) * 128 * 128
    assert formulas.attention_pairs(200, (128, 176), False) == 2 * 128 * 2 * 176


def test_a_wide_product_is_bound_by_the_tensor_cores_and_a_narrow_one_by_memory() -> None:
    wide = formulas.grouped_mm(16384, 6144, 16384, 8, "wgmma")
    assert wide.flops == 2 * 16384 * 6144 * 16384
    assert wide.seconds(H100) == pytest.approx(wide.flops / (0.8 * 989e12) + 3e-6)
    narrow = formulas.grouped_mm(8, 6144, 16384, 8, "wgmma")
    assert narrow.seconds(H100) == pytest.approx(narrow.bytes / (0.85 * 3.35e12) + 3e-6)


def test_mma_sync_is_half_of_hopper_and_all_of_ampere() -> None:
    work = {path: formulas.grouped_mm(65536, 8192, 8192, 1, path) for path in ("wgmma", "mma.sync")}
    assert work["mma.sync"].seconds(H100) == pytest.approx(2 * work["wgmma"].seconds(H100), rel=0.01)
    assert work["mma.sync"].seconds(A100) == work["wgmma"].seconds(A100)
    assert work["mma.sync"].share(B200) == pytest.approx(0.8 * 561 / 2250, rel=0.01)


def test_few_tokens_read_the_experts_they_choose() -> None:
    one = formulas.moe_experts(1, 6144, 16384, 8, 2, "wgmma")
    assert one.bytes == pytest.approx(2 * 3 * 6144 * 16384 * 2, rel=0.001)
    many = formulas.moe_experts(4096, 6144, 16384, 8, 2, "wgmma")
    weights = 8 * 3 * 6144 * 16384 * 2
    activations = 2 * 8192 * (2 * 6144 + 2 * 16384)
    assert many.bytes == pytest.approx(weights + activations)


def test_the_path_is_read_from_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "CUDA", tmp_path)
    assert formulas.path_of("flash_attention") == "mma.sync"
    (tmp_path / "flash_attention").mkdir()
    (tmp_path / "flash_attention" / "forward_sm90.cu").touch()
    (tmp_path / "grouped_mm_sm90.cu").touch()
    assert formulas.path_of("flash_attention") == "wgmma"
    assert formulas.path_of("grouped_mm") == "wgmma"
    assert formulas.path_of("moe_experts") == "mma.sync"


def test_predicted_ops_are_ops() -> None:
    assert {work.op for work in formulas.works()} <= {path.stem for path in (ROOT / "csrc").glob("*.h")}


def test_no_prediction_beats_the_hardware() -> None:
    for work in formulas.works():
        for device in formulas.DEVICES.values():
            seconds = work.seconds(device)
            assert work.share(device) < 1
            # Attention reads less than its tiles ask for; everything else moves its bytes at least once.
            assert seconds > work.bytes / device.hbm
            assert seconds > work.exps / formulas.EXP_PER_CLOCK / device.sms / device.hz


def test_every_printed_figure_is_marked_as_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_model.main(["--device", "H100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PREDICTED (~)")
    row = next(line for line in lines if line.startswith("adamw"))
    assert row.split()[-5:] == ["~9.29", "ms", "~3.01", "TB/s", "~90%"]
    assert sum("FlashAttention-3, H100" in line for line in lines) == 3 + 4 * 6 + 2 + 1
