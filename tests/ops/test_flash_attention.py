"""flash_attention: its case table, drawn shapes and options, what must repeat bit for bit, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import native
from grokkernels.testing import judge
from grokkernels.testing.case import Case
from grokkernels.testing.cases import flash_attention as cases
from tests.suite import Backend, CaseTableTests, cpu_backends

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.just(True),
        "softcap": st.sampled_from([3.0, 30.0]),
        "window": st.tuples(st.integers(-1, 70), st.integers(-1, 70)),
        "alibi": st.just(True),
        "temperature_len": st.integers(2, 40),
        "q_start": st.integers(-20, 150),
    },
)


class TestCases(CaseTableTests):
    table = cases.TABLE


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    backend=st.sampled_from(["cpu", "emulated"]),
    batch=st.integers(1, 2),
    queries=st.integers(10, 130),
    keys=st.integers(10, 210),
    kv_heads=st.integers(2, 3),
    group=st.integers(1, 5),
    dim=st.integers(8, 90),
    value_dim=st.integers(8, 90),
    options=OPTIONS,
    dtype=st.sampled_from(cases.TABLE.dtypes),
)
def test_drawn(
    backend: str,
    batch: int,
    queries: int,
    keys: int,
    kv_heads: int,
    group: int,
    dim: int,
    value_dim: int,
    options: dict,
    dtype: torch.dtype,
) -> None:
    case = cases.case(batch, queries, keys, kv_heads * group, kv_heads, dim, value_dim=value_dim, **options)
    verdict = judge.judge(cases.TABLE, case, dtype, backend)
    assert verdict.passed, verdict


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str = "cpu", **options: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """o and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = grokkernels.flash_attention(*leaves, backend=backend, **options)
    return (o.detach(), *torch.autograd.grad(o, leaves, torch.ones_like(o).cumsum(0)))


def drawn(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = ((batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("sizes", [(3, 210, 300, 4, 2, 64), (3, 1, 2100, 4, 2, 64)], ids=["prefill", "decode"])
def test_sequences_do_not_see_each_other(sizes: tuple[int, ...]) -> None:
    """Bitwise, forward and backward: alone or in a batch; packed or not; with one thread or two."""
    q, k, v = drawn(*sizes)
    whole = gradients(q, k, v, causal=True)
    torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(whole, gradients(q, k, v, causal=True), strict=True))
    torch.set_num_threads(2)
    for b in range(sizes[0]):
        alone = grokkernels.flash_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True, backend="cpu")
        assert torch.equal(alone[0], whole[0][b])
    offsets = [torch.arange(sizes[0] + 1, dtype=torch.int32) * n for n in sizes[1:3]]
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    o = grokkernels.flash_attention_varlen(*packed, *offsets, sizes[1], sizes[2], causal=True, backend="cpu")
    assert torch.equal(o, whole[0].flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (150, 7)}], ids=str)
def test_threads_do_not_show(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Rows are cut so that all threads have work: the same bits however many there are."""
    tensors = [t.to(dtype) for t in drawn(1, 900, 900, 6, 2, 64)]
    results = []
    for threads in (2, 1, 5, 40):
        torch.set_num_threads(threads)
        results.append(grokkernels.flash_attention(*tensors, backend="cpu", **options))
    torch.set_num_threads(2)
    assert all(torch.equal(result, results[0]) for result in results)


# Softmaxes that are almost all on one key, of which p * (dp - delta) leaves little, and few rows with all that they may
# have.
PEAKED = [
    cases.case(1, 1, 64, 1, 1, 64, scale=1.0, why="one query"),
    cases.case(1, 3, 64, 1, 1, 256, scale=1.0, why="few queries"),
    cases.case(1, 3, 300, 2, 1, 64, scale=1.0, why="few queries, several blocks of keys"),
    cases.case(2, 4, 300, 16, 8, 64, window=(130, 0), softcap=9.0, alibi=True, sinks=True, why="few, all options"),
    cases.case(1, 40, 64, 1, 1, 64, scale=1.0, why="one block of keys"),
]


@pytest.mark.parametrize("dtype", cases.TABLE.dtypes)
@pytest.mark.parametrize("case", PEAKED, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", cpu_backends(), ids=str)
def test_peaked_softmax(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """p of a row sums to one in the backward pass too, and delta is the sum of p * dp."""
    with backend.active() as name:
        verdict = judge.judge(cases.TABLE, case, dtype, name)
    assert verdict.passed, verdict


def test_gradients_repeat() -> None:
    """Threads add to dq in turns: the same bits on every run."""
    q, k, v = drawn(1, 500, 500, 4, 2, 32)
    first = gradients(q, k, v)
    for _ in range(5):
        assert all(torch.equal(one, two) for one, two in zip(first, gradients(q, k, v), strict=True))


def on_device(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> tuple[torch.Tensor, ...]:
    """o, lse and the gradients of q, k, v and the sinks, where there are any, from the emulated device."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    if "sinks" in options:
        leaves.append(options["sinks"].detach().requires_grad_())
        options["sinks"] = leaves[-1]
    o, lse = grokkernels.flash_attention(*leaves[:3], return_lse=True, backend="emulated", **options)
    cotangents = [torch.ones_like(x).cumsum(0) for x in (o, lse)]
    return (o.detach(), lse.detach(), *torch.autograd.grad((o, lse), leaves, cotangents))


DEVICE_CASES = {
    "causal group": ((1, 50, 70, 4, 2, 40), {"causal": True}),
    "rows without keys": ((1, 200, 20, 1, 1, 16), {"causal": True}),
    "window": ((2, 40, 150, 2, 2, 64), {"window": (30, 10), "softcap": 5.0}),
    "sinks": ((1, 20, 90, 2, 1, 128), {"sinks": torch.tensor([0.5, -1.0]), "temperature_len": 8, "causal": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DEVICE_CASES)
def test_device_schedules_and_banks(name: str, dtype: torch.dtype) -> None:
    """Threads in any order and copies at any time before their wait: the same bits, and no bank conflict."""
    sizes, options = DEVICE_CASES[name]
    tensors = [t.to(dtype) for t in drawn(*sizes)]
    native.emulated.reset_counters()
    expected = on_device(*tensors, **options)
    assert native.emulated.counters()["bank_conflicts"] == 0
    for seed in (1, 2, 3):
        native.emulated.set_seed(seed)
        try:
            got = on_device(*tensors, **options)
        finally:
            native.emulated.set_seed(0)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_sequences_do_not_see_each_other(dtype: torch.dtype) -> None:
    """Bitwise: alone, in a batch, or packed among others."""
    q, k, v = (t.to(dtype) for t in drawn(3, 70, 90, 4, 2, 64))
    o, lse, *grads = on_device(q, k, v, causal=True)
    for b in range(3):
        alone = on_device(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)
        assert torch.equal(alone[0][0], o[b])
    offsets = [torch.arange(4, dtype=torch.int32) * n for n in (70, 90)]
    leaves = [t.flatten(0, 1).requires_grad_() for t in (q, k, v)]
    packed, packed_lse = grokkernels.flash_attention_varlen(
        *leaves, *offsets, 70, 90, causal=True, return_lse=True, backend="emulated"
    )
    assert torch.equal(packed, o.flatten(0, 1))
    assert torch.equal(packed_lse, lse.transpose(0, 1).flatten(1))
    cotangents = torch.ones_like(o).cumsum(0).flatten(0, 1), torch.ones_like(lse).cumsum(0).transpose(0, 1).flatten(1)
    for one, other in zip(torch.autograd.grad((packed, packed_lse), leaves, cotangents), grads, strict=True):
        assert torch.equal(one, other.flatten(0, 1))


@pytest.mark.parametrize("layout", ["padded_rows", "strided", "transposed", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_layouts(dtype: torch.dtype, layout: str) -> None:
    """Rows that are read where they lie, and rows that must be copied: between them and after them is poison."""
    for dim, value_dim in ((40, 64), (17, 33)):
        case = cases.case(2, 20, 30, 4, 2, dim, value_dim=value_dim, causal=True)
        verdict = judge.judge(cases.TABLE, case, dtype, "emulated", layout=layout)
        assert verdict.passed, verdict


@pytest.mark.parametrize("dim", [16, 17])
def test_device_strides_that_are_nobodys(dim: int) -> None:
    """A dim of one entry has any stride; rows that torch takes for channels of an image are copied densely."""
    q = drawn(2, 5, 5, 2, 2, dim)[0]
    strange = q.as_strided((2, 1, 2, dim), (q.stride(0), 2**40 + 1, dim, 1))
    image = q.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for x in (strange, image):
        got = grokkernels.flash_attention(x, x, x, backend="emulated")
        dense = [x.clone(memory_format=torch.contiguous_format) for _ in range(3)]
        assert torch.equal(got, grokkernels.flash_attention(*dense, backend="emulated"))


@pytest.mark.parametrize("dtype", cases.TABLE.dtypes)
def test_device_tiles(dtype: torch.dtype) -> None:
    """Sizes around the device's tiles: whole ones, one row or key more or less, windows that end in the middle."""
    for case in (
        cases.case(1, 128, 128, 1, 1, 64),
        cases.case(1, 129, 193, 1, 1, 96, causal=True),
        cases.case(1, 65, 257, 2, 1, 128, window=(100, 20), why="whole tiles between masked ones on both sides"),
        cases.case(1, 33, 161, 1, 1, 192, causal=True, softcap=20.0),
        cases.case(1, 64, 130, 1, 1, 256),
    ):
        verdict = judge.judge(cases.TABLE, case, dtype, "emulated")
        assert verdict.passed, f"{case.name}: {verdict}"


def test_slices_of_a_packed_projection_are_not_copied() -> None:
    """q, k and v as slices of one (B, T, 3, H, D) tensor give what dense ones give; the gradient comes back to it."""
    qkv = torch.randn(2, 40, 3, 4, 32, requires_grad=True)
    q, k, v = qkv.unbind(2)
    o = grokkernels.flash_attention(q, k, v, causal=True, backend="cpu")
    dense = grokkernels.flash_attention(*(t.contiguous() for t in (q, k, v)), causal=True, backend="cpu")
    assert torch.equal(o, dense)
    (gradient,) = torch.autograd.grad(o.sum(), qkv)  # sum's gradient has stride 0
    assert torch.equal(gradient, torch.autograd.grad(dense, qkv, torch.ones_like(dense))[0])


def test_unused_lse_and_unused_output() -> None:
    q, k, v = (t.requires_grad_() for t in drawn(1, 20, 30, 2, 2, 16))
    o, lse = grokkernels.flash_attention(q, k, v, return_lse=True, backend="cpu")
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), retain_graph=True)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    _, wide_lse = grokkernels.flash_attention(*wide, return_lse=True, backend="reference")
    expected = torch.autograd.grad(wide_lse.sum(), wide[:2])
    torch.testing.assert_close((dq, dk), tuple(t.float() for t in expected))
    assert dv.count_nonzero() == 0
    assert torch.autograd.grad(o.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_keys_that_no_query_sees_are_not_read(backend: str) -> None:
    q, k, v = drawn(1, 10, 300, 2, 2, 16)
    seen = slice(100 - 5, 110 + 5)
    hidden = [torch.full_like(t, float("nan")) for t in (k, v)]
    for poisoned, whole in zip(hidden, (k, v), strict=True):
        poisoned[:, seen] = whole[:, seen]
    options = {"window": (5, 5), "q_start": 100}
    for one, two in zip(gradients(q, k, v, backend, **options), gradients(q, *hidden, backend, **options), strict=True):
        assert torch.equal(one, two)


def test_memory_stays_linear() -> None:
    """8192 x 8192 scores in float32 would take 256 MiB per head: the tensors allocated stay far below."""
    q, k, v = drawn(1, 8192, 8192, 1, 1, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        grokkernels.flash_attention(q, k, v, causal=True, backend="cpu")
    allocated = sum(max(event.cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 4 * q.numel() * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"q": [1.0]}, "q must be a torch.Tensor, got list"),
        ({"q": torch.ones(4, 2, 8)}, r"q must have shape \(B, T, H, D\), got \(4, 2, 8\)"),
        ({"k": torch.ones(1, 5, 2, 8).bfloat16()}, "k must be one of float32"),
        ({"k": torch.ones(1, 5, 2, 9)}, r"k must have shape \(B, S, Hkv, D\) = \(1, any, any, 8\)"),
        ({"v": torch.ones(1, 4, 2, 8)}, r"v must have shape \(B, S, Hkv, Dv\) = \(1, 5, 2, any\)"),
        ({"q": torch.ones(1, 4, 3, 8)}, "multiple of the heads of k, got H = 3 and Hkv = 2"),
        ({"q": torch.ones(1, 4, 2, 257), "k": torch.ones(1, 5, 2, 257)}, "head dim from 1 to 256, got 257"),
        ({"scale": float("nan")}, "scale must be a finite number or None, got nan"),
        ({"softcap": -1.0}, "softcap must be a finite number >= 0, got -1.0"),
        ({"window": 4}, r"window must be \(left, right\), -1 for no limit, got 4"),
        ({"window": (-2, 0)}, r"window must hold two integers >= -1 \(-1: no limit\), got \(-2, 0\)"),
        ({"temperature_len": 1}, r"temperature_len must be 0 \(none\) or at least 2, got 1"),
        ({"sinks": torch.ones(3)}, r"sinks must have shape \(H,\) = \(2\)"),
        ({"sinks": torch.ones(2).half()}, "sinks must be one of float32"),
        ({"alibi_slopes": torch.ones(2, 2)}, r"alibi_slopes must have shape \(B, H\) = \(1, 2\)"),
        ({"alibi_slopes": torch.ones(2, requires_grad=True)}, "alibi_slopes must not require a gradient"),
        ({"q_start": 1.5}, "q_start must be None, an int or an integer tensor"),
        ({"q_start": torch.ones(2, dtype=torch.int64)}, r"q_start must have shape \(B,\) = \(1\)"),
        ({"dropout_p": 0.1}, "dropout_p must be 0: attention dropout is not implemented, got 0.1"),
        ({"seed": 3}, "seed must be None"),
        ({"backend": "cuda"}, "cannot run on backend 'cuda'"),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    good = {"q": torch.ones(1, 4, 2, 8), "k": torch.ones(1, 5, 2, 8), "v": torch.ones(1, 5, 2, 8)}
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.flash_attention(**{**good, **arguments})
