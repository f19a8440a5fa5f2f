"""The device the operators' tests run on: the CPU, or what MEMTRANS_TEST_DEVICE names (`make test-gpu` says cuda)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from memtrans_kernels import backends_info

DEVICE = os.environ.get("MEMTRANS_TEST_DEVICE", "cpu")
# What is said of the CUDA module alone; where it was left out on purpose, all the rest has to hold without it.
about_the_cuda_module = pytest.mark.skipif(
    os.environ.get("MEMTRANS_SKIP_CUDA_BUILD") == "1", reason="the CUDA module was left out: MEMTRANS_SKIP_CUDA_BUILD"
)


def live_backends(operator: str) -> list[str]:
    """The backends of an operator that can run here."""
    lines = backends_info()
    return [line.backend for line in lines if line.operator == operator and line.device == DEVICE and line.live]


def seeded(seed: int) -> torch.Generator:
    """Random numbers that are the same in every run."""
    return torch.Generator(DEVICE).manual_seed(seed)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads compute on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors are made in this dtype where nobody says one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN, so that a number that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
