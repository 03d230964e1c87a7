"""rotary: rotary position embedding (Su et al. 2021, arXiv:2104.09864), and the tables of its long-context variants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from grokkernels.reference.precision import accumulation_dtype


def rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: int | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turn each pair (a, b) of the first R of D dims to (a cos - b sin, a sin + b cos), with the row of its position.

    q (B, T, H, D), k (B, T, Hkv, D), or packed (total, H, D) with cu_seqlens (B+1,); cos, sin (max_position, R/2).
    Pairs are (i, i + R/2), or (2i, 2i + 1) if interleaved. positions: None (0, 1, ... in each sequence), an offset for
    all (int) or per sequence (B,), or one position per token (B, T) or (total,). In the packed form a tensor of
    `total` elements is one position per token, also when B == total.
    """
    rows = _positions(q, positions, cu_seqlens)
    cos, sin = cos[rows].unsqueeze(-2), sin[rows].unsqueeze(-2)  # (..., T, 1, R/2): the same for every head
    turned_q = _rotate(q, cos, sin, interleaved, inplace)
    return turned_q, None if k is None else _rotate(k, cos, sin, interleaved, inplace)


def _positions(q: torch.Tensor, positions: int | torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The position of each token: (T,), (B, T) or, packed, (total,)."""
    tokens = q.shape[-3]
    index = torch.arange(tokens, device=q.device)
    per_token = isinstance(positions, torch.Tensor) and positions.shape == (q.shape[:2] if q.dim() == 4 else (tokens,))
    if per_token:
        return positions.long()
    offset = 0 if positions is None else positions
    if cu_seqlens is None:
        return index + (offset.long().unsqueeze(-1) if isinstance(offset, torch.Tensor) else offset)
    ends = cu_seqlens[1:].to(q.device, torch.long)
    sequence = torch.searchsorted(ends, index, right=True)  # the first sequence that ends after this token
    start = cu_seqlens.to(q.device, torch.long)[sequence]
    return index - start + (offset.long()[sequence] if isinstance(offset, torch.Tensor) else offset)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inplace: bool) -> torch.Tensor:
    acc = accumulation_dtype(x)
    cos, sin = cos.to(acc), sin.to(acc)
    rotated = 2 * cos.shape[-1]
    head = x[..., :rotated].to(acc)
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    head = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    y = torch.cat((head.to(x.dtype), x[..., rotated:]), dim=-1)
    if not inplace:
        return y
    if x.is_leaf and x.requires_grad and torch.is_grad_enabled():
        x.detach().copy_(y.detach())  # autograd refuses to write to such a leaf; y carries the gradient instead
        return y
    return x.copy_(y)


# What each kind of `scaling` takes besides its name: (required keys, optional keys).
_YARN = ({"factor", "original_max_position_embeddings"}, {"beta_fast", "beta_slow", "truncate", "extrapolation_factor"})
SCALING_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "original": (set(), _YARN[0] | _YARN[1] | {"attention_factor"}),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor", "original_max_position_embeddings"}, set()),
    "yarn": (_YARN[0], _YARN[1] | {"attention_factor", "mscale", "mscale_all_dim"}),
    "yarn_log": (_YARN[0], _YARN[1] | {"attention_factor"}),
    "theta_scale": (_YARN[0], _YARN[1] | {"attention_factor"}),
    "llama3": ({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}, set()),
    "longrope": (
        {"short_factor", "long_factor", "original_max_position_embeddings"},
        {"factor", "attention_factor"},
    ),
}


def rotary_tables(
    dim: int,
    max_position: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (max_position, dim/2) of position * frequency, frequency_i = base^(-2i/dim) changed by `scaling`.

    `scaling` has Hugging Face's rope_scaling keys; its kind stands under rope_type (or type):
    - default, original: unchanged. (Grok-2's "original" may carry the keys of yarn, which then do nothing.)
    - linear: frequencies / factor.
    - dynamic (NTK): base * (factor * n / original - (factor - 1))^(dim / (dim - 2)), n = max(max_position, original).
    - yarn (arXiv:2309.00071): frequencies that turn more than beta_fast (32) times within the original length are kept,
      those that turn less than beta_slow (1) times are divided by factor, between them a linear ramp over the index;
      truncate (True) rounds the ramp's ends outwards to whole indices. cos and sin are multiplied by attention_factor,
      by default m(mscale = 1) / m(mscale_all_dim = 0) with m(c) = 1 + 0.1 c ln(factor). Grok-2's yarn has no such
      magnitude: give attention_factor 1.
    - yarn_log (Grok-2): yarn with the ramp taken between logarithms; theta_scale (Grok-2): base to the power
      ln(factor * original / 2 pi) / ln(original / 2 pi). Their attention_factor is 1 by default.
    - llama3: wavelengths above original/low_freq_factor are divided by factor, those below original/high_freq_factor
      kept, between them interpolated linearly in original/wavelength.
    - longrope (arXiv:2402.13753): frequencies / long_factor[i] if max_position > original, else / short_factor[i];
      attention_factor by default sqrt(1 + ln(factor) / ln(original)), factor by default max_position / original.

    Frequencies are rounded to float32 and phases are a float32 product, as the published models were trained with
    (float64 for dtype float64); cos and sin of these phases are exact before they are rounded to dtype.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim must be a positive even number, got {dim}")
    frequencies, magnitude = _frequencies(dim, max_position, float(base), scaling)
    phase_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    positions = torch.arange(max_position, dtype=phase_dtype)
    phases = torch.outer(positions, frequencies.to(phase_dtype)).double()
    return (phases.cos() * magnitude).to(device, dtype), (phases.sin() * magnitude).to(device, dtype)


def _frequencies(
    dim: int, max_position: int, base: float, scaling: Mapping[str, Any] | None
) -> tuple[torch.Tensor, float]:
    """The dim/2 frequencies in float64, and the factor on cos and sin."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    plain = base**-exponents
    kind, options = _scaling(scaling)
    factor = options.get("factor")
    original = options.get("original_max_position_embeddings")

    if kind in ("default", "original"):
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "dynamic":
        if dim == 2:
            raise ValueError("dim must be above 2 for dynamic scaling, got 2")
        growth = factor * max(max_position, original) / original - (factor - 1)
        return (base * growth ** (dim / (dim - 2))) ** -exponents, 1.0
    if kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        turns = original * plain / (2 * math.pi)  # original / wavelength
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * plain + (1 - keep) * plain / factor, 1.0
    if kind == "longrope":
        return _longrope(plain, max_position, original, options)
    if kind == "theta_scale":
        power = math.log(factor * original / (2 * math.pi)) / math.log(original / (2 * math.pi))
        return (base**power) ** -exponents, options.get("attention_factor", 1.0)

    keep = _yarn_keep(dim, base, original, options)
    if kind == "yarn_log":
        return plain * factor ** (keep - 1), options.get("attention_factor", 1.0)
    magnitude = options.get("attention_factor")
    if magnitude is None:
        magnitude = _yarn_magnitude(factor, options.get("mscale", 1.0))
        magnitude /= _yarn_magnitude(factor, options.get("mscale_all_dim", 0.0))
    return keep * plain + (1 - keep) * plain / factor, magnitude


def _scaling(scaling: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The kind and its options, checked. An option given as None counts as absent."""
    if scaling is None:
        return "default", {}
    options = {key: value for key, value in scaling.items() if value is not None}
    legacy = options.pop("type", "default")
    kind = options.pop("rope_type", legacy)
    if kind not in SCALING_KEYS:
        raise ValueError(f"scaling['rope_type'] must be one of {', '.join(SCALING_KEYS)}, got {kind!r}")
    required, optional = SCALING_KEYS[kind]
    missing, unknown = required - options.keys(), options.keys() - required - optional
    if missing:
        raise ValueError(f"scaling of rope_type {kind!r} needs {', '.join(sorted(missing))}, got {sorted(options)}")
    if unknown:
        allowed = ", ".join(sorted(required | optional)) or "no further keys"
        raise ValueError(f"scaling of rope_type {kind!r} takes {allowed}, got {', '.join(sorted(unknown))}")
    for key in ("factor", "original_max_position_embeddings"):
        if key in options and options[key] <= 0:
            raise ValueError(f"scaling[{key!r}] must be positive, got {options[key]}")
    return kind, options


def _yarn_keep(dim: int, base: float, original: float, options: Mapping[str, Any]) -> torch.Tensor:
    """Per frequency index: 1 where yarn keeps it, 0 where it divides by factor."""

    def index_that_turns(times: float) -> float:  # solve original * base^(-2i/dim) = 2 pi times for i
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = index_that_turns(options.get("beta_fast", 32))
    high = index_that_turns(options.get("beta_slow", 1))
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001  # a step, without a division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return (1 - ramp) * options.get("extrapolation_factor", 1.0)


def _yarn_magnitude(factor: float, coefficient: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def _longrope(
    plain: torch.Tensor, max_position: int, original: float, options: Mapping[str, Any]
) -> tuple[torch.Tensor, float]:
    name = "long_factor" if max_position > original else "short_factor"
    divisors = torch.tensor(options[name], dtype=torch.float64)
    if divisors.shape != plain.shape:
        raise ValueError(f"scaling[{name!r}] must have dim/2 = {plain.numel()} numbers, got {divisors.numel()}")
    magnitude = options.get("attention_factor")
    if magnitude is None:
        factor = options.get("factor", max_position / original)
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return plain / divisors, magnitude
