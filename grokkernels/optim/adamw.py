"""AdamW with the clipping of the global norm inside the update."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from grokkernels.ops import checks
from grokkernels.ops.adamw import adamw, global_norm

_STATE = ("exp_avg", "exp_avg_sq")
# torch.optim.AdamW's options beyond the numbers; groups carry them, so that state dicts are the same on both sides.
_OPTIONS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
_REFUSED = {
    "amsgrad": "the largest second moment so far is not kept",
    "differentiable": "the step has no derivative",
}


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's update, in one pass over memory per parameter group; its arguments in its order.

    Parameters may be float32, bfloat16 or float16 (float64 on the reference), gradients have their dtype; the moments
    are float32 whatever the parameters are. Groups have their own lr, betas, eps, weight_decay and maximize; state
    dicts are exchanged with torch.optim.AdamW in both directions (it keeps the moments of 16-bit parameters in 16
    bits, and so rounds them when it loads ours).

    Args:
        params: parameters or groups of them, as for any optimizer.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW. The host reads a tensor (of one element) at each step.
        maximize: ascend.
        foreach, fused, capturable: how torch.optim.AdamW computes its step. They change nothing here, where a step can
            be captured in a CUDA graph in any case.
        amsgrad, differentiable: refused unless False.
        max_norm: clip the norm of all gradients, over all groups together, at this; None does not clip. Gradients
            themselves are left as they are. A step whose norm is not finite is skipped, with the state unchanged,
            and counted in `skipped_steps`. Without a max_norm nothing looks at the gradients: NaN reaches the
            parameters, as in torch.optim.AdamW.
        backend: who computes; see `grokkernels.use`.

    Attributes:
        grad_norm: of the last step, before clipping: () float32; None without a max_norm, or before the first step.

    Errors: ValueError for a hyperparameter out of range, an option that is not had, a parameter that is given twice, a
        sparse gradient, or a state dict that is no AdamW's or does not fit the parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        if max_norm is not None:
            checks.at_least("max_norm", max_norm, 0.0)
        self.max_norm = max_norm
        self.backend = backend
        self.grad_norm: torch.Tensor | None = None
        self._skipped: torch.Tensor | int = 0
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options = {"amsgrad": amsgrad, "maximize": maximize, "foreach": foreach, "capturable": capturable}
        options |= {"differentiable": differentiable, "fused": fused}
        super().__init__(params, {**defaults, **_OPTIONS, **options})

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far because the norm of the gradients was not finite."""
        return int(self._skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_options(param_group)
            _check_distinct(param_group["params"])
        except Exception:
            self.param_groups.pop()
            raise

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
        """Takes over a state dict of this class or of torch.optim.AdamW (without amsgrad); all of it or nothing."""
        loaded: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, found: dict[str, Any]) -> None:
            self._check_state_dict(found)
            loaded.update(found)

        # Inside the user's hooks: what those before loading return is looked at, those after it see the final state.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._take_state(loaded), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Errors: ValueError for what torch.optim.Optimizer would take over and AdamW cannot go on from."""
        if not {"state", "param_groups"} <= set(state_dict):
            raise ValueError(f"state_dict must have the keys state and param_groups, got {', '.join(state_dict)}")
        for number, group in enumerate(state_dict["param_groups"]):
            missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
            if missing:
                raise ValueError(f"state_dict is no AdamW's: its group {number} has no {', '.join(missing)}")
            if not group.get("decoupled_weight_decay", True) and group["weight_decay"] != 0:
                raise ValueError(
                    f"state_dict is Adam's: the weight_decay {group['weight_decay']} of its group {number} goes into "
                    "the gradients (L2), AdamW's does not; with a weight_decay of 0 in the state_dict it can be loaded"
                )
            _check_options({**_OPTIONS, **group})
        for key, param in self._saved_params(state_dict):
            state = state_dict["state"].get(key)
            if state:
                _check_state(f"state_dict['state'][{key!r}]", state, param)

    def _saved_params(self, state_dict: dict[str, Any]) -> list[tuple[Any, torch.Tensor]]:
        """The keys of the saved state beside our parameters; where their numbers differ, Optimizer refuses the load."""
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        return list(zip(saved, ours, strict=False))

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        """Takes the moments as they were saved: Optimizer has rounded them to the dtype of their parameter."""
        for key, param in self._saved_params(state_dict):
            loaded = state_dict["state"].get(key)
            if not loaded:
                continue
            state = self.state[param]
            state["step"] = torch.tensor(float(loaded["step"]), dtype=torch.float32, device=param.device)
            for name in _STATE:
                state[name] = _moment_of(param).copy_(loaded[name])

    def __getstate__(self) -> dict[str, Any]:
        own = {"max_norm": self.max_norm, "backend": self.backend}
        return {**super().__getstate__(), **own, "grad_norm": self.grad_norm, "_skipped": self._skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in _OPTIONS.items():
                group.setdefault(name, value)
            group["decoupled_weight_decay"] = True

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


def _check_options(group: dict[str, Any]) -> None:
    lr = group["lr"]
    numbers = {name: _number(name, group[name]) for name in ("lr", "eps", "weight_decay")}
    for name, number in numbers.items():
        checks.at_least(name, number, 0.0)
    betas = [_number(f"betas[{i}]", beta) for i, beta in enumerate(group["betas"])]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")
    for name, why in _REFUSED.items():
        if group[name]:
            raise ValueError(f"{name}={group[name]!r} is not supported by this AdamW, only False: {why}")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["capturable"] and isinstance(lr, torch.Tensor):
        raise ValueError(
            "lr as a Tensor is not supported for capturable=True: a captured step keeps the number that lr had"
        )


def _number(name: str, value: Any) -> Any:
    """A hyperparameter that may be a tensor of one element, as a number."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    return value.item()


def _check_distinct(params: list[torch.Tensor]) -> None:
    first: dict[torch.Tensor, int] = {}
    for i, param in enumerate(params):
        if param in first:
            raise ValueError(f"params[{i}] of a parameter group is params[{first[param]}] again: give each one once")
        first[param] = i


def _check_state(where: str, state: dict[str, Any], param: torch.Tensor) -> None:
    if set(state) != {"step", *_STATE}:
        raise ValueError(f"{where} must have step, {', '.join(_STATE)} and nothing else, got {', '.join(state)}")
    for name in _STATE:
        moment = state[name]
        if not isinstance(moment, torch.Tensor) or not moment.is_floating_point():
            kind = moment.dtype if isinstance(moment, torch.Tensor) else type(moment).__name__
            raise ValueError(f"{where}['{name}'] must be a tensor of floating-point numbers, got {kind}")
        if moment.shape != param.shape:
            raise ValueError(
                f"{where}['{name}'] must have the shape of its parameter, {tuple(param.shape)}, "
                f"got {tuple(moment.shape)}"
            )
    step = _number(f"{where}['step']", state["step"])
    if not (0 <= step < float("inf") and step == int(step)):
        raise ValueError(f"{where}['step'] must be a whole number >= 0, got {step!r}")
