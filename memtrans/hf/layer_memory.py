"""What a memorizing attention module of a pretrained model learns: how its heads ask the memory, and trust it.

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

FROM = 1024  # entries up to which an untrained memory needs no offset
ASKING = ("memory_sharpness", "memory_gain", "memory_mix")


class LayerMemory(nn.Module):
    """What a head adds to the logits of retrieved keys (or, with a gate, to the gate's), and the query it asks with.

    With n entries in the memory and beyond = log(max(1, n / 1024)), the offset is

        memory_offset[h] + memory_slope[h] · beyond

    and, once `learn_to_ask` was called, which a calibration does, the memory is asked with

        q + q · memory_mix[h],  q = query · exp(memory_gain[h] + memory_sharpness[h] · beyond)

    instead of the query: among more entries more are near a query by chance, and other components of it tell them apart
    than among a segment's.

    Attributes:
        memory_offset, memory_slope: (H,) float32.
        memory_sharpness: (H,), memory_gain: (H, D), memory_mix: (H, D, D), float32; None before `learn_to_ask`.
    """

    memory_sharpness: nn.Parameter | None
    memory_gain: nn.Parameter | None
    memory_mix: nn.Parameter | None

    def __init__(self, heads: int, width: int, offset: float | str, device: torch.device) -> None:
        super().__init__()
        start, slope = (0.0, -1.0) if isinstance(offset, str) else (offset, 0.0)
        self.width = width
        self.memory_offset = nn.Parameter(torch.full((heads,), start, device=device, dtype=torch.float32))
        self.memory_slope = nn.Parameter(torch.full((heads,), slope, device=device, dtype=torch.float32))
        for name in ASKING:
            self.register_parameter(name, None)

    def learn_to_ask(self) -> None:
        """Gives it the parameters that make the query another one; they change nothing yet."""
        heads = len(self.memory_offset)
        shapes = {"memory_sharpness": (heads,), "memory_gain": (heads, self.width)}
        for name in ASKING:
            if getattr(self, name) is None:
                shape = shapes.get(name, (heads, self.width, self.width))
                setattr(self, name, nn.Parameter(self.memory_offset.new_zeros(shape)))

    @property
    def asks(self) -> bool:
        """Whether the memory is asked with another query than the local keys."""
        return self.memory_mix is not None

    def forward(self, entries: Tensor) -> Tensor:
        """The offset (H,), for a memory of entries () int64.

        >>> layer = LayerMemory(2, 8, "auto", torch.device("cpu"))
        >>> layer(torch.tensor(1000)).tolist(), layer(torch.tensor(2048)).neg().exp().tolist()
        ([0.0, 0.0], [2.0, 2.0])
        """
        return self.memory_offset + self.memory_slope * self._beyond(entries)

    def asking(self, query: Tensor, entries: Tensor) -> Tensor:
        """What query (B, H, N, D) asks a memory of entries () int64 with: (B, H, N, D)."""
        if self.memory_mix is None or self.memory_gain is None or self.memory_sharpness is None:
            return query
        gain = self.memory_gain + (self.memory_sharpness * self._beyond(entries))[:, None]
        wide = query * gain.exp()[:, None]  # of the wider dtype
        return (wide + wide @ self.memory_mix.to(wide.dtype)).to(query.dtype)

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what another one learned."""
        if any(name in state for name in ASKING):
            self.learn_to_ask()
        self.load_state_dict(dict(state))

    def _beyond(self, entries: Tensor) -> Tensor:
        return (entries.to(self.memory_offset.device).float() / FROM).clamp(min=1.0).log()
