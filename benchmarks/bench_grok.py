"""The `small` Grok: a training step, and generation token by token, beside the same model in plain PyTorch.

pytest benchmarks/bench_grok.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import grokkernels
from benchmarks.harness.judging import DEVICE
from benchmarks.harness.passes import DTYPES, word
from benchmarks.harness.peers import compiled
from benchmarks.harness.work import OURS, Work
from grokkernels.models.grok import Grok, GrokConfig
from grokkernels.optim import AdamW

TOKENS = 256
GENERATED = 32
CONFIG = GrokConfig.preset("small")


def model(dtype: torch.dtype) -> Grok:
    torch.manual_seed(0)
    return Grok(CONFIG, dtype=dtype)


def tokens(count: int) -> torch.Tensor:
    """(1, count), the same on every device."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (1, count), generator=generator, device="cpu").to(DEVICE)


def judged_elsewhere() -> None:
    """Every op against float64 in its own benchmark; here the contenders' losses and tokens must agree."""


def trainer(dtype: torch.dtype, backend: str | None, wrap: Callable = lambda function: function) -> Callable[[], Any]:
    """A step: forward, backward, AdamW. Plain PyTorch has its own fused AdamW. Gives the loss of the same batch."""
    grok = model(dtype)
    ids = tokens(TOKENS + 1)
    groups = list(grok.parameters())
    optimizer = AdamW(groups, lr=0.0) if backend is None else torch.optim.AdamW(groups, lr=0.0, fused=True)

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = grok.loss(x, y)
        return out.loss + 0.01 * out.load_balance_loss

    loss_of = wrap(loss_of)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        return loss.detach().float()

    return step if backend is None else lambda: within(backend, step)


def within(backend: str, function: Callable[[], Any]) -> Any:
    with grokkernels.use(backend):
        return function()


def generator(dtype: torch.dtype, backend: str | None) -> Callable[[], Any]:
    """GENERATED tokens after a prompt of 128, the likeliest each time."""
    grok = model(dtype)
    prompt = tokens(128)

    def speak() -> torch.Tensor:
        return torch.tensor(list(grok.generate(prompt, GENERATED, temperature=0.0)), dtype=torch.float32)

    return speak if backend is None else lambda: within(backend, speak)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
def test_training_step(compare: Any, dtype: torch.dtype) -> None:
    contenders = {
        OURS: trainer(dtype, None),
        "torch": trainer(dtype, "reference"),
        "torch.compile": trainer(dtype, "reference", compiled),
    }
    flops = 6 * CONFIG.num_active_parameters() * TOKENS
    compare(Work("grok", f"small, T {TOKENS}", word(dtype), "training step", flops=flops), contenders, judged_elsewhere)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
def test_generation(compare: Any, dtype: torch.dtype) -> None:
    contenders = {OURS: generator(dtype, None), "torch": generator(dtype, "reference")}
    read = CONFIG.num_active_parameters() * dtype.itemsize * GENERATED
    compare(
        Work("grok", f"small, {GENERATED} tokens after 128", word(dtype), "generation", read=read),
        contenders,
        judged_elsewhere,
    )
