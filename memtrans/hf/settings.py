"""What `add_memory` was asked for, checked once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from memtrans.checks import check_number
from memtrans.knn_attention import COMBINATIONS
from memtrans_kernels import checks
from memtrans_kernels.backends import check_name

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checks.STORED}


@dataclass(frozen=True)
class MemorySettings:
    """The arguments of `add_memory`; see there. layers: numbers, or "all"."""

    layers: tuple[int, ...] | str
    max_memories: int
    k: int
    distance: str | int
    segment: int
    sink: int
    combine: str
    offset: float | str
    dtype: torch.dtype | None
    spare: int
    keep_ids: bool
    backend: str

    @property
    def turn(self) -> int:
        """How many positions further back than it stood in its segment a key is stored."""
        return self.segment if isinstance(self.distance, str) else self.distance

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        named = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {**asdict(self), "dtype": named}

    @staticmethod
    def from_json(values: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `add_memory`, of what `to_json` gave. Raises ValueError for what it never gives."""
        unknown, named = set(values) - {field.name for field in fields(MemorySettings)}, values.get("dtype")
        if unknown:
            raise ValueError(f"settings must be arguments of add_memory, got {', '.join(sorted(unknown))}")
        if named is not None and named not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {named!r}")
        return {**values, "dtype": None if named is None else DTYPES[named]}


def checked(
    *,
    layers: Any,
    max_memories: Any,
    k: Any,
    distance: Any,
    segment: Any,
    sink: Any,
    combine: Any,
    offset: Any,
    dtype: Any,
    spare: Any,
    keep_ids: bool,
    backend: str,
) -> MemorySettings:
    """Settings of these arguments. Raises ValueError or TypeError for one that will not do."""
    checks.stored(dtype=dtype)
    max_memories = checks.integer("max_memories", max_memories, low=1)
    segment = checks.integer("segment", segment, low=1)
    sink = checks.integer("sink", sink, low=0)
    if distance != "previous":
        if isinstance(distance, str):
            raise ValueError(f"distance must be 'previous' or a number of positions, got {distance!r}")
        distance = checks.integer("distance", distance, low=0)
    if sink >= segment:
        raise ValueError(f"sink must be less than segment={segment}, got {sink}")
    if combine not in COMBINATIONS:
        raise ValueError(f"combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
    return MemorySettings(
        layers=_layers(layers),
        max_memories=max_memories,
        k=checks.integer("k", k, low=1),
        distance=distance,
        segment=segment,
        sink=sink,
        combine=combine,
        offset=_offset(offset),
        dtype=dtype,
        spare=checks.integer("spare", spare, low=0),
        keep_ids=bool(keep_ids),
        backend=check_name(backend),
    )


def _layers(layers: Any) -> tuple[int, ...] | str:
    if layers == "all":
        return "all"
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be 'all' or numbers of layers, got {layers!r}")
    chosen = tuple(checks.integer("layers", layer) for layer in layers)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers must be at least one number and none twice, got {list(chosen)}")
    return chosen


def _offset(offset: Any) -> float | str:
    """ "auto", or a number; minus infinity closes the memory."""
    if isinstance(offset, str):
        if offset != "auto":
            raise ValueError(f"offset must be 'auto' or a number, got {offset!r}")
        return offset
    if offset == float("-inf"):
        return float("-inf")
    check_number("offset", offset)
    return float(offset)
