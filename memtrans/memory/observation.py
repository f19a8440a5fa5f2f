"""What a search found and what attention made of it, told to whoever watches a memory; `memtrans.inspection` does.

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from memtrans.local_keys import LocalKeys
from memtrans.memory.checks import running_backward
from memtrans.segments import Padding


class Observation(NamedTuple):
    """The weights of one call of attention; queries and local keys in the order in which tokens were given.

    Attributes:
        documents: (B,) int64, the document of each row.
        positions: (B, H, N, K) int64, where each entry stood in its document, -1 for none.
        weights: (B, H, N, K), of the retrieved entries, before dropout.
        local: (B, H, N, L), of the local keys; None where it was not asked for.
        tokens: (B, H, N, K) int64, the ids of the entries' tokens, -1 for none; None where they are not kept.
    """

    documents: Tensor
    positions: Tensor
    weights: Tensor
    local: Tensor | None = None
    tokens: Tensor | None = None


class Watch:
    """Who watches a memory, and for what; nobody at first. A memory's rings share it, however often it is laid out.

    Attributes:
        tell: is called with an `Observation` for each call of attention. wants_local: whether with local weights.
    """

    def __init__(self) -> None:
        self.tell: Callable[[Observation], object] | None = None
        self.wants_local = False

    @contextmanager
    def by(self, tell: Callable[[Observation], object], wants_local: bool) -> Iterator[None]:
        """Somebody watches inside a `with`. Raises ValueError where somebody does already."""
        if self.tell is not None:
            raise ValueError("a memory must be watched by one trace at a time, got a second one inside the first")
        self.tell, self.wants_local = tell, wants_local
        try:
            yield
        finally:
            self.tell, self.wants_local = None, False

    @property
    def looks(self) -> bool:
        """Whether somebody watches; a forward pass that a backward pass runs again was seen the first time.

        Raises RuntimeError while a CUDA graph is captured, whose replays nobody would see, and where the whole of a
        pass is one compiled graph; one that may be cut runs this part as it is.
        """
        if self.tell is None:
            return False
        if torch.compiler.is_compiling():
            raise RuntimeError("a traced memory must be read by a model that is not compiled as one graph")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a traced memory must be read outside of a CUDA graph, whose replays nobody would see")
        return running_backward() == -1


@torch.no_grad()
def retrieved_weights(
    scores: Tensor,
    scale: Tensor,
    lse: Tensor,
    offset: Tensor | None = None,
    share: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """exp(scale · score + offset - lse), the weights of retrieved entries (B, H, N, K); 0 where there is none.

    Args:
        scores: (B, H, N, K), -inf for none. scale: (H,). lse: (B, H, N), of the softmax that they are in.
        offset: (H,). Default: 0. share: (B, H, N) or (H, 1), what a gate gives to them. Default: 1.
        soft_cap: what bounds scale · score. Default: nothing.
    """
    logits = capped(scores * scale[:, None, None], soft_cap).masked_fill(scores == -torch.inf, -torch.inf)
    if offset is not None:
        logits = logits + offset[:, None, None]
    return weighed(logits, lse, share)


@torch.no_grad()
def local_weights(query: Tensor, local: LocalKeys, scale: Tensor, lse: Tensor, share: Tensor | None = None) -> Tensor:
    """exp(scale · <q, k> + bias - lse), the weights of the local keys (B, H, N, L); 0 for what is not seen.

    Args:
        query: (B, H, N, D). local: the local context. scale, lse, share: see `retrieved_weights`.
    """
    length, local_keys = query.shape[2], local.key.shape[2]
    wide = lse.dtype
    grouped = query.to(wide).unflatten(1, (local.key.shape[1], -1))
    logits = torch.einsum("bghnd,bgld->bghnl", grouped, local.key.to(wide)).flatten(1, 2) * scale[:, None, None]
    logits = capped(logits, local.soft_cap)
    distance = torch.arange(local_keys - length, local_keys, device=query.device)[:, None] - torch.arange(
        local_keys, device=query.device
    )  # (N, L)
    if local.bias_table is not None:
        logits = logits + local.bias_table[:, distance.abs().clamp(max=local.bias_table.shape[1] - 1)]
    if local.bias_dense is not None:
        logits = logits + local.bias_dense
    if local.causal:
        logits = logits.masked_fill(distance < 0, -torch.inf)
    if local.first is not None:
        before = torch.arange(local_keys, device=query.device) < local.first[..., None]  # (B, N, L)
        logits = logits.masked_fill(before[:, None], -torch.inf)
    if local.local_length is not None:
        gone = torch.arange(local_keys, device=query.device) < local_keys - local.local_length[:, None]  # (B, L)
        logits = logits.masked_fill(gone[:, None, None], -torch.inf)
    return weighed(logits, lse, share)


def as_given(of_queries: Tensor, padding: Padding | None) -> Tensor:
    """What is known of each query (B, H, N, ...), by the place of its token before padding was put first."""
    if padding is None:
        return of_queries
    index = padding.back[:, None, :, None].expand_as(of_queries)
    return of_queries.gather(2, index)


def keys_as_given(of_keys: Tensor, padding: Padding | None) -> Tensor:
    """The same of each local key (B, H, N, L): what was cached before the segment, then the segment."""
    if padding is None:
        return of_keys
    cached, skipped = of_keys.shape[3] - of_keys.shape[2], padding.skipped[:, None]
    in_front = torch.arange(cached, device=of_keys.device) + skipped  # padding lies before what is cached
    own = torch.where(padding.back < skipped, padding.back, padding.back + cached)
    index = torch.cat((in_front, own), dim=1)[:, None, None].expand_as(of_keys)
    return of_keys.gather(3, index)


def capped(products: Tensor, soft_cap: float | None) -> Tensor:
    """soft_cap · tanh(products / soft_cap)."""
    return products if soft_cap is None else soft_cap * (products / soft_cap).tanh()


def weighed(logits: Tensor, lse: Tensor, share: Tensor | None) -> Tensor:
    """exp(logits - lse) · share; a query with nothing to attend to has an lse of -inf, and weights of 0."""
    weights = (logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
    return weights if share is None else weights * share[..., None]
