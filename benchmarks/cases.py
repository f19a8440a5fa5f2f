"""The shapes that every benchmark of an operator quotes, and the memories they search.

Letters as in `memtrans_kernels`: B=16 documents, H=8 heads, K=32 neighbours in all of them; `decode-*` is N=1, the
others N=512. `d64-*` and `d128-*` share one memory row among all heads, `paper-*` has a row per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 32
SPARE = 512


@dataclass(frozen=True)
class Case:
    """One shape: G key heads, N tokens, D head width, M visible slots."""

    name: str
    groups: int
    tokens: int
    dim: int
    capacity: int
    documents: int = 16
    heads: int = 8

    @property
    def flop(self) -> int:
        """Of the products of all queries with all visible keys."""
        return 2 * self.documents * self.heads * self.tokens * self.capacity * self.dim

    def key_bytes(self, dtype: torch.dtype) -> int:
        """Of all visible keys, read once."""
        return self.documents * self.groups * self.capacity * self.dim * dtype.itemsize


CASES = {
    case.name: case
    for case in (
        Case("d64-8k", 1, 512, 64, 8192),
        Case("d64-64k", 1, 512, 64, 65536),
        Case("d64-262k", 1, 512, 64, 262144),
        Case("d128-8k", 1, 512, 128, 8192),
        Case("d128-64k", 1, 512, 128, 65536),
        Case("paper-64k", 8, 512, 128, 65536),
        Case("decode-d64-64k", 1, 1, 64, 65536),
        Case("decode-paper-64k", 8, 1, 128, 65536),
    )
}
TOY = Case("toy", 1, 4, 32, 48, documents=2, heads=2)


def unit_rows(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random unit vectors, the last dimension being the vector's."""
    vectors = torch.randn(*shape, device=device)
    return torch.nn.functional.normalize(vectors, dim=-1).to(dtype)


def search_arguments(
    case: Case, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """query, keys, rows, start, cursor and capacity of a search in memories that are full and have wrapped."""
    rows = case.documents * case.groups
    slots = case.capacity + SPARE
    keys = torch.empty(rows, slots, case.dim, dtype=dtype, device=device)
    for row in keys:
        row.copy_(unit_rows(slots, case.dim, dtype=dtype, device=device))
    query = unit_rows(case.documents, case.heads, case.tokens, case.dim, dtype=dtype, device=device)
    cursor = 3 * slots + 1234 + 77 * torch.arange(rows, device=device)
    return query, keys, torch.arange(rows, device=device), torch.zeros_like(cursor), cursor, case.capacity
