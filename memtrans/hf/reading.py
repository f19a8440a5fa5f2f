"""Reading whole documents into a memory, segment by segment; on a GPU the passes replay one captured graph.

Shapes: B documents, N tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.cuda_graph import EAGER_CALLS, Replay
from memtrans.hf.state import Padding

WORTH = 4 * EAGER_CALLS  # segments from which capturing a graph pays


def to_the_right(ids: Tensor, padding: Padding) -> Tensor:
    """The ids (B, any length) with their padding at the end, where no real token sees it."""
    at = padding.left[:, None] + torch.arange(ids.shape[1], device=ids.device)
    return ids.gather(1, at.clamp(max=ids.shape[1] - 1))


def read_segments(
    decoder: nn.Module, ids: Tensor, segment: int, real: Tensor | None, keyword: str, read: Callable[[int], object]
) -> None:
    """Passes of so many tokens of ids (B, any length), and of what is left of them.

    real: (B,), how many tokens of each row are real, padding is at the end; a pass is told, by that keyword, how many
    of its own are. read: is called with the number of tokens of each pass.
    """
    whole = ids.shape[1] // segment
    captured = real is None and whole >= WORTH and _stays_on_one_gpu(decoder, ids)
    place = ids[:, :segment].clone()
    replay = Replay(lambda: _pass(decoder, place, {}), ids.device, captured)
    for begin in range(0, ids.shape[1], segment):
        part = ids[:, begin : begin + segment]
        if captured and part.shape[1] == segment:
            place.copy_(part)
            replay()
        else:
            _pass(decoder, part, {} if real is None else {keyword: (real - begin).clamp(0, part.shape[1])})
        read(part.numel())
    replay.release()


def _pass(decoder: nn.Module, ids: Tensor, said: dict[str, Any]) -> None:
    decoder(input_ids=ids, use_cache=False, **said)


def _stays_on_one_gpu(decoder: nn.Module, ids: Tensor) -> bool:
    """Whether a pass is the same work each time: no random numbers, no weights that come and go."""
    devices = {tensor.device for tensor in decoder.parameters()}
    return not decoder.training and ids.is_cuda and devices == {ids.device}
