"""DistributedDataParallel with its defaults around a model, whichever of its layers have a memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.checks import SAME_SUMS, assert_close
from helpers.processes import Processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memtrans import MemorizingTransformer

pytestmark = pytest.mark.cpu

STEPS, BATCH, LENGTH = 3, 2, 5
FORMS: dict[str, dict[str, Any]] = {
    "no layer has a memory": {"memorizing_layers": ()},
    "every layer has one": {"memorizing_layers": (1, 2)},
    "the last one has": {"memorizing_layers": 2},
    "caches": {"memorizing_layers": 2, "xl_max_memories": 6},
    "caches alone": {"memorizing_layers": (), "xl_max_memories": 6},
    "a gate": {"memorizing_layers": (1, 2), "combine": "gate"},
    "a learned offset": {"memorizing_layers": (1, 2), "memory_offset": -1.0},
    "a query of the memory's own": {"memorizing_layers": 2, "memory_query": "own"},
    "a sink and a start token": {"memorizing_layers": 2, "sink": True, "clear_memories_on_sos_token_id": 0},
    "recomputed": {"memorizing_layers": 2, "activation_checkpointing": True},
    "legacy": {"memorizing_layers": 2, "xl_max_memories": 6, "legacy": True},
}


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


def build(form: str) -> MemorizingTransformer:
    torch.manual_seed(0)
    return MemorizingTransformer(num_tokens=9, dim=16, depth=2, dim_head=8, heads=2, max_knn_memories=20, **FORMS[form])


def losses(model: nn.Module, memories: Any, rank: int) -> Iterator[Tensor]:
    """Of the segments that a rank reads."""
    caches, generator = None, torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        x = torch.randint(0, 9, (BATCH, LENGTH), generator=generator)
        result = model(x, memories, caches, labels=x)
        loss, caches = result if isinstance(result, tuple) else (result, None)
        yield loss


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def spread(rank: int, form: str) -> tuple[list[list[Tensor]], list[list[int]]]:
    """The gradients of each step, and how many entries the memories hold at the end."""
    model = build(form)
    memories = model.create_knn_memories(batch_size=BATCH)
    wrapped, found = DistributedDataParallel(model), []
    for loss in losses(wrapped, memories, rank):
        loss.backward()
        found.append(gradients(model))
        model.zero_grad()
    return found, [memory.lengths.tolist() for memory in memories]


@pytest.mark.parametrize("form", FORMS)
def test_21_16_gradients_are_the_mean_of_what_each_rank_has_alone(two: Processes, form: str) -> None:
    alone: list[list[list[Tensor]]] = []
    for rank in range(2):
        model = build(form)
        of_rank = []
        for loss in losses(model, model.create_knn_memories(batch_size=BATCH), rank):
            loss.backward()
            of_rank.append(gradients(model))
            model.zero_grad()
        alone.append(of_rank)
    for found, lengths in two.run(spread, form):
        for step, of_step in enumerate(found):
            for grad, first, second in zip(of_step, alone[0][step], alone[1][step], strict=True):
                assert_close(grad, (first + second) / 2, SAME_SUMS)
        assert all(length > 0 for of_memory in lengths for length in of_memory)
