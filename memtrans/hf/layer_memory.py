"""What a memorizing attention module of a pretrained model learns: how much a head trusts the memory, by its size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FROM = 1024  # entries up to which an untrained memory needs no offset


class LayerMemory(nn.Module):
    """A number for each head: what is added to the logits of retrieved keys, or, with a gate, to those of the gate.

    memory_offset[h] + memory_slope[h] · log(max(1, n / 1024)), n the entries of the memory: among more entries more are
    near a query by chance.

    Attributes:
        memory_offset, memory_slope: (H,) float32.
    """

    def __init__(self, heads: int, offset: float | str, device: torch.device) -> None:
        super().__init__()
        start, slope = (0.0, -1.0) if isinstance(offset, str) else (offset, 0.0)
        self.memory_offset = nn.Parameter(torch.full((heads,), start, device=device, dtype=torch.float32))
        self.memory_slope = nn.Parameter(torch.full((heads,), slope, device=device, dtype=torch.float32))

    def forward(self, entries: Tensor) -> Tensor:
        """(H,), for a memory of entries () int64.

        >>> layer = LayerMemory(2, "auto", torch.device("cpu"))
        >>> layer(torch.tensor(1000)).tolist(), layer(torch.tensor(2048)).neg().exp().tolist()
        ([0.0, 0.0], [2.0, 2.0])
        """
        beyond = (entries.to(self.memory_offset.device).float() / FROM).clamp(min=1.0).log()
        return self.memory_offset + self.memory_slope * beyond
