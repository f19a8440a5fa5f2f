"""The merge of what W ranks found: `<case>-<W>`, of which each rank merges the W-th part of the queries.

As many queries as `bench_multi_gpu`'s sharded searches, W lists of K candidates each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import DEVICE, TOY, case, measure
from torch import Tensor

from memtrans_kernels import knn_merge

CASES = ["d64-8k-2"] if DEVICE == "cpu" or TOY else ["d64-64k-2", "d64-64k-8", "paper-64k-2"]


def merged(scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor, size: int) -> None:
    knn_merge(scores, slots, rows, total, size)


def sorted_again(scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor, size: int) -> None:
    """The same in the fewest calls of PyTorch: no numbers of entries, no order among equals, no places."""
    best = scores.movedim(0, -2).flatten(-2).topk(scores.shape[-1])
    slots.movedim(0, -2).flatten(-2).gather(-1, best.indices)


@pytest.mark.parametrize(("impl", "function"), [("memtrans", merged), ("torch", sorted_again)])
@pytest.mark.parametrize("name", CASES)
def test_knn_merge(benchmark: Any, name: str, impl: str, function: Callable[..., None]) -> None:
    sizes, shares = case(name.rsplit("-", 1)[0]), int(name.rsplit("-", 1)[1])
    size = sizes.capacity + sizes.spare
    shape = (shares, sizes.batch, sizes.heads, sizes.length // shares, sizes.neighbours)
    scores = torch.rand(shape, device=DEVICE).sort(dim=-1, descending=True).values
    slots = torch.randint(size, shape, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(sizes.rows, device=DEVICE)
    total = torch.full_like(rows, 2 * shares * size)
    moved = scores.numel() * (4 + 4 + 4) + scores[0].numel() * (4 + 8)
    measure(
        benchmark, lambda: function(scores, slots, rows, total, size), op="knn_merge", impl=impl, case=name,
        dtype=scores.dtype, bytes=moved,
    )  # fmt: skip
