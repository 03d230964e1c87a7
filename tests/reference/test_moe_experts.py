"""moe_permute, moe_unpermute, grouped_mm and moe_experts of the reference, against loops over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from grokkernels.reference.grouped_mm import grouped_mm
from grokkernels.reference.moe_experts import moe_experts
from grokkernels.reference.moe_gate import Routing, moe_gate
from grokkernels.reference.moe_permute import moe_permute, moe_unpermute


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_permute_by_hand() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0]])
    indices = torch.tensor([[2, 0], [0, -1], [0, 2]], dtype=torch.int32)
    rows, slots, offsets = moe_permute(x, indices, 3)
    assert rows.flatten().tolist() == [1, 2, 3, 1, 3, 0]
    assert slots.tolist() == [[3, 0], [1, -1], [2, 4]]
    assert offsets.tolist() == [3, 3, 5]
    rows, slots, offsets = moe_permute(x, indices, 3, capacity=2)
    assert rows.flatten().tolist() == [1, 2, 1, 3, 0, 0]
    assert slots.tolist() == [[2, 0], [1, -1], [-1, 3]]
    assert offsets.tolist() == [2, 2, 4]
    rows, slots, offsets = moe_permute(x, indices, 2)  # expert 2 lies outside
    assert slots.tolist() == [[-1, 0], [1, -1], [2, -1]]
    assert offsets.tolist() == [3, 3]
    assert slots.dtype == offsets.dtype == torch.int32


def test_permute_and_back() -> None:
    x, weights = draw(5, 3), draw(5, 2, seed=1)
    indices = torch.tensor([[0, 3], [3, 1], [1, 0], [3, -1], [0, 1]])
    for capacity in (None, 2, 0):
        rows, slots, _ = moe_permute(x, indices, 4, capacity=capacity)
        kept = (slots >= 0).double() * weights
        torch.testing.assert_close(moe_unpermute(rows, weights, slots), x * kept.sum(1, keepdim=True))


def test_dropped_rows_are_not_read() -> None:
    x = torch.tensor([[torch.nan], [1.0]], dtype=torch.float64, requires_grad=True)
    weights = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    rows, slots, _ = moe_permute(x, torch.tensor([[-1], [0]]), 1)
    y = moe_unpermute(rows, weights, slots)
    assert y.tolist() == [[0], [1]]
    y.sum().backward()
    assert x.grad.tolist() == [[0], [1]]
    assert weights.grad.tolist() == [[0], [1]]


def test_grouped_mm() -> None:
    x, w = draw(7, 3), draw(4, 3, 2, seed=1)
    offsets = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    expected = torch.cat([x[:2] @ w[0], x[2:5] @ w[2], x[5:6] @ w[3], torch.zeros(1, 2)])
    torch.testing.assert_close(grouped_mm(x, w, offsets), expected)
    strided = w.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(grouped_mm(x, strided, offsets), expected)
    low = [t.bfloat16() for t in (torch.randn(16, 8), torch.randn(2, 8, 8))]
    ends = torch.tensor([8, 16], dtype=torch.int32)
    torch.testing.assert_close(grouped_mm(*low, ends), F.grouped_mm(*low, offs=ends))


def test_grouped_gradients_with_nothing_routed() -> None:
    x, w = draw(2, 3).requires_grad_(), draw(2, 3, 2, seed=1).requires_grad_()
    grouped_mm(x, w, torch.tensor([0, 0])).sum().backward()
    assert (x.grad == 0).all()
    assert (w.grad == 0).all()
    assert grouped_mm(x[:0], w, torch.tensor([0, 0])).shape == (0, 2)


def problem() -> tuple[torch.Tensor, ...]:
    experts, ffn, width = 4, 5, 3
    return draw(2, 3, width), draw(experts, ffn, width, seed=1), draw(experts, ffn, width, seed=2), draw(
        experts, width, ffn, seed=3
    )  # fmt: skip


@pytest.mark.parametrize("capacity_factor", [None, 1.0, 0.5])
def test_experts_token_by_token(capacity_factor: float | None) -> None:
    x, gate, up, down = problem()
    routing = moe_gate(draw(6, 4, seed=4), 2)
    capacity = {None: 12, 1.0: 3, 0.5: 2}[capacity_factor]  # ceil(factor * 12 / 4)
    expected, taken = torch.zeros(6, 3, dtype=torch.float64), [0] * 4
    for n, row in enumerate(x.view(6, 3)):
        for weight, e in zip(routing.weights[n], routing.indices[n].tolist(), strict=True):
            taken[e] += 1
            if taken[e] <= capacity:
                expected[n] += weight * (down[e] @ (F.silu(gate[e] @ row) * (up[e] @ row)))
    y = moe_experts(x, gate, up, down, routing, activation="silu", capacity_factor=capacity_factor)
    torch.testing.assert_close(y, expected.view(2, 3, 3))


def test_gradients() -> None:
    def mixture(logits, *rest):
        return moe_experts(*rest, moe_gate(logits, 2, renormalize=True), capacity_factor=1.0)

    assert torch.autograd.gradcheck(mixture, [t.requires_grad_() for t in (draw(6, 4, seed=4), *problem())])


def test_no_tokens() -> None:
    x, *weights = problem()
    routing = Routing(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int32), *[torch.zeros(())] * 3)
    assert moe_experts(x[:, :0], *weights, routing).shape == (2, 0, 3)
    assert moe_experts(x[:, :0], *weights, routing, capacity_factor=1.0).shape == (2, 0, 3)
