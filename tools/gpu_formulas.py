"""Seconds of the library's kernels on GPUs, in closed form. Predictions: docs/gpu_model.md says how good they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"


@dataclass(frozen=True)
class Device:
    """Peaks as NVIDIA's data sheets give them."""

    name: str
    tensor: float  # dense bf16 FLOP/s
    hbm: float  # bytes/s
    sms: int
    hz: float  # the boost clock at which the data sheet's tensor figure holds
    mma_sync: float  # share of `tensor` that mma.sync reaches; the rest needs wgmma (Hopper), tcgen05 (Blackwell)

    def wide(self, path: str) -> bool:
        """Whether wgmma runs; every other path here is mma.sync."""
        return path == "wgmma" and self.name in ("H100", "H200")

    def flops(self, path: str) -> float:
        return self.tensor * (1.0 if self.wide(path) else self.mma_sync)


DEVICES = {
    device.name: device
    for device in (
        Device("A100", 312e12, 2.04e12, 108, 1.41e9, 1.0),
        # Half: FlashAttention-2 on H100 is where this puts it (docs/gpu_model.md).
        Device("H100", 989e12, 3.35e12, 132, 1.83e9, 0.5),
        Device("H200", 989e12, 4.80e12, 132, 1.83e9, 0.5),
        # Nothing is published for mma.sync here: taken as on A100, 2048 FLOP per clock and multiprocessor.
        Device("B200", 2250e12, 8.00e12, 148, 1.85e9, 2048 * 148 * 1.85e9 / 2250e12),
    )
}
EXP_PER_CLOCK = 16  # per multiprocessor, every architecture here: CUDA C++ Programming Guide, arithmetic throughput
LAUNCH = 3e-6  # seconds; with the two shares below it fits NVIDIA's kernel measurements, see docs/gpu_model.md
GEMM_SHARE = 0.80  # of the tensor peak that a good matrix product reaches
GEMM_MEMORY_SHARE = 0.85  # of the memory bandwidth, when weights are what it waits for
MEMORY_SHARE = 0.90  # QuACK's softmax, RMSNorm and cross entropy on H100: 2.9 to 3.2 of 3.35 TB/s
DECODE_SHARE = 0.93  # FlashAttention-3's decode with more than 2 GB of cache: 92 % of H100's bandwidth
DECODE_LAUNCH = 10e-6  # splits and their merge
BLOCK_CLOCKS = 4200  # loading Q and the first keys, last product, store: fitted once to FlashAttention-3's D64 and D128
MMA_SYNC_ATTENTION = 0.90  # FlashAttention-2 on A100: 73 % of peak (its abstract) where the formula says 80
ATTENTION_BACKWARD = 0.71  # fitted to FlashAttention-3's backward, D128 at 16k tokens: 561 TFLOP/s
# FlashAttention-3's tiles, queries x keys: a diagonal tile is computed whole.
TILES = {(64, True): (192, 128), (64, False): (192, 192), (128, True): (128, 128), (128, False): (128, 176)}
TILE = (128, 80)  # of every other head dim
GEMM_TILE = (128, 256)


@dataclass(frozen=True)
class Work:
    """What a call costs, whoever runs it, and the seconds predicted for a device."""

    op: str
    case: str
    seconds: Callable[[Device], float]
    bytes: float
    flops: float = 0.0
    exps: float = 0.0
    blocks: float = 0.0

    def rate(self, device: Device) -> float:
        return (self.flops or self.bytes) / self.seconds(device)

    def share(self, device: Device) -> float:
        return self.rate(device) / (device.tensor if self.flops else device.hbm)


# --- formulas ---


def path_of(op: str) -> str:
    """wgmma where the op has a Hopper file, else mma.sync."""
    return "wgmma" if [*CUDA.glob(f"{op}_sm90.cu"), *CUDA.glob(f"{op}/*_sm90.cu")] else "mma.sync"


def memory(op: str, case: str, bytes: float) -> Work:
    return Work(op, case, lambda device: bytes / (MEMORY_SHARE * device.hbm) + LAUNCH, bytes)


def gemm_seconds(device: Device, flops: float, bytes: float, path: str) -> float:
    return max(flops / (GEMM_SHARE * device.flops(path)), bytes / (GEMM_MEMORY_SHARE * device.hbm)) + LAUNCH


def grouped_mm(rows: int, depth: int, cols: int, groups: int, path: str | None = None) -> Work:
    """bf16, rows spread evenly over the groups; weights of every group are read."""
    flops = 2.0 * rows * depth * cols
    bytes = 2.0 * (rows * depth + groups * depth * cols + rows * cols)
    blocks = groups * math.ceil(rows / groups / GEMM_TILE[0]) * math.ceil(cols / GEMM_TILE[1])
    chosen = path or path_of("grouped_mm")
    case = f"{rows} rows, {groups} groups of {depth}x{cols}"
    return Work("grouped_mm", case, lambda device: gemm_seconds(device, flops, bytes, chosen), bytes, flops, 0, blocks)


def moe_experts(tokens: int, width: int, hidden: int, experts: int, top_k: int, path: str | None = None) -> Work:
    """Forward, bf16: gate and up with the activation in the epilogue, then down. Tokens choose experts at random."""
    rows = tokens * top_k
    touched = experts * (1 - (1 - top_k / experts) ** tokens)
    flops = 6.0 * rows * width * hidden
    gate_up = 2.0 * (touched * 2 * width * hidden + rows * width + rows * hidden)
    down = 2.0 * (touched * width * hidden + rows * hidden + rows * width)
    chosen = path or path_of("moe_experts")

    def seconds(device: Device) -> float:
        return gemm_seconds(device, flops * 2 / 3, gate_up, chosen) + gemm_seconds(device, flops / 3, down, chosen)

    blocks = touched * math.ceil(rows / touched / GEMM_TILE[0]) * math.ceil(2 * hidden / GEMM_TILE[1])
    case = f"{tokens} tokens, top {top_k} of {experts}, {width}x{hidden}"
    return Work("moe_experts", case, seconds, gate_up + down, flops, rows * hidden, blocks)


def attention_pairs(tokens: int, tile: tuple[int, int], causal: bool) -> int:
    """Pairs of query and key that one head computes: whole tiles of keys, up to the diagonal if causal."""
    ends = [min(tokens, start + tile[0]) if causal else tokens for start in range(0, tokens, tile[0])]
    return sum(math.ceil(end / tile[1]) * tile[1] * tile[0] for end in ends)


def pair_clocks(device: Device, flops: float, path: str) -> float:
    """Clocks of a multiprocessor per pair: the tensor cores' time, then the exponential's, one after the other."""
    tensor = flops / (device.flops(path) / device.sms / device.hz)
    return (tensor + 1 / EXP_PER_CLOCK) / (1.0 if device.wide(path) else MMA_SYNC_ATTENTION)


def series_form(device: Device, dim: int, path: str = "wgmma") -> float:
    """FLOP/s of the attention forward on sequences so long that nothing but its inner loop counts."""
    return 4 * dim / pair_clocks(device, 4 * dim, path) * device.sms * device.hz


def flash_attention(
    batch: int, tokens: int, heads: int, kv_heads: int, dim: int, causal: bool = True, path: str | None = None
) -> Work:
    """Forward. FLOPs are halved for a causal mask, as publications do."""
    tile = TILES.get((dim, causal), TILE)
    chosen = path or path_of("flash_attention")
    blocks = batch * heads * math.ceil(tokens / tile[0])
    pairs = batch * heads * attention_pairs(tokens, tile, causal)

    def seconds(device: Device) -> float:
        clocks = pairs * pair_clocks(device, 4 * dim, chosen) + blocks * BLOCK_CLOCKS
        waves = blocks / device.sms
        uneven = 1.0 if causal else math.ceil(waves) / waves  # causal blocks differ in length and fill the gaps
        return clocks * uneven / device.sms / device.hz + LAUNCH

    exact = batch * heads * tokens * tokens / (2 if causal else 1)
    bytes = 2.0 * batch * tokens * dim * (2 * heads + 2 * kv_heads)
    case = f"B{batch} T{tokens} H{heads}/{kv_heads} D{dim} {'causal' if causal else 'full'}"
    return Work("flash_attention", case, seconds, bytes, 4.0 * dim * exact, pairs, blocks)


def flash_attention_backward(
    batch: int, tokens: int, heads: int, kv_heads: int, dim: int, causal: bool = True, path: str | None = None
) -> Work:
    """Five products and one exponential per pair; before them delta and a cleared dq, after them dq's rounding."""
    tile = (128, 64)
    chosen = path or path_of("flash_attention")
    blocks = batch * heads * math.ceil(tokens / tile[0])
    pairs = batch * heads * attention_pairs(tokens, tile, causal)
    around = 14.0 * batch * tokens * heads * dim  # o and dout read, dq written in float, read, written

    def seconds(device: Device) -> float:
        clocks = pairs * pair_clocks(device, 10 * dim, chosen) / ATTENTION_BACKWARD + 2 * blocks * BLOCK_CLOCKS
        return clocks / device.sms / device.hz + around / (MEMORY_SHARE * device.hbm) + 3 * LAUNCH

    exact = batch * heads * tokens * tokens / (2 if causal else 1)
    bytes = 2.0 * batch * tokens * dim * (4 * heads + 4 * kv_heads)
    case = f"B{batch} T{tokens} H{heads}/{kv_heads} D{dim} {'causal' if causal else 'full'}, backward"
    return Work("flash_attention", case, seconds, bytes, 10.0 * dim * exact, pairs, blocks)


def flash_attention_decode(batch: int, keys: int, heads: int, kv_heads: int, dim: int) -> Work:
    """One query per sequence: the cache is read once."""
    bytes = 2.0 * 2 * batch * keys * kv_heads * dim
    case = f"decode B{batch} S{keys} H{heads}/{kv_heads} D{dim}"
    return Work("flash_attention", case, lambda device: bytes / (DECODE_SHARE * device.hbm) + DECODE_LAUNCH, bytes)


def linear_cross_entropy(rows: int, width: int, cols: int, backward: bool, path: str | None = None) -> Work:
    """Forward one product, backward three: the logits again, dx and dweight. Exponentials do not hide behind them."""
    products = 3 if backward else 1
    flops, exps = 2.0 * products * rows * width * cols, float(rows) * cols
    bytes = 2.0 * products * (rows * width + width * cols)
    chosen = path or path_of("linear_cross_entropy")

    def seconds(device: Device) -> float:
        return gemm_seconds(device, flops, bytes, chosen) + exps / EXP_PER_CLOCK / device.sms / device.hz

    blocks = math.ceil(rows / GEMM_TILE[0]) * math.ceil(cols / GEMM_TILE[1])
    case = f"{rows} x {width} x {cols}{', backward' if backward else ''}"
    return Work("linear_cross_entropy", case, seconds, bytes, flops, exps, blocks)


def works() -> list[Work]:
    """One of each kernel, at the sizes of Grok-1 (C 6144, 48/8 heads, 8 experts, V 131072), bf16 unless said."""
    n, c, v = 8192, 6144, 131072
    small, moved = 2.0, 2.0 * n * c  # bytes of an element, of a tensor (N, C)
    ffn, head = 32768, 128
    return [
        flash_attention(1, n, 48, 8, head),
        flash_attention_backward(1, n, 48, 8, head),
        flash_attention_decode(64, n, 48, 8, head),
        grouped_mm(2 * n, c, ffn, 8),
        moe_experts(n, c, ffn, 8, 2),
        moe_experts(16, c, ffn, 8, 2),
        moe_experts(n, 2048, 768, 128, 8),
        memory("rms_norm", f"{n} x {c}", 2 * moved),
        memory("rms_norm", f"{n} x {c}, residual", 4 * moved),
        memory("rms_norm", f"{n} x {c}, backward", 3 * moved),
        memory("dual_rms_norm", f"{n} x {c}", 4 * moved),
        memory("dual_rms_norm", f"{n} x {c}, backward", 6 * moved),
        memory("rotary", f"T{n} H48/8 D{head}, q and k", 2 * small * n * (48 + 8) * head),
        memory("gated_activation", f"{n} x {ffn}", 3 * small * n * ffn),
        memory("gated_activation", f"{n} x {ffn}, backward", 5 * small * n * ffn),
        memory("cross_entropy", f"{n} x {v}", small * n * v),
        memory("cross_entropy", f"{n} x {v}, backward", 2 * small * n * v),
        linear_cross_entropy(n, c, v, False),
        linear_cross_entropy(n, c, v, True),
        memory("moe_gate", f"{n} tokens, top 2 of 8", n * (8 * small + 2 * 8)),
        memory("moe_gate", f"{n} tokens, top 8 of 128", n * (128 * small + 8 * 8)),
        memory("moe_permute", f"{n} x {c}, top 2", 3 * moved),
        memory("moe_permute", f"{n} x {c}, top 2, unpermute", 3 * moved),
        memory("merge_attention_states", f"T{n} H48 D{head}", 3 * small * n * 48 * head),
        memory("adamw", "1e9 parameters, fp32", 28e9),
        memory("adamw", "1e9 parameters, bf16 with fp32 moments", 22e9),
    ]
