"""Where the attention of a pretrained model is, whatever its family: by what transformers promises of all of them.

An attention module that takes part in `AttentionInterface` has a `layer_idx`, and its file an
`eager_attention_forward`. What else has to be known is seen in a forward pass; see `probe.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def file_of(attention: nn.Module) -> ModuleType:
    """The modelling file of an attention module."""
    return sys.modules[type(attention).__module__]


def rotary_function(attention: nn.Module) -> Any:
    """The family's own rotary embedding of query and key; None where it has none."""
    names = ("apply_rotary_pos_emb", "apply_rotary_emb")  # the second one's angles are complex numbers (DeepSeek-V2)
    return next((function for name in names if (function := getattr(file_of(attention), name, None))), None)


def layer_type(attention: nn.Module) -> Any:
    """The type of an attention module's layer; None for a family whose layers have none."""
    types: Any = getattr(attention.config, "layer_types", None)
    return getattr(attention, "layer_type", None if types is None else types[attention.layer_idx])


def attentions_of(model: nn.Module) -> dict[int, nn.Module]:
    """The causal self-attention modules of a model by the number of their layer.

    Raises ValueError for an encoder-decoder, a family whose attention does not go through AttentionInterface, and a
    model in which a layer's number stands for more than one attention module.
    """
    if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder alone, got {name}, which is an encoder-decoder")
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if takes_part(module):
            found.setdefault(module.layer_idx, []).append(module)  # type: ignore[arg-type]
    if not found:
        raise ValueError(
            f"model must be of a family whose causal attention goes through transformers' AttentionInterface, "
            f"got {name}"
        )
    if any(len(modules) > 1 for modules in found.values()):
        kinds = sorted({type(module).__name__ for modules in found.values() for module in modules})
        raise ValueError(f"model must have one causal attention module in a layer, got {name} with {kinds}")
    return {number: modules[0] for number, modules in sorted(found.items())}


def takes_part(module: nn.Module) -> bool:
    """Whether it is a causal attention module that goes through AttentionInterface."""
    named = type(module).__name__.endswith("Attention") and isinstance(getattr(module, "layer_idx", None), int)
    chooses = hasattr(module, "config") and hasattr(file_of(module), "eager_attention_forward")
    return named and chooses and bool(getattr(module, "is_causal", True))


def chosen_of(model: nn.Module, layers: Sequence[int] | str) -> dict[int, nn.Module]:
    """The attention modules that are to have a memory. Raises ValueError; see `attentions_of`."""
    found = attentions_of(model)
    numbers = list(found) if isinstance(layers, str) else list(layers)
    missing = [number for number in numbers if number not in found]
    if missing:
        raise ValueError(f"layers must be among the attention layers {list(found)}, got {missing}")
    taken = [number for number, attention in found.items() if hasattr(attention, "memtrans")]
    if taken:
        raise ValueError(
            f"model must be without a memory in all its layers, got {taken}, which have one: call remove() on it "
            f"first, memory_of(model) finds it"
        )
    return {number: found[number] for number in numbers}


def device_of(attention: nn.Module) -> torch.device:
    """Where an attention module computes: of one that accelerate offloads, where its weights are taken to.

    Raises ValueError where that cannot be known.
    """
    devices = {parameter.device for parameter in attention.parameters()}
    hooks = [getattr(module, "_hf_hook", None) for module in attention.modules()]
    executing = [getattr(hook, "execution_device", None) for hook in hooks]
    taken_to = {torch.device(device) for device in executing if device is not None}
    found = taken_to if torch.device("meta") in devices and taken_to else devices
    if len(found) != 1 or torch.device("meta") in found:
        raise ValueError(f"layers must each be on one device, got {sorted(map(str, found))}")
    return found.pop()


def decoder_of(model: nn.Module, attention: nn.Module) -> PreTrainedModel:
    """The innermost PreTrainedModel around an attention module: some heads call it past their base model (OPT)."""
    around = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and any(inner is attention for inner in module.modules())
    ]
    return min(around, key=lambda module: sum(1 for _ in module.modules()))


def most_positions(decoder: PreTrainedModel) -> int | None:
    """How many positions a model was made for; None where its configuration does not say."""
    return getattr(decoder.config.get_text_config(decoder=True), "max_position_embeddings", None)
