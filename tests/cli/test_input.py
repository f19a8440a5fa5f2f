"""What a command reads may be a pipe, and never keeps it waiting; what it is told may be absurd, and costs no time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from helpers.tiny_runs import train, written_text

from memtrans import MemorizingTransformer
from memtrans.cli.ending import show
from memtrans.cli.main import main
from memtrans.data.sources import load_corpus
from memtrans.files import read_input

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(60)]


@pytest.fixture
def model(tmp_path: Path) -> str:
    small = MemorizingTransformer(num_tokens=256, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=2)
    small.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def pipe(tmp_path: Path) -> str:
    """One to which nobody writes."""
    os.mkfifo(tmp_path / "pipe")
    return str(tmp_path / "pipe")


def test_21_4_a_pipe_to_which_nobody_writes_is_refused(
    tmp_path: Path, model: str, pipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", "--checkpoint", model, "--tokens", "2"]
    expected = {
        "data must be a pipe that somebody writes to": ["train", "--out", str(tmp_path / "run"), "--data", pipe],
        "prompt_file must be a pipe that somebody writes to": [*generate, "--prompt-file", pipe],
        "path must be a regular file": [*generate, "--memories", pipe],
        "checkpoint must be a run's directory": ["generate", "--checkpoint", pipe],
    }
    for message, command in expected.items():
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_21_4_settings_that_are_a_pipe_or_nest_without_end_are_refused(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, deep = tmp_path / f"pipe.{suffix}", tmp_path / f"deep.{suffix}"
    os.mkfifo(pipe)
    deep.write_text(("" if suffix == "json" else "batch = ") + "[" * 10**5)
    for file, message in ((pipe, "config must be a regular file, got"), (deep, f"is no {suffix.upper()}")):
        assert main(["train", "--out", str(tmp_path / "run"), "--config", str(file)]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("option", ["data", "prompt_file"])
def test_21_4_a_device_that_never_ends_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a regular file or a pipe, got '/dev/zero', a device"):
        read_input(option, "/dev/zero")


def test_21_4_a_pipe_of_the_shell_is_read_to_its_end(tmp_path: Path) -> None:
    """Also where whoever writes to it takes a moment, as in `--prompt-file <(...)`."""
    command = "import sys; from memtrans.files import read_input; print(len(read_input('prompt_file', sys.argv[1])))"
    line = f'{sys.executable} -c "{command}" <(sleep 0.3; head -c 200000 /dev/zero; sleep 0.3; echo)'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "200001\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "100000000"], "batch must be at most 65536, got 100000000"),
        (["--accumulate", "100000000"], "accumulate must be at most 65536, got 100000000"),
        (["--layers", "100000000"], "layers must be at most 10000, got 100000000"),
        (["--batch", "65536", "--segments", "2"], "must make at most 65536 rows a step, got 131072"),
        (["--batch", "65536", "--segment", "65536"], "segment must make at most 1073741824 tokens a step, got"),
        (["--data", "recall", "--eval-bytes", str(10**12)], "eval_bytes must be at most 221184000 of recall, got"),
        (["--memory", str(10**30)], f"memory must be below {2**63}, got"),
    ],
)
def test_21_4_sizes_that_no_machine_would_end_a_step_of_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    begin = time.perf_counter()
    assert train(tmp_path / "run", "--data", written_text(tmp_path), *options) == 2
    assert time.perf_counter() - begin < 5
    assert message in capsys.readouterr().err


def test_21_4_members_of_a_zip_archive_that_are_no_text_or_hidden_are_left_out(tmp_path: Path) -> None:
    text = b"the quick brown fox " * 20
    members = {"b.txt": text, "a/picture.png": b"\x89PNG\0\0" * 50, "__MACOSX/._b.txt": text, ".git/config": text}
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    corpus = load_corpus(str(tmp_path / "texts.zip"))
    assert {document.name for document in corpus.train} == {"texts.zip/b.txt"}
    with zipfile.ZipFile(tmp_path / "binary.zip", "w") as archive:
        archive.writestr("picture.png", members["a/picture.png"])
    with pytest.raises(ValueError, match="data must hold text of at least 2 bytes, got none in"):
        load_corpus(str(tmp_path / "binary.zip"))


def libraries(process: subprocess.Popen[str]) -> str:
    """What a process has loaded so far."""
    return Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what a process has loaded")
@pytest.mark.parametrize("library", ["libc10.so", "libtorch_cpu.so", "libtorch_python.so"])
def test_21_4_ctrl_c_while_the_command_is_imported_ends_it_quietly(library: str) -> None:
    command = [sys.executable, "-m", "memtrans", "eval", "--out", "/no/such/run"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has its background jobs ignore the signal, and these hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while library not in libraries(process):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=50)
    assert (process.returncode, error) == (130, "")


def test_help_and_a_wrong_option_do_not_wait_for_pytorch() -> None:
    """Nothing that takes long is imported before the options are known to be good."""
    command = "import sys; from memtrans.cli.main import main; sys.modules['torch'] = None; main(sys.argv[1:])"
    for options, status in ((["train", "--help"], 0), (["--help"], 0), (["train", "--batch", "two"], 2)):
        done = subprocess.run([sys.executable, "-c", command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr


def test_names_that_are_no_utf_8_are_shown_by_number(capsys: pytest.CaptureFixture[str]) -> None:
    show(os.fsdecode(b"page\xff.html"))
    assert capsys.readouterr().out == "page\\udcff.html\n"
