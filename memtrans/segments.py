"""Where documents begin inside a segment, and where its tokens are padding; on the device, without a host wait.

Shapes: B documents, N tokens of the segment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Beginnings(NamedTuple):
    """Which tokens of a segment belong to documents that begin in it.

    Attributes:
        age: (B, N) int64, how many tokens a token's document has up to and with it; -1 where the document is older than
            the segment.
        left: (B,) int64, how many of the newest tokens belong to the document that goes on behind the segment; -1 where
            it is older than the segment.
    """

    age: Tensor
    left: Tensor

    def beside(self, before: Tensor, behind: Tensor) -> Beginnings:
        """The same where other processes read other segments of the same documents in the same step.

        before, behind: (B,) bool, whether a document begins in a segment before this one, and in one behind it.

        >>> none = beginnings(torch.tensor([[5, 6]]), start=0, end=1)
        >>> none.beside(torch.tensor([True]), torch.tensor([False]))
        Beginnings(age=tensor([[1, 2]]), left=tensor([2]))
        """
        length = self.age.shape[1]
        place = torch.arange(1, length + 1, device=self.age.device)
        age = torch.where((self.age < 0) & before[:, None], place, self.age)
        left = torch.where((self.left < 0) & before, length, self.left)
        return Beginnings(age, torch.where(behind, 0, left))


def beginnings(ids: Tensor, start: int | None, end: int | None, real: Tensor | None = None) -> Beginnings:
    """What start and end tokens say: a document begins with the one and behind the other.

    Args:
        ids: (B, N) integers.
        start, end: the tokens; None for none.
        real: (B, N) bool, False for padding, which says nothing. Default: all is real.

    >>> beginnings(torch.tensor([[5, 0, 6, 1, 7]]), start=0, end=1)
    Beginnings(age=tensor([[-1,  1,  2,  3,  1]]), left=tensor([1]))
    >>> beginnings(torch.tensor([[5, 6, 1], [5, 6, 7]]), start=None, end=1).left.tolist()
    [0, -1]
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    begins = torch.full_like(ids, -1, dtype=torch.int64)  # where one begins, (B, N + 1): the last is behind the segment
    begins = torch.nn.functional.pad(begins, (0, 1), value=-1)
    for token, behind in ((start, 0), (end, 1)):
        if token is not None:
            said = ids == token if real is None else (ids == token) & real
            marks = torch.nn.functional.pad(torch.where(said, place + behind, -1), (behind, 1 - behind), value=-1)
            begins = torch.maximum(begins, marks)
    since = begins.cummax(dim=1).values
    age = torch.where(since[:, :-1] < 0, -1, place - since[:, :-1] + 1)
    return Beginnings(age, torch.where(since[:, -1] < 0, -1, ids.shape[1] - since[:, -1]))


class Padding(NamedTuple):
    """How the tokens of a segment are put in order so that all padding leads: it takes no position then.

    Attributes:
        order: (B, N) int64, padding first, then the real tokens in their order.
        back: (B, N) int64, the order that undoes it.
        skipped: (B,) int64, how many tokens are padding.
    """

    order: Tensor
    back: Tensor
    skipped: Tensor

    @property
    def real(self) -> Tensor:
        """Which tokens are real once padding leads, (B, N) bool."""
        return torch.arange(self.order.shape[1], device=self.order.device) >= self.skipped[:, None]


def leading(mask: Tensor) -> Padding:
    """The padding of a segment whose real tokens a mask (B, N) bool says.

    >>> leading(torch.tensor([[True, False, True]]))
    Padding(order=tensor([[1, 0, 2]]), back=tensor([[1, 0, 2]]), skipped=tensor([1]))
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return Padding(order, order.argsort(dim=1), (~mask).sum(dim=1))


def ordered(tensor: Tensor, order: Tensor) -> Tensor:
    """Tokens (B, N) or vectors (B, N, width) in another order (B, N).

    >>> ordered(torch.tensor([[4, 5, 6]]), torch.tensor([[2, 0, 1]]))
    tensor([[6, 4, 5]])
    """
    index = order if tensor.dim() == 2 else order[..., None].expand_as(tensor)
    return tensor.gather(1, index)


def mask_of(mask: Tensor | None, lengths: Tensor | None, length: int, causal: bool) -> Tensor | None:
    """The tokens (B, N) bool that are real by a mask (B, N) and by lengths (B,); None where that hides nothing.

    In a causal segment no real token sees the padding that lengths alone put behind it.

    >>> mask_of(torch.tensor([[False, True, True]]), torch.tensor([2]), 3, causal=True)
    tensor([[False,  True, False]])
    >>> mask_of(None, torch.tensor([2]), 3, causal=False)
    tensor([[ True,  True, False]])
    """
    if lengths is None or (mask is None and causal):
        return mask
    real = torch.arange(length, device=lengths.device) < lengths[:, None]
    return real if mask is None else mask & real


class Segment(NamedTuple):
    """What is known of the N tokens of a segment, in the order in which layers read them.

    Attributes:
        length: N.
        counted: (B,) int64, how many tokens of each row are real. Default: all.
        padding: the order in which padding leads. Default: padding is at the tail, if there is any.
        beginnings: of documents inside the segment. Default: none begins in it.
    """

    length: int
    counted: Tensor | None = None
    padding: Padding | None = None
    beginnings: Beginnings | None = None

    @property
    def lengths(self) -> Tensor | None:
        """How many tokens of each row are real where padding is at the tail, (B,); None where it leads, or is none."""
        return self.counted if self.padding is None else None

    @property
    def real(self) -> Tensor | None:
        """Which tokens are real, (B, N) bool; None where all are."""
        if self.padding is not None:
            return self.padding.real
        if self.counted is None:
            return None
        return torch.arange(self.length, device=self.counted.device) < self.counted[:, None]


def segment_of(length: int, lengths: Tensor | None, mask: Tensor | None, causal: bool) -> Segment:
    """A segment of N = `length` tokens, of which a mask (B, N) bool and lengths (B,) say what is real.

    Padding leads in it where `mask_of` says that it has to be hidden.

    >>> segment = segment_of(3, None, torch.tensor([[True, False, True]]), causal=True)
    >>> segment.counted.tolist(), segment.lengths, segment.real.tolist()
    ([2], None, [[False, True, True]])
    >>> segment = segment_of(3, torch.tensor([2]), None, causal=True)
    >>> segment.padding, segment.lengths.tolist(), segment.real.tolist()
    (None, [2], [[True, True, False]])
    """
    real = mask_of(mask, lengths, length, causal)
    if real is None:
        return Segment(length, lengths)
    padding = leading(real)
    return Segment(length, length - padding.skipped, padding)
