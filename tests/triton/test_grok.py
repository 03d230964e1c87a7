"""One training step of Grok `tiny` wholly on Triton: forward, backward and AdamW, interpreted, beside the reference.

The judge is float64: the loss, every gradient and every parameter after the step may be twice as far from the
reference in float64 as the reference in float32 is.
"""

from __future__ import annotations

import pytest
import torch

import grokkernels
from grokkernels.models.grok import Grok, GrokConfig
from grokkernels.optim import AdamW
from grokkernels.testing import judge
from tests.suite import native_calls


def step(grok: Grok, ids: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    """A step of training: the loss, the gradients' norm, all gradients, all parameters after it."""
    # A large eps: with a small one AdamW's first step is the sign of the gradient, and that of noise where it is none.
    options = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "max_norm": 1.0}
    optimizer = AdamW(grok.parameters(), **options, backend=backend)
    with grokkernels.use(backend):
        out = grok.loss(ids[:, :-1], ids[:, 1:])
        (out.loss + 0.01 * out.load_balance_loss + 0.001 * out.z_loss).backward()
        gradients = {f"gradient of {name}": p.grad.clone() for name, p in grok.named_parameters()}
        optimizer.step()
    found = {"loss": out.loss.detach(), "norm": optimizer.grad_norm, **gradients}
    return found | {name: p.detach().clone() for name, p in grok.named_parameters()}


@pytest.mark.slow
def test_training_step() -> None:
    torch.manual_seed(0)
    config = GrokConfig.preset("tiny")
    start = Grok(config).state_dict()
    ids = torch.randint(256, (2, 49))

    def fresh(dtype: torch.dtype = torch.float32) -> Grok:
        grok = Grok(config, dtype=dtype)
        grok.load_state_dict(start)
        return grok

    low, oracle = step(fresh(), ids, "reference"), step(fresh(torch.float64), ids, "reference")
    got: dict[str, torch.Tensor] = {}
    calls = native_calls(lambda: got.update(step(fresh(), ids, "triton")))
    assert {function.name().rsplit(".", 1)[-1] for function, _, _ in calls} == {"triton"}
    assert got.keys() == oracle.keys()
    ratios = {key: judge.ratio(got[key], low[key], oracle[key].double(), few=True) for key in got}
    worst = max(ratios, key=ratios.__getitem__)
    assert ratios[worst] <= 1.0, f"{worst} is {ratios[worst]:.3g} times what the float64 rule allows"
