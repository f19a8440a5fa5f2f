"""Text generation: a prompt of any length is read into the memory, then tokens come one at a time.

Shapes: B documents, N tokens of a segment, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memtrans.checks import check_ids, sizes
from memtrans.cuda_graph import Replay
from memtrans.generation.decoder import Decoder, check_model
from memtrans.generation.sampling import Sampling, check_chosen
from memtrans.layers import evaluating
from memtrans.memory.memory_list import KNNMemoryList
from memtrans.transformer import MemorizingTransformer
from memtrans_kernels import checks

Text = str | bytes | Tensor | np.ndarray | Sequence[int]

LOOK_EVERY = 64  # tokens between two looks whether every row has stopped: on a GPU a look is a host round trip


def generate(
    model: MemorizingTransformer,
    prompt: Text | Sequence[Text],
    tokens: int = 256,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
    start: int | None = None,
    segment: int = 512,
    memories: KNNMemoryList | None = None,
    progress: bool = False,
) -> Tensor:
    """Continues prompts; what they say, however long, stays in the memory.

    Rows do not see each other: each gets what it would get alone, whatever the lengths of the others.

    Args:
        model: on any device; it is put into `eval()` mode meanwhile.
        prompt: one text, or a sequence of B: token ids (a tensor, an array or a list), bytes, or a string, read as its
            UTF-8 bytes. A tensor (B, P) is B texts. An empty text stands for the token `start`.
        tokens: how many to generate, at most.
        temperature: divides the logits; 0 or less is greedy.
        top_k: draw among so many of the likeliest tokens. Default: all.
        top_p: draw among the fewest likeliest tokens that together have this probability. Default: all.
        seed: of the draws; row b draws as seed + b would alone.
        stop: a row that generates this token is finished; the rest of it is filled up with the token.
        start: what an empty text begins with. Default: the model's `clear_memories_on_sos_token_id`, or 0 without one.
        segment: N; give what the model was trained with.
        memories: what was read before; they grow by whole segments, so that an unfinished one at the end, and what an
            XL cache holds, is in none of them. Default: empty ones.
        progress: show how much of the prompt was read, as a bar on standard error.

    Returns:
        The new tokens (B, at most `tokens`) int64, on the model's device. The last one was not read.

    Raises:
        ValueError, IndexError, TypeError: ids outside the vocabulary, an option out of range or of another kind,
            memories that are not this model's, a prompt that is no text, a model inside a wrapper or spread over
            ranks.
        NoTokenError: NaN or infinite logits, or -inf for every token: the token and its rows are named.

    >>> model = MemorizingTransformer(num_tokens=256, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=2)
    >>> generate(model, ["once upon a time", "hello"], tokens=5, segment=8).shape
    torch.Size([2, 5])
    """
    check_model(model)
    sampling = Sampling(temperature, top_k, top_p, seed)
    sizes(1, tokens=tokens)
    _check_token("stop", stop, model)
    _check_token("start", start, model)
    texts = as_texts(prompt, model, start)
    with evaluating(model):
        decoder = Decoder(model, len(texts), segment=segment, memories=memories)
        with reading_bar(sum(map(len, texts)), progress) as read:
            decoder.read(texts, read)
        result = torch.stack(list(stream(decoder, tokens, sampling, stop)), dim=1)
    check_chosen(result)
    if stop is None:
        return result
    finished = (result == stop).all(dim=0).nonzero().flatten().tolist()  # columns where every row has stopped
    return result[:, : finished[0] + 1] if finished else result


def stream(
    decoder: Decoder, tokens: int, sampling: Sampling | None = None, stop: int | None = None, *, capture: bool = True
) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,) int64 on the device, for a decoder that has read its prompts.

    A row whose logits name no token (NaN, infinity, -inf for all) gives -1, and nothing of use behind it.

    Nothing here waits for the device, but for a look now and then whether every row has stopped, if `stop` is given.
    The decoder may read or write on afterwards: a row that stopped goes on behind the last token that it read, which is
    the one before `stop`.

    Args:
        decoder: its model is in `eval()` mode.
        tokens: at most so many.
        sampling: how they are chosen. Default: `Sampling()`.
        stop: as in `generate`.
        capture: on CUDA, replay the step as a captured graph.

    Raises ValueError or TypeError, when the first token is asked for, unless tokens is at least 0 and stop a token id.
    """
    sizes(0, tokens=tokens)
    _check_token("stop", stop, decoder.model)
    sampling = sampling or Sampling()
    decoder.locate()
    draws = sampling.draws(decoder.batch, tokens, decoder.device)
    draw = torch.zeros(decoder.batch, dtype=torch.float32, device=decoder.device)
    chosen = torch.zeros(decoder.batch, dtype=torch.int64, device=decoder.device)
    going_on = torch.ones_like(chosen, dtype=torch.bool)

    def choose() -> None:
        new = sampling.choose(decoder.logits, draw)
        if stop is not None:
            new = torch.where(going_on, new, stop)
            going_on.logical_and_(new != stop)
        chosen.copy_(new)

    def step() -> None:
        decoder.advance(chosen.clamp(min=0), going_on)  # behind NO_TOKEN goes on whatever will be refused
        choose()

    replay = Replay(step, decoder.device, capture)
    every = 1 if decoder.device.type == "cpu" else LOOK_EVERY
    for number in range(tokens):
        if sampling.draws_tokens:
            draw.copy_(draws[:, number])
        if number == 0:
            choose()
        else:
            if decoder.follow_memories():
                replay.release()  # the graph reads what the memories held before
            (step if decoder.is_traced else replay)()
            decoder.move_on()
        yield chosen.clone()
        if stop is not None and (number + 1) % every == 0 and not bool(going_on.any()):
            return


def _check_token(name: str, token: int | None, model: MemorizingTransformer) -> None:
    if token is not None and not 0 <= checks.integer(name, token) < model.vocabulary:
        raise ValueError(f"{name} must be a token id in [0, {model.vocabulary}), got {token}")


@contextmanager
def reading_bar(tokens: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """A bar for reading so many tokens, on standard error where that is a terminal; gives what tells it of more.

    Raises ImportError, which names the extra to install, where tqdm is missing.
    """
    if not shown:
        yield lambda more: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress must be False without tqdm, got True: pip install 'memtrans[train]'") from error
    with tqdm(total=tokens, unit="token", desc="reading", dynamic_ncols=True, disable=None) as bar:
        yield bar.update


def as_texts(prompt: Text | Sequence[Text], model: MemorizingTransformer, start: int | None = None) -> list[Tensor]:
    """A prompt as one tensor of token ids for each row; see `generate`.

    Raises ValueError or TypeError for what is no text, IndexError for ids outside the model's vocabulary.
    """
    if start is None:
        start = model.clear_memories_on_sos_token_id or 0
    texts = [_as_ids(text) for text in _parts(prompt)]
    if not texts:
        raise ValueError("prompt must hold at least one text, got none")
    texts = [text if len(text) else torch.tensor([start], device=text.device) for text in texts]
    for text in texts:
        check_ids("prompt", text[None], model.vocabulary, None, text.device, validate=True)
    return texts


def _parts(prompt: Any) -> list[Any]:
    """The texts of a prompt, which may be a single one."""
    if isinstance(prompt, (str, bytes)):
        return [prompt]
    if hasattr(prompt, "__array__"):  # NumPy's arrays, and tensors
        return list(prompt) if prompt.ndim == 2 else [prompt]
    parts = _listed(prompt)
    several = any(isinstance(part, Iterable) and getattr(part, "ndim", 1) for part in parts)
    return parts if several else [parts]


def _listed(text: Any) -> list[Any]:
    if not isinstance(text, Iterable):
        raise TypeError(f"prompt must be a text (token ids, bytes or a string) or a sequence of texts, got {text!r}")
    return list(text)


def _as_ids(text: Any) -> Tensor:
    """Token ids (P,) int64."""
    if isinstance(text, str):
        text = text.encode()
    if hasattr(text, "__array__"):
        ids = text if isinstance(text, Tensor) else _tensor_of(text)
    else:
        ids = torch.tensor([checks.integer("a token id of prompt", part) for part in _listed(text)], dtype=torch.int64)
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"prompt must hold texts of token ids (P,), got {ids.dtype} {tuple(ids.shape)}")
    return ids.long()


def _tensor_of(array: Any) -> Tensor:
    try:
        return torch.tensor(array)
    except TypeError as error:
        raise TypeError(f"prompt must hold texts of token ids (P,), got an array of {array.dtype}") from error
