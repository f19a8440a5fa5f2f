"""Memories of pretrained models on a GPU: what replays a graph does what passes launched one by one do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from helpers.checks import GPU_MODEL, assert_close
from helpers.hf_families import made, tokens

from memtrans.hf import add_memory, reading

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize("search", [False, True])
@torch.no_grad()
def test_reading_by_replays_stores_what_passes_do(search: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(length=700).to("cuda")  # 43 segments of 16, and what is left
    held = []
    for worth in (1, 10**6):
        monkeypatch.setattr(reading, "WORTH", worth)
        memory = add_memory(made("llama", head_dim=32).to("cuda"), max_memories=2000, k=8, segment=16)
        memory.read(ids, search=search)
        assert memory._entries is not None
        assert memory.lengths.tolist() == [700 - 44] * 2
        held.append((memory.ids(1), memory._entries.memories[1].state_dict()["keys"]))
    assert torch.equal(held[0][0], held[1][0])
    assert_close(held[0][1], held[1][1], GPU_MODEL, "keys")
