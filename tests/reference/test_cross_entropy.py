"""cross_entropy and linear_cross_entropy of the reference against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from grokkernels.reference.cross_entropy import cross_entropy
from grokkernels.reference.linear_cross_entropy import linear_cross_entropy

TARGETS = torch.tensor([3, -100, 0, 6])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_torch(reduction: str, label_smoothing: float) -> None:
    logits = draw(4, 7)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    torch.testing.assert_close(
        cross_entropy(logits, TARGETS, **options), F.cross_entropy(logits, TARGETS, ignore_index=-100, **options)
    )
    z = 2 * torch.tanh(0.7 * logits / 2)
    capped = cross_entropy(logits, TARGETS, softcap=2.0, logit_scale=0.7, **options)
    torch.testing.assert_close(capped, F.cross_entropy(z, TARGETS, **options))


def test_z_loss_and_ignore_index() -> None:
    logits, targets = draw(4, 7), torch.tensor([3, 2, 0, 2])
    plain = F.cross_entropy(logits, targets, ignore_index=2, reduction="none")
    extra = 0.3 * logits.logsumexp(-1).square() * (targets != 2)
    options = {"z_loss": 0.3, "ignore_index": 2}
    torch.testing.assert_close(cross_entropy(logits, targets, reduction="none", **options), plain + extra)
    torch.testing.assert_close(cross_entropy(logits, targets, **options), (plain + extra).sum() / 2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients(reduction: str) -> None:
    options = {"softcap": 2.0, "logit_scale": 0.7, "z_loss": 0.1, "label_smoothing": 0.1, "reduction": reduction}
    x, w = draw(4, 3).requires_grad_(), draw(7, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, TARGETS, **options), (draw(4, 7).requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, TARGETS, **options), (x, w))
    torch.testing.assert_close(
        linear_cross_entropy(x, w, TARGETS, **options), cross_entropy(x @ w.T, TARGETS, **options)
    )


def test_ignored_rows_are_not_read() -> None:
    x, w = draw(4, 3), draw(7, 3, seed=1).requires_grad_()
    x[1] = torch.nan
    x.requires_grad_()
    loss = linear_cross_entropy(x, w, TARGETS, softcap=30.0)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_to_count(rows: int) -> None:
    logits = draw(rows, 7).requires_grad_()
    loss = cross_entropy(logits, torch.full((rows,), -100))
    assert loss == 0
    loss.backward()
    assert (logits.grad == 0).all()


def test_masked_vocabulary_and_dtype() -> None:
    logits = draw(2, 7).bfloat16()
    logits[:, 5:] = -torch.inf
    loss = cross_entropy(logits, torch.tensor([0, 4]))
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), torch.tensor([0, 4])))
    assert loss.dtype == torch.float32
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'avg'"):
        cross_entropy(logits, torch.tensor([0, 4]), reduction="avg")
