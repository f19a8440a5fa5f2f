"""`cosine` makes unit vectors, whatever it is given."""

from __future__ import annotations

import pytest
import torch
from helpers.devices import live_backends

from memtrans_kernels import cosine

pytestmark = pytest.mark.device

BACKENDS = live_backends("cosine")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@on_every_backend
@pytest.mark.parametrize("width", [1, 8, 96])
def test_results_are_unit_vectors_along_the_input_whatever_its_layout(backend, width):
    query = torch.randn(2, 5, 3, width).transpose(1, 2)
    key = 1e4 * torch.randn(2, 1, 7, 2 * width)[..., width:]
    for unit, tensor in zip(cosine(query, key, backend=backend), (query, key), strict=True):
        torch.testing.assert_close(unit, tensor / tensor.norm(dim=-1, keepdim=True))
        assert unit.is_contiguous()


@on_every_backend
def test_gradients_equal_those_of_the_formula_in_float64(backend):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 3, 24).transpose(1, 2), torch.randn(2, 1, 7, 24)]
    upstream = [torch.randn(2, 3, 5, 24), torch.randn(2, 7, 1, 24).transpose(1, 2)]
    for tensor, grad in zip(inputs, upstream, strict=True):
        tensor.requires_grad_()
        wide = tensor.detach().double().requires_grad_()
        (wide / wide.norm(dim=-1, keepdim=True)).backward(grad.double())
        tensor.expected = wide.grad.float()
    torch.autograd.backward(cosine(*inputs, backend=backend), upstream)
    for tensor in inputs:
        torch.testing.assert_close(tensor.grad, tensor.expected)


@on_every_backend
def test_a_zero_vector_stays_zero_with_a_finite_gradient(backend):
    query = torch.zeros(1, 1, 1, 4, requires_grad=True)
    unit, _ = cosine(query, torch.ones(1, 1, 1, 4), backend=backend)
    unit.sum().backward()
    assert torch.equal(unit, torch.zeros_like(unit)) and query.grad.isfinite().all()


@on_every_backend
@pytest.mark.parametrize("size", [1e-22, 1e22, 1e37])
def test_21_13_no_square_leaves_the_range_of_its_dtype(backend, size):
    direction = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    tensor = (size * direction).float().requires_grad_()
    unit, _ = cosine(tensor, torch.ones(1, 8), backend=backend)
    (grad,) = torch.autograd.grad(unit, tensor, torch.ones_like(unit))
    wide = tensor.detach().double().requires_grad_()
    expected = wide / (wide.detach() if size < 1e-12 else wide).norm(dim=-1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(unit, expected.float())
    torch.testing.assert_close(
        size * grad.double(), size * torch.autograd.grad(expected.sum(), wide)[0], rtol=1e-5, atol=1e-5
    )


def test_21_13_no_square_leaves_the_range_of_float64():
    tensor = torch.tensor([[3e200, 4e200]], dtype=torch.float64)
    torch.testing.assert_close(cosine(tensor, tensor)[0], torch.tensor([[0.6, 0.8]], dtype=torch.float64))


def test_gradcheck():
    query, key = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randn(2, 1, 5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(cosine, (query.requires_grad_(), key.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_casts_both_results_and_gradients_keep_the_inputs_dtype(dtype):
    query, key = torch.randn(1, 1, 2, 4, requires_grad=True), torch.randn(1, 1, 2, 4, requires_grad=True)
    results = cosine(query, key, dtype)
    assert all(result.dtype == dtype for result in results)
    sum(result.float().square().sum() for result in results).backward()
    assert query.grad.dtype == key.grad.dtype == torch.float32


@on_every_backend
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.float16, 6e-8), (torch.float32, 1e18)])
def test_large_and_tiny_vectors_keep_their_direction(backend, dtype, size):
    vector = torch.full((1, 1, 1, 64), size, dtype=dtype)
    for unit in cosine(vector, vector, backend=backend):
        torch.testing.assert_close(unit, torch.full_like(unit, 0.125))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"query and key must have shape \(..., D\), of one D, got .*4\) and .*5\)"):
        cosine(torch.ones(1, 4), torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"query and key must have shape \(..., D\), of one D, got \(\) and \(\)"):
        cosine(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"dtype must be floating point, got torch.int32"):
        cosine(torch.ones(1, 4), torch.ones(1, 4), torch.int32)
    with pytest.raises(TypeError, match=r"query must be floating point, got torch.int64"):
        cosine(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4))
