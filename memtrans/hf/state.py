"""What one forward pass of a model with a memory knows; the same object in a recomputed pass.

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memtrans.hf.layer_memory import Asking
from memtrans.hf.masks import Padding
from memtrans.hf.rotation import Angles, Rotation
from memtrans.memory.observation import Observation
from memtrans.memory.snapshot import MemorySnapshot


@dataclass(frozen=True)
class Watched:
    """Who watches a pass.

    Attributes:
        tell: is called with the number of a layer and what it saw. wants_local: whether for its local weights too.
        ids: of the tokens that the memory holds (keys), and their positions (values); None where they are not kept.
    """

    tell: Callable[[int, Observation], object]
    wants_local: bool
    ids: MemorySnapshot | None = None


class Stored(NamedTuple):
    """What a layer adds to its memory.

    Attributes:
        keys: (B, G, N, D), turned. values: (B, G, N, E). counts: (B,) int64, how many of each document; None for all.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor | None


@dataclass(eq=False)
class ForwardState:
    """What the attention function of every chosen layer is handed.

    Attributes:
        snapshots: by layer. k: K. combine: as in `add_memory`.
        searches: whether this pass looks at the memory.
        entries: () int64, of the longest document, which the offsets depend on.
        asking: by layer, how it is asked; empty while training: a layer then finds out by itself, as it may be run
            again by a checkpoint.
        blind: (1 or B, N) bool, the tokens that look at no memory; None for none.
        sink: how many of the first real tokens are not stored. padding: None where all tokens are real.
        saying: by layer, what is made of its values; empty while training, as `asking` is, and where nothing is stored.
        as_they_are: whether values are stored as they are, with those of the tokens behind them where the layer has
            learned to say these, and `saying` is for what attention to them gives: in a calibration.
        turns: by layer, how a key is turned before it is stored; none for a layer without rotary positions.
        plain: whether the pass was given no mask, positions or cache: each token then sees all before it.
        watched: who watches; None for nobody. told: what each layer saw, of which they are told after the pass.
        seen: layers whose attention function was handed this.
        stored: by layer, what `store` adds once every layer has run, so that a pass that fails adds nothing; None where
            nothing is added: in a pass that does not write, and in layers that a checkpoint runs again.
        store: adds it.
    """

    snapshots: Mapping[int, MemorySnapshot]
    k: int
    combine: str
    searches: bool
    entries: Tensor
    asking: Mapping[int, Asking]
    blind: Tensor | None
    sink: int
    padding: Padding | None
    turns: Mapping[int, tuple[Rotation, Angles]]
    plain: bool = False
    saying: Mapping[int, Tensor | None] = field(default_factory=dict)
    as_they_are: bool = False
    watched: Watched | None = None
    told: list[tuple[int, Observation]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    stored: dict[int, Stored] | None = None
    store: Callable[[Mapping[int, Stored]], None] | None = None
    made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What every layer makes alike, made by the first; the key holds what it was made of."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def kept(tokens: Tensor, state_sink: int, padding: Padding | None) -> tuple[Tensor, Tensor | None]:
    """The part of tokens (B, G, N, D) that is stored, and how many of it for each document: no padding, no sinks."""
    if padding is None:
        return tokens[:, :, state_sink:], None
    padding = padding.to(tokens.device)  # layers may be on several
    first = padding.left + state_sink
    at = (first[:, None] + torch.arange(tokens.shape[2], device=tokens.device)).clamp(max=tokens.shape[2] - 1)
    at = at[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
    return tokens.gather(2, at), (padding.real - state_sink).clamp(min=0)


def behind(values: Tensor, padding: Padding | None) -> Tensor:
    """For each token of values (B, G, N, E) the value of the one behind it; 0 where that is padding, or none.

    >>> behind(torch.tensor([[[[1.0], [2.0], [3.0]]]]), None).flatten().tolist()
    [2.0, 3.0, 0.0]
    """
    moved = torch.nn.functional.pad(values[:, :, 1:], (0, 0, 0, 1))
    if padding is None:
        return moved
    padding = padding.to(values.device)
    last = padding.left + padding.real - 1
    gone = torch.arange(values.shape[2], device=values.device) >= last[:, None]
    return moved.masked_fill(gone[:, None, :, None], 0.0)
