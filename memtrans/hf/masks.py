"""What the mask and the positions of a pass tell of its tokens: which are real, and where their documents begin.

A mask is (B, L), or dense: (B, 1 or H, N, L), bool or added to logits, or one of these for each type of layer. A dense
one tells something of a pass without a cache alone: `generate` hands on those that it has prepared, with positions.
Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtrans_kernels.checks import may_look


@dataclass(frozen=True)
class Padding:
    """Which of a pass's tokens are real.

    Attributes:
        left: (B,) int64, padding before the real tokens. real: (B,) int64, how many there are.
    """

    left: Tensor
    real: Tensor

    def to(self, device: torch.device) -> Padding:
        """The same on a device."""
        return Padding(self.left.to(device), self.real.to(device))

    def positions(self, length: int) -> Tensor:
        """The positions of so many tokens (B, N): those of the real ones count from 0."""
        return (torch.arange(length, device=self.left.device) - self.left[:, None]).clamp(min=0)


def padding_of(mask: Any, length: int, *, dense: bool = True) -> Padding | None:
    """What a mask says of the last N tokens; None where it says nothing, or is dense and those are not asked.

    Raises ValueError for a mask with a hole between real tokens.
    """
    told = _tensor(mask)
    if told is None or (told.dim() == 4 and not (dense and told.shape[-1] == length)):
        return None
    new = told[:, -length:].bool() if told.dim() == 2 else _real(_pairs(told))
    left, real = (new.cumsum(-1) == 0).sum(-1), new.sum(-1)
    if may_look(told):
        last = (new * torch.arange(1, length + 1, device=told.device)).amax(-1)
        holes = (last - left != real) & (real > 0)
        if bool(holes.any()):
            raise ValueError(
                f"attention_mask must be 1 for tokens that follow each other, got holes in rows "
                f"{holes.nonzero().flatten().tolist()}"
            )
    return Padding(left, real)


def begins_of(mask: Any, positions: Any, length: int) -> Tensor | None:
    """Which tokens of a pass without a cache begin a document (1 or B, N), padding among them; None where nothing says.

    Several documents in a row are told by a dense mask or, where there is no mask, by positions that do not go on:
    transformers tells them so too, in a pass that makes no cache.
    """
    told = _tensor(mask)
    if told is not None and told.dim() == 4 and told.shape[-1] == length:
        return ~_pairs(told).tril(-1).any(-1)
    if told is None and isinstance(positions, Tensor) and positions.dim() == 2:
        return positions.diff(prepend=positions[:, :1] - 2) != 1
    return None


def ranks_of(begins: Tensor | None, mask: Any, positions: Any, cache: Any, given: Tensor) -> Tensor:
    """How many tokens of its document stand before each real one (1 or B, N), in the pass and what its cache holds.

    begins: see `begins_of`. given: (B, N, ...), what the pass is of.
    """
    length, told = given.shape[1], _tensor(mask)
    if cache is not None and isinstance(positions, Tensor):
        return positions
    if told is not None and told.dim() == 2:
        return (told[:, -length:] if cache is None else told).cumsum(-1)[:, -length:] - 1
    place = torch.arange(length, device=given.device)[None]
    if cache is not None:
        return place + cache.get_seq_length()
    return place if begins is None else place - torch.where(begins, place, 0).cummax(-1).values


def check_one_document(begins: Tensor | None, padding: Padding | None) -> None:
    """Raises ValueError for rows of several documents, which a memory would take for one. begins: see `begins_of`."""
    if begins is None or not may_look(begins):
        return
    place = torch.arange(begins.shape[1], device=begins.device)
    if padding is not None:
        begins = begins & (place >= padding.left[:, None]) & (place < (padding.left + padding.real)[:, None])
    several = begins.sum(-1) > 1
    if bool(several.any()):
        raise ValueError(
            f"a pass that writes must have one document in a row, got several in rows "
            f"{several.nonzero().flatten().tolist()}: give each a row"
        )


def _tensor(mask: Any) -> Tensor | None:
    """A mask that is a tensor of 2 or 4 dimensions; of one for each type of layer, the first."""
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    return mask if isinstance(mask, Tensor) and mask.dim() in (2, 4) else None


def _pairs(mask: Tensor) -> Tensor:
    """Which tokens see which by a dense mask: (B, N, N) bool.

    Rows that see later tokens too are padding, which is given something to see so that its softmax is a number.
    """
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    idle = seen[:, :-1].all(-1, keepdim=True)
    return torch.cat((seen[:, :-1] & ~idle, seen[:, -1:]), 1)


def _real(seen: Tensor) -> Tensor:
    """Which tokens are real (B, N): those that see themselves and others, or are seen; or the only one of a row."""
    own, before = seen.diagonal(dim1=-2, dim2=-1), seen.tril(-1)
    return own & (before.any(-1) | before.any(-2) | (own.sum(-1, keepdim=True) == 1))
