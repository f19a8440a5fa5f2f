"""What model and memory refuse before anything changes: errors name the argument, its value and what was expected.

Shapes: B documents, N tokens, X cached XL tokens, G key/value heads, D head width. Values (ids, counts, finiteness) are
looked at on CPU tensors alone: on a GPU a look is a host round trip, which the model's `validate` asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import checks
from memtrans_kernels.checks import may_look


def check_ids(
    name: str, ids: Tensor, vocabulary: int, pad_id: int | None, device: torch.device, validate: bool
) -> None:
    """Refuses what is no (B, N) of ids in [0, vocabulary), or `pad_id`."""
    checks.tensors(**{name: ids})
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be integers of shape (B, N), got {ids.dtype} {tuple(ids.shape)}")
    checks.same_device(device, **{name: ids})
    if may_look(ids, validate):
        wrong = (ids < 0) | (ids >= vocabulary)
        if pad_id is not None:
            wrong = wrong & (ids != pad_id)
        if bool(wrong.any()):
            raise IndexError(f"{name} must be token ids in [0, {vocabulary}), got {int(ids[wrong][0])}")


def check_labels(labels: Tensor | None, hidden: Tensor, vocabulary: int, pad_id: int, validate: bool) -> None:
    """Refuses what are no labels (B, N) for hidden (B, N, dim): ids in [0, vocabulary), or `pad_id`."""
    if labels is not None:
        check_ids("labels", labels, vocabulary, pad_id, hidden.device, validate)
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels must have shape {tuple(hidden.shape[:2])}, got {tuple(labels.shape)}")


def check_hidden(name: str, hidden: Tensor, weight: Tensor) -> None:
    """Refuses what is no (B, N, width) of the dtype and on the device of weight (anything, width).

    Autocast makes floating-point dtypes fit; a weight of another kind (quantised) has a layer of its own to judge.
    """
    checks.tensors(**{name: hidden})
    checks.floating(**{name: hidden})
    checks.same_device(weight.device, **{name: hidden})
    if hidden.dim() != 3 or hidden.shape[2] != weight.shape[-1]:
        raise ValueError(f"{name} must have shape (B, N, {weight.shape[-1]}), got {tuple(hidden.shape)}")
    fits = hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type)
    if weight.dtype.is_floating_point and not fits:
        raise TypeError(f"{name} must be {weight.dtype} like the weights (or autocast be on), got {hidden.dtype}")


def check_finite(name: str, tensor: Tensor, validate: bool = False) -> None:
    """Refuses infinite and NaN components, where values may be looked at."""
    if may_look(tensor, validate) and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, got infinite or NaN components")


def check_numbers(name: str, tensor: Tensor) -> None:
    """Refuses NaN components, where values may be looked at."""
    if may_look(tensor) and bool(tensor.isnan().any()):
        raise ValueError(f"{name} must be numbers, got NaN components")


def check_count(name: str, count: Tensor | None, hidden: Tensor, most: int | None = None) -> None:
    """Refuses what is no (B,) int64 of numbers from 0 to `most` on the device of hidden (B, N, dim)."""
    if count is not None:
        checks.Letters(B=hidden.shape[0]).bind(name, count, "B")
        checks.typed(torch.int64, **{name: count})
        checks.same_device(hidden.device, **{name: count})
        checks.within(name, count, 0, most)


def check_cache(name: str, cache: Tensor, batch: int, kv_heads: int, width: int, device: torch.device) -> None:
    """Refuses what is no XL cache (B, X, 2, D), or (B, G, X, 2, D) if G > 1, of any floating-point dtype."""
    checks.floating(**{name: cache})
    heads = () if kv_heads == 1 else (kv_heads,)
    expected = (batch, *heads, cache.shape[-3] if cache.dim() >= 3 else "X", 2, width)
    if tuple(cache.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(cache.shape)}")
    checks.same_device(device, **{name: cache})


def check_bias(bias: Tensor | None, query: Tensor, local_keys: int) -> None:
    """Refuses what is no bias for query (B, H, N, D) over L local keys, of any floating-point dtype.

    By distance (H, distances), or dense: (at least N, at least L) behind axes that broadcast against (B, H).
    """
    if bias is None:
        return
    checks.floating(rel_pos_bias=bias)
    checks.same_device(query.device, rel_pos_bias=bias)
    batch, heads, length, _ = query.shape
    if bias.dim() == 2:
        fits = bias.shape[0] == heads and bias.shape[1] > 0
    else:
        shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        fits = 3 <= bias.dim() <= 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
        fits = fits and shape[2] >= length and shape[3] >= local_keys
    if not fits:
        raise ValueError(
            f"rel_pos_bias must have shape ({heads}, distances), or (1, {heads}, at least {length}, at least "
            f"{local_keys}) to be dense, got {tuple(bias.shape)}"
        )


def document_numbers(name: str, documents: Iterable[int], batch: int) -> list[int]:
    """The numbers of documents given; refuses what are no different integers in [0, B)."""
    if not isinstance(documents, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers of documents, got {documents!r}")
    numbers = [checks.integer(name, document) for document in documents]
    if len(set(numbers)) != len(numbers) or not all(0 <= number < batch for number in numbers):
        raise ValueError(f"{name} must be different numbers in [0, {batch}), got {numbers}")
    return numbers


def check_memories(memories: Tensor, batch: int, kv_heads: int, width: int) -> None:
    """Refuses what are no pairs to remember (B, N, 2, D), or (B, G, N, 2, D) if G > 1."""
    heads = () if kv_heads == 1 else (kv_heads,)
    expected = (batch, *heads, memories.shape[-3] if memories.dim() >= 3 else 0, 2, width)
    if tuple(memories.shape) != expected:
        groups = "" if kv_heads == 1 else f"{kv_heads}, "
        raise ValueError(
            f"memories must have shape ({batch}, {groups}N, 2, {width}) for {batch} documents in scope, "
            f"got {tuple(memories.shape)}"
        )


def check_queries(queries: Tensor, batch: int, kv_heads: int, width: int) -> None:
    """Refuses what are no queries of a memory (B, ..., D), or (B, H, ..., D) if G > 1."""
    if queries.dim() < 2 or queries.shape[0] != batch or queries.shape[-1] != width:
        raise ValueError(
            f"queries must have shape ({batch}, ..., {width}) for {batch} documents in scope, "
            f"got {tuple(queries.shape)}"
        )
    if kv_heads > 1 and (queries.dim() < 3 or queries.shape[1] % kv_heads):
        raise ValueError(
            f"queries must have shape (B, H, ..., D), H a multiple of kv_heads={kv_heads}, got {tuple(queries.shape)}"
        )


def layer_numbers(name: str, layers: int | Sequence[int] | None, default: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layer numbers counted from 1, in ascending order, each once; refuses those of no layer."""
    given = default if layers is None else layers if isinstance(layers, Iterable) else (layers,)
    chosen = [checks.integer(name, layer) for layer in given]
    unknown = [layer for layer in chosen if not 1 <= layer <= depth]
    if unknown:
        raise ValueError(f"{name} must name layers from 1 to depth={depth}, got {unknown}")
    return tuple(sorted(set(chosen)))


def clearing_token(which: str, token_id: int | None, vocabulary: int) -> int | None:
    """The token that clears memories, None for none; refuses one outside the vocabulary. which: `sos` or `eos`."""
    name = f"clear_memories_on_{which}_token_id"
    if token_id is not None and not 0 <= checks.integer(name, token_id) < vocabulary:
        raise ValueError(f"{name} must be a token id in [0, {vocabulary}), got {token_id}")
    return token_id


def sizes(low: int, **given: Any) -> tuple[int, ...]:
    """The integers given; refuses what is none, or below `low`."""
    return tuple(checks.integer(name, size, low) for name, size in given.items())


def whole_number(name: str, number: Any, low: int | None = None) -> int:
    """The integer that `number` is, 0.0 too, which is upstream's default of some counts."""
    is_whole = isinstance(number, float) and number.is_integer()
    return checks.integer(name, int(number) if is_whole else number, low)


def check_number(name: str, number: Any, above: float = -math.inf) -> None:
    """Refuses what is no finite number above `above`."""
    if not isinstance(number, Real) or not above < float(number) < math.inf:
        expected = "a finite number" + ("" if above == -math.inf else f" above {above}")
        raise ValueError(f"{name} must be {expected}, got {number!r}")


def usable_device(device: torch.device | str | int) -> torch.device:
    """The device of that name. Raises ValueError when this torch cannot use it, or when it keeps no values (meta)."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that this torch can use, got {device!r}: {reason}") from error
    if found.type == "meta":
        raise ValueError(f"device must be one that keeps values, got {device!r}")
    return found


def running_backward() -> int:
    """The number of the backward pass that runs here, -1 outside of one and where a graph is traced."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def check_no_recomputation(name: str, made_in: int) -> None:
    """Refuses a memory where activation checkpointing runs a forward pass again, unless it was made there.

    made_in: `running_backward()` when the memory was made. A memory has gone on since the forward pass, so that it
    would be searched as it is now, and added to twice.
    """
    if running_backward() not in (-1, made_in):
        raise RuntimeError(
            f"{name} must be a snapshot under activation checkpointing, got a KNNMemory in a backward pass: "
            f"call memory.snapshot() once, before the checkpointed call, and give that"
        )
