"""moe_gate of the reference on cases worked out by hand, and philox against its published known answers."""

from __future__ import annotations

import pytest
import torch

from grokkernels.reference.moe_gate import moe_gate
from grokkernels.reference.philox import philox_4x32, uniform


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_grok_1() -> None:
    logits = draw(5, 8)
    p = logits.softmax(-1)
    routing = moe_gate(logits, 2)
    values, indices = p.topk(2)
    torch.testing.assert_close(routing.weights, values)
    assert torch.equal(routing.indices, indices.int())
    counts = torch.bincount(indices.flatten(), minlength=8)
    assert torch.equal(routing.tokens_per_expert, counts.int())
    torch.testing.assert_close(routing.load_balance_loss, 8 * (counts / 10 * p.mean(0)).sum())
    torch.testing.assert_close(routing.z_loss, logits.logsumexp(-1).square().mean())


def test_options_of_the_weights() -> None:
    logits = draw(5, 8)
    capped = 2 * torch.tanh(logits / 2)
    torch.testing.assert_close(moe_gate(logits, 2, softcap=2.0).weights, capped.softmax(-1).topk(2).values)
    chosen = capped.topk(3).values
    topk_first = moe_gate(logits, 3, softcap=2.0, order="topk_then_softmax", routed_scale=2.5)
    torch.testing.assert_close(topk_first.weights, 2.5 * chosen.softmax(-1))
    # Over all experts and then renormalised is the softmax over the chosen ones.
    renormalized = moe_gate(logits, 3, softcap=2.0, renormalize=True, routed_scale=2.5)
    torch.testing.assert_close(renormalized.weights, topk_first.weights)
    sigmoid = moe_gate(logits, 3, scoring="sigmoid", renormalize=True)
    s = logits.sigmoid()
    torch.testing.assert_close(sigmoid.weights, s.topk(3).values / s.topk(3).values.sum(-1, keepdim=True))
    share = (s / s.sum(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(sigmoid.load_balance_loss, 8 * (sigmoid.tokens_per_expert / 15 * share).sum())


def test_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    bias = torch.tensor([9.0, 0, 0, 0])
    for options, all_weights in (
        ({"scoring": "sigmoid"}, logits.sigmoid()),
        ({}, logits.softmax(-1)),
        ({"order": "topk_then_softmax"}, logits[:, [0, 3]].softmax(-1)[:, [0, 0, 0, 1]]),
    ):
        routing = moe_gate(logits, 2, bias=bias, **options)
        assert routing.indices.tolist() == [[0, 3]]
        torch.testing.assert_close(routing.weights, all_weights[:, [0, 3]])


def test_ties_go_to_the_lower_index() -> None:
    logits = torch.zeros(3, 64)
    logits[1, 40:] = 1
    assert moe_gate(logits, 3).indices.tolist() == [[0, 1, 2], [40, 41, 42], [0, 1, 2]]
    assert moe_gate(logits, 3, num_groups=8, topk_groups=2).indices.tolist() == [[0, 1, 2], [40, 41, 42], [0, 1, 2]]


def test_groups() -> None:
    s = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.2, 0.7]], dtype=torch.float64)  # groups of 2: sums 1.0, 1.1, 0.9
    one = {"scoring": "sigmoid", "num_groups": 3, "topk_groups": 1}
    assert moe_gate(s.logit(), 2, **one).indices.tolist() == [[0, 1]]  # no bias: the group with the best expert
    assert moe_gate(s.logit(), 2, bias=torch.zeros(6), **one).indices.tolist() == [[2, 3]]  # bias: the best pair
    two = {**one, "topk_groups": 2}
    assert moe_gate(s.logit(), 2, **two).indices.tolist() == [[0, 5]]
    assert moe_gate(s.logit(), 3, bias=torch.zeros(6), **two).indices.tolist() == [[0, 2, 3]]
    # A negative score inside a chosen group still goes before any expert outside it.
    assert moe_gate(s.logit(), 2, bias=torch.full((6,), -5.0), **one).indices.tolist() == [[2, 3]]


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("order", ["softmax_then_topk", "topk_then_softmax"])
def test_rows_that_route_nowhere(softcap: float, order: str) -> None:
    logits = draw(4, 6)
    good = moe_gate(logits[::2], 2, softcap=softcap, order=order)
    logits[1, 3] = torch.nan
    logits[3] = torch.nan
    logits.requires_grad_()
    routing = moe_gate(logits, 2, softcap=softcap, order=order, renormalize=True)
    assert routing.indices[1::2].tolist() == [[-1, -1]] * 2
    assert (routing.weights[1::2] == 0).all()
    torch.testing.assert_close(routing[2:], good[2:])
    (routing.weights.square().sum() + routing.load_balance_loss + routing.z_loss).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1::2] == 0).all()
    nothing = moe_gate(torch.full((2, 6), torch.nan), 2)
    assert nothing.load_balance_loss == 0
    assert nothing.z_loss == 0


def test_no_tokens_and_shapes() -> None:
    routing = moe_gate(torch.zeros(0, 4), 2)
    assert routing.weights.shape == routing.indices.shape == (0, 2)
    assert routing.tokens_per_expert.tolist() == [0] * 4
    assert routing.load_balance_loss == routing.z_loss == 0
    assert moe_gate(torch.zeros(2, 3, 4), 2).indices.shape == (6, 2)
    low = moe_gate(torch.zeros(2, 4, dtype=torch.bfloat16), 2)
    assert low.weights.dtype == low.z_loss.dtype == torch.float32
    assert low.indices.dtype == low.tokens_per_expert.dtype == torch.int32


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scoring": "sigmoid", "renormalize": True, "bias": draw(6, seed=9), "num_groups": 3, "topk_groups": 2},
        {"order": "topk_then_softmax", "softcap": 1.5, "routed_scale": 2.0},
        {"jitter": 0.1, "seed": 3, "renormalize": True},
    ],
)
def test_gradients(options: dict) -> None:
    def differentiable(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing = moe_gate(logits, 2, **options)
        return routing.weights, routing.load_balance_loss, routing.z_loss

    assert torch.autograd.gradcheck(differentiable, (draw(4, 6).requires_grad_(),))


def test_jitter() -> None:
    logits = draw(3, 4).float()
    noise = uniform(torch.arange(12).view(3, 4), 2**40 + 7)
    jittered = moe_gate(logits, 2, jitter=0.25, seed=2**40 + 7)
    torch.testing.assert_close(jittered[:4], moe_gate(logits * (0.75 + 0.5 * noise), 2)[:4])
    with pytest.raises(ValueError, match="seed must be an int when jitter is not 0, got None"):
        moe_gate(logits, 2, jitter=0.25)


def test_bad_names() -> None:
    for options in ({"scoring": "tanh"}, {"order": "topk"}, {"scoring": "sigmoid", "order": "topk_then_softmax"}):
        with pytest.raises(ValueError, match="got"):
            moe_gate(torch.zeros(1, 4), 2, **options)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),  # the known answers that come with Random123
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    assert tuple(int(w) for w in philox_4x32(tuple(torch.tensor(c) for c in counter), key)) == expected


def test_uniform() -> None:
    u = uniform(torch.arange(10000), 1, torch.float64)
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert torch.equal(uniform(torch.arange(100, 200), 1, torch.float64), u[100:200])
