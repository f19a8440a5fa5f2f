"""Parts of a softmax give the whole one."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import SAME_FORMULA, assert_close
from helpers.devices import seeded

from memtrans_kernels import merge_attention

pytestmark = pytest.mark.device

RANKS, SHAPE = 3, (2, 4, 5)  # B, H, N


def test_22_7_parts_of_a_softmax_give_the_whole_one_and_its_gradient() -> None:
    logits = torch.randn(RANKS, *SHAPE, 6, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    values = torch.randn(RANKS, *SHAPE, 6, 8, dtype=torch.float64, generator=seeded(1))
    outs = torch.einsum("pbhnk,pbhnkd->pbhnd", logits.softmax(dim=-1), values)
    out, lse = merge_attention(outs, logits.logsumexp(dim=-1))
    together, all_values = logits.movedim(0, -2).flatten(-2), values.movedim(0, -3).flatten(-3, -2)
    expected = torch.einsum("bhnk,bhnkd->bhnd", together.softmax(dim=-1), all_values)
    expected_lse = together.logsumexp(dim=-1)
    assert_close(out, expected, SAME_FORMULA)
    assert_close(lse, expected_lse, SAME_FORMULA)
    found, wanted = (
        torch.autograd.grad((result * all_values[..., 0, :]).sum() + result_lse.square().sum(), logits)[0]
        for result, result_lse in ((out, lse), (expected, expected_lse))
    )
    assert_close(found, wanted, SAME_FORMULA)


def test_22_7_a_part_with_nothing_in_it_changes_nothing() -> None:
    outs, lses = torch.randn(2, *SHAPE, 8, generator=seeded(0)), torch.randn(2, *SHAPE, generator=seeded(1))
    lses[1, 0] = -torch.inf
    out, lse = merge_attention(outs, lses)
    assert torch.equal(out[0], outs[0, 0]) and torch.equal(lse[0], lses[0, 0])
    assert not torch.isclose(out[1], outs[0, 1]).all()


def test_22_7_a_softmax_of_nothing_is_zero_and_has_no_gradient_that_is_not_a_number() -> None:
    outs = torch.zeros(RANKS, *SHAPE, 8, requires_grad=True)
    lses = torch.full((RANKS, *SHAPE), -torch.inf, requires_grad=True)
    out, _ = merge_attention(outs, lses)
    out.sum().backward()
    assert not out.any()
    assert outs.grad.isfinite().all() and lses.grad.isfinite().all()
