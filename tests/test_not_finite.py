"""Infinities and NaN, and the smallest numbers, one at a time in every floating argument: what is not finite in the
reference is so in a kernel, and in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grokkernels.testing import cases, judge
from grokkernels.testing.case import Arguments, Case
from grokkernels.testing.cases import (
    cross_entropy,
    dual_rms_norm,
    flash_attention,
    flash_attention_varlen,
    gated_activation,
    grouped_mm,
    linear_cross_entropy,
    merge_attention_states,
    moe_experts,
    moe_gate,
    moe_permute,
    moe_unpermute,
    rms_norm,
    rotary,
)
from tests.suite import Backend, backends

# Without adamw, of which a test of its own has what it does with a norm that is not finite.
SMALL = {
    "cross_entropy": [
        cross_entropy.case(5, 40),
        cross_entropy.case(5, 40, softcap=5.0, z_loss=0.1, label_smoothing=0.1),
    ],
    "dual_rms_norm": [dual_rms_norm.case(5, 40)],
    "flash_attention": [
        flash_attention.case(1, 20, 20, 2, 2, 20, causal=True),
        flash_attention.case(1, 2, 20, 2, 1, 20, softcap=4.0, sinks=True),
    ],
    "flash_attention_varlen": [flash_attention_varlen.case((9, 2), (9, 20), 2, 1, 20, causal=True)],
    "gated_activation": [gated_activation.case(5, 40, kind=kind) for kind in ("silu", "gelu", "gelu_tanh", "relu")],
    "grouped_mm": [grouped_mm.case((5, 3), 20, 20)],
    "linear_cross_entropy": [linear_cross_entropy.case(5, 20, 40)],
    "merge_attention_states": [merge_attention_states.case(1, 5, 2, 20)],
    "moe_experts": [moe_experts.case(5, 20, 20, 3, 2)],
    "moe_gate": [
        moe_gate.case(5, 20, top_k=2),
        moe_gate.case(5, 20, top_k=2, scoring="sigmoid"),
        moe_gate.case(5, 20, top_k=2, softcap=3.0),
    ],
    "moe_permute": [moe_permute.case(5, 20, 3, 2)],
    "moe_unpermute": [moe_unpermute.case(5, 20, 3, 2)],
    "rms_norm": [rms_norm.case(5, 40), rms_norm.case(5, 40, residual=True)],
    "rotary": [rotary.case(1, 5, 2, 20)],
}

# Of these the contract says that what is not finite may spread further, or turn into NaN: on a device, and where the
# slope 0 of an activation meets an infinity.
SPREADS = {
    "cpu": {"moe_experts"},
    "emulated": {"flash_attention", "flash_attention_varlen", "grouped_mm", "linear_cross_entropy", "moe_experts"},
}


def _calls(case: Case, dtype: torch.dtype) -> list[Arguments]:
    arguments = judge.in_dtype(case.arguments(), dtype)
    calls = []
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        for special in (-torch.inf, torch.inf, torch.nan, torch.finfo(value.dtype).smallest_normal / 4):
            changed = value.clone()
            changed.view(-1)[7 % value.numel()] = special
            calls.append({**arguments, name: changed})
    return calls


def _kind(x: torch.Tensor) -> torch.Tensor:
    """0 for a finite number, 1 for NaN, 2 and 3 for infinities; integers as they are."""
    return x.isnan() + 2 * (x == torch.inf) + 3 * (x == -torch.inf) if x.is_floating_point() else x


def _results(function: Any, arguments: Arguments, op: str, cotangents: Any = None) -> tuple[list[torch.Tensor], Any]:
    outputs, gradients, cotangents = judge.run(function, arguments, cases.tables()[op].grad, cotangents)
    return [tensor for tensor in (*outputs, *gradients) if tensor is not None], cotangents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, backend) for op in SMALL for backend in backends(cases.tables()[op]) if backend.name in SPREADS],
    ids=str,
)
def test_what_is_not_finite_is_so_in_its_place(op: str, backend: Backend, dtype: torch.dtype) -> None:
    table = cases.tables()[op]
    for case in SMALL[op]:
        for arguments in _calls(case, dtype):
            expected, cotangents = _results(table.reference, arguments, op)
            with backend.active() as name:
                got, _ = _results(lambda **kw: table.op(**kw, backend=name), arguments, op, cotangents)
            for one, other in zip(got, expected, strict=True):
                if op in SPREADS[backend.name]:
                    assert (_kind(one) != 0)[_kind(other) != 0].all() or not other.is_floating_point(), case.name
                else:
                    assert torch.equal(_kind(one), _kind(other)), case.name


def test_every_op_is_asked() -> None:
    assert SMALL.keys() | {"adamw"} == cases.tables().keys()
