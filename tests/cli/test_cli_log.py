"""`--log tensorboard`: what metrics.jsonl says as curves, with what the memory holds and gets."""

from __future__ import annotations

import sys

import pytest
from helpers.packages import package

from memtrans.cli.main import main
from memtrans.training.events import GROUPS
from tests.helpers.tiny_runs import train, without_times, written_text

OPTIONS = ["--log", "tensorboard", "--log-every", "2", "--eval-every", "4", "--warmup", "2", "--xl", "8"]


class Recorder:
    """Stands for tensorboard's writer."""

    points: dict[str, list[tuple[int, float]]]

    def __init__(self, directory: str, purge_step: int) -> None:
        Recorder.points, Recorder.purged = {}, purge_step

    def add_scalar(self, name: str, value: float, step: int) -> None:
        Recorder.points.setdefault(name, []).append((step, value))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr("memtrans.training.events._library", lambda: Recorder)
    return Recorder


def test_every_number_of_the_record_is_a_curve(tmp_path, recorded):
    assert train(tmp_path / "run", "--data", written_text(tmp_path), "--steps", "8", *OPTIONS) == 0
    lines = without_times(tmp_path / "run")
    reports = [line for line in lines if "bits_per_byte" in line]
    assert [line["step"] for line in reports] == [2, 4, 6, 8]
    for name in ("training/bits_per_byte", "training/learning_rate", "training/gradient_norm", "training/perplexity"):
        assert recorded.points[name] == [(line["step"], line[name.split("/")[1]]) for line in reports]
    assert {name.split("/")[0] for name in recorded.points} == {"training", *GROUPS.values()} - {"recall"}
    assert len(recorded.points["training/tokens_per_second"]) == 4
    assert [step for step, _ in recorded.points["held out/eval_bits_per_byte"]] == [4, 8]


def test_the_memory_fills_and_gets_a_share(tmp_path, recorded):
    assert train(tmp_path / "run", "--data", written_text(tmp_path), "--steps", "8", *OPTIONS) == 0
    fill, share = (dict(recorded.points[f"memory/memory_{name}"]) for name in ("fill", "share"))
    assert fill[2] == (32 - 8) / 64, "a step of 32 tokens, of which the last 8 are in the XL cache"
    assert fill[8] == 1.0
    assert all(0 < value < 1 for value in share.values())


def test_what_is_logged_changes_nothing(tmp_path, recorded):
    text = written_text(tmp_path)
    options = ["--data", text, "--steps", "5", "--dropout", "0.1", *OPTIONS[2:]]
    assert train(tmp_path / "silent", *options) == 0
    assert train(tmp_path / "logged", *options, "--log", "tensorboard") == 0
    logged = [
        {name: value for name, value in line.items() if not name.startswith("memory_")}
        for line in without_times(tmp_path / "logged")
    ]
    assert logged == without_times(tmp_path / "silent")


def test_a_run_that_goes_on_takes_later_points_back(tmp_path, recorded):
    assert train(tmp_path / "run", "--data", written_text(tmp_path), "--steps", "4", *OPTIONS) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "6", "--plain"]) == 0
    assert recorded.purged == 5
    assert [step for step, _ in recorded.points["training/bits_per_byte"]] == [6]


def test_a_missing_library_is_named_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(tmp_path / "run", "--data", written_text(tmp_path), "--steps", "1", *OPTIONS) == 2
    error = capsys.readouterr().err
    assert "log must not be tensorboard without it: pip install 'memtrans[tensorboard]'" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tensorboard_reads_what_was_written(tmp_path):
    accumulator = package("tensorboard.backend.event_processing.event_accumulator")
    assert train(tmp_path / "run", "--data", written_text(tmp_path), "--steps", "4", *OPTIONS) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"training/bits_per_byte", "memory/memory_fill", "memory/memory_share"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("training/gradient_norm")] == [2, 4]
