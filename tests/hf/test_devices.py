"""Layers on several devices, and layers whose weights are elsewhere until they are needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checks import PARITY, assert_close
from helpers.hf_families import left_padded, made, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from memtrans.hf import add_memory
from memtrans.memory import KNNMemory

SIZES = {"max_memories": 100, "k": 8, "segment": 24}


@torch.no_grad()
def test_a_layer_that_is_offloaded_has_its_memory_where_it_computes(tmp_path: Path) -> None:
    model = made("llama")
    model.save_pretrained(tmp_path / "model")
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head", "model.rotary_emb")
    places = {**dict.fromkeys(here, "cpu"), "model.layers.1": "disk"}
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "away", dtype=torch.float32
    ).eval()
    assert away.model.layers[1].self_attn.q_proj.weight.is_meta
    logits = []
    for one in (model, away):
        memory = add_memory(one, **SIZES)
        memory.read(tokens(), left_padded())
        logits.append(one(tokens(seed=1)).logits)
        assert {entries.device.type for entries in memory._entries.memories.values()} == {"cpu"}
    assert_close(logits[1], logits[0], PARITY, "logits")


def test_a_layer_that_is_nowhere_is_refused() -> None:
    model = made("llama").to("meta")
    with pytest.raises(ValueError, match=r"layers must each be on one device, got \['meta'\]"):
        add_memory(model, **SIZES)


def test_a_model_that_went_where_nothing_is_kept_is_refused_and_its_memory_stays() -> None:
    model = made("llama")
    memory = add_memory(model, **SIZES)
    memory.read(tokens())
    model.to("meta")
    with pytest.raises(ValueError, match=r"on a device that keeps values, got layer 0 on meta: offload a model before"):
        model(tokens().to("meta"))
    assert memory.lengths.tolist() == [23, 23]


def test_what_is_held_goes_where_its_layer_went(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, went = add_memory(made("llama"), layers=[1], **SIZES), []
    memory.read(tokens())
    with FakeTensorMode():
        memory.layers[1].attention.memtrans.memory_offset = nn.Parameter(torch.zeros(4, device="cuda"))
    monkeypatch.setattr(KNNMemory, "to", lambda self, device: went.append((self, device)))
    entries = memory.entries_for(2, writes=False)
    assert entries is not None
    assert went[0] == (entries.memories[1], torch.device("cuda", 0))
    assert went[1][0] is entries.ids  # it follows the first layer's
