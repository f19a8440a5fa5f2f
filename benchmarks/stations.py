"""What a forward pass and a training step ask of their reader: Python calls by file, stations of x, checks by argument.

A *station* is a function of the model layer that is handed x, or what became of x: a tensor (B, ..., N or L, ...) among
its arguments. A second layer of the same kind makes no new one. An argument is *checked* once in each function that
calls checks of it and is none itself: one that two functions ask the same of counts twice. The public functions of the
kernels check arguments of their own, which are counted by their call: `knn_search.query`.

The forward pass reads a third segment with a plain and a memorizing layer, both with XL caches, and every optional
argument; the training step is the second one of a toy run. `make stations` prints both.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from bench_train import full_trainer, settings_of
from torch import Tensor

import memtrans
import memtrans_kernels
from memtrans import MemorizingTransformer

ROOTS = [Path(package.__file__ or "").parent for package in (memtrans, memtrans_kernels)]
FORMER = ("blocks", "local_context", "validation")  # files that the model layer and its checks had at 48195b5
MODEL_LAYER = (
    "transformer",
    "attention",
    "knn_attention",
    "checks",
    "config",
    "xl_memories",
    "position",
    "vocabulary",
    "residual",
    "recurrence",
    "segments",
    *FORMER,
)
CHECKING = ("checks", "validation")
BATCH, LENGTH, CACHED = 3, 11, 5  # no other size is 11 or 16
SIZES = {"dim": 12, "dim_head": 4, "heads": 3, "num_tokens": 50, "num_retrieved_memories": 2, "max_knn_memories": 40}
TOY: dict[str, Any] = {
    "batch": 2, "segment": 16, "layers": 2, "width": 16, "head_width": 8,
    "memory": 32, "memory_layers": (2,), "xl": 16, "xl_layers": (1,),
}  # fmt: skip


class Walk(NamedTuple):
    """Where one run came by.

    Attributes:
        calls: of the functions of each file. stations: of x, in the order of the first visit.
        doors: how many functions checked an argument. most: of the kernels' arguments, by how many functions one call
            had them checked.
    """

    calls: Counter[str]
    stations: list[str]
    doors: Counter[str]
    most: Counter[str]


class _Watcher:
    """A profile function, as `sys.setprofile` takes it."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.stations: dict[CodeType, str] = {}
        self.doors: dict[str, set[FrameType]] = {}
        self.by_call: dict[tuple[str, FrameType], set[FrameType]] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file = _file_of(frame)
        if event != "call" or file is None or frame.f_code.co_name.startswith("<"):
            return
        self.calls[file] += 1
        if Path(file).stem in MODEL_LAYER and Path(file).parent.name == "memtrans" and _handed(frame):
            owner = type(frame.f_locals["self"]).__name__ + "." if "self" in frame.f_locals else ""
            self.stations[frame.f_code] = owner + frame.f_code.co_name
        if _checks(frame):
            for name in _argument_names(frame):
                self._note(name, frame)

    def _note(self, name: str, frame: FrameType) -> None:
        door = frame.f_back
        while door is not None and (_checks(door) or _helps(door)):
            door = door.f_back
        if door is None:
            return
        call = door
        if (_file_of(door) or "").startswith("memtrans_kernels"):
            while call.f_back is not None and (_file_of(call.f_back) or "").startswith("memtrans_kernels"):
                call = call.f_back
            name = f"{call.f_code.co_name}.{name}"
        self.doors.setdefault(name, set()).add(door)
        self.by_call.setdefault((name, call), set()).add(door)

    def walk(self) -> Walk:
        most: Counter[str] = Counter()
        for (name, _), doors in self.by_call.items():
            most[name] = max(most[name], len(doors))
        doors = Counter({name: len(found) for name, found in self.doors.items()})
        return Walk(self.calls, list(self.stations.values()), doors, most)


def _file_of(frame: FrameType) -> str | None:
    """A file of the two packages, as `memtrans/transformer.py`; None for all others."""
    path = Path(frame.f_code.co_filename)
    for root in ROOTS:
        if path.is_relative_to(root):
            return str(path.relative_to(root.parent))
    return None


def _checks(frame: FrameType) -> bool:
    """Whether it is a check: a function of a checking file, or one that is named so."""
    file = _file_of(frame)
    named = frame.f_code.co_name.startswith("check_")
    return file is not None and (Path(file).stem in CHECKING or (named and "name" in frame.f_locals))


def _helps(frame: FrameType) -> bool:
    """Whether it is a part of one of the kernels' functions."""
    return (_file_of(frame) or "").startswith("memtrans_kernels") and frame.f_code.co_name.startswith("_")


def _argument_names(frame: FrameType) -> Iterator[str]:
    """The names of what a check is asked to look at."""
    if isinstance(frame.f_locals.get("name"), str):
        yield frame.f_locals["name"]
    for several in ("arguments", "given"):
        if isinstance(frame.f_locals.get(several), dict):
            yield from (name for name, value in frame.f_locals[several].items() if value is not None)


def _handed(frame: FrameType) -> bool:
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    return any(_of_x(frame.f_locals.get(name)) for name in code.co_varnames[:count])


def _of_x(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_of_x(part) for part in value)
    sizes = tuple(value.shape) if isinstance(value, Tensor) else ()
    return sizes[:1] == (BATCH,) and bool({LENGTH, CACHED + LENGTH} & set(sizes[1:]))


def walk_of(function: Callable[[], object]) -> Walk:
    """Runs a function and says where it came by."""
    watcher = _Watcher()
    sys.setprofile(watcher)
    try:
        function()
    finally:
        sys.setprofile(None)
    return watcher.walk()


def forward_pass() -> Walk:
    """Of `forward(x, memories, xl_memories, lengths=..., xl_length=...)`, with gradients to come."""
    model = MemorizingTransformer(**SIZES, depth=2, memorizing_layers=2, xl_max_memories=CACHED)
    memories = model.create_knn_memories(batch_size=BATCH)
    x = torch.randint(50, (BATCH, LENGTH))
    _, caches = model(x, memories)
    full, cached = torch.full((BATCH,), LENGTH), torch.full((BATCH,), CACHED)

    def read_on() -> None:
        model(x, memories, caches, lengths=full, xl_length=cached)

    read_on()  # the kernels remember shapes that they have checked
    return walk_of(read_on)


def training_step() -> Walk:
    """Of a whole step, with the data, the losses, the backward pass and the optimiser."""
    settings = dataclasses.replace(settings_of("enwik8-64k", compiled=False), **TOY)
    trainer = full_trainer(settings)
    trainer.advance()
    return walk_of(trainer.advance)


def tables(walks: dict[str, Walk]) -> str:
    """Walks by name as Markdown: what they come to, then calls by file, then checks by argument."""
    lines = ["| | " + " | ".join(walks) + " |", "| --- |" + " --- |" * len(walks)]

    def row(name: str, figure: Callable[[Walk], int]) -> None:
        lines.append(f"| {name} | " + " | ".join(f"{figure(walk):,}" for walk in walks.values()) + " |")

    row("Python calls", lambda walk: walk.calls.total())
    row("files", lambda walk: len(walk.calls))
    row("checks of the model's arguments", lambda walk: sum(n for name, n in walk.doors.items() if "." not in name))
    row("checks of the kernels' arguments", lambda walk: sum(n for name, n in walk.doors.items() if "." in name))
    row("stations of x in the model layer", lambda walk: len(walk.stations))
    for name, walk in walks.items():
        if walk.stations:
            lines += ["", f"Stations of the {name}: " + ", ".join(f"`{station}`" for station in walk.stations)]
    for title, part in (("file", "calls"), ("argument", "doors")):
        names = sorted({name for walk in walks.values() for name in getattr(walk, part)})
        lines += ["", f"| {title} | " + " | ".join(walks) + " |", "| --- |" + " --- |" * len(walks)]
        for name in names:
            lines.append(f"| {name} | " + " | ".join(str(getattr(walk, part)[name]) for walk in walks.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = {"forward pass": forward_pass(), "training step": training_step()}
    as_json = sys.argv[1:] == ["--json"]
    print(json.dumps({name: walk._asdict() for name, walk in found.items()}) if as_json else tables(found))
