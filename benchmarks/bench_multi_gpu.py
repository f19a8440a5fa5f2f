"""Several GPUs of one host: data-parallel training, and search of a memory that is sharded over them.

Cases end with the number of GPUs. `ddp-paper-64k-*` is a training step of `bench_train`'s paper-64k with 16 documents
on each GPU; its entries add the time of the exchange of all gradients alone. `sharded-*-64k-*` is a search of 64K
entries a GPU, for the same 65,536 queries in all: twice the memory on two GPUs, and the same work for each. `ms` is
that of a replayed CUDA graph, as in a training step; `eager_ms` that of a search which the host launches.

Each case runs in processes of its own, which torchrun starts: `torchrun --nproc-per-node=2 bench_multi_gpu.py CASE
FILE` is what the test calls.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bench_train import full_trainer, peak_share, settings_of, synchronize
from common import DEVICE, TOY, case, dtype_name, environment, write_down

from memtrans import KNNMemory
from memtrans.cuda_graph import Replay
from memtrans.distributed.gradient_sum import GradientSum
from memtrans.distributed.ranks import Ranks, end_process, joined
from memtrans.training.device import pick_device

SHAPES = ("ddp-paper-64k", "sharded-d64-64k", "sharded-paper-64k")
CASES = [f"{shape}-2" for shape in SHAPES[:2]] if TOY else [f"{shape}-{gpus}" for shape in SHAPES for gpus in (1, 2)]
# The search takes longer the more alike queries become, and differently on one GPU and on two (docs/log.md). With this
# learning rate the model stays as it is.
UNCHANGING = 1e-12
STEPS, SEARCHES, WARM_UP, ROUNDS = (2, 2, 1, 1) if TOY else (10, 20, 6, 7)


@pytest.mark.parametrize("name", CASES)
def test_multi_gpu(benchmark: Any, name: str, tmp_path: Path) -> None:
    gpus = int(name.rsplit("-", 1)[1])
    if DEVICE == "cpu" and not TOY:
        pytest.skip("measures GPUs")
    if DEVICE == "cuda" and torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    command = [*launcher, __file__, name, str(tmp_path / "entry.json")]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, timeout=1200), rounds=1)
    entry = json.loads((tmp_path / "entry.json").read_text())
    benchmark.extra_info.update(entry)
    write_down(entry)


# ------------------------------------------------------------------------------------------------- in each process


def milliseconds(function: Callable[[], Any], calls: int, ranks: Ranks) -> float:
    """Of one call among several on end; the median of rounds that all ranks begin together."""
    seconds = []
    for _ in range(WARM_UP):
        function()
    for _ in range(ROUNDS):
        synchronize()
        ranks.gather(None)
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) / calls * 1e3


def train(ranks: Ranks) -> dict[str, Any]:
    """A step of all GPUs, and the exchange of the gradients by itself, which a step hides behind its backward pass."""
    settings = settings_of("paper-64k", compiled=True)
    settings = dataclasses.replace(settings, batch=settings.batch * ranks.size, learning_rate=UNCHANGING)
    trainer = full_trainer(settings, ranks)
    step = milliseconds(trainer.advance, STEPS, ranks)
    trainer.check()
    tokens = settings.batch * settings.segment * settings.segments * settings.accumulate
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sums, total = GradientSum(trainer.model.parameters(), ranks), torch.zeros((), device=trainer.device)
    exchange = milliseconds(lambda: (sums.begin(total), sums.finish()), STEPS, ranks) if ranks.size > 1 else 0.0
    return {
        "mode": "step",
        "dtype": settings.dtype,
        "ms": step,
        "tokens_per_second": tokens / step * 1e3,
        **peak_share(trainer, tokens / step * 1e3),
        "gradient_bytes": 4 * trainer.parameters,
        "exchange_ms": exchange,
    }


def search(name: str, ranks: Ranks) -> dict[str, Any]:
    """65,536 queries in all, over a memory that is full and has wrapped: random keys of unit length."""
    sizes = case(name)
    device, dtype = pick_device(DEVICE, ranks), torch.float16 if DEVICE == "cuda" else torch.float32
    group = dist.group.WORLD if ranks.size > 1 else None
    memory = KNNMemory(
        sizes.width, sizes.capacity * ranks.size, sizes.batch, kv_heads=sizes.groups, dtype=dtype, device=device,
        spare=sizes.spare, process_group=group,
    )  # fmt: skip
    heads = () if sizes.groups == 1 else (sizes.groups,)
    for _ in range(sizes.capacity // sizes.spare + 2):
        pairs = torch.randn(sizes.batch, *heads, sizes.spare, 2, sizes.width, dtype=dtype, device=device)
        memory.add(pairs / pairs.norm(dim=-1, keepdim=True))
    query = torch.randn(sizes.batch, sizes.heads, sizes.length // ranks.size, sizes.width, dtype=dtype, device=device)
    query /= query.norm(dim=-1, keepdim=True)
    snapshot = memory.snapshot()

    def search_once() -> None:
        snapshot.nearest(query, sizes.neighbours)

    launched = milliseconds(search_once, SEARCHES, ranks)
    replay = Replay(search_once, device)
    ranks.before_leaving(replay.release)
    replayed = milliseconds(replay, SEARCHES, ranks)
    queries = query[..., 0].numel() * ranks.size
    received = (ranks.size - 1) * (sizes.width * query.element_size() + 8 * sizes.neighbours)
    return {
        "mode": "forward",
        "dtype": dtype_name(dtype),
        "ms": replayed,
        "eager_ms": launched,
        "queries": queries,
        "query_bytes": received,
    }


def main(name: str, path: str) -> None:
    shape = name.rsplit("-", 1)[0]
    with joined() as ranks:
        if DEVICE == "cuda":
            torch.cuda.set_device(pick_device(DEVICE, ranks))
        measured = train(ranks) if shape.startswith("ddp-") else search(shape.removeprefix("sharded-"), ranks)
        labels = {"op": "multi_gpu", "impl": "memtrans", "case": name, "ranks": ranks.size}
        if ranks.first:
            Path(path).write_text(json.dumps({**labels, **environment(), **measured}))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process(0)
