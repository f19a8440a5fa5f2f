"""Two runs that would write to one directory: the second is refused, whatever it came with; so is what is no run's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.programs import Program
from helpers.tiny_runs import TINY, checkpoint_files, train, written_text

from memtrans.cli.main import main
from memtrans.locks import Lock
from memtrans.training.directory import check_directory, lock, newest

pytestmark = pytest.mark.cpu


@pytest.fixture
def text(tmp_path: Path) -> str:
    return written_text(tmp_path)


@pytest.fixture
def running(tmp_path: Path, text: str) -> Iterator[tuple[Path, Program]]:
    """A run in a process of its own that is past its first steps."""
    out = tmp_path / "run"
    options = ["--out", str(out), "--data", text, *TINY, "--steps", "1000000", "--log-every", "1"]
    process = Program("train", *options)
    assert any(line.startswith("step 3/") for line in process.stdout)
    yield out, process
    process.kill()
    process.communicate()


def test_21_2_a_second_run_is_refused_while_the_first_one_lives_and_goes_on_when_it_was_killed(running, capsys) -> None:
    out, process = running
    before = checkpoint_files(out)
    assert main(["train", "--resume", "--out", str(out), "--plain", "--steps", "3"]) == 2
    expected = f"must be a directory that no other run writes to, got '{out}', where process {process.pid} trains"
    assert capsys.readouterr().err == f"memtrans train: out {expected}\n"
    assert checkpoint_files(out) == before
    process.kill()
    process.wait()
    assert main(["train", "--resume", "--out", str(out), "--plain", "--steps", "3"]) == 0


def test_21_2_a_run_that_begins_meanwhile_is_refused_under_the_lock(tmp_path: Path, text: str) -> None:
    """It saw no checkpoint when it was started, and another run has ended in the directory before it came to write."""
    assert train(tmp_path / "run", "--data", text, "--steps", "1") == 0
    with pytest.raises(ValueError, match="out must be a directory without a checkpoint, or come with --resume"):
        lock(tmp_path / "run", "demo", resume=False)
    Lock(tmp_path / "run").release()  # it is not kept


def test_21_2_a_directory_is_locked_until_it_is_released(tmp_path: Path) -> None:
    first = Lock(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"no other run writes to, got .* where process {os.getpid()} trains"):
        Lock(tmp_path / "run")
    first.release()
    Lock(tmp_path / "run").release()


def test_21_2_runs_without_out_that_start_at_once_take_different_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        locks = list(pool.map(lambda _: lock(None, "demo", False), range(8)))
    assert len({taken.directory for taken in locks}) == 8
    assert newest("demo") == Path("runs/demo-8")
    for taken in locks:
        taken.release()


@pytest.mark.parametrize("name", ["checkpoint/adapter.safetensors", "metrics.jsonl", "loss.png", "retrieved.html"])
def test_files_of_others_that_a_run_would_replace_are_refused(tmp_path: Path, text: str, name: str, capsys) -> None:
    out = tmp_path / "mine"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"step": 1}\n')
    assert train(out, "--data", text, "--steps", "1") == 2
    expected = f"out must hold no {Path(name).parts[0]} but a run's, got '{out}', where no run has begun"
    assert capsys.readouterr().err == f"memtrans train: {expected}\n"
    assert [path for path in out.rglob("*") if path.is_file()] == [out / name]


def test_a_run_may_begin_beside_other_files_and_where_one_was_before_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    lock(tmp_path, "demo", resume=False).release()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    check_directory(tmp_path, resume=False)


def test_a_record_that_is_no_runs_is_refused_wherever_a_run_was(tmp_path: Path, text: str, capsys) -> None:
    Lock(tmp_path).release()
    (tmp_path / "metrics.jsonl").write_text("step,loss\n")
    assert train(tmp_path, "--data", text, "--steps", "1") == 2
    assert "metrics.jsonl must hold a JSON object with a step in each line" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "step,loss\n"


def test_21_2_what_is_refused_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "/no/such/file"]) == 2
    assert not (tmp_path / "runs").exists()
