"""What a segment leaves to the next one: documents begin and end at tokens, and caches hold as much as they say.

`test_beginnings.py`, `test_cleared.py` and `test_xl_memories.py` have the rest.
"""

from __future__ import annotations

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.small_models import BATCH, LENGTH, build, segments


def test_from_a_start_token_on_and_behind_an_end_token_a_row_is_a_new_document():
    model = build(clear_memories_on_sos_token_id=0, clear_memories_on_eos_token_id=1).eval()
    memories = model.create_knn_memories(batch_size=BATCH)
    first, second, third = segments(3)
    model(first, memories)
    second[0, 3] = 0
    with_start = model(second, memories)
    assert memories[0].lengths.tolist() == [LENGTH - 3, 2 * LENGTH]
    fresh = model(second[:, 3:], model.create_knn_memories(batch_size=BATCH))
    assert_close(with_start[0, 3:], fresh[0], SAME_GRAPH)

    third[1, 5] = 1
    model(third, memories, add_knn_memory=False)
    assert memories[0].lengths.tolist() == [LENGTH - 3, 2 * LENGTH], "a read-only call clears nothing"
    model(third, memories)
    assert memories[0].lengths.tolist() == [2 * LENGTH - 3, LENGTH - 6]


@pytest.mark.parametrize("which", ["sos", "eos"])
def test_padding_that_looks_like_a_start_or_end_token_clears_nothing(which):
    """As with tokenizers whose padding is the end token."""
    model = build(**{f"clear_memories_on_{which}_token_id": 0})
    memories = model.create_knn_memories(batch_size=BATCH)
    first, second = segments(2)
    second[1, 5:] = 0
    model(first, memories)
    model(second, memories, lengths=torch.tensor([LENGTH, 5]))
    assert memories[0].lengths.tolist() == [2 * LENGTH, LENGTH + 5]
    model(second, memories, lengths=torch.tensor([LENGTH, 6]))  # the first of them is a token
    assert memories[0].lengths.tolist() == [3 * LENGTH, 1 if which == "sos" else 0]


def test_xl_length_makes_a_full_sized_cache_equal_to_a_growing_one():
    model = build(xl_max_memories=12, memorizing_layers=(3,)).eval()
    growing, fixed = (model.create_knn_memories(batch_size=BATCH) for _ in range(2))
    cache, xl_length = [torch.randn(BATCH, 12, 2, 8) for _ in range(4)], torch.zeros(BATCH, dtype=torch.int64)
    expected_cache = None
    for x in segments(4):
        expected, expected_cache = model(x, growing, expected_cache)
        actual, cache = model(x, fixed, cache, xl_length=xl_length)
        assert_close(actual, expected, SAME_GRAPH)
        xl_length = (xl_length + LENGTH).clamp(max=12)
    assert growing[0].lengths.tolist() == fixed[0].lengths.tolist() == [4 * LENGTH - 12] * 2
