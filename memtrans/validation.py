"""What the model refuses before anything changes: each error names the argument, its value and what was expected.

Shapes: B documents, N tokens, X cached XL tokens, G key/value heads, D head width. Values (ids, counts, finiteness) are
looked at on CPU tensors alone: on a GPU a look is a host round trip, which the model's `validate` asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels import checks


def may_look(tensor: Tensor, validate: bool = False) -> bool:
    """Whether values may be looked at: not while tracing, and off the CPU only on request."""
    return not torch.compiler.is_compiling() and tensor.numel() > 0 and (tensor.device.type == "cpu" or validate)


def check_ids(
    name: str, ids: Tensor, vocabulary: int, pad_id: int | None, device: torch.device, validate: bool
) -> None:
    """Refuses what is no (B, N) of ids in [0, vocabulary), or `pad_id`."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be integers of shape (B, N), got {ids.dtype} {tuple(ids.shape)}")
    checks.same_device(device, **{name: ids})
    if may_look(ids, validate):
        wrong = (ids < 0) | (ids >= vocabulary)
        if pad_id is not None:
            wrong = wrong & (ids != pad_id)
        if bool(wrong.any()):
            raise IndexError(f"{name} must be token ids in [0, {vocabulary}), got {int(ids[wrong][0])}")


def check_embeddings(embeds: Tensor, width: int, device: torch.device, validate: bool) -> None:
    """Refuses what is no finite (B, N, width)."""
    checks.floating(inputs_embeds=embeds)
    checks.same_device(device, inputs_embeds=embeds)
    if embeds.dim() != 3 or embeds.shape[2] != width:
        raise ValueError(f"inputs_embeds must have shape (B, N, {width}), got {tuple(embeds.shape)}")
    check_finite("inputs_embeds", embeds, validate)


def check_finite(name: str, tensor: Tensor, validate: bool = False) -> None:
    """Refuses infinite and NaN components, where values may be looked at."""
    if may_look(tensor, validate) and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, got infinite or NaN components")


def check_numbers(name: str, tensor: Tensor) -> None:
    """Refuses NaN components, where values may be looked at."""
    if may_look(tensor) and bool(tensor.isnan().any()):
        raise ValueError(f"{name} must be numbers, got NaN components")


def check_counts(hidden: Tensor, **counts: Tensor | None) -> None:
    """Refuses what is no (B,) int64 on the device of hidden (B, N, dim), or holds a negative number."""
    for name, count in counts.items():
        if count is not None:
            checks.Letters(B=hidden.shape[0]).bind(name, count, "B")
            checks.typed(torch.int64, **{name: count})
            checks.same_device(hidden.device, **{name: count})
            if may_look(count) and int(count.min()) < 0:
                raise ValueError(f"{name} must not be negative, got {count.tolist()}")


def check_cache(name: str, cache: Tensor, batch: int, kv_heads: int, width: int, device: torch.device) -> None:
    """Refuses what is no XL cache (B, X, 2, D), or (B, G, X, 2, D) if G > 1."""
    heads = () if kv_heads == 1 else (kv_heads,)
    expected = (batch, *heads, cache.shape[-3] if cache.dim() >= 3 else "X", 2, width)
    if tuple(cache.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(cache.shape)}")
    checks.floating(**{name: cache})
    checks.same_device(device, **{name: cache})


def at_least(low: int, **sizes: int) -> None:
    """Refuses a size below `low`."""
    for name, size in sizes.items():
        if size < low:
            raise ValueError(f"{name} must be at least {low}, got {size}")
