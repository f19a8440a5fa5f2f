"""Attention to the local context, and what it shares with attention that also reads a memory (`knn_attention.py`).

Shapes: B documents, H query heads, G key/value heads, N tokens of the segment, X cached XL tokens, L = X + N local
keys, D head width. Source: Wu et al. 2022, section 3; the XL cache is Dai et al. 2019 (Transformer-XL).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtrans.checks import check_bias, check_cache, check_count, check_hidden, sizes, whole_number
from memtrans.layers import bare_weight
from memtrans_kernels import checks, local_attention
from memtrans_kernels.precision import arithmetic_dtype


class LocalView:
    """What attention is given instead of an XL cache: it keeps the new keys and values and returns all to attend to.

    Each token finds itself among them.
    """

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (B, G, N, D) of the new tokens -> local keys and values (B, G, L, D)."""
        raise NotImplementedError


class LayerInputs(NamedTuple):
    """What the attention of one layer is given beside its input; whoever makes one has checked what it holds.

    Attributes:
        xl_memory: (B, X, 2, D), or (B, G, X, 2, D) if G > 1, or the view of a `LocalCache`.
        rel_pos_bias: by distance (H, distances), or dense (1 or B, H, at least N, at least L).
        local_length: (B,) int64, how many of the newest of the L local keys are this document's. Default: all.
        lengths: (B,) int64, how many of the N tokens are real. Default: all.
        temperature: (H,), of a memorizing layer. Default: the layer computes it.
    """

    xl_memory: Tensor | LocalView | None = None
    rel_pos_bias: Tensor | None = None
    local_length: Tensor | None = None
    lengths: Tensor | None = None
    temperature: Tensor | None = None


class LocalKeys(NamedTuple):
    """The local context that queries attend to, as the kernels take it.

    Attributes:
        key, value: (B, G, L, D).
        bias_table: (H, distances), a bias by distance.
        bias_dense: (1 or B, H, N, L), a bias of each pair.
        local_length: (B,) int64, how many of the newest keys count. Default: all.
    """

    key: Tensor
    value: Tensor
    bias_table: Tensor | None
    bias_dense: Tensor | None
    local_length: Tensor | None


class LocalContext(nn.Module):
    """What both kinds of attention share: projections to heads, the XL cache, the way out.

    Subclasses say what to do with query (B, H, N, D) and the local keys and values (B, G, L, D).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float,
        xl_max_memories: int,
        kv_heads: int,
        bias_out: bool,
    ) -> None:
        super().__init__()
        dim, heads, dim_head, kv_heads = sizes(1, dim=dim, heads=heads, dim_head=dim_head, kv_heads=kv_heads)
        checks.divides(kv_heads, "kv_heads", heads, "heads")
        checks.probability("dropout", dropout)
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.xl_max_memories = whole_number("xl_max_memories", xl_max_memories, low=0)
        self.dropout = nn.Dropout(dropout)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, kv_heads * dim_head * 2, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias_out)

    @property
    def dropout_p(self) -> float:
        """The probability of dropping an attention weight now; 0 in `eval()` mode."""
        return self.dropout.p if self.training else 0.0

    def check(self, x: Tensor, inputs: LayerInputs) -> None:
        """Raises ValueError or TypeError unless x (B, N, dim) and what comes with it fit; where no graph is traced."""
        if torch.compiler.is_compiling():
            return
        check_hidden("x", x, getattr(self.to_q, "in_features", None), bare_weight(self.to_q, nn.Linear))
        batch, length, _ = x.shape
        local_keys = length
        if isinstance(inputs.xl_memory, Tensor):
            check_cache("xl_memory", inputs.xl_memory, batch, self.kv_heads, self.dim_head, x.device)
            local_keys += inputs.xl_memory.shape[-3]
        check_count("local_length", inputs.local_length, batch, x.device, local_keys)
        check_count("lengths", inputs.lengths, batch, x.device, length)
        check_bias(inputs.rel_pos_bias, batch, self.heads, length, local_keys, x.device)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, N, D), key and value (B, G, N, D) of x (B, N, dim)."""
        batch, length, _ = x.shape
        query = self.to_q(x).view(batch, length, self.heads, self.dim_head).transpose(1, 2)  # (B, H, N, D)
        key_value = self.to_kv(x).view(batch, length, 2, self.kv_heads, self.dim_head)  # (B, N, 2, G, D)
        key, value = key_value.permute(2, 0, 3, 1, 4).unbind()  # (B, G, N, D) each
        return query, key, value

    def extend(self, key: Tensor, value: Tensor, inputs: LayerInputs) -> tuple[LocalKeys, Tensor | None]:
        """Puts the cached keys and values before the segment's own, (B, G, N, D) each, to be attended to.

        Returns the local context and the XL cache for the next segment, (B, X, 2, D), or (B, G, X, 2, D) if G > 1; None
        where there is none, or a view keeps it. Each row's cache ends with its newest real token, so that distances in
        the next segment are those of a text without padding.
        """
        length, cached = key.shape[2], inputs.xl_memory
        if isinstance(cached, LocalView):
            key, value = cached.extend(key, value)  # (B, G, L, D)
        elif cached is not None:
            by_group = cached if self.kv_heads > 1 else cached[:, None]  # (B, G, X, 2, D)
            cached_key, cached_value = by_group.to(key.dtype).unbind(dim=-2)  # (B, G, X, D)
            key = torch.cat((cached_key, key), dim=-2)  # (B, G, L, D)
            value = torch.cat((cached_value, value), dim=-2)
        by_distance, dense = biases(inputs.rel_pos_bias, self.heads, length, key.shape[2])
        local = LocalKeys(key, value, by_distance, dense, inputs.local_length)
        if self.xl_max_memories == 0 or isinstance(cached, LocalView):
            return local, None
        newest, first = [key.detach(), value.detach()], max(0, key.shape[2] - self.xl_max_memories)
        if inputs.lengths is None:
            newest = [tensor[:, :, first:] for tensor in newest]  # (B, G, X, D)
        else:  # zeros lead where a row has fewer
            place = torch.arange(first, key.shape[2], device=key.device) - (length - inputs.lengths)[:, None]  # (B, X)
            place = place[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])  # (B, G, X, D)
            newest = [tensor.gather(2, place.clamp(min=0)).masked_fill(place < 0, 0.0) for tensor in newest]
        new_cache = torch.stack(newest, dim=-2)  # (B, G, X, 2, D)
        return local, new_cache if self.kv_heads > 1 else new_cache[:, 0]


class Attention(LocalContext):
    """Causal multi-query attention over the segment and its XL cache.

    Args:
        dim: model width.
        heads: H, query heads.
        dim_head: D, width of a head.
        dropout: probability of dropping an attention weight, in training.
        xl_max_memories: X, tokens that the XL cache keeps; 0 for none.
        kv_heads: G, key/value heads; divides H.

    Raises:
        ValueError, TypeError: a size that is no integer or below 1, an H that G does not divide, a dropout outside
            [0, 1).

    >>> attention = Attention(dim=32, heads=4, dim_head=8, xl_max_memories=16)
    >>> out, xl_memory = attention(torch.randn(2, 10, 32))
    >>> out.shape, xl_memory.shape
    (torch.Size([2, 10, 32]), torch.Size([2, 10, 2, 8]))
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        xl_max_memories: int = 0,
        kv_heads: int = 1,
    ) -> None:
        super().__init__(dim, heads, dim_head, dropout, xl_max_memories, kv_heads, bias_out=True)
        self.scale = dim_head**-0.5

    def forward(
        self,
        x: Tensor,
        inputs: LayerInputs | None = None,
        *,
        xl_memory: Tensor | None = None,
        rel_pos_bias: Tensor | None = None,
        local_length: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            x: (B, N, dim).
            inputs: all of the following, checked already: from a model's loop. Default: made of them, after a check.
            xl_memory: (B, X, 2, D), or (B, G, X, 2, D) if G > 1.
            rel_pos_bias: by distance (H, distances), or dense (1 or B, H, at least N, at least L).
            local_length: (B,) int64, how many of the newest of the L local keys are this document's. Default: all.
            lengths: (B,) int64, how many of the N tokens are real; padding at the tail is not cached. Default: all.

        Returns:
            out (B, N, dim), and the new XL cache, None without one. Each row's cache ends with its newest real token;
            of a row that said less than the cache holds, only so many are its document's: `local_length` of the next
            segment, of N tokens, is N plus that number.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; on the CPU also a count out of range.
        """
        if inputs is None:
            inputs = LayerInputs(xl_memory, rel_pos_bias, local_length, lengths)
            self.check(x, inputs)
        query, key, value = self.project(x)  # (B, H, N, D), (B, G, N, D), (B, G, N, D)
        local, new_cache = self.extend(key, value, inputs)
        dropout_p, of_view = self.dropout_p, isinstance(inputs.xl_memory, LocalView)
        if of_view and query.shape[2] == 1 and local.bias_dense is not None and dropout_p == 0.0:
            return self.to_out(self._attend_once(query, local)), new_cache
        scale = torch.full((self.heads,), self.scale, dtype=arithmetic_dtype(query), device=x.device)
        out, _ = local_attention(
            query, local.key, local.value, scale, *local[2:], dropout_p, seed_of(dropout_p, x.device)
        )
        return self.to_out(out.transpose(1, 2).flatten(2)), new_cache  # (B, N, dim)

    def _attend_once(self, query: Tensor, local: LocalKeys) -> Tensor:
        """One query a head, (B, H, 1, D), that finds itself, by PyTorch's attention; (B, 1, H·D).

        Heads that share keys are queries of one head.
        """
        assert local.bias_dense is not None
        batch, heads, _, width = query.shape
        of_group = (batch, self.kv_heads, heads // self.kv_heads)
        mask = local.bias_dense.to(query.dtype).reshape(*of_group, -1)  # (B, G, H/G, L)
        out = F.scaled_dot_product_attention(
            query.reshape(*of_group, width), local.key, local.value, mask, scale=self.scale
        )  # (B, G, H/G, D)
        return out.reshape(batch, 1, heads * width)


def seed_of(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed () int64 for the kernel's dropout, drawn on the device; None where nothing is dropped."""
    return None if dropout_p == 0.0 else torch.randint(2**62, (), device=device)


def biases(
    rel_pos_bias: Tensor | None, heads: int, length: int, local_keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """A bias as the kernels take it: by distance (H, distances), or dense (1 or B, H, N, L); None for the other."""
    if rel_pos_bias is None:
        return None, None
    if rel_pos_bias.dim() == 2:
        return rel_pos_bias, None
    dense = rel_pos_bias if rel_pos_bias.dim() == 4 else rel_pos_bias[None]
    if dense.shape[1:] == (heads, length, local_keys):
        return None, dense
    return None, dense[..., -length:, -local_keys:].expand(-1, heads, -1, -1)


def __getattr__(name: str) -> Any:
    """`KNNAttention` stood here; pickles of that time look for it here."""
    if name == "KNNAttention":
        return import_module("memtrans.knn_attention").KNNAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
