"""What the speed phase times: each op at a model's sizes, beside whoever computes the same on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gpu_formulas as formulas
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import grokkernels
from benchmarks import bench_dual_rms_norm, bench_flash_attention, bench_linear_cross_entropy, bench_moe_experts
from benchmarks.bench_gated_activation import PLAIN
from benchmarks.bench_merge_attention_states import plain as plain_merge
from benchmarks.bench_rms_norm import EPS, fused, plain
from benchmarks.bench_rotary import turn
from benchmarks.harness.passes import BOTH, FORWARD
from benchmarks.harness.peers import Absent, installed
from grokkernels.ops.adamw import adamw
from grokkernels.reference.moe_gate import Routing

Function = Callable[..., Any]
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A mixture of experts: N tokens, C its width, D of a head, F of an expert, V words."""

    name: str
    tokens: int
    width: int
    heads: int
    kv_heads: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    vocabulary: int
    activation: str
    softcap: float


GROK_1 = Size("Grok-1", 8192, 6144, 48, 8, 128, 32768, 8, 2, 131072, "gelu_tanh", 30.0)
FINE_GRAINED = Size("fine-grained", 8192, 2048, 32, 4, 128, 768, 128, 8, 151936, "silu", 0.0)
TINY = Size("tiny", 8, 32, 2, 1, 16, 32, 2, 2, 64, "silu", 30.0)
SIZES = {"cuda": (GROK_1, FINE_GRAINED), "stand-in": (TINY,)}


@dataclass
class Problem:
    """An op at one size. `ours` makes the function for a column; functions take `tensors`, whose gradients are asked.

    `cost`: bytes and floating-point operations by direction. `predicted`: what gpu_formulas says, by direction.
    """

    op: str  # the name of its table
    shape: str
    tensors: tuple[torch.Tensor, ...]
    ours: Callable[[str], Function]
    peers: dict[str, Function | Absent]
    cost: dict[str, tuple[float, float]]
    predicted: dict[str, list[formulas.Work]]
    dtype: torch.dtype = BF16
    compiled: dict[str, Function] = field(default_factory=dict)  # peers by torch.compile


def liger(name: str) -> Function | Absent:
    """A function of Liger's."""
    missing = installed("liger_kernel")
    if missing is not None:
        return missing
    from liger_kernel.transformers import functional

    return getattr(functional, name, Absent(f"this Liger has no {name}"))


def flashinfer(*path: str) -> Function | Absent:
    missing = installed("flashinfer")
    if missing is not None:
        return missing
    import flashinfer as found

    for name in path:
        found = getattr(found, name, None)
    return Absent(f"this FlashInfer has no {'.'.join(path)}") if found is None else found


def flash_attn(name: str) -> Function | Absent:
    missing = installed("flash_attn")
    if missing is not None:
        return missing
    import flash_attn as found

    return getattr(found, name)


def given(function: Function | Absent, *first: Any, **options: Any) -> Function | Absent:
    """The function with options, after the tensors; an absent one stays absent."""
    return function if isinstance(function, Absent) else lambda *tensors: function(*tensors, *first, **options)


def forward_only(function: Function | Absent) -> Function | Absent:
    """Marks a peer that has no backward: it is left out where gradients are asked."""
    if not isinstance(function, Absent):
        function.forward_only = True  # type: ignore[attr-defined]
    return function


def tensor(*shape: int, std: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Random numbers on the default device: the speed of a product depends on them."""
    return torch.randn(shape, dtype=dtype) * std


def by_memory(op: str, forward: float, both: float) -> dict[str, Any]:
    """The costs of an op that moves so many bytes, and what the model predicts for it."""
    back = formulas.memory(op, "", both - forward)
    first = formulas.memory(op, "", forward)
    return {
        "cost": {FORWARD: (forward, 0.0), BOTH: (both, 0.0)},
        "predicted": {FORWARD: [first], BOTH: [first, back]},
    }


def rms_norm(size: Size) -> Problem:
    rows, cols = size.tokens, size.width
    moved = 2.0 * rows * cols
    return Problem(
        "rms_norm",
        f"{rows} x {cols}",
        (tensor(rows, cols), tensor(cols)),
        lambda column: lambda x, w: grokkernels.rms_norm(x, w, EPS, backend=column),
        {
            "torch fused": fused,
            "Liger": given(liger("liger_rms_norm"), EPS, in_place=False),
            "FlashInfer": forward_only(given(flashinfer("norm", "rmsnorm"), EPS)),
        },
        **by_memory("rms_norm", 2 * moved, 5 * moved),
        compiled={"torch.compile": plain},
    )


def dual_rms_norm(size: Size) -> Problem:
    rows, cols = size.tokens, size.width
    moved = 2.0 * rows * cols
    return Problem(
        "dual_rms_norm",
        f"{rows} x {cols}",
        (tensor(rows, cols), tensor(rows, cols), tensor(cols), tensor(cols)),
        lambda column: lambda *tensors: grokkernels.dual_rms_norm(*tensors, backend=column),
        {"torch fused": bench_dual_rms_norm.seam(fused)},
        **by_memory("dual_rms_norm", 4 * moved, 10 * moved),
        compiled={"torch.compile": bench_dual_rms_norm.seam(plain)},
    )


def rotary(size: Size) -> Problem:
    cos, sin = (table.to(torch.get_default_device()) for table in grokkernels.rotary_tables(size.dim, size.tokens))
    moved = 2.0 * size.tokens * (size.heads + size.kv_heads) * size.dim

    def each(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return turn(q, cos, sin), turn(k, cos, sin)

    return Problem(
        "rotary",
        f"T {size.tokens}, heads {size.heads}/{size.kv_heads} of {size.dim}",
        (tensor(1, size.tokens, size.heads, size.dim), tensor(1, size.tokens, size.kv_heads, size.dim)),
        lambda column: lambda q, k: grokkernels.rotary(q, k, cos, sin, backend=column),
        {"torch": each},
        **by_memory("rotary", 2 * moved, 4 * moved),
        compiled={"torch.compile": each},
    )


def gated_activation(size: Size) -> Problem:
    rows, cols, kind = size.tokens * size.top_k // 2, size.hidden, size.activation
    moved = 2.0 * rows * cols

    def halves(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return PLAIN[kind](gate, up)

    return Problem(
        "gated_activation",
        f"{kind}, {rows} x {cols}",
        (tensor(rows, cols), tensor(rows, cols)),
        lambda column: lambda gate, up: grokkernels.gated_activation(gate, up, kind, backend=column),
        {"torch": halves, "Liger": liger("liger_swiglu" if kind == "silu" else "liger_geglu")},
        **by_memory("gated_activation", 3 * moved, 8 * moved),
        compiled={"torch.compile": halves},
    )


def cross_entropy(size: Size) -> Problem:
    rows, cols = size.tokens, size.vocabulary
    targets = torch.randint(0, cols, (rows,))
    moved = 2.0 * rows * cols

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), targets)

    def through_liger(function: Function) -> Function:
        return lambda logits: function(logits * 1.0, targets)  # it overwrites its input

    found = liger("liger_cross_entropy")
    return Problem(
        "cross_entropy",
        f"{rows} x {cols}",
        (tensor(rows, cols),),
        lambda column: lambda logits: grokkernels.cross_entropy(logits, targets, backend=column).float(),
        {"torch": loss, "Liger": found if isinstance(found, Absent) else through_liger(found)},
        **by_memory("cross_entropy", moved, 3 * moved),
        compiled={"torch.compile": loss},
    )


def linear_cross_entropy(size: Size) -> Problem:
    rows, width, cols = size.tokens, size.width, size.vocabulary
    targets = torch.randint(0, cols, (rows,))
    flops, moved = 2.0 * rows * width * cols, 2.0 * (rows * width + width * cols)
    found = liger("liger_fused_linear_cross_entropy")
    first, back = (formulas.linear_cross_entropy(rows, width, cols, backward) for backward in (False, True))
    return Problem(
        "linear_cross_entropy",
        f"{rows} x {width}, V {cols}",
        (tensor(rows, width), tensor(cols, width, std=width**-0.5)),
        lambda column: lambda x, w: grokkernels.linear_cross_entropy(x, w, targets, backend=column).float(),
        {
            "torch": lambda x, w: bench_linear_cross_entropy.plain(x, w, targets),
            "Liger": found if isinstance(found, Absent) else lambda x, w: found(x, w, targets),
        },
        # The backward forms the logits again.
        {FORWARD: (moved, flops), BOTH: (3 * moved, 4 * flops)},
        {FORWARD: [first], BOTH: [first, back]},
    )


def sdpa(backend: SDPBackend) -> Function:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return bench_flash_attention.sdpa(q, k, v)

    return call


def attention(size: Size, softcap: float) -> Problem:
    tokens, heads, kv_heads, dim = size.tokens, size.heads, size.kv_heads, size.dim
    shape = (1, tokens, heads, kv_heads, dim)
    first, back = formulas.flash_attention(*shape), formulas.flash_attention_backward(*shape)
    no_cap = Absent("torch's fused attention has no softcap")

    def prefill(function: Function) -> Function:
        return lambda q, k, v: function(q[0], k[0], v[0], causal=True, logits_soft_cap=softcap or None)[None]

    found = flashinfer("single_prefill_with_kv_cache")
    words = f"causal, T {tokens}, heads {heads}/{kv_heads} of {dim}" + (f", softcap {softcap:g}" if softcap else "")
    return Problem(
        "flash_attention",
        words,
        (tensor(1, tokens, heads, dim), *(tensor(1, tokens, kv_heads, dim) for _ in range(2))),
        lambda column: (
            lambda q, k, v: grokkernels.flash_attention(q, k, v, causal=True, softcap=softcap, backend=column)
        ),
        {
            "SDPA, cuDNN": no_cap if softcap else sdpa(SDPBackend.CUDNN_ATTENTION),
            "SDPA, flash": no_cap if softcap else sdpa(SDPBackend.FLASH_ATTENTION),
            "flash-attn": given(flash_attn("flash_attn_func"), causal=True, softcap=softcap),
            "FlashInfer": found if isinstance(found, Absent) else forward_only(prefill(found)),
        },
        {
            FORWARD: (first.bytes, first.flops),
            BOTH: (first.bytes + back.bytes, first.flops + back.flops),
        },
        {FORWARD: [first], BOTH: [first, back]},
        compiled={"torch.compile, flex": bench_flash_attention.flex(softcap, tokens)} if softcap else {},
    )


def attention_plain(size: Size) -> Problem:
    return attention(size, 0.0)


def attention_capped(size: Size) -> Problem:
    return attention(size, size.softcap or 50.0)


def decode(size: Size) -> Problem:
    """One query for each of up to 64 sequences."""
    batch, keys, heads, kv_heads, dim = min(64, size.tokens), size.tokens, size.heads, size.kv_heads, size.dim
    predicted = formulas.flash_attention_decode(batch, keys, heads, kv_heads, dim)

    def folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The heads of a group as queries."""
        group = q.view(batch, kv_heads, heads // kv_heads, dim)
        return F.scaled_dot_product_attention(group, k.transpose(1, 2), v.transpose(1, 2)).view(batch, 1, heads, dim)

    return Problem(
        "flash_attention",
        f"decode, B {batch}, {keys} keys, heads {heads}/{kv_heads} of {dim}",
        (tensor(batch, 1, heads, dim), *(tensor(batch, keys, kv_heads, dim) for _ in range(2))),
        lambda column: lambda q, k, v: grokkernels.flash_attention(q, k, v, backend=column),
        {"SDPA": folded, "flash-attn": flash_attn("flash_attn_func")},
        {FORWARD: (predicted.bytes, 0.0)},
        {FORWARD: [predicted]},
    )


def flash_attention_varlen(size: Size) -> Problem:
    """Sequences of 3/8, 1/8, 1/64 and the rest of the tokens."""
    tokens, heads, kv_heads, dim = size.tokens, size.heads, size.kv_heads, size.dim
    lengths = [tokens * 3 // 8, tokens // 8, max(tokens // 64, 1)]
    lengths.append(tokens - sum(lengths))
    longest, ends = max(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    works = [formulas.flash_attention(1, n, heads, kv_heads, dim) for n in lengths]
    backs = [formulas.flash_attention_backward(1, n, heads, kv_heads, dim) for n in lengths]
    cost = [(sum(w.bytes for w in some), sum(w.flops for w in some)) for some in (works, [*works, *backs])]
    lens = (ends, ends, longest, longest)
    return Problem(
        "flash_attention_varlen",
        f"causal, T {'+'.join(map(str, lengths))}, heads {heads}/{kv_heads} of {dim}",
        (tensor(tokens, heads, dim), *(tensor(tokens, kv_heads, dim) for _ in range(2))),
        lambda column: lambda q, k, v: grokkernels.flash_attention_varlen(q, k, v, *lens, causal=True, backend=column),
        {"flash-attn": given(flash_attn("flash_attn_varlen_func"), *lens, causal=True)},
        dict(zip((FORWARD, BOTH), cost, strict=True)),
        {},  # the model knows no packed sequences: four launches would be counted
    )


def grouped_mm(size: Size) -> Problem:
    experts, rows, depth, cols = size.experts, size.tokens * size.top_k, size.width, size.hidden
    ends = torch.full((experts,), rows // experts).cumsum(0).int()
    one = formulas.grouped_mm(rows, depth, cols, experts)
    return Problem(
        "grouped_mm",
        f"{rows} rows, {experts} groups, {depth} to {cols}",
        (tensor(rows, depth), tensor(experts, cols, depth, std=depth**-0.5)),
        lambda column: lambda x, w: grokkernels.grouped_mm(x, w.mT, ends, backend=column),
        {"F.grouped_mm": lambda x, w: F.grouped_mm(x, w.mT, offs=ends)},
        {FORWARD: (one.bytes, one.flops), BOTH: (3 * one.bytes, 3 * one.flops)},
        {FORWARD: [one], BOTH: [one] * 3},
    )


def routing(size: Size) -> torch.Tensor:
    """(N, K) int32: each token's experts, different ones, at random."""
    return torch.rand(size.tokens, size.experts).topk(size.top_k).indices.int()


def moe_experts(size: Size) -> Problem:
    indices, kind = routing(size), size.activation
    shape = (size.tokens, size.width, size.hidden, size.experts, size.top_k)
    one = formulas.moe_experts(*shape)
    nothing, counts = torch.zeros(()), indices.flatten().long().bincount(minlength=size.experts).int()

    def ours(column: str) -> Function:
        def call(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor):
            routed = Routing(weights, indices, counts, nothing, nothing)
            return grokkernels.moe_experts(x, gate, up, down, routed, activation=kind, backend=column)

        return call

    into = tensor(size.experts, size.hidden, size.width, std=size.width**-0.5)
    out = tensor(size.experts, size.width, size.hidden, std=size.hidden**-0.5)
    grouped = bench_moe_experts.grouped(indices)
    return Problem(
        "moe_experts",
        f"{size.tokens} tokens, top {size.top_k} of {size.experts}, {size.width} x {size.hidden}",
        (tensor(size.tokens, size.width), into, into.clone(), out, torch.rand(size.tokens, size.top_k)),
        ours,
        {"F.grouped_mm": grouped if kind == "silu" else Absent("the lines beside F.grouped_mm are SwiGLU's")},
        {FORWARD: (one.bytes, one.flops), BOTH: (3 * one.bytes, 3 * one.flops)},
        {FORWARD: [one], BOTH: [one] * 3},
    )


def moe_gate(size: Size) -> Problem:
    moved = 4.0 * size.tokens * size.experts

    def choose(logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(dim=-1).topk(size.top_k).values

    return Problem(
        "moe_gate",
        f"{size.tokens} tokens, top {size.top_k} of {size.experts}",
        (tensor(size.tokens, size.experts, dtype=torch.float32),),
        lambda column: lambda logits: grokkernels.moe_gate(logits, size.top_k, backend=column).weights,
        {"torch": choose},
        **by_memory("moe_gate", moved, 3 * moved),
        dtype=torch.float32,
        compiled={"torch.compile": choose},
    )


def moe_permute(size: Size) -> Problem:
    indices, moved = routing(size), 2.0 * size.tokens * size.width

    def plain_permute(x: torch.Tensor) -> torch.Tensor:
        return x[indices.flatten().long().argsort(stable=True) // size.top_k]

    return Problem(
        "moe_permute",
        f"T {size.tokens}, {size.width}, top {size.top_k} of {size.experts}",
        (tensor(size.tokens, size.width),),
        lambda column: lambda x: grokkernels.moe_permute(x, indices, size.experts, backend=column)[0],
        {"torch": plain_permute},
        **by_memory("moe_permute", (1 + size.top_k) * moved, 2 * (1 + size.top_k) * moved),
    )


def moe_unpermute(size: Size) -> Problem:
    indices, moved, rows = routing(size), 2.0 * size.tokens * size.width, size.tokens * size.top_k
    slots = grokkernels.moe_permute(torch.zeros(size.tokens, 1), indices, size.experts)[1]
    places = slots.view(-1).long()

    def plain_unpermute(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (y[places].view(size.tokens, size.top_k, -1) * weights.unsqueeze(-1)).sum(1).to(y.dtype)

    return Problem(
        "moe_unpermute",
        f"T {size.tokens}, {size.width}, top {size.top_k} of {size.experts}",
        (tensor(rows, size.width), torch.rand(size.tokens, size.top_k)),
        lambda column: lambda y, weights: grokkernels.moe_unpermute(y, weights, slots, backend=column),
        {"torch": plain_unpermute},
        **by_memory("moe_permute", (1 + size.top_k) * moved, (2 + 3 * size.top_k) * moved),
    )


def merge_attention_states(size: Size) -> Problem:
    o = [tensor(1, size.tokens, size.heads, size.dim) for _ in range(2)]
    lse = [tensor(1, size.heads, size.tokens, dtype=torch.float32) for _ in range(2)]
    moved = 2.0 * o[0].numel()
    return Problem(
        "merge_attention_states",
        f"T {size.tokens}, {size.heads} heads of {size.dim}",
        (o[0], lse[0], o[1], lse[1]),
        lambda column: lambda *states: grokkernels.merge_attention_states(*states, backend=column),
        {"torch": plain_merge},
        **by_memory("merge_attention_states", 3 * moved, 8 * moved),
        compiled={"torch.compile": plain_merge},
    )


def optimizer(size: Size) -> Problem:
    """A step over one expert's matrices, the moments in float32."""
    param = torch.nn.Parameter(tensor(3, size.hidden, size.width))
    param.grad = tensor(*param.shape)
    moments = [torch.zeros(param.shape, dtype=torch.float32) for _ in range(2)]
    step = torch.zeros((), dtype=torch.float32)
    fused_step = torch.optim.AdamW([param], lr=0.0, fused=param.is_cuda).step

    def ours(column: str) -> Function:
        def call() -> torch.Tensor:
            assert param.grad is not None
            adamw([param], [param.grad], [moments[0]], [moments[1]], [step], lr=0.0, backend=column)
            return param.detach()

        return call

    def peer(function: Function) -> Function:
        def call() -> torch.Tensor:
            function()
            return param.detach()

        return call

    moved = 22.0 * param.numel()
    return Problem(
        "adamw",
        f"{param.numel() / 1e6:.0f} M parameters",
        (),
        ours,
        {"torch fused": peer(fused_step)},
        {FORWARD: (moved, 0.0)},
        {FORWARD: [formulas.memory("adamw", "", moved)]},
    )


# By the op's file in grokkernels/ops.
PROBLEMS: dict[str, tuple[Callable[[Size], Problem], ...]] = {
    "flash_attention": (attention_plain, attention_capped, flash_attention_varlen, decode),
    "grouped_mm": (grouped_mm,),
    "moe_experts": (moe_experts,),
    "linear_cross_entropy": (linear_cross_entropy,),
    "rms_norm": (rms_norm,),
    "dual_rms_norm": (dual_rms_norm,),
    "cross_entropy": (cross_entropy,),
    "gated_activation": (gated_activation,),
    "rotary": (rotary,),
    "moe_permute": (moe_permute, moe_unpermute),
    "moe_gate": (moe_gate,),
    "merge_attention_states": (merge_attention_states,),
    "adamw": (optimizer,),
}
# The op of a problem that is not called like it.
OPS = {
    "attention_plain": "flash_attention",
    "attention_capped": "flash_attention",
    "decode": "flash_attention",
    "optimizer": "adamw",
}
