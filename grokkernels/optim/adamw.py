"""AdamW with the clipping of the global norm inside the update."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from grokkernels.ops import checks
from grokkernels.ops.adamw import adamw, global_norm

_STATE = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's update, in one pass over memory per parameter group.

    Parameters may be float32, bfloat16 or float16 (float64 on the reference), gradients have their dtype; the moments
    are float32 whatever the parameters are. Groups have their own lr, betas, eps, weight_decay and maximize; state
    dicts are exchanged with torch.optim.AdamW in both directions (it keeps the moments of 16-bit parameters in 16
    bits, and so rounds them when it loads ours).

    Args:
        params: parameters or groups of them, as for any optimizer.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        max_norm: clip the norm of all gradients, over all groups together, at this; None does not clip. Gradients
            themselves are left as they are. A step whose norm is not finite is skipped, with the state unchanged,
            and counted in `skipped_steps`. Without a max_norm nothing looks at the gradients: NaN reaches the
            parameters, as in torch.optim.AdamW.
        maximize: ascend.
        backend: who computes; see `grokkernels.use`.

    Attributes:
        grad_norm: of the last step, before clipping: () float32; None without a max_norm, or before the first step.

    Errors: ValueError for a hyperparameter out of range or a sparse gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
        maximize: bool = False,
        backend: str | None = None,
    ) -> None:
        if max_norm is not None:
            checks.at_least("max_norm", max_norm, 0.0)
        self.max_norm = max_norm
        self.backend = backend
        self.grad_norm: torch.Tensor | None = None
        self._skipped: torch.Tensor | int = 0
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far because the norm of the gradients was not finite."""
        return int(self._skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            checks.at_least(name, float(group[name]), 0.0)
        if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step; with a closure that computes the loss anew, returns that loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        self._refuse_sparse(groups)
        if self.max_norm is not None:
            grads = [p.grad for _, params in groups for p in params]
            self.grad_norm = global_norm(grads, backend=self.backend)
            self._skipped = self._skipped + (~torch.isfinite(self.grad_norm)).long()
        for group, params in groups:
            if not params:
                continue
            states = [self._state_of(p) for p in params]
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                max_norm=self.max_norm,
                norm=self.grad_norm if self.max_norm is not None else None,
                maximize=group["maximize"],
                backend=self.backend,
            )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state dict of this class or of torch.optim.AdamW (without amsgrad)."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("state_dict comes from an AdamW with amsgrad=True, which this optimizer does not have")
        super().load_state_dict(state_dict)
        # torch.optim.Optimizer has rounded the moments to the dtype of their parameter: take them as they were saved.
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, param in zip(saved, chain.from_iterable(g["params"] for g in self.param_groups), strict=True):
            if key not in state_dict["state"]:
                continue
            state, loaded = self.state[param], state_dict["state"][key]
            state["step"] = torch.as_tensor(loaded["step"]).detach().to(param.device, torch.float32).clone()
            for name in _STATE:
                state[name] = _moment_of(param).copy_(loaded[name])

    def __getstate__(self) -> dict[str, Any]:
        own = {"max_norm": self.max_norm, "backend": self.backend}
        return {**super().__getstate__(), **own, "grad_norm": self.grad_norm, "_skipped": self._skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for name in _STATE:
                state[name] = _moment_of(param)
        return state

    @staticmethod
    def _refuse_sparse(groups: list[tuple[dict[str, Any], list[torch.Tensor]]]) -> None:
        for group, (_, params) in enumerate(groups):
            for i, p in enumerate(params):
                if p.grad.layout != torch.strided:
                    raise ValueError(
                        f"the gradient of parameter {i} with a gradient in group {group}, shape {tuple(p.shape)}, is "
                        f"sparse (layout {p.grad.layout}): AdamW takes dense gradients only"
                    )


def _moment_of(param: torch.Tensor) -> torch.Tensor:
    """Zeros laid out like the parameter, in the dtype of its moments."""
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
