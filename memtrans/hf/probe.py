"""What a forward pass of three tokens shows of a model, before anything of it is changed for good.

Three rows: tokens (a, b, c) at positions 0, 1, 2; the same `turn` positions later; and (a, b, d) at 0, 1, 2. A chosen
layer that is never asked, a model whose earlier tokens see later ones, and keys that do not turn back are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memtrans.hf.attention import base_of, configured
from memtrans.hf.families import rotary_function
from memtrans.hf.layer_memory import LayerMemory
from memtrans.hf.rotation import Rotation, angles_back, rotations_of
from memtrans.layers import device_of, evaluating

NAME = "memtrans_probe"
SAME = {torch.float64: 1e-3, torch.float32: 1e-3}  # of the keys' norm: a pass at other positions rounds otherwise
SAME_IN_HALF = 0.1


@dataclass(frozen=True)
class Layer:
    """What is known of a chosen layer.

    Attributes:
        attention: the module. heads: H. kv_heads: G. width: D. value_width: E. dtype: of its keys.
        rotation: how its keys turn; None where they have no rotary positions.
    """

    attention: nn.Module
    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: torch.dtype
    rotation: Rotation | None

    @property
    def learned(self) -> LayerMemory:
        """What the layer learns, once it has a memory; the copy that an active adapter learns instead of it."""
        found: LayerMemory = self.attention.memtrans.itself  # type: ignore[assignment, union-attr]
        if found.kv_heads is None:  # it was saved whole by an earlier version
            found.kv_heads, found.value_width = self.kv_heads, self.value_width
        return found

    def held_width(self, as_they_are: bool) -> int:
        """Of values in its memory; where they are held as they are, each with the next one if that is learned of."""
        return self.value_width * self.learned.parts if as_they_are else self.value_width


def learned_of(layers: Mapping[int, Layer]) -> dict[int, LayerMemory]:
    """What each layer learns, by number; see `Layer.learned`."""
    return {number: layer.learned for number, layer in layers.items()}


def probed(decoder: PreTrainedModel, chosen: Mapping[int, nn.Module], combine: str, turn: int) -> dict[int, Layer]:
    """The chosen layers of a model, which is as it was afterwards. Raises ValueError for what cannot have a memory."""
    name = type(decoder).__name__
    rotary = _is_rotary(decoder, chosen)
    seen = _asked(decoder, chosen, turn if rotary else None)
    unseen = [number for number in chosen if number not in seen]
    if unseen:
        raise ValueError(f"model must hand keyword arguments on to its attention, {name} does not in layers {unseen}")
    return {
        number: _layer(decoder, attention, seen[number], number, combine, turn if rotary else None)
        for number, attention in chosen.items()
    }


def _is_rotary(decoder: nn.Module, chosen: Mapping[int, nn.Module]) -> bool:
    """Whether keys may turn with positions, by a function that is known or not."""
    known = any(rotary_function(attention) is not None for attention in chosen.values())
    return known or getattr(decoder, "rotary_emb", None) is not None


def _layer(
    decoder: Any, attention: nn.Module, seen: dict[str, Any], number: int, combine: str, turn: int | None
) -> Layer:
    """What is known of one; turn: None for a model without rotary positions."""
    name, key, value, arguments = type(decoder).__name__, seen["key"], seen["value"], seen["arguments"]
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"layers must have as many values as keys, got {tuple(value.shape)} and {tuple(key.shape)} in layer "
            f"{number} of {name}"
        )
    if combine == "softmax" and arguments.get("position_bias") is not None:
        raise ValueError(f"combine must be 'gate' for {name}, whose attention has a position_bias")
    if _is_biased(seen["mask"]):
        raise ValueError(f"model must add nothing to logits, got {name}, whose mask does in layer {number}")
    if not _same(key[0, :, :2], key[2, :, :2]):
        raise ValueError(f"model must be causal, got {name}, whose tokens see later ones")
    rotation = None
    if turn is not None:
        rotation = _rotation(decoder, attention, key, number, turn)
    heads, kv_heads = seen["query"].shape[1], key.shape[1]
    return Layer(attention, heads, kv_heads, key.shape[3], value.shape[3], key.dtype, rotation)


def _is_biased(mask: Any) -> bool:
    """Whether a mask is added to the logits of what it lets be seen, as a stored key's would lack."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return False
    return bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any())


def _rotation(decoder: Any, attention: nn.Module, key: Tensor, number: int, turn: int) -> Rotation | None:
    """How the keys (3, G, N, D) of the second row turn back to those of the first; None where they are the same."""
    first, later = key[0, :, :2], key[1, :, :2]
    if _same(first, later):
        return None
    for rotation in rotations_of(decoder, attention):
        try:
            turned = rotation.turned(later[None], angles_back(decoder, key, turn, rotation.kind, turn + 2))[0]
        except (TypeError, RuntimeError):  # the family's function wants other components
            continue
        if turned.shape == first.shape and _same(first, turned):
            return rotation
    raise ValueError(
        f"model must have rotary positions that can be undone, {type(decoder).__name__} has others in layer {number}"
    )


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two keys are the same up to rounding."""
    off = (first.float() - second.float()).norm() / first.float().norm().clamp(min=1e-9)
    return bool(off <= SAME.get(first.dtype, SAME_IN_HALF))


@torch.no_grad()
def _asked(decoder: PreTrainedModel, chosen: Mapping[int, nn.Module], turn: int | None) -> dict[int, dict[str, Any]]:
    """What the attention function of each chosen layer was handed; turn: None for a model without rotary positions."""
    seen = _Seen()
    device = device_of(decoder.get_input_embeddings())
    tokens = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 0]], device=device)
    arguments: dict[str, Any] = {"input_ids": tokens, "use_cache": False, "memtrans_seen": seen}
    if turn is not None:
        later = torch.tensor([[0], [turn], [0]], device=device)
        arguments["position_ids"] = torch.arange(3, device=device) + later
    ALL_ATTENTION_FUNCTIONS.register(NAME, _note)
    with _configured(chosen.values()), torch.random.fork_rng(enabled=decoder.training), evaluating(decoder):
        decoder(**arguments)
    return seen.layers


class _Seen:
    """What attention functions were handed, by layer. No dict: accelerate hands its layers copies of those."""

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Any]] = {}


def _note(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    memtrans_seen: Any = None,
    **arguments: Any,
) -> Any:
    if memtrans_seen is not None:
        if module.layer_idx in memtrans_seen.layers:
            raise ValueError(
                f"model must attend once in a layer, got {type(module).__name__}, which does several times in layer "
                f"{module.layer_idx}"
            )
        told = {"query": query, "key": key, "value": value, "mask": attention_mask, "arguments": arguments}
        memtrans_seen.layers[module.layer_idx] = told
    return base_of(module)(module, query, key, value, attention_mask, **arguments)


@contextmanager
def _configured(attentions: Any) -> Iterator[None]:
    """The attention modules choose the noting function for as long as this lasts."""
    modules = list(attentions)
    before: list[Any] = [module.config for module in modules]
    try:
        for module in modules:
            module.config = configured(module.config, NAME)
        yield
    finally:
        for module, config in zip(modules, before, strict=True):
            module.config = config
