"""Attention to the local context, and what it shares with attention that also reads a memory (`knn_attention.py`).

Shapes: B documents, H query heads, G key/value heads, N tokens of the segment, X cached XL tokens, L = X + N local
keys, D head width, E width of values (D unless they have one of their own; an XL cache is then (..., X, 1, D + E), key
first). Source: Wu et al. 2022, section 3; the XL cache is Dai et al. 2019 (Transformer-XL).
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtrans.checks import (
    check_bias,
    check_cache,
    check_choice,
    check_count,
    check_hidden,
    check_tokens,
    sizes,
    whole_number,
)
from memtrans.layers import bare_weight
from memtrans.local_keys import LayerInputs, LocalKeys, LocalView, biases, not_inputs, seed_of
from memtrans.pairs import paired, taken_apart
from memtrans.segments import Padding, leading, mask_of, ordered
from memtrans_kernels import checks, cosine, local_attention
from memtrans_kernels.eager import kept
from memtrans_kernels.precision import arithmetic_dtype

SIMILARITIES = ("cosine", "product")
COSINE_SCALE = 20.0  # what the learned temperature of a memory's cosines starts at


class LocalContext(nn.Module):
    """What both kinds of attention share: projections to heads, the XL cache, the way out.

    Subclasses say what to do with query (B, H, N, D), the local keys (B, G, L, D) and values (B, G, L, E).
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
        causal: bool = True,
        soft_cap: float | None = None,
        sink: bool = False,
        value_dim_head: int | None = None,
    ) -> None:
        super().__init__()
        dim, heads, dim_head, kv_heads = sizes(1, dim=dim, heads=heads, dim_head=dim_head, kv_heads=kv_heads)
        (value_width,) = sizes(1, value_dim_head=dim_head if value_dim_head is None else value_dim_head)
        checks.divides(kv_heads, "kv_heads", heads, "heads")
        checks.probability("dropout", dropout)
        self.heads, self.kv_heads, self.dim_head, self.value_dim_head = heads, kv_heads, dim_head, value_width
        self.xl_max_memories = whole_number("xl_max_memories", xl_max_memories, low=0)
        checks.positive("soft_cap", soft_cap)
        if not causal and self.xl_max_memories:
            raise ValueError(f"xl_max_memories must be 0 with causal=False, got {self.xl_max_memories}")
        self.causal, self.soft_cap = bool(causal), soft_cap
        self.sink = nn.Parameter(torch.zeros(heads)) if sink else None
        self.dropout = nn.Dropout(dropout)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, kv_heads * (dim_head + value_width), bias=False)  # all keys, then all values
        self.to_out = nn.Linear(heads * value_width, dim, bias=bias_out)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle of old lacks what layers had no choice about."""
        super().__setstate__({"causal": True, "soft_cap": None, "value_dim_head": state["dim_head"], **state})
        self._parameters.setdefault("sink", None)

    @property
    def widths(self) -> tuple[int, int]:
        """D and E, of keys and of values."""
        return self.dim_head, self.value_dim_head

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
        if inputs.xl_memory is not None and not isinstance(inputs.xl_memory, LocalView):
            check_cache("xl_memory", inputs.xl_memory, batch, self.kv_heads, self.widths, x.device)
            local_keys += inputs.xl_memory.shape[-3]
        check_count("local_length", inputs.local_length, batch, x.device, local_keys)
        check_count("lengths", inputs.lengths, batch, x.device, length)
        check_bias(inputs.rel_pos_bias, batch, self.heads, length, local_keys, x.device)
        if not self.causal and inputs.xl_memory is not None:
            raise ValueError("xl_memory must be None with causal=False: a cache is of a causal model")

    def in_order(self, x: Tensor, inputs: LayerInputs, mask: Tensor | None) -> tuple[Tensor, LayerInputs, Padding]:
        """x (B, N, dim) and what comes with it once padding leads, where a mask (B, N) bool says what is padding, or
        lengths do in a layer that is not causal."""
        batch, length, _ = x.shape
        check_tokens("mask", mask, batch, length, x.device)
        real = mask_of(mask, inputs.lengths, length, self.causal)
        assert real is not None
        if inputs.rel_pos_bias is not None and inputs.rel_pos_bias.dim() != 2:
            beside = "lengths with causal=False" if mask is None else "a mask"
            raise ValueError(f"rel_pos_bias must be by distance, (H, distances), beside {beside}, got a dense one")
        padding = leading(real)
        query_mask = None if inputs.query_mask is None else ordered(inputs.query_mask, padding.order)
        inputs = inputs._replace(lengths=None, padding=padding, query_mask=query_mask)
        return ordered(x, padding.order), inputs, padding

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, N, D), key (B, G, N, D) and value (B, G, N, E) of x (B, N, dim)."""
        (batch, length, _), (width, value_width), groups = x.shape, self.widths, self.kv_heads
        parts = self.heads * width, groups * width, groups * value_width
        weight = self._joint_weight()
        if weight is None:
            query = self.to_q(x)  # (B, N, H·D)
            key, value = self.to_kv(x).split(parts[1:], dim=-1)  # (B, N, G·D), (B, N, G·E)
        else:
            query, key, value = F.linear(x, weight).split(parts, dim=-1)
        query = query.view(batch, length, self.heads, width).transpose(1, 2)  # (B, H, N, D)
        key = key.view(batch, length, groups, width).transpose(1, 2)  # (B, G, N, D)
        value = value.view(batch, length, groups, value_width).transpose(1, 2)  # (B, G, N, E)
        return query, key, value

    def _joint_weight(self) -> Tensor | None:
        """The weights of both projections as those of one, (H·D + G·D + G·E, dim), in eager training steps; else None.

        Then x is cast once, by half the launches, and has one gradient instead of a sum of two.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        weights: list[Tensor] = []
        for layer in (self.to_q, self.to_kv):
            weight = bare_weight(layer, nn.Linear)
            if weight is None or layer._parameters["bias"] is not None:
                return None
            weights.append(weight)
        return torch.cat(weights) if weights[0].dtype == weights[1].dtype else None

    def extend(self, key: Tensor, value: Tensor, inputs: LayerInputs) -> tuple[LocalKeys, Tensor | None]:
        """Puts the cached keys and values before the segment's own, (B, G, N, D) and (B, G, N, E), to be attended to.

        Returns the local context and the XL cache for the next segment, (B, X, 2, D), or (B, G, X, 2, D) if G > 1; None
        where there is none, or a view keeps it. Each row's cache ends with its newest real token, so that distances in
        the next segment are those of a text without padding.
        """
        length, cached = key.shape[2], inputs.xl_memory
        if isinstance(cached, LocalView):
            key, value = cached.extend(key, value)  # (B, G, L, D), (B, G, L, E)
        elif cached is not None:
            by_group = cached if self.kv_heads > 1 else cached[:, None]  # (B, G, X, 2, D)
            cached_key, cached_value = taken_apart(by_group.to(key.dtype), self.dim_head)  # (B, G, X, D), (B, G, X, E)
            key = torch.cat((cached_key, key), dim=-2)  # (B, G, L, D)
            value = torch.cat((cached_value, value), dim=-2)
            if inputs.padding is not None:
                key, value = (_behind_padding(tensor, length, inputs.padding.skipped) for tensor in (key, value))
        local_keys, local_length = key.shape[2], inputs.local_length
        if inputs.padding is not None:
            local_length = (local_keys if local_length is None else local_length) - inputs.padding.skipped
        by_distance, dense = biases(inputs.rel_pos_bias, self.heads, length, local_keys)
        local = LocalKeys(
            key, value, by_distance, dense, local_length, inputs.first(length, local_keys), self.causal, self.soft_cap,
            self.sink, inputs.sees_neighbours(), inputs.padding,
        )  # fmt: skip
        if self.xl_max_memories == 0 or isinstance(cached, LocalView):
            return local, None
        newest, first = [key.detach(), value.detach()], max(0, local_keys - self.xl_max_memories)
        if inputs.lengths is None:
            newest = [tensor[:, :, first:] for tensor in newest]  # (B, G, X, D)
        staying = inputs.staying(local_length, local_keys)
        if inputs.lengths is not None or staying is not None:  # zeros lead where a row has fewer
            place = torch.arange(first, local_keys, device=key.device)
            oldest = 0 if staying is None else local_keys - staying[:, None]
            if inputs.lengths is not None:
                place = place - (length - inputs.lengths)[:, None]  # (B, X)
                index = place.clamp(min=0)[:, None, :, None]  # (B, 1, X, 1)
                newest = [tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3])) for tensor in newest]
            foreign = (place < oldest)[:, None, :, None]
            newest = [tensor.masked_fill(foreign, 0.0) for tensor in newest]
        new_cache = paired(*newest)  # (B, G, X, 2, D)
        return local, new_cache if self.kv_heads > 1 else new_cache[:, 0]


class Attention(LocalContext):
    """Multi-query attention over the segment and its XL cache.

    Args:
        dim: model width.
        heads: H, query heads.
        dim_head: D, width of a head.
        dropout: probability of dropping an attention weight, in training.
        xl_max_memories: X, tokens that the XL cache keeps; 0 for none.
        kv_heads: G, key/value heads; divides H.
        causal: whether a token sees none behind it; if not, there is no XL cache, and a bias by distance counts how far
            a key is away on either side.
        soft_cap: c, which makes c · tanh(x / c) of each logit x before its bias. Default: none.
        sink: whether each head has a learned logit, which starts at 0, in the denominator of its softmax.
        value_dim_head: E, width of a head's values. Default: D.
        similarity: "product" of query and key, times dim_head**-0.5, or their "cosine", times a temperature per head
            that is learned and starts at dim_head**0.5: logits then vary as those of products do. Cosines train more
            steadily with an XL cache, whose keys are of the weights before.

    Raises:
        ValueError, TypeError: a size that is no integer or below 1, an H that G does not divide, a dropout outside
            [0, 1), a soft cap that is not above 0, an XL cache with causal=False, a similarity of another name.

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
        causal: bool = True,
        soft_cap: float | None = None,
        sink: bool = False,
        value_dim_head: int | None = None,
        similarity: str = "product",
    ) -> None:
        super().__init__(
            dim, heads, dim_head, dropout, xl_max_memories, kv_heads, bias_out=True,
            causal=causal, soft_cap=soft_cap, sink=sink, value_dim_head=value_dim_head,
        )  # fmt: skip
        check_choice("similarity", similarity, SIMILARITIES)
        self.similarity = similarity
        self.scale: float | nn.Parameter = self.dim_head**-0.5
        if similarity == "cosine":
            self.scale = learned_temperature(self.heads, self.dim_head**0.5)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"similarity": "product", **state})

    def forward(
        self,
        x: Tensor,
        inputs: LayerInputs | None = None,
        *,
        xl_memory: Tensor | None = None,
        rel_pos_bias: Tensor | None = None,
        local_length: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            x: (B, N, dim).
            inputs: all of the following, checked already: from a model's loop. Default: made of them, after a check.
            xl_memory: (B, X, 2, D), or (B, G, X, 2, D) if G > 1.
            rel_pos_bias: by distance (H, distances), or dense (1 or B, H, at least N, at least L).
            local_length: (B,) int64, how many of the newest of the L local keys are this document's. Default: all.
            lengths: (B,) int64, how many of the N tokens are real; padding at the tail is neither seen nor cached.
                Default: all.
            mask: (B, N) bool, False for padding anywhere: it is neither seen nor cached, sees nothing and takes no
                position. Default: all is real.

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
        elif not isinstance(inputs, LayerInputs):
            raise TypeError(not_inputs(inputs))
        padding = None
        if mask is not None or (inputs.lengths is not None and not self.causal):
            x, inputs, padding = self.in_order(x, inputs, mask)
        query, key, value = self.project(x)  # (B, H, N, D), (B, G, N, D), (B, G, N, E)
        if self.similarity == "cosine":
            query, key = cosine(query, key)
        local, new_cache = self.extend(key, value, inputs)
        dropout_p, plain = self.dropout_p, self.soft_cap is None and self.sink is None
        of_view = isinstance(inputs.xl_memory, LocalView) and plain
        if of_view and query.shape[2] == 1 and local.bias_dense is not None and dropout_p == 0.0:
            return self.to_out(self._attend_once(query, local)), new_cache
        scale = self._temperature(x.device, arithmetic_dtype(query))
        attended, _ = local_attention(
            query, local.key, local.value, scale, local.bias_table, local.bias_dense, local.local_length,
            dropout_p, seed_of(dropout_p, x.device),
            causal=self.causal, first=local.first, soft_cap=self.soft_cap, sink=self.sink,
        )  # fmt: skip
        out = self.to_out(attended.transpose(1, 2).flatten(2))  # (B, N, dim)
        return out if padding is None else ordered(out, padding.back), new_cache

    def _temperature(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What logits are multiplied by, per head (H,); where it is not learned, there and in that dtype."""
        if isinstance(self.scale, Tensor):
            return temperature_of(self.scale)
        return kept(_full, device, self.heads, self.scale, dtype)

    def _attend_once(self, query: Tensor, local: LocalKeys) -> Tensor:
        """One query a head, (B, H, 1, D), that finds itself, by PyTorch's attention; (B, 1, H·E).

        Heads that share keys are queries of one head.
        """
        assert local.bias_dense is not None
        batch, heads, _, width = query.shape
        of_group = (batch, self.kv_heads, heads // self.kv_heads)
        mask = local.bias_dense.to(query.dtype).reshape(*of_group, -1)  # (B, G, H/G, L)
        scale = self.scale
        if isinstance(scale, Tensor):
            query, scale = query * temperature_of(scale)[:, None, None].to(query.dtype), 1.0
        out = F.scaled_dot_product_attention(
            query.reshape(*of_group, width), local.key, local.value, mask, scale=scale
        )  # (B, G, H/G, E)
        return out.reshape(batch, 1, heads * self.value_dim_head)


def learned_temperature(heads: int, start: float, learned: bool = True) -> nn.Parameter:
    """What `temperature_of` makes `start` of for each head: its logarithm (H, 1, 1)."""
    return nn.Parameter(torch.full((heads, 1, 1), math.log(start)), requires_grad=learned)


def temperature_of(scale: Tensor) -> Tensor:
    """What logits are multiplied by, per head (H,): the exponential of what is learned, (H, 1, 1)."""
    return scale.exp().flatten()


def _full(device: torch.device, heads: int, scale: float, dtype: torch.dtype) -> Tensor:
    """One number for each head (H,)."""
    return torch.full((heads,), scale, dtype=dtype, device=device)


def _behind_padding(tensor: Tensor, length: int, skipped: Tensor) -> Tensor:
    """Puts the padding that leads N = `length` tokens before what is cached: (B, G, L, D) in another order of L."""
    place = torch.arange(tensor.shape[2], device=tensor.device)
    cached, skipped = tensor.shape[2] - length, skipped[:, None]
    place = torch.where(place < skipped, place + cached, torch.where(place < skipped + cached, place - skipped, place))
    return tensor.gather(2, place[:, None, :, None].expand_as(tensor))


def __getattr__(name: str) -> Any:
    """`KNNAttention` stood here; pickles of that time look for it here."""
    if name == "KNNAttention":
        return import_module("memtrans.knn_attention").KNNAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
