"""A batch of documents that a model reads and then continues, one token each at a time.

The meaning is training's, row by row: a document is read in segments of N tokens. Each token sees the local keys of its
segment and of the XL cache, and the memory as it stood when the segment began; at the segment's end the memory
receives what leaves the XL cache. A start token begins a document anew, and so does what comes behind an end
token, as in training: nothing older is seen from there on, and the segment's end stores what comes from there on. Rows
stand at different places of their segments, so each ends at its own time.

The host knows all places, because every step moves every row on by one; the device knows which rows have stopped.
So a step has one shape, waits for nothing and can be replayed as a CUDA graph. Where rows may have stopped, the host
asks the device for their places before it reads or writes on.

Shapes: B documents, H query heads, N tokens of a segment, X cached XL tokens, L = X + N local keys, V tokens of the
vocabulary. Source: Wu et al. 2022, section 3.2; key/value caches are Shazeer 2019 (arXiv 1911.02150).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import is_

import torch
from torch import Tensor

from memtrans.attention import LocalContext
from memtrans.checks import check_ids, sizes
from memtrans.distributed.dtensors import check_whole
from memtrans.generation.local_cache import LocalCache, ReadingView, WritingView, rows_of
from memtrans.knn_attention import KNNAttention
from memtrans.layers import is_bare
from memtrans.local_keys import LayerInputs, LocalView
from memtrans.memory.leaving import add_leaving
from memtrans.memory.memory_list import KNNMemoryList
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.position import T5RelativePositionBias
from memtrans.segments import Beginnings, beginnings
from memtrans.transformer import MemorizingTransformer
from memtrans_kernels import checks


class Decoder:
    """Reads documents and continues them, with training's memory, XL caches and positions.

    Args:
        model: on its device, in `eval()` mode.
        batch: B.
        segment: N, what the model was trained with.
        memories: what the documents said before, from `model.create_knn_memories(batch_size=B)`; they grow. Rows are
            the documents that are in scope now, whatever the scope is later. Default: empty ones.

    Attributes:
        logits: (B, V) float32, for the token after the last one of each row; the next call writes over it, while what
            `read` and `step` return stays.
        memories: one for each memorizing layer; a segment reaches them when it is complete. A row that one of them is
            told to forget, by `clear_memory` or `clear_rows`, begins anew with the next token, as that of a new
            decoder.
        position: (B,) int64, tokens in each row's open segment.

    Raises:
        ValueError: sizes below 1, a model that is spread over ranks, not causal or without a vocabulary, memories of
            another batch, width, number of heads or of layers. TypeError: a model inside a wrapper.

    >>> model = MemorizingTransformer(num_tokens=9, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=2).eval()
    >>> decoder = Decoder(model, batch=2, segment=4)
    >>> decoder.read([torch.arange(6), torch.arange(3)]).shape
    torch.Size([2, 9])
    >>> decoder.step(torch.tensor([1, 2])).shape, decoder.memories[0].lengths.tolist()
    (torch.Size([2, 9]), [4, 4])
    """

    def __init__(
        self, model: MemorizingTransformer, batch: int, *, segment: int = 512, memories: KNNMemoryList | None = None
    ) -> None:
        sizes(1, batch=batch, segment=segment)
        check_model(model)
        self.model, self.batch, self.segment = model, batch, segment
        self.device, self._dtype = model.of_embeddings()
        if memories is None:
            memories = model.create_knn_memories(batch_size=batch, device=self.device, spare=segment)
        self.memories = memories
        self._now = [snapshot.live() for snapshot in model.snapshots(memories, batch, segment, self.device)]
        self._documents = [list(memory.scoped_indices) for memory in memories]  # of the rows
        self._clearings = [memory.clearings() for memory in memories]

        self._attentions = [module for module in model.modules() if isinstance(module, LocalContext)]
        # computed once: each would be a launch a token; None where a hook brings the weights for a call
        self._temperatures = {
            number: attention.temperature().detach() if is_bare(attention) else None
            for number, attention in enumerate(self._attentions, start=1)
            if isinstance(attention, KNNAttention)
        }
        self._caches = [
            LocalCache(
                batch, model.kv_heads, model.dim_head, cached=attention.xl_max_memories, segment=segment,
                dtype=self._dtype, device=self.device, value_width=model.value_dim_head,
            )
            for attention in self._attentions
        ]  # fmt: skip
        self._sizes = {cache.cached for cache in self._caches}
        self._longest_cache = max(self._sizes)
        self.position, self.cached = torch.zeros(2, batch, dtype=torch.int64, device=self.device)
        self._ended = torch.zeros(
            batch, dtype=torch.bool, device=self.device
        )  # upstream's: an end token in the segment
        self._begun = torch.full_like(self.position, -1)  # where in the open segment a document began last; -1: nowhere
        self._tells = not model.legacy and (
            model.clear_memories_on_sos_token_id is not None or model.clear_memories_on_eos_token_id is not None
        )  # tokens say where documents begin
        # the same on the host, where all rows have gone on; of what is cached maybe more than is of a row's document
        self._positions, self._cached = [0] * batch, [0] * batch
        self._located = True  # whether that is so
        self.logits = torch.zeros(batch, model.vocabulary, dtype=torch.float32, device=self.device)
        of_kinds = [model.rel_pos_bias, model.knn_rel_pos_bias][: 2 if model.memorizing_layers else 1]
        self._biases = [_with_hidden_column(bias, self.device) for bias in of_kinds]
        self._behind = self._longest_cache - torch.arange(self._longest_cache + segment, device=self.device)

    # -------------------------------------------------------------------------------------------------- memories

    @contextmanager
    def _scoped(self, rows: Sequence[int]) -> Iterator[None]:
        """Scopes every memory to the documents of these rows inside a `with`."""
        with ExitStack() as stack:
            for memory, documents in zip(self.memories, self._documents, strict=True):
                stack.enter_context(memory.at_batch_indices([documents[row] for row in rows]))
            yield

    @property
    def is_traced(self) -> bool:
        """Whether somebody watches what is retrieved, and would not see what a captured `advance` replays."""
        return any(memory.watch.tell is not None for memory in self.memories)

    def follow_memories(self) -> bool:
        """Looks where the memories keep their entries, which changes when one is widened or loaded.

        Asks the host alone. Returns whether it has changed: then a captured `advance` reads what they held before.

        Rows that a memory was told to forget since begin anew, as those of a new decoder; then the host waits for the
        device, to learn which.
        """
        self._begin_where_cleared()
        if all(memory.still_holds(now) for memory, now in zip(self.memories, self._now, strict=True)):
            return False
        with self._scoped(range(self.batch)):
            snapshots = self.model.snapshots(self.memories, self.batch, self.segment, self.device)
        self._now = [snapshot.live() for snapshot in snapshots]
        return True

    def _begin_where_cleared(self) -> None:
        stood, self._clearings = self._clearings, [memory.clearings() for memory in self.memories]
        if self.model.legacy or all(map(is_, stood, self._clearings)):
            return
        cleared = [(then < now)[of.rows] for then, now, of in zip(stood, self._clearings, self._now, strict=True)]
        fresh = torch.stack(cleared).any(dim=0).reshape(self.batch, -1)[:, 0]
        for counts, first in ((self.position, 0), (self.cached, 0), (self._begun, -1)):
            counts.masked_fill_(fresh, first)
        self._located = False
        self.locate()

    # --------------------------------------------------------------------------------------------------- reading

    @torch.no_grad()
    def read(self, texts: Sequence[Tensor], on_tokens: Callable[[int], object] = lambda count: None) -> Tensor:
        """Every row reads on, by a text of its own, of any length; rows at one place of a segment are read together.

        Args:
            texts: B tensors of token ids, integers; an empty one leaves its row as it is.
            on_tokens: called with the number of tokens that were just read.

        Returns:
            logits (B, V) for the next token of each row.

        Raises:
            ValueError, IndexError, TypeError: another number of texts, what is no tensor of token ids (P,), or ids
                outside the vocabulary. Nothing was read then.
        """
        if len(texts) != self.batch:
            raise ValueError(f"texts must hold one text for each of the {self.batch} rows, got {len(texts)}")
        for text in texts:
            checks.tensors(texts=text)
            if text.dim() != 1:
                raise ValueError(f"texts must hold token ids (P,), got {text.dtype} {tuple(text.shape)}")
            check_ids("texts", text[None], self.model.vocabulary, None, text.device, validate=True)
        self.locate()
        self.follow_memories()
        unread = [text.to(self.device) for text in texts]
        while any(len(text) for text in unread):
            for (position, cached, count), rows in self._together(unread).items():
                self._read_piece(rows, torch.stack([unread[row][:count] for row in rows]), position, cached)
                for row in rows:
                    unread[row] = unread[row][count:]
                on_tokens(count * len(rows))
            self._begin_where_cleared()  # by `on_tokens`
            self._end_segments()
        return self.logits.clone()

    def _together(self, unread: Sequence[Tensor]) -> dict[tuple[int, int, int], list[int]]:
        """Rows by where their segment stands, how much XL cache they have and how many tokens come next."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for row, text in enumerate(unread):
            count = min(len(text), self.segment - self._positions[row])
            if count:
                groups.setdefault((self._positions[row], self._cached[row], count), []).append(row)
        return groups

    def _read_piece(self, rows: list[int], tokens: Tensor, position: int, cached: int) -> None:
        """Tokens (rows, count) of one place in the segment."""
        model, index = self.model, rows_of(rows, self.batch, self.device)
        views = [ReadingView(cache, index, position, cached) for cache in self._caches]
        seen = self._seen_by_piece(tokens, index, position)
        free = cached if model.legacy else 0
        bias = model.rel_pos_bias.table(free, self.device), model.knn_rel_pos_bias.table(free, self.device)
        with self._scoped(rows):
            snapshots = [memory.snapshot() for memory in self.memories]
        self.logits[index] = self._logits(tokens, snapshots, views, bias, seen)  # (rows, V)
        self.position[index] += tokens.shape[1]
        for row in rows:
            self._positions[row] += tokens.shape[1]

    def _logits(
        self,
        tokens: Tensor,
        snapshots: Sequence[MemorySnapshot],
        views: Sequence[LocalView],
        bias: tuple[Tensor, Tensor],
        seen: Sequence[LayerInputs],
    ) -> Tensor:
        """After the last of tokens (B, N): (B, V) float32. seen: for each layer, what of the past these tokens see."""
        plain, of_memory_layers = bias
        inputs = []
        for number, (view, of_layer) in enumerate(zip(views, seen, strict=True), start=1):
            temperature = self._temperatures.get(number)
            of_kind = of_memory_layers if number in self._temperatures else plain
            inputs.append(of_layer._replace(xl_memory=view, rel_pos_bias=of_kind, temperature=temperature))
        assert self.model.token_emb is not None
        embeddings = self.model.token_emb(tokens)  # (B, N, dim)
        hidden, _, _ = self.model.run_layers(embeddings, inputs, snapshots, add_knn_memory=False)
        return self.model.head(hidden[:, -1:])[:, 0].float()

    def _seen_by_piece(self, tokens: Tensor, index: Tensor | slice, position: int) -> list[LayerInputs]:
        """For each layer, what tokens (rows, count) at a place of the segment see: where documents begin among them, or
        began before them in the segment, and how much of what is cached is theirs."""
        if not self._tells:
            self._note_start_and_end(tokens, index)
            return [LayerInputs() for _ in self._caches]
        start, end = self.model.clear_memories_on_sos_token_id, self.model.clear_memories_on_eos_token_id
        age, left = beginnings(tokens, start, end)
        count, before, cached = tokens.shape[1], self._begun[index], self.cached[index]  # (rows,)
        older = position + torch.arange(1, count + 1, device=self.device) - before[:, None]
        age = torch.where((age < 0) & (before >= 0)[:, None], older, age)
        self._begun[index] = torch.where(left < 0, before, position + count - left)
        begun = Beginnings(age, left)
        local = {size: cached.clamp(max=size) + position + count for size in self._sizes}
        return [LayerInputs(local_length=local[cache.cached], beginnings=begun) for cache in self._caches]

    def _seen_by_token(self, tokens: Tensor, going_on: Tensor) -> LayerInputs:
        """What one token (B,) of each row sees of the memory; a bias says what of the local keys. A start token begins
        a document, an end token lets one begin behind it: `_end_token` notes that when it was read."""
        if not self._tells:
            self._note_start_and_end(tokens[:, None], slice(None), going_on)
            return LayerInputs()
        start = self.model.clear_memories_on_sos_token_id
        if start is not None:
            self._begun.copy_(torch.where((tokens == start) & going_on, self.position, self._begun))
        return LayerInputs(query_mask=(self._begun < 0)[:, None])

    def _end_token(self, tokens: Tensor, going_on: Tensor) -> None:
        end = self.model.clear_memories_on_eos_token_id
        if self._tells and end is not None:
            self._begun.copy_(torch.where((tokens == end) & going_on, self.position + 1, self._begun))

    def _note_start_and_end(self, tokens: Tensor, index: Tensor | slice, going_on: Tensor | None = None) -> None:
        """As upstream means it: a start token forgets its row's memory at once, an end token when its segment is
        complete."""
        start, end = self.model.clear_memories_on_sos_token_id, self.model.clear_memories_on_eos_token_id
        for token_id, act in ((start, self._forget), (end, self._ended.logical_or_)):
            if token_id is not None:
                mask = torch.zeros_like(self._ended)
                mask[index] = (tokens == token_id).any(dim=1)
                act(mask if going_on is None else mask & going_on)

    def _forget(self, mask: Tensor) -> None:
        for snapshot in self._now:
            snapshot.clear_rows(mask)
        self._clearings = [memory.clearings() for memory in self.memories]

    # --------------------------------------------------------------------------------------------------- writing

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Every row reads one token: tokens (B,) int64 on the model's device -> logits (B, V) for the next one.

        Raises ValueError, IndexError or TypeError for other tokens; nothing was read then.
        """
        checks.tensors(tokens=tokens)
        if tokens.shape != (self.batch,):
            raise ValueError(f"tokens must be one of each row, of shape ({self.batch},), got {tuple(tokens.shape)}")
        check_ids("tokens", tokens[None], self.model.vocabulary, None, self.device, self.model.validate)
        self.locate()
        self.follow_memories()
        self.advance(tokens, torch.ones_like(self._ended))
        self._count()
        return self.logits.clone()

    @torch.no_grad()
    def advance(self, tokens: Tensor, going_on: Tensor) -> None:
        """The device's part of a step; the same work whatever the rows hold, so that it can be captured.

        tokens: (B,) int64. going_on: (B,) bool; a row that has stopped stays where it is, and so do its logits.
        """
        seen = [self._seen_by_token(tokens, going_on)] * len(self._caches)
        slots = {cached: (self.position + cached)[:, None, None, None] for cached in self._sizes}  # (B, 1, 1, 1)
        views = [WritingView(cache, slots[cache.cached]) for cache in self._caches]
        logits = self._logits(tokens[:, None], self._now, views, self._bias_of_places(), seen)  # (B, V)
        torch.where(going_on[:, None], logits, self.logits, out=self.logits)
        self._end_token(tokens, going_on)
        self.position.add_(going_on)

    def move_on(self) -> None:
        """The host's part of a step: segments that may be complete end. Nothing waits for the device.

        Rows may have stopped, so the host may be ahead of them until `locate`; of the others it knows the places.
        """
        self._located = False
        self._count()

    def _count(self) -> None:
        self._positions = [position + 1 for position in self._positions]
        self._end_segments()

    def locate(self) -> None:
        """The host takes the places of all rows from the device, and waits for it, if rows may have stopped."""
        if not self._located:
            self._positions, self._cached = self.position.tolist(), self.cached.tolist()
            self._located = True

    def _bias_of_places(self) -> tuple[Tensor, Tensor]:
        """What one query of each row adds to its logits of the L local slots, (B, H, 1, L); -inf where nothing is."""
        distance = self.position[:, None] + self._behind  # of each slot (B, L); the query stands in slot X + position
        oldest = self.cached
        if self._tells:  # slots count backwards from the segment's first token
            oldest = torch.where(self._begun < 0, oldest, -self._begun)
        if self.model.legacy:
            distance = torch.where(distance < 0, distance, (distance - self.cached[:, None]).clamp(min=0))
        farthest = self._biases[0].shape[1] - 2
        column = distance.masked_fill(self._behind > oldest[:, None], -1).clamp(-1, farthest) + 1
        biases = [bias[:, column].transpose(0, 1)[:, :, None] for bias in self._biases]  # (B, H, 1, L)
        return biases[0].to(self._caches[0].keys.dtype), biases[-1]

    # --------------------------------------------------------------------------------------------- ends of segments

    def _end_segments(self) -> None:
        """Where a segment is complete: what leaves goes into the memory, the rest becomes the XL cache."""
        if self.segment not in self._positions:
            return
        complete = self.position == self.segment
        held = self.cached + self.segment  # (B,), of the document that goes on
        if self._tells:
            held = torch.where(self._begun < 0, held, self.segment - self._begun)
            self._forget(complete & (self._begun >= 0))
            self._begun.masked_fill_(complete, -1)
        self._store(complete, held)
        if not self._tells and self.model.clear_memories_on_eos_token_id is not None:
            self._forget(complete & self._ended)
            self._ended.logical_and_(~complete)
        self._shift_caches(complete)
        self.cached.copy_(torch.where(complete, held.clamp(max=self._longest_cache), self.cached))
        self.position.masked_fill_(complete, 0)
        for row, position in enumerate(self._positions):
            if position == self.segment:
                self._positions[row] = 0
                self._cached[row] = min(self._cached[row] + self.segment, self._longest_cache)

    def _store(self, complete: Tensor, held: Tensor) -> None:
        """Adds what leaves to the memories of the rows where `complete` (B,) is True.

        held: (B,), how many of the newest local keys, cached or of the segment, are of the document that goes on.
        """
        model, whole = self.model, torch.where(complete, self.segment, 0)
        with self._scoped(range(self.batch)):
            snapshots = [memory.snapshot() for memory in self.memories]
        for place, number in enumerate(model.memorizing_layers):
            cache = self._caches[number - 1]
            _, added_to = model.memories_of(place)
            if cache.cached == 0 and not self._tells:  # the segment leaves as it lies there
                snapshots[added_to].append(cache.keys, cache.values, whole)
                continue
            local = torch.where(complete, held.clamp(max=cache.cached + self.segment), 0)
            add_leaving(
                snapshots[added_to], cache.keys, cache.values,
                kept=cache.cached, length=self.segment, local_length=local,
            )  # fmt: skip

    def _shift_caches(self, complete: Tensor) -> None:
        """Every layer's newest keys and values become the XL cache, of the layer that the model's shift says."""
        layers = [self._caches[number - 1] for number in self.model.xl_memory_layers]
        newest = [tuple(tensor.clone() for tensor in cache.newest()) for cache in layers]
        for place, cache in enumerate(layers):
            keys, values = newest[(place + self.model.shift_xl_memories_down) % len(layers)]
            cache.begin(keys, values, complete)


def check_model(model: MemorizingTransformer) -> None:
    """Refuses a wrapper such as `DistributedDataParallel`, and a model that is not causal, spread over ranks or has no
    vocabulary."""
    if isinstance(getattr(model, "module", None), MemorizingTransformer):
        wrapper = type(model).__name__
        raise TypeError(f"model must be a MemorizingTransformer, got a {wrapper} around one: give its model.module")
    assert model.vocabulary  # raises where there is none
    if not model.causal:
        raise ValueError("model must be causal to be read by the token, got one with causal=False")
    check_whole("model", model.parameters())


def _with_hidden_column(bias: T5RelativePositionBias, device: torch.device) -> Tensor:
    """A bias by distance (H, 1 + distances) behind a column that hides: column 1 + d is distance d."""
    table = bias.table(device=device).detach()
    return torch.cat((table.new_full((table.shape[0], 1), -torch.inf), table), dim=1)
