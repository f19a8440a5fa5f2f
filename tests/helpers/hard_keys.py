"""Keys that a search finds hard: alike in time, equal, repeating, getting better, or where a sample does not look."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers.devices import seeded
from torch import Tensor
from torch.nn.functional import normalize

BOX = 128  # slots of a sample of the Hopper search that share a phase


def _noise(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=seeded(seed))


def _runs(count: int, width: int, seed: int) -> Tensor:
    centres = normalize(_noise(-(-count // 512), width, seed), dim=-1)
    return centres.repeat_interleave(512, dim=0)[:count] + 0.1 * _noise(count, width, seed + 1)


def _clusters(count: int, width: int, seed: int) -> Tensor:
    centre = torch.randint(1000, (count,), generator=seeded(seed))
    return normalize(_noise(1000, width, seed), dim=-1)[centre] + 0.1 * _noise(count, width, seed + 1)


def _vocabulary(count: int, width: int, seed: int) -> Tensor:
    return _noise(256, width, seed)[torch.randint(256, (count,), generator=seeded(seed))]


def _periodic(count: int, width: int, seed: int) -> Tensor:
    return _noise(512, width, seed).repeat(-(-count // 512), 1)[:count]


def _equal(count: int, width: int, seed: int) -> Tensor:
    return _noise(1, width, seed).repeat(count, 1)


def _ascending(count: int, width: int, seed: int) -> Tensor:
    direction = normalize(_noise(1, width, seed), dim=-1)
    return torch.linspace(-1, 3, count)[:, None] * direction + 0.05 * _noise(count, width, seed + 1)


def _striped(count: int, width: int, seed: int) -> Tensor:
    """Good keys in every eighth slot alone, those that one phase of a sample takes."""
    good = torch.arange(count)[:, None] % 8 == 3
    return good * normalize(_noise(1, width, seed), dim=-1) + 0.06 * _noise(count, width, seed + 1)


def _late(count: int, width: int, seed: int) -> Tensor:
    """The last hundredth is better than all before, and better with every key."""
    rise = (torch.linspace(0, 1, count)[:, None] - 0.99).clamp(min=0) * 300
    return rise * normalize(_noise(1, width, seed), dim=-1) + 0.1 * _noise(count, width, seed + 1)


KINDS: dict[str, Callable[[int, int, int], Tensor]] = {
    "random": _noise,
    "runs": _runs,
    "clusters": _clusters,
    "vocabulary": _vocabulary,
    "periodic": _periodic,
    "equal": _equal,
    "ascending": _ascending,
    "striped": _striped,
    "late": _late,
}


def hard_keys(kind: str, count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Unit keys (count, width) of one of KINDS."""
    return normalize(KINDS[kind](count, width, seed), dim=-1).to(dtype)


def queries_near(keys: Tensor, count: int, seed: int = 0) -> Tensor:
    """Unit queries (count, D), each near one of the keys (C, D)."""
    near = keys[torch.randint(len(keys), (count,), generator=seeded(seed))].float()
    return normalize(near + 0.06 * _noise(*near.shape, seed + 1), dim=-1).to(keys.dtype)


def sampled_slots(slots: int) -> torch.Tensor:
    """Which slots of a ring the search samples at most: those of each box's phase and of three phases after it."""
    window = torch.arange(slots) // BOX
    bits = (window * 0x9E3779B1) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
    return (torch.arange(slots) - (bits >> 29)) % 8 % 2 == 0
