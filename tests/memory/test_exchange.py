"""What ranks send one another arrives, and its gradient goes back to where it came from."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.processes import Processes

from memtrans.distributed.ranks import ranks_of
from memtrans.memory.exchange import by_rank, exchange, from_all, side_by_side

pytestmark = pytest.mark.cpu


def send(rank: int) -> tuple[list[float], ...]:
    """Slice w is worth 10 times this rank and w; who receives it weighs it by its own number.

    Returns what came, its gradient, what all give, and the gradient of that.
    """
    ranks = ranks_of(dist.group.WORLD)
    given = torch.tensor([10.0 * rank, 10.0 * rank + 1], requires_grad=True)
    received = exchange(given, ranks)
    ((rank + 1) * received).sum().backward()
    assert given.grad is not None
    own = torch.tensor(float(rank), requires_grad=True)
    of_all = from_all(own, ranks)
    (torch.tensor([1.0, 3.0]) * (rank + 1) * of_all).sum().backward()
    assert own.grad is not None
    return received.tolist(), given.grad.tolist(), of_all.tolist(), [float(own.grad)]


def test_slices_arrive_and_gradients_come_back() -> None:
    two = Processes(2)
    try:
        first, second = two.run(send)
    finally:
        two.close()
    assert first == ([0.0, 10.0], [1.0, 2.0], [0.0, 1.0], [1.0 + 2.0])
    assert second == ([1.0, 11.0], [1.0, 2.0], [0.0, 1.0], [3.0 + 6.0])


def test_the_queries_of_all_ranks_lie_side_by_side_and_come_apart_again() -> None:
    queries = torch.randn(2, 3, 4, 5, 6)  # (W, B, H, N, D)
    together = side_by_side(queries)
    assert together.shape == (3, 4, 10, 6)
    assert torch.equal(together[:, :, :5], queries[0])
    assert torch.equal(by_rank(together, 2), queries)
