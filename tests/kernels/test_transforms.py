"""torch.func, forward mode, second derivatives: the reference's are right, and the others say that they have none."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import DIFFERENTIABLE, attention_inputs
from helpers.checks import SAME_FORMULA, assert_close
from torch.autograd import forward_ad

from memtrans_kernels import cosine, memory_attention

WITHOUT = ["auto", "native"]
TRANSFORMS = {
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "vjp": lambda function, x: torch.func.vjp(function, x)[1](torch.ones_like(function(x)))[0],
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda function, x: torch.func.jacfwd(lambda x: function(x).sum())(x),
    "jacrev": lambda function, x: torch.func.jacrev(lambda x: function(x).sum())(x),
}


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    inputs = attention_inputs(torch.float64, entries=(2,), local_length=True)
    return {name: tensor.detach() for name, tensor in inputs.items()}


def attention_of(inputs, name, backend):
    """Attention as a function of one of its arguments, (..., D + 1): out and lse."""

    def function(tensor):
        out, lse = memory_attention(**{**inputs, name: tensor}, backend=backend)
        return torch.cat((out.sin(), lse[..., None]), dim=-1)

    return function


def unit_vectors(backend):
    return lambda x: cosine(x, x.flip(1), torch.float64, backend=backend)[0].sin() + cosine(x, x, backend=backend)[1]


def derivative(function, x, direction):
    """By central differences along `direction`."""
    return (function(x + 1e-6 * direction) - function(x - 1e-6 * direction)) / 2e-6


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_21_14_torch_func_gives_the_gradients_of_eager_autograd(inputs, name):
    if name not in inputs:
        pytest.skip("not given here")
    function = attention_of(inputs, name, "reference")
    x = inputs[name].clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    for transform in ("grad", "vjp", "jacfwd", "jacrev"):
        assert_close(TRANSFORMS[transform](function, x.detach()), expected, SAME_FORMULA, transform)


@pytest.mark.parametrize("name", ["key", "value", "scale", "bias_table", "memory_offset"])
def test_21_14_forward_mode_gives_the_derivative_along_a_direction(inputs, name):
    """Of the query too, whose scores are handed in: there the reverse mode is what it is compared with, above."""
    function, direction = attention_of(inputs, name, "reference"), torch.randn_like(inputs[name])
    expected = derivative(function, inputs[name], direction)
    torch.testing.assert_close(
        torch.func.jvp(function, (inputs[name],), (direction,))[1], expected, rtol=1e-6, atol=1e-8
    )
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(inputs[name], direction))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected, rtol=1e-6, atol=1e-8)


def test_21_14_cosine_through_every_transform():
    torch.manual_seed(0)
    x, function = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), unit_vectors("reference")
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    for transform in ("grad", "vjp", "jacfwd", "jacrev"):
        assert_close(TRANSFORMS[transform](function, x.detach()), expected, SAME_FORMULA, transform)
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("name", ["value", "scale", "bias_table", "memory_offset", "key"])
def test_21_14_second_derivatives_of_the_reference(inputs, name):
    function, x = attention_of(inputs, name, "reference"), inputs[name].clone().requires_grad_()

    def gradient(x):
        return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]

    upstream, direction = torch.randn_like(x), torch.randn_like(x)
    (second,) = torch.autograd.grad((gradient(x) * upstream).sum(), x)
    expected = (derivative(gradient, x.detach().requires_grad_(), direction) * upstream).sum()
    torch.testing.assert_close((second * direction).sum(), expected, rtol=1e-5, atol=1e-7)
    nested = torch.func.grad(lambda x: (TRANSFORMS["grad"](function, x) * upstream).sum())(x.detach())
    assert_close(nested, second, SAME_FORMULA)


@pytest.mark.parametrize("backend", WITHOUT)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_21_14_other_backends_refuse_transforms(inputs, backend, transform):
    message = f"with backend='reference' alone, got backend='{backend}'"
    with pytest.raises(NotImplementedError, match=f"memory_attention has derivatives by torch.func .*{message}"):
        TRANSFORMS[transform](attention_of(inputs, "query", backend), inputs["query"])
    with pytest.raises(NotImplementedError, match=r"cosine has derivatives by torch\.func and in forward mode"):
        TRANSFORMS[transform](unit_vectors("auto"), inputs["query"])


def test_21_14_other_backends_refuse_duals_and_second_derivatives(inputs):
    x = inputs["query"].clone().requires_grad_()
    function = attention_of(inputs, "query", "auto")
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="in forward mode with backend='reference'"):
        function(forward_ad.make_dual(x, x))
    (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    assert_close(grad, torch.autograd.grad(function(x).sum(), x)[0], SAME_FORMULA)
    with pytest.raises(NotImplementedError, match="memory_attention has second derivatives with backend='reference'"):
        torch.autograd.grad(grad.sum(), x)
    (grad,) = torch.autograd.grad(unit_vectors("auto")(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cosine has second derivatives with backend='reference' alone"):
        torch.autograd.grad(grad.sum(), x)


def test_the_environment_may_ask_for_the_reference(inputs, monkeypatch):
    monkeypatch.setenv("MEMTRANS_BACKEND", "reference")
    assert TRANSFORMS["jvp"](attention_of(inputs, "query", "auto"), inputs["query"]).abs().sum() > 0
