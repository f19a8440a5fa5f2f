"""The Memorizing Transformer: a decoder whose memorizing layers also attend to what the document said long ago.

Source: Wu et al., "Memorizing Transformers", ICLR 2022 (arXiv 2203.08913).
Shapes: B documents, N tokens of the segment, X cached XL tokens, D head width, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtrans.attention import Attention
from memtrans.checks import check_finite, check_hidden, check_ids
from memtrans.compatibility import UNUSED, warn_unused
from memtrans.config import architecture_of, attention_arguments
from memtrans.knn_attention import KNNAttention
from memtrans.local_keys import LayerInputs
from memtrans.memory.knn_memory import KNNMemory
from memtrans.memory.makes_memories import MakesMemories
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.position import T5RelativePositionBias
from memtrans.pretrained import Pretrained, configuration_of
from memtrans.recurrence import Recurrence
from memtrans.residual import FeedForward, PreNormResidual
from memtrans.segments import Segment, ordered, segment_of
from memtrans.trainers import Configuration, ForTrainers, without_memories
from memtrans.vocabulary import Vocabulary
from memtrans.xl_memories import caches_attended, longest_of


class MemorizingTransformer(Vocabulary, Recurrence, MakesMemories, ForTrainers, Pretrained):
    """A decoder-only transformer with a memory in some layers and an XL cache in some.

    Args:
        num_tokens: V, tokens of the vocabulary. None for a model without one: `inputs_embeds` in, and what is before
            the logits out, after the last norm.
        dim: model width.
        depth: layers.
        dim_head: D, width of an attention head.
        heads: H of plain layers.
        knn_attn_heads: H of memorizing layers. Default: `heads`.
        attn_dropout: probability of dropping an attention weight, in training.
        ff_mult: width of the feed-forward layers over `dim`.
        ff_dropout: probability of dropping a number inside a feed-forward layer, in training.
        memorizing_layers: layers (from 1) with a memory; an int, a sequence, `()` for none. Default: depth // 2.
        max_knn_memories: M, entries of each document that a memory keeps.
        num_retrieved_memories: K, neighbours of each query.
        clear_memories_on_sos_token_id: a document begins with it: from it on nothing is seen of what the row said
            before, neither in the segment nor in memory and XL cache, and only what comes from it on is kept. Default:
            none.
        clear_memories_on_eos_token_id: a document begins behind it, likewise. Default: none.
        knn_memories_directory: accepted and ignored, with a DeprecationWarning.
        shift_knn_memories_down: a layer searches the memory this many memorizing layers above, wrapping round.
        pad_id: labels equal to it, or to -100, are not scored; -1 scores every byte.
        xl_max_memories: X, tokens that an XL cache keeps; 0 for none.
        xl_memory_layers: layers (from 1) with an XL cache. Default: all.
        shift_xl_memories_down: a layer attends to the XL cache this many caching layers above, wrapping round.
        knn_memory_multiprocessing: accepted and ignored, with a DeprecationWarning.
        kv_heads: G, key/value heads; divides H.
        attn_scale_init: what the temperature (H,) of memorizing layers starts at, or is. Default: 20, for products
            dim_head**-0.5.
        memory_offset: what a learned offset (H,) on the retrieved logits starts at; None for none.
        combine: "softmax" over retrieved and local keys together, or one softmax each and a learned "gate" (H,).
        legacy: upstream's positions (the XL cache does not count) and shift (reads and writes rotate together), for
            checkpoints trained with it.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
        validate: also check values (token ids) on the GPU, at the price of waiting for it.
        causal: whether a token sees none behind it; if not, there is neither an XL cache nor generation, nor start and
            end tokens, and positions count how far a key is away on either side.
        soft_cap: c, which makes c · tanh(x / c) of each logit x before its bias. Default: none.
        sink: whether each attention head has a learned logit in the denominator of its softmax.
        similarity: of queries and keys in memorizing layers, "cosine" or "product".
        learn_scale: whether the temperature of memorizing layers is learned.
        bias_out: whether their attention has a bias on its way out, as that of plain layers has.
        value_dim_head: E, width of an attention head's values, in all layers. Default: D.
        attend_to: what memorizing layers attend to, the K nearest "neighbours" of a query or "all" entries that it may
            see, which is cheaper with memories of up to some thousand entries; see `KNNAttention`.
        memory_query: what memorizing layers ask their memory with, the "shared" query, or one of its "own", which is
            the same until it has learned; see `KNNAttention`.
        plain_similarity: of queries and keys in plain layers, "product" or "cosine"; see `Attention`.

    Attributes:
        config: these arguments, as `save_pretrained` writes and `from_pretrained` reads them.

    Raises:
        ValueError, TypeError: a size that is no integer or too small, a token that does not exist, heads that do not
            divide.

    Warns of layers that do not exist.

    >>> model = MemorizingTransformer(num_tokens=256, dim=32, depth=2, dim_head=8, heads=4, memorizing_layers=2)
    >>> memories = model.create_knn_memories(batch_size=1)
    >>> logits = model(torch.randint(0, 256, (1, 20)), knn_memories=memories)
    >>> logits.shape, memories[0].lengths.tolist()
    (torch.Size([1, 20, 256]), [20])
    """

    def __init__(
        self,
        *,
        num_tokens: int | None,
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
        attn_scale_init: float | None = None,
        memory_offset: float | None = None,
        combine: str = "softmax",
        legacy: bool = False,
        activation_checkpointing: bool = False,
        validate: bool = False,
        causal: bool = True,
        soft_cap: float | None = None,
        sink: bool = False,
        similarity: str = "cosine",
        learn_scale: bool = True,
        bias_out: bool = False,
        value_dim_head: int | None = None,
        attend_to: str = "neighbours",
        plain_similarity: str = "product",
        memory_query: str = "shared",
    ) -> None:
        arguments = configuration_of(locals(), without=("knn_memories_directory", "knn_memory_multiprocessing"))
        super().__init__()
        self.config = Configuration(arguments)
        warn_unused(
            knn_memories_directory=knn_memories_directory, knn_memory_multiprocessing=knn_memory_multiprocessing
        )
        layers = architecture_of(arguments)
        self.config |= {"memorizing_layers": list(layers.memorizing), "xl_memory_layers": list(layers.caching)}
        self.num_tokens, self.dim, self.dim_head = layers.num_tokens, layers.dim, layers.dim_head
        self.kv_heads, self.max_knn_memories, self.pad_id = kv_heads, layers.max_knn_memories, layers.pad_id
        self.clear_memories_on_sos_token_id = layers.start_token
        self.clear_memories_on_eos_token_id = layers.end_token
        self.shift_knn_memories_down, self.shift_xl_memories_down = layers.shift_knn, layers.shift_xl
        self.memorizing_layers, self.num_memory_layers = layers.memorizing, len(layers.memorizing)
        self.xl_memory_layers = layers.caching if layers.xl_max_memories > 0 else ()
        self.num_xl_memory_layers = len(self.xl_memory_layers)
        self.legacy, self.activation_checkpointing, self.validate = legacy, activation_checkpointing, validate
        self.causal = causal
        self.value_dim_head = layers.dim_head if value_dim_head is None else value_dim_head

        self.token_emb = None if layers.num_tokens is None else nn.Embedding(layers.num_tokens, layers.dim)  # (V, dim)
        position_scale = layers.dim_head**0.5
        self.rel_pos_bias = T5RelativePositionBias(scale=position_scale, heads=layers.heads)
        self.knn_rel_pos_bias = T5RelativePositionBias(scale=position_scale, heads=layers.knn_attn_heads)
        self.layers = nn.ModuleList()
        for number in range(1, layers.depth + 1):
            kind = KNNAttention if number in layers.memorizing else Attention
            attention = PreNormResidual(layers.dim, kind(**attention_arguments(arguments, number, layers)))
            feed_forward = FeedForward(layers.dim, arguments["ff_mult"], arguments["ff_dropout"])
            self.layers.append(nn.ModuleList([attention, PreNormResidual(layers.dim, feed_forward)]))
        last = () if layers.num_tokens is None else (nn.Linear(layers.dim, layers.num_tokens),)
        self.to_logits = nn.Sequential(nn.LayerNorm(layers.dim), *last)  # (B, N, dim) -> (B, N, V)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle of old is of a causal model, whose values are as wide as its keys."""
        super().__setstate__({"causal": True, "value_dim_head": state["dim_head"], **state})

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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        mask: Tensor | None = None,
        reduction: str = "mean",
    ) -> Any:
        """Reads one segment.

        Args:
            x: token ids (B, N) int64 or int32.
            knn_memories: one per memorizing layer, memories or snapshots of them.
            xl_memories: one (B, X, 2, D), or (B, G, X, 2, D) if G > 1, per caching layer, as the last call returned
                them; (1, D + E) stands for (2, D) where values have a width of their own. Default: none yet.
            labels: (B, N) int64 or int32, what comes after each token; the mean loss over those that are neither pad_id
                nor -100 is returned. They are not shifted. Logits of more than 2**26 numbers are then made and left a
                chunk of tokens at a time.
            add_knn_memory: False leaves the memories as they are.
            inputs_embeds: (B, N, dim) instead of x.
            return_embeddings: stop before the logits, after the last norm.
            lengths: (B,) int64, how many tokens of each row are real; padding at the tail is neither seen, cached nor
                stored, and start and end tokens there mean nothing. The row may go on in the next segment. Default:
                all.
            xl_length: (B,) int64, how many of the newest cached tokens belong to each row's document. Default: what
                the caches say that were returned, in whatever list; else all. Without `legacy` none do for a row that
                one of the memories was told to forget since the caches were made. Positions under `legacy` leave out a
                whole cache, also for a row that fills less of it.
            input_ids: x, as tokenizers and collators call it. Without knn_memories each row is then a document of its
                own, which begins here and is not kept.
            attention_mask: (B, N), 1 for tokens and 0 for padding: `mask`, as tokenizers and collators call it.
            num_items_in_batch: what Trainer divides the sum of losses by.
            mask: (B, N) bool, False for padding anywhere (before the text, behind it or inside): it is neither seen,
                cached nor stored, takes no position, and start and end tokens there mean nothing. Default: all is real.
            reduction: of the loss with `labels`, "mean", "sum", or "none": (B, N), 0 where a label is not scored.

        Returns:
            logits (B, N, V), or the loss with `labels`, or embeddings (B, N, dim); with `num_items_in_batch` alone a
            dict of `loss` and `logits`; else paired with the new XL memories if the model has any: a list, with
            `lengths` or `xl_length` one whose attribute `length` (B,) is the next segment's `xl_length`, which each
            cache carries too.

        Raises:
            ValueError, IndexError: ids outside the vocabulary (checked on the CPU, or with `validate`), wrong numbers
            of memories, wrong batch sizes; without `xl_length`, caches that lost what they said (clones, casts) where
            rows differ or are not full, or beside memories that were cleared since their last segment;
            return_embeddings beside a replaced `to_logits`.
        """
        from_trainer = input_ids is not None or num_items_in_batch is not None
        if input_ids is not None or attention_mask is not None:
            x, mask = self.as_segment(x, input_ids, attention_mask, mask, labels)
        if (x is None) == (inputs_embeds is None):
            raise ValueError("exactly one of x and inputs_embeds must be given")
        checked = not torch.compiler.is_compiling()  # what is refused is refused before the memory changes
        if x is None:
            assert inputs_embeds is not None
            if checked:
                check_hidden("inputs_embeds", inputs_embeds, self.dim, self.sample())
                check_finite("inputs_embeds", inputs_embeds, self.validate)
            hidden = inputs_embeds
        else:
            if checked:
                sample = self.sample()
                check_ids("x", x, self.vocabulary, None, None if sample is None else sample.device, self.validate)
            assert self.token_emb is not None
            hidden = self.token_emb(x)  # (B, N, dim)
        (batch, length, _), device = hidden.shape, hidden.device
        if from_trainer and without_memories(knn_memories, self.memorizing_layers):
            knn_memories, add_knn_memory = self.create_knn_memories(batch_size=batch, max_memories=1), False
        caches, xl_length = self._caches_given(xl_memories, xl_length, batch, device)  # (B, X, 2, D) each, (B,)
        if checked:
            self.check_head((batch, length), labels, return_embeddings, device, reduction)
            self._check_segment(batch, length, device, caches, lengths, xl_length, mask)
        searched = self.snapshots(knn_memories, batch, length, device)
        xl_length = self._cached_seen(caches, xl_length, searched)  # (B,)

        ids, segment = x, segment_of(length, lengths, mask, self.causal)
        if segment.padding is not None:  # it leads from here on
            hidden = ordered(hidden, segment.padding.order)
            ids = None if ids is None else ordered(ids, segment.padding.order)  # (B, N)
        added_to = searched
        if ids is not None and self._clears_on_tokens:
            segment, searched, added_to = self._begin_documents(ids, segment, searched, add_knn_memory)

        inputs = self._layer_inputs(segment, device, caches, xl_length)
        unused = self._nothing_of_unused_bias(device)
        hidden = hidden if unused is None else hidden + unused
        hidden, stored, new_caches = self.run_layers(hidden, inputs, searched, add_knn_memory, added_to)
        if ids is not None and self.legacy and add_knn_memory:
            self._end_documents(ids, segment, stored)
        if segment.padding is not None:
            hidden = ordered(hidden, segment.padding.back)

        result = self.head(hidden, labels, return_embeddings, num_items_in_batch, reduction)  # (B, N, V)
        if not self.num_xl_memory_layers or num_items_in_batch is not None:
            return result
        return result, self._caches_left(new_caches, caches, segment, xl_length, added_to)

    def _nothing_of_unused_bias(self, device: torch.device) -> Tensor | None:
        """0 () that gives the bias of the kind of layer that this model has none of a gradient; None without such.

        DistributedDataParallel waits for the gradient of every parameter.
        """
        if not torch.is_grad_enabled() or 0 < self.num_memory_layers < len(self.layers):
            return None
        unused = self.rel_pos_bias if self.memorizing_layers else self.knn_rel_pos_bias
        return 0.0 * unused.table(0, device).sum()

    def _layer_inputs(
        self, segment: Segment, device: torch.device, caches: Sequence[Tensor | None], xl_length: Tensor | None
    ) -> list[LayerInputs]:
        """What the attention of each layer is given: the bias of its kind, and an XL cache of the caching layers'."""
        attended = caches_attended(caches, self.shift_xl_memories_down, segment.length, segment.counted)
        free = longest_of(attended) if self.legacy else 0
        plain, of_memory = (bias.table(free, device) for bias in (self.rel_pos_bias, self.knn_rel_pos_bias))
        of_all = LayerInputs(lengths=segment.lengths, padding=segment.padding, beginnings=segment.beginnings)
        inputs = []
        for number in range(1, len(self.layers) + 1):
            bias = of_memory if number in self.memorizing_layers else plain  # (H, distances)
            cached = local_length = None
            if number in self.xl_memory_layers:
                cached = attended[self.xl_memory_layers.index(number)]  # (B, X, 2, D)
            if cached is not None and xl_length is not None:
                local_length = xl_length.clamp(max=cached.shape[-3]) + segment.length  # (B,)
            inputs.append(of_all._replace(xl_memory=cached, rel_pos_bias=bias, local_length=local_length))
        return inputs

    def run_layers(
        self,
        hidden: Tensor,
        inputs: Sequence[LayerInputs],
        snapshots: Sequence[MemorySnapshot],
        add_knn_memory: bool,
        added_to: Sequence[MemorySnapshot] | None = None,
    ) -> tuple[Tensor, list[MemorySnapshot], list[Tensor]]:
        """Runs embeddings (B, N, dim) through all layers and checks nothing: for `forward`, and for callers that keep
        the local context themselves.

        Args:
            hidden: (B, N, dim).
            inputs: for each layer, what its attention is given beside them.
            snapshots: of the memories, one for each memorizing layer.
            add_knn_memory: False leaves the memories as they are.
            added_to: the memories to add to, in which other entries may be cleared. Default: `snapshots`.

        Returns:
            the result (B, N, dim), the memories after it and the new XL caches.
        """
        recomputed = self.activation_checkpointing and torch.is_grad_enabled()
        stored: list[MemorySnapshot] = []
        new_caches: list[Tensor] = []
        for number, (layer, of_layer) in enumerate(zip(self.layers, inputs, strict=True), start=1):
            blocks: Iterator[Callable[..., Any]] = layer.children()
            if recomputed:
                blocks = (partial(checkpoint, block, use_reentrant=False) for block in blocks)
            attention, feed_forward = blocks
            of_memory: dict[str, Any] = {}
            if number in self.memorizing_layers:
                searched, added = self.memories_of(self.memorizing_layers.index(number))
                of_memory = {"knn_memory": snapshots[searched], "add_to": (added_to or snapshots)[added]}
                of_memory |= {"add_knn_memory": add_knn_memory, "return_memory": True}
            hidden, new_cache, *after = attention(hidden, of_layer, **of_memory)  # (B, N, dim)
            hidden = feed_forward(hidden)  # (B, N, dim)
            stored.extend(after)
            if new_cache is not None:
                new_caches.append(new_cache)
        return hidden, stored, new_caches

    def memories_of(self, place: int) -> tuple[int, int]:
        """Which memory the memorizing layer at `place` searches and which it adds to; upstream's shift moved both."""
        searched = (place + self.shift_knn_memories_down) % self.num_memory_layers
        return searched, searched if self.legacy else place
