"""On two GPUs over NCCL: a memory spread over them is one memory, and a run of two ranks is the run of one process."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.checks import ATTENTION, FIRST_STEPS, SAME_CURVE, SAME_SUMS, assert_close
from helpers.hard_keys import KINDS, hard_keys, queries_near
from helpers.processes import Processes, ended, started
from torch import Tensor

from memtrans import KNNAttention, KNNMemory
from memtrans.distributed import gradient_sum
from memtrans.distributed.ranks import ALONE, Ranks
from memtrans.training.checkpoint import exists, load_checkpoint
from memtrans.training.data import open_data
from memtrans.training.directory import checkpoint_of
from memtrans.training.metrics import Metrics
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

BATCH, CAPACITY, SEGMENT, WIDTH, HEADS, NEIGHBOURS = 3, 1500, 256, 64, 4, 32
RUN = (
    *("train", "--device", "cuda", "--plain", "--batch", "4", "--segment", "64", "--layers", "2", "--width", "64"),
    *("--heads", "2", "--head-width", "32", "--memory", "256", "--neighbours", "8", "--xl", "32", "--warmup", "5"),
    *("--eval-bytes", "2000", "--sample", "0", "--log-every", "1", "--dtype", "float32", "--final-rate", "1"),
)
ENOUGH = 300  # seconds for processes that compile


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2, "cuda")
    yield processes
    processes.close()


def drawn(seed: int, *shape: int) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed))


def memories(kv_heads: int, dtype: torch.dtype = torch.float16) -> tuple[KNNMemory, KNNMemory]:
    """One spread over the ranks, and one for this process alone."""
    arguments: dict[str, Any] = {"dim": WIDTH, "max_memories": CAPACITY, "num_indices": BATCH, "kv_heads": kv_heads}
    arguments["dtype"] = dtype
    return KNNMemory(process_group=dist.group.WORLD, **arguments), KNNMemory(**arguments)


def whole_numbers(seed: int, *shape: int) -> Tensor:
    """Products and sums are exact in any order, and often equal: one query and many are scored in other ways."""
    return torch.randint(-8, 9, shape, generator=torch.Generator("cuda").manual_seed(seed)).half()


def find(rank: int, kv_heads: int) -> None:
    """Adds, forgets and searches until the memory has wrapped twice."""
    size, (sharded, whole) = dist.get_world_size(), memories(kv_heads)
    heads = () if kv_heads == 1 else (kv_heads,)
    for step in range(8):
        segments = whole_numbers(step, size, BATCH, *heads, SEGMENT, 2, WIDTH)
        sharded.add(segments[rank])
        for segment in segments:  # the order of writes is that of the ranks
            whole.add(segment)
        if step in (2, 6):
            mask = torch.arange(BATCH) == step % BATCH
            sharded.clear_rows(mask if rank == 0 else ~mask & mask)  # one rank's word is enough
            whole.clear_rows(mask)
        for length in (1, 40, 300):
            queries = whole_numbers(100 + rank, BATCH, HEADS, length, WIDTH)
            found, mask = sharded.search(queries, NEIGHBOURS)
            expected, expected_mask = whole.search(queries, NEIGHBOURS)
            assert torch.equal(mask, expected_mask) and mask.any(), step
            wrong = (found != expected).flatten(4).any(dim=-1)  # (B, H, N, K)
            assert not wrong.any(), (step, length, wrong.nonzero()[:5].tolist(), int(wrong.sum()))
    assert sharded.lengths.tolist() == whole.lengths.tolist()


@pytest.mark.parametrize("kv_heads", [1, HEADS])
def test_two_gpus_find_what_one_memory_finds(two: Processes, kv_heads: int) -> None:
    two.run(find, kv_heads)


def find_hard(rank: int, kind: str) -> None:
    """Scores and entries, bit for bit, of keys that stand at other places on two ranks, equal ones among them."""
    arguments: dict[str, Any] = {"dtype": torch.float16, "spare": 1024}
    sharded = KNNMemory(WIDTH, 12_000, process_group=dist.group.WORLD, **arguments)
    whole = KNNMemory(WIDTH, 12_000, **arguments)
    keys = hard_keys(kind, 16 * 2 * 1001, WIDTH, torch.float16)
    for pair in keys.reshape(16, 2, 1, 1001, WIDTH):
        segments = torch.stack((pair, pair), dim=-2)
        sharded.add(segments[rank])
        for segment in segments:
            whole.add(segment)
    queries = queries_near(keys, 2 * 300).reshape(2, 1, 1, 300, WIDTH)[rank]
    scores, entries = sharded.snapshot().nearest(queries, NEIGHBOURS)
    expected, slots = whole.snapshot().nearest(queries, NEIGHBOURS)
    assert torch.equal(scores, expected)
    assert torch.equal(entries, whole.snapshot().entries_in(slots))


@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_find_bit_for_bit_what_one_memory_finds(two: Processes, kind: str) -> None:
    """However hard the queries are on one rank: what is scored again is summed in the same order."""
    two.run(find_hard, kind)


def attended(attention: KNNAttention, x: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    """Result, the gradients of the input and every parameter, and the memory after it."""
    x = x.clone().requires_grad_()
    out, _, *after = attention(x, **arguments)
    leaves = [x, *attention.parameters()]
    return (out.detach(), *torch.autograd.grad(out, leaves, torch.cos(out.detach()), allow_unused=True), *after)


def within(name: str, dtype: torch.dtype) -> float:
    """A float16 memory is searched with queries rounded to it: scale's gradient takes those scores, or the queries."""
    return ATTENTION[dtype] if (name, dtype) == ("scale", torch.float16) else SAME_SUMS


def attend(rank: int, neighbours: int, combine: str, dtype: torch.dtype) -> None:
    """Segment after segment, beside one whole memory that reads the segments of all ranks."""
    size, (sharded, whole) = dist.get_world_size(), memories(1, dtype)
    torch.manual_seed(5)
    attention = KNNAttention(
        dim=64, heads=HEADS, dim_head=WIDTH, num_retrieved_memories=neighbours, combine=combine, memory_offset=-1.0
        if combine == "softmax" else None,
    )  # fmt: skip
    names = ["out", "x", *(name for name, _ in attention.named_parameters())]
    for step in range(8):
        inputs = drawn(step, size, BATCH, SEGMENT, 64)
        got = attended(attention, inputs[rank], knn_memory=sharded)
        snapshot = after = whole.snapshot(like=inputs, longest=size * SEGMENT)
        for other in range(size):
            *expected, after = attended(attention, inputs[other], knn_memory=snapshot, add_to=after, return_memory=True)
            if other == rank:
                for name, mine, theirs in zip(names, got, expected, strict=True):
                    assert (mine is None) == (theirs is None), name
                    if theirs is not None:
                        assert_close(mine, theirs, within(name, dtype), f"step {step}, {name}")
    assert sharded.lengths.tolist() == whole.lengths.tolist() == [CAPACITY] * BATCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("combine", ["softmax", "gate"])
@pytest.mark.parametrize("neighbours", [1, NEIGHBOURS], ids=["the winners travel", "partial results travel"])
def test_attention_and_its_gradients_are_those_of_one_memory(
    two: Processes, neighbours: int, combine: str, dtype: torch.dtype
) -> None:
    two.run(attend, neighbours, combine, dtype)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Documents of different lengths."""
    directory = tmp_path / "text"
    directory.mkdir()
    for number in range(9):
        letters = torch.randint(97, 103, (900 + 570 * number,), generator=torch.Generator("cuda").manual_seed(number))
        (directory / f"{number}.txt").write_bytes(bytes(letters.tolist()))
    return str(directory)


def run(ranks: int, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """What a run that ends well records."""
    results = ended(started(ranks, *RUN, "--out", str(out), *arguments), ENOUGH)
    assert [status for status, _, _ in results] == [0] * ranks, results
    assert json.loads(results[0][1].splitlines()[-1]).get("ranks", 1) == ranks
    return [line for line in Metrics(out / "metrics.jsonl").read() if "bits_per_byte" in line]


@pytest.mark.parametrize("form", [(), ("--fsdp",)], ids=["replayed", "fsdp"])
def test_two_ranks_follow_the_curve_of_one_process_and_one_goes_on_from_two(
    text: str, tmp_path: Path, form: tuple[str, ...]
) -> None:
    alone = run(1, tmp_path / "alone", "--data", text, "--steps", "30")
    two = run(2, tmp_path / "two", "--data", text, "--steps", str(FIRST_STEPS), *form)
    assert [line["tokens"] for line in two] == [line["tokens"] for line in alone][:FIRST_STEPS]
    resumed = tmp_path / "two"
    status, _, error = ended(
        started(1, "train", "--resume", "--out", str(resumed), "--steps", "30", "--no-fsdp"), ENOUGH
    )[0]
    assert status == 0, error
    losses, expected = (
        [line["bits_per_byte"] for line in lines if "bits_per_byte" in line]
        for lines in (Metrics(resumed / "metrics.jsonl").read(), alone)
    )
    assert len(losses) == len(expected) == 30
    first = FIRST_STEPS + 1  # that after resuming included
    assert losses[:first] == pytest.approx(expected[:first], abs=SAME_CURVE)


def losses_in_pieces(rank: int, text: str, piece_bytes: int, shared: bool) -> list[float]:
    """Of a run that replays its steps, on both ranks or on each of them alone."""
    world = dist.group.WORLD
    ranks = Ranks(rank, 2, rank, world, world) if shared else ALONE
    settings = Settings(
        data=text, steps=FIRST_STEPS, batch=4, segment=64, layers=3, width=64, heads=2, head_width=32, memory=256,
        neighbours=8, xl=32, warmup=5, final_rate=1.0, dtype="float32", compile=True, accumulate=2,
    )  # fmt: skip
    with mock.patch.multiple(gradient_sum, PIECE_BYTES=piece_bytes, PART_BYTES=piece_bytes):
        trainer = Trainer(settings, open_data(settings), torch.device("cuda", rank), ranks)
        for _ in range(FIRST_STEPS):
            trainer.advance()
        losses = trainer.check()[:, 0].tolist()
    for act in ranks.farewells:
        act()
    return losses


def test_a_replayed_step_may_exchange_its_gradients_in_many_pieces(two: Processes, text: str) -> None:
    """Some leave while the backward pass runs; layers have 200 KB of parameters."""
    alone, _ = two.run(losses_in_pieces, text, 0, False)
    first, second = two.run(losses_in_pieces, text, 60_000, True)
    assert first == second
    assert first == pytest.approx(alone, abs=SAME_CURVE)


def test_when_a_rank_is_killed_the_other_ends_with_a_message_and_the_run_goes_on(text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = (*RUN, "--data", text, "--out", str(out))
    processes = started(2, *arguments, "--steps", "1000000", "--checkpoint-every", "20")
    deadline = time.monotonic() + ENOUGH
    while not (exists(checkpoint_of(out)) and load_checkpoint(checkpoint_of(out)).values["step"] >= 20):
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    first, _ = ended(processes, 90)
    assert time.monotonic() - killed < 75
    assert first[0] == 1 and "memtrans train: rank 0 of 2 lost another one" in first[2], first
    step = load_checkpoint(checkpoint_of(out)).values["step"]
    resumed = ended(started(2, "train", "--out", str(out), "--resume", "--steps", str(step + 3), "--plain"), ENOUGH)
    assert [status for status, _, _ in resumed] == [0, 0], resumed
