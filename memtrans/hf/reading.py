"""Reading whole documents into a memory, segment by segment; on a GPU the passes replay one captured graph.

What is read is checked, its padding moved to the end, and passed over by a reader, which may be kept for the next call.
Shapes: B documents, N tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.checks import check_ids
from memtrans.cuda_graph import EAGER_CALLS, Replay
from memtrans.hf.masks import Padding, padding_of
from memtrans_kernels import checks

WORTH = 4 * EAGER_CALLS  # segments from which capturing a graph pays


def check_documents(decoder: nn.Module, ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raises unless ids are of the decoder's vocabulary (B, any length), and a mask is of their shape."""
    table = decoder.get_input_embeddings()  # type: ignore[operator]
    check_ids("ids", ids, getattr(table, "num_embeddings", None), None, None, validate=False)
    if attention_mask is not None:
        checks.tensors(attention_mask=attention_mask)
        if attention_mask.shape != ids.shape:
            of_ids, of_mask = tuple(ids.shape), tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must be (B, N) as ids are, {of_ids}, got {of_mask}")


def aligned(ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The ids (B, any length) with their padding at the end, and how many of each row are real (B,); None for all.

    Raises ValueError for a mask with a hole between real tokens.
    """
    padding = padding_of(attention_mask, ids.shape[1])
    return (ids, None) if padding is None else (_to_the_right(ids, padding), padding.real)


def _to_the_right(ids: Tensor, padding: Padding) -> Tensor:
    """The ids with their padding at the end, where no real token sees it."""
    at = padding.left[:, None] + torch.arange(ids.shape[1], device=ids.device)
    return ids.gather(1, at.clamp(max=ids.shape[1] - 1))


class Reader:
    """Passes over documents, segment by segment; those of whole segments replay one captured graph where that pays.

    Args:
        decoder: what reads. segment: tokens of a pass. keyword: tells a pass how many of its tokens are real.
        kind: what a caller who keeps this tells it from others by.
    """

    def __init__(self, decoder: nn.Module, segment: int, keyword: str, kind: tuple[int, bool]) -> None:
        self.decoder, self.segment, self.keyword, self.kind = decoder, segment, keyword, kind
        self._place: Tensor | None = None
        self._replay: Replay | None = None

    def read(self, ids: Tensor, real: Tensor | None, read: Callable[[int], object]) -> None:
        """Passes of so many tokens of ids (B, any length), and of what is left of them.

        real: (B,), how many tokens of each row are real, padding is at the end. read: is called with the number of
        tokens of each pass.
        """
        whole = ids.shape[1] // self.segment
        captured = real is None and whole >= WORTH and _stays_on_one_gpu(self.decoder, ids)
        for begin in range(0, ids.shape[1], self.segment):
            part = ids[:, begin : begin + self.segment]
            if captured and part.shape[1] == self.segment:
                self._again(part)
            else:
                said = {} if real is None else {self.keyword: (real - begin).clamp(0, part.shape[1])}
                _pass(self.decoder, part, said)
            read(part.numel())

    def _again(self, part: Tensor) -> None:
        """The same pass as before over other ids."""
        if self._replay is None or self._place is None:
            place = self._place = part.clone()
            self._replay = Replay(lambda: _pass(self.decoder, place, {}), part.device)
        self._place.copy_(part)
        self._replay()

    def release(self) -> None:
        """Lets the graph go."""
        if self._replay is not None:
            self._replay.release()
            self._replay = None


class Readers:
    """The reader of each call of `read`, and the one that is kept from call to call inside `keeping()`.

    Args:
        decoder, segment, keyword: as of `Reader`.

    Attributes:
        kept: the reader that is kept; None for none.
    """

    def __init__(self, decoder: nn.Module, segment: int, keyword: str) -> None:
        self.decoder, self.segment, self.keyword = decoder, segment, keyword
        self.kept: Reader | None = None
        self._keeps = False

    def read(self, ids: Tensor, real: Tensor | None, search: bool, read: Callable[[int], object]) -> None:
        """Passes over documents with a reader that is kept, where one fits, or with another; see `Reader.read`.

        search: whether the passes look at the memory, which a captured one does or does not for good.
        """
        reader = self._reader((ids.shape[0], search))
        reader.read(ids, real, read)
        if reader is not self.kept:
            reader.release()

    def _reader(self, kind: tuple[int, bool]) -> Reader:
        if self.kept is not None and self.kept.kind == kind:
            return self.kept
        reader = Reader(self.decoder, self.segment, self.keyword, kind)
        if self._keeps:
            self.forget()
            self.kept = reader
        return reader

    def forget(self) -> None:
        """The reader that is kept is let go."""
        if self.kept is not None:
            self.kept.release()
            self.kept = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, the reader of a call is kept for the next one of its kind; none is afterwards."""
        before, self._keeps = self._keeps, True
        try:
            yield
        finally:
            self._keeps = before
            self.forget()


def _pass(decoder: nn.Module, ids: Tensor, said: dict[str, Any]) -> None:
    decoder(input_ids=ids, use_cache=False, **said)


def _stays_on_one_gpu(decoder: nn.Module, ids: Tensor) -> bool:
    """Whether a pass is the same work each time: no random numbers, no weights that come and go."""
    devices = {tensor.device for tensor in decoder.parameters()}
    return not decoder.training and ids.is_cuda and devices == {ids.device}
