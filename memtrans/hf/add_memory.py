"""Adding a memory to a pretrained model: everything is checked and tried out before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memtrans.hf.attention import configured
from memtrans.hf.families import chosen_of, decoder_of, device_of, most_positions
from memtrans.hf.layer_memory import LayerMemory
from memtrans.hf.model_memory import ModelMemory
from memtrans.hf.probe import probed
from memtrans.hf.saved import saved_arguments
from memtrans.hf.settings import MemorySettings, checked


def add_memory(
    model: nn.Module,
    layers: Sequence[int] | str = "all",
    max_memories: int = 65536,
    k: int = 32,
    distance: str | int = "previous",
    segment: int = 512,
    sink: int = 1,
    combine: str = "softmax",
    offset: float | str = "auto",
    dtype: torch.dtype | None = None,
    spare: int = 0,
    keep_ids: bool = True,
    backend: str = "auto",
) -> ModelMemory:
    """Gives layers of a pretrained causal language model a memory, in place; see docs/hf.md.

    The model's own attention function, weights and configuration stay; `ModelMemory.remove` leaves no trace.

    Args:
        model: a transformers model, or one that holds one (PEFT's). Its attention goes through AttentionInterface.
        layers: their numbers; "all" is what a model that is not trained for it needs.
        max_memories: M, entries that each document keeps.
        k: K, neighbours of a query.
        distance: how many positions further back than it stood in its segment a key is stored; "previous" is `segment`,
            as if its segment had come just before the one that is read. Models without rotary positions store keys as
            they are.
        segment: N, tokens that `read` reads at a time, and the most that a pass inside `writing()` may have.
        sink: how many of the first tokens of a pass without a cache look at no memory and are not stored.
        combine: "softmax", one over neighbours and local keys; "gate", the model's own attention and one over the
            neighbours, mixed by a learned gate for each head.
        offset: start of what is added to the logits of neighbours, or to the gate's; minus infinity closes the memory.
            "auto" starts at -log(max(1, n / 1024)) for n entries of the longest document of the batch: untrained
            memories were best with 0 at 1,000 entries, -1 at 4,000 and -2 to -3 from 12,000 to 16,000. Both numbers are
            learned; see `LayerMemory`.
        dtype: of the memory. Default: that of the model's keys.
        spare: S, entries that may be added between a forward pass and its backward; at least a segment.
        keep_ids: also keep the ids of the tokens that were read.
        backend: of search: one of `auto`, `reference`, `triton`, `native`, `faiss`.

    Returns:
        The memory, which takes `bytes_per_document` for each document that is read.

    Raises:
        ValueError, TypeError: an argument out of range, a layer that is none; a model that has a memory, is an
            encoder-decoder or not causal, of a family that does not go through AttentionInterface, drops keywords on
            the way to attention, or has rotary positions that cannot be undone. The model is as it was then.

    Source: Wu et al. 2022, section 3.1, for what a memory is.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **sizes)).eval()
    >>> memory = add_memory(model, max_memories=100, segment=16)
    >>> memory.read(torch.arange(50)[None])
    >>> answer = model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    >>> answer.shape, memory.lengths.tolist()   # generating adds nothing
    (torch.Size([1, 5]), [46])
    """
    settings = checked(
        layers=layers, max_memories=max_memories, k=k, distance=distance, segment=segment, sink=sink, combine=combine,
        offset=offset, dtype=dtype, spare=spare, keep_ids=keep_ids, backend=backend,
    )  # fmt: skip
    chosen = chosen_of(model, settings.layers)
    decoder = decoder_of(model, next(iter(chosen.values())))
    _check_positions(settings, most_positions(decoder))
    devices = {number: device_of(attention) for number, attention in chosen.items()}
    found = probed(decoder, chosen, settings.combine, settings.turn)
    for number, layer in found.items():
        sizes = {"kv_heads": layer.kv_heads, "value_width": layer.value_width}
        layer.attention.memtrans = LayerMemory(layer.heads, layer.width, settings.offset, devices[number], **sizes)
        layer.attention.config = configured(layer.attention.config)
    return ModelMemory(decoder, found, settings)


def _check_positions(settings: MemorySettings, most: int | None) -> None:
    """A stored key stands before the segment that looks at it: together they must be distances that a model knows."""
    if most is not None and settings.segment + settings.turn > most:
        raise ValueError(
            f"segment must be at most half of the model's {most} positions, got {settings.segment} and keys that are "
            f"stored {settings.turn} further back"
        )


def memory_of(model: nn.Module) -> ModelMemory:
    """The memory that a model has: of a copy (`copy.deepcopy`, or `torch.save` of the whole model) its own.

    A copy holds what was read when it was made, and is outside of `writing()`, `off()` and the like.

    Raises ValueError for a model without one.

    >>> import copy
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **sizes)).eval()
    >>> memory = add_memory(model, max_memories=100, segment=16)
    >>> memory.read(torch.arange(10)[None])
    >>> other = copy.deepcopy(model)
    >>> memory_of(other).reset()
    >>> memory_of(model) is memory, memory.lengths.tolist()
    (True, [9])
    """
    found = (getattr(module, "memtrans_memory", None) for module in model.modules())
    memory = next((memory for memory in found if isinstance(memory, ModelMemory)), None)
    if memory is None:
        raise ValueError(f"model must have a memory, got {type(model).__name__} without one: add_memory gives it one")
    return memory


def load_memory(model: nn.Module, directory: str | Path, **overrides: Any) -> ModelMemory:
    """Gives a model the memory that `ModelMemory.save` wrote: its settings, what it learned, and what it held.

    Args:
        model: like the one it was saved of. directory: as given to `save`.
        overrides: arguments of `add_memory` that differ from the saved, such as a larger `max_memories`.

    Raises:
        FileNotFoundError, ValueError: of the files; those of `add_memory`. The model is as it was then.

    >>> import tempfile
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **sizes)).eval()
    >>> memory = add_memory(model, layers=[1], max_memories=100, segment=16)
    >>> memory.read(torch.arange(10)[None])
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     memory.save(directory)
    ...     memory.remove()
    ...     again = load_memory(model, directory)
    >>> again.numbers, again.lengths.tolist()
    ([1], [9])
    """
    memory = add_memory(model, **{**saved_arguments(Path(directory)), **overrides})
    try:
        memory.load(directory)
    except BaseException:
        memory.remove()
        raise
    return memory
