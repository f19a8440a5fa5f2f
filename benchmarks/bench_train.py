"""A training step, from the data to the optimiser, over memories that are full and have wrapped.

Cases: `enwik8-*` is upstream's set-up (d512, 8 layers, 5 backward passes of 16 x 512 tokens a step, memory at layer 4,
XL caches at layers 7 and 8), `paper-*` the paper's shape (d1024, 12 layers, per-head memory at layer 9). `off` has no
memory layer. `code-*` is the preset `code` on sources in C, or on hexdumps of programs (machine_texts.py). Memories
hold what the model itself stored while it was trained, not random keys: for LEARNT steps, or without the compiler until
they have wrapped; on the standard library's sources where the case names no text. The `upstream` entry is
memorizing-transformers-pytorch 0.4.1 with its own set-up, a fresh memory for each window, which is its best case: its
search is then over 2,560 entries at most.

`memtrans` is compiled, `memtrans-eager` is not (`train --no-compile`): on a GPU both replay a step as one CUDA graph.
`memtrans-launched` launches it kernel by kernel (`train --no-compile --no-capture`), as 48195b5 does uncompiled.

`peak_share` is how much of the device's peak in bfloat16 the products of linear layers and local attention reach, as
memtrans/training/peak.py counts them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from common import DEVICE, MEMORIES, TOY, busy_share, environment, write_down
from machine_texts import training_data

from memtrans.data.documents import Document, Shuffled
from memtrans.data.sources import load_corpus
from memtrans.distributed.ranks import ALONE, Ranks
from memtrans.presets import PRESETS
from memtrans.training.data import TrainingData
from memtrans.training.device import pick_device
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer

ENWIK8 = dataclasses.replace(PRESETS["enwik8"], windows=False, dtype="bfloat16" if DEVICE == "cuda" else "float32")
PAPER = dataclasses.replace(
    ENWIK8,
    accumulate=1,
    layers=12,
    width=1024,
    heads=8,
    head_width=128,
    kv_heads=8,
    memory_layers=(9,),
    xl=0,
    xl_layers=None,
)
CODE = dataclasses.replace(  # as the preset was when its first figures were taken: an older commit is timed beside it
    PRESETS["code"], plain_similarity="product", keep_memory=True, dtype=ENWIK8.dtype
)
SIZES = {"off": 0, "7680": 7680, **MEMORIES}
CASES = ("enwik8-off", "enwik8-7680", "enwik8-64k", "paper-off", "paper-8k", "paper-64k")
OF_TEXT = {
    "code-off-c": ("off", "c"), "code-64k-c": ("64k", "c"), "code-64k-c-triton": ("64k", "c"),
    "code-64k-hexdump": ("64k", "hexdump"),
}  # fmt: skip
LEARNT = 4 if TOY else 300  # steps before the first that is timed: the memories are then full
IMPLS = ("memtrans", "memtrans-eager", "memtrans-launched") if DEVICE == "cuda" else ("memtrans", "memtrans-eager")
WARM_UP, STEPS, ROUNDS = (4, 1, 1) if TOY else (6, 10, 3)


def settings_of(case: str, compiled: bool, replayed: bool = True) -> Settings:
    shape, memory = case.rsplit("-", 1)
    made = dataclasses.replace({"enwik8": ENWIK8, "paper": PAPER}[shape], memory=SIZES[memory], compile=compiled)
    if not replayed and hasattr(made, "capture"):  # 48195b5 replays what is compiled alone
        made = dataclasses.replace(made, capture=False)
    return small(made)


def of_text(case: str) -> tuple[Settings, TrainingData]:
    """Of a case of OF_TEXT."""
    memory, source = OF_TEXT[case]
    settings = small(dataclasses.replace(CODE, memory=SIZES[memory], compile=DEVICE == "cuda"))
    return settings, training_data(source, settings.batch)


def small(made: Settings) -> Settings:
    """The same, or at toy size a model of its kind that a CPU trains at once."""
    if TOY:
        sizes = {"batch": 2, "segment": 16, "width": 16, "head_width": 8, "xl": made.xl and 16, "compile": False}
        made = dataclasses.replace(made, **sizes, memory=min(made.memory, 32))
    return made


def text(batch: int) -> TrainingData:
    """The standard library's sources as one long document a row: no memory is ever cleared."""
    content = torch.cat([document.content for document in load_corpus("stdlib").train])
    documents = [Document(str(row), part) for row, part in enumerate(content.chunk(batch))]
    return TrainingData(Shuffled(documents, seed=0), documents[:1], "benchmark")


def full_trainer(settings: Settings, ranks: Ranks = ALONE) -> Trainer:
    """A trainer whose memories are full and have wrapped, with what the model itself made of text: the steps that are
    timed search keys as real models hold them."""
    trainer = Trainer(settings, text(settings.batch), pick_device(DEVICE, ranks), ranks)
    to_wrap = -(-settings.memory // (settings.segment * settings.segments * settings.accumulate)) + 2
    for _ in range(LEARNT if settings.compile else to_wrap):
        trainer.advance()
    assert all((memory.lengths == settings.memory).all() for memory in trainer.reader.memories)
    return trainer


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(
    benchmark: Any, function: Callable[[], None], tokens: int, trainer: Trainer | None = None, **entry: Any
) -> None:
    """Writes down the median of the rounds; `tokens` are read by one call of `function`, which is the trainer's."""
    seconds: list[float] = []

    def once() -> None:
        synchronize()
        begin = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - begin)

    benchmark.pedantic(once, rounds=ROUNDS)
    median = sorted(seconds)[len(seconds) // 2]
    benchmark.extra_info.update(op="train", mode="step", **entry, **environment(), tokens_per_second=tokens / median)
    share = peak_share(trainer, tokens / median)
    write_down({**benchmark.extra_info, **share, "ms": median * 1e3})


def peak_share(trainer: Trainer | None, tokens_per_second: float) -> dict[str, float]:
    """`peak_share` of an entry, and what it is counted from; nothing where no peak is known.

    That of an older tree, which is measured beside this one, does not know it.
    """
    share = trainer.peak_share(tokens_per_second) if hasattr(trainer, "peak_share") else None
    return {} if share is None else {"flop_per_token": trainer.flop_per_token, "peak_share": share}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_train(benchmark: Any, case: str, impl: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    settings = settings_of(case, compiled=impl == "memtrans", replayed=impl != "memtrans-launched")
    time_steps(benchmark, full_trainer(settings), WARM_UP, impl=impl, case=case)


@pytest.mark.parametrize("case", OF_TEXT)
def test_train_on_a_text(benchmark: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training costs where the memories hold keys of the model itself, after LEARNT steps.

    `-triton` is without the CUDA module, as every GPU but a Hopper trains.
    """
    if case.endswith("-triton") and DEVICE == "cuda":
        monkeypatch.setenv("MEMTRANS_BACKEND", "triton")
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    settings, data = of_text(case)
    trainer = Trainer(settings, data, pick_device(DEVICE, ALONE))
    time_steps(benchmark, trainer, LEARNT, impl="memtrans", case=case, data_sha256=data.fingerprint)
    assert all((memory.lengths == settings.memory).all() for memory in trainer.reader.memories)


def time_steps(benchmark: Any, trainer: Trainer, warm_up: int, **labels: Any) -> None:
    """Times STEPS steps after some others, and writes the entry down."""

    def steps(count: int = STEPS) -> None:
        for _ in range(count):
            trainer.advance()

    settings = trainer.settings
    steps(warm_up)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
    busy = busy_share(lambda: steps(5))
    per_step = settings.batch * settings.segment * settings.segments * settings.accumulate
    timed(benchmark, steps, STEPS * per_step, trainer, dtype=settings.dtype, gpu_busy=busy, peak_bytes=peak, **labels)
    trainer.check()  # every loss was finite


@pytest.mark.rival
@pytest.mark.skipif(DEVICE == "cpu" or not find_spec("memorizing_transformers_pytorch"), reason="upstream is not here")
def test_upstream(benchmark: Any, tmp_path: Any, monkeypatch: Any) -> None:
    from memorizing_transformers_pytorch import MemorizingTransformer

    monkeypatch.chdir(tmp_path)  # its memories are files in the working directory
    batch, segments, segment = 16, 5, 512
    model = MemorizingTransformer(
        num_tokens=256,
        dim=512,
        depth=8,
        memorizing_layers=4,
        max_knn_memories=segment * 15,
        num_retrieved_memories=32,
        xl_memory_layers=(7, 8),
        xl_max_memories=512,
    ).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)

    def window() -> None:
        tokens = torch.randint(0, 256, (batch, segments * segment + 1), device=DEVICE)
        xl_memories = None
        with model.knn_memories_context(batch_size=batch) as memories:
            for part in range(segments):
                here = tokens[:, part * segment : (part + 1) * segment + 1]
                loss, xl_memories = model(
                    here[:, :-1], knn_memories=memories, xl_memories=xl_memories, labels=here[:, 1:].contiguous()
                )
                (loss / segments).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    window()
    timed(benchmark, window, batch * segments * segment, impl="upstream", case="enwik8-7680", dtype="float32")
