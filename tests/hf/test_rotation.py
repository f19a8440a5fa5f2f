"""Keys are turned back by the frequencies that the model itself has in the pass that stores them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.checks import PARITY, assert_close
from helpers.hf_families import made, tokens
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from memtrans.hf import add_memory

ORIGINAL, LENGTH = 64, 16
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 8.0, 32.0],
}


@pytest.mark.parametrize("begin", [0, ORIGINAL])
@pytest.mark.parametrize("distance", [16, ORIGINAL, 100])
@torch.no_grad()
def test_longrope_turns_keys_by_the_factors_of_their_own_pass(distance: int, begin: int) -> None:
    model, made_of = made("llama", rope_parameters=LONGROPE), list[Tensor]()
    memory = add_memory(model, max_memories=100, segment=LENGTH, distance=distance, sink=0)
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *pass_: made_of.append(pass_[-1]))
    positions = torch.arange(begin, begin + LENGTH)[None]
    with memory.writing():
        model(tokens(1, LENGTH), position_ids=positions)
    assert memory._entries is not None
    stored = memory._entries.memories[0].state_dict()["keys"]
    before = torch.cat((positions - distance, positions), 1)  # transformers chooses factors by the last of them
    cos, sin = (angles[:, :LENGTH] for angles in model.model.rotary_emb(made_of[0], before))
    key = made_of[0].view(1, LENGTH, 2, 8).transpose(1, 2)
    assert_close(stored, apply_rotary_pos_emb(key, key, cos, sin)[1].flatten(0, 1), PARITY, "stored keys")
