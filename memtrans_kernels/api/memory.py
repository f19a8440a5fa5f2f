"""The memory: ring write, exact search, and merging what was found in its shares."""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels import checks, ops
from memtrans_kernels.backends import check_name


def knn_add_(
    keys: Tensor,
    values: Tensor,
    cursor: Tensor,
    rows: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    count: Tensor | None = None,
    *,
    at: Tensor | None = None,
    first: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Appends N entries to each picked row of a ring, in place: cast, wrap, advance the cursors.

    Entry `base + j` goes to slot `(base + j) mod (M + S)`, `base` being `at[row]`, or `cursor[row]` without `at`.
    Entries below the cursor are stored already and left alone, so writing the same segment again from its snapshot
    changes nothing. Numbers beyond the ring's dtype saturate; only an infinite key stays infinite, and is never
    retrieved.

    Args:
        keys: (R, M + S, D), floating point, the ring; no two slots in the same place, and no gradient asked of it.
        values: (R, M + S, E), floating point, likewise.
        cursor: (R,) int64, entries ever stored per row; advanced to at least `base + count`.
        rows: (B·G,) int64, the ring row of each (document, group); no row twice.
        new_keys: (B, G, N, D), floating point, cast to the ring's dtype.
        new_values: (B, G, N, E), floating point, likewise.
        count: (B·G,) int64 in [0, N]: only the first so many are stored (padded tails). Default: N.
        at: (R,) int64, where to write from: a snapshot of `cursor`, or an entry beyond it; those in between then count
            as stored, and a search sees whatever their slots hold. Default: `cursor`.
        first: (B·G,) int64 in [0, N]: so many of the oldest are skipped (left padding), and those behind them up to
            `count` are stored. Default: 0.
        backend: one of `auto`, `reference`, `triton`, `native`.

    Raises:
        ValueError: a shape, device or number that does not fit, or a ring that cannot be written in place.
        TypeError: a dtype that does not fit.
        RuntimeError: the named backend cannot run.

    Entries are numbered up to 2^62. On a GPU, where looking costs a wait, a row whose cursor or `at` is negative or
    leads beyond that stays as it is.

    Source: Wu et al. 2022, section 3.2 (the memory drops its oldest entries when full).

    >>> keys, values, cursor = torch.zeros(1, 3, 1), torch.zeros(1, 3, 1), torch.zeros(1, dtype=torch.int64)
    >>> new = torch.arange(1.0, 5.0).reshape(1, 1, 4, 1)
    >>> knn_add_(keys, values, cursor, torch.tensor([0]), new, new)
    >>> keys.flatten().tolist(), cursor.tolist()
    ([4.0, 2.0, 3.0], [4])
    """
    _check_add(keys, values, cursor, rows, new_keys, new_values, count, at, first)
    for name, ring in (("keys", keys), ("values", values), ("cursor", cursor)):
        checks.writable(name, ring)
    checks.within("rows", rows, 0, keys.shape[0] - 1)
    checks.distinct("rows", rows)
    checks.entries("cursor", cursor)
    checks.entries("at", at)
    checks.within("count", count, 0, new_keys.shape[2])
    checks.within("first", first, 0, new_keys.shape[2])
    backend, new_keys, new_values = check_name(backend), new_keys.detach(), new_values.detach()
    ops.knn_add_(keys, values, cursor, rows, new_keys, new_values, count, at, first, backend)


def knn_search(
    query: Tensor,
    keys: Tensor,
    rows: Tensor,
    start: Tensor,
    cursor: Tensor,
    capacity: int,
    k: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Finds the K keys with the largest inner product among the visible entries of each query's row. Exact.

    Visible in a row are the entries `[max(start, cursor - M), cursor)` without those that have a non-finite component.
    Keys equal bit for bit come older entry first; the same inputs give the same bits. No gradient. `faiss`, which
    `auto` never takes, is exempt: it rounds in its own way, equal keys come in any order, and on a GPU it raises
    RuntimeError where a score is not finite.

    Args:
        query: (B, H, N, D), cast to the keys' dtype; H a multiple of G.
        keys: (R, M + S, D), the ring.
        rows: (B·G,) int64, the ring row of each (document, group).
        start: (R,) int64, the first entry that a row holds.
        cursor: (R,) int64, one past the last entry that a row holds.
        capacity: M, how many entries are visible at most.
        k: K, at least 1; may exceed what a row holds.
        backend: one of `auto`, `reference`, `triton`, `native`, `faiss`.

    Returns:
        scores (B, H, N, K) float32 (float64 for float64 keys) and slots (B, H, N, K) int32, best first, then -inf, -1.

    Raises:
        ValueError: a shape, device or number that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: the named backend cannot run.

    Source: Wu et al. 2022, section 3.1.

    >>> keys = torch.tensor([[[1.0], [3.0], [2.0], [0.0]]])
    >>> start, cursor, rows = torch.tensor([0]), torch.tensor([3]), torch.tensor([0])
    >>> scores, slots = knn_search(torch.ones(1, 1, 1, 1), keys, rows, start, cursor, capacity=4, k=4)
    >>> slots.tolist()
    [[[[1, 2, 0, -1]]]]
    """
    k, capacity = checks.integer("k", k, low=1), checks.integer("capacity", capacity)
    _check_search(query, keys, rows, start, cursor, capacity)
    checks.within("rows", rows, 0, keys.shape[0] - 1)
    checks.within("start", start, 0)
    checks.within("cursor", cursor, 0)
    return ops.knn_search(query.detach(), keys.detach(), rows, start, cursor, capacity, k, check_name(backend))


def knn_merge(
    scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor, size: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The K nearest among what the W shares of a memory found: by score, older entries first among equals.

    Entry i of a row is in share i mod W, there as entry i // W of a ring. No gradient; no score is NaN.

    Args:
        scores: (W, B, H, N, K), floating point, what `knn_search` found in each share, in its order: best first, older
            entries first among equal scores, then -inf. `reference` and `faiss` take equals in any order, as Faiss
            finds them.
        slots: (W, B, H, N, K) int32, where the entries lie in their shares, -1 for none.
        rows: (B·G,) int64, the memory row of each (document, group); H a multiple of G.
        total: (R,) int64, entries ever stored per row, in all shares together.
        size: slots of a share's row, M + S there.
        backend: one of `auto`, `reference`, `triton`, `faiss`.

    Returns:
        scores (B, H, N, K) in the dtype given and entries (B, H, N, K) int64, best first, then -inf and -1; and places
        (W, B, H, N, K) int32, which neighbour each candidate became, K where none.

    Raises:
        ValueError: a shape, device or number that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: the named backend cannot run.

    >>> scores = torch.tensor([[2.0, 1.0], [3.0, 2.0]]).reshape(2, 1, 1, 1, 2)
    >>> slots = torch.tensor([[4, 0], [1, 2]], dtype=torch.int32).reshape(2, 1, 1, 1, 2)  # entries 8, 0 and 3, 5
    >>> _, entries, places = knn_merge(scores, slots, torch.tensor([0]), torch.tensor([10]), size=8)
    >>> entries.tolist(), places.flatten(1).tolist()
    ([[[[3, 5]]]], [[2, 2], [0, 1]])
    """
    size = checks.integer("size", size, low=1)
    _check_merge(scores, slots, rows, total)
    checks.within("slots", slots, -1, size - 1)
    checks.within("rows", rows, 0, total.shape[0] - 1)
    checks.within("total", total, 0)
    checks.best_first("scores", scores)
    return ops.knn_merge(scores.detach(), slots, rows, total, size, check_name(backend))


def _bind_ring(letters: checks.Letters, keys: Tensor, rows: Tensor, **positions: Tensor | None) -> None:
    letters.bind("keys", keys, "R slots D")
    checks.few_slots("keys", letters["slots"])
    letters.bind("rows", rows, "B·G")
    for name, position in positions.items():
        if position is not None:
            letters.bind(name, position, "R")
    checks.floating(keys=keys)
    checks.typed(torch.int64, rows=rows, **positions)
    checks.same_device(keys.device, rows=rows, **positions)


@checks.remembered
def _check_add(
    keys: Tensor,
    values: Tensor,
    cursor: Tensor,
    rows: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    count: Tensor | None,
    at: Tensor | None,
    first: Tensor | None,
) -> None:
    letters = checks.Letters()
    _bind_ring(letters, keys, rows, cursor=cursor, at=at)
    letters.bind("values", values, "R slots E")
    letters.bind("new_keys", new_keys, "B G N D")
    letters.bind("new_values", new_values, "B G N E")
    for name, number in (("count", count), ("first", first)):
        if number is not None:
            letters.bind(name, number, "B·G")
    if letters["B"] * letters["G"] != letters["B·G"]:
        raise ValueError(f"new_keys must have B·G={letters['B·G']} rows as `rows` has, got {tuple(new_keys.shape)}")
    checks.floating(values=values, new_keys=new_keys, new_values=new_values)
    checks.typed(torch.int64, count=count, first=first)
    checks.same_device(keys.device, values=values, new_keys=new_keys, new_values=new_values, count=count, first=first)


@checks.remembered
def _check_search(query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int) -> None:
    letters = checks.Letters()
    _bind_ring(letters, keys, rows, start=start, cursor=cursor)
    letters.bind("query", query, "B H N D")
    checks.groups(letters)
    checks.floating(query=query)
    checks.same_device(keys.device, query=query)
    if not 1 <= capacity <= letters["slots"]:
        raise ValueError(f"capacity must be between 1 and the ring's {letters['slots']} slots, got {capacity}")


@checks.remembered
def _check_merge(scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor) -> None:
    letters = checks.Letters()
    letters.bind("scores", scores, "W B H N K")
    letters.bind("slots", slots, "W B H N K")
    letters.bind("rows", rows, "B·G")
    letters.bind("total", total, "R")
    checks.groups(letters)
    checks.floating(scores=scores)
    checks.typed(torch.int32, slots=slots)
    checks.typed(torch.int64, rows=rows, total=total)
    checks.same_device(scores.device, slots=slots, rows=rows, total=total)
