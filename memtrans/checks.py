"""What the model and its layers refuse before anything changes: an error names the argument, its value and what was
expected.

Shapes: B documents, H query heads, G key/value heads, N tokens, X cached XL tokens, L = X + N local keys, D head width,
V tokens of the vocabulary. Values (ids, counts, finiteness) are looked at on CPU tensors alone: on a GPU a look is a
host round trip, which the model's `validate` asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from memtrans.pairs import pair_shape
from memtrans_kernels import checks
from memtrans_kernels.checks import may_look

IGNORED = -100  # a label that no loss counts, as in PyTorch and in transformers


def check_ids(
    name: str,
    ids: Tensor,
    vocabulary: int | None,
    besides: Sequence[int] | None,
    device: torch.device | None,
    validate: bool,
) -> None:
    """Raises ValueError unless `ids` is an int tensor (B, N), and IndexError unless each is in [0, V) or `besides`.

    vocabulary: None where it is not known how many there are. device: None where any will do.
    """
    checks.tensors(**{name: ids})
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be integers of shape (B, N), got {ids.dtype} {tuple(ids.shape)}")
    if ids.shape[0] == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(ids.shape)}")
    if device is not None:
        checks.same_device(device, **{name: ids})
    if may_look(ids, validate):
        wrong = ids < 0 if vocabulary is None else (ids < 0) | (ids >= vocabulary)
        for known in besides or ():
            wrong = wrong & (ids != known)
        if bool(wrong.any()):
            raise IndexError(f"{name} must be token ids in [0, {vocabulary or 'V'}), got {int(ids[wrong][0])}")


def check_labels(
    labels: Tensor, shape: tuple[int, int], vocabulary: int | None, pad_id: int, device: torch.device, validate: bool
) -> None:
    """Raises ValueError unless `labels` is an int tensor of `shape` (B, N), and IndexError as `check_ids` does.

    pad_id and IGNORED are labels too. vocabulary: None where the logits are of other classes.
    """
    check_ids("labels", labels, vocabulary, (pad_id, IGNORED), device, validate)
    if labels.shape != shape:
        raise ValueError(f"labels must have shape {tuple(shape)}, got {tuple(labels.shape)}")


def check_hidden(name: str, hidden: Tensor, width: int | None, weight: Tensor | None) -> None:
    """Raises unless `hidden` is a tensor (B, N, width) of the weights' device and dtype.

    Autocast makes every floating-point dtype fit. Where no weight may be looked at (None; see `layers.py`), or no width
    is known, the layer that `hidden` comes to judges them.

    Raises:
        TypeError: `hidden` is no tensor, or of another dtype. ValueError: its shape or device is another.
    """
    checks.tensors(**{name: hidden})
    checks.floating(**{name: hidden})
    if weight is not None:
        checks.same_device(weight.device, **{name: hidden})
    if hidden.dim() != 3 or width not in (None, hidden.shape[2]):
        raise ValueError(f"{name} must have shape (B, N, {width or 'dim'}), got {tuple(hidden.shape)}")
    if hidden.shape[0] == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(hidden.shape)}")
    if weight is None or not weight.dtype.is_floating_point:
        return
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"{name} must be {weight.dtype} like the weights (or autocast be on), got {hidden.dtype}")


def check_ones(name: str, mask: Tensor, validate: bool = False) -> None:
    """Raises ValueError unless `mask` is a tensor (B, N) of ones and zeros; where values may be seen."""
    checks.tensors(**{name: mask})
    if mask.dim() != 2:
        raise ValueError(f"{name} must have shape (B, N), got {tuple(mask.shape)}")
    if may_look(mask, validate) and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"{name} must be 1 for tokens and 0 for padding, got {mask.tolist()}")


def check_finite(name: str, tensor: Tensor, validate: bool = False) -> None:
    """Raises ValueError if `tensor` has an infinite or NaN component, where values may be looked at."""
    if may_look(tensor, validate) and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, got infinite or NaN components")


def check_count(name: str, count: Tensor | None, batch: int, device: torch.device, most: int | None = None) -> None:
    """Raises ValueError or TypeError unless `count` is None, or an int64 tensor (B,) of numbers from 0 to `most`."""
    if count is not None:
        checks.Letters(B=batch).bind(name, count, "B")
        checks.typed(torch.int64, **{name: count})
        checks.same_device(device, **{name: count})
        checks.within(name, count, 0, most)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_tokens(name: str, mask: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """Raises ValueError or TypeError unless `mask` is None, or a bool tensor (B, N)."""
    if mask is not None:
        checks.Letters(B=batch, N=length).bind(name, mask, "B N")
        checks.typed(torch.bool, **{name: mask})
        checks.same_device(device, **{name: mask})


def check_cache(
    name: str, cache: Tensor, batch: int, kv_heads: int, widths: tuple[int, int], device: torch.device
) -> None:
    """Raises ValueError or TypeError unless `cache` is a floating-point XL cache.

    That is a tensor (B, X, 2, D), or (B, G, X, 2, D) if G > 1, of any X; (1, D + E) stands for (2, D) where keys and
    values differ in their widths D and E.
    """
    checks.floating(**{name: cache})
    heads = () if kv_heads == 1 else (kv_heads,)
    expected = (batch, *heads, cache.shape[-3] if cache.dim() >= 3 else "X", *pair_shape(*widths))
    if tuple(cache.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(cache.shape)}")
    checks.same_device(device, **{name: cache})


def check_bias(bias: Tensor | None, batch: int, heads: int, length: int, local_keys: int, device: torch.device) -> None:
    """Raises ValueError or TypeError unless `bias` is None, or floating point and fits N queries over L local keys.

    A bias fits by distance, (H, distances), or dense: (at least N, at least L) behind axes that broadcast against
    (B, H).
    """
    if bias is None:
        return
    checks.floating(rel_pos_bias=bias)
    checks.same_device(device, rel_pos_bias=bias)
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


def sizes(low: int, **given: Any) -> tuple[int, ...]:
    """The integers given; raises TypeError for what is none, and ValueError for one below `low`."""
    return tuple(checks.integer(name, size, low) for name, size in given.items())


def whole_number(name: str, number: Any, low: int | None = None) -> int:
    """The integer that `number` is; 0.0, upstream's default of some counts, is one. Raises as `sizes` does."""
    is_whole = isinstance(number, float) and number.is_integer()
    return checks.integer(name, int(number) if is_whole else number, low)


def check_number(name: str, number: Any, above: float = -math.inf) -> None:
    """Raises ValueError unless `number` is a finite number above `above`."""
    if not isinstance(number, Real) or not above < float(number) < math.inf:
        expected = "a finite number" + ("" if above == -math.inf else f" above {above}")
        raise ValueError(f"{name} must be {expected}, got {number!r}")
