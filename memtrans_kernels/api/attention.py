"""Attention to retrieved neighbours and to the local context, or to the local context alone."""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels import checks, ops
from memtrans_kernels.attention_inputs import NUMBERS, AttentionInputs
from memtrans_kernels.backends import check_name
from memtrans_kernels.eager import kept
from memtrans_kernels.ledger import Ledger

# Of the arguments that are tensors, those that are not floating point.
KINDS = {torch.int32: ("slots",), torch.int64: ("rows", "local_length", "seed", "first"), torch.bool: ("key_mask",)}
NOT_FLOATING = frozenset(name for names in KINDS.values() for name in names)


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
    causal: bool = True,
    key_mask: Tensor | None = None,
    first: Tensor | None = None,
    soft_cap: float | None = None,
    sink: Tensor | None = None,
    *,
    ledger: Ledger | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attends to K retrieved neighbours and to the local context in one softmax.

    Retrieved logits are `scale[h] · score + memory_offset[h]`; local ones `scale[h] · <q, k> + bias`, for the keys that
    stand at most at the query's own position (the last N of the L keys are the segment itself). `causal`, `key_mask`,
    `first` and `local_length` say which of them a query sees: those that all of these allow. With c = `soft_cap` every
    product x = `scale[h] · <q, k>` becomes `c · tanh(x / c)` before a bias or an offset is added. A query with nothing
    to attend to gives zeros and an lse of -inf; with a sink the lse is `sink[h]`.

    Args:
        query: (B, H, N, D), floating point.
        key: (B, G, L, D), floating point; L at least N, or 0 for the retrieved part alone.
        value: (B, G, L, E), floating point.
        memory_keys: (R, M + S, D), floating point, the ring; the gradient of the query reads it.
        memory_values: (R, M + S, E), floating point, the ring.
        rows: (B·G,) int64, the ring row of each (document, group).
        scores: (B, H, N, K), floating point, from `knn_search`.
        slots: (B, H, N, K) int32, from `knn_search`; -1 for none.
        scale: (H,), floating point, exp of the learned temperature.
        bias_table: (H, distances), bias by distance; distances beyond it take its last column. Default: none.
        bias_dense: (1 or B, H, N, L), added to the local logits. Default: none.
        memory_offset: (H,), added to the retrieved logits. Default: none.
        local_length: (B,) int64 in [0, L], how many of the newest local keys are this document's. Default: all.
        dropout_p: probability in [0, 1) of dropping a weight of the joint softmax. Default: 0.
        seed: () int64 on the device, needed where `dropout_p` is not 0.
        causal: whether a query sees no key behind its own position. If not, the bias by distance counts how far a key
            is away on either side. Default: it does not see them.
        key_mask: (B, L) bool, False for local keys that no query sees. Default: all are seen.
        first: (B, N) int64 in [0, L], the oldest local key that each query sees, L for none. Default: the first of all.
        soft_cap: c, above 0. Default: none.
        sink: (H,), floating point, a logit in the softmax's denominator that has no value. Default: none.
        ledger: the memory's host counts: a backward pass that comes after more than `spare` new entries raises.
        backend: one of `auto`, `reference`, `triton`, `native`.

    Returns:
        out (B, H, N, E) in the query's dtype, and lse (B, H, N) float32 (float64 for a float64 query), the logarithm of
        the softmax's denominator. On a GPU, and where a graph is compiled, out lies as (B, N, H, E), so that
        `out.transpose(1, 2).flatten(2)`, what a layer does next, copies nothing. Both differentiable in query (through
        the retrieved logits too), key, value, scale, bias, offset and sink.

    Raises:
        ValueError: a shape, device or number that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: the named backend cannot run.
        StaleMemoryError: from the backward pass, see `ledger`.
        NotImplementedError: second derivatives, torch.func.grad and jvp, with another backend than `reference`.

    Source: Wu et al. 2022, section 3.1, with the single softmax of its first version.

    >>> query = key = value = torch.ones(1, 1, 1, 2)
    >>> memory, rows, slots = torch.full((1, 4, 2), 3.0), torch.tensor([0]), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    >>> out, lse = memory_attention(query, key, value, memory, memory, rows, torch.full((1, 1, 1, 1), 2.0), slots,
    ...                             torch.ones(1))
    >>> out.tolist()  # both logits are 2
    [[[[2.0, 2.0]]]]
    """
    inputs = AttentionInputs(
        query, key, value, memory_keys, memory_values, rows, scores, slots, scale, bias_table, bias_dense,
        memory_offset, local_length, dropout_p, seed, causal, key_mask, first, soft_cap, sink,
    )  # fmt: skip
    _check(*inputs)
    checks.within("rows", rows, 0, memory_keys.shape[0] - 1)
    checks.within("slots", slots, -1, memory_keys.shape[1] - 1)
    checks.within("local_length", local_length, 0, key.shape[2])
    checks.within("first", first, 0, key.shape[2])
    return ops.memory_attention(inputs, ledger, check_name(backend))


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
    causal: bool = True,
    key_mask: Tensor | None = None,
    first: Tensor | None = None,
    soft_cap: float | None = None,
    sink: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`memory_attention` without a memory: attention to the local context, with a bias by distance.

    Args:
        query: (B, H, N, D), floating point.
        key: (B, G, L, D), floating point; L at least N.
        value: (B, G, L, E), floating point.
        scale: (H,), floating point, what logits are multiplied by.
        bias_table: (H, distances), bias by distance; distances beyond it take its last column. Default: none.
        bias_dense: (1 or B, H, N, L), added to the logits. Default: none.
        local_length: (B,) int64 in [0, L], how many of the newest local keys are this document's. Default: all.
        dropout_p: probability in [0, 1) of dropping a weight of the softmax. Default: 0.
        seed: () int64 on the device, needed where `dropout_p` is not 0.
        causal, key_mask, first, soft_cap, sink: as of `memory_attention`.
        backend: one of `auto`, `reference`, `triton`, `native`.

    Returns, raises: what `memory_attention` does.

    >>> query = key = torch.zeros(1, 1, 2, 1)
    >>> value = torch.tensor([[[[1.0], [3.0]]]])
    >>> out, lse = local_attention(query, key, value, torch.ones(1))
    >>> out.flatten().tolist()  # the second query sees both
    [1.0, 2.0]
    """
    _check_local(query, key, value)
    sizes = tuple(query.shape[:3]), key.shape[1], query.shape[3], value.shape[3]
    no_keys, no_values, rows, scores, slots = kept(_no_memory, query.device, query.dtype, *sizes)
    return memory_attention(
        query, key, value, no_keys, no_values, rows, scores, slots, scale,
        bias_table, bias_dense, None, local_length, dropout_p, seed, causal, key_mask, first, soft_cap, sink,
        backend=backend,
    )  # fmt: skip


def _no_memory(
    device: torch.device, dtype: torch.dtype, of_queries: tuple[int, ...], groups: int, width: int, value_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, rows, scores and slots for queries (B, H, N) that find nothing."""
    no_keys, no_values = (torch.empty(1, 1, of, dtype=dtype, device=device) for of in (width, value_width))
    rows = torch.zeros(of_queries[0] * groups, dtype=torch.int64, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = torch.empty(*of_queries, 0, dtype=wide, device=device)
    return no_keys, no_values, rows, scores, torch.empty(*of_queries, 0, dtype=torch.int32, device=device)


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
        ValueError: a shape or device that does not fit.
        TypeError: a dtype that does not fit.

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


@checks.remembered
def _check_local(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuses shapes that the others cannot be made for."""
    letters = checks.Letters()
    letters.bind("query", query, "B H N D")
    letters.bind("key", key, "B G L D")
    letters.bind("value", value, "B G L E")


@checks.remembered
def _check(*arguments: Tensor | float | None) -> None:
    """Refuses what does not fit together, except for the numbers in tensors."""
    inputs = AttentionInputs(*arguments)  # type: ignore[arg-type]
    _check_kinds(inputs)
    letters = _check_shapes(inputs)
    checks.groups(letters)
    if letters["G"] * letters["B"] != letters["B·G"]:
        raise ValueError(f"rows must have B·G={letters['B'] * letters['G']} entries, got {letters['B·G']}")
    if 0 < letters["L"] < letters["N"]:
        raise ValueError(f"key must hold the segment itself: L at least N={letters['N']}, or 0, got {letters['L']}")
    checks.dropout(inputs.dropout_p, inputs.seed)
    if not isinstance(inputs.causal, bool):
        raise TypeError(f"causal must be True or False, got {inputs.causal!r}")
    checks.positive("soft_cap", inputs.soft_cap)


def _check_kinds(inputs: AttentionInputs) -> None:
    """Refuses what is no tensor, or one of another dtype or on another device than it has to be."""
    tensors = {name: value for name, value in inputs._asdict().items() if name not in NUMBERS}
    checks.tensors(query=inputs.query)
    for dtype, names in KINDS.items():
        checks.typed(dtype, **{name: tensors[name] for name in names})
    checks.floating(**{name: value for name, value in tensors.items() if name not in NOT_FLOATING})
    checks.same_device(inputs.query.device, **tensors)


def _check_shapes(inputs: AttentionInputs) -> checks.Letters:
    """Refuses sizes that disagree; returns them."""
    letters, dense = checks.Letters(), inputs.bias_dense
    axes = {
        "query": "B H N D",
        "key": "B G L D",
        "value": "B G L E",
        "memory_keys": "R slots D",
        "memory_values": "R slots E",
        "rows": "B·G",
        "scores": "B H N K",
        "slots": "B H N K",
        "scale": "H",
        "bias_table": "H distances",
        "bias_dense": "1 H N L" if dense is not None and dense.shape[:1] == (1,) else "B H N L",
        "memory_offset": "H",
        "local_length": "B",
        "key_mask": "B L",
        "first": "B N",
        "sink": "H",
    }
    for name, of_tensor in axes.items():
        tensor = getattr(inputs, name)
        if tensor is not None:
            letters.bind(name, tensor, of_tensor)
            if name == "memory_keys":
                checks.few_slots(name, letters["slots"])
    if inputs.bias_table is not None and letters["distances"] == 0:
        raise ValueError(f"bias_table must have at least one distance, got shape {tuple(inputs.bias_table.shape)}")
    return letters
