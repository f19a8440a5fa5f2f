"""`python -m memtrans hf` on a directory, without a network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from helpers.byte_tokenizers import bytes_tokenizer
from helpers.hf_families import made

from memtrans.cli import hf
from memtrans.cli.main import main

TEXT = "The ferry to Corabury leaves from pier 4127. " * 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    made("llama", vocab_size=260).save_pretrained(place / "tiny")
    bytes_tokenizer().save_pretrained(place / "tiny")
    (place / "book.txt").write_text(TEXT)
    return place


def command(directory: Path, *more: str) -> int:
    sizes = ("--memory", "700", "--segment", "32", "--neighbours", "8", "--device", "cpu")
    return main(["hf", "--model", str(directory / "tiny"), *sizes, *more])


def test_a_document_is_read_kept_and_asked(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book, memory = str(directory / "book.txt"), str(directory / "memory")
    assert command(directory, "--document", book, "--prompt", "The ferry", "--tokens", "8", "--save", memory) == 0
    first = capsys.readouterr()
    assert "read 900 tokens" in first.err and first.out.strip()
    assert command(directory, "--load", memory, "--prompt", "The ferry", "--tokens", "8") == 0
    assert capsys.readouterr().out == first.out


def test_a_memory_is_calibrated_first(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = str(directory / "book.txt")
    assert command(directory, "--document", book, "--calibrate", "--calibration-steps", "8") == 0
    said = capsys.readouterr().err
    assert "step 8/8" in said and "after  {'text'" in said and "read 900 tokens" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "document must be given where no memory is loaded"),
        (("--load", "x", "--calibrate"), "document must be given with --calibrate"),
        (("--document", "missing.txt"), "No such file"),
        (("--document", "BOOK", "--layers", "7"), "layers must be among"),
        (("--document", "BOOK", "--tokens", "0"), "tokens must be at least 1"),
        (("--load", "missing"), "must name a file"),
        (("--document", "BOOK", "--save", "BOOK"), "save must name a directory"),
        (("--document", "BOOK", "--model", "missing"), "model must be a directory"),
        (("--document", "BOOK", "--model", "damaged"), "model must hold whole weights"),
        (("--document", "BOOK", "--model", "."), "tokenizer"),  # transformers says so in several lines
        (("--document", "/dev/zero"), "document must be a regular file or a pipe"),
        (("--document", "BOOK", "--prompt", ""), "prompt must hold some text"),
        (("--document", "BOOK", "--temperature", "nan"), "temperature must be finite"),
        (("--document", "BOOK", "--seed", str(2**64)), "seed must be in [0, 2**63)"),
        (("--document", "BOOK", "--device", "banana"), "device must be one that this torch can use, got 'banana'"),
        (("--document", "BOOK", "--save", "BOOK/below"), "Not a directory"),
    ],
)
def test_bad_input_is_one_line(
    directory: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    damaged = shutil.copytree(directory / "tiny", directory / "damaged", dirs_exist_ok=True) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    book = directory / "book.txt"
    places = {"BOOK": book, "BOOK/below": book / "below", ".": directory, "damaged": damaged.parent}
    given = [str(places.get(word, word)) for word in more]
    assert command(directory, *given) == 2
    said = capsys.readouterr().err
    assert " tokens in " not in said, "read for nothing"
    error = said.strip().splitlines()[-1]  # behind the bar of loading
    assert message in error and error.startswith("memtrans hf: ") and "Traceback" not in error


def test_a_dtype_that_does_not_exist_is_refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(directory, "--document", str(directory / "book.txt"), "--dtype", "floaty")
    assert "invalid choice: 'floaty'" in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    (directory / "short.txt").write_text(TEXT[:60])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the command closes it
    monkeypatch.setattr(hf, "show", gone)
    assert command(directory, "--document", str(directory / "short.txt"), "--prompt", "The", "--tokens", "2") == 1
    assert "memtrans hf" not in capsys.readouterr().err


def test_a_document_is_the_bytes_of_its_file(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "lines.txt").write_bytes(b"a line\r\n" * 5)
    assert command(directory, "--document", str(directory / "lines.txt")) == 0
    assert "read 40 tokens" in capsys.readouterr().err
