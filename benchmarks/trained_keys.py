"""What a small model that was trained on text searches: `<source>-<steps>-d64-<memory>` of the benchmarks.

The model has two layers, the second with a memory. Its layer's inputs in a row of segments are kept: keys, values and
queries are made of them, and of a layer with the trained weights they fill the memory and are what it is timed on.
Training is captured but not compiled: a compiler takes longer than the steps.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from common import DEVICE, TOY, Case, Ring, case
from machine_texts import digest, training_data
from torch import Tensor

from memtrans import KNNAttention
from memtrans.data.stream import DocumentStream
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer
from memtrans_kernels import cosine

SOURCES = ("trained", "hexdump")
STEPS = (500, 5000)
TOY_STEPS = 100  # of those steps one is made at toy size
MEMORY, SEGMENT = 8192, 256  # of the steps
LARGEST = "d64-64k"  # what the kept segments fill
OF_PROJECTIONS = ("to_q.", "to_kv.", "to_out.", "scale")  # what a layer has with and without a gate or an offset


class Trained(NamedTuple):
    """Attributes:

    layer: the memorizing one. inputs: (T, B, N, dim), of T segments that follow each other, of which T - 1 fill the
        largest memory. data_sha256: of the text.
    """

    layer: KNNAttention
    inputs: Tensor
    data_sha256: str


@functools.lru_cache(maxsize=1)  # a gigabyte each
def trained(source: str, steps: int) -> Trained:
    """The model of a source after so many steps; asked for in ascending order it trains on."""
    trainer = _trainer(source)
    if trainer.step > _steps(steps):
        _trainer.cache_clear()
        trainer = _trainer(source)
    with torch.enable_grad():  # who asks may be timing a forward pass alone
        while trainer.step < _steps(steps):
            trainer.advance()
    trainer.check()
    layer = next(module for module in trainer.model.modules() if isinstance(module, KNNAttention))
    return Trained(layer, _inputs(trainer, layer), digest(source))


def _steps(steps: int) -> int:
    return steps // TOY_STEPS if TOY else steps


@functools.lru_cache(maxsize=1)
def _trainer(source: str) -> Trainer:
    sizes = case(LARGEST)
    settings = Settings(
        steps=_steps(max(STEPS)), batch=sizes.batch, segment=sizes.length if TOY else SEGMENT, layers=2,
        width=sizes.heads * sizes.width, heads=sizes.heads, head_width=sizes.width,
        memory=sizes.capacity if TOY else MEMORY, memory_layers=(2,), memory_offset=-4.0, keep_memory=True,
        dtype="bfloat16" if DEVICE == "cuda" else "float32", compile=False,
    )  # fmt: skip
    trainer = Trainer(settings, training_data(source, sizes.batch), torch.device(DEVICE))
    trainer._step._graph.capture = DEVICE == "cuda"
    return trainer


@torch.no_grad()
def _inputs(trainer: Trainer, layer: KNNAttention) -> Tensor:
    """The layer's inputs in segments of the text, from its beginning on."""
    sizes, found = case(LARGEST), []
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    count = -(-(sizes.capacity + sizes.spare) // sizes.length) + 1
    stream = DocumentStream(trainer.data.order, sizes.batch, sizes.length)
    hook = layer.register_forward_pre_hook(lambda module, given: found.append(given[0].to(dtype)))
    for _ in range(count):
        batch = stream.next()
        assert batch is not None
        batch = batch.to(DEVICE)
        trainer.reader.look(batch.tokens, batch.lengths)
    hook.remove()
    return torch.stack(found)


@torch.no_grad()
def entries(kept: Trained, count: int) -> tuple[Tensor, Tensor]:
    """Keys of unit length and values (B, count, D) of the newest so many tokens before the last segment."""
    keys, values = [], []
    segments = -(-count // kept.inputs.shape[2])
    for x in kept.inputs[-1 - segments : -1]:
        query, key, value = kept.layer.project(x.to(kept.layer.to_q.weight.dtype))
        keys.append(cosine(query, key)[1][:, 0])
        values.append(value[:, 0])
    return torch.cat(keys, dim=1)[:, -count:], torch.cat(values, dim=1)[:, -count:]


def trained_problem(source: str, steps: int, sizes: Case, dtype: torch.dtype) -> tuple[Ring, Tensor]:
    """A full ring (R, M + S, D) that has wrapped, and the next queries (B, H, N, D), of unit length."""
    kept = trained(source, steps)
    slots, begin = sizes.capacity + sizes.spare, sizes.spare // 2
    keys, values = (tensor.roll(begin, dims=1).to(dtype) for tensor in entries(kept, slots))
    cursor = torch.full((sizes.rows,), 2 * slots + begin, device=DEVICE)
    with torch.no_grad():
        query, key, _ = kept.layer.project(kept.inputs[-1].to(kept.layer.to_q.weight.dtype))
        query = cosine(query, key)[0].to(dtype)
    return Ring(keys, values, cursor, torch.zeros_like(cursor), torch.arange(sizes.rows, device=DEVICE)), query


def with_trained_weights(kept: Trained, layer: KNNAttention) -> KNNAttention:
    """The layer with the trained projections and temperature."""
    weights = {name: tensor for name, tensor in kept.layer.state_dict().items() if name.startswith(OF_PROJECTIONS)}
    layer.load_state_dict(weights, strict=False)
    return layer


def split_trained(name: str) -> tuple[str, int, str] | None:
    """Source, steps and shape of `<source>-<steps>-<shape>`; None of another case.

    >>> split_trained("hexdump-5000-d64-64k"), split_trained("hard-equal-d64-64k")
    (('hexdump', 5000, 'd64-64k'), None)
    """
    source, _, rest = name.partition("-")
    if source not in SOURCES:
        return None
    steps, _, shape = rest.partition("-")
    return source, int(steps), shape
