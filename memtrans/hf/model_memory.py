"""The memory of a pretrained model: what it is told between forward passes.

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memtrans.checks import check_ids
from memtrans.generation.generate import reading_bar
from memtrans.hf.attention import BASE
from memtrans.hf.entries import Entries, read_entries
from memtrans.hf.hooks import COUNT, after_decoder, before_decoder
from memtrans.hf.layer_memory import states_of
from memtrans.hf.masks import padding_of
from memtrans.hf.probe import Layer
from memtrans.hf.reading import Reader, to_the_right
from memtrans.hf.settings import MemorySettings
from memtrans.hf.state import Watched
from memtrans.hf.views import part_of, repeated
from memtrans.inspection.trace import Trace
from memtrans.memory.checks import running_backward
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.storage import load_tensors, save_tensors
from memtrans_kernels import checks

WEIGHTS, ENTRIES = "memtrans.safetensors", "memories.safetensors"
KIND = "memtrans.hf.ModelMemory"
READ, EVALUATED = "read", "evaluated"  # entries of what is read, and of what an evaluation amid training reads
LARGE = 1 << 30  # bytes from which a memory is announced as a warning

log = logging.getLogger("memtrans.hf")


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

    # what the contexts below change, as it is outside of them
    is_off = is_writing = _splits = _keeps_reader = _as_they_are = False
    searches = True
    _questions = 1
    _newest: int | Tensor = 0
    _behind: int | Tensor = 0
    _kept_reader: Reader | None = None
    _watched: Watched | None = None

    def __init__(self, decoder: nn.Module, layers: Mapping[int, Layer], settings: MemorySettings) -> None:
        self.decoder, self.layers, self.settings = decoder, dict(layers), settings
        self.numbers = list(layers)
        self.dtype = next(iter(layers.values())).dtype
        self.is_rotary = any(layer.rotation is not None for layer in layers.values())
        self._held: dict[str, Entries] = {}
        decoder.memtrans_memory = self  # type: ignore[assignment]  # for `memory_of`, of a copy of the model too
        self._handles = [
            decoder.register_forward_pre_hook(partial(before_decoder, self), with_kwargs=True),
            decoder.register_forward_hook(partial(after_decoder, self), with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: it is outside of every context that this one is in, and has read no lesson of a calibration."""
        kept = {name: value for name, value in self.__dict__.items() if name not in vars(ModelMemory)}
        held = {place: held for place, held in self._held.items() if place == READ and not held.as_they_are}
        return {**kept, "_held": held}

    # ------------------------------------------------------------------------------------------------------ entries

    @property
    def _entries(self) -> Entries | None:
        return self._held.get(READ)

    @property
    def _place(self) -> str:
        """Which entries a pass looks at."""
        return EVALUATED if self._splits and not self.decoder.training else READ

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
        return self._bytes(as_they_are=False)

    def _bytes(self, as_they_are: bool) -> int:
        slots = self.settings.max_memories + max(self.settings.spare, self.settings.segment)
        return slots * sum(
            layer.kv_heads
            * (layer.width + layer.held_width(as_they_are))
            * (self.settings.dtype or layer.dtype).itemsize
            for layer in self.layers.values()
        )

    def entries_for(self, batch: int, writes: bool) -> Entries | None:
        """What a pass of so many rows looks at; None where nothing was ever read and the pass adds nothing.

        Raises ValueError for a batch of other documents than those that the memory holds, RuntimeError where a backward
        pass runs the whole pass again: the memory is no longer what it saw.
        """
        if writes and self._questions > 1:
            raise ValueError("a pass that writes must not be inside expand(), where several rows share a document")
        held = self._held.get(self._place)
        if (writes or held is not None) and running_backward() != -1:
            raise RuntimeError(
                "model must not be inside a checkpoint as a whole, got a forward pass that a backward pass runs again: "
                "model.gradient_checkpointing_enable() runs layers again, which know what they saw"
            )
        if held is not None and held.documents * self._questions == batch:
            held.follow(self.layers)
            return held
        if held is not None and int(held.lengths.max()) > 0:
            raise ValueError(
                f"a pass must have {self._questions} rows for each of the {held.documents} documents that the memory "
                f"holds, got {batch} rows: reset() forgets them, inside expand(n) a document has n rows"
            )
        if not writes:
            return None
        self.reset(batch)
        return self._held[self._place]

    def views(self, snapshots: Mapping[int, MemorySnapshot]) -> dict[int, MemorySnapshot]:
        """Every layer's memory as this pass sees it: rows repeated by `expand`, and no more entries than `newest`."""
        return {number: self._view(snapshot) for number, snapshot in snapshots.items()}

    def _view(self, snapshot: MemorySnapshot) -> MemorySnapshot:
        if isinstance(self._newest, Tensor) or self._newest:
            snapshot = part_of(snapshot, self._newest, self._behind)
        return repeated(snapshot, self._questions) if self._questions > 1 else snapshot

    def watched(self, entries: Entries) -> Watched | None:
        """Who watches a pass that looks at these entries; None for nobody."""
        if self._watched is None:
            return None
        return replace(self._watched, ids=None if entries.ids is None else entries.ids.snapshot())

    def reset(self, documents: int | None = None) -> None:
        """Forgets everything, and frees it.

        documents: B, lays out empty memories for so many at once, as a compiled model needs them before its first call.
        """
        if documents is not None:
            documents = checks.integer("documents", documents, low=1)
            self._check_in_model()
        self._held.pop(self._place, None)
        self._forget_reader()
        if documents is not None:
            size = documents * self._bytes(self._as_they_are)
            text = f"a memory of {documents} documents in {len(self.layers)} layers takes {size / 1e9:.2f} GB"
            log.log(logging.WARNING if size >= LARGE else logging.INFO, text)
            self._held[self._place] = Entries(self.layers, self.settings, documents, self._as_they_are)

    def clear_rows(self, mask: Tensor) -> None:
        """Forgets the documents where mask (B,) bool is True; for a memory that holds none, nothing.

        A pass that writes has no cache, so nothing of them can be stored later; `past_key_values` that a pass without
        writing is given are the model's own, and the caller's to leave out.
        """
        if self._entries is not None:
            self._entries.clear_rows(mask)

    # ------------------------------------------------------------------------------------------------------- passes

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
        self._check_ids(ids, attention_mask)
        padding = padding_of(attention_mask, ids.shape[1])
        real = None if padding is None else padding.real
        ids = ids if padding is None else to_the_right(ids, padding)
        reader = self._reader_for(ids, search)
        with self._reading(search), reading_bar(ids.numel(), progress) as read:
            reader.read(ids, real, read)
        if reader is not self._kept_reader:
            reader.release()

    def _reader_for(self, ids: Tensor, search: bool) -> Reader:
        """The one that is kept, where it fits."""
        kind = (ids.shape[0], search)
        if self._kept_reader is not None and self._kept_reader.kind == kind:
            return self._kept_reader
        reader = Reader(self.decoder, self.settings.segment, COUNT, kind)
        if self._keeps_reader:
            self._forget_reader()
            self._kept_reader = reader
        return reader

    def _forget_reader(self) -> None:
        if self._kept_reader is not None:
            self._kept_reader.release()
            self._kept_reader = None

    @contextmanager
    def reading_again(self) -> Iterator[None]:
        """Inside, `read` keeps the pass that it captures on a GPU for its next call of as many documents.

        Whoever replaces what the memory holds inside, by `reset` or `load`, captures anew.
        """
        try:
            yield from self._with(_keeps_reader=True)
        finally:
            self._forget_reader()

    @contextmanager
    def learning(self, form: str) -> Iterator[None]:
        """Inside, all that a form has can be learned, as a calibration does; `parameters` are those of the form, too.

        A memory that is laid out inside holds values as they are, for passes to learn what is made of them (see
        `LayerMemory`), and is to be forgotten before the end.
        """
        self._check_in_model()
        for layer in self.layers.values():
            layer.learned.learn_to_ask(form)
        yield from self._with(_as_they_are=True)

    @contextmanager
    def _reading(self, search: bool) -> Iterator[None]:
        yield from self._with(is_writing=True, searches=search)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, a forward pass takes a segment without a cache: it searches, attends, and adds what it saw.

        Give `model(segment, new_document=flags)`, flags (B,) bool, where rows begin another document.
        """
        self._check_in_model()
        yield from self._with(is_writing=True)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Like `writing()`, but passes in `eval()` mode have memories of their own: an evaluation amid training."""
        self._check_in_model()
        yield from self._with(is_writing=True, _splits=True)

    def forget_evaluation(self) -> None:
        """Frees what passes in `eval()` mode wrote inside `training()`."""
        self._held.pop(EVALUATED, None)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is what it was without a memory, bit for bit."""
        yield from self._with(is_off=True)

    @contextmanager
    def expand(self, questions: int) -> Iterator[None]:
        """Inside, each document stands behind so many rows that follow each other: questions, beams, return sequences.

        questions: n; a pass has B·n rows, row i looks at document i // n, and nothing is written.
        """
        yield from self._with(_questions=checks.integer("questions", questions, low=1))

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
        yield from self._with(_newest=entries, _behind=behind)

    @contextmanager
    def tracing(self, *, local: bool = False) -> Iterator[Trace]:
        """Inside, notes for each query, layer and head which entries were found and what weight they had.

        Rows are those of a pass's batch; layers have the model's numbers. Positions are the tokens' in their document
        as it was read, unless `keep_ids` is False: then they count what is stored.

        local: also keep the weights of the local keys, (B, H, N, L) for each pass; not with a gate.

        Yields a trace, which `memtrans.inspection.trace.Trace` describes. Raises ValueError inside another `tracing`.
        """
        self._check_in_model()
        if self._watched is not None:
            raise ValueError("a memory must be watched by one trace at a time, got a second one inside the first")
        trace = Trace()
        tell = {number: trace.watcher(number) for number in self.numbers}
        self._watched = Watched(lambda layer, observation: tell[layer](observation), local)
        try:
            yield trace
        finally:
            self._watched = None

    def _with(self, **fields: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in fields}
        self.__dict__.update(fields)
        try:
            yield
        finally:
            self.__dict__.update(before)

    # -------------------------------------------------------------------------------------------- parameters, files

    def parameters(self) -> list[nn.Parameter]:
        """What the memory learns: how each head of each layer asks and trusts it; see `LayerMemory`.

        `memory_value` and `memory_next` are in what is stored: `calibrate` alone learns them, and what was read before
        they changed is to be read again.
        """
        self._check_in_model()
        return [parameter for layer in self.layers.values() for parameter in layer.learned.parameters()]

    def save(self, directory: str | Path) -> None:
        """Writes memtrans.safetensors, settings and what was learned, and memories.safetensors, what is held.

        directory: made if missing; each file takes the place of an older one at once and whole. Where no document was
            read, the second is not there afterwards, and what is held in a calibration is not written.
        """
        self._check_in_model()
        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        learned = {
            f"{number}.{name}": tensor
            for number, layer in self.layers.items()
            for name, tensor in layer.learned.state_dict().items()
        }
        configuration = {**self.settings.to_json(), "layers": self.numbers}
        save_tensors(place / WEIGHTS, learned, KIND, configuration)
        if self._entries is None or self._entries.as_they_are:
            (place / ENTRIES).unlink(missing_ok=True)  # of an earlier save, which `load` would take for this one's
        else:
            self._entries.save(place / ENTRIES)

    def load(self, directory: str | Path) -> None:
        """Takes up what `save` wrote of a memory in the same layers: what it learned and, if anything, what it held.

        `parameters` are others afterwards where the form of what was learned is another one. Where the directory holds
        nothing that was read, what is held stays as it was stored: read it again if `memory_value` is learned or was.

        Raises FileNotFoundError, or ValueError for a file that is damaged or of other layers; nothing changed then.
        """
        self._check_in_model()
        place = Path(directory)
        learned, configuration = load_tensors(place / WEIGHTS, KIND)
        if configuration.get("layers") != self.numbers:
            of_file = configuration.get("layers")
            raise ValueError(f"directory must hold a memory of layers {self.numbers}, got {of_file}")
        states = states_of(learned, {number: layer.learned for number, layer in self.layers.items()})
        if (place / ENTRIES).exists():
            state, documents = read_entries(place / ENTRIES)
            entries = Entries(self.layers, self.settings, documents)
            entries.load(state)
            self._held[READ] = entries
        self._forget_reader()
        for number, layer in self.layers.items():
            layer.learned.take(states[number])

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

    def _check_ids(self, ids: Tensor, attention_mask: Tensor | None) -> None:
        """Raises unless ids are of the vocabulary (B, N), and a mask is of their shape."""
        table = self.decoder.get_input_embeddings()  # type: ignore[operator]
        check_ids("ids", ids, getattr(table, "num_embeddings", None), None, None, validate=False)
        if attention_mask is not None:
            checks.tensors(attention_mask=attention_mask)
            if attention_mask.shape != ids.shape:
                of_ids, of_mask = tuple(ids.shape), tuple(attention_mask.shape)
                raise ValueError(f"attention_mask must be (B, N) as ids are, {of_ids}, got {of_mask}")
