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

from memtrans.hf.families import layer_type, rotary_function

Angles = tuple[Tensor, ...]  # cos and sin, or one of complex numbers, (B or 1, 1, part of D)


@dataclass(frozen=True)
class Rotation:
    """How a layer turns its keys.

    Attributes:
        kind: the layer's type, where the model has a rotation for each; else None.
        part: how many components turn, where the family's function is given those alone; None for its own choice.
        last: whether these are the last ones of a key, and not the first.
    """

    apply: Callable[..., Any]
    kind: str | None
    part: int | None
    last: bool = False

    def turned(self, key: Tensor, angles: Angles) -> Tensor:
        """key (B, G, N, D) turned by what `angles_back` gave."""
        angles = tuple(angle.to(key.device, None if angle.is_complex() else key.dtype) for angle in angles)
        if self.part is None:
            return self.apply(key, key, *angles)[1]
        if self.last:
            kept, turning = key[..., : -self.part], key[..., -self.part :]
            return torch.cat((kept, self.apply(turning, turning, *angles)[1]), dim=-1)
        turning, kept = key[..., : self.part], key[..., self.part :]
        return torch.cat((self.apply(turning, turning, *angles)[1], kept), dim=-1)


def angles_back(decoder: nn.Module, like: Tensor, by: int, kind: str | None, latest: int | Tensor) -> Angles:
    """The angles of a rotation by so many positions back.

    like: a tensor of the device and dtype to use. latest: the last position of the pass whose keys are turned, which
        some embeddings choose their frequencies by (longrope).
    """
    positions = torch.full((1, 2), -by, dtype=torch.int64, device=like.device)
    positions[:, 1] = latest
    angles = decoder.rotary_emb(like, positions, *([] if kind is None else [kind]))  # type: ignore[operator]
    if isinstance(angles, Tensor):
        angles = angles[:, :1]
        return (angles / angles.abs(),)
    cos, sin = (angle[:, :1].float() for angle in angles)
    factor = (cos.square() + sin.square()).sqrt()
    return cos / factor, sin / factor


def rotations_of(decoder: nn.Module, attention: nn.Module) -> list[Rotation]:
    """The ways in which a layer may turn its keys; `probe.py` sees which one it is. None without rotary positions."""
    apply, rotary = rotary_function(attention), getattr(decoder, "rotary_emb", None)
    if apply is None or rotary is None:
        return []
    by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    kind = layer_type(attention) if by_kind else None
    angle = angles_back(decoder, next(decoder.parameters()), 1, kind, 1)[0]
    width = angle.shape[-1] * (2 if angle.is_complex() else 1)
    return [Rotation(apply, kind, None), *(Rotation(apply, kind, width, last) for last in (False, True))]
