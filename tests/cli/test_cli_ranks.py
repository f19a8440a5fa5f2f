"""The command line on several ranks: one prints, all end well or with a message, and a killed run goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_runs
from helpers.processes import ended, started

from memtrans.cli import main as cli
from memtrans.cli.main import main
from memtrans.distributed.ranks import Ranks
from memtrans.training.checkpoint import exists, load_checkpoint
from memtrans.training.metrics import Metrics
from memtrans.training.run import checkpoint_of

pytestmark = pytest.mark.cpu

TINY = [*tiny_runs.TINY, "--batch", "4"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    return tiny_runs.uneven_documents(tmp_path / "text")


def test_the_first_rank_alone_prints_and_writes_and_all_end_well(text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = ended(started(2, "train", "--data", text, "--out", str(out), "--steps", "4", *TINY))
    assert (first[0], second[0]) == (0, 0), (first, second)
    report = json.loads(first[1].splitlines()[-1])
    assert (report["steps"], report["ranks"], report["tokens"]) == (4, 2, 512)
    assert second[1] == ""
    lines = Metrics(out / "metrics.jsonl").read()
    assert [line["step"] for line in lines] == [4, 4]
    assert (out / "loss.png").exists()
    assert load_checkpoint(checkpoint_of(out)).values["step"] == 4


def test_a_rank_that_alone_has_too_little_memory_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def second() -> Iterator[Ranks]:
        yield Ranks(1, 2)

    def exhausted(*arguments: Any) -> int:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(cli, "joined", second)
    monkeypatch.setattr(cli, "_train_on", exhausted)
    assert main(["train"]) == 1
    assert "memtrans train: the device has too little memory for these sizes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_ranks_end_with_the_status_that_they_mean(text: str, tmp_path: Path, attempt: int) -> None:
    """Not with that of an abort in a thread that outlived its group, which came in one of a few attempts."""
    arguments = ("train", "--data", text, "--out", str(tmp_path / "run"), "--steps", "2", *TINY)
    refused = ended(started(3, *arguments))
    assert [status for status, _, _ in refused] == [2, 2, 2], refused
    message = "memtrans train: batch must be a multiple of the 3 ranks that share it, got 4 (on rank 0)\n"
    assert [error for _, _, error in refused] == [message, "", ""]
    done = ended(started(2, *arguments, "--fsdp"))
    assert [status for status, _, _ in done] == [0, 0], done


@pytest.mark.slow
def test_ranks_that_were_given_different_options_end_with_one_line(text: str, tmp_path: Path) -> None:
    arguments = ("train", "--data", text, "--out", str(tmp_path / "run"), "--steps", "4", *TINY)
    first, second = ended(started(2, *arguments, rank1=("--width", "32")))
    assert (first[0], second[0]) == (2, 2)
    assert first[2] == ("memtrans train: width must be the same on every rank, got 16 on rank 0 and 32 on rank 1\n"), (
        first[2]
    )
    assert second[2] == ""


@pytest.mark.slow
def test_when_a_rank_is_killed_the_others_end_with_a_message_and_the_run_goes_on_from_its_checkpoint(
    text: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ("train", "--data", text, "--out", str(out), *TINY, "--steps", "100000", "--checkpoint-every", "20")
    processes = started(2, *arguments)
    deadline = time.monotonic() + 120
    while not (exists(checkpoint_of(out)) and load_checkpoint(checkpoint_of(out)).values["step"] >= 20):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    first, _ = ended(processes)
    assert time.monotonic() - killed < 60
    assert first[0] == 1
    assert "memtrans train: rank 0 of 2 lost another one, which ended" in first[2]
    assert "--resume goes on from there" in first[2]
    step = load_checkpoint(checkpoint_of(out)).values["step"]
    resumed = ended(started(2, "train", "--out", str(out), "--resume", "--steps", str(step + 3), "--plain"))
    assert [status for status, _, _ in resumed] == [0, 0]
    assert load_checkpoint(checkpoint_of(out)).values["step"] == step + 3


@pytest.mark.slow
def test_a_rank_that_stops_answering_is_lost_after_a_time(text: str, tmp_path: Path) -> None:
    arguments = ("train", "--data", text, "--out", str(tmp_path / "run"), *TINY, "--steps", "100000")
    processes = started(2, *arguments)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.2)
    time.sleep(2)
    processes[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        _, error = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 1
    assert 50 < time.monotonic() - stopped < 70
    assert "rank 0 of 2 lost another one, which ended, or was silent for too long" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message", "status"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_to_one_rank_stops_all_of_them_after_a_checkpoint(
    text: str, tmp_path: Path, number: int, message: str, status: int
) -> None:
    out = tmp_path / "run"
    processes = started(2, "train", "--data", text, "--out", str(out), *TINY, "--steps", "100000")
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.2)
    processes[1].send_signal(number)
    first, second = ended(processes)
    assert (first[0], second[0]) == (status, status), (first, second)
    step = load_checkpoint(checkpoint_of(out)).values["step"]
    assert (
        first[2]
        == f"memtrans train: stopped by {message}; step {step} is saved, --resume --out {out} goes on from there\n"
    )
    assert step > 0


@pytest.mark.slow
def test_a_rank_that_hears_sigterm_while_it_waits_for_one_that_is_gone_ends_too(text: str, tmp_path: Path) -> None:
    """As `torchrun` does it: once a rank has failed, it sends the others SIGTERM."""
    out = tmp_path / "run"
    processes = started(2, "train", "--data", text, "--out", str(out), *TINY, "--steps", "100000")
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    processes[0].send_signal(signal.SIGTERM)
    first, _ = ended(processes, 30)
    assert first[0] == 1
    assert "rank 0 of 2 lost another one, which ended" in first[2]


@pytest.mark.slow
def test_torchrun_starts_a_run(text: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "memtrans"]
    arguments = ("train", "--data", text, "--out", str(tmp_path / "run"), "--steps", "3", *TINY)
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ranks"] == 2
