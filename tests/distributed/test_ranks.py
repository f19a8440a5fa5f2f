"""A run of several ranks is the run of one process: the same curve, the same checkpoint, and it ends with a message."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.checks import FIRST_STEPS, SAME_SUMS, assert_close
from helpers.processes import Processes
from helpers.tiny_runs import uneven_documents

from memtrans import cross_entropy
from memtrans.cli.main import main
from memtrans.data.documents import Document, InOrder
from memtrans.data.stream import DocumentStream
from memtrans.distributed.ranks import ALONE, Ranks, joined
from memtrans.training.checkpoint import load_checkpoint, save_checkpoint
from memtrans.training.data import open_data
from memtrans.training.evaluate import evaluate_both
from memtrans.training.gaining import gaining
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer, check_shares

pytestmark = pytest.mark.cpu

SMALL = Settings(
    steps=30, batch=4, segment=32, layers=2, width=16, heads=2, head_width=8, memory=64, neighbours=4, warmup=2,
    xl=8, xl_layers=(2,), eval_bytes=2000, learning_rate=3e-3,
)  # fmt: skip
VARIANTS = {
    "plain": SMALL,
    "fsdp": dataclasses.replace(SMALL, fsdp=True),
    "several backward passes of several segments": dataclasses.replace(SMALL, accumulate=2, segments=2, kv_heads=2),
    "several backward passes, fsdp": dataclasses.replace(
        SMALL, accumulate=2, segments=2, fsdp=True, skip_nonfinite=True
    ),
    "recall": dataclasses.replace(SMALL, data="recall"),
    "adafactor": dataclasses.replace(SMALL, optimizer="adafactor", clip=None),
    "muon": dataclasses.replace(SMALL, optimizer="muon"),
    "compiled": dataclasses.replace(SMALL, compile=True, steps=6),
}
FAST = ("plain", "fsdp")


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    processes = Processes(4)
    yield processes
    processes.close()


@pytest.fixture
def text(tmp_path: Path) -> str:
    return uneven_documents(tmp_path / "text")


def ranks_of(rank: int) -> Ranks:
    world = dist.group.WORLD
    return Ranks(rank, dist.get_world_size(), rank, world, world)


def trained(settings: Settings, ranks: Ranks, directory: str | None, stop: int | None) -> dict[str, Any]:
    """A run from its beginning, or from the checkpoint in the directory; writes one there where it stops early."""
    trainer = Trainer(settings, open_data(settings), torch.device("cpu"), ranks)
    if directory is not None and stop is None:
        trainer.restore(load_checkpoint(directory, trainer.wants))
    while trainer.step < (stop or settings.steps):
        trainer.advance()
    losses = trainer.check()
    if directory is not None and stop is not None:
        save_checkpoint(directory, *trainer.state(), ranks)
    lengths = [memory.lengths.tolist() for memory in trainer.reader.memories]
    evaluation = evaluate_both(
        trainer.model, trainer.data.held_out, settings.batch, settings.segment, settings.eval_bytes, ranks=ranks
    )
    return {"losses": losses, "lengths": lengths, "tokens": trainer.tokens, "evaluation": evaluation}


def trained_by_rank(rank: int, settings: Settings, directory: str | None = None, stop: int | None = None) -> Any:
    return trained(settings, ranks_of(rank), directory, stop)


def trained_alone(settings: Settings, directory: str | None = None, stop: int | None = None) -> Any:
    settings = dataclasses.replace(settings, fsdp=False)
    return trained(settings, ALONE, directory, stop)


def trained_in_chunks(rank: int, settings: Settings) -> Any:
    """As for a vocabulary so large that no rank holds all logits of a segment."""
    with mock.patch.multiple(cross_entropy, MOST_LOGITS=0, CHUNK_LOGITS=7 * settings.vocabulary):
        return trained_by_rank(rank, settings)


def assert_same_evaluation(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=10 * SAME_SUMS), name


def assert_same_run(results: list[dict[str, Any]], alone: dict[str, Any], steps: int = FIRST_STEPS) -> None:
    for result in results:
        assert torch.equal(result["losses"], results[0]["losses"])  # bit for bit: no rank drifts away
        assert_close(result["losses"][:steps], alone["losses"][:steps], SAME_SUMS, "losses and norms")
        assert result["tokens"] == alone["tokens"]
        assert_same_evaluation(result["evaluation"], alone["evaluation"])
    for layer, lengths in enumerate(alone["lengths"]):
        assert [length for result in results for length in result["lengths"][layer]] == lengths


# ---------------------------------------------------------------------------------------------------- the same curve


@pytest.mark.parametrize("variant", FAST)
def test_two_ranks_follow_the_curve_of_one_process(two: Processes, text: str, variant: str) -> None:
    settings = dataclasses.replace(VARIANTS[variant], data=text)
    assert_same_run(two.run(trained_by_rank, settings), trained_alone(settings))


@pytest.mark.parametrize("variant", ["fsdp", pytest.param("compiled", marks=pytest.mark.slow)])
def test_two_ranks_follow_it_when_logits_come_in_chunks(two: Processes, text: str, variant: str) -> None:
    settings = dataclasses.replace(VARIANTS[variant], data=text, steps=6)
    assert_same_run(two.run(trained_in_chunks, settings), trained_alone(settings))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in FAST])
def test_two_ranks_follow_it_with_every_setting(two: Processes, text: str, variant: str) -> None:
    settings = VARIANTS[variant]
    settings = settings if settings.data == "recall" else dataclasses.replace(settings, data=text)
    assert_same_run(two.run(trained_by_rank, settings), trained_alone(settings))


@pytest.mark.parametrize("variant", ["plain", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_four_ranks_follow_it_too(four: Processes, text: str, variant: str) -> None:
    settings = dataclasses.replace(VARIANTS[variant], data=text)
    assert_same_run(four.run(trained_by_rank, settings), trained_alone(settings))


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("variant", FAST)
def test_a_run_goes_on_with_another_number_of_ranks(two: Processes, text: str, tmp_path: Path, variant: str) -> None:
    settings = dataclasses.replace(VARIANTS[variant], data=text, steps=20)
    through, directory = trained_alone(settings), str(tmp_path / "checkpoint")
    two.run(trained_by_rank, settings, directory, 9)
    assert_same_run([trained_alone(settings, directory)], through)  # the losses before the stop were saved with it
    trained_alone(settings, directory, 9)
    assert_same_run(two.run(trained_by_rank, settings, directory), through)


@pytest.mark.parametrize("variant", [pytest.param("plain", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_give_a_memory_to_a_run_that_had_none(
    two: Processes, text: str, tmp_path: Path, variant: str
) -> None:
    plain = dataclasses.replace(VARIANTS[variant], data=text, memory=0, memory_offset=-2.0, steps=12)
    directory = str(tmp_path / "checkpoint")
    trained_alone(plain, directory, 9)
    settings = dataclasses.replace(plain, memory=64, **gaining(plain.to_json()))
    alone = trained_alone(settings, directory)
    for result in two.run(trained_by_rank, settings, directory):
        assert_close(result["losses"], alone["losses"], SAME_SUMS, "losses and norms")
        assert result["tokens"] == alone["tokens"]


@pytest.mark.slow
def test_four_ranks_go_on_where_two_stopped_and_two_where_four_did(
    two: Processes, four: Processes, text: str, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SMALL, data=text, steps=20)
    through, directory = trained_alone(settings), str(tmp_path / "checkpoint")
    two.run(trained_by_rank, settings, directory, 9)
    assert_same_run(four.run(trained_by_rank, settings, directory), through)
    four.run(trained_by_rank, settings, directory, 9)
    assert_same_run(two.run(trained_by_rank, settings, directory), through)


def saved_again(rank: int, settings: Settings, directory: str, again: str) -> None:
    """What a resumed run writes before its first step."""
    ranks = ranks_of(rank)
    trainer = Trainer(settings, open_data(settings), torch.device("cpu"), ranks)
    trainer.restore(load_checkpoint(directory, trainer.wants))
    save_checkpoint(again, *trainer.state(), ranks)


@pytest.mark.parametrize("variant", FAST)
def test_a_resumed_run_saves_what_it_has_just_read(two: Processes, text: str, tmp_path: Path, variant: str) -> None:
    settings = dataclasses.replace(VARIANTS[variant], data=text, steps=4)
    directory, again = str(tmp_path / "checkpoint"), str(tmp_path / "again")
    trained_alone(settings, directory, 3)
    two.run(saved_again, settings, directory, again)
    before, after = load_checkpoint(directory).parts, load_checkpoint(again).parts
    for part in ("model", "optimizer"):
        assert set(after[part]) == set(before[part])
        for name, tensor in before[part].items():
            assert torch.equal(after[part][name], tensor), name


def test_the_same_number_of_ranks_goes_on_bit_for_bit_dropout_included(
    two: Processes, text: str, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SMALL, data=text, steps=14, dropout=0.2)
    through = two.run(trained_by_rank, settings)
    two.run(trained_by_rank, settings, str(tmp_path / "checkpoint"), 9)
    resumed = two.run(trained_by_rank, settings, str(tmp_path / "checkpoint"))
    assert torch.equal(resumed[0]["losses"], through[0]["losses"])


# --------------------------------------------------------------------------------------------------- rows and errors


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_rows_of_all_ranks_are_those_of_a_whole_stream(size: int) -> None:
    documents = [Document.of(str(number), bytes(range(2, 4 + 7 * number))) for number in range(1, 9)]
    whole = DocumentStream(InOrder(documents), batch=5, segment=4)
    streams = [DocumentStream(InOrder(documents), 5, 4, Ranks(rank, size).rows(5)) for rank in range(size)]
    for batch in whole:
        parts = [stream.next() for stream in streams]
        assert all((part.scored, part.real) == (batch.scored, batch.real) for part in parts)
        for name in ("tokens", "labels", "lengths", "fresh"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name
        assert all(stream.state_dict() == whole.state_dict() for stream in streams)
    assert all(stream.next() is None for stream in streams)


def test_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 ranks that share it, got 4"):
        check_shares(SMALL, Ranks(0, 3))


def test_fsdp_needs_several_processes_and_no_compiler() -> None:
    with pytest.raises(ValueError, match="fsdp must be off with one process"):
        check_shares(VARIANTS["fsdp"], ALONE)
    for name in ("compile", "capture"):
        with pytest.raises(ValueError, match=f"{name} must be off with fsdp"):
            dataclasses.replace(SMALL, fsdp=True, **{name: True})
    for other in ("adafactor", "muon"):
        with pytest.raises(ValueError, match=f"optimizer must be adamw with fsdp, got '{other}'"):
            dataclasses.replace(SMALL, fsdp=True, optimizer=other)


def disagreeing(rank: int) -> list[str]:
    """What each rank raises when they differ, when one fails, and when they are on different devices."""
    ranks, raised = ranks_of(rank), []

    def failing() -> None:
        if rank == 1:
            raise FileNotFoundError("data must exist")

    for call in (lambda: ranks.agree(batch=4, device="cpu" if rank else "cuda"), lambda: ranks.together(failing)):
        try:
            call()
        except (ValueError, OSError) as error:
            raised.append(f"{type(error).__name__}: {error}")
    assert (ranks.largest(15 * rank), ranks.largest(0)) == (15 * (ranks.size - 1), 0)
    return raised


def test_what_one_rank_cannot_do_or_is_told_otherwise_all_of_them_say(two: Processes) -> None:
    expected = [
        "ValueError: device must be the same on every rank, got 'cuda' on rank 0 and 'cpu' on rank 1",
        "FileNotFoundError: data must exist (on rank 1)",
    ]
    assert two.run(disagreeing) == [expected, expected]


# ---------------------------------------------------------------------------------------------------------- torchrun


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE must be a number at least 1, as torchrun sets it, got 'two'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be a number at least 1, as torchrun sets it, got '0'"),
        ("RANK", None, "RANK must be a number in [0, 2), as torchrun sets it, got ''"),
        ("RANK", "2", "RANK must be a number in [0, 2), as torchrun sets it, got '2'"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK must be a number at least 0, as torchrun sets it, got '-1'"),
        ("MASTER_ADDR", None, "MASTER_ADDR must name the host of rank 0, as torchrun sets it, got ''"),
        ("MASTER_PORT", None, "MASTER_PORT must be a number in [0, 65536), as torchrun sets it, got ''"),
    ],
)
def test_variables_that_torchrun_would_not_set_end_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str | None, message: str
) -> None:
    for variable, text in {**LAUNCHED, name: value}.items():
        monkeypatch.setenv(variable, text) if text is not None else monkeypatch.delenv(variable, raising=False)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == f"memtrans train: {message}\n"


def test_captured_graphs_are_let_go_before_the_groups_that_they_exchange_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, text in LAUNCHED.items():
        monkeypatch.setenv(variable, text)
    said: list[str] = []
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *arguments, name=name, **options: said.append(name))
    with joined() as ranks:
        ranks.before_leaving(lambda: said.append("graph"))
    assert said[-2:] == ["graph", "destroy_process_group"]  # NCCL waits for the graph otherwise, and for ever
    ALONE.before_leaving(lambda: said.append("kept"))
    assert not ALONE.farewells
