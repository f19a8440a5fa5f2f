"""Turning a key that a model has rotated to its position further back, by the family's own rotary embedding.

A rotation by p positions and one by -t make one by p - t. Where cos and sin carry a factor (YaRN), it is divided out:
the key has it already.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.hf.families import rotary_function

Angles = tuple[Tensor, Tensor]  # cos and sin, (B or 1, 1, part of D)


@dataclass(frozen=True)
class Rotation:
    """How a layer turns its keys.

    Attributes:
        kind: the layer's type, where the model has a rotation for each; else None.
        part: how many components turn, where the family's function is given those alone; None for its own choice.
    """

    apply: Callable[..., Any]
    kind: str | None
    part: int | None

    def turned(self, key: Tensor, angles: Angles) -> Tensor:
        """key (B, G, N, D) turned by what `angles_back` gave."""
        cos, sin = (angle.to(key.device, key.dtype) for angle in angles)
        if self.part is None:
            return self.apply(key, key, cos, sin)[1]
        return torch.cat((self.apply(*(key[..., : self.part],) * 2, cos, sin)[1], key[..., self.part :]), dim=-1)


def angles_back(decoder: nn.Module, like: Tensor, by: int, kind: str | None) -> Angles:
    """cos and sin of a rotation by so many positions back; like: a tensor of the device and dtype to use."""
    position = torch.full((1, 1), by, dtype=torch.int64, device=like.device)
    cos, sin = decoder.rotary_emb(like, position, *([] if kind is None else [kind]))  # type: ignore[operator]
    cos, sin = cos.float(), sin.float()
    factor = (cos.square() + sin.square()).sqrt()
    return cos / factor, -sin / factor


def rotations_of(decoder: nn.Module, attention: nn.Module) -> list[Rotation]:
    """The ways in which a layer may turn its keys; `probe.py` sees which one it is. None without rotary positions."""
    apply, rotary = rotary_function(attention), getattr(decoder, "rotary_emb", None)
    if apply is None or rotary is None:
        return []
    by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    kind = getattr(attention, "layer_type", None) if by_kind else None
    width = angles_back(decoder, next(decoder.parameters()), 1, kind)[0].shape[-1]
    return [Rotation(apply, kind, None), Rotation(apply, kind, width)]
