"""rotary against its case table, on drawn shapes, in place, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import rotary as cases
from tests.suite import CaseTableTests

COS, SIN = grokkernels.rotary_tables(8, 16)


class TestCases(CaseTableTests):
    table = cases.TABLE


@settings(max_examples=40, deadline=None)
@given(
    # Many elements: the largest error over a few, where the reference may by luck be exact, is no measure.
    batch=st.integers(1, 3),
    tokens=st.sampled_from([0, 4, 5, 9]),
    heads=st.integers(3, 5),
    kv_heads=st.one_of(st.none(), st.integers(2, 3)),
    dim=st.integers(12, 150),
    unturned=st.integers(0, 40),
    offset=st.integers(0, 50),
    interleaved=st.booleans(),
    dtype=st.sampled_from(cases.TABLE.dtypes),
)
def test_drawn_shapes(
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int | None,
    dim: int,
    unturned: int,
    offset: int,
    interleaved: bool,
    dtype: torch.dtype,
) -> None:
    rotated = max(dim - unturned, 2) // 2 * 2
    case = cases.case(
        batch,
        tokens,
        heads,
        dim,
        kv_heads=kv_heads,
        rotated=rotated,
        positions=offset,
        interleaved=interleaved,
    )
    verdict = judge.judge(cases.TABLE, case, dtype, "cpu")
    assert verdict.passed, verdict


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton", "reference"])
def test_inplace_writes_into_slices_of_one_tensor(backend: str, interleaved: bool) -> None:
    qkv = torch.randn(2, 5, 4 + 2 + 2, 8)
    before = qkv.clone()
    q, k, v = qkv.split((4, 2, 2), dim=2)
    expected = grokkernels.rotary(q, k, COS, SIN, interleaved=interleaved, backend=backend)
    version = qkv._version
    got = grokkernels.rotary(q, k, COS, SIN, interleaved=interleaved, inplace=True, backend=backend)
    assert got[0] is q
    assert got[1] is k
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    assert torch.equal(v, before[:, :, 6:])
    assert qkv._version > version


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_inplace_with_a_strided_last_dim(backend: str) -> None:
    wide = torch.randn(1, 3, 2, 16)
    expected, _ = grokkernels.rotary(wide[..., ::2], None, COS, SIN, backend=backend)
    odd = wide[..., 1::2].clone()
    grokkernels.rotary(wide[..., ::2], None, COS, SIN, inplace=True, backend=backend)
    assert torch.equal(wide[..., ::2], expected)
    assert torch.equal(wide[..., 1::2], odd)


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton", "reference"])
def test_inplace_under_autograd(backend: str, leaf: bool) -> None:
    x, y = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 8)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    inputs = leaves if leaf else [t * 1 for t in leaves]
    out = grokkernels.rotary(*inputs, COS, SIN, inplace=True, backend=backend)
    plain_leaves = [t.clone().requires_grad_() for t in (x, y)]
    plain = grokkernels.rotary(*plain_leaves, COS, SIN, backend=backend)
    gradients = torch.autograd.grad(sum(t.square().sum() for t in out), leaves)
    expected = torch.autograd.grad(sum(t.square().sum() for t in plain), plain_leaves)
    for o, i, p, g, e in zip(out, inputs, plain, gradients, expected, strict=True):
        assert torch.equal(o, p)
        assert torch.equal(i, p)
        assert torch.equal(g, e)


def test_inplace_compiles() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(qkv: torch.Tensor) -> torch.Tensor:
        q, k = qkv.split(2, dim=2)
        grokkernels.rotary(q, k, COS, SIN, inplace=True, backend="cpu")
        return qkv * 2

    qkv = torch.randn(1, 3, 4, 8)
    expected = torch.cat(grokkernels.rotary(qkv[:, :, :2], qkv[:, :, 2:], COS, SIN, backend="cpu"), dim=2)
    assert torch.equal(step(qkv), expected * 2)
    assert torch.equal(qkv, expected)


def test_opcheck_inplace() -> None:
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 8)
    function = torch.ops.grokkernels.rotary_inplace.native
    torch.library.opcheck(function, (q, k, COS, SIN, None, 2, None, True, False))
    torch.library.opcheck(function, (q, None, COS, SIN, None, 2, None, False, False))


def test_second_derivative() -> None:
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    weight = torch.randn(1, 3, 2, 8, requires_grad=True)
    first = torch.autograd.grad(grokkernels.rotary(q, None, COS, SIN, backend="cpu")[0], q, weight, create_graph=True)
    (second,) = torch.autograd.grad(first[0].square().sum() / 2, weight)
    torch.testing.assert_close(second, weight.detach())  # the rotation is orthogonal


def test_gradient_of_k_alone() -> None:
    q, k = torch.randn(1, 3, 2, 8, requires_grad=True), torch.randn(1, 3, 1, 8, requires_grad=True)
    out = grokkernels.rotary(q, k, COS, SIN, backend="cpu")[1]
    (expected,) = torch.autograd.grad(grokkernels.rotary(k, None, COS, SIN, backend="cpu")[0].sum(), k)
    assert torch.equal(torch.autograd.grad(out.sum(), k)[0], expected)


@pytest.mark.parametrize(
    ("positions", "cu_seqlens"),
    [
        (torch.tensor([[0, 1, 16]]), None),
        (torch.tensor([[0, -1, 2]]), None),
        (torch.tensor([2**62]), None),
        (None, torch.tensor([0, 2])),
        (None, torch.tensor([0, 4, 3])),
        (None, torch.tensor([1, 3])),
    ],
)
def test_the_kernel_itself_stays_inside_the_tables(
    positions: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> None:
    q = torch.ones(1, 3, 2, 8) if cu_seqlens is None else torch.ones(3, 2, 8)
    starts = None if cu_seqlens is None else cu_seqlens.int()
    with pytest.raises(RuntimeError, match=r"outside the 16 rows|must rise from 0 to the 3 tokens"):
        torch.ops.grokkernels.rotary_inplace.native(q, None, COS, SIN, positions, 0, starts, False, False)
    assert torch.equal(q, torch.ones_like(q))


@pytest.mark.parametrize("overload", ["emulated", "triton"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [24, 23])
@pytest.mark.parametrize(
    ("positions", "cu_seqlens", "lost"),
    [
        ([[3, 1, 16, 4], [-1, 15, 0, 2**62]], None, [2, 4, 7]),
        ([14, -2], None, [2, 3, 4, 5]),
        ([2**63 - 1, 0], None, [0, 1, 2, 3]),
        (None, [0, 2], [2, 3, 4, 5, 6, 7]),
        (None, [1, 8], [0]),
        (None, [0, 5, 2, 8], None),
        (None, [0, 2**31 - 1, -(2**31), 8], None),
        (None, [0], list(range(8))),
    ],
)
def test_device_reads_nothing_outside(
    positions: list | None,
    cu_seqlens: list[int] | None,
    lost: list[int] | None,
    dim: int,
    interleaved: bool,
    overload: str,
) -> None:
    """Where no row of the tables belongs to a token, the dims that turn become NaN, the others pass; nothing else is
    touched. (`lost` None: cu_seqlens so wrong that only this much is promised.)"""
    shape = (2, 4, 3, dim) if cu_seqlens is None else (8, 3, dim)
    q = torch.randn(shape)
    fence = torch.full((32, 4), float("nan"))
    cos, sin = (torch.cat((fence, t, fence))[32:48] for t in (COS, SIN))
    arguments = [
        None if positions is None else torch.tensor(positions),
        0,
        None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
        interleaved,
        False,
    ]
    y, _ = getattr(torch.ops.grokkernels.rotary_fwd, overload)(q, None, cos, sin, *arguments)
    inplace = q.clone()
    getattr(torch.ops.grokkernels.rotary_inplace, overload)(inplace, None, cos, sin, *arguments)
    torch.testing.assert_close(inplace, y, rtol=0, atol=0, equal_nan=True)
    y, q = y.view(8, 3, dim), q.view(8, 3, dim)
    assert torch.equal(y[..., 8:], q[..., 8:])
    if lost is not None:
        nan = y[..., :8].isnan()
        assert nan[lost].all()
        assert not nan[[n for n in range(8) if n not in lost]].any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"q": [1.0]}, "q must be a torch.Tensor, got list"),
        ({"q": torch.ones(3, 2, 8)}, r"q must have shape \(B, T, H, D\)"),
        ({"k": torch.ones(2, 3, 1, 6)}, r"k must have shape \(B, T, Hkv, D\) = \(2, 3, any, 8\), got \(2, 3, 1, 6\)"),
        ({"k": torch.ones(2, 3, 1, 8).bfloat16()}, "k must be one of float32"),
        ({"cos": torch.ones(16)}, r"cos must have shape \(max_position, R/2\)"),
        ({"cos": torch.ones(16, 3)}, r"sin must have shape of cos = \(16, 3\), got \(16, 4\)"),
        ({"cos": torch.ones(16, 5), "sin": torch.ones(16, 5)}, "cos must have at most D/2 = 4 columns, got 5"),
        ({"cos": COS.bfloat16(), "sin": SIN.bfloat16(), "backend": "cpu"}, "float32 tables are supported"),
        ({"positions": 14}, r"positions must lie in \[0, 16\), .* from 14 to 16"),
        ({"positions": -1}, r"positions must lie in \[0, 16\), .* from -1 to 1"),
        ({"positions": torch.tensor([0, 14])}, "got positions from 0 to 16"),
        ({"positions": torch.tensor([[0, 1, 2], [3, 4, 99]])}, "got positions from 0 to 99"),
        ({"positions": torch.tensor([1.0, 2.0])}, "positions must be one of int32, int64"),
        ({"positions": torch.tensor([1, 2, 3])}, r"positions must have shape \(B,\) = \(2,\)"),
        ({"positions": "0"}, "positions must be None, an int or an integer tensor, got str"),
        (
            {"q": torch.ones(5, 2, 8), "cu_seqlens": torch.tensor([0, 4])},
            r"cu_seqlens must rise from 0 to the 5 tokens",
        ),
        ({"q": torch.ones(5, 2, 8), "cu_seqlens": torch.tensor([0, 6, 5])}, "cu_seqlens must rise from 0"),
        ({"q": torch.ones(5, 2, 8), "cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens must be one of int32, int64"),
        ({"q": torch.ones(1, 3, 1, 8).expand(2, 3, 2, 8), "inplace": True}, "q must not lie on itself"),
        ({"q": torch.ones(2, 3, 2, 8).double(), "backend": "cpu"}, "q is torch.float64"),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.rotary(**{"q": torch.ones(2, 3, 2, 8), "k": None, "cos": COS, "sin": SIN, **arguments})


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton", "reference"])
def test_inplace_turns_no_element_twice(backend: str) -> None:
    """q and k that have an element in common are refused, and nothing is written; neighbours in one tensor are not."""
    memory = torch.randn(400)
    before = memory.clone()
    q = memory[:96].view(2, 3, 2, 8)
    for k in (q, q[:, :, :1], memory[90:186].view(2, 3, 2, 8)):
        with pytest.raises(ValueError, match="q and k must not"):
            grokkernels.rotary(q, k, COS, SIN, inplace=True, backend=backend)
    windows = memory.as_strided((2, 3, 2, 8), (48, 16, 4, 1))
    with pytest.raises(ValueError, match="q must not lie on itself"):
        grokkernels.rotary(windows, None, COS, SIN, inplace=True, backend=backend)
    with pytest.raises(ValueError, match="q and sin must not share memory"):
        grokkernels.rotary(q, None, COS, memory[60:124].view(16, 4), inplace=True, backend=backend)
    assert torch.equal(memory, before)
    grokkernels.rotary(q, memory[96:192].view(2, 3, 2, 8), COS, SIN, inplace=True, backend=backend)
    assert not torch.equal(memory, before)
