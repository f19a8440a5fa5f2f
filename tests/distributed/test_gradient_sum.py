"""Gradients are summed over all ranks, in pieces, the first of which leave while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.checks import SAME_SUMS, assert_close
from helpers.processes import Processes
from torch import Tensor, nn

from memtrans.distributed import gradient_sum
from memtrans.distributed.gradient_sum import FIRST_SUMS, GradientSum, compiled_in_parts
from memtrans.distributed.ranks import ALONE, Ranks, ranks_of

pytestmark = pytest.mark.cpu

LAYERS, WIDTH = 4, 8
LAYER_BYTES = 4 * WIDTH * (WIDTH + 1)
STEPS = FIRST_SUMS + 2


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.unused = nn.Parameter(torch.ones(2 * LAYER_BYTES // 4))
        for parameter in self.layers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def loss(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().sum()


def inputs(step: int, rank: int, part: int) -> Tensor:
    """Of one backward pass."""
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1000 * step + 10 * rank + part))


def backward_passes(model: Model, loss: Callable[[Tensor], Tensor], sums: GradientSum, xs: list[Tensor]) -> Tensor:
    """The gradients of all x as one step; the sum of the losses over all ranks."""
    losses = [loss(x) for x in xs]
    for x_loss in losses[:-1]:
        x_loss.backward()
    sums.begin(torch.stack(losses).sum().detach())
    losses[-1].backward()
    return sums.finish()


def in_parts_of(size: int) -> Any:
    return mock.patch.multiple(gradient_sum, PIECE_BYTES=size, PART_BYTES=size)


def compiled_without_kernels() -> Any:
    """Into the same parts, whose kernels are PyTorch's own: a C++ compiler takes its time."""
    backend = torch._dynamo.lookup_backend("aot_eager")
    return mock.patch.object(torch._dynamo, "lookup_backend", return_value=backend)


def steps_of(ranks: Ranks, piece_bytes: int, passes: int, compiled: bool) -> list[dict[str, Any]]:
    """Each step's sums, and for each piece whether it left before all gradients had arrived."""
    model, send = Model(), GradientSum._send
    arrived: list[Tensor] = []
    early: list[bool] = []
    for parameter in model.layers.parameters():
        parameter.register_post_accumulate_grad_hook(arrived.append)

    def recorded(sums: GradientSum) -> None:
        early.append(len(arrived) < passes * len(list(model.layers.parameters())))
        send(sums)

    results = []
    with in_parts_of(piece_bytes), mock.patch.object(GradientSum, "_send", recorded), compiled_without_kernels():
        sums = GradientSum(model.parameters(), ranks)
        loss = compiled_in_parts(model.loss) if compiled else model.loss
        for step in range(STEPS):
            early.clear()
            arrived.clear()
            model.zero_grad()
            total = backward_passes(model, loss, sums, [inputs(step, ranks.rank, part) for part in range(passes)])
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            results.append({"total": total, "gradients": gradients, "early": list(early)})
    return results


def on_rank(rank: int, *arguments: Any) -> list[dict[str, Any]]:
    return steps_of(ranks_of(dist.group.WORLD), *arguments)


def expected(step: int, passes: int) -> tuple[Tensor, dict[str, Tensor | None]]:
    model = Model()
    total = sum(model.loss(inputs(step, rank, part)) for rank in range(2) for part in range(passes))
    assert isinstance(total, Tensor)
    total.backward()
    return total.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("piece_bytes", [1, LAYER_BYTES, 2 * LAYER_BYTES + 4, 1 << 20])
@pytest.mark.parametrize("passes", [1, 2])
def test_they_are_those_of_one_process_whatever_the_pieces(two: Processes, piece_bytes: int, passes: int) -> None:
    first, second = two.run(on_rank, piece_bytes, passes, False)
    for step in range(STEPS):
        total, gradients = expected(step, passes)
        assert_close(first[step]["total"], total, SAME_SUMS, "total")
        assert torch.equal(first[step]["total"], second[step]["total"])
        for name, gradient in gradients.items():
            mine, others = first[step]["gradients"][name], second[step]["gradients"][name]
            if gradient is None:
                assert mine is None and others is None, name
                continue
            assert_close(mine, gradient, SAME_SUMS, name)
            assert torch.equal(mine, others), name


@pytest.mark.parametrize("compiled", [False, True])
def test_pieces_leave_before_the_backward_pass_ends(two: Processes, compiled: bool) -> None:
    """But in the first steps, in which one rank may compile for long after the other."""
    for result in two.run(on_rank, LAYER_BYTES, 1, compiled):
        assert [sum(step["early"]) for step in result] == [0] * FIRST_SUMS + [LAYERS - 1] * (STEPS - FIRST_SUMS)
        for step in range(STEPS):
            assert len(result[step]["early"]) == LAYERS + 1  # the last one has the total, and no gradient


def test_a_function_compiled_in_parts_is_the_function() -> None:
    model, plain = Model(), Model()
    with in_parts_of(LAYER_BYTES):
        loss = compiled_in_parts(model.loss)
        for step in range(2):
            found, wanted = loss(inputs(step, 0, 0)), plain.loss(inputs(step, 0, 0))
            assert_close(found, wanted, SAME_SUMS, "loss")
            found.backward()
            wanted.backward()
    for parameter, other in zip(model.layers.parameters(), plain.layers.parameters(), strict=True):
        assert_close(parameter.grad, other.grad, SAME_SUMS, "gradient")


def test_one_process_keeps_its_gradients() -> None:
    model = Model()
    sums = GradientSum(model.parameters(), ALONE)
    total = backward_passes(model, model.loss, sums, [inputs(0, 0, 0)])
    plain = Model()
    plain.loss(inputs(0, 0, 0)).backward()
    assert torch.equal(total, plain.loss(inputs(0, 0, 0)))
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(model.layers.parameters(), plain.layers.parameters(), strict=True)
    )
