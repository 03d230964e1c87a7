"""gated_activation of the reference against torch's activations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from grokkernels.reference.gated_activation import ACTIVATIONS, gated_activation


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_value_and_gradient(kind: str) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    act = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "silu": F.silu, "relu": F.relu}[kind]
    torch.testing.assert_close(gated_activation(gate, up, kind), act(gate) * up)
    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, kind), (gate, up))


def test_rounds_once() -> None:
    gate, up = torch.randn(2, 64).bfloat16()
    exact = F.gelu(gate.float(), approximate="tanh") * up.float()
    assert torch.equal(gated_activation(gate, up), exact.bfloat16())


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind must be one of gelu_tanh, gelu, silu, relu, got 'tanh'"):
        gated_activation(torch.ones(1), torch.ones(1), "tanh")
