"""The memory of a pretrained model: what it is told between forward passes, and what a pass asks of it.

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.generation.generate import reading_bar
from memtrans.hf.attention import BASE
from memtrans.hf.entries import Entries, bytes_per_document
from memtrans.hf.held import EVALUATED, READ, Held
from memtrans.hf.hooks import COUNT, after_decoder, before_decoder
from memtrans.hf.probe import Layer, learned_of
from memtrans.hf.reading import Readers, aligned, check_documents
from memtrans.hf.saved import read_memory, write_memory
from memtrans.hf.scope import Scope
from memtrans.hf.settings import MemorySettings
from memtrans.hf.state import Watched
from memtrans.inspection.trace import Trace
from memtrans.memory.checks import running_backward
from memtrans.memory.snapshot import MemorySnapshot
from memtrans_kernels import checks


class ModelMemory:
    """The memories of the layers of a pretrained model, made by `add_memory`.

    A forward pass, `model.generate` too, searches them; only `read` and passes inside `writing()` add to them.

    Attributes:
        settings: what `add_memory` was asked for. layers: what is known of each chosen layer, by number.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from memtrans.hf import add_memory
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **sizes)).eval()
    >>> memory = add_memory(model, max_memories=100, segment=16)
    >>> memory.read(torch.arange(40)[None])   # segments of 16, 16 and 8 tokens, whose first are sinks
    >>> memory.lengths.tolist(), memory.ids(0)[:3].tolist()
    ([37], [1, 2, 3])
    >>> logits = model(torch.arange(5)[None]).logits
    >>> memory.remove()
    """

    def __init__(self, decoder: nn.Module, layers: Mapping[int, Layer], settings: MemorySettings) -> None:
        self.decoder, self.layers, self.settings = decoder, dict(layers), settings
        self.numbers = list(layers)
        self.dtype = next(iter(layers.values())).dtype
        self.is_rotary = any(layer.rotation is not None for layer in layers.values())
        self._begin({})
        decoder.memtrans_memory = self  # type: ignore[assignment]  # for `memory_of`, of a copy of the model too
        self._handles = [
            decoder.register_forward_pre_hook(partial(before_decoder, self), with_kwargs=True),
            decoder.register_forward_hook(partial(after_decoder, self), with_kwargs=True),
        ]

    def _begin(self, held: dict[str, Entries]) -> None:
        """Makes what no copy shares with this one, outside of every context. held: entries by place."""
        self._scope = Scope()
        self._held = Held(self.layers, self.settings, held)
        self._readers = Readers(self.decoder, self.settings.segment, COUNT)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: it is outside of every context that this one is in, and has read no lesson of a calibration."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_scope", "_readers")}
        return {**kept, "_held": self._held.lasting()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, and of a model that an earlier version saved whole, whose memory has the same state."""
        self.__dict__.update(state)
        self._begin(state["_held"])

    # ------------------------------------------------------------------------------------------------- what is held

    @property
    def _entries(self) -> Entries | None:
        return self._held.at(READ)

    @property
    def lengths(self) -> Tensor:
        """How many entries each document holds (B,); of no document before the first was read."""
        return torch.zeros(0, dtype=torch.int64) if self._entries is None else self._entries.lengths

    def ids(self, document: int) -> Tensor:
        """The ids of the tokens that a document holds, old to new (n,) int64.

        Raises ValueError without keep_ids, or where there is no such document, TypeError for what is no integer.
        """
        documents, document = len(self.lengths), checks.integer("document", document)
        if self._entries is None or not 0 <= document < documents:
            raise ValueError(f"document must be one that was read, got {document} of {documents or 'none'}")
        return self._entries.ids_of(document)

    @property
    def bytes_per_document(self) -> int:
        """Bytes that the memories of one document take, spare slots included."""
        return bytes_per_document(self.layers, self.settings)

    def reset(self, documents: int | None = None) -> None:
        """Forgets everything, and frees it.

        documents: B, lays out empty memories for so many at once, as a compiled model needs them before its first call.
        """
        if documents is not None:
            documents = checks.integer("documents", documents, low=1)
            self._check_in_model()
        self._held.forget(self._place)
        self._readers.forget()
        if documents is not None:
            self._held.lay_out(self._place, documents, self._scope.as_they_are)

    def clear_rows(self, mask: Tensor) -> None:
        """Forgets the documents where mask (B,) bool is True; for a memory that holds none, nothing.

        A pass that writes has no cache, so nothing of them can be stored later; `past_key_values` that a pass without
        writing is given are the model's own, and the caller's to leave out.
        """
        if self._entries is not None:
            self._entries.clear_rows(mask)

    def forget_evaluation(self) -> None:
        """Frees what passes in `eval()` mode wrote inside `training()`."""
        self._held.forget(EVALUATED)

    # ------------------------------------------------------------------------------------------------------ reading

    @torch.no_grad()
    def read(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, search: bool = True, progress: bool = True
    ) -> None:
        """Reads documents into the memory, segment by segment; positions begin again in each.

        Where a segment fails, those before it stay, and nothing of it is in any layer.

        Args:
            ids: (B, any length) int64; what the memory holds goes on with them.
            attention_mask: (B, any length), 1 for real tokens: padding on either side. Default: all are.
            search: whether segments look at what was read before them. Without it they are faster to read, and what
                is stored of them depends on nothing else.
            progress: a bar on standard error, where that is a terminal.

        Raises:
            ValueError, TypeError: no tensor of integers (B, N), a hole in the mask, another batch than the memory's;
                inside `off()`, and after `remove()`. IndexError: ids outside the vocabulary, on the CPU.
        """
        self._check_in_model()
        if self.is_off:
            raise ValueError("read must be called outside off(), where the model has no memory, got it inside")
        check_documents(self.decoder, ids, attention_mask)
        ids, real = aligned(ids, attention_mask)
        with self._scope.within(is_writing=True, searches=search), reading_bar(ids.numel(), progress) as read:
            self._readers.read(ids, real, search, read)

    @contextmanager
    def reading_again(self) -> Iterator[None]:
        """Inside, `read` keeps the pass that it captures on a GPU for its next call of as many documents.

        Whoever replaces what the memory holds inside, by `reset` or `load`, captures anew.
        """
        with self._readers.keeping():
            yield

    # ----------------------------------------------------------------------------------------------------- contexts

    @contextmanager
    def learning(self, form: str) -> Iterator[None]:
        """Inside, all that a form has can be learned, as a calibration does; `parameters` are those of the form, too.

        A memory that is laid out inside holds values as they are, for passes to learn what is made of them (see
        `LayerMemory`), and is to be forgotten before the end.
        """
        self._check_in_model()
        for layer in learned_of(self.layers).values():
            layer.learn_to_ask(form)
        with self._scope.within(as_they_are=True):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, a forward pass takes a segment without a cache: it searches, attends, and adds what it saw.

        Give `model(segment, new_document=flags)`, flags (B,) bool, where rows begin another document.
        """
        self._check_in_model()
        with self._scope.within(is_writing=True):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Like `writing()`, but passes in `eval()` mode have memories of their own: an evaluation amid training."""
        self._check_in_model()
        with self._scope.within(is_writing=True, splits=True):
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is what it was without a memory, bit for bit."""
        with self._scope.within(is_off=True):
            yield

    @contextmanager
    def expand(self, questions: int) -> Iterator[None]:
        """Inside, each document stands behind so many rows that follow each other: questions, beams, return sequences.

        questions: n; a pass has B·n rows, row i looks at document i // n, and nothing is written.
        """
        with self._scope.within(questions=checks.integer("questions", questions, low=1)):
            yield

    @contextmanager
    def newest(self, entries: int | Tensor, behind: int | Tensor = 0) -> Iterator[None]:
        """Inside, a pass sees only so many of the newest entries of each document: as if the memory were that small.

        behind: leaves out so many that were added last: the memory as it stood before them. What a full memory has
            dropped for them does not come back. A pass that writes adds behind all that is held nonetheless.

        Both are numbers or, for a step that is replayed, () int64 on the memory's device, which are not checked.
        """
        if not isinstance(entries, Tensor):
            entries = checks.integer("entries", entries, low=1)
        if not isinstance(behind, Tensor):
            behind = checks.integer("behind", behind, low=0)
        with self._scope.within(newest=entries, behind=behind):
            yield

    @contextmanager
    def tracing(self, *, local: bool = False) -> Iterator[Trace]:
        """Inside, notes for each query, layer and head which entries were found and what weight they had.

        Rows are those of a pass's batch; layers have the model's numbers. Positions are the tokens' in their document
        as it was read, unless `keep_ids` is False: then they count what is stored.

        local: also keep the weights of the local keys, (B, H, N, L) for each pass; not with a gate.

        Yields a trace, which `memtrans.inspection.trace.Trace` describes. Raises ValueError inside another `tracing`.
        """
        self._check_in_model()
        if self._scope.watched is not None:
            raise ValueError("a memory must be watched by one trace at a time, got a second one inside the first")
        trace = Trace()
        tell = {number: trace.watcher(number) for number in self.numbers}
        watched = Watched(lambda layer, observation: tell[layer](observation), local)
        with self._scope.within(watched=watched):
            yield trace

    # -------------------------------------------------------------------------------------------- what a pass asks

    @property
    def is_off(self) -> bool:
        """Whether passes are those of the model without a memory."""
        return self._scope.is_off

    @property
    def is_writing(self) -> bool:
        """Whether passes add what they saw."""
        return self._scope.is_writing

    @property
    def searches(self) -> bool:
        """Whether passes look at what is held."""
        return self._scope.searches

    @property
    def _place(self) -> str:
        """Which entries a pass looks at."""
        return EVALUATED if self._scope.splits and not self.decoder.training else READ

    def entries_for(self, batch: int, writes: bool) -> Entries | None:
        """What a pass of so many rows looks at; None where nothing was ever read and the pass adds nothing.

        Raises ValueError for a batch of other documents than those that the memory holds, RuntimeError where a backward
        pass runs the whole pass again: the memory is no longer what it saw.
        """
        place, questions = self._place, self._scope.questions
        if writes and questions > 1:
            raise ValueError("a pass that writes must not be inside expand(), where several rows share a document")
        if (writes or self._held.at(place) is not None) and running_backward() != -1:
            raise RuntimeError(
                "model must not be inside a checkpoint as a whole, got a forward pass that a backward pass runs again: "
                "model.gradient_checkpointing_enable() runs layers again, which know what they saw"
            )
        found = self._held.for_rows(place, batch, questions)
        if found is None and writes:
            self.reset(batch)
            found = self._held.at(place)
        return found

    def views(self, snapshots: Mapping[int, MemorySnapshot]) -> dict[int, MemorySnapshot]:
        """Every layer's memory as this pass sees it: rows repeated by `expand`, and no more entries than `newest`."""
        return self._scope.views(snapshots)

    def watched(self, entries: Entries) -> Watched | None:
        """Who watches a pass that looks at these entries; None for nobody."""
        return self._scope.watched_at(entries)

    # -------------------------------------------------------------------------------------------- parameters, files

    def parameters(self) -> list[nn.Parameter]:
        """What the memory learns: how each head of each layer asks and trusts it; see `LayerMemory`.

        `memory_value` and `memory_next` are in what is stored: `calibrate` alone learns them, and what was read before
        they changed is to be read again.
        """
        self._check_in_model()
        return [parameter for layer in learned_of(self.layers).values() for parameter in layer.parameters()]

    def save(self, directory: str | Path) -> None:
        """Writes memtrans.safetensors, settings and what was learned, and memories.safetensors, what is held.

        directory: made if missing; each file takes the place of an older one at once and whole. Where no document was
            read, the second is not there afterwards, and what is held in a calibration is not written.
        """
        self._check_in_model()
        write_memory(Path(directory), self.layers, self.settings, self._held.lasting().get(READ))

    def load(self, directory: str | Path) -> None:
        """Takes up what `save` wrote of a memory in the same layers: what it learned and, if anything, what it held.

        `parameters` are others afterwards where the form of what was learned is another one. Where the directory holds
        nothing that was read, what is held stays as it was stored: read it again if `memory_value` is learned or was.

        Raises FileNotFoundError, or ValueError for a file that is damaged or of other layers; nothing changed then.
        """
        self._check_in_model()
        saved = read_memory(Path(directory), self.layers, self.settings)
        if saved.entries is not None:
            self._held.put(READ, saved.entries)
        self._readers.forget()
        for number, layer in learned_of(self.layers).items():
            layer.take(saved.learned[number])

    def remove(self) -> None:
        """Takes the memory out of the model, which is then what it was, bit for bit; once more, it does nothing.

        What was read is gone, and methods that need the model raise ValueError from then on: `read`, `save` and others.
        """
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self.layers.values():
            layer.attention.config = getattr(layer.attention.config, BASE)
            del layer.attention.memtrans
        del self.decoder.memtrans_memory
        self._held.clear()

    def _check_in_model(self) -> None:
        if not self._handles:
            raise ValueError("memory must be in its model, got one that remove() took out: add_memory makes another")
