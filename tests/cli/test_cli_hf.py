"""`python -m memtrans hf` on a directory, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from helpers.byte_tokenizers import bytes_tokenizer
from helpers.hf_families import made

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
    assert command(directory, "--document", book, "--calibrate", "--calibration-steps", "20") == 0
    said = capsys.readouterr().err
    assert "step 20/20" in said and "after  {'text'" in said and "read 900 tokens" in said


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
    ],
)
def test_bad_input_is_one_line(
    directory: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    given = [str(directory / "book.txt") if word == "BOOK" else word for word in more]
    assert command(directory, *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # behind the bar of loading
    assert message in error and error.startswith("memtrans hf: ") and "Traceback" not in error
