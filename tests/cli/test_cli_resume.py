"""How a run of the command line stops and goes on: after a signal, a kill, a full disk, a loss that is not finite."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.devices import threads
from helpers.programs import Program
from helpers.tiny_runs import TINY, checkpoint_files, last_line, train, without_times, written_text

from memtrans.cli.main import main
from memtrans.training.checkpoint import load_checkpoint


@pytest.fixture
def text(tmp_path) -> str:
    return written_text(tmp_path)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_byte(tmp_path, text, monkeypatch):
    """The checkpoint is at step 4, the lines up to step 7: those after it are cut and written again."""
    options = ["--data", text, "--checkpoint-every", "4", "--log-every", "1", "--eval-every", "3", "--xl", "8"]
    assert train(tmp_path / "through", *options, "--steps", "10") == 0

    from memtrans.training import trainer as train_module

    advance = train_module.Trainer.advance

    def stop_at_seven(trainer):
        if trainer.step == 7:
            raise SystemExit
        advance(trainer)

    monkeypatch.setattr(train_module.Trainer, "advance", stop_at_seven)
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", *options, "--steps", "10")
    monkeypatch.undo()
    assert [line["step"] for line in without_times(tmp_path / "stopped")][-1] == 7
    assert main(["train", "--resume", "--out", str(tmp_path / "stopped"), "--plain"]) == 0
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "through")
    assert checkpoint_files(tmp_path / "stopped") == checkpoint_files(tmp_path / "through")


def test_the_evaluation_at_a_runs_end_stays_in_its_record_when_it_goes_on(tmp_path, text):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "3") == 0
    (at_end,) = (line for line in without_times(out) if "eval_bits_per_byte" in line)
    assert main(["train", "--resume", "--out", str(out), "--plain", "--steps", "5"]) == 0
    evaluations = [line for line in without_times(out) if "eval_bits_per_byte" in line]
    assert evaluations[0] == at_end
    assert [line["step"] for line in evaluations] == [3, 5]


def test_a_half_written_last_line_of_metrics_is_cut(tmp_path, text):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "3", "--log-every", "1") == 0
    whole = without_times(out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "bits')
    assert main(["train", "--resume", "--out", str(out), "--plain"]) == 0
    assert without_times(out) == whole


def start(out: Path, *options: str) -> Program:
    """A run in a process of its own that is past its first steps."""
    process = Program("train", "--out", str(out), *TINY, *options)
    for line in process.stdout:
        if line.startswith("step 3/"):
            return process
    raise AssertionError(process.communicate()[1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As processes of `start` have: PyTorch's sums depend on the number of threads in their last bits."""
    with threads(1):
        yield


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("number", "message", "status"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_writes_a_checkpoint_and_the_resumed_run_equals_an_uninterrupted_one(
    tmp_path, text, number, message, status
):
    constant = ["--warmup", "0", "--final-rate", "1"]  # a learning rate that knows nothing of the end
    options = ["--data", text, "--steps", "400", "--log-every", "1", *constant]
    out = tmp_path / "run"
    process = start(out, *options)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    step = load_checkpoint(out / "checkpoint").values["step"]
    assert 3 <= step < 400
    assert re.search(f"stopped by {message}; step {step} is saved, --resume", errors)
    assert "Traceback" not in errors

    end = ["--steps", str(step + 3)]
    assert main(["train", "--resume", "--out", str(out), "--plain", *end]) == 0
    assert train(tmp_path / "through", *options, *end) == 0
    assert without_times(out) == without_times(tmp_path / "through")
    assert checkpoint_files(out) == checkpoint_files(tmp_path / "through")


@pytest.mark.parametrize(("steps", "kept"), [(0, "step 0 is saved"), (3, "step 2 is saved")])
def test_a_step_that_fails_by_ctrl_c_is_no_error(tmp_path, text, monkeypatch, capsys, steps, kept):
    """A terminal sends it to the compilers too that the step waits for."""
    from memtrans.training import trainer as train_module

    advance = train_module.Trainer.advance

    def compile_in_vain(trainer):
        if trainer.step == steps:
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("C++ compile error\n\nCommand:\ng++")
        advance(trainer)

    monkeypatch.setattr(train_module.Trainer, "advance", compile_in_vain)
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "5", "--checkpoint-every", "2") == 130
    errors = capsys.readouterr().err
    failed = "in a step that failed (RuntimeError: C++ compile error)"
    assert errors.endswith(
        f"memtrans train: stopped by Ctrl-C {failed}; {kept}, --resume --out {out} goes on from there\n"
    )
    assert "Traceback" not in errors


def test_a_lack_of_memory_is_told_whatever_signal_came_before(tmp_path, text, monkeypatch, capsys):
    from memtrans.training import trainer as train_module

    def ask_for_too_much(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        raise MemoryError("of the host")

    monkeypatch.setattr(train_module.Trainer, "advance", ask_for_too_much)
    assert train(tmp_path / "run", "--data", text, "--steps", "5") == 1
    assert "the device has too little memory for these sizes: of the host" in capsys.readouterr().err


def test_a_step_that_fails_by_itself_is_an_error(tmp_path, text, monkeypatch):
    from memtrans.training import trainer as train_module

    def fail(trainer):
        raise RuntimeError("C++ compile error")

    monkeypatch.setattr(train_module.Trainer, "advance", fail)
    with pytest.raises(RuntimeError, match=r"C\+\+ compile error"):
        train(tmp_path / "run", "--data", text, "--steps", "5")


def test_a_crash_in_native_code_says_where_it_was(tmp_path, text):
    process = start(tmp_path / "run", "--data", text, "--steps", "5000", "--log-every", "1")
    process.send_signal(signal.SIGSEGV)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in errors and "in _loop" in errors


def test_a_killed_run_resumes(tmp_path, text):
    kill_and_resume(tmp_path / "run", text, after=0.11)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.037 * number for number in range(20)])
def test_twenty_killed_runs_resume(tmp_path, text, after):
    kill_and_resume(tmp_path / "run", text, after)


def kill_and_resume(out: Path, text: str, after: float) -> None:
    process = start(out, "--data", text, "--steps", "5000", "--log-every", "1", "--checkpoint-every", "1")
    time.sleep(after)
    process.kill()
    process.communicate(timeout=60)
    step = load_checkpoint(out / "checkpoint").values["step"]
    assert step >= 2
    assert main(["train", "--resume", "--out", str(out), "--plain", "--steps", str(step + 2)]) == 0
    assert [line["step"] for line in without_times(out)] == [*range(1, step + 3), step + 2]


def test_a_resumed_run_refuses_other_settings_and_other_data(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "1") == 0
    assert main(["train", "--resume", "--out", str(out), "--width", "32"]) == 2
    assert "width must be 16, as in the checkpoint to resume, got 32" in capsys.readouterr().err
    Path(text).write_bytes(b"another text altogether " * 90)
    assert main(["train", "--resume", "--out", str(out)]) == 2
    assert "data must be what the checkpoint was trained on" in capsys.readouterr().err


def test_a_resumed_run_finds_its_text_where_it_is_told_and_stays_there(tmp_path, text, capsys):
    out, moved = tmp_path / "run", tmp_path / "moved.md"
    resume = ["train", "--resume", "--out", str(out), "--plain"]
    assert train(out, "--data", text, "--steps", "1") == 0
    Path(text).rename(moved)
    assert main([*resume, "--steps", "2", "--data", str(moved)]) == 0
    assert main([*resume, "--steps", "3"]) == 0
    assert last_line(capsys)["data"] == str(moved)
    (tmp_path / "other.md").write_bytes(moved.read_bytes() + b"and more")
    assert main([*resume, "--steps", "4", "--data", str(tmp_path / "other.md")]) == 2
    assert "data must be what the checkpoint was trained on, got other texts or names" in capsys.readouterr().err


def test_a_resumed_run_may_have_a_larger_memory_but_not_lose_it(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "4") == 0
    assert load_checkpoint(out / "checkpoint").parts["memories"]["0.lengths"].tolist() == [64, 64]
    resume = ["train", "--resume", "--out", str(out), "--plain", "--steps", "6"]
    assert main([*resume, "--memory", "256"]) == 0
    assert load_checkpoint(out / "checkpoint").parts["memories"]["0.lengths"].tolist() == [128, 128]
    capsys.readouterr()
    assert main([*resume, "--memory", "0"]) == 2
    assert "memory must be at least 1, as the run was trained with 256, got 0" in capsys.readouterr().err


def test_a_run_without_a_memory_goes_on_with_one(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "4", "--memory", "0") == 0
    plain = load_checkpoint(out / "checkpoint")
    resume = ["train", "--resume", "--out", str(out), "--plain"]
    assert main([*resume, "--steps", "6", "--memory", "256", "--neighbours", "3", "--width", "32"]) == 2
    assert "width must be 16, as in the checkpoint to resume, got 32" in capsys.readouterr().err
    assert main([*resume, "--steps", "6", "--memory", "256", "--similarity", "cosine"]) == 2
    assert "similarity must be 'product', as in the checkpoint to resume" in capsys.readouterr().err
    as_wanted = ["--memory", "256", "--neighbours", "3", "--memory-layers", "1", "2", "--final-rate", "0"]
    assert main([*resume, "--steps", "6", *as_wanted, "--similarity", "product"]) == 0  # as it is without that
    gained = load_checkpoint(out / "checkpoint")
    assert [gained.parts["memories"][f"{layer}.lengths"].tolist() for layer in range(2)] == [[64, 64]] * 2
    settings, names = gained.values["settings"], ("memory", "neighbours", "similarity", "final_rate", "memory_query")
    assert [settings[name] for name in names] == [256, 3, "product", 0, "own"]
    assert gained.parts["model"]["layers.1.0.fn.memory_mix"].any()
    assert plain.values["settings"]["memory"] == 0
    assert [line["step"] for line in without_times(out)] == [4, 4, 6, 6]
    assert main([*resume, "--steps", "7"]) == 0
    assert main(["eval", "--out", str(out)]) == 0
    assert main([*resume, "--steps", "8", "--final-rate", "0.1"]) == 2  # as of any other run
    assert main([*resume, "--steps", "8", "--memory-query", "shared"]) == 2
    assert "memory_query must be 'own', as in the checkpoint to resume, got 'shared'" in capsys.readouterr().err
    assert main([*resume, "--steps", "8", "--no-capture"]) == 0


def test_a_memory_that_is_gained_may_be_asked_with_the_shared_query(tmp_path, text):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "2", "--memory", "0") == 0
    resume = ["train", "--resume", "--out", str(out), "--plain"]
    assert main([*resume, "--steps", "3", "--memory", "256", "--memory-query", "shared"]) == 0
    assert main([*resume, "--steps", "4"]) == 0
    resumed = load_checkpoint(out / "checkpoint")
    assert resumed.values["settings"]["memory_query"] == "shared"
    assert not any(name.endswith("memory_mix") for name in resumed.parts["model"])


def test_a_foreign_record_is_refused_before_anything_is_written(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "1") == 0
    (out / "metrics.jsonl").write_text("step,loss\n1,8.0\n")
    before = checkpoint_files(out)
    assert main(["train", "--resume", "--out", str(out), "--plain", "--steps", "2"]) == 2
    error = capsys.readouterr().err
    assert "metrics.jsonl must hold a JSON object with a step in each line, got b'step,loss' in 1" in error
    assert checkpoint_files(out) == before
    assert (out / "metrics.jsonl").read_text() == "step,loss\n1,8.0\n"


def test_a_corrupt_checkpoint_is_refused_and_left_as_it_is(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "1") == 0
    (path,) = (out / "checkpoint").glob("model-*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    before = checkpoint_files(out)
    for command in (["train", "--resume", "--out", str(out)], ["eval", "--out", str(out)]):
        assert main(command) == 2
        assert "checkpoint must be whole, got" in capsys.readouterr().err
    assert checkpoint_files(out) == before


def test_a_full_disk_ends_with_status_1_and_the_previous_checkpoint_resumes(tmp_path, text, capsys, monkeypatch):
    from memtrans import storage
    from memtrans.training import checkpoint

    out = tmp_path / "run"
    written = []

    def fill_up(path, content):
        written.append(path)
        if len(written) > 8:
            raise OSError(28, "No space left on device")
        storage.write_atomically(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", fill_up)
    assert train(out, "--data", text, "--steps", "4", "--checkpoint-every", "2") == 1
    assert "No space left on device; the last checkpoint is kept" in capsys.readouterr().err
    monkeypatch.undo()
    assert load_checkpoint(out / "checkpoint").values["step"] == 0
    assert main(["train", "--resume", "--out", str(out), "--plain"]) == 0


def test_a_loss_that_is_not_finite_ends_with_status_1_and_keeps_the_last_good_checkpoint(tmp_path, text, capsys):
    out = tmp_path / "run"
    options = ["--steps", "40", "--checkpoint-every", "1", "--warmup", "0", "--learning-rate", "1e30"]
    assert train(out, "--data", text, *options) == 1
    error = capsys.readouterr().err
    assert "the loss must stay finite, got" in error
    assert "the last good checkpoint is kept" in error
    kept = load_checkpoint(out / "checkpoint")
    assert kept.values["step"] < 40


def poison_step_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model makes of that step's tokens is NaN; its weights are not."""
    from memtrans.training import trainer as train_module

    advance = train_module.Trainer.advance

    def advance_with_nan(trainer):
        hook = trainer.model.token_emb.register_forward_hook(lambda module, arguments, out: out * torch.nan)
        if trainer.step != 3:
            hook.remove()
        advance(trainer)
        hook.remove()

    monkeypatch.setattr(train_module.Trainer, "advance", advance_with_nan)


@pytest.mark.parametrize("log_every", ["1", "3"])
def test_one_batch_of_nan_stops_a_run_which_goes_on_without_that_step_if_asked_to(
    tmp_path, text, capsys, monkeypatch, log_every
):
    poison_step_four(monkeypatch)
    out = tmp_path / "run"
    options = ["--data", text, "--steps", "6", "--checkpoint-every", "2", "--log-every", log_every, "--xl", "8"]
    assert train(out, *options) == 1
    error = capsys.readouterr().err
    assert "got nan bits per byte with a gradient of norm nan in step 4" in error
    assert "--skip-nonfinite goes on without such steps; the last good checkpoint is kept" in error
    assert load_checkpoint(out / "checkpoint").values["step"] == 2

    assert main(["train", "--resume", "--out", str(out), "--plain", "--skip-nonfinite"]) == 0
    assert math.isfinite(last_line(capsys)["eval_bits_per_byte"])
    reports = [line for line in without_times(out) if "bits_per_byte" in line]
    assert sum(line.get("skipped", 0) for line in reports) == 1
    assert all(math.isfinite(line["bits_per_byte"]) for line in reports)
    assert load_checkpoint(out / "checkpoint").values["step"] == 6


def test_an_evaluation_that_is_not_finite_ends_with_status_1_and_keeps_the_last_good_checkpoint(tmp_path, text, capsys):
    """The only step's loss is that of the weights before it; what the step left shows in the evaluation alone."""
    out = tmp_path / "run"
    options = ["--steps", "1", "--warmup", "0", "--learning-rate", "1e30"]
    assert train(out, "--data", text, *options) == 1
    error = capsys.readouterr().err
    assert re.search("the loss on held-out text must be finite, got (nan|inf) over 320 bytes; the last good", error)
    assert len(error.splitlines()) == 1
    assert load_checkpoint(out / "checkpoint").values["step"] == 0
    assert main(["eval", "--out", str(out)]) == 0


def test_ctrl_c_during_an_evaluation_keeps_the_steps_before_it(tmp_path, text, monkeypatch):
    from memtrans.training import run

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "evaluate_settings", stop)
    assert train(tmp_path / "run", "--data", text, "--steps", "3") == 130
    assert load_checkpoint(tmp_path / "run" / "checkpoint").values["step"] == 3
