"""A run that was trained without a memory goes on with one: its plain layers become layers with a memory.

Such a layer takes products of queries and keys, or their cosines, as the plain ones do, times a learned factor of its
own that starts at theirs. It has a bias on its way out and a table of positions, and starts with the plain layer's. So
the model is the one it was for as long as nothing is remembered. What is retrieved lies farther back than all local
keys: the learned offset of each head starts at the settings' one on top of its bias for the farthest of these, so that
a head which looks one token back is not shown the whole document.

What asks for the next token's neighbours is not what asks for a memory's entries, and in the steps that are left the
queries do not become that: the memory is asked with a query of its own, unless the settings say "shared". It is the
shared one at first, and what makes it another one learns faster than all else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memtrans.distributed.dtensors import gathered
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.optimizer import OWN_QUERY
from memtrans.training.settings import Settings
from memtrans.transformer import MemorizingTransformer

OF_MEMORY = (  # meant nothing until now
    *("memory_layers", "memory_late", "neighbours", "memory_offset"),
    *("combine", "memory_query"),
)
RATES = ("learning_rate", "final_rate")  # of the steps that are left, in which it is learned
PLAIN, WITH_MEMORY = "rel_pos_bias.", "knn_rel_pos_bias."  # the tables of positions of both kinds of layers
OFFSET = ".memory_offset"
OWN = (".scale", OFFSET, ".memory_gate", *OWN_QUERY)  # what a plain layer does not have


def gaining(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What else the settings of such a run say, by those of the run before it."""
    return {"similarity": saved["plain_similarity"], "memory_heads": None, "memory_query": "own"}


def gains_memory(saved: Mapping[str, Any], settings: Settings) -> bool:
    """Whether a checkpoint with these settings is of the run's model without its memory layers."""
    return settings.memory > 0 and saved["memory"] == 0


def with_memory(checkpoint: Checkpoint, model: MemorizingTransformer, farthest: int) -> Checkpoint:
    """A checkpoint of a model without a memory as one of the model with it.

    Args:
        model: a new one with the memory; of several ranks all ask.
        farthest: how far before its query a local key stands at most; there is no learned bias beyond.
    """
    trained, position = checkpoint.parts["model"], model.rel_pos_bias
    bucket = int(position.bucket(torch.tensor(farthest, device="cpu")))
    far = trained[f"{PLAIN}relative_attention_bias.weight"][bucket] * position.scale  # (H,)
    own = {name: gathered(tensor.detach()) for name, tensor in model.named_parameters() if name.endswith(OWN)}
    weights = {name: tensor + far.to(tensor) if name.endswith(OFFSET) else tensor for name, tensor in own.items()}
    weights.update(_with_table(trained))
    parts = {**checkpoint.parts, "model": weights, "optimizer": _with_table(checkpoint.parts.get("optimizer", {}))}
    return Checkpoint(parts, checkpoint.values)


def _with_table(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights or moments by name, those of the plain layers' table for the other one too."""
    table = {
        name.replace(PLAIN, WITH_MEMORY, 1): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(PLAIN)
    }
    return {**tensors, **table}
