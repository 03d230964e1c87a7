"""Predicts what the library's kernels take on GPUs, from bytes, floating-point operations and exponentials.

    python tools/gpu_model.py [--device H100]     every op, then the same formulas beside published figures

Every time and rate that this prints is a prediction; nothing here ran on a GPU. docs/gpu_model.md has the formulas and
how far they are from measurements of other projects' kernels.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from gpu_formulas import (
    DEVICES,
    Device,
    Work,
    flash_attention,
    flash_attention_backward,
    flash_attention_decode,
    memory,
    moe_experts,
    series_form,
    works,
)
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Anchor:
    label: str
    predicted: float
    published: float
    unit: str
    source: str


FLASH_ATTENTION_3 = {  # H100, fp16 forward TFLOP/s at 512, 1k .. 16k tokens, B*T = 16k, H*D = 2048
    (64, True): (197, 265, 371, 420, 460, 473),
    (128, True): (292, 423, 521, 579, 602, 616),
    (128, False): (467, 565, 625, 638, 646, 648),
    (256, True): (286, 427, 537, 612, 628, 642),
}


def anchors() -> list[Anchor]:
    fa3 = "FlashAttention-3, H100"
    h100, h200, a100 = DEVICES["H100"], DEVICES["H200"], DEVICES["A100"]
    found = [
        Anchor(
            f"attention forward D{dim}, long", series_form(h100, dim) / 1e12, best, "TFLOP/s", "FlashAttention-3, H100"
        )
        for dim, best in ((64, 497), (128, 648), (256, 756))
    ]
    for (dim, causal), figures in FLASH_ATTENTION_3.items():
        for turn, figure in enumerate(figures):
            tokens = 512 << turn
            work = flash_attention(16384 // tokens, tokens, 2048 // dim, 2048 // dim, dim, causal, "wgmma")
            found.append(Anchor(work.case, work.rate(h100) / 1e12, figure, "TFLOP/s", fa3))
    for dim, figure in ((64, 299), (128, 335)):
        work = flash_attention(1, 16384, 2048 // dim, 2048 // dim, dim, True, "mma.sync")
        found.append(Anchor(work.case, work.rate(h100) / 1e12, figure, "TFLOP/s", "FlashAttention-2, H100"))
    long = series_form(a100, 128, "mma.sync") / a100.tensor * 100
    found.append(Anchor("attention forward D128, long", long, 73, "% of peak", "FlashAttention-2, A100 (its abstract)"))
    for tokens, figure in ((512, 316), (16384, 561)):
        work = flash_attention_backward(16384 // tokens, tokens, 16, 16, 128, False, "wgmma")
        found.append(Anchor(work.case, work.rate(h100) / 1e12, figure, "TFLOP/s", fa3))
    decode = flash_attention_decode(128, 8192, 64, 8, 128)
    found.append(Anchor(decode.case, decode.share(h100) * 100, 92, "% of HBM", fa3))
    experts = moe_experts(8192, 6144, 16384, 8, 2, "wgmma")
    for figure, name in ((834, "TensorRT-LLM"), (491, "vLLM, Triton")):
        found.append(Anchor(f"experts, {experts.case}", experts.rate(h100) / 1e12, figure, "TFLOP/s", f"{name}, H100"))
    for tokens, device, figure in ((16, h100, 1.66), (16, h200, 1.12), (1, h100, 0.43), (1, h200, 0.30)):
        work = moe_experts(tokens, 6144, 16384, 8, 2, "wgmma")
        seconds = work.seconds(device) * 1e3
        found.append(Anchor(f"experts, {work.case}", seconds, figure, "ms", f"TensorRT-LLM, {device.name}"))
    norm = memory("rms_norm", "", 2 * 2.0 * 32768 * 8192)
    found.append(
        Anchor(
            "rms_norm, softmax, cross entropy, large", norm.rate(h100) / 1e12, 3.05, "TB/s", "QuACK, H100: 2.9 to 3.2"
        )
    )
    return found


def amount(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}" if value else ""


def cell(work: Work, device: Device) -> str:
    seconds = work.seconds(device)
    time = f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
    rate = work.rate(device) / 1e12
    shown = f"{rate:.0f} TFLOP/s" if work.flops else f"{rate:.2f} TB/s"
    return f"~{time} ~{shown} ~{work.share(device):.0%}"


def work_table(devices: list[Device]) -> Table:
    table = Table(
        title="PREDICTED (~): time, rate, share of peak. Nothing here ran on a GPU.", box=None, pad_edge=False
    )
    for head in ("op", "case"):
        table.add_column(head, no_wrap=True)
    for head in ("bytes", "FLOP", "exp"):
        table.add_column(head, justify="right", no_wrap=True)
    for device in devices:
        table.add_column(f"waves {device.name}", justify="right", no_wrap=True)
        table.add_column(device.name, justify="right", no_wrap=True)
    for work in works():
        cells = [work.op, work.case, amount(work.bytes), amount(work.flops), amount(work.exps)]
        for device in devices:
            cells += [f"{work.blocks / device.sms:.1f}" if work.blocks else "", cell(work, device)]
        table.add_row(*cells)
    return table


def anchor_table() -> Table:
    table = Table(title="The same formulas (~ predicted) beside published figures", box=None, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for head in ("predicted", "published", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("published by", no_wrap=True)
    for one in anchors():
        digits = 2 if one.published < 10 else 0
        numbers = (f"~{one.predicted:.{digits}f}", f"{one.published:.{digits}f} {one.unit}")
        table.add_row(one.label, *numbers, f"{one.predicted / one.published:.2f}", one.source)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", action="append", choices=sorted(DEVICES), help="may be repeated; all of them")
    options = parser.parse_args(argv)
    console = Console(width=260, highlight=False, soft_wrap=True)
    console.print(work_table([DEVICES[name] for name in options.device or DEVICES]), "")
    console.print(anchor_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
