"""What happens around a forward pass of a decoder with a memory: one state goes in with its keywords.

So gradient checkpointing, which calls layers again with the keywords they had, sees the same memory again.
Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from memtrans.hf.entries import Entries
from memtrans.hf.layer_memory import Asking, asking_of, saying_of
from memtrans.hf.masks import Padding, begins_of, check_one_document, padding_of, ranks_of
from memtrans.hf.probe import learned_of
from memtrans.hf.rotation import Angles, Rotation, angles_back
from memtrans.hf.state import ForwardState
from memtrans.memory.checks import check_mask
from memtrans_kernels import checks
from memtrans_kernels.checks import may_look

if TYPE_CHECKING:
    from memtrans.hf.model_memory import ModelMemory

STATE, COUNT = "memtrans_state", "memtrans_count"
CACHES = ("cache", "past_key_values", "layer_past")
SHAPING = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", *CACHES)  # what masks depend on


class Given(NamedTuple):
    """What a forward pass of the decoder is given.

    Attributes:
        ids: (B, N) int64; None where it is given embeddings. tokens: the ids, or the embeddings (B, N, width).
        batch: B. length: N.
        real: (B,), how many of the tokens are real; `read` alone says so. cache: None for none.
        plain: whether nothing comes with the tokens that a mask depends on.
        kwargs: all that it is called with by name; what it is told besides is added here.
    """

    ids: Tensor | None
    tokens: Tensor
    batch: int
    length: int
    real: Tensor | None
    cache: Any
    plain: bool
    kwargs: dict[str, Any]

    def named(self) -> Tensor:
        """What a memory of ids keeps of the tokens (B, N): their ids; zeros for embeddings, which have none."""
        return self.tokens.new_zeros(self.batch, self.length) if self.ids is None else self.ids


def before_decoder(memory: ModelMemory, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The forward pre-hook: checks the call, clears documents that begin, and hands the state on.

    Keywords of its own: new_document (B,) bool, and, of `read`, how many of the tokens are real (B,).
    """
    fresh, count = kwargs.pop("new_document", None), kwargs.pop(COUNT, None)
    if memory.is_off:
        return args, kwargs
    args, kwargs = _named(decoder, args, kwargs)
    given = _given(args, kwargs, count)
    if given is None:  # the model says what it wants
        return args, kwargs
    begins = _checked(memory, given, fresh)
    entries = memory.entries_for(given.batch, memory.is_writing)
    if entries is not None:
        kwargs[STATE] = _state(memory, decoder, given, entries, begins)
    return args, kwargs


def after_decoder(memory: ModelMemory, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook: adds what the layers saw, and tells who watches.

    Raises RuntimeError where a layer was not handed the state: its memory would do nothing.
    """
    state = kwargs.get(STATE)
    if state is not None and len(state.seen) < len(memory.numbers):
        unseen = [number for number in memory.numbers if number not in state.seen]
        raise RuntimeError(f"layers {unseen} of {type(decoder).__name__} were not handed the memory")
    if state is not None and state.stored is not None:
        stored, state.stored = state.stored, None
        state.store(stored)
    if state is not None and state.watched is not None:
        for layer, observation in state.told:
            state.watched.tell(layer, observation)
    return output


def _named(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A call's arguments by the names that the decoder's forward has for them."""
    if not args:
        return args, kwargs
    parameters = inspect.signature(decoder.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return args[len(names) :], dict(**dict(zip(names, args, strict=False)), **kwargs)


def _given(args: Any, kwargs: dict[str, Any], count: Tensor | None) -> Given | None:
    """What a call by names gives; None for no tokens."""
    ids = args[0] if args else kwargs.get("input_ids")
    tokens = ids if ids is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        return None
    batch, length = tokens.shape[:2]
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    plain = count is None and all(kwargs.get(name) is None for name in SHAPING)
    return Given(ids, tokens, batch, length, count, cache, plain, kwargs)


def _checked(memory: ModelMemory, given: Given, fresh: Any) -> Tensor | None:
    """Which documents begin (B,) bool; None where `new_document` says nothing. Raises for a call that will not do."""
    if fresh is not None and not memory.is_writing:
        raise ValueError(
            "new_document must be given inside writing() or training() alone, got it in a pass that writes nothing: a "
            "Trainer evaluates `with memory.training():`"
        )
    begins = None if fresh is None else _beginning(fresh, given.batch)
    if memory.is_writing:
        _check_segment(memory, given)
    return begins


def _beginning(fresh: Tensor, batch: int) -> Tensor:
    """`new_document` as a mask (B,) bool; collators may make ones and zeros of it. Raises for anything else."""
    checks.tensors(new_document=fresh)
    if fresh.dtype != torch.bool and may_look(fresh) and bool(((fresh != 0) & (fresh != 1)).any()):
        raise ValueError(f"new_document must be 1 where a document begins and else 0, got {fresh.tolist()}")
    check_mask(fresh.bool(), batch, name="new_document")
    return fresh.bool()


def _state(
    memory: ModelMemory, decoder: nn.Module, given: Given, entries: Entries, begins: Tensor | None
) -> ForwardState:
    """What the pass's layers are handed, once the documents that begin are cleared."""
    settings, writes = memory.settings, memory.is_writing
    padding, blind = _told(memory, decoder, given)
    if begins is not None:
        entries.clear_rows(begins)
    standing = entries.snapshots() if writes or torch.is_grad_enabled() else entries.live()
    snapshots = memory.views(standing)
    most, watched = _most(snapshots[memory.numbers[0]]), memory.watched(entries)
    asking, blind = _asking(memory, decoder, most, blind, watched is not None)
    return ForwardState(
        snapshots=snapshots,
        k=settings.k,
        combine=settings.combine,
        searches=memory.searches,
        entries=most,
        asking=asking,
        blind=blind,
        sink=settings.sink,
        padding=padding,
        turns=_turns(memory, decoder, given) if writes else {},
        plain=given.plain,
        saying=_saying(memory, decoder) if writes or entries.as_they_are else {},
        as_they_are=entries.as_they_are,
        watched=watched,
        stored={} if writes else None,
        store=partial(entries.store, standing, given.named(), settings.sink, padding) if writes else None,
    )


def _asking(
    memory: ModelMemory, decoder: nn.Module, most: Tensor, blind: Tensor | None, is_watched: bool
) -> tuple[dict[int, Asking], Tensor | None]:
    """How each layer's memory is asked; and which tokens look at none, unless the offsets say so for all layers."""
    if decoder.training or not memory.searches:
        return {}, blind
    shut = blind if not is_watched and blind is not None and blind.numel() == 1 else None
    return asking_of(learned_of(memory.layers), most, memory.dtype, shut), blind if shut is None else None


def _saying(memory: ModelMemory, decoder: nn.Module) -> dict[int, Tensor | None]:
    """What is made of each layer's values."""
    if decoder.training:
        return {}
    return saying_of(learned_of(memory.layers), memory.dtype)


def _told(memory: ModelMemory, decoder: nn.Module, given: Given) -> tuple[Padding | None, Tensor | None]:
    """What is padding, and which tokens look at no memory (1 or B, N): the first `sink` real ones of their document.

    Those see themselves alone in a pretrained model, and it uses them as attention sinks. A pass that writes and has no
    positions is given those that count a row's real tokens: they alone matter to rotary ones.
    """
    mask, positions = given.kwargs.get("attention_mask"), given.kwargs.get("position_ids")
    cache, count, length = given.cache, given.real, given.length
    sink, writes = memory.settings.sink, memory.is_writing
    padding = padding_of(mask, length, dense=writes) if count is None else Padding(torch.zeros_like(count), count)
    by_positions = writes or not _makes_cache(decoder, given.kwargs)
    begins = begins_of(mask, positions if by_positions else None, length) if cache is None else None
    if writes:
        check_one_document(begins, padding)
    blind = ranks_of(begins, mask, positions, cache, given.tokens) < sink if sink else None
    if writes and count is None and padding is not None and positions is None and memory.is_rotary:
        given.kwargs["position_ids"] = padding.positions(length)
    return padding, blind


def _makes_cache(decoder: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", False) if asked is None else asked)


def _check_segment(memory: ModelMemory, given: Given) -> None:
    """Raises ValueError for what no pass that writes may be given."""
    if given.length > memory.settings.segment:
        raise ValueError(
            f"a pass that writes must have at most segment={memory.settings.segment} tokens, got {given.length}: "
            f"read() cuts what is longer"
        )
    if given.cache is not None:
        raise ValueError("a pass that writes must have no cache: its segment is all that it attends to beside a memory")


def _most(snapshot: Any) -> Tensor:
    """How many entries the longest document in scope holds; no look from the host."""
    held = snapshot.cursor - snapshot.start
    return (held if snapshot.in_order else held[snapshot.rows]).max().clamp(max=snapshot.ring.capacity)


def _turns(memory: ModelMemory, decoder: nn.Module, given: Given) -> dict[int, tuple[Rotation, Angles]]:
    """How each layer's keys are turned back before they are stored."""
    weight, kinds = next(decoder.parameters()), {}
    positions = given.kwargs.get("position_ids")
    latest = given.length - 1 if positions is None else positions.max()
    turns = {}
    for number, layer in memory.layers.items():
        if layer.rotation is not None:
            kind = layer.rotation.kind
            if kind not in kinds:
                like = weight.new_empty(1, device=given.tokens.device)
                kinds[kind] = angles_back(decoder, like, memory.settings.turn, kind, latest)
            turns[number] = (layer.rotation, kinds[kind])
    return turns
