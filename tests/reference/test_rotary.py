"""rotary of the reference against complex multiplication, and its tables against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from grokkernels.reference.rotary import rotary, rotary_tables

YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192, "beta_fast": 8, "beta_slow": 1}


def tables(dim: int = 4, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_tables(dim, 32, dtype=torch.float64, **kwargs)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def turned(x: torch.Tensor, positions: torch.Tensor, interleaved: bool, dim: int) -> torch.Tensor:
    """x (..., H, D) times e^(i position frequency), as complex numbers."""
    angle = positions[..., None, None] * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    head = x[..., :dim]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle))
    head = product.flatten(-2) if interleaved else product.transpose(-1, -2).flatten(-2)
    return torch.cat((head, x[..., dim:]), dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [4, 6])
def test_is_a_complex_product(interleaved: bool, dim: int) -> None:
    q, k = draw(2, 5, 3, 6), draw(2, 5, 1, 6)
    per_token = torch.tensor([[0, 3, 1, 4, 1], [5, 9, 2, 6, 31]])
    index = torch.arange(5)
    for given, used in (
        (None, index),
        (7, index + 7),
        (torch.tensor([3, 1]), index + torch.tensor([[3], [1]])),
        (per_token, per_token),
    ):
        out_q, out_k = rotary(q, k, *tables(dim), positions=given, interleaved=interleaved)
        torch.testing.assert_close(out_q, turned(q, used.double(), interleaved, dim))
        torch.testing.assert_close(out_k, turned(k, used.double(), interleaved, dim))


def test_packed() -> None:
    q = draw(6, 2, 4)
    cu_seqlens = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    for given, used in (
        (None, [0, 1, 0, 1, 2, 3]),
        (4, [4, 5, 4, 5, 6, 7]),
        (torch.tensor([9, 20, 1]), [9, 10, 1, 2, 3, 4]),
        (torch.tensor([5, 4, 3, 2, 1, 0]), [5, 4, 3, 2, 1, 0]),
    ):
        out, none = rotary(q, None, *tables(), positions=given, cu_seqlens=cu_seqlens)
        assert none is None
        torch.testing.assert_close(out, turned(q, torch.tensor(used).double(), False, 4))


def test_gradient_and_inplace() -> None:
    q, k = draw(1, 3, 2, 6).requires_grad_(), draw(1, 3, 1, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, *tables(), interleaved=True), (q, k))
    plain = rotary(q, k, *tables())
    expected = torch.autograd.grad(sum(t.square().sum() for t in plain), (q, k))
    for wrap in (lambda t: t, lambda t: t * 1):  # a leaf, and an inner node
        leaves = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
        inputs = [wrap(t) for t in leaves]
        out = rotary(*inputs, *tables(), inplace=True)
        for o, i, p, g, e in zip(
            out, inputs, plain, torch.autograd.grad(sum(t.square().sum() for t in out), leaves), expected, strict=True
        ):
            assert torch.equal(o, p)
            assert torch.equal(i, p)
            torch.testing.assert_close(g, e)


def test_no_tokens() -> None:
    assert rotary(draw(2, 0, 3, 4), None, *tables())[0].shape == (2, 0, 3, 4)
    empty = torch.tensor([0, 0], dtype=torch.int32)
    assert rotary(draw(0, 3, 4), None, *tables(), cu_seqlens=empty)[0].shape == (0, 3, 4)


def frequencies(dim: int, max_position: int = 2, **scaling) -> tuple[torch.Tensor, float]:
    """The frequencies and the magnitude, read off the table: row 0 is (magnitude, 0)."""
    cos, sin = rotary_tables(dim, max_position, base=1e4, scaling=scaling or None, dtype=torch.float64)
    return torch.atan2(sin[1], cos[1]), cos[0, 0].item()


def test_tables_by_hand() -> None:
    plain = torch.tensor([1.0, 1e-1, 1e-2, 1e-3], dtype=torch.float64)  # 10000^(-2i/8)
    dim = 8
    assert_close = torch.testing.assert_close
    for scaling in ({}, {"rope_type": "default"}, {**YARN, "rope_type": "original"}):
        assert_close(frequencies(dim, **scaling), (plain, 1.0))
    assert_close(frequencies(dim, type="linear", factor=4.0), (plain / 4, 1.0))

    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 10}
    assert_close(frequencies(dim, 10, **dynamic)[0], plain)
    base = 1e4 * (2 * 30 / 10 - 1) ** (8 / 6)
    assert_close(frequencies(dim, 30, **dynamic)[0], torch.tensor([base ** (-i / 4) for i in range(4)]).double())

    # Wavelengths 6.28, 62.8, 628, 6283; kept below 100/4 = 25, divided above 100/1 = 100.
    llama3 = {"factor": 8.0, "original_max_position_embeddings": 100, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    smooth = (100 * 0.1 / (2 * math.pi) - 1) / 3
    middle = 0.1 * smooth + 0.1 / 8 * (1 - smooth)
    expected = torch.tensor([1.0, middle, 1e-2 / 8, 1e-3 / 8], dtype=torch.float64)
    assert_close(frequencies(dim, rope_type="llama3", **llama3), (expected, 1.0))

    longrope = {"short_factor": [1, 2, 3, 4], "long_factor": [5, 6, 7, 8], "original_max_position_embeddings": 16}
    short, magnitude = frequencies(dim, 16, rope_type="longrope", factor=4.0, **longrope)
    assert_close(short, plain / torch.tensor([1.0, 2, 3, 4]))
    assert magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
    long, magnitude = frequencies(dim, 64, rope_type="longrope", **longrope)
    assert_close(long, plain / torch.tensor([5.0, 6, 7, 8]))
    assert magnitude == pytest.approx(math.sqrt(1.5))


def test_yarn_by_hand() -> None:
    # Index that turns n times in L = 1000: 8 ln(L / 2 pi n) / (2 ln 1e4): n = 32 gives 0.697, n = 1 gives 2.202.
    yarn = {"rope_type": "yarn", "factor": 10.0, "original_max_position_embeddings": 1000}
    plain = torch.tensor([1.0, 1e-1, 1e-2, 1e-3], dtype=torch.float64)
    ramp = torch.tensor([0, 1, 2, 3]) / 3  # from floor(0.697) to ceil(2.202)
    expected = plain * (1 - ramp) + plain / 10 * ramp
    torch.testing.assert_close(frequencies(8, **yarn), (expected, 0.1 * math.log(10) + 1))
    torch.testing.assert_close(frequencies(8, **yarn, attention_factor=1.0), (expected, 1.0))
    assert frequencies(8, **yarn, mscale=0.707, mscale_all_dim=0.707)[1] == 1.0
    low, high = (8 * math.log(1000 / (2 * math.pi * n)) / (2 * math.log(1e4)) for n in (32, 1))
    ramp = ((torch.arange(4, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(frequencies(8, **yarn, truncate=False)[0], plain * (1 - ramp) + plain / 10 * ramp)
    # Grok-2's further kinds
    ramp = torch.tensor([0, 1, 2, 3], dtype=torch.float64) / 3
    log = frequencies(8, **{**yarn, "rope_type": "yarn_log"})
    torch.testing.assert_close(log, (plain / 10**ramp, 1.0))
    power = math.log(10 * 1000 / (2 * math.pi)) / math.log(1000 / (2 * math.pi))
    torch.testing.assert_close(frequencies(8, **{**yarn, "rope_type": "theta_scale"}), (plain**power, 1.0))


def test_float32_phases_are_float32_products() -> None:
    cos, sin = rotary_tables(8, 100)
    phase = torch.outer(torch.arange(100.0), (1e4 ** -(torch.arange(0, 8, 2).double() / 8)).float())
    assert torch.equal(cos, phase.double().cos().float())
    assert torch.equal(sin, phase.double().sin().float())
    assert cos.shape == (100, 4)
    assert rotary_tables(8, 0)[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "ntk"}, "must be one of .* got 'ntk'"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "takes factor, got rope_theta"),
        ({"rope_type": "linear", "factor": 0.0}, "must be positive, got 0.0"),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0],
                "long_factor": [1.0],
                "original_max_position_embeddings": 9,
            },
            "must have dim/2 = 4 numbers, got 1",
        ),
    ],
)
def test_bad_scaling(scaling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary_tables(8, 16, scaling=scaling)
