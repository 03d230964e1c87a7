"""Derivatives and transforms beyond one backward pass: right, or refused in words; never terms that are dropped.

What every op is held to stands in tests/suite.py; here is what one op shows for all.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import grokkernels as gk
from grokkernels import dispatch
from tests.suite import native_calls

REFUSED_TWICE = "has no second derivative in its kernels: call it with backend='reference'"
REFUSED_FORWARD = "has no forward-mode derivative in its kernels"


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


WEIGHT = torch.linspace(0.5, 1.5, 8)


def norm(x: torch.Tensor) -> torch.Tensor:
    return gk.rms_norm(x, WEIGHT)


def loss(x: torch.Tensor) -> torch.Tensor:
    return norm(x).pow(3).sum()


def plain_loss(x: torch.Tensor) -> torch.Tensor:
    return gk.rms_norm(x, WEIGHT, backend="reference").pow(3).sum()


@pytest.mark.parametrize("cotangent_needs_grad", [True, False])
def test_gradient_penalty_is_refused(x: torch.Tensor, cotangent_needs_grad: bool) -> None:
    """Whether the second derivative goes through the cotangent or through what the forward pass saved alone; beside a
    term that is right without it, so that nothing else would complain."""
    leaf = x.requires_grad_()
    y = norm(leaf)
    total = y.square().sum() if cotangent_needs_grad else (y * WEIGHT).sum()
    (dx,) = torch.autograd.grad(total, leaf, create_graph=True)
    penalty = dx.square().sum() + leaf.square().sum()
    with pytest.raises(NotImplementedError, match=f"rms_norm {REFUSED_TWICE}"):
        penalty.backward()


def test_create_graph_alone_is_no_second_derivative(x: torch.Tensor) -> None:
    leaf = x.requires_grad_()
    (kept,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (dx,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(kept, dx)


def test_no_second_derivative_where_none_is_asked(x: torch.Tensor) -> None:
    """A vjp called outside of its transform, on tensors that the transform wrapped: the result asks for nothing."""
    y, back = vjp(norm, x)
    (dx,) = back(torch.ones_like(y))
    assert not dx.requires_grad
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(dx, torch.autograd.grad(norm(leaf).sum(), leaf)[0])
    cotangent = torch.ones_like(y).requires_grad_()
    with pytest.raises(NotImplementedError, match=REFUSED_TWICE):
        back(cotangent)[0].sum().backward()


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda f, x: jvp(f, (x,), (torch.ones_like(x),)), REFUSED_FORWARD),
        (lambda f, x: jacfwd(f)(x), REFUSED_FORWARD),
        (lambda f, x: linearize(f, x)[1](torch.ones_like(x)), REFUSED_FORWARD),
        (lambda f, x: hessian(f)(x), REFUSED_FORWARD),
        (lambda f, x: jvp(grad(f), (x,), (torch.ones_like(x),)), REFUSED_FORWARD),
        (lambda f, x: vmap(lambda t: jvp(f, (x,), (t,)))(torch.ones(2, *x.shape)), REFUSED_FORWARD),
        (lambda f, x: grad(lambda x: grad(f)(x).square().sum())(x), REFUSED_TWICE),
        (lambda f, x: jacrev(grad(f))(x), REFUSED_TWICE),
        (lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x)), REFUSED_TWICE),
        (lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x)), REFUSED_TWICE),
        (lambda f, x: torch.autograd.functional.hessian(f, x), REFUSED_TWICE),
    ],
)
def test_transforms_that_need_more_are_refused(x: torch.Tensor, transform: Callable[..., object], words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        transform(loss, x)
    transform(plain_loss, x)


def test_the_reference_is_right_in_both(x: torch.Tensor) -> None:
    """Forward over reverse, reverse over reverse and differences agree."""
    x, t = x.double(), torch.linspace(-1, 1, x.numel()).view_as(x).double()
    twice = torch.autograd.functional.hvp(plain_loss, x, t)[1]
    torch.testing.assert_close(jvp(grad(plain_loss), (x,), (t,))[1], twice)
    step = 1e-5
    difference = (grad(plain_loss)(x + step * t) - grad(plain_loss)(x - step * t)) / (2 * step)
    torch.testing.assert_close(twice, difference, rtol=1e-6, atol=1e-6)


def test_tangents_where_gradients_are_off(x: torch.Tensor) -> None:
    """torch.no_grad leaves forward mode on; what is rotated in place would keep a stale tangent."""
    cos, sin = gk.rotary_tables(8, 4)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x.clone().view(1, 3, 1, 8), torch.ones(1, 3, 1, 8))
        with pytest.raises(NotImplementedError, match=f"rotary {REFUSED_FORWARD}"):
            gk.rotary(dual, None, cos, sin, inplace=True)
        assert torch.equal(forward_ad.unpack_dual(dual).primal, x.view(1, 3, 1, 8))  # nothing was written
        norm(x)  # no tangent, nothing to refuse


def test_second_derivative_of_a_rotation(x: torch.Tensor) -> None:
    """A linear op, whose backward pass is the op itself: it has every derivative in reverse mode."""
    cos, sin = gk.rotary_tables(8, 4)

    def penalty(backend: str) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        turned, _ = gk.rotary(leaf.view(1, 3, 1, 8), None, cos, sin, backend=backend)
        (dx,) = torch.autograd.grad(turned.pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaf)[0]

    torch.testing.assert_close(penalty("cpu"), penalty("reference"))


def test_jacobian(x: torch.Tensor) -> None:
    """jacrev asks for all rows at once: the cotangent is a batch, what the forward pass saved is not."""
    expected = torch.autograd.functional.jacobian(norm, x)
    torch.testing.assert_close(jacrev(norm)(x), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(norm, x, vectorize=True), expected)


def test_nested_batches(x: torch.Tensor) -> None:
    pairs = torch.stack([x, x + 1, x - 1, 2 * x]).view(2, 2, 3, 8)
    expected = torch.stack([norm(row) for row in pairs.flatten(0, 1)]).view_as(pairs)
    assert torch.equal(vmap(vmap(norm))(pairs), expected)
    assert torch.equal(vmap(norm, in_dims=2, out_dims=2)(pairs[0].movedim(0, 2)), expected[0].movedim(0, 2))
    assert vmap(norm)(x.new_empty(0, 3, 8)).shape == (0, 3, 8)


def test_gradients_per_sample_of_a_module(x: torch.Tensor) -> None:
    """The usual form: parameters for all, samples one by one."""
    module = torch.nn.Linear(8, 8)
    parameters = dict(module.named_parameters())
    targets = torch.tensor([1, 5, 2])

    def sample_loss(parameters: dict[str, torch.Tensor], row: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = functional_call(module, parameters, (norm(row[None]),))
        return gk.cross_entropy(logits, target[None], softcap=30.0)

    got = vmap(grad(sample_loss), in_dims=(None, 0, 0))(parameters, x, targets)
    for row in range(3):
        expected = torch.autograd.grad(sample_loss(parameters, x[row], targets[row]), list(parameters.values()))
        torch.testing.assert_close([part[row] for part in got.values()], list(expected))


def test_targets_outside_are_refused_under_vmap(x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="targets"):
        vmap(gk.cross_entropy, in_dims=(0, None))(x.view(1, 3, 8), torch.tensor([0, 8, 1]))


def test_rotation_in_place_under_transforms(x: torch.Tensor) -> None:
    """In place or not, the same derivative, also where the outermost transform is the one that differentiates."""
    cos, sin = gk.rotary_tables(8, 4)

    def turned(q: torch.Tensor, inplace: bool) -> torch.Tensor:
        return gk.rotary((q * 1.0).view(1, 3, 1, 8), None, cos, sin, inplace=inplace)[0].pow(3).sum()

    both = torch.stack([x, x + 1])
    for transform in (lambda f: vmap(grad(f)), lambda f: grad(lambda q: vmap(f)(q).sum())):
        got = transform(lambda q: turned(q, True))(both)
        torch.testing.assert_close(got, transform(lambda q: turned(q, False))(both))


def test_gradients_that_only_the_reference_has(x: torch.Tensor) -> None:
    """A table or a slope that asks for a gradient is seen under a batch too, whose wrapper does not say so."""
    cos, sin = gk.rotary_tables(8, 4)
    q = x.view(1, 3, 1, 8)

    def through_tables(cos: torch.Tensor) -> torch.Tensor:
        return vmap(lambda s: gk.rotary(q * s, None, cos * s, sin)[0].sum())(torch.ones(2)).sum()

    with pytest.raises(ValueError, match="cos must not require a gradient: rotary's kernels take it for a constant"):
        grad(through_tables)(cos)

    def through_slopes(slopes: torch.Tensor) -> torch.Tensor:
        return vmap(lambda s: gk.flash_attention(q, q, q, alibi_slopes=slopes * s).sum())(torch.ones(2)).sum()

    with pytest.raises(ValueError, match="alibi_slopes must not require a gradient"):
        grad(through_slopes)(torch.ones(1))


@pytest.mark.parametrize(
    "transform",
    [grad(loss), vmap(grad(loss)), vmap(loss)],
    ids=["grad", "vmap grad", "vmap"],
)
def test_compiled_transforms(x: torch.Tensor, transform: Callable[..., torch.Tensor]) -> None:
    torch._dynamo.reset()
    given = torch.stack([x, x + 1])
    torch.testing.assert_close(torch.compile(transform, backend="aot_eager")(given), transform(given))


def test_compiled_and_refused(x: torch.Tensor) -> None:
    """Compiled, the same two are errors as well: PyTorch's own of a compiled graph's second derivative, and ours."""
    torch._dynamo.reset()
    leaf = x.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (dx,) = torch.autograd.grad(compiled(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        dx.square().sum().backward()
    pushed = torch.compile(lambda x: jvp(loss, (x,), (torch.ones_like(x),)), backend="aot_eager")
    with pytest.raises(Exception, match=REFUSED_FORWARD):
        pushed(x.detach())


def test_compiled_autograd(x: torch.Tensor) -> None:
    """The backward pass as a graph of its own: what torch.compile makes of autograd's, our derivatives among it."""
    torch._dynamo.reset()
    leaf = x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        (got,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(got, expected)


def test_experts_keep_what_a_backward_pass_needs() -> None:
    """moe_experts keeps gate and up for a backward pass alone: compiled without gradients it does not, and it does
    where a transform's tensors hide that one asks."""
    weights, indices = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32)
    routing = gk.Routing(weights, indices, indices.new_zeros(1), weights.new_zeros(()), weights.new_zeros(()))
    tensors = torch.ones(2, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4), torch.ones(1, 4, 3)
    kept = []

    def experts(x: torch.Tensor) -> torch.Tensor:
        return gk.moe_experts(x, *tensors[1:], routing)

    def look(module: torch.fx.GraphModule, example: object) -> Callable[..., object]:
        kept.extend(node.args[-1] for node in module.graph.nodes if "moe_experts_fwd" in str(node.target))
        return module.forward

    torch._dynamo.reset()
    for function in (experts, lambda x: vmap(experts)(x[None])):
        torch.compile(function, fullgraph=True, backend=look)(tensors[0])
    assert kept == [False, True]
    (call,) = native_calls(lambda: experts(tensors[0]))
    assert call[1][-1] is False


def test_gradient_stays_on_the_backend_of_the_call(x: torch.Tensor) -> None:
    leaf = x.requires_grad_()
    y = gk.rms_norm(leaf, WEIGHT, backend="emulated")
    with gk.use("reference"):
        calls = native_calls(lambda: y.sum().backward())
    assert [str(func) for func, _, _ in calls] == ["grokkernels.rms_norm_bwd.emulated"]


def test_every_native_function_has_its_rules() -> None:
    """Each overload has a derivative or a refusal, and each that writes into nothing a rule for batches."""
    for name, function in dispatch.FUNCTIONS.items():
        for overload in {dispatch.OVERLOADS[backend] for backend in function.calls}:
            full = f"grokkernels::{name}.{overload}"
            schema = getattr(getattr(torch.ops.grokkernels, name), overload)._schema
            assert torch._C._dispatch_has_kernel_for_dispatch_key(full, "Autograd"), full
            assert torch._C._dispatch_has_kernel_for_dispatch_key(full, "FuncTorchBatched") != schema.is_mutable, full
