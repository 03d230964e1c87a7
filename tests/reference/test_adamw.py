"""adamw_step of the reference against torch.optim.AdamW and clip_grad_norm_."""

from __future__ import annotations

import pytest
import torch

from grokkernels.reference.adamw import adamw_step

OPTIONS = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.05}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_equals_torch(max_norm: float | None, maximize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((3, 2), (5,), (0,), ())]
    ours = [p.clone() for p in theirs]
    first, second = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    optimizer = torch.optim.AdamW(theirs, betas=(0.8, 0.95), maximize=maximize, **OPTIONS)
    for step in range(1, 5):
        grads = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        expected = None if max_norm is None else torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        optimizer.step()
        kept = [g.clone() for g in grads]
        options = {"beta1": 0.8, "beta2": 0.95, "max_norm": max_norm, "maximize": maximize, **OPTIONS}
        norm = adamw_step(ours, grads, first, second, step, **options)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(first, [optimizer.state[p]["exp_avg"] for p in theirs])
        torch.testing.assert_close(second, [optimizer.state[p]["exp_avg_sq"] for p in theirs])
        torch.testing.assert_close(norm, expected) if max_norm is not None else None
        assert (norm is None) == (max_norm is None)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


def test_low_precision_parameters_with_float32_state() -> None:
    p = torch.randn(64).bfloat16()
    g = torch.randn(64).bfloat16()
    wide, state = p.float(), [torch.zeros(64) for _ in range(4)]
    adamw_step([wide], [g.float()], state[:1], state[1:2], 1, **OPTIONS)
    adamw_step([p], [g], state[2:3], state[3:4], 1, **OPTIONS)
    assert torch.equal(p, wide.bfloat16())
    assert torch.equal(state[0], state[2])


def test_nothing_to_do() -> None:
    assert adamw_step([], [], [], [], 1, max_norm=1.0) == 0


def test_part_of_the_gradients_and_a_norm_that_is_not_finite() -> None:
    p, g = torch.ones(3), torch.tensor([1.0, 2.0, 2.0])
    state = [torch.zeros(3) for _ in range(2)]
    adamw_step([p], [g], state[:1], state[1:], 1, max_norm=1.0, norm=torch.tensor(10.0))
    torch.testing.assert_close(state[0], g / 100, rtol=1e-5, atol=0)
    before = [t.clone() for t in (p, *state)]
    assert adamw_step([p], [torch.full((3,), torch.inf)], state[:1], state[1:], 2, max_norm=1.0) == torch.inf
    assert all(torch.equal(a, b) for a, b in zip(before, (p, *state), strict=True))
