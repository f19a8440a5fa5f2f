"""The public operators: each validates its arguments once and calls the registered operator.

Shapes in the letters of `memtrans_kernels`; R memory rows hold a ring of M + S slots each, at most 2^30, of which the
newest M entries are visible. Entry i lives in slot i mod (M + S).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels import checks, ops
from memtrans_kernels.backends import check_name
from memtrans_kernels.ledger import Ledger


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
    checks.within("rows", rows, 0, letters["R"] - 1)
    for name, position in positions.items():
        checks.within(name, position, 0)


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
    backend: str = "auto",
) -> None:
    """Appends N entries to each picked row of a ring, in place: cast, wrap, advance the cursors.

    Entry `base + j` goes to slot `(base + j) mod (M + S)`, `base` being `at[row]`, or `cursor[row]` without `at`.
    Entries below the cursor are stored already and left alone, so writing the same segment again from its snapshot
    changes nothing. Numbers beyond the ring's dtype saturate; only an infinite key stays infinite, and is never
    retrieved.

    Args:
        keys, values: (R, M + S, D), the ring.
        cursor: (R,) int64, entries ever stored per row; advanced to at least `base + count`.
        rows: (B·G,) int64, the ring row of each (document, group); no row twice.
        new_keys, new_values: (B, G, N, D), floating point, cast to the ring's dtype.
        count: (B·G,) int64 in [0, N]: only the first so many are stored (padded tails). Default: N.
        at: (R,) int64, where to write from: a snapshot of `cursor`, or an entry beyond it; those in between then count
            as stored, and a search sees whatever their slots hold. Default: `cursor`.
        backend: one of `auto`, `reference`, `triton`, `native`.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit. RuntimeError: the named backend cannot run.

    Source: Wu et al. 2022, section 3.2 (the memory drops its oldest entries when full).

    >>> keys, values, cursor = torch.zeros(1, 3, 1), torch.zeros(1, 3, 1), torch.zeros(1, dtype=torch.int64)
    >>> new = torch.arange(1.0, 5.0).reshape(1, 1, 4, 1)
    >>> knn_add_(keys, values, cursor, torch.tensor([0]), new, new)
    >>> keys.flatten().tolist(), cursor.tolist()
    ([4.0, 2.0, 3.0], [4])
    """
    letters = checks.Letters()
    _bind_ring(letters, keys, rows, cursor=cursor, at=at)
    letters.bind("values", values, "R slots D")
    letters.bind("new_keys", new_keys, "B G N D")
    letters.bind("new_values", new_values, "B G N D")
    if count is not None:
        letters.bind("count", count, "B·G")
    if letters["B"] * letters["G"] != letters["B·G"]:
        raise ValueError(f"new_keys must have B·G={letters['B·G']} rows as `rows` has, got {tuple(new_keys.shape)}")
    checks.floating(values=values, new_keys=new_keys, new_values=new_values)
    checks.typed(torch.int64, count=count)
    checks.same_device(keys.device, values=values, new_keys=new_keys, new_values=new_values, count=count)
    checks.within("count", count, 0, letters["N"])
    checks.distinct("rows", rows)
    ops.knn_add_(keys, values, cursor, rows, new_keys.detach(), new_values.detach(), count, at, check_name(backend))


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
        start, cursor: (R,) int64, first and one past the last entry that a row holds.
        capacity: M, how many entries are visible at most.
        k: K, at least 1; may exceed what a row holds.
        backend: one of `auto`, `reference`, `native`, `faiss`.

    Returns:
        scores (B, H, N, K) float32 (float64 for float64 keys) and slots (B, H, N, K) int32, best first, then -inf, -1.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit. RuntimeError: the named backend cannot run.

    Source: Wu et al. 2022, section 3.1.

    >>> keys = torch.tensor([[[1.0], [3.0], [2.0], [0.0]]])
    >>> start, cursor, rows = torch.tensor([0]), torch.tensor([3]), torch.tensor([0])
    >>> scores, slots = knn_search(torch.ones(1, 1, 1, 1), keys, rows, start, cursor, capacity=4, k=4)
    >>> slots.tolist()
    [[[[1, 2, 0, -1]]]]
    """
    letters = checks.Letters()
    _bind_ring(letters, keys, rows, start=start, cursor=cursor)
    letters.bind("query", query, "B H N D")
    _check_groups(letters)
    checks.floating(query=query)
    checks.same_device(keys.device, query=query)
    k, capacity = checks.integer("k", k, low=1), checks.integer("capacity", capacity)
    if not 1 <= capacity <= letters["slots"]:
        raise ValueError(f"capacity must be between 1 and the ring's {letters['slots']} slots, got {capacity}")
    return ops.knn_search(query.detach(), keys.detach(), rows, start, cursor, capacity, k, check_name(backend))


def knn_merge(
    scores: Tensor, slots: Tensor, rows: Tensor, total: Tensor, size: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The K nearest among what the W shares of a memory found: by score, older entries first among equals.

    Entry i of a row is in share i mod W, there as entry i // W of a ring. No gradient; no score is NaN.

    Args:
        scores, slots: (W, B, H, N, K), float and int32, what `knn_search` found in each share, in its order: best
            first, older entries first among equal scores, then -inf and -1. `reference` and `faiss` take equals in any
            order, as Faiss finds them.
        rows: (B·G,) int64, the memory row of each (document, group); H a multiple of G.
        total: (R,) int64, entries ever stored per row, in all shares together.
        size: slots of a share's row, M + S there.
        backend: one of `auto`, `reference`, `triton`, `faiss`.

    Returns:
        scores (B, H, N, K) in the dtype given and entries (B, H, N, K) int64, best first, then -inf and -1; and places
        (W, B, H, N, K) int32, which neighbour each candidate became, K where none.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit. RuntimeError: the named backend cannot run.

    >>> scores = torch.tensor([[2.0, 1.0], [3.0, 2.0]]).reshape(2, 1, 1, 1, 2)
    >>> slots = torch.tensor([[4, 0], [1, 2]], dtype=torch.int32).reshape(2, 1, 1, 1, 2)  # entries 8, 0 and 3, 5
    >>> _, entries, places = knn_merge(scores, slots, torch.tensor([0]), torch.tensor([10]), size=8)
    >>> entries.tolist(), places.flatten(1).tolist()
    ([[[[3, 5]]]], [[2, 2], [0, 1]])
    """
    letters = checks.Letters()
    letters.bind("scores", scores, "W B H N K")
    letters.bind("slots", slots, "W B H N K")
    letters.bind("rows", rows, "B·G")
    letters.bind("total", total, "R")
    _check_groups(letters)
    checks.floating(scores=scores)
    checks.typed(torch.int32, slots=slots)
    checks.typed(torch.int64, rows=rows, total=total)
    checks.same_device(scores.device, slots=slots, rows=rows, total=total)
    size = checks.integer("size", size, low=1)
    checks.within("slots", slots, -1, size - 1)
    checks.within("rows", rows, 0, letters["R"] - 1)
    checks.within("total", total, 0)
    checks.best_first("scores", scores)
    return ops.knn_merge(scores.detach(), slots, rows, total, size, check_name(backend))


def _check_groups(letters: checks.Letters) -> None:
    checks.divides(letters["B"], "B", letters["B·G"], "the number of rows")
    checks.divides(letters["B·G"] // letters["B"], "G", letters["H"], "the number of query heads")


def cosine(
    query: Tensor, key: Tensor, dtype: torch.dtype | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Makes every query and key a unit vector, `x / max(|x|, 1e-12)` along D; differentiable.

    Args:
        query: (..., D). key: (..., D), floating point.
        dtype: of both results. Default: each keeps its own. The arithmetic is float32 at least.
        backend: one of `auto`, `reference`, `triton`.

    Raises:
        TypeError: not floating point, `dtype` neither. ValueError: widths or devices differ.

    Source: Henry et al. 2020 (arXiv 2010.04245); Wu et al. 2022, section 3.3 normalise keys and queries.

    >>> query, key = cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))
    >>> query.tolist(), key.tolist()
    ([[0.6000000238418579, 0.800000011920929]], [[0.0, 1.0]])
    """
    checks.floating(query=query, key=key)
    checks.same_device(query.device, key=key)
    if query.dim() == 0 or query.shape[-1:] != key.shape[-1:]:
        raise ValueError(
            f"query and key must have shape (..., D), of one D, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be floating point, got {dtype!r}")
    return ops.cosine(query, key, dtype, check_name(backend))


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    rows: Tensor,
    scores: Tensor,
    slots: Tensor,
    scale: Tensor,
    bias_table: Tensor | None = None,
    bias_dense: Tensor | None = None,
    memory_offset: Tensor | None = None,
    local_length: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    ledger: Ledger | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attends to K retrieved neighbours and to the causal local context in one softmax.

    Retrieved logits are `scale[h] · score + memory_offset[h]`; local ones `scale[h] · <q, k> + bias`, for the keys that
    stand at most at the query's own position (the last N of the L keys are the segment itself). A query with nothing to
    attend to gives zeros and an lse of -inf.

    Args:
        query: (B, H, N, D). key, value: (B, G, L, D), L at least N, or 0 for the retrieved part alone.
        memory_keys, memory_values: (R, M + S, D), the ring. rows: (B·G,) int64, the ring row of each (document, group).
        scores: (B, H, N, K), floating point. slots: (B, H, N, K) int32, -1 for none; both from `knn_search`.
        scale: (H,), exp of the learned temperature.
        bias_table: (H, distances), bias by distance; distances beyond it take its last column.
        bias_dense: (1 or B, H, N, L), added to the local logits.
        memory_offset: (H,), added to the retrieved logits.
        local_length: (B,) int64, how many of the L local keys (the newest) are this document's.
        dropout_p: probability of dropping a weight of the joint softmax. seed: () int64 on the device, needed with it.
        ledger: the memory's host counts: a backward pass that comes after more than `spare` new entries raises.
        backend: one of `auto`, `reference`, `triton`, `native`.

    Returns:
        out (B, H, N, D) in the query's dtype, and lse (B, H, N) float32 (float64 for a float64 query), the logarithm of
        the softmax's denominator. Both differentiable in query (through the retrieved logits too), key, value, scale,
        bias and offset.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit. RuntimeError: the named backend cannot run.
        StaleMemoryError: from the backward pass, see `ledger`.

    Source: Wu et al. 2022, section 3.1, with the single softmax of its first version.

    >>> query = key = value = torch.ones(1, 1, 1, 2)
    >>> memory, rows, slots = torch.full((1, 4, 2), 3.0), torch.tensor([0]), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    >>> out, lse = memory_attention(query, key, value, memory, memory, rows, torch.full((1, 1, 1, 1), 2.0), slots,
    ...                             torch.ones(1))
    >>> out.tolist()  # both logits are 2
    [[[[2.0, 2.0]]]]
    """
    checks.floating(
        query=query, key=key, value=value, memory_keys=memory_keys, memory_values=memory_values, scores=scores,
        scale=scale, bias_table=bias_table, bias_dense=bias_dense, memory_offset=memory_offset,
    )  # fmt: skip
    letters = checks.Letters()
    letters.bind("query", query, "B H N D")
    letters.bind("key", key, "B G L D")
    letters.bind("value", value, "B G L D")
    letters.bind("memory_keys", memory_keys, "R slots D")
    checks.few_slots("memory_keys", letters["slots"])
    letters.bind("memory_values", memory_values, "R slots D")
    letters.bind("rows", rows, "B·G")
    letters.bind("scores", scores, "B H N K")
    letters.bind("slots", slots, "B H N K")
    letters.bind("scale", scale, "H")
    optional = (
        ("bias_table", bias_table, "H distances"),
        ("bias_dense", bias_dense, "1 H N L" if bias_dense is None or bias_dense.shape[:1] == (1,) else "B H N L"),
        ("memory_offset", memory_offset, "H"),
        ("local_length", local_length, "B"),
        ("seed", seed, ""),
    )
    for name, tensor, axes in optional:
        if tensor is not None:
            letters.bind(name, tensor, axes)
    if bias_table is not None and bias_table.shape[1] == 0:
        raise ValueError(f"bias_table must have at least one distance, got shape {tuple(bias_table.shape)}")
    _check_groups(letters)
    if letters["G"] * letters["B"] != letters["B·G"]:
        raise ValueError(f"rows must have B·G={letters['B'] * letters['G']} entries, got {letters['B·G']}")
    if 0 < letters["L"] < letters["N"]:
        raise ValueError(f"key must hold the segment itself: L at least N={letters['N']}, or 0, got {letters['L']}")
    checks.probability("dropout_p", dropout_p)
    if dropout_p > 0.0 and seed is None:
        raise ValueError("seed must be an int64 tensor when dropout_p > 0, got None")
    checks.typed(torch.int32, slots=slots)
    checks.typed(torch.int64, rows=rows, local_length=local_length, seed=seed)
    checks.same_device(
        query.device, key=key, value=value, memory_keys=memory_keys, memory_values=memory_values, rows=rows,
        scores=scores, slots=slots, scale=scale, bias_table=bias_table, bias_dense=bias_dense,
        memory_offset=memory_offset, local_length=local_length, seed=seed,
    )  # fmt: skip
    checks.within("rows", rows, 0, letters["R"] - 1)
    checks.within("slots", slots, -1, letters["slots"] - 1)
    checks.within("local_length", local_length, 0, letters["L"])
    written, ticket, spare = ledger if ledger is not None else (None, None, 0)
    return ops.memory_attention(
        query, key, value, memory_keys, memory_values, rows, scores, slots, scale, bias_table, bias_dense,
        memory_offset, local_length, dropout_p, seed, written, ticket, spare, check_name(backend),
    )  # fmt: skip


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    bias_table: Tensor | None = None,
    bias_dense: Tensor | None = None,
    local_length: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`memory_attention` without a memory: causal attention to the local context, with a bias by distance.

    Args, returns, errors: those of `memory_attention`, with the same names. query (B, H, N, D), key and value
    (B, G, L, D), scale (H,).

    >>> query = key = torch.zeros(1, 1, 2, 1)
    >>> value = torch.tensor([[[[1.0], [3.0]]]])
    >>> out, lse = local_attention(query, key, value, torch.ones(1))
    >>> out.flatten().tolist()  # the second query sees both
    [1.0, 2.0]
    """
    letters = checks.Letters()
    letters.bind("query", query, "B H N D")
    letters.bind("key", key, "B G L D")
    nothing = query.detach().new_empty(1, 1, letters["D"])  # nobody reads it
    scores = query.detach().new_empty(*query.shape[:3], 0, dtype=torch.float32)
    rows = torch.zeros(letters["B"] * letters["G"], dtype=torch.int64, device=query.device)
    return memory_attention(
        query, key, value, nothing, nothing, rows, scores, scores.to(torch.int32), scale,
        bias_table, bias_dense, None, local_length, dropout_p, seed, backend=backend,
    )  # fmt: skip


def merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Makes one softmax of P parts: attention to several sets of keys becomes attention to all of them. Differentiable.

    Each part weighs `exp(lse)`: `out = sum_p exp(lse_p - lse) · out_p`, `lse = log sum_p exp(lse_p)`. A query that
    finds nothing in any part gives zeros.

    Args:
        outs: (P, B, H, N, D), floating point, what `memory_attention` or `local_attention` returned for each part.
        lses: (P, B, H, N), floating point, likewise; -inf for a part with nothing in it.

    Returns:
        out (B, H, N, D) in the dtype of `outs`, and lse (B, H, N) in that of `lses`.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.

    Source: Dao et al. 2022 (arXiv 2205.14135), section 3.1, merges blocks of keys that way.

    >>> outs = torch.tensor([1.0, 5.0]).reshape(2, 1, 1, 1, 1)
    >>> lses = torch.tensor([3.0, 1.0]).log().reshape(2, 1, 1, 1)  # weights 3 and 1
    >>> out, lse = merge_attention(outs, lses)
    >>> out.item(), round(lse.exp().item(), 3)
    (2.0, 4.0)
    """
    checks.floating(outs=outs, lses=lses)
    letters = checks.Letters()
    letters.bind("outs", outs, "P B H N D")
    letters.bind("lses", lses, "P B H N")
    checks.same_device(outs.device, lses=lses)
    lses = lses.clamp(min=-1e30)  # a difference of infinities would be NaN, in the gradient too
    lse = lses.logsumexp(dim=0)
    out = ((lses - lse).exp()[..., None] * outs).sum(dim=0)
    return out.to(outs.dtype), lse
