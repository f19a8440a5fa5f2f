"""Reading whole documents into a memory, segment by segment; on a GPU the passes replay one captured graph.

Shapes: B documents, N tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.cuda_graph import EAGER_CALLS, Replay
from memtrans.hf.masks import Padding

WORTH = 4 * EAGER_CALLS  # segments from which capturing a graph pays


def to_the_right(ids: Tensor, padding: Padding) -> Tensor:
    """The ids (B, any length) with their padding at the end, where no real token sees it."""
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


def _pass(decoder: nn.Module, ids: Tensor, said: dict[str, Any]) -> None:
    decoder(input_ids=ids, use_cache=False, **said)


def _stays_on_one_gpu(decoder: nn.Module, ids: Tensor) -> bool:
    """Whether a pass is the same work each time: no random numbers, no weights that come and go."""
    devices = {tensor.device for tensor in decoder.parameters()}
    return not decoder.training and ids.is_cuda and devices == {ids.device}
