"""The residual connection and the feed-forward network."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from torch import Tensor, nn

from memtrans.transformer import FeedForward, PreNormResidual

DIM = 8


class Doubling(nn.Module):
    """What it is given twice, and something beside it if asked."""

    def forward(self, x: Tensor, beside: object = None) -> Tensor | tuple[Tensor, object]:
        return 2 * x if beside is None else (2 * x, beside)


def test_a_residual_connection_adds_what_went_in_and_hands_on_what_came_beside() -> None:
    block, x = PreNormResidual(DIM, Doubling()), torch.randn(2, 3, DIM)
    expected = x + 2 * nn.functional.layer_norm(x, (DIM,))
    assert_close(block(x), expected, SAME_GRAPH)
    out, beside = block(x, beside="a cache")
    assert_close(out, expected, SAME_GRAPH)
    assert beside == "a cache"


@pytest.mark.parametrize(("mult", "inner"), [(4, 32), (1.4, 11)])
def test_feed_forward_is_wider_inside_and_drops_in_training_alone(mult: float, inner: int) -> None:
    network, x = FeedForward(DIM, mult, dropout=0.5), torch.randn(2, 3, DIM)
    assert network.net[0].weight.shape == (inner, DIM)
    assert network(x).shape == x.shape
    network.eval()
    assert torch.equal(network(x), network(x))
