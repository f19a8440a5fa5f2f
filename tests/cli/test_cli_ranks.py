"""The command line on several ranks: one prints, all end well or with a message, and a killed run goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import tiny_runs
from helpers.processes import ended, started
from helpers.programs import forked

from memtrans.cli import outcome, train
from memtrans.cli.ending import EndedError
from memtrans.cli.main import main
from memtrans.distributed.ranks import LostRankError, Ranks
from memtrans.training.checkpoint import exists, load_checkpoint
from memtrans.training.directory import checkpoint_of
from memtrans.training.metrics import Metrics
from memtrans.training.run import Run
from memtrans.training.signals import StoppedError

pytestmark = pytest.mark.cpu

TINY = [*tiny_runs.TINY, "--batch", "4"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    return tiny_runs.uneven_documents(tmp_path / "text")


def test_the_first_rank_alone_prints_and_writes_and_all_end_well(text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = ended(forked(2, "train", "--data", text, "--out", str(out), "--steps", "4", *TINY))
    assert (first[0], second[0]) == (0, 0), (first, second)
    report = json.loads(first[1].splitlines()[-1])
    assert (report["steps"], report["ranks"], report["tokens"]) == (4, 2, 512)
    assert second[1] == ""
    lines = Metrics(out / "metrics.jsonl").read()
    assert [line["step"] for line in lines] == [4, 4]
    assert (out / "loss.png").exists()
    assert load_checkpoint(checkpoint_of(out)).values["step"] == 4


def test_21_4_eval_and_generate_print_on_the_first_rank_alone(text: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert tiny_runs.train(out, "--data", text, "--steps", "2", "--batch", "4") == 0
    assert main(["eval", "--out", str(out)]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    evaluated, generated = forked(2, "eval", "--out", str(out)), forked(2, "generate", "--checkpoint", str(out))
    first, second = ended(evaluated)
    assert (first[0], second[0], second[1], second[2]) == (0, 0, "", ""), (first, second)
    report = json.loads(first[1])
    assert report.pop("ranks") == 2
    assert report == {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float | dict) else value
        for name, value in alone.items()
    }
    first, second = ended(generated)
    assert first[0] == 0 and first[1]
    assert second == (0, "", "")


@pytest.mark.parametrize("command", [["presets"], ["info"], ["generate", "--checkpoint", "none"]])
def test_21_4_what_ranks_do_not_share_the_first_one_does_alone(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outcome, "launched", lambda: Ranks(1, 2))
    assert main(command) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(outcome, "launched", lambda: Ranks(0, 2))
    assert main(command) == (2 if "none" in command else 0)
    assert any(capsys.readouterr())


STOPPED = StoppedError(signal.SIGTERM)
FAILED = StoppedError(signal.SIGTERM, RuntimeError("no compiler any more"))
ENDINGS = {
    "bad input": (EndedError("no such data", 2), 2, "no such data"),
    "out of memory": (
        torch.OutOfMemoryError("of 1 GB"),
        1,
        "the device has too little memory for these sizes: of 1 GB",
    ),
    "a full disk": (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
    "an early Ctrl-C": (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    "SIGTERM": (STOPPED, 143, "stopped by SIGTERM"),
    "a step that failed after SIGTERM": (FAILED, 143, "(RuntimeError: no compiler any more)"),
    "a lost rank": (LostRankError("rank 1 of 2 lost another one"), 1, "rank 1 of 2 lost another one"),
    "a fault": (KeyError("fault"), 1, "KeyError: 'fault'"),
}
SAID_BY_ALL = ("a step that failed after SIGTERM", "out of memory", "a lost rank", "a fault")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("ending", ENDINGS)
def test_whatever_ends_a_rank_its_process_ends_at_once(
    ending: str, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `end_process`: the interpreter's own end waits for groups and GPUs, which may wait for a rank that is gone."""
    error, status, message = ENDINGS[ending]

    def fail(*_: object) -> None:
        raise error

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(outcome, "launched", lambda: Ranks(rank, 2))
    monkeypatch.setattr(outcome, "joined", nullcontext)
    monkeypatch.setattr(outcome, "end_process", end)
    monkeypatch.setattr(train, "run", fail)
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == status
    printed = capsys.readouterr().err
    assert (message in printed) == (rank == 0 or ending in SAID_BY_ALL)
    assert printed.count("\n") <= 1 or ending == "a fault"


@pytest.mark.parametrize(("stopped", "by_all"), [(STOPPED, False), (FAILED, True), (KeyboardInterrupt(), False)])
def test_a_rank_whose_step_failed_after_a_signal_says_so_itself(stopped: KeyboardInterrupt, by_all: bool) -> None:
    """The first one knows of the signal alone, which is what the others then say nothing of."""

    class StoppedRun:
        saved_step, out = 7, Path("runs/book")

        def train(self) -> dict[str, object]:
            raise stopped

    with pytest.raises(EndedError, match=r"; step 7 is saved, --resume --out runs.book goes on from there$") as ended:
        train._trained(cast(Run, StoppedRun()))
    assert ended.value.everywhere == by_all


@pytest.mark.slow
def test_ranks_that_cannot_write_end_with_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # of a run
    (tmp_path / "run" / "checkpoint").touch()  # in the way of a directory
    first, second = ended(started(2, "train", "--data", text, "--out", str(tmp_path / "run"), "--steps", "4", *TINY))
    assert first[0] == second[0] == 1, (first, second)
    assert f"memtrans train: writing to {tmp_path / 'run'} failed: " in first[2]
    assert "no checkpoint is saved yet" in first[2]


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
