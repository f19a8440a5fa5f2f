"""Files, directories and archives as documents, and what is held out of them."""

from __future__ import annotations

import gzip
import lzma
import zipfile

import pytest
import torch

from memtrans.data import held_out, sources
from memtrans.data.sources import load_corpus, load_library, standard_library
from memtrans.training.data import open_data
from memtrans.training.settings import Settings

TEXT = b"the quick brown fox jumps over the lazy dog\n" * 20


def content(documents) -> list[bytes]:
    return [bytes(document.content.tolist()) for document in documents]


def whole(corpus) -> list[bytes]:
    return content([*corpus.train, *corpus.validation, *corpus.test])


def test_a_file_is_one_document_whose_end_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_bytes(TEXT)
    corpus = load_corpus(str(tmp_path / "book.txt"))
    (train,), (validation,) = content(corpus.train), content(corpus.validation)
    assert train + validation == TEXT
    assert len(validation) == len(TEXT) // 10


@pytest.mark.parametrize("suffix", ["gz", "xz", "zip"])
def test_a_compressed_file_reads_like_the_plain_one(tmp_path, suffix):
    path = tmp_path / f"book.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("book.txt", TEXT)
    else:
        path.write_bytes({"gz": gzip, "xz": lzma}[suffix].compress(TEXT))
    corpus = load_corpus(str(path))
    assert b"".join(whole(corpus)) == TEXT


@pytest.mark.parametrize("suffix", ["gz", "xz", "zip"])
def test_a_damaged_archive_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"book.{suffix}"
    path.write_bytes(gzip.compress(TEXT)[:-20] if suffix == "gz" else b"no archive at all")
    with pytest.raises(ValueError, match=f"data must hold whole .{suffix} archives, got .*book.{suffix}"):
        load_corpus(str(path))


def test_a_zip_archive_holds_one_document_per_member_in_path_order(tmp_path):
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        for name in ("b.txt", "a/z.txt", "a/y.txt"):
            archive.writestr(name, name.encode() * 10)
    corpus = load_corpus(str(tmp_path / "texts.zip"))
    names = [document.name for document in [*corpus.train, *corpus.validation]]
    assert sorted(names) == ["texts.zip/a/y.txt", "texts.zip/a/z.txt", "texts.zip/b.txt"]


def test_members_of_one_name_are_a_document_each(tmp_path):
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", TEXT)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.txt", TEXT[:100])
    assert [document.text() for document in load_corpus(str(tmp_path / "texts.zip")).documents] == [TEXT, TEXT[:100]]


@pytest.mark.parametrize("name", ["BOOK.GZ", "book.Xz", "book.ZIP"])
def test_names_of_formats_may_be_in_capitals(tmp_path, name):
    if name.lower().endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("book.txt", TEXT)
    else:
        (tmp_path / name).write_bytes({"gz": gzip, "xz": lzma}[name.lower()[-2:]].compress(TEXT))
    assert [document.text() for document in load_corpus(str(tmp_path / name)).documents] == [TEXT]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.TGZ", "a.txt.bz2", "a.7z"])
def test_archives_of_other_formats_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(TEXT) if name.endswith("gz") else TEXT)
    with pytest.raises(ValueError, match=rf"data must be text, or packed as .gz, .xz, .zst, .zip, got '.*{name}', ano"):
        load_corpus(str(tmp_path / name))


@pytest.mark.parametrize("name", ["book.epub", "book.PDF", "book.docx", "book.pdf.gz"])
def test_books_that_are_no_plain_text_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(TEXT))
    with pytest.raises(ValueError, match=rf"data must be text, got '.*{name}', which has to be converted"):
        load_corpus(str(tmp_path / name))


def test_a_directory_gives_its_text_files_and_one_document_for_each_directory_in_it(tmp_path):
    (tmp_path / "sub" / "below").mkdir(parents=True)
    (tmp_path / "nothing").mkdir()
    for name in ("b.txt", "a.py", "sub/c.md", "sub/below/d.txt"):
        (tmp_path / name).write_bytes(name.encode() * 30)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0\0data")
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7\n" * 9)
    (tmp_path / ".hidden").write_bytes(TEXT)
    (tmp_path / "empty.txt").touch()
    corpus = load_corpus(str(tmp_path))
    documents = {document.name: bytes(document.content.tolist()) for document in [*corpus.train, *corpus.validation]}
    assert sorted(documents) == ["a.py", "b.txt", "sub"]
    assert documents["sub"] == b"sub/below/d.txt" * 30 + b"sub/c.md" * 30, "in path order"
    assert [document.name for document in corpus.train] == sorted(document.name for document in corpus.train)


def test_whole_documents_are_held_out_and_always_the_same_ones(tmp_path):
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_bytes(f"document {number} ".encode() * (10 + number))
    first, second = load_corpus(str(tmp_path)), load_corpus(str(tmp_path))
    assert content(first.validation) == content(second.validation)
    assert not {document.name for document in first.train} & {document.name for document in first.validation}
    assert len(first.train) + len(first.validation) == 60
    share = sum(map(len, first.validation)) / sum(map(len, [*first.train, *first.validation]))
    assert 0.05 <= share <= 0.1
    assert first.fingerprint == second.fingerprint


def test_one_of_two_documents_is_held_out(tmp_path):
    (tmp_path / "long.txt").write_bytes(TEXT)
    (tmp_path / "short.txt").write_bytes(TEXT[:100])
    corpus = load_corpus(str(tmp_path))
    assert [document.name for document in corpus.validation] == ["short.txt"]


def test_the_fingerprint_changes_with_a_byte_and_with_a_name(tmp_path):
    prints = set()
    for name, text in (("a", TEXT), ("b", TEXT), ("a", TEXT[:-1] + b"!")):
        (tmp_path / name).write_bytes(text)
        prints.add(load_corpus(str(tmp_path / name)).fingerprint)
    assert len(prints) == 3


def test_the_contents_change_with_a_byte_alone(tmp_path):
    prints = []
    for names, texts in (("ab", b"12"), ("ba", b"12"), ("xy", b"12"), ("ab", b"13")):
        directory = tmp_path / str(len(prints))
        directory.mkdir()
        for name, letter in zip(names, texts, strict=True):
            (directory / name).write_bytes(TEXT + bytes([letter]))
        prints.append(load_library(str(directory)).contents)
    assert prints[0] == prints[1] == prints[2] != prints[3]


def test_a_source_whose_splits_are_for_tests_alone_has_nothing_to_learn_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "way_of", lambda source: held_out.NAMED)
    (tmp_path / "set" / "test").mkdir(parents=True)
    (tmp_path / "set" / "test" / "text").write_bytes(TEXT)
    data = str(tmp_path / "set")
    corpus = load_corpus(data)
    assert (content(corpus.train), content(corpus.validation), content(corpus.test)) == ([], [], [TEXT])
    with pytest.raises(ValueError, match=r"text of .* to learn from, got none beside 1 held-out texts in .*set"):
        open_data(Settings(data=data))


def test_enwik8_gets_the_standard_split(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "ENWIK8_SPLIT", (90, 5, 5))
    (tmp_path / "enwik8").write_bytes(bytes(range(100)))
    corpus = load_corpus(str(tmp_path / "enwik8"))
    assert content(corpus.train) == [bytes(range(90))]
    assert content(corpus.validation) == [bytes(range(90, 95))]
    assert content(corpus.test) == [bytes(range(95, 100))]


def test_the_standard_split_is_of_exactly_a_hundred_million_bytes(tmp_path):
    assert held_out.ENWIK8_SPLIT == (90_000_000, 5_000_000, 5_000_000)
    (tmp_path / "enwik8").write_bytes(TEXT)
    with pytest.raises(ValueError, match=r"one file of 100000000 bytes to be enwik8, got \[880\]"):
        load_corpus(str(tmp_path / "enwik8"))


def test_a_package_of_the_standard_library_is_a_document_and_so_is_a_module():
    documents = {document.name: document for document in standard_library()}
    assert {"json", "asyncio", "heapq", "textwrap"} <= set(documents)
    assert "site-packages" not in documents
    assert "test" not in documents
    text = bytes(documents["json"].content.tolist())
    assert text.index(b"JSON") < text.index(b"class JSONDecoder") < text.index(b"class JSONEncoder")


def test_the_standard_library_splits_by_documents():
    corpus = load_corpus("stdlib")
    sizes = [sum(map(len, part)) for part in (corpus.train, corpus.validation)]
    assert 0.04 < sizes[1] / sum(sizes) < 0.11
    assert all(document.content.dtype == torch.uint8 for document in corpus.train)


def test_missing_and_empty_data_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data must be 'stdlib' or the path .*, got '/no/such/file'"):
        load_corpus("/no/such/file")
    with pytest.raises(ValueError, match="at least 2 bytes, got none in"):
        load_corpus(str(tmp_path))
    (tmp_path / "tiny").write_bytes(b"abc")
    with pytest.raises(ValueError, match="data must hold at least 4 bytes, got 3 in 'tiny'"):
        load_corpus(str(tmp_path / "tiny"))
