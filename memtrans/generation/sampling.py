"""Which token comes next: the likeliest, or one drawn from the likeliest ones. Everything happens on the device.

Source: nucleus sampling (top-p) is Holtzman et al. 2020 (arXiv 1904.09751).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import checks

NO_TOKEN = -1  # in place of a token id, where logits are no numbers, infinite, or -inf for every token
COLDEST = 1e-30  # a temperature below it gives what it gives, but divides finite logits to infinite ones
LEAST = 1e-30  # a probability: smaller ones may be 0 in float32, and would drop the likeliest token too


class NoTokenError(RuntimeError):
    """Logits that name no next token."""


def check_chosen(tokens: Tensor, first: int = 0) -> None:
    """Raises NoTokenError where tokens (B, T), the first of them number `first`, hold NO_TOKEN. Waits for the device.

    >>> check_chosen(torch.tensor([[3, 4], [5, NO_TOKEN]]))
    Traceback (most recent call last):
        ...
    memtrans.generation.sampling.NoTokenError: logits must name a next token, got NaN, infinity, or -inf for all ...
    """
    missing = tokens == NO_TOKEN
    if bool(missing.any()):
        column = int(missing.any(dim=0).int().argmax())
        rows = missing[:, column].nonzero().flatten().tolist()
        raise NoTokenError(
            f"logits must name a next token, got NaN, infinity, or -inf for all tokens, at token {first + column} of "
            f"rows {rows}: weights or memories that are not finite, or a bias that bans every token"
        )


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: the logits' divisor; 0 or less takes the likeliest token always.
        top_k: draw among so many likeliest tokens. Default: all.
        top_p: draw among the fewest likeliest tokens that together have this probability, in (0, 1]. Default: all.
        seed: of the draws. Row b of a batch draws what a single row with seed + b draws, on every device.

    Raises:
        ValueError, TypeError: top_k below 1, top_p outside (0, 1], a temperature that is not finite, a seed that is
            negative; a top_k or seed that is no integer.

    >>> logits = torch.tensor([[0.0, 3.0, 1.0]])
    >>> Sampling(temperature=0).choose(logits, torch.tensor([0.99])).tolist()
    [1]
    >>> Sampling(top_k=2).choose(logits, torch.tensor([0.99])).tolist()
    [2]
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not math.isfinite(self.temperature):
            raise ValueError(f"temperature must be finite, got {self.temperature!r}")
        if self.top_k is not None:
            checks.integer("top_k", self.top_k, low=1)
        if self.top_p is not None and not (_is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not 0 <= checks.integer("seed", self.seed) < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")

    @property
    def draws_tokens(self) -> bool:
        """Whether chance has a part; if not, the likeliest token is taken."""
        return self.temperature > 0

    def draws(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1), (B, tokens) float32; drawn on the host, so that every device gets the same."""
        rows = (torch.Generator("cpu").manual_seed((self.seed + row) % 2**63) for row in range(batch))
        return torch.stack([torch.rand(tokens, generator=row, dtype=torch.float32, device="cpu") for row in rows]).to(
            device
        )

    def choose(self, logits: Tensor, draw: Tensor) -> Tensor:
        """Token ids (B,) int64 of logits (B, V) and uniform numbers draw (B,); NO_TOKEN where logits name none."""
        if not self.draws_tokens:
            best, likeliest = logits.max(dim=-1)  # a NaN, if there is one
            return likeliest.masked_fill(best - best != 0, NO_TOKEN)  # NaN, of NaN and of infinity
        best, ids = logits.float().topk(min(self.top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
        if self.temperature != 1:
            best = best / max(self.temperature, COLDEST)
        probability = best.softmax(dim=-1)  # all NaN, where logits name no token: then nothing is beyond anything
        summed = probability.cumsum(dim=-1)
        before, total = summed - probability, summed[:, -1]  # before: of all that are likelier
        if self.top_p is None or self.top_p == 1:
            beyond = before > (draw * total)[:, None]  # so are tokens of probability 0: all comes before them
        else:
            dropped = before >= max(self.top_p, LEAST)
            beyond = dropped | (before > (draw * probability.masked_fill(dropped, 0).sum(dim=-1))[:, None])
        place = ids.shape[-1] - 1 - beyond.sum(dim=-1)
        return ids.gather(1, place[:, None])[:, 0].masked_fill(total.isnan(), NO_TOKEN)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)
