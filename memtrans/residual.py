"""What stands around and between the attention layers of a model. Shapes: B documents, N tokens of the segment."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class PreNormResidual(nn.Module):
    """x + fn(norm(x)) of x (B, N, dim); what fn returns beside its output is passed through."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.fn(self.norm(x), *args, **kwargs)  # (B, N, dim)
        if not isinstance(out, tuple):
            return out + x
        head, *tail = out
        return (head + x, *tail)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, of x (B, N, dim)."""

    def __init__(self, dim: int, mult: float = 4, dropout: float = 0.0) -> None:
        super().__init__()
        inner = int(dim * mult)
        self.net = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
