"""flash_attention_varlen against its case table, on drawn lengths, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import flash_attention_varlen as cases
from grokkernels.testing.fences import Fence
from tests.suite import CaseTableTests


class TestCases(CaseTableTests):
    table = cases.TABLE


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 120)), min_size=3, max_size=5),
    causal=st.booleans(),
    dtype=st.sampled_from(cases.TABLE.dtypes),
    backend=st.sampled_from(["cpu", "emulated"]),
)
def test_drawn_lengths(lengths: list[tuple[int, int]], causal: bool, dtype: torch.dtype, backend: str) -> None:
    queries, keys = zip(*[*lengths, (40, 50)], strict=True)
    case = cases.case(queries, keys, 4, 2, 32, causal=causal)
    verdict = judge.judge(cases.TABLE, case, dtype, backend)
    assert verdict.passed, verdict


@pytest.mark.parametrize("backend", ["cpu", "emulated"])
def test_no_sequence(backend: str) -> None:
    q, k = torch.ones(3, 2, 8, requires_grad=True), torch.ones(2, 2, 8, requires_grad=True)
    none = torch.zeros(1, dtype=torch.int32)
    o, lse = grokkernels.flash_attention_varlen(q, k, k, none, none, 0, 0, return_lse=True, backend=backend)
    assert o.count_nonzero() == 0
    assert torch.all(lse == -torch.inf)
    for gradient in torch.autograd.grad(o.sum(), (q, k)):
        assert gradient.count_nonzero() == 0


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("offsets_q", "offsets_k"),
    [
        (offsets(0, 9, 2000000000), offsets(0, 9, 2000000000)),
        (offsets(-5, 30, 10, 50), offsets(60, 0, 40, -1)),
        (offsets(40, 20, 0), offsets(0, 0, 0)),
        (offsets(-2000000000, 2000000000), offsets(-2000000000, 2000000000)),
    ],
)
def test_device_survives_any_offsets(offsets_q: torch.Tensor, offsets_k: torch.Tensor) -> None:
    """The device cannot refuse offsets: it stays inside the tensors, whose surroundings are poisoned, and comes back.
    The sequences that are well-formed are right."""
    q, k = torch.randn(40, 2, 16), torch.randn(40, 1, 16)
    arguments = {"q": q, "k": k, "v": k.clone()}
    fence = Fence(arguments)
    leaves = [fence.arguments[name].detach().requires_grad_() for name in arguments]
    options = (None, None, None, False, 1.0, 0.0, -1, -1, 0)
    o, *_ = torch.ops.grokkernels.flash_attention_fwd.emulated(*leaves, offsets_q, offsets_k, *options)
    torch.autograd.grad(o.sum(), leaves)
    assert fence.intact()
    if offsets_q[1] == 9:
        whole = [t.detach()[None, :9] for t in leaves]
        expected = grokkernels.flash_attention(*whole, scale=1.0, backend="emulated")
        assert torch.equal(o[:9], expected[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"q": torch.ones(1, 4, 2, 8)}, r"q must have shape \(total_q, H, D\), got \(1, 4, 2, 8\)"),
        ({"cu_seqlens_q": offsets(0, 4).long()}, "cu_seqlens_q must be one of int32"),
        ({"cu_seqlens_q": offsets()}, r"cu_seqlens_q must have shape \(B \+ 1,\), got \(0,\)"),
        ({"cu_seqlens_k": offsets(0, 2, 5)}, r"cu_seqlens_k must have shape \(B \+ 1,\) = \(2\)"),
        ({"cu_seqlens_q": offsets(1, 4)}, "cu_seqlens_q must start at 0, got 1"),
        (
            {"cu_seqlens_q": offsets(0, 4, 2), "cu_seqlens_k": offsets(0, 1, 5)},
            r"cu_seqlens_q must not fall from one entry to the next, got \[0, 4, 2\]",
        ),
        ({"cu_seqlens_k": offsets(0, 6)}, "cu_seqlens_k must end at the 5 rows of its tensor or before, got 6"),
        ({"max_seqlen_q": 3}, "max_seqlen_q must be at least the longest sequence, 4, got 3"),
        ({"block_table": torch.zeros(1, 1, dtype=torch.int32)}, "block_table must be None: paged keys"),
        ({"dropout_p": 0.5}, "dropout_p must be 0"),
        ({"backend": "cuda"}, "flash_attention_varlen cannot run on backend 'cuda'"),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    good = {
        "q": torch.ones(4, 2, 8),
        "k": torch.ones(5, 2, 8),
        "v": torch.ones(5, 2, 8),
        "cu_seqlens_q": offsets(0, 4),
        "cu_seqlens_k": offsets(0, 5),
        "max_seqlen_q": 4,
        "max_seqlen_k": 5,
    }
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.flash_attention_varlen(**{**good, **arguments})


def test_native_function_guards_its_memory() -> None:
    """Offsets that a traced call could not check are refused where they are read."""
    q = torch.ones(4, 2, 8)
    with pytest.raises(RuntimeError, match="cu_seqlens_q must end at 4 rows"):
        torch.ops.grokkernels.flash_attention_fwd.native(
            q, q, q, offsets(0, 9), offsets(0, 4), None, None, None, False, 1.0, 0.0, -1, -1, 0
        )
