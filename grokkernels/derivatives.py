"""What PyTorch asks of a native function beside its kernel: derivatives, and batches of calls under torch.vmap.

A native function has at most its first derivative, in reverse mode. Every other one is refused, where PyTorch by itself
would go on without it: the derivative of a function that has none (those of backward passes above all: the second
derivative), and forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

transformed = _C._are_functorch_transforms_active
"""Whether a transform of torch.func is at work: its tensors stand for others, and show neither values nor all of what
asks for gradients."""


def wanted(*tensors: torch.Tensor) -> bool:
    """Whether the derivative of a call with these tensors may be asked for."""
    return torch.is_grad_enabled() and (any(tensor.requires_grad for tensor in tensors) or transformed())


def register(
    library: torch.library.Library,
    overload: torch._ops.OpOverload,
    fake: Callable[..., Any],
    backend: str,
    public_name: Callable[[], str],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
    constants: tuple[str, ...],
) -> Callable[..., Any]:
    """Gives `overload` a derivative, `backward` or a refusal, and a rule for torch.vmap. Returns what calls it.

    `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` are as in torch.library.register_autograd;
    gradients that never arrived are None, and ctx.backend is `backend`. `public_name` gives the op's name for an
    error's sentence. Arguments named in `constants` get no gradient, and none may be asked for.
    """
    op = overload._op  # what the overload itself calls, without its 0.4 microseconds

    names = [argument.name for argument in overload._schema.arguments]
    constant_places = [(names.index(name), name) for name in constants]

    def refused(*_: Any) -> Any:
        raise NotImplementedError(
            f"{public_name()} has no second derivative in its kernels: call it with backend='reference' for one"
        )

    def forward(ctx: Any, *args: Any) -> Any:
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        for place, name in constant_places:
            if ctx.needs_input_grad[place]:
                raise ValueError(
                    f"{name} must not require a gradient: {public_name()}'s kernels take it for a constant"
                )
        if transformed():  # the level below may ask for derivatives of its own, which PyTorch switches off in here
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _C._AutoDispatchBelowAutograd():
                output = op(*args)
        else:
            with _C._AutoDispatchBelowAutograd():
                output = op(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward or refused)}
    # Function.apply without the Python that torch.func needs and a call pays for: `autograd` is one level of it.
    derivative = type(overload.name().replace("::", "_").replace(".", "_"), (torch.autograd.Function,), methods)
    apply = super(torch.autograd.Function, derivative).apply

    def autograd(*args: Any) -> Any:
        """The kernel of PyTorch's dispatch key for derivatives: one level of them."""
        if forward_ad._current_level >= 0:
            _refuse_tangents(args, public_name)
        if not (torch.is_grad_enabled() and _C._any_requires_grad(*args)):
            with _C._AutoDispatchBelowAutograd():
                return op(*args)
        before = _C._functorch.get_single_level_autograd_function_allowed()
        _C._functorch.set_single_level_autograd_function_allowed(True)
        try:
            return apply(*args)
        finally:
            _C._functorch.set_single_level_autograd_function_allowed(before)

    def call(*args: Any) -> Any:
        """Calls the kernel past PyTorch's dispatch to `autograd` where nothing but autograd itself can ask: that way
        through Python takes 7 microseconds, more than a small kernel."""
        if torch.compiler.is_compiling() or transformed() or forward_ad._current_level >= 0:
            return overload(*args)
        if torch.is_grad_enabled() and _C._any_requires_grad(*args):
            args = unwrap_dead_wrappers(args)  # what a transform that is over left in a backward pass
            if _C._any_requires_grad(*args):
                return apply(*args)
        with _C._AutoDispatchBelowAutograd():
            return op(*args)

    library.impl(overload.name().removeprefix("grokkernels::"), autograd, "Autograd")
    if not overload._schema.is_mutable:
        torch.library.register_vmap(overload.name(), _one_by_one(overload, fake), lib=library)
    return call


def _refuse_tangents(args: tuple[Any, ...], public_name: Callable[[], str]) -> None:
    for leaf in tree_leaves(args):
        if isinstance(leaf, torch.Tensor) and forward_ad.unpack_dual(leaf).tangent is not None:
            raise NotImplementedError(
                f"{public_name()} has no forward-mode derivative in its kernels (torch.func.jvp, jacfwd, hessian, "
                "linearize): differentiate in reverse mode, or call it with backend='reference'"
            )


def _one_by_one(overload: torch._ops.OpOverload, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for torch.vmap: one call for each sample, so that a sample gives what it gives alone."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def sample(take: Callable[[torch.Tensor, int], torch.Tensor]) -> list[Any]:
            return tree_map(lambda leaf, dim: leaf if dim is None else take(leaf, dim), list(args), list(in_dims))

        if info.batch_size == 0:
            outputs = fake(*sample(lambda leaf, dim: leaf.new_empty(leaf.shape[:dim] + leaf.shape[dim + 1 :])))
            return tree_map(lambda leaf: leaf.new_empty((0, *leaf.shape)), outputs), 0
        each = [sample(lambda leaf, dim, i=i: leaf.select(dim, i)) for i in range(info.batch_size)]
        outputs = [overload(*arguments) for arguments in each]
        return tree_map(lambda *parts: torch.stack(parts), *outputs), 0

    return rule
