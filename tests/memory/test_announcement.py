"""Number 7 of the clients' list: a memory's bytes are said before they are allocated, once, where they are many."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.memories import pairs

from memtrans import KNNMemory, KNNMemoryList, MemorizingTransformer
from memtrans.memory import announcement, stored

SAID = r"{} memories of shape {} take {:,} bytes"
ONE = 2 * (4 + 3) * 2 * 2 * 4  # two documents, M = 4, a segment of 3, keys and values of 2 numbers of 4 bytes


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    def look() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        caplog.clear()
        return found

    return look


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcement, "MUCH", 100)


def test_22_7_it_is_said_from_a_gibibyte_on_and_nothing_is_allocated_before(
    said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Allocated(Exception):
        pass

    def allocate(*_: Any, **__: Any) -> None:
        raise Allocated

    monkeypatch.setattr(stored, "Ring", allocate)
    for entries, many in ((2**22, False), (2**22 + 1, True)):  # of 256 bytes each
        with pytest.raises(Allocated):
            KNNMemory(32, entries, device="cpu", dtype=torch.float32)
        messages = said()
        assert len(messages) == many
        assert not many or messages[0].startswith(SAID.format(1, (1, entries, 2, 32), entries * 256) + " (1.0 GiB)")


@pytest.mark.usefixtures("little")
def test_22_7_a_memory_says_it_once_when_it_sees_its_first_tensor(said: Callable[[], list[str]]) -> None:
    memory = KNNMemory(2, 4, 2)
    assert said() == []
    memory.add(pairs(1, 2, 3, batch=2))
    (message,) = said()
    assert message.startswith(SAID.format(1, (2, 4, 2, 2), ONE))
    memory.add(pairs(*range(9), batch=2))
    memory.load_state_dict(memory.state_dict())
    memory.half()
    assert said() == []
    with_ids = KNNMemory(2, 4, 2, keep_ids=True)
    with_ids.add(pairs(1, 2, 3, batch=2))
    assert said()[0].startswith(SAID.format(1, (2, 4, 2, 2), ONE + 2 * 7 * 8))
    copy.deepcopy(memory)


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_22_7_memories_that_are_made_together_are_said_together(
    device: str | None, said: Callable[[], list[str]], tmp_path: Any
) -> None:
    model = MemorizingTransformer(num_tokens=9, dim=8, depth=3, dim_head=2, heads=2, memorizing_layers=(1, 2, 3))
    memories = model.create_knn_memories(batch_size=2, max_memories=4, device=device, spare=3)
    model(torch.randint(1, 9, (2, 3)), memories)
    (message,) = said()
    assert message.startswith(SAID.format(3, (2, 4, 2, 2), 3 * ONE))
    memories.save(tmp_path / "memories")
    KNNMemoryList.load(tmp_path / "memories", device=device)
    assert len(said()) == 1
