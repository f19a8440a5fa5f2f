"""Parts of an answer give the answer: as one softmax, as one search."""

from __future__ import annotations

import pytest
import torch
from checks import SAME_FORMULA, assert_close
from devices import seeded

from memtrans.merge import best_first, merged, of_all_ranks, ranked

pytestmark = pytest.mark.device

RANKS, SHAPE = 3, (2, 4, 5)  # B, H, N


def test_parts_of_a_softmax_give_the_whole_one_and_its_gradient() -> None:
    logits = torch.randn(RANKS, *SHAPE, 6, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    values = torch.randn(RANKS, *SHAPE, 6, 8, dtype=torch.float64, generator=seeded(1))
    outs = torch.einsum("pbhnk,pbhnkd->pbhnd", logits.softmax(dim=-1), values)
    out, lse = merged(outs, logits.logsumexp(dim=-1))
    together, all_values = of_all_ranks(logits), values.movedim(0, -3).flatten(-3, -2)
    expected = torch.einsum("bhnk,bhnkd->bhnd", together.softmax(dim=-1), all_values)
    expected_lse = together.logsumexp(dim=-1)
    assert_close(out, expected, SAME_FORMULA)
    assert_close(lse, expected_lse, SAME_FORMULA)
    found, wanted = (
        torch.autograd.grad((result * all_values[..., 0, :]).sum() + result_lse.square().sum(), logits)[0]
        for result, result_lse in ((out, lse), (expected, expected_lse))
    )
    assert_close(found, wanted, SAME_FORMULA)


def test_a_part_with_nothing_in_it_changes_nothing() -> None:
    outs, lses = torch.randn(2, *SHAPE, 8, generator=seeded(0)), torch.randn(2, *SHAPE, generator=seeded(1))
    lses[1, 0] = -torch.inf
    out, lse = merged(outs, lses)
    assert torch.equal(out[0], outs[0, 0]) and torch.equal(lse[0], lses[0, 0])
    assert not torch.isclose(out[1], outs[0, 1]).all()


def test_a_softmax_of_nothing_is_zero_and_has_no_gradient_that_is_not_a_number() -> None:
    outs = torch.zeros(RANKS, *SHAPE, 8, requires_grad=True)
    lses = torch.full((RANKS, *SHAPE), -torch.inf, requires_grad=True)
    out, _ = merged(outs, lses)
    out.sum().backward()
    assert not out.any()
    assert outs.grad.isfinite().all() and lses.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_candidates_are_ordered_by_score_and_equal_ones_by_age(dtype: torch.dtype) -> None:
    scores = torch.tensor([1.0, -0.0, 1.0, -torch.inf, -2.0, 0.0], dtype=dtype)
    ages = torch.tensor([3, 1, 2**31 - 1, 0, 7, 5])
    assert best_first(scores, ages).tolist() == [2, 0, 5, 1, 4, 3]


def test_every_candidate_has_the_place_at_which_the_order_names_it() -> None:
    scores = torch.randint(-2, 3, (RANKS, *SHAPE, 4), generator=seeded(2)).float()
    ages = torch.rand(RANKS, *SHAPE, 4, generator=seeded(3)).flatten().argsort().reshape(scores.shape)
    order, places = ranked(scores, ages)
    sorted_scores = of_all_ranks(scores).gather(-1, order)
    assert torch.equal(sorted_scores, of_all_ranks(scores).sort(dim=-1, descending=True).values)
    assert torch.equal(sorted_scores.gather(-1, of_all_ranks(places)), of_all_ranks(scores))
    assert torch.equal(order.gather(-1, of_all_ranks(places)), torch.arange(RANKS * 4).expand_as(order))
