"""A replayed step has its effects once for each call, captured or not."""

from __future__ import annotations

import pytest
import torch
from helpers.devices import DEVICE

from memtrans.cuda_graph import EAGER_CALLS, Replay

pytestmark = pytest.mark.device


@pytest.mark.parametrize("capture", [True, False])
def test_every_call_has_its_effects_once_and_sees_what_its_tensors_hold_by_then(capture):
    given, total, runs = torch.zeros(1), torch.zeros(1), []

    def step() -> None:
        runs.append(1)
        total.add_(given * 2)

    replay = Replay(step, torch.device(DEVICE), capture)
    for number in range(EAGER_CALLS + 5):
        given.fill_(number)
        replay()
    assert total.item() == 2 * sum(range(EAGER_CALLS + 5))
    captured = capture and DEVICE == "cuda"
    assert len(runs) == (EAGER_CALLS + 1 if captured else EAGER_CALLS + 5)


def test_after_a_release_calls_begin_as_the_first_ones():
    total = torch.zeros(1)
    replay = Replay(lambda: total.add_(1), torch.device(DEVICE))
    for _ in range(EAGER_CALLS + 2):
        replay()
    replay.release()
    for _ in range(EAGER_CALLS):
        replay()
        assert not replay.captured
    replay()
    assert replay.captured == (DEVICE == "cuda")
    assert total.item() == 2 * EAGER_CALLS + 3
