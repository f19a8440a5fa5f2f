"""The ring write: N new entries for every row of a memory that is full and wraps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from common import DEVICE, Ring, case, full_ring, measure
from torch import Tensor

from memtrans_kernels import knn_add_

CASES = ["d64-8k", "d128-8k"] if DEVICE == "cpu" else ["d64-8k", "d64-64k", "d128-64k", "paper-64k", "decode-d64-64k"]


def indexed_write(ring: Ring, new_keys: Tensor, new_values: Tensor) -> None:
    """The same in the fewest calls of PyTorch, without counts, snapshots and saturation."""
    length = new_keys.shape[2]
    slot = (ring.cursor[:, None] + torch.arange(length, device=new_keys.device)) % ring.keys.shape[1]
    ring.keys[ring.rows[:, None], slot] = new_keys.flatten(0, 1).to(ring.keys.dtype)
    ring.values[ring.rows[:, None], slot] = new_values.flatten(0, 1).to(ring.values.dtype)
    ring.cursor += length


def write(ring: Ring, new_keys: Tensor, new_values: Tensor) -> None:
    knn_add_(ring.keys, ring.values, ring.cursor, ring.rows, new_keys, new_values)


@pytest.mark.parametrize(("impl", "function"), [("memtrans", write), ("torch", indexed_write)])
@pytest.mark.parametrize("name", CASES)
def test_knn_add(benchmark: Any, name: str, impl: str, function: Callable[..., None]) -> None:
    sizes = case(name)
    stored, given = (torch.float32, torch.float32) if DEVICE == "cpu" else (torch.float16, torch.bfloat16)
    ring = full_ring(sizes, stored, DEVICE)
    shape = (sizes.batch, sizes.groups, sizes.length, sizes.width)
    new_keys, new_values = (torch.randn(shape, device=DEVICE).to(given) for _ in range(2))
    moved = new_keys.numel() * 2 * (stored.itemsize + given.itemsize)
    run = partial(function, ring, new_keys, new_values)
    measure(benchmark, run, op="knn_add", impl=impl, case=name, dtype=stored, bytes=moved)
