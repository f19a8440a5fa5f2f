"""What happens around a forward pass of a decoder with a memory: one state goes in with its keywords.

So gradient checkpointing, which calls layers again with the keywords they had, sees the same memory again.
Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memtrans.hf.layer_memory import Asking, asking_of
from memtrans.hf.rotation import Angles, Rotation, angles_back
from memtrans.hf.state import ForwardState, Padding, padding_of
from memtrans.memory.checks import check_mask
from memtrans_kernels import checks
from memtrans_kernels.checks import may_look

if TYPE_CHECKING:
    from memtrans.hf.model_memory import ModelMemory

STATE, COUNT = "memtrans_state", "memtrans_count"
CACHES = ("cache", "past_key_values", "layer_past")
SHAPING = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", *CACHES)  # what masks depend on


def before_decoder(memory: ModelMemory, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The forward pre-hook: checks the call, clears documents that begin, and hands the state on.

    Keywords of its own: new_document (B,) bool, and, of `read`, how many of the tokens are real (B,).
    """
    fresh, count = kwargs.pop("new_document", None), kwargs.pop(COUNT, None)
    if memory.is_off:
        return args, kwargs
    ids = args[0] if args else kwargs.get("input_ids")
    given = ids if ids is not None else kwargs["inputs_embeds"]
    batch, length = given.shape[:2]
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    writes = memory.is_writing
    if fresh is not None and not writes:
        raise ValueError("new_document must be given inside writing() alone, got it in a pass that writes nothing")
    fresh = None if fresh is None else _beginning(fresh, batch)
    if writes:
        _check_segment(memory, length, cache)
    entries = memory.entries_for(batch, writes)
    if entries is None:
        return args, kwargs
    if fresh is not None:
        entries.clear_rows(fresh)
    mask = kwargs.get("attention_mask")
    plain = count is None and all(kwargs.get(name) is None for name in SHAPING)
    padding = padding_of(mask, length) if count is None else Padding(torch.zeros_like(count), count)
    if writes and isinstance(mask, Tensor) and padding is not None and _counts_positions(memory, kwargs):
        kwargs["position_ids"] = (mask[:, -length:].long().cumsum(-1) - 1).clamp(min=0)
    snapshots = memory.views(entries)
    most = _most(snapshots[memory.numbers[0]])
    blind, watched = _blind(memory.settings.sink, given, kwargs, cache, padding), memory.watched(entries)
    asking, blind = _asking(memory, decoder, most, blind, watched is not None)
    kwargs[STATE] = ForwardState(
        snapshots=snapshots,
        k=memory.settings.k,
        combine=memory.settings.combine,
        writes=writes,
        searches=memory.searches,
        entries=most,
        asking=asking,
        blind=blind,
        sink=memory.settings.sink,
        padding=padding,
        turns=_turns(memory, decoder, given) if writes else {},
        plain=plain,
        watched=watched,
    )
    if writes:
        entries.note(ids if ids is not None else given.new_zeros(batch, length), memory.settings.sink, padding)
    return args, kwargs


def _beginning(fresh: Tensor, batch: int) -> Tensor:
    """`new_document` as a mask (B,) bool; collators may make ones and zeros of it. Raises for anything else."""
    checks.tensors(new_document=fresh)
    if fresh.dtype != torch.bool and may_look(fresh) and bool(((fresh != 0) & (fresh != 1)).any()):
        raise ValueError(f"new_document must be 1 where a document begins and else 0, got {fresh.tolist()}")
    check_mask(fresh.bool(), batch, name="new_document")
    return fresh.bool()


def after_decoder(memory: ModelMemory, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook. Raises RuntimeError where a layer was not handed the state: its memory would do nothing."""
    state = kwargs.get(STATE)
    if state is not None and len(state.seen) < len(memory.numbers):
        unseen = [number for number in memory.numbers if number not in state.seen]
        raise RuntimeError(f"layers {unseen} of {type(decoder).__name__} were not handed the memory")
    return output


def _asking(
    memory: ModelMemory, decoder: nn.Module, most: Tensor, blind: Tensor | None, is_watched: bool
) -> tuple[dict[int, Asking], Tensor | None]:
    """How each layer's memory is asked; and which tokens look at none, unless the offsets say so for all layers."""
    if decoder.training or not memory.searches:
        return {}, blind
    shut = blind if not is_watched and blind is not None and blind.numel() == 1 else None
    learned = {number: layer.learned for number, layer in memory.layers.items()}
    return asking_of(learned, most, memory.dtype, shut), blind if shut is None else None


def _counts_positions(memory: ModelMemory, kwargs: dict[str, Any]) -> bool:
    """Whether a model may be given positions that count a row's real tokens: they alone matter to rotary ones."""
    return memory.is_rotary and kwargs.get("position_ids") is None


def _check_segment(memory: ModelMemory, length: int, cache: Any) -> None:
    if length > memory.settings.segment:
        raise ValueError(
            f"a pass that writes must have at most segment={memory.settings.segment} tokens, got {length}: read() "
            f"cuts what is longer"
        )
    if cache is not None:
        raise ValueError("a pass that writes must have no cache: its segment is all that it attends to beside a memory")


def _most(snapshot: Any) -> Tensor:
    """How many entries the longest document in scope holds; no look from the host."""
    held = snapshot.cursor - snapshot.start
    return (held if snapshot.in_order else held[snapshot.rows]).max().clamp(max=snapshot.ring.capacity)


def _blind(sink: int, given: Tensor, kwargs: dict[str, Any], cache: Any, padding: Padding | None) -> Tensor | None:
    """Which tokens are the first `sink` real ones of what the pass and its cache hold: (1 or B, N).

    Those see themselves alone in a pretrained model, and it uses them as attention sinks.
    """
    if sink == 0:
        return None
    length, positions, mask = given.shape[1], kwargs.get("position_ids"), kwargs.get("attention_mask")
    if cache is not None and isinstance(positions, Tensor):
        return positions < sink
    if cache is not None and isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.cumsum(-1)[:, -length:] <= sink
    rank = torch.arange(length, device=given.device)[None]
    if cache is not None:
        rank = rank + cache.get_seq_length()
    elif padding is not None:
        rank = rank - padding.left[:, None]
    return rank < sink


def _turns(memory: ModelMemory, decoder: nn.Module, given: Tensor) -> dict[int, tuple[Rotation, Angles]]:
    """How each layer's keys are turned back before they are stored."""
    weight, kinds = next(decoder.parameters()), {}
    turns = {}
    for number, layer in memory.layers.items():
        if layer.rotation is not None:
            kind = layer.rotation.kind
            if kind not in kinds:
                like = weight.new_empty(1, device=given.device)
                kinds[kind] = angles_back(decoder, like, memory.settings.turn, kind)
            turns[number] = (layer.rotation, kinds[kind])
    return turns
