"""Evaluation over held-out documents, with the memory and with retrieval off, and a look at what is retrieved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memtrans.cross_entropy import in_chunks
from memtrans.data.documents import Document, InOrder
from memtrans.data.recall import CHANCE, FAR
from memtrans.data.stream import NOT_SCORED, Batch, DocumentStream
from memtrans.distributed.ranks import ALONE, Ranks
from memtrans.layers import evaluating
from memtrans.training.reader import DocumentReader
from memtrans.transformer import MemorizingTransformer

POSITIONS = (0, *(512 << power for power in range(14)))  # tokens; the last is 4 million

MOST_NATS = 700.0  # of which there is an exponential


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient is infinite or NaN: the model is lost, and no checkpoint of it was written."""


@dataclass(frozen=True)
class Evaluation:
    """What a model does on held-out documents.

    Attributes:
        bits_per_byte: of the scored bytes. nats_per_token: of the scored tokens.
        far_accuracy: share of the far questions answered; None without any.
        scored: bytes scored. tokens: tokens scored. far_questions: of them asked for long ago.
        by_position: bits per byte of the segments that begin so many tokens into their document: from each of
            POSITIONS to the next.
    """

    bits_per_byte: float
    nats_per_token: float
    far_accuracy: float | None
    scored: int
    tokens: int
    far_questions: int
    by_position: dict[int, float]


def perplexity(nats: float) -> float | None:
    """Of a mean over tokens; None where it is too large for a number.

    >>> perplexity(0.0)
    1.0
    """
    return math.exp(nats) if nats < MOST_NATS else None


def negative_log_likelihood(logits: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    """Sum over the scored labels, in nats, float32; of each label by itself (B·N,) with `reduction="none"`."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NOT_SCORED, reduction=reduction)


def scores_in_chunks(model: MemorizingTransformer, tokens: Tensor) -> bool:
    """Whether a model that scores what its pad_id says is asked for a segment's losses, not for its logits (B, N, V).

    It then holds no more than a chunk of them.
    """
    return model.pad_id == NOT_SCORED and in_chunks(tokens.numel(), model.num_tokens)


def held_out_stream(documents: Sequence[Document], batch: int, segment: int, ranks: Ranks = ALONE) -> DocumentStream:
    """Every document once, each from its beginning; no more rows than documents.

    Each rank reads its share of the rows, or all of them where there are fewer rows than ranks.
    """
    batch = min(batch, len(documents))
    return DocumentStream(InOrder(documents), batch, segment, ranks.rows(batch) if batch >= ranks.size else None)


@torch.no_grad()
def evaluate(
    model: MemorizingTransformer,
    stream: DocumentStream,
    most_bytes: int,
    *,
    retrieval: bool = True,
    dtype: torch.dtype = torch.float32,
    keep_memory: bool = False,
    on_segment: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Reads a stream to its end, or until tokens of `most_bytes` bytes were read; the memory starts empty.

    Args:
        retrieval: False keeps the memory empty: the same bytes without it.
        dtype: what matrix products compute in, float32 or bfloat16.
        keep_memory: documents read on in the memory of the one before.
        on_segment: called after each segment; may raise to stop.
        ranks: that read a share of the stream each; all of them get the same result.

    Raises:
        NonFiniteLossError: the loss is infinite or NaN.
    """
    device = model.device
    reader = DocumentReader(model, len(stream.rows), retrieval=retrieval, dtype=dtype, keep_memory=keep_memory)
    placed = torch.zeros(2, len(POSITIONS), dtype=torch.float64, device=device)  # nats and bytes by position
    far = torch.zeros(2, dtype=torch.int64, device=device)  # asked, answered
    read = scored = tokens = 0
    with evaluating(model):
        while read < most_bytes and (batch := stream.next()) is not None:
            on_device = batch.to(device)
            losses, answers = _judged(reader, on_device)
            placed += _by_position(losses, on_device)
            far += answers
            tokens, scored, read = (
                tokens + batch.scored,
                scored + batch.scored + batch.more,
                read + batch.real + batch.more,
            )
            on_segment()
    shares = [(placed.tolist(), far.tolist())]
    if len(stream.rows) < stream.batch:
        shares = ranks.gather(shares[0])
    nats, sizes = torch.tensor([of_rank for of_rank, _ in shares], dtype=torch.float64).sum(dim=0).tolist()
    asked, answered = (sum(numbers) for numbers in zip(*(of_rank for _, of_rank in shares), strict=True))
    total = sum(nats)
    if not math.isfinite(total):
        raise NonFiniteLossError(f"the loss on held-out text must be finite, got {total} over {scored} bytes")
    bits = total / math.log(2) / scored if scored else math.nan
    by_position = {
        position: loss / math.log(2) / size for position, loss, size in zip(POSITIONS, nats, sizes, strict=True) if size
    }
    mean = total / tokens if tokens else math.nan
    return Evaluation(bits, mean, answered / asked if asked else None, scored, tokens, asked, by_position)


def _judged(reader: DocumentReader, batch: Batch) -> tuple[Tensor, Tensor]:
    """Reads a segment. Returns the nats of each label (B, N), and what `_far_answers` does."""
    if batch.distances is None and scores_in_chunks(reader.model, batch.tokens):
        return reader.losses(batch), torch.zeros(2, dtype=torch.int64, device=batch.tokens.device)
    logits = reader.read(batch)
    losses = negative_log_likelihood(logits, batch.labels, reduction="none").view_as(batch.labels)
    return losses, _far_answers(logits, batch)


def _by_position(losses: Tensor, batch: Batch) -> Tensor:
    """Nats and scored bytes of a segment, by where it begins in its document (2, POSITIONS)."""
    sizes = (batch.labels != NOT_SCORED) if batch.sizes is None else batch.sizes
    sums = torch.stack((losses.sum(dim=1), sizes.sum(dim=1)))  # (2, B)
    bounds = torch.tensor(POSITIONS[1:], device=losses.device)
    place = F.one_hot(torch.bucketize(batch.offsets, bounds, right=True), len(POSITIONS))
    return sums.double() @ place.double()


def _far_answers(logits: Tensor, batch: Batch) -> Tensor:
    """How many far questions a segment asks, and how many the likeliest byte answers (2,)."""
    if batch.distances is None:
        return torch.zeros(2, dtype=torch.int64, device=logits.device)
    far = batch.distances >= FAR
    return torch.stack((far.sum(), (far & (logits.argmax(dim=-1) == batch.labels)).sum()))


def evaluate_both(
    model: MemorizingTransformer,
    documents: Sequence[Document],
    batch: int,
    segment: int,
    most_bytes: int,
    ranks: Ranks = ALONE,
    **options: Any,
) -> dict[str, Any]:
    """The same held-out bytes with the memory and with retrieval off, as they stand in reports.

    ranks: that read a share of the documents each. options: `dtype`, `keep_memory`, `on_segment` of `evaluate`.
    """
    streams = (held_out_stream(documents, batch, segment, ranks) for _ in range(2))
    on, off = (
        evaluate(model, stream, most_bytes, retrieval=retrieval, ranks=ranks, **options)
        for retrieval, stream in zip((True, False), streams, strict=True)
    )
    report: dict[str, Any] = {
        "eval_bits_per_byte": on.bits_per_byte,
        "eval_bits_per_byte_without_memory": off.bits_per_byte,
        "eval_nats_per_token": on.nats_per_token,
        "eval_nats_per_token_without_memory": off.nats_per_token,
        "eval_perplexity": perplexity(on.nats_per_token),
        "eval_perplexity_without_memory": perplexity(off.nats_per_token),
        "eval_scored_bytes": on.scored,
        "eval_scored_tokens": on.tokens,
        "eval_by_position": on.by_position,
        "eval_by_position_without_memory": off.by_position,
    }
    if on.far_accuracy is not None:
        report |= {
            "recall_accuracy": on.far_accuracy,
            "recall_accuracy_without_memory": off.far_accuracy,
            "recall_chance": CHANCE,
            "recall_questions": on.far_questions,
        }
    return report
