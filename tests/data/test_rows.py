"""Rows that differ: few documents are cut into stretches, and copies of a text stay on one side of the split."""

from __future__ import annotations

import random
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrans.data.documents import Document, stretches
from memtrans.data.sources import load_corpus
from memtrans.data.stream import DocumentStream
from memtrans.distributed.ranks import Ranks
from memtrans.training.data import open_data
from memtrans.training.settings import Settings


def random_text(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length).replace(b"\0", b"\1")


@settings(deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=4), st.integers(1, 12))
def test_stretches_ask_for_every_byte_of_a_document_but_its_first_once(lengths, rows):
    documents = [Document.of(str(number), random_text(length, number)) for number, length in enumerate(lengths)]
    parts = stretches(documents, rows)
    assert len(parts) == max(len(documents), min(rows, sum(length // 2 for length in lengths)))
    assert all(len(part) >= 2 for part in parts)
    labels = b"".join(bytes(part.content[1:].tolist()) for part in parts)
    assert labels == b"".join(bytes(document.content[1:].tolist()) for document in documents)


def test_stretches_of_a_document_end_at_different_times():
    lengths = [len(part) for part in stretches([Document.of("book", random_text(4000))], rows=4)]
    assert lengths == sorted(set(lengths)) and lengths[0] > 700


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_row_of_every_rank_reads_a_text_of_its_own(tmp_path, files, ranks):
    for number in range(files):
        (tmp_path / f"{number}.txt").write_bytes(random_text(20_000, number))
    data = str(tmp_path / "0.txt" if files == 1 else tmp_path)
    settings = Settings(data=data, batch=4, segment=16)
    streams = [DocumentStream(open_data(settings).order, 4, 16, Ranks(rank, ranks).rows(4)) for rank in range(ranks)]
    alike = 0
    for _ in range(400):
        segments = [tuple(row) for stream in streams for row in stream.next().tokens.tolist()]
        alike += len(segments) - len(set(segments))
    assert alike == 0


def test_a_text_too_short_for_its_rows_is_told(tmp_path):
    (tmp_path / "short.txt").write_bytes(b"abcdefgh")
    with (
        pytest.warns(UserWarning, match="batch is 8, but data has text for 3 rows that differ"),
        pytest.warns(UserWarning, match=r"short.txt' holds out 2 bytes, less than a segment of 256 tokens"),
    ):
        open_data(Settings(data=str(tmp_path / "short.txt"), batch=8))


def test_enough_documents_are_left_whole(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_bytes(random_text(300, number))
    settings = Settings(data=str(tmp_path), batch=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        order = open_data(settings).order
    assert {len(order.document(number)) for number in range(30)} == {300}


def copies(tmp_path, count: int, others: int = 0):
    for number in range(count):
        (tmp_path / f"copy {number}.txt").write_bytes(random_text(500))
    for number in range(others):
        (tmp_path / f"other {number}.txt").write_bytes(random_text(500, 1 + number))
    return str(tmp_path)


@pytest.mark.parametrize("others", [1, 5, 40])
def test_copies_of_a_text_stay_on_one_side_of_the_split(tmp_path, others):
    corpus = load_corpus(copies(tmp_path, 20, others))
    train, held_out = ({document.digest() for document in part} for part in (corpus.train, corpus.validation))
    assert train and held_out and not train & held_out
    assert len(corpus.train) + len(corpus.validation) == 20 + others


def test_of_copies_alone_one_is_read_and_its_end_held_out(tmp_path):
    with pytest.warns(UserWarning, match="data holds one text 60 times, of which 'copy 0.txt' is read"):
        corpus = load_corpus(copies(tmp_path, 60))
    assert [len(document) for document in (*corpus.train, *corpus.validation)] == [450, 50]


def test_rows_of_copies_read_stretches_of_what_differs(tmp_path):
    order = open_data(Settings(data=copies(tmp_path, 30, 3), batch=8)).order
    assert len({order.document(number).digest() for number in range(8)}) == 8


def test_a_run_from_before_reads_as_it_did(tmp_path):
    """Its checkpoint names no way of reading: rows took whole documents, and names alone decided what is held out."""
    (tmp_path / "book.txt").write_bytes(random_text(2000))
    order = open_data(Settings(data=str(tmp_path / "book.txt"), batch=4, segment=128), reading=1).order
    assert {len(order.document(number)) for number in range(8)} == {1800}
    (tmp_path / "many").mkdir()
    corpus = load_corpus(copies(tmp_path / "many", 60), reading=1)
    assert len(corpus.train) + len(corpus.validation) == 60 and corpus.validation
