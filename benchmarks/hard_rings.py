"""Rings of keys that a search finds hard, and queries near them: `hard-<kind>-<shape>` of bench_knn_search.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import DEVICE, Case, Ring, full_ring
from torch import Generator, Tensor
from torch.nn.functional import normalize

QUERY_NOISE = 0.06  # of each number of a query, beside the key that it is near to
KEY_NOISE = 0.1


def _drawn(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=DEVICE)


def _picked(rows: Tensor, place: Tensor) -> Tensor:
    """Of rows (R, V, D) those at place (R, C): (R, C, D)."""
    return rows.gather(1, place[..., None].expand(-1, -1, rows.shape[-1]))


def _any_of(generator: Generator, rows: Tensor, count: int) -> Tensor:
    place = torch.randint(rows.shape[1], (len(rows), count), generator=generator, device=DEVICE)
    return _picked(rows, place)


def _random(generator: Generator, rows: int, count: int, width: int) -> Tensor:
    return _drawn(generator, rows, count, width)


def _runs(generator: Generator, rows: int, count: int, width: int) -> Tensor:
    centres = normalize(_drawn(generator, rows, -(-count // 512), width), dim=-1)
    near = centres.repeat_interleave(512, dim=1)[:, :count]
    return near + KEY_NOISE * _drawn(generator, rows, count, width)


def _clusters(generator: Generator, rows: int, count: int, width: int) -> Tensor:
    centres = normalize(_drawn(generator, rows, 1000, width), dim=-1)
    return _any_of(generator, centres, count) + KEY_NOISE * _drawn(generator, rows, count, width)


def _vocabulary(generator: Generator, rows: int, count: int, width: int) -> Tensor:
    return _any_of(generator, _drawn(generator, rows, 256, width), count)


def _periodic(generator: Generator, rows: int, count: int, width: int) -> Tensor:
    return _drawn(generator, rows, 512, width).repeat(1, -(-count // 512), 1)[:, :count]


def _equal(generator: Generator, rows: int, count: int, width: int) -> Tensor:
    return _drawn(generator, rows, 1, width).expand(-1, count, -1)


KINDS: dict[str, Callable[[Generator, int, int, int], Tensor]] = {
    "random": _random,
    "runs": _runs,
    "clusters": _clusters,
    "vocabulary": _vocabulary,
    "periodic": _periodic,
    "equal": _equal,
}


def queries_near(generator: Generator, sizes: Case, keys: Tensor) -> Tensor:
    """Unit queries (B, H, N, D), each near some stored key of its row."""
    per_row = sizes.batch * sizes.heads * sizes.length // sizes.rows
    near = _any_of(generator, keys.float(), per_row)
    query = normalize(near + QUERY_NOISE * _drawn(generator, *near.shape), dim=-1)
    return query.reshape(sizes.batch, sizes.heads, sizes.length, sizes.width).to(keys.dtype)


def hard_problem(kind: str, sizes: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Ring, Tensor]:
    """A full ring of keys of one of KINDS, and queries; of `mixed-<percent>` so many queries are near equal keys.

    The keys of `mixed-*` are random, but for one that stands in a quarter of the slots.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)
    ring = full_ring(sizes, dtype, DEVICE, seed)
    if not kind.startswith("mixed-"):
        keys = KINDS[kind](generator, *ring.keys.shape)
        ring.keys.copy_(normalize(keys, dim=-1))
        return ring, queries_near(generator, sizes, ring.keys)
    ring.keys[:, : ring.keys.shape[1] // 4] = ring.keys[:, :1]
    query = queries_near(generator, sizes, ring.keys[:, ring.keys.shape[1] // 4 :])
    hard = queries_near(generator, sizes, ring.keys[:, :1])
    drawn = torch.rand(*query.shape[:3], 1, generator=generator, device=DEVICE)
    return ring, torch.where(drawn < int(kind.removeprefix("mixed-")) / 100, hard, query)
