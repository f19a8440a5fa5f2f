"""The command line from the outside: what it takes, prints and writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import TINY, checkpoint_files, last_line, train, without_times, written_text

from memtrans.cli.main import main
from memtrans.presets import PRESETS
from memtrans.training.checkpoint import load_checkpoint, save_checkpoint
from memtrans.training.directory import checkpoint_of
from memtrans.training.settings import Settings

REPORTED = {
    "steps",
    "tokens",
    "tokens_per_second",
    "eval_bits_per_byte",
    "eval_bits_per_byte_without_memory",
    "parameters",
    "device",
}


@pytest.fixture
def text(tmp_path) -> str:
    return written_text(tmp_path)


# -------------------------------------------------------------------------------------------------------------- train


def test_train_reports_one_json_object_in_its_last_line_and_leaves_metrics_curve_and_checkpoint(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "5", "--log-every", "2") == 0
    report = last_line(capsys)
    assert set(report) >= REPORTED
    assert (report["steps"], report["tokens"], report["device"]) == (5, 320, "cpu")
    assert [line["step"] for line in without_times(out)] == [2, 4, 5, 5]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_checkpoint(out / "checkpoint").values["step"] == 5


def test_recall_also_reports_the_answers_to_far_questions(tmp_path, capsys):
    assert (
        train(tmp_path / "run", "--preset", "recall", "--memory-layers", "2", "--steps", "2", "--eval-bytes", "8000")
        == 0
    )
    report = last_line(capsys)
    assert set(report) >= REPORTED | {"recall_accuracy", "recall_accuracy_without_memory", "recall_chance"}
    assert 0 <= report["recall_accuracy"] < 0.3


def test_a_sample_of_what_was_retrieved_comes_before_the_last_line(tmp_path, text, capsys):
    assert train(tmp_path / "run", "--data", text, "--steps", "1", "--sample", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("of the weight came from the memory" in line for line in lines) == 3
    json.loads(lines[-1])


def test_windows_and_evaluations_on_the_way_are_options(tmp_path, text):
    assert train(tmp_path / "run", "--data", text, "--steps", "4", "--windows", "--eval-every", "2") == 0
    lines = without_times(tmp_path / "run")
    assert [line["step"] for line in lines if "eval_bits_per_byte" in line] == [2, 4]


def test_without_out_a_run_takes_the_first_free_directory_and_resume_the_last_one(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["train", *TINY, "--data", text, "--steps", "1"]
    assert main(options) == main(options) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"demo", "demo-2"}
    assert main([*options, "--resume", "--steps", "2"]) == 0
    steps = [load_checkpoint(tmp_path / "runs" / name / "checkpoint").values["step"] for name in ("demo", "demo-2")]
    assert steps == [1, 2]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/no/such/file"], "data must be 'stdlib' or the path of a file or directory, got '/no/such/file'"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--memory-layers", "7"], "memory_layers must name layers from 1 to 2, got 7"),
        (["--device", "abacus"], "device must be one that this torch can use, got 'abacus': "),
        (["--dtype", "int3"], "dtype must be one of float32, bfloat16, got 'int3'"),
        (["--resume"], "checkpoint must be a directory with checkpoint.json, got"),
        (["--data", ""], "data must be 'stdlib' or the path of a file or directory, got ''"),
        (["--data", "recall", "--windows"], "windows must be off for recall, whose far questions no window holds"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(tmp_path, text, capsys, options, message):
    assert train(tmp_path / "run", "--data", text, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "two"], "argument --batch: invalid int value: 'two'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_options_that_cannot_be_read_end_with_status_2(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(["train", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "/run"])
def test_out_must_not_be_a_file_nor_lie_in_one(tmp_path, text, capsys, below):
    before = Path(text).read_bytes()
    assert train(Path(text + below), "--data", text) == 2
    error = capsys.readouterr().err
    assert f"out must be a directory or not exist, got '{text + below}', where '{text}' is a file" in error
    assert len(error.splitlines()) == 1
    assert Path(text).read_bytes() == before


def test_out_must_not_be_the_directory_of_the_texts(tmp_path, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert train(tmp_path, "--data", ".") == 2
    expected = f"memtrans train: out must be another directory than data, got '{tmp_path}' for both\n"
    assert (capsys.readouterr().err, sorted(tmp_path.iterdir())) == (expected, before)


@pytest.mark.parametrize("option", ["--memory", "--neighbours", "--xl", "--vocabulary"])
def test_sizes_that_no_machine_can_hold_end_with_one_line_and_status_1(tmp_path, text, capsys, option):
    assert train(tmp_path / "run", "--data", text, option, str(10**15)) == 1
    error = capsys.readouterr().err
    assert "the device has too little memory for these sizes: " in error
    assert len(error.splitlines()) == 1


def test_a_directory_with_a_checkpoint_is_not_overwritten(tmp_path, text, capsys):
    assert train(tmp_path / "run", "--data", text, "--steps", "1") == 0
    before = checkpoint_files(tmp_path / "run")
    assert train(tmp_path / "run", "--data", text, "--steps", "2") == 2
    assert "out must be a directory without a checkpoint, or come with --resume" in capsys.readouterr().err
    assert checkpoint_files(tmp_path / "run") == before


def test_presets_are_listed_one_a_line_and_train_by_name(tmp_path, text, capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all("parameters" in line and "memory" in line and "predicted" in line for line in lines)
    small = [
        "--vocabulary",
        "256",
        "--layers",
        "3",
        "--memory-layers",
        "2",
        "--heads",
        "8",
        "--xl",
        "16",
        "--steps",
        "1",
    ]
    assert train(tmp_path / "run", "--preset", "paper-512-8192-512", "--data", text, *small) == 0
    assert train(tmp_path / "other", "--preset", "paper-512-8192-512", "--data", text, "--layers", "4") == 2
    assert "memory_layers must name layers from 1 to 4, got 9" in capsys.readouterr().err


def test_a_list_whose_reader_has_gone_ends_quietly():
    command = f"{sys.executable} -m memtrans presets | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("d", "")


@pytest.mark.parametrize("command", [["presets"], ["info"], ["eval"]])
def test_a_full_disk_behind_standard_output_is_one_line_that_claims_no_more(tmp_path, text, command):
    if command == ["eval"]:
        assert train(tmp_path / "run", "--data", text, "--steps", "1") == 0
        command = ["eval", "--out", str(tmp_path / "run")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "memtrans", *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == f"memtrans {command[0]}: writing failed: [Errno 28] No space left on device\n"


def test_a_run_that_cannot_write_at_all_claims_no_checkpoint(tmp_path, text, capsys, monkeypatch):
    from memtrans.training import checkpoint

    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", fail)
    assert train(tmp_path / "run", "--data", text, "--steps", "2") == 1
    error = capsys.readouterr().err
    message = f"writing to {tmp_path / 'run'} failed: [Errno 28] No space left on device; no checkpoint is saved yet"
    assert error == f"memtrans train: {message}\n"


# ------------------------------------------------------------------------------------------------------ eval and info


def test_eval_of_a_lost_model_ends_with_one_line_and_status_1(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "1") == 0
    checkpoint = load_checkpoint(out / "checkpoint")
    checkpoint.parts["model"]["to_logits.1.bias"].fill_(float("nan"))
    save_checkpoint(out / "checkpoint", checkpoint.parts, checkpoint.values)
    capsys.readouterr()
    assert main(["eval", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.err == "memtrans eval: the loss on held-out text must be finite, got nan over 320 bytes\n"
    assert printed.out == ""


@pytest.mark.parametrize(
    ("trained", "asked", "message"),
    [
        ("64", "0", "memory must be at least 1, as the run was trained with 64, got 0"),
        ("0", "8", "memory must be 0, as the run was trained with 0, got 8"),
    ],
)
def test_eval_cannot_give_or_take_the_layers_that_have_a_memory(tmp_path, text, capsys, trained, asked, message):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "1", "--memory", trained) == 0
    assert main(["eval", "--out", str(out), "--memory", asked]) == 2
    assert capsys.readouterr().err == f"memtrans eval: {message}\n"


def test_eval_repeats_the_runs_own_evaluation_and_takes_other_sizes(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert train(out, "--data", text, "--steps", "2") == 0
    trained = last_line(capsys)
    assert main(["eval", "--out", str(out)]) == 0
    report = last_line(capsys)
    assert report["eval_bits_per_byte"] == trained["eval_bits_per_byte"]
    assert report["eval_bits_per_byte_without_memory"] == trained["eval_bits_per_byte_without_memory"]
    assert main(["eval", "--out", str(out), "--memory", "8", "--neighbours", "2", "--keep-memory"]) == 0
    assert last_line(capsys)["eval_bits_per_byte"] != trained["eval_bits_per_byte"]


def test_info_names_versions_and_every_backend_as_live_or_why_not(capsys):
    from memtrans_kernels import backends_info

    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("python", "torch", "gpu"):
        assert re.search(rf"^{name} +\S", printed, re.MULTILINE)
    for line in backends_info():
        limits = f" ({line.reason})" if line.reason else ""
        expected = f"live{limits}" if line.live else f"not live: {line.reason}"
        assert re.search(
            rf"^{line.operator} +{line.backend} +{line.device} +{re.escape(expected)}$", printed, re.MULTILINE
        )


def test_help_documents_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "%" not in printed
    for name in Settings().to_json():
        assert f"--{name.replace('_', '-')}" in printed
    for preset in PRESETS:
        assert preset in printed


def test_the_module_runs_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "memtrans", "train", "--data", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "data must be" in done.stderr


def test_five_steps_of_the_demo_with_both_evaluations_end_within_half_a_minute(tmp_path):
    command = [sys.executable, "-m", "memtrans", "train", "--preset", "demo", "--steps", "5", "--plain"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=30, check=True
    )
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == 5
    assert {"eval_bits_per_byte", "eval_bits_per_byte_without_memory", "tokens_per_second"} <= set(summary)


def test_curves_are_drawn_where_there_is_more_to_draw(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("memtrans.training.run.plot_metrics", lambda lines, path: drawn.append(len(lines)))
    options = ["--steps", "4", "--checkpoint-every", "2", "--eval-every", "2"]
    assert train(tmp_path / "run", "--data", written_text(tmp_path), *options) == 0
    assert len(drawn) > 1 and drawn[0] > 0
    assert drawn == sorted(set(drawn))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_recall_preset_answers_far_questions_with_its_memory_and_not_without(tmp_path):
    command = [sys.executable, "-m", "memtrans", "train", "--preset", "recall", "--plain"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=600, check=True
    )
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["recall_accuracy"] >= 0.9
    assert summary["recall_accuracy_without_memory"] <= 2 * summary["recall_chance"]


@pytest.mark.parametrize("command", [["train", "--resume"], ["eval"]])
def test_a_checkpoint_that_no_training_run_wrote_is_one_line_and_status_2(command, tmp_path, capsys):
    save_checkpoint(checkpoint_of(tmp_path), {"model": {"weight": torch.ones(2)}}, {"step": 1})
    assert main([*command, "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err.strip()
    assert "checkpoint must be a training run's, got one without settings" in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.slow
def test_the_enwik8_preset_trains_on_an_archive_of_its_size_and_shape(tmp_path, capsys):
    """A zip archive of one file of 100,000,000 bytes of XML: 90 million to train on, 5 held out, 5 to test on."""
    page = "<page>\n  <title>Number {0}</title>\n  <text>[[{0}]] follows [[{1}]].</text>\n</page>\n"
    text = "".join(page.format(number, number - 1) for number in range(1_300_000)).encode()[:100_000_000]
    assert len(text) == 100_000_000
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("enwik8", text)
    data, out = ["--data", str(tmp_path / "enwik8.zip")], tmp_path / "run"
    small = ["--steps", "2", "--memory-layers", "1", "--xl-layers", "2", "--xl", "32"]
    assert train(out, "--preset", "enwik8", *data, *small) == 0
    report = last_line(capsys)
    assert report["data"].endswith("enwik8.zip") and report["tokens"] == 2 * 5 * 2 * 32
    assert main(["eval", "--out", str(out), "--split", "test", "--eval-bytes", "300"]) == 0
    assert last_line(capsys)["eval_scored_bytes"] >= 300
