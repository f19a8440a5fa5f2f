"""What a memory refuses before it changes: an error names the argument, its value and what was expected.

Shapes: B documents in scope, H query heads, G key/value heads, N entries, D width of keys, E of values. Values are
looked at on CPU tensors alone: on a GPU a look is a host round trip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from memtrans_kernels import checks
from memtrans_kernels.checks import may_look


def scoping(documents: int, wanted: int) -> str:
    """What an error adds where a memory has other documents in scope than wanted."""
    if documents == wanted:
        return ""
    return "; at_batch_indices chooses among its documents, expand(rows) lends them to many rows that only read"


def widths_named(width: int, value_width: int) -> str:
    """The widths of a memory by the names of its arguments.

    >>> widths_named(8, 8), widths_named(8, 4)
    ('dim=8', 'dim=8, value_dim=4')
    """
    return f"dim={width}" if width == value_width else f"dim={width}, value_dim={value_width}"


def check_keys_and_values(memories: Sequence[Tensor], batch: int, kv_heads: int, widths: tuple[int, int]) -> None:
    """Raises TypeError or ValueError unless `memories` are keys (B, N, D) and values (B, N, E), G behind B if G > 1.

    widths: D and E.
    """
    if len(memories) != 2:
        raise ValueError(f"memories must be pairs in one tensor, or keys and values, got {len(memories)} tensors")
    keys, values = memories
    given = {"keys": keys, "values": values}
    checks.tensors(**given)
    checks.floating(**given)
    checks.same_device(keys.device, values=values)
    heads, groups = ((), "") if kv_heads == 1 else ((kv_heads,), f"{kv_heads}, ")
    length = keys.shape[-2] if keys.dim() >= 2 else 0
    for (name, tensor), width in zip(given.items(), widths, strict=True):
        if tuple(tensor.shape) != (batch, *heads, length, width):
            entries = "N" if tensor is keys else length
            raise ValueError(
                f"{name} must have shape ({batch}, {groups}{entries}, {width}) for {batch} documents in scope, "
                f"got {tuple(tensor.shape)}{scoping(batch, tensor.shape[0] if tensor.dim() else 0)}"
            )


def check_one_width(name: str, width: int, value_width: int) -> None:
    """Raises ValueError where keys and values are not of one width: then no tensor of pairs can hold them."""
    if width != value_width:
        raise ValueError(
            f"{name} must be keys and values, two tensors whose last axes are {width} and {value_width}, in a memory "
            f"with {widths_named(width, value_width)}, got pairs in one tensor"
        )


def check_memories(memories: Tensor, batch: int, kv_heads: int, width: int) -> None:
    """Raises ValueError unless `memories` holds key/value pairs (B, N, 2, D), or (B, G, N, 2, D) if G > 1."""
    heads = () if kv_heads == 1 else (kv_heads,)
    expected = (batch, *heads, memories.shape[-3] if memories.dim() >= 3 else 0, 2, width)
    if tuple(memories.shape) != expected:
        groups = "" if kv_heads == 1 else f"{kv_heads}, "
        raise ValueError(
            f"memories must have shape ({batch}, {groups}N, 2, {width}) for {batch} documents in scope, "
            f"got {tuple(memories.shape)}{scoping(batch, memories.shape[0] if memories.dim() else 0)}"
        )


def check_queries(queries: Tensor, batch: int, kv_heads: int, width: int) -> None:
    """Raises ValueError unless `queries` has shape (B, ..., D), or (B, H, ..., D) with H a multiple of G if G > 1."""
    if queries.dim() < 2 or queries.shape[0] != batch or queries.shape[-1] != width:
        raise ValueError(
            f"queries must have shape ({batch}, ..., {width}) for {batch} documents in scope, "
            f"got {tuple(queries.shape)}{scoping(batch, queries.shape[0] if queries.dim() else 0)}"
        )
    if kv_heads > 1 and (queries.dim() < 3 or queries.shape[1] % kv_heads):
        raise ValueError(
            f"queries must have shape (B, H, ..., D), H a multiple of kv_heads={kv_heads}, got {tuple(queries.shape)}"
        )


def check_mask(mask: Tensor, documents: int, device: torch.device | None = None, name: str = "mask") -> None:
    """Raises TypeError or ValueError unless `mask` is a bool tensor (B,), on that device if one is given."""
    checks.tensors(**{name: mask})
    if mask.dtype != torch.bool or mask.shape != (documents,):
        raise ValueError(f"{name} must be a bool tensor of shape ({documents},), got {mask.dtype} {tuple(mask.shape)}")
    if device is not None:
        checks.same_device(device, **{name: mask})


def check_ids(ids: Tensor, keys: Tensor, kept: bool) -> None:
    """Raises ValueError or TypeError unless `ids` is int64 (B, N) as keys (B, G, N, D) are, and ids kept."""
    if not kept:
        raise ValueError("keep_ids must be True for ids to be stored, got ids and keep_ids=False")
    checks.typed(torch.int64, ids=ids)
    checks.same_device(keys.device, ids=ids)
    expected = (keys.shape[0], keys.shape[2])
    if tuple(ids.shape) != expected:
        raise ValueError(f"ids must have shape {expected} as memories have, got {tuple(ids.shape)}")


def check_slots(slots: Tensor, batch: int, kv_heads: int, most: int | None) -> None:
    """Raises ValueError or TypeError unless `slots` are whole numbers (B, ..., K), or (B, H, ..., K) if G > 1.

    most: the largest there is, where it is known; values are looked at on the CPU alone.
    """
    checks.tensors(slots=slots)
    if slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slots must be torch.int32 or torch.int64, got {slots.dtype}")
    if slots.dim() < 2 or slots.shape[0] != batch or (kv_heads > 1 and slots.shape[1] % kv_heads):
        heads = "" if kv_heads == 1 else f"H, a multiple of kv_heads={kv_heads}, "
        raise ValueError(f"slots must have shape ({batch}, {heads}..., K) as search gave, got {tuple(slots.shape)}")
    checks.within("slots", slots, -1, most)


def check_removal(mask: Tensor, batch: int, capacity: int, device: torch.device | None) -> None:
    """Raises TypeError or ValueError unless `mask` is a bool tensor (B, M), on that device if one is given."""
    checks.tensors(mask=mask)
    if mask.dtype != torch.bool or mask.shape != (batch, capacity):
        raise ValueError(
            f"mask must be a bool tensor of shape ({batch}, {capacity}), as the mask of entries() is, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if device is not None:
        checks.same_device(device, mask=mask)


def check_numbers(name: str, tensor: Tensor) -> None:
    """Raises ValueError if `tensor` has a NaN component, where values may be looked at."""
    if may_look(tensor) and bool(tensor.isnan().any()):
        raise ValueError(f"{name} must be numbers, got NaN components")


def are_several(numbers: object) -> TypeGuard[Iterable[Any]]:
    """Whether they are to be gone through; a tensor or an array without an axis is one number, iterable by its class.

    >>> are_several([1]), are_several(1), are_several(torch.tensor(1))
    (True, False, False)
    """
    return isinstance(numbers, Iterable) and getattr(numbers, "ndim", 1) > 0


def document_numbers(name: str, documents: Iterable[int], batch: int) -> list[int]:
    """`documents` as a list; raises TypeError or ValueError unless they are different integers in [0, B)."""
    if not are_several(documents):
        raise TypeError(f"{name} must be a sequence of numbers of documents, got {documents!r}")
    numbers = [checks.integer(name, document) for document in documents]
    if len(set(numbers)) != len(numbers) or not all(0 <= number < batch for number in numbers):
        raise ValueError(f"{name} must be different numbers in [0, {batch}), got {numbers}")
    return numbers


def running_backward() -> int:
    """The number of the backward pass that runs here; -1 outside of one, and where a graph is traced."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def check_no_recomputation(name: str, made_in: int) -> None:
    """Raises RuntimeError where activation checkpointing runs a forward pass again with a memory made outside of it.

    The memory has gone on since the first forward pass: the second one would search it as it is now, and add to it
    twice.

    Args:
        name: of the argument that is the memory.
        made_in: `running_backward()` when the memory was made.
    """
    if running_backward() not in (-1, made_in):
        raise RuntimeError(
            f"{name} must be a snapshot under activation checkpointing, got a KNNMemory in a backward pass: "
            f"call memory.snapshot() once, before the checkpointed call, and give that"
        )
