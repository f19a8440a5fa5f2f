"""Unit queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels import checks, ops
from memtrans_kernels.backends import check_name


def cosine(
    query: Tensor, key: Tensor, dtype: torch.dtype | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Makes every query and key a unit vector, `x / max(|x|, 1e-12)` along D; differentiable.

    Args:
        query: (..., D), floating point.
        key: (..., D), floating point.
        dtype: of both results. Default: each keeps its own. The arithmetic is float32 at least.
        backend: one of `auto`, `reference`, `triton`.

    Returns:
        The unit vectors of query and of key, contiguous, in their shapes.

    Raises:
        TypeError: query, key or `dtype` is not floating point.
        ValueError: their widths or devices differ.
        RuntimeError: the named backend cannot run.
        NotImplementedError: second derivatives, torch.func.grad and jvp, with another backend than `reference`.

    Source: Henry et al. 2020 (arXiv 2010.04245); Wu et al. 2022, section 3.3 normalise keys and queries.

    >>> query, key = cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))
    >>> query.tolist(), key.tolist()
    ([[0.6000000238418579, 0.800000011920929]], [[0.0, 1.0]])
    """
    _check(query, key, dtype)
    return ops.cosine(query, key, dtype, check_name(backend))


@checks.remembered
def _check(query: Tensor, key: Tensor, dtype: torch.dtype | None) -> None:
    checks.floating(query=query, key=key)
    checks.same_device(query.device, key=key)
    if query.dim() == 0 or query.shape[-1:] != key.shape[-1:]:
        raise ValueError(
            f"query and key must have shape (..., D), of one D, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be floating point, got {dtype!r}")
