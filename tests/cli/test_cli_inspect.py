"""`python -m memtrans inspect` on a run and on a pretrained model, and the page that `train` leaves behind."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_runs import train, written_text

from memtrans import MemorizingTransformer
from memtrans.cli.main import main

pytestmark = pytest.mark.cpu
TEXT = "The ferry to Corabury leaves from pier 4127. " * 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspect")
    train(place / "run", "--data", written_text(place), "--steps", "2", "--sample", "3", "--log-every", "1")
    (place / "book.txt").write_text(TEXT + "né")
    return place


def shown(path: Path) -> dict[str, Any]:
    page = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def command(directory: Path, *more: str) -> int:
    arguments = {"--checkpoint": "run", "--document": "book.txt", "--out": "page.html"}
    given = [
        str(directory / word) if word in (*arguments.values(), "tiny", "begun", "all.json") else word for word in more
    ]
    for option, value in arguments.items():
        if option not in more and not (option == "--checkpoint" and "--model" in more):
            given += [option, str(directory / value)]
    return main(["inspect", "--prompt", "The ferry", "--tokens", "5", "--device", "cpu", *given])


def test_a_run_is_inspected(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(directory, "--json", "all.json") == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(directory / "page.html") and "% of the weight came from the memory" in said.err
    page, everything = shown(directory / "page.html"), json.loads((directory / "all.json").read_text())
    assert page["length"] == len(TEXT) + 3 + len("The ferry") + 5  # bytes; the memory holds what was written too
    assert page["prompt"] == "The ferry" and page["layers"] == ["layer 1"] and page["source"] == "book.txt"
    assert len(everything["written"]) == 5
    for token in everything["written"]:
        places = [place for head in token["layers"]["layer 1"] for place, _ in head]
        assert places and max(places) < len(TEXT) + 3
        begin = token["passages"][0]["begin"]
        assert token["passages"][0]["text"] == (TEXT + "né")[begin : begin + len(token["passages"][0]["text"])]


def test_the_end_of_training_leaves_a_page(directory: Path) -> None:
    page = shown(directory / "run" / "retrieved.html")
    assert page["model"] == "run" and page["tokens"] and page["tokens"][0]["layers"][0]["best"]
    assert (directory / "run" / "loss.png").exists()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="of the extra memtrans[hf]")
def test_a_pretrained_model_is_inspected(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from helpers.byte_tokenizers import bytes_tokenizer
    from helpers.hf_families import made

    made("llama", vocab_size=260).save_pretrained(directory / "tiny")
    bytes_tokenizer().save_pretrained(directory / "tiny")
    assert command(directory, "--model", "tiny", "--segment", "32", "--json", "all.json") == 0
    page, everything = shown(directory / "page.html"), json.loads((directory / "all.json").read_text())
    assert page["layers"] == ["layer 0", "layer 1"] and page["length"] == len(TEXT) + 3
    for token in everything["written"]:
        for passage in token["passages"]:
            begin = passage["begin"]
            assert (TEXT + "né")[begin:].startswith(passage["text"].rstrip("é"))
    assert capsys.readouterr().out.strip().endswith("page.html")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tokens", "0"), "tokens must be at least 1"),
        (("--document", "missing.txt"), "No such file"),
        (("--checkpoint", "missing"), "checkpoint must be a run's directory"),
        (("--out", "missing/page.html"), "out must name a file in a directory that exists"),
        (("--json", "missing/all.json"), "json must name a file in a directory that exists"),
        (("--load", "x"), "load must come with --model"),
        (("--dtype", "float16"), "dtype must come with --model"),
        (("--json", "page.html"), "json must name another file than out"),
        (("--temperature", "inf"), "temperature must be finite"),
        (("--memory", "0"), "memory must be at least 1"),
        (("--segment", "0"), "segment must be at least 1"),
    ],
)
def test_bad_input_is_one_line(
    directory: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert command(directory, *more) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("memtrans inspect: ") and message in error


def test_places_that_a_token_moved_are_refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "memorizing_layers": 1}
    model = MemorizingTransformer(num_tokens=256, clear_memories_on_sos_token_id=ord("4"), **sizes)
    model.save_pretrained(directory / "begun")
    assert command(directory, "--checkpoint", "begun", "--segment", "64") == 2
    assert "must not hold the token that clears the memory" in capsys.readouterr().err
