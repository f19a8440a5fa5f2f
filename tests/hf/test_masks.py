"""Dense masks and positions tell what is padding and where documents begin, as a mask (B, L) does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.checks import PARITY, assert_close
from helpers.hf_families import made, tokens
from torch import Tensor

from memtrans.hf import add_memory

SIZES: dict[str, Any] = {"max_memories": 100, "k": 8, "segment": 16}
LENGTH, LEFT = 16, 5
QUESTION = tokens(length=6, seed=3)


def hidden_padding() -> Tensor:
    """(2, 1, N, N) bool, causal; the second row begins with padding, which sees nothing."""
    seen = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[1, ..., :LEFT] = False
    return seen


def padding_that_sees_itself() -> Tensor:
    return hidden_padding() | torch.eye(LENGTH, dtype=torch.bool)


def padding_that_sees_all() -> Tensor:
    seen = hidden_padding()
    seen[1, :, :LEFT] = True
    return seen


def added_to_logits() -> Tensor:
    return torch.where(padding_that_sees_itself(), 0.0, torch.finfo(torch.float32).min)


DENSE = [hidden_padding, padding_that_sees_itself, padding_that_sees_all, added_to_logits]


@pytest.mark.parametrize("mask", DENSE, ids=lambda mask: mask.__name__)
@torch.no_grad()
def test_padding_of_a_dense_mask_is_not_stored_and_shifts_nothing(mask: Callable[[], Tensor]) -> None:
    model, ids = made("llama"), tokens(length=LENGTH)
    memory = add_memory(model, **SIZES)
    with memory.writing():
        model(ids, attention_mask=mask())
    assert memory.lengths.tolist() == [LENGTH - 1, LENGTH - 1 - LEFT]
    assert memory.ids(1).tolist() == ids[1, LEFT + 1 :].tolist()
    together = model(QUESTION).logits[1:]
    memory.reset()
    with memory.writing():
        model(ids[1:, LEFT:])
    assert_close(together, model(QUESTION[1:]).logits, PARITY, "the padded row")


@pytest.mark.parametrize("mask", DENSE, ids=lambda mask: mask.__name__)
@torch.no_grad()
def test_the_first_real_token_of_a_dense_mask_looks_at_no_memory(mask: Callable[[], Tensor]) -> None:
    model, ids = made("llama"), tokens(length=LENGTH)
    memory = add_memory(model, **SIZES)
    memory.read(tokens(length=30))
    positions = (torch.arange(LENGTH) - torch.tensor([[0], [LEFT]])).clamp(min=0)
    dense = model(ids, attention_mask=mask(), position_ids=positions).logits
    flat = model(ids, attention_mask=hidden_padding()[:, 0, -1].long(), position_ids=positions).logits
    assert_close(dense[1, LEFT:], flat[1, LEFT:], PARITY, "the padded row")
    assert_close(dense[0], flat[0], PARITY, "the row without padding")


def packed() -> list[dict[str, Tensor]]:
    """Two documents in a row, told by positions or by a dense mask."""
    positions = torch.cat((torch.arange(LEFT), torch.arange(LENGTH - LEFT)))[None]
    ones = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    ones[LEFT:, :LEFT] = False
    return [{"position_ids": positions}, {"position_ids": positions, "attention_mask": ones.expand(2, 1, -1, -1)}]


@pytest.mark.parametrize("told", packed(), ids=["by positions", "by a mask"])
@torch.no_grad()
def test_each_document_of_a_row_begins_with_a_sink(told: dict[str, Tensor]) -> None:
    model, ids = made("llama"), tokens(length=LENGTH)
    memory = add_memory(model, **SIZES)
    memory.read(tokens(length=30))
    together = model(ids, use_cache=False, **told).logits
    for part in (slice(0, LEFT), slice(LEFT, None)):
        assert_close(together[:, part], model(ids[:, part]).logits, PARITY, "a document")


@pytest.mark.parametrize("told", packed(), ids=["by positions", "by a mask"])
def test_a_pass_that_writes_has_one_document_in_a_row(told: dict[str, Tensor]) -> None:
    model = made("llama")
    memory = add_memory(model, **SIZES)
    with memory.writing(), pytest.raises(ValueError, match=r"one document in a row, got several in rows \[0"):
        model(tokens(length=LENGTH), **told)
    assert memory.lengths.tolist() == [0, 0]


@torch.no_grad()
def test_a_mask_that_is_given_by_its_place_is_one_that_is_given_by_name() -> None:
    model, ids = made("llama"), tokens(length=LENGTH)
    memory, mask = add_memory(model, **SIZES), hidden_padding()[:, 0, -1].long()
    with memory.writing():
        model.model(ids, mask)
    assert memory.lengths.tolist() == [LENGTH - 1, LENGTH - 1 - LEFT]
    by_name = model.model(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.model(ids, mask).last_hidden_state, by_name)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'input_ids'"):
        model.model(ids, input_ids=ids)
