"""`cosine` makes unit vectors, whatever it is given."""

from __future__ import annotations

import pytest
import torch

from memtrans_kernels import cosine


def test_results_are_unit_vectors_along_the_input():
    query, key = torch.randn(2, 3, 5, 8), 1e4 * torch.randn(2, 1, 7, 8)
    for unit, tensor in zip(cosine(query, key), (query, key), strict=True):
        torch.testing.assert_close(unit, tensor / tensor.norm(dim=-1, keepdim=True))


def test_a_zero_vector_stays_zero_with_a_finite_gradient():
    query = torch.zeros(1, 1, 1, 4, requires_grad=True)
    unit, _ = cosine(query, torch.ones(1, 1, 1, 4))
    unit.sum().backward()
    assert torch.equal(unit, torch.zeros_like(unit)) and query.grad.isfinite().all()


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


def test_large_half_precision_vectors_do_not_overflow():
    unit, _ = cosine(torch.full((1, 1, 1, 64), 6e4, dtype=torch.float16), torch.ones(1, 1, 1, 64, dtype=torch.float16))
    torch.testing.assert_close(unit, torch.full_like(unit, 0.125))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"key must be as wide as query, D=4, got 5"):
        cosine(torch.ones(1, 4), torch.ones(1, 5))
    with pytest.raises(TypeError, match=r"query must be floating point, got torch.int64"):
        cosine(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4))
