"""rms_norm and dual_rms_norm of the reference against torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from grokkernels.reference.dual_rms_norm import dual_rms_norm
from grokkernels.reference.rms_norm import rms_norm

EPS = 1e-5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_equals_torch() -> None:
    x, w = draw(2, 3, 7), draw(7, seed=1)
    torch.testing.assert_close(rms_norm(x, w, EPS), F.rms_norm(x, (7,), w, EPS))
    torch.testing.assert_close(rms_norm(x, w, EPS, zero_centered=True), F.rms_norm(x, (7,), 1 + w, EPS))


def test_residual_is_the_addition_then_the_norm() -> None:
    x, r, w = (draw(4, 8, seed=s).bfloat16() for s in range(3))
    y, h = rms_norm(x, w[0], EPS, residual=r)
    assert torch.equal(h, x + r)
    assert torch.equal(y, rms_norm(h, w[0], EPS))
    assert y.dtype == torch.bfloat16


def test_dual_is_its_chain() -> None:
    x, r, post, pre = draw(4, 8), draw(4, 8, seed=1), draw(8, seed=2), draw(8, seed=3)
    y, h = dual_rms_norm(x, r, post, pre, EPS)
    torch.testing.assert_close(h, r + F.rms_norm(x, (8,), post, EPS))
    torch.testing.assert_close(y, F.rms_norm(h, (8,), pre, EPS))


def test_gradients() -> None:
    x, r, w, w2 = (t.requires_grad_() for t in (draw(3, 5), draw(3, 5, seed=1), draw(5, seed=2), draw(5, seed=3)))
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, EPS, residual=r, zero_centered=True), (x, w, r))
    assert torch.autograd.gradcheck(lambda *a: dual_rms_norm(*a, EPS), (x, r, w, w2))


def test_no_rows() -> None:
    assert rms_norm(torch.zeros(0, 4), torch.ones(4)).shape == (0, 4)
