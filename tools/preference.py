"""Measures the cuda and triton columns against each other on this GPU and writes grokkernels/preference.json.

Each row at a shape of Grok-1, forward and backward, in bfloat16; before it, some small cases under the float64 rule.
Medians of triton.testing.do_bench, which clears the second-level cache before every run. Where Triton's column refuses
or errs, or is not faster, CUDA's comes first. `make gpu` runs it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from triton.testing import do_bench

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grokkernels import dispatch, preference  # noqa: E402
from grokkernels.testing import cases, judge  # noqa: E402
from grokkernels.testing.case import Case, Table  # noqa: E402
from grokkernels.testing.cases import (  # noqa: E402
    adamw,
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

BACKENDS = ("cuda", "triton")
DTYPE = torch.bfloat16
# d 6144, 48/8 heads of 128, 8 experts top-2; the experts' width and the vocabulary a quarter of Grok-1's.
SHAPES: dict[str, Case] = {
    "adamw": adamw.case((6144, 8192), max_norm=1.0),
    "cross_entropy": cross_entropy.case(2048, 131072),
    "dual_rms_norm": dual_rms_norm.case(8192, 6144),
    "flash_attention": flash_attention.case(1, 4096, 4096, 48, 8, 128, causal=True, softcap=30.0),
    "flash_attention_varlen": flash_attention_varlen.case((3000, 1000, 96), (3000, 1000, 96), 48, 8, 128, causal=True),
    "gated_activation": gated_activation.case(8192, 8192),
    "grouped_mm": grouped_mm.case((512,) * 8, 6144, 8192, mt=True),
    "linear_cross_entropy": linear_cross_entropy.case(2048, 6144, 32768),
    "merge_attention_states": merge_attention_states.case(1, 4096, 48, 128),
    "moe_experts": moe_experts.case(2048, 6144, 8192, 8, 2),
    "moe_gate": moe_gate.case(8192, 8, top_k=2),
    "moe_permute": moe_permute.case(8192, 6144, 8, 2),
    "moe_unpermute": moe_unpermute.case(8192, 6144, 8, 2),
    "rms_norm": rms_norm.case(8192, 6144, residual=True),
    "rotary": rotary.case(1, 8192, 48, 128, kv_heads=8, max_position=8192),
}


def step(table: Table, case: Case, backend: str) -> Callable[[], object]:
    """One forward and backward pass."""
    arguments = judge.in_dtype(case.arguments(), DTYPE)
    arguments = {key: v.cuda() if isinstance(v, torch.Tensor) else v for key, v in arguments.items()}
    leaves = [arguments[name] for name in table.grad if isinstance(arguments.get(name), torch.Tensor)]
    for leaf in leaves:
        leaf.requires_grad_(True)

    def forward() -> list[torch.Tensor]:
        outputs = judge.tensors_of(table.op(**arguments, backend=backend))
        return [out for out in outputs if out.is_floating_point() and out.requires_grad]

    cotangents = [torch.randn_like(out) for out in forward()]
    if not leaves:
        return lambda: table.op(**arguments, backend=backend)
    return lambda: torch.autograd.grad(forward(), leaves, cotangents, allow_unused=True)


def measured(name: str) -> dict[str, float]:
    """Milliseconds of each backend; infinity for one that refuses or errs too much."""
    table = cases.tables()[name]
    times = {}
    for backend in BACKENDS:
        supported = backend in dispatch.ROWS[table.name].supports
        right = supported and all(judge.judge(table, case, DTYPE, backend).passed for case in table.cases[:3])
        times[backend] = do_bench(step(table, SHAPES[name], backend), return_mode="median") if right else float("inf")
    return times


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("preference: torch finds no NVIDIA GPU or driver here")
    triton_first = []
    for name in SHAPES:
        times = measured(name)
        print(f"{name:<24}" + "".join(f"{backend} {ms:8.3f} ms   " for backend, ms in times.items()), flush=True)
        if times["triton"] < times["cuda"]:
            triton_first.append(cases.tables()[name].name)
    table = {"source": f"measured on {torch.cuda.get_device_name()}", "triton_first": sorted(triton_first)}
    temporary = preference.PATH.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, preference.PATH)


if __name__ == "__main__":
    main()
