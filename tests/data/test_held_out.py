"""A vocabulary is learned from what a run over the same texts learns from, and from nothing that is held out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from memtrans.cli.main import main
from memtrans.data import held_out
from memtrans.data.held_out import NAMED, pieces_to_learn
from memtrans.data.records import Fields
from memtrans.data.sources import load_corpus
from memtrans.data.texts import Source
from memtrans.data.tokens import open_tokenizer

TEXT = b"the quick brown fox jumps over the lazy dog\n" * 20


def one_text(directory: Path) -> Path:
    (directory / "book.txt").write_bytes(TEXT)
    return directory / "book.txt"


def many_texts(directory: Path) -> Path:
    """Directories, copies, and texts that are too short to count, first and last."""
    (directory / "texts" / "some").mkdir(parents=True)
    for number in range(40):
        (directory / "texts" / f"{number:02}.txt").write_bytes(f"document {number // 2} ".encode() * (10 + number // 2))
    for name in ("00", "zz", "some/a.txt"):
        (directory / "texts" / name).write_bytes(b"x" if "/" not in name else TEXT)
    return directory / "texts"


def copies_of_one(directory: Path) -> Path:
    (directory / "copies").mkdir()
    for name in "abc":
        (directory / "copies" / name).write_bytes(TEXT)
    return directory / "copies"


def records(directory: Path) -> Path:
    lines = [json.dumps({"text": f"record {number} " * 20, "book": number // 3}) for number in range(60)]
    (directory / "some.jsonl").write_text("\n".join(lines))
    return directory / "some.jsonl"


def enwik8(directory: Path) -> Path:
    (directory / "enwik8").write_bytes(TEXT[:800])
    return directory / "enwik8"


@pytest.mark.filterwarnings("ignore:data holds one text")
@pytest.mark.parametrize("joined", [None, "book"])
@pytest.mark.parametrize("make", [one_text, many_texts, copies_of_one, records, enwik8])
def test_what_may_be_learned_from_is_what_a_run_learns_from(make, joined, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "ENWIK8_SPLIT", (700, 50, 50))
    data, fields = str(make(tmp_path)), Fields("text", joined)
    corpus = load_corpus(data, fields=fields)
    learned = b"".join(pieces_to_learn(Source(data, fields)))
    assert learned == b"".join(document.text() for document in corpus.train)
    assert len(learned) < sum(len(document) for document in corpus.documents)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (["train", "train", "validation", "test"], [30, 30, 0, 0]),
        (["train", "test", "test"], [27, 0, 0]),  # of a single text left the end is held out
    ],
)
def test_splits_that_a_source_has_itself_are_not_learned_from(splits, expected):
    names = [f"{split}/{number}" for number, split in enumerate(splits)]
    digests = [bytes([number]) * 32 for number in range(len(names))]
    assert held_out._left_to_learn(NAMED, names, np.full(len(names), 30), digests) == expected


@pytest.mark.parametrize(
    ("kind", "splits"),
    [
        ("validation", ["validation", "Valid", "VAL", "dev", "eval", "evaluation", "validation_matched", "val2017"]),
        ("validation", ["held_out", "heldout", "held-out", "HeldOut", "holdout", "hold_out", "development", "dev_r1"]),
        ("test", ["test", "TEST", "testing", "test.clean", "testA", "devtest", "test-dev", "private_test"]),
        ("train", ["train", "train_eval", "training", "unsupervised", "all", "latest", "devices", "retrieval"]),
    ],
)
def test_splits_are_held_out_by_every_usual_name(kind, splits):
    validation, test = held_out.named([f"{split}/{number}" for number, split in enumerate(splits)])
    assert validation.tolist() == [kind == "validation"] * len(splits)
    assert test.tolist() == [kind == "test"] * len(splits)


def test_a_learned_vocabulary_knows_no_word_that_is_held_out_alone(tmp_path):
    """A word that the end of a text repeats a thousand times would be a token if it had been learned from."""
    (tmp_path / "book.txt").write_bytes(TEXT * 30 + b" xylophone" * 200)
    book, out = str(tmp_path / "book.txt"), str(tmp_path / "out")
    assert main(["tokenize", book, "--out", out, "--train-vocabulary", "400"]) == 0
    vocabulary = json.loads(open_tokenizer(out).content)["model"]["vocab"]
    assert any("quick" in token for token in vocabulary)
    assert not any("xy" in token for token in vocabulary)


def test_a_pipe_cannot_be_read_twice(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert main(["tokenize", str(tmp_path / "pipe"), "--out", str(tmp_path / "out"), "--train-vocabulary", "290"]) == 2
    assert "data must be read twice to learn a vocabulary, got" in capsys.readouterr().err


def test_texts_with_nothing_to_learn_from_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "tiny").write_bytes(b"x")
    assert main(["tokenize", str(tmp_path / "tiny"), "--out", str(tmp_path / "out"), "--train-vocabulary", "290"]) == 2
    assert "data must hold text of at least 2 bytes, got none" in capsys.readouterr().err
