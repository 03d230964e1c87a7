"""The transformer's forward and backward pass wholly on the emulated device: every op's CUDA kernels, in one model.

The judge is float64, as everywhere: the loss, the logits and the gradient of every parameter may be twice as far from
it as the reference is in float32, by root mean square.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import grokkernels
from grokkernels.models.grok import Grok, GrokConfig
from grokkernels.testing import judge
from tests.suite import native_calls

ARCHITECTURES = ("sm_80", "sm_90")


def tiny() -> tuple[Grok, torch.Tensor]:
    torch.manual_seed(0)
    return Grok(GrokConfig.preset("tiny")), torch.randint(256, (1, 25))


def g1_base() -> tuple[Grok, torch.Tensor]:
    with np.load(Path(__file__).parent / "golden" / "g1_base.npz") as file:
        golden = dict(file)
    return Grok.from_official(json.loads(str(golden["config_json"])), golden), torch.from_numpy(golden["tokens"])


MODELS = {"tiny": tiny, "g1_base": g1_base}


def passes(grok: Grok, ids: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    """The loss, the logits and all gradients, by name."""
    grok.zero_grad()
    with grokkernels.use(backend):
        out = grok.loss(ids[:, :-1], ids[:, 1:])
        (out.loss + 0.01 * out.load_balance_loss + 0.001 * out.z_loss).backward()
        with torch.no_grad():
            found = {"loss": out.loss.detach(), "logits": grok(ids)}
    return found | {name: p.grad.clone() for name, p in grok.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name: str, architecture: str) -> None:
    grok, ids = MODELS[name]()
    low = passes(grok, ids, "reference")
    with judge.at_level(architecture):
        got: dict[str, torch.Tensor] = {}
        calls = native_calls(lambda: got.update(passes(grok, ids, "emulated")))
    assert calls
    assert {function.name().rsplit(".", 1)[-1] for function, _, _ in calls} == {"emulated"}
    exact = Grok(grok.config, dtype=torch.float64)
    exact.load_state_dict(grok.state_dict())
    oracle = passes(exact, ids, "reference")
    assert got.keys() == oracle.keys()
    ratios = {key: judge.ratio(got[key], low[key], oracle[key].double(), few=True) for key in got}
    worst = max(ratios, key=ratios.__getitem__)
    assert ratios[worst] <= 1.0, f"{worst} is {ratios[worst]:.3g} times what the float64 rule allows"
