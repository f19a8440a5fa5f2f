"""What a memorizing attention module of a pretrained model learns: how its heads ask the memory, and trust it.

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FROM = 1024  # entries up to which an untrained memory needs no offset


class LayerMemory(nn.Module):
    """What a head adds to the logits of retrieved keys (or, with a gate, to the gate's), and the query it asks with.

    With n entries in the memory and beyond = log(max(1, n / 1024)), the offset is

        memory_offset[h] + memory_slope[h] · beyond

    and the memory is asked with (query · exp(memory_gain[h] + memory_sharpness[h] · beyond)) (1 + memory_mix[h]):
    among more entries more are near a query by chance, and what stands out must stand out further.

    Attributes:
        memory_offset, memory_slope, memory_sharpness: (H,) float32. memory_gain: (H, D) float32.
        memory_mix: (H, D, D) float32.
    """

    def __init__(self, heads: int, width: int, offset: float | str, device: torch.device) -> None:
        super().__init__()
        start, slope = (0.0, -1.0) if isinstance(offset, str) else (offset, 0.0)

        def numbers(value: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, device=device, dtype=torch.float32))

        self.memory_offset, self.memory_slope = numbers(start, heads), numbers(slope, heads)
        self.memory_gain, self.memory_sharpness = numbers(0.0, heads, width), numbers(0.0, heads)
        self.memory_mix = numbers(0.0, heads, width, width)

    def forward(self, entries: Tensor) -> Tensor:
        """The offset (H,), for a memory of entries () int64.

        >>> layer = LayerMemory(2, 8, "auto", torch.device("cpu"))
        >>> layer(torch.tensor(1000)).tolist(), layer(torch.tensor(2048)).neg().exp().tolist()
        ([0.0, 0.0], [2.0, 2.0])
        """
        return self.memory_offset + self.memory_slope * self._beyond(entries)

    def asking(self, query: Tensor, entries: Tensor) -> Tensor:
        """What query (B, H, N, D) asks a memory of entries () int64 with: (B, H, N, D)."""
        gain = self.memory_gain + (self.memory_sharpness * self._beyond(entries))[:, None]
        wide = query.to(gain.dtype) * gain.exp()[:, None]
        return (wide + wide @ self.memory_mix).to(query.dtype)

    def _beyond(self, entries: Tensor) -> Tensor:
        return (entries.to(self.memory_offset.device).float() / FROM).clamp(min=1.0).log()
