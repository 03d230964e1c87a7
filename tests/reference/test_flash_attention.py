"""flash_attention of the reference against torch's SDPA, and each option against its definition, written with loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from grokkernels.reference.flash_attention import flash_attention, flash_attention_varlen
from grokkernels.reference.merge_attention_states import merge_attention_states


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(t: int, s: int, h: int = 4, hkv: int = 2, d: int = 3, dv: int = 5, b: int = 2) -> tuple[torch.Tensor, ...]:
    return draw(b, t, h, d), draw(b, s, hkv, d, seed=1), draw(b, s, hkv, dv, seed=2)


def by_loops(q, k, v, *, causal=False, scale=None, softcap=0.0, window=(-1, -1), sinks=None, alibi_slopes=None,
             temperature_len=0, q_start=None):  # fmt: skip
    """(o, lse), one score at a time."""
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    o = torch.zeros(batch, queries, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b in range(batch):
        start = keys - queries if q_start is None else int(torch.as_tensor(q_start).expand(batch)[b])
        for h in range(heads):
            kv = h // (heads // k.shape[2])
            for t in range(queries):
                i, scores = t + start, {}
                for j in range(keys):
                    beyond = (window[0] >= 0 and j < i - window[0]) or (window[1] >= 0 and j > i + window[1])
                    if beyond or (causal and j > i):
                        continue
                    s = (scale or dim**-0.5) * (q[b, t, h] @ k[b, j, kv]).item()
                    s = softcap * math.tanh(s / softcap) if softcap else s
                    s = s * math.log2(i) / math.log2(temperature_len) if temperature_len and i > temperature_len else s
                    if alibi_slopes is not None:
                        s -= (alibi_slopes[b, h] if alibi_slopes.dim() == 2 else alibi_slopes[h]).item() * abs(i - j)
                    scores[j] = s
                total = sum(math.exp(s) for s in scores.values())
                total += math.exp(sinks[h].item()) if sinks is not None else 0
                if total:
                    lse[b, h, t] = math.log(total)
                for j, s in scores.items():
                    o[b, t, h] += math.exp(s) / total * v[b, j, kv]
    return o, lse


@pytest.mark.parametrize("causal", [False, True])
def test_equals_sdpa(causal: bool) -> None:
    q, k, v = qkv(7, 7)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(flash_attention(q, k, v, causal=causal, scale=0.3), expected.transpose(1, 2))


OPTIONS = {
    "causal": {"causal": True},
    "softcap": {"softcap": 0.7},
    "window": {"window": (2, 1)},
    "left window, causal": {"window": (1, -1), "causal": True},
    "one key": {"window": (0, 0)},
    "sinks": {"sinks": draw(4, seed=5), "causal": True},
    "alibi": {"alibi_slopes": draw(4, seed=6).abs()},
    "alibi per batch": {"alibi_slopes": draw(2, 4, seed=6).abs(), "causal": True},
    "temperature": {"temperature_len": 2, "softcap": 1.5},
    "q_start": {"q_start": 1, "causal": True},
    "q_start per batch": {"q_start": torch.tensor([3, 0]), "causal": True, "temperature_len": 2},
    "all": {
        "causal": True,
        "softcap": 0.9,
        "window": (3, 2),
        "sinks": draw(4, seed=5),
        "alibi_slopes": draw(4, seed=6).abs(),
        "temperature_len": 3,
        "scale": 0.8,
    },
}


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, shape: tuple[int, int]) -> None:
    q, k, v = qkv(*shape)
    expected = by_loops(q, k, v, **OPTIONS[name])
    torch.testing.assert_close(flash_attention(q, k, v, return_lse=True, **OPTIONS[name]), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name: str) -> None:
    options = {**OPTIONS[name]}
    inputs = [x.requires_grad_() for x in qkv(3, 2, h=4, hkv=2, d=2, dv=1)]  # causal: one row sees no key
    if "sinks" in options:
        inputs.append(options.pop("sinks").detach().clone().requires_grad_())

    def attend(q, k, v, sinks=None):
        o, lse = flash_attention(q, k, v, sinks=sinks, return_lse=True, **options)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(attend, inputs)


def test_dead_rows() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(5, 2))
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert (o[:, :3] == 0).all()
    assert (lse[:, :, :3] == -torch.inf).all()
    o.sum().backward()
    assert (q.grad[:, :3] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    sinks = draw(4)
    o, lse = flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert (o[:, :3] == 0).all()
    torch.testing.assert_close(lse[:, :, 0], sinks.expand(2, 4))


def test_unseen_keys_are_not_read() -> None:
    q, k, v = qkv(2, 6)
    clean = flash_attention(q, k[:, :4], v[:, :4], causal=True, q_start=2)
    dirty = [x.clone() for x in (k, v)]
    for x in dirty:
        x[:, 4:] = torch.nan
    q, k, v = (x.requires_grad_() for x in (q, *dirty))
    o = flash_attention(q, k, v, causal=True, q_start=2)
    torch.testing.assert_close(o, clean)
    o.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(*shape))
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert o.shape == (2, shape[0], 4, 5)
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    o.sum().backward()
    assert q.grad.shape == q.shape


def test_no_dropout_and_no_pages() -> None:
    q, k, v = qkv(2, 2)
    with pytest.raises(ValueError, match=r"dropout_p must be 0 .* got 0.1"):
        flash_attention(q, k, v, dropout_p=0.1)
    cu = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="block_table must be None"):
        flash_attention_varlen(q[0], k[0], v[0], cu, cu, 2, 2, block_table=cu)


def test_varlen() -> None:
    q, k, v = (x[0] for x in qkv(10, 12))
    cu_q, cu_k = torch.tensor([0, 3, 3, 9], dtype=torch.int32), torch.tensor([0, 5, 7, 11], dtype=torch.int32)
    slopes, start = draw(3, 4, seed=7).abs(), torch.tensor([2, 0, 1])
    for options in ({}, {"alibi_slopes": slopes, "q_start": start}, {"sinks": draw(4), "window": (1, -1)}):
        o, lse = flash_attention_varlen(q, k, v, cu_q, cu_k, 6, 5, causal=True, return_lse=True, **options)
        for b in range(3):
            rows, cols = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            own = {n: x[b : b + 1] if n in ("alibi_slopes", "q_start") else x for n, x in options.items()}
            expected = by_loops(q[None, rows], k[None, cols], v[None, cols], causal=True, **own)
            torch.testing.assert_close((o[None, rows], lse[None, :, rows]), expected)
        assert (o[9:] == 0).all()
        assert (lse[:, 9:] == -torch.inf).all()


def test_merge() -> None:
    q, k, v = qkv(4, 7)
    whole = flash_attention(q, k, v, causal=True, return_lse=True)
    first = flash_attention(q, k[:, :5], v[:, :5], causal=True, q_start=3, return_lse=True)
    i, j = torch.arange(4) + 3, torch.arange(5, 7)  # the second part sees keys 5 and 6: two queries see none of them
    scores = torch.einsum("bthd,bshd->bhts", q, k[:, 5:].repeat_interleave(2, 2)) * 3**-0.5
    scores = scores.masked_fill(j > i[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    second = torch.einsum("bhts,bshd->bthd", p, v[:, 5:].repeat_interleave(2, 2)), lse
    torch.testing.assert_close(merge_attention_states(*first, *second), whole)
    torch.testing.assert_close(merge_attention_states(*second, *first), whole)


def test_merge_gradient_and_dead_rows() -> None:
    o1, o2, lse1, lse2 = draw(1, 3, 2, 2), draw(1, 3, 2, 2, seed=1), draw(1, 2, 3, seed=2), draw(1, 2, 3, seed=3)
    lse1[..., 0] = lse2[..., 0] = -torch.inf
    lse1[..., 1] = -torch.inf
    inputs = [x.requires_grad_() for x in (o1, lse1, o2, lse2)]
    o, lse = merge_attention_states(*inputs)
    assert (o[:, 0] == 0).all()
    assert (lse[..., 0] == -torch.inf).all()
    torch.testing.assert_close(o[:, 1], o2[:, 1])
    (o.square().sum() + lse[..., 1:].sum()).backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    alive = [draw(1, 3, 2, 2), draw(1, 2, 3), draw(1, 3, 2, 2, seed=1), draw(1, 2, 3, seed=3)]
    assert torch.autograd.gradcheck(merge_attention_states, [x.requires_grad_() for x in alive])
