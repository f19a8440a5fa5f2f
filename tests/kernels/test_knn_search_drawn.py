"""Drawn searches of every kind of keys in one call are exact in every row; tests/gpu has ten thousand of them.

And what judges them notices what is wrong.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers.devices import DEVICE, live_backends
from helpers.drawn_search import Drawn, assert_rows_are_exact, drawn_search
from helpers.hard_keys import hard_keys, queries_near
from helpers.rings import memory, search

pytestmark = pytest.mark.device

BACKENDS = [backend for backend in live_backends("knn_search") if backend != "faiss"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("seed", range(2 if INTERPRETED else 12))
@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_searches_are_exact(backend: str, seed: int) -> None:
    widths = (32, 64, 128) if DEVICE == "cuda" else (8, 32, 64)
    drawn = drawn_search(seed, 6, widths, DTYPES, most=60 if INTERPRETED else 900, most_k=40)
    assert_rows_are_exact(drawn, *search(drawn.query, drawn.held, drawn.k, backend))


@pytest.fixture
def answered() -> tuple[Drawn, torch.Tensor, torch.Tensor]:
    """Two rows of few different keys, and the right answers."""
    rows = [hard_keys("vocabulary", count, 16, torch.float16, count) for count in (900, 700)]
    query = torch.stack([queries_near(keys, 5) for keys in rows])[:, None]
    drawn = Drawn(memory([(0, rows[0]), (100, rows[1])], 600, 50), query, 9)
    return drawn, *search(drawn.query, drawn.held, 9, "reference")


WRONG = {
    "another number of neighbours": lambda scores, slots: slots[0, 0, 1].fill_(-1),
    "returned twice": lambda scores, slots: slots[0, 0, 1, 3:4].copy_(slots[0, 0, 1, 4:5]),
    "no search may see": lambda scores, slots: slots[1, 0, 2, 0:1].fill_(60),
    "a score is not its key's": lambda scores, slots: scores[1, 0, 0, 0:1].add_(0.01),
    "not the oldest, or not older first": lambda scores, slots: slots.copy_(slots.flip(-1)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_noticed(answered: tuple[Drawn, torch.Tensor, torch.Tensor], message: str) -> None:
    drawn, scores, slots = answered
    assert_rows_are_exact(drawn, scores, slots)
    if message.startswith("not the oldest"):  # all of the best equal key, in the wrong order
        drawn.held.keys[:] = drawn.held.keys[:, :1]
        scores, slots = search(drawn.query, drawn.held, 9, "reference")
    WRONG[message](scores, slots)
    with pytest.raises(AssertionError, match=message):
        assert_rows_are_exact(drawn, scores, slots)


def test_a_missed_key_is_noticed(answered: tuple[Drawn, torch.Tensor, torch.Tensor]) -> None:
    drawn, _, _ = answered
    scores, slots = search(drawn.query, drawn.held, 10, "reference")
    with pytest.raises(AssertionError, match=r"a nearer key was missed|not the oldest"):
        assert_rows_are_exact(drawn, scores[..., 1:], slots[..., 1:])
