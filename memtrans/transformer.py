"""The Memorizing Transformer: a decoder whose memorizing layers also attend to what the document said long ago.

Source: Wu et al., "Memorizing Transformers", ICLR 2022 (arXiv 2203.08913).
Shapes: B documents, N tokens of the segment, X cached XL tokens, D head width, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtrans.attention import Attention, LocalContext
from memtrans.checks import (
    check_count,
    check_finite,
    check_hidden,
    check_ids,
    check_labels,
    check_number,
    clearing_token,
    layer_numbers,
    sizes,
    whole_number,
)
from memtrans.compatibility import UNUSED, warn_unused
from memtrans.knn_attention import KNNAttention
from memtrans.memory.knn_memory import KNNMemory, snapshot_for
from memtrans.memory.memory_list import KNNMemoryList
from memtrans.memory.ring import MemorySnapshot
from memtrans.position import T5RelativePositionBias
from memtrans.pretrained import Pretrained, configuration_of
from memtrans.xl_memories import XLMemories, caches_of, length_after, length_of, longest_of
from memtrans_kernels import checks


class PreNormResidual(nn.Module):
    """x + fn(norm(x)) of x (B, N, dim); what fn returns beside its output is passed through."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        out = self.fn(self.norm(x), **kwargs)
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


class MemorizingTransformer(Pretrained):
    """A decoder-only transformer with a memory in some layers and an XL cache in some.

    Args:
        num_tokens: V. dim: model width. depth: layers. dim_head: D. heads: H of plain layers.
        knn_attn_heads: H of memorizing layers. Default: heads.
        attn_dropout, ff_dropout: dropout. ff_mult: width of the feed-forward layers over dim.
        memorizing_layers: layers (from 1) with a memory; an int, a sequence, `()` for none. Default: depth // 2.
        max_knn_memories: M. num_retrieved_memories: K.
        clear_memories_on_sos_token_id: a row that contains it forgets its memory before the segment.
        clear_memories_on_eos_token_id: a row that contains it forgets its memory after the segment.
        shift_knn_memories_down: a layer searches the memory this many memorizing layers above, wrapping round.
        shift_xl_memories_down: a layer attends to the XL cache this many caching layers above, wrapping round.
        pad_id: labels equal to it are not scored; -1 scores every byte.
        xl_max_memories: X, tokens an XL cache keeps; 0 for none. xl_memory_layers: layers with one. Default: all.
        knn_memories_directory, knn_memory_multiprocessing: accepted and ignored, with a DeprecationWarning.
        kv_heads: G. attn_scale_init: start of the temperature of memorizing layers.
        memory_offset: start of a learned offset per head on the retrieved logits; None for none.
        combine: "softmax" over retrieved and local keys together, or one softmax each and a learned "gate" per head.
        legacy: upstream's positions (the XL cache does not count) and shift (reads and writes rotate together), for
            checkpoints trained with it.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
        validate: also check values (token ids) on the GPU, at the price of waiting for it.

    Attributes:
        config: these arguments, as `save_pretrained` writes and `from_pretrained` reads them.

    Raises:
        ValueError, TypeError: a size that is no integer or too small, a layer or token that does not exist, heads that
            do not divide.

    >>> model = MemorizingTransformer(num_tokens=256, dim=32, depth=2, dim_head=8, heads=4, memorizing_layers=2)
    >>> memories = model.create_knn_memories(batch_size=1)
    >>> logits = model(torch.randint(0, 256, (1, 20)), knn_memories=memories)
    >>> logits.shape, memories[0].lengths.tolist()
    (torch.Size([1, 20, 256]), [20])
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        knn_attn_heads: int | None = None,
        attn_dropout: float = 0.0,
        ff_mult: float = 4,
        ff_dropout: float = 0.0,
        memorizing_layers: int | Sequence[int] | None = None,
        max_knn_memories: int = 250000,
        num_retrieved_memories: int = 32,
        clear_memories_on_sos_token_id: int | None = None,
        clear_memories_on_eos_token_id: int | None = None,
        knn_memories_directory: Any = UNUSED,
        shift_knn_memories_down: int = 0,
        pad_id: int = 0,
        xl_max_memories: int = 0,
        xl_memory_layers: int | Sequence[int] | None = None,
        shift_xl_memories_down: int = 0,
        knn_memory_multiprocessing: Any = UNUSED,
        kv_heads: int = 1,
        attn_scale_init: float = 20,
        memory_offset: float | None = None,
        combine: str = "softmax",
        legacy: bool = False,
        activation_checkpointing: bool = False,
        validate: bool = False,
    ) -> None:
        arguments = configuration_of(locals(), without=("knn_memories_directory", "knn_memory_multiprocessing"))
        super().__init__()
        self.config = arguments
        warn_unused(
            knn_memories_directory=knn_memories_directory, knn_memory_multiprocessing=knn_memory_multiprocessing
        )
        knn_attn_heads = heads if knn_attn_heads is None else knn_attn_heads
        num_tokens, dim, depth = sizes(1, num_tokens=num_tokens, dim=dim, depth=depth)
        dim_head, heads, knn_attn_heads = sizes(1, dim_head=dim_head, heads=heads, knn_attn_heads=knn_attn_heads)
        (max_knn_memories,) = sizes(1, max_knn_memories=max_knn_memories)
        xl_max_memories = whole_number("xl_max_memories", xl_max_memories, low=0)
        checks.probability("attn_dropout", attn_dropout)
        checks.probability("ff_dropout", ff_dropout)
        check_number("ff_mult", ff_mult, above=0)
        self.num_tokens, self.dim, self.dim_head, self.kv_heads = num_tokens, dim, dim_head, kv_heads
        self.max_knn_memories, self.pad_id = max_knn_memories, checks.integer("pad_id", pad_id)
        self.clear_memories_on_sos_token_id = clearing_token("sos", clear_memories_on_sos_token_id, num_tokens)
        self.clear_memories_on_eos_token_id = clearing_token("eos", clear_memories_on_eos_token_id, num_tokens)
        self.shift_knn_memories_down = whole_number("shift_knn_memories_down", shift_knn_memories_down)
        self.shift_xl_memories_down = whole_number("shift_xl_memories_down", shift_xl_memories_down)
        self.legacy, self.activation_checkpointing, self.validate = legacy, activation_checkpointing, validate
        self._choose_layers(depth, memorizing_layers, xl_memory_layers, xl_max_memories)

        self.token_emb = nn.Embedding(num_tokens, dim)
        self.rel_pos_bias = T5RelativePositionBias(scale=dim_head**0.5, heads=heads)
        self.knn_rel_pos_bias = T5RelativePositionBias(scale=dim_head**0.5, heads=knn_attn_heads)
        self.layers = nn.ModuleList(self._layer(number) for number in range(1, depth + 1))
        self.to_logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_tokens))

    def _choose_layers(
        self,
        depth: int,
        memorizing: int | Sequence[int] | None,
        caching: int | Sequence[int] | None,
        xl_max_memories: int,
    ) -> None:
        """Which layers have a memory, and which an XL cache."""
        middle = (depth // 2,) if depth > 1 else ()
        self.memorizing_layers = layer_numbers("memorizing_layers", memorizing, middle, depth)
        self.num_memory_layers = len(self.memorizing_layers)
        xl_layers = layer_numbers("xl_memory_layers", caching, range(1, depth + 1), depth)
        self.config |= {"memorizing_layers": list(self.memorizing_layers), "xl_memory_layers": list(xl_layers)}
        self.xl_memory_layers = xl_layers if xl_max_memories > 0 else ()
        self.num_xl_memory_layers = len(self.xl_memory_layers)

    def _layer(self, number: int) -> nn.ModuleList:
        """Attention, then feed-forward, each behind a norm and beside a residual connection."""
        attention = PreNormResidual(self.dim, self._attention(number))
        feed_forward = FeedForward(self.dim, self.config["ff_mult"], self.config["ff_dropout"])
        return nn.ModuleList([attention, PreNormResidual(self.dim, feed_forward)])

    def _attention(self, number: int) -> LocalContext:
        """To the local context; in a memorizing layer to the memory too."""
        config = self.config
        shared: dict[str, Any] = {
            "dim": self.dim,
            "dim_head": self.dim_head,
            "kv_heads": self.kv_heads,
            "dropout": config["attn_dropout"],
            "xl_max_memories": config["xl_max_memories"] if number in self.xl_memory_layers else 0,
        }
        if number not in self.memorizing_layers:
            return Attention(heads=config["heads"], **shared)
        heads = config["heads"] if config["knn_attn_heads"] is None else config["knn_attn_heads"]
        of_memory = ("num_retrieved_memories", "attn_scale_init", "memory_offset", "combine")
        return KNNAttention(heads=heads, **{name: config[name] for name in of_memory}, **shared)

    # ------------------------------------------------------------------------------------------------ memories

    def create_knn_memories(self, *, batch_size: int, **kwargs: Any) -> KNNMemoryList:
        """Empty memories for a batch of documents; keyword arguments go to `KNNMemory` (device, dtype, spare, ...)."""
        create = KNNMemoryList.create_memories(batch_size=batch_size, num_memory_layers=self.num_memory_layers)
        return create(
            **{"dim": self.dim_head, "max_memories": self.max_knn_memories, "kv_heads": self.kv_heads, **kwargs}
        )

    @contextmanager
    def knn_memories_context(self, **kwargs: Any) -> Iterator[KNNMemoryList]:
        """Memories for a `with`; their storage is freed at its end, also after an exception."""
        memories = self.create_knn_memories(**kwargs)
        try:
            yield memories
        finally:
            memories.cleanup()

    # ------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        x: Tensor | None = None,
        knn_memories: Sequence[KNNMemory | MemorySnapshot] = (),
        xl_memories: Sequence[Tensor | None] | None = None,
        labels: Tensor | None = None,
        add_knn_memory: bool = True,
        *,
        inputs_embeds: Tensor | None = None,
        return_embeddings: bool = False,
        lengths: Tensor | None = None,
        xl_length: Tensor | None = None,
    ) -> Any:
        """Reads one segment.

        Args:
            x: token ids (B, N). knn_memories: one per memorizing layer, memories or snapshots of them.
            xl_memories: one (B, X, 2, D), or (B, G, X, 2, D) if G > 1, per caching layer, as the last call returned
                them.
            labels: (B, N); the mean loss over those that differ from pad_id is returned.
            add_knn_memory: False leaves the memories as they are.
            inputs_embeds: (B, N, dim) instead of x. return_embeddings: stop before the logits, after the last norm.
            lengths: (B,) int64, how many tokens of each row are real; padding at the tail is neither cached nor stored,
                and start and end tokens there mean nothing. The row may go on in the next segment. Default: all.
            xl_length: (B,) int64, how many of the newest cached tokens belong to each row's document. Default: what
                `xl_memories` say, as long as they are the list that was returned; else all. Positions under `legacy`
                leave out a whole cache, also for a row that fills less of it.

        Returns:
            logits (B, N, V), or the loss with `labels`, or embeddings (B, N, dim); paired with the new XL memories if
            the model has any: a list, with `lengths` or `xl_length` one whose attribute `length` (B,) is the next
            segment's `xl_length`.

        Raises:
            ValueError, IndexError: ids outside the vocabulary (checked on the CPU, or with `validate`), wrong numbers
            of memories, wrong batch sizes.
        """
        if (x is None) == (inputs_embeds is None):
            raise ValueError("exactly one of x and inputs_embeds must be given")
        hidden = self._embed(x, inputs_embeds)
        # whatever is refused is refused before the memory changes
        check_labels(labels, hidden, self.num_tokens, self.pad_id, self.validate)
        check_count("lengths", lengths, hidden, hidden.shape[1])
        if xl_length is None:
            xl_length = length_of(xl_memories)
        check_count("xl_length", xl_length, hidden)
        caches = caches_of(xl_memories, self.xl_memory_layers, hidden, self.kv_heads, self.dim_head)
        snapshots = self.snapshots(knn_memories, hidden)
        if x is not None and add_knn_memory:
            snapshots = self._clear(snapshots, x, lengths, self.clear_memories_on_sos_token_id)

        hidden, stored, new_xl_memories = self._read(hidden, snapshots, caches, add_knn_memory, lengths, xl_length)
        if x is not None and add_knn_memory:
            self._clear(stored, x, lengths, self.clear_memories_on_eos_token_id)

        result = self.head(hidden, labels, return_embeddings)
        return (result, new_xl_memories) if self.num_xl_memory_layers else result

    def head(self, hidden: Tensor, labels: Tensor | None = None, return_embeddings: bool = False) -> Tensor:
        """What `forward` returns for the last layer's result (B, N, dim)."""
        norm, to_vocabulary = self.to_logits
        embeddings = norm(hidden)
        if return_embeddings:
            return embeddings
        logits = to_vocabulary(embeddings)
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), ignore_index=self.pad_id)

    def _read(
        self,
        hidden: Tensor,
        snapshots: list[MemorySnapshot],
        xl_memories: list[Tensor | None],
        add_knn_memory: bool,
        lengths: Tensor | None,
        xl_length: Tensor | None,
    ) -> tuple[Tensor, list[MemorySnapshot], list[Tensor]]:
        """Runs all layers: the result, the memories after it, the new XL caches."""
        length = hidden.shape[1]
        free = longest_of(xl_memories) if self.legacy else 0
        contexts: list[dict[str, Any]] = [{"lengths": lengths} for _ in self.layers]
        for place, number in enumerate(self.xl_memory_layers):
            cached = xl_memories[(place + self.shift_xl_memories_down) % self.num_xl_memory_layers]
            contexts[number - 1]["xl_memory"] = cached
            if cached is not None and xl_length is not None:
                contexts[number - 1]["local_length"] = xl_length.clamp(max=cached.shape[-3]) + length
        bias = self.rel_pos_bias.table(free), self.knn_rel_pos_bias.table(free)
        hidden, stored, new = self.run_layers(hidden, snapshots, contexts, bias, add_knn_memory=add_knn_memory)
        held = length_after(xl_memories, length, lengths, xl_length)
        if held is not None and new:
            new = XLMemories(new, held.clamp(max=new[0].shape[-3]))
        return hidden, stored, new

    def run_layers(
        self,
        hidden: Tensor,
        snapshots: Sequence[MemorySnapshot],
        contexts: Sequence[Mapping[str, Any]],
        bias: tuple[Tensor, Tensor],
        **of_memory_layers: Any,
    ) -> tuple[Tensor, list[MemorySnapshot], list[Tensor]]:
        """Runs embeddings (B, N, dim) through all layers: for callers that keep the local context themselves.

        snapshots: of the memories. contexts: for each layer what its attention is given of the local context
        (`xl_memory`, `local_length`) and of padding (`lengths`). bias: of plain and of memorizing layers.
        of_memory_layers: given to these alone.

        Returns the result, the memories after it and the new XL caches.
        """
        stored: list[MemorySnapshot] = []
        new_xl_memories: list[Tensor] = []
        blocks = zip(self._blocks(), contexts, strict=True)
        for number, ((attention, feed_forward), context) in enumerate(blocks, start=1):
            arguments: dict[str, Any] = {"rel_pos_bias": bias[0], **context}
            if number in self.memorizing_layers:
                searched, added_to = self.memories_of(self.memorizing_layers.index(number))
                arguments |= {"rel_pos_bias": bias[1], "knn_memory": snapshots[searched]}
                arguments |= {"add_to": snapshots[added_to], "return_memory": True, **of_memory_layers}
            hidden, new_xl, *after = self._run(attention, hidden, **arguments)
            hidden = self._run(feed_forward, hidden)
            stored.extend(after)
            if new_xl is not None:
                new_xl_memories.append(new_xl)
        return hidden, stored, new_xl_memories

    def _blocks(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Attention and feed-forward of each layer."""
        for layer in self.layers:
            attention, feed_forward = layer.children()
            yield attention, feed_forward

    def memories_of(self, place: int) -> tuple[int, int]:
        """Which memory the memorizing layer at `place` searches and which it adds to; upstream's shift moved both."""
        searched = (place + self.shift_knn_memories_down) % self.num_memory_layers
        return searched, searched if self.legacy else place

    def _run(self, block: nn.Module, hidden: Tensor, **arguments: Any) -> Any:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, hidden, use_reentrant=False, **arguments)
        return block(hidden, **arguments)

    # -------------------------------------------------------------------------------------------------- checks

    def _embed(self, x: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        weight = self.token_emb.weight
        if x is not None:
            check_ids("x", x, self.num_tokens, None, weight.device, self.validate)
            return self.token_emb(x)
        assert inputs_embeds is not None
        check_hidden("inputs_embeds", inputs_embeds, weight)
        check_finite("inputs_embeds", inputs_embeds, self.validate)
        return inputs_embeds

    def snapshots(self, memories: Sequence[KNNMemory | MemorySnapshot], hidden: Tensor) -> list[MemorySnapshot]:
        """One snapshot per memory, taken before anything is added; refuses memories that are not this model's.

        hidden: (B, N, any), on the model's device; the memories make room for segments of N.
        """
        if not isinstance(memories, Sequence):
            raise TypeError(f"knn_memories must be a sequence of memories, got {type(memories).__name__}")
        if len(memories) != self.num_memory_layers:
            raise ValueError(
                f"knn_memories must hold one memory for each of the layers {self.memorizing_layers}, "
                f"got {len(memories)}"
            )
        return [
            snapshot_for(f"knn_memories[{place}]", memory, hidden, hidden.shape[1], self.kv_heads, self.dim_head)
            for place, memory in enumerate(memories)
        ]

    @staticmethod
    def _clear(
        snapshots: list[MemorySnapshot], x: Tensor, lengths: Tensor | None, token_id: int | None
    ) -> list[MemorySnapshot]:
        """Forgets the documents whose row of x contains the token before its padding; on the device."""
        if token_id is None:
            return snapshots
        found = x == token_id
        if lengths is not None:
            found = found & (torch.arange(x.shape[1], device=x.device) < lengths[:, None])
        mask = found.any(dim=-1)
        return [snapshot.clear_rows(mask) for snapshot in snapshots]
