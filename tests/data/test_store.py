"""Stores of tokens: what goes in comes out, through streams, ranks and resumption; damage is told."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrans.data import held_out, sources, store, tokenize
from memtrans.data.documents import Shuffled
from memtrans.data.sources import load_corpus
from memtrans.data.store import Store
from memtrans.data.stream import DocumentStream
from memtrans.data.texts import Source
from memtrans.data.tokenize import write_store
from memtrans.data.tokens import BYTES
from memtrans.distributed.ranks import Ranks
from tests.helpers.vocabularies import TEXT, learned, with_byte_fallback

TOKENIZERS = {"bytes": lambda: BYTES, "learned": learned, "byte fallback": with_byte_fallback}


def folder(tmp_path, count: int = 7):
    """Documents of words, signs and bytes that are no UTF-8."""
    path = tmp_path / "texts"
    path.mkdir()
    for number in range(count):
        generator = random.Random(number)
        words = [
            generator.choice(["the ", "fox ", "d\u00e9j\u00e0 ", "\n", "hi "]).encode()
            for _ in range(200 + 90 * number)
        ]
        (path / f"{number}.txt").write_bytes(b"".join(words) + generator.randbytes(5).replace(b"\0", b"\1"))
    return str(path)


def written(data: str, out, tokenizer=BYTES, way: str = "drawn") -> Store:
    return write_store(Source(data), out, tokenizer, way)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(contents=st.lists(st.binary(min_size=2, max_size=200), min_size=1, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_tokenize_store_stream_decode_gives_the_bytes_back(tmp_path_factory, name, contents):
    directory = tmp_path_factory.mktemp("corpus")
    (directory / "texts").mkdir()
    for number, content in enumerate(contents):
        (directory / "texts" / f"{number}.txt").write_bytes(content.replace(b"\0", b"\1"))
    found = written(str(directory / "texts"), directory / "store", TOKENIZERS[name]())
    documents = [found.document(number) for number in range(len(found))]
    assert [document.text() for document in documents] == [content.replace(b"\0", b"\1") for content in contents]
    for document in documents:
        if len(document) < 2:
            continue
        stream = DocumentStream(Shuffled([document], seed=0), batch=1, segment=3)
        tokens = []
        while len(tokens) < len(document) - 1:
            batch = stream.next()
            tokens += batch.tokens[0, : batch.lengths[0]].tolist()
        assert document.tokenizer.decode([*tokens, int(document.content[-1])]) == document.text()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_store_is_the_corpus_that_it_was_made_of(tmp_path, name):
    data, tokenizer = folder(tmp_path), TOKENIZERS[name]()
    written(data, tmp_path / "store", tokenizer)
    raw, stored = load_corpus(data, tokenizer=tokenizer), load_corpus(str(tmp_path / "store"))
    assert raw.fingerprint == stored.fingerprint == load_corpus(data).fingerprint
    assert raw.documents.library.contents == stored.documents.library.contents
    for part in ("train", "validation", "test", "documents"):
        left, right = (
            [(document.name, document.content.tolist()) for document in getattr(corpus, part)]
            for corpus in (raw, stored)
        )
        assert left == right


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_stream_is_the_same_over_any_number_of_ranks_and_over_resume(tmp_path, name):
    written(folder(tmp_path), tmp_path / "store", TOKENIZERS[name]())

    def streams(ranks: int) -> list[DocumentStream]:
        order = Shuffled(load_corpus(str(tmp_path / "store")).train, seed=1)
        return [DocumentStream(order, 6, 16, Ranks(rank, ranks).rows(6)) for rank in range(ranks)]

    def read(of_ranks: list[DocumentStream], count: int) -> list[list]:
        found = []
        for _ in range(count):
            batches = [stream.next() for stream in of_ranks]
            counts = {(batch.scored, batch.real, batch.more) for batch in batches}
            assert len(counts) == 1, "what is counted is counted over all rows"
            found.append([row for batch in batches for row in batch.tokens.tolist()])
        return found

    alone = read(streams(1), 60)
    for ranks in (2, 3):
        assert read(streams(ranks), 60) == alone
    begun = streams(3)
    read(begun, 25)
    resumed = streams(2)
    for stream in resumed:
        stream.load_state_dict(begun[0].state_dict())
    assert read(resumed, 35) == alone[25:]


def test_bytes_of_labels_are_counted(tmp_path):
    (tmp_path / "book.txt").write_bytes(TEXT + b"\xe2\x82")
    found = written(str(tmp_path / "book.txt"), tmp_path / "store", learned())
    document = found.document(0)
    batches = []
    stream = DocumentStream(Shuffled([document], seed=0), batch=1, segment=64)
    while not batches or not batches[-1].fresh[0] or len(batches) == 1:
        batches.append(stream.next())
    batches.pop()
    first = document.size(0, 1)
    assert sum(batch.scored + batch.more for batch in batches) == len(TEXT) + 2 - first
    assert sum(int(batch.sizes.sum()) for batch in batches) == len(TEXT) + 2 - first


def test_a_store_is_as_small_as_its_vocabulary_lets_it_be(tmp_path):
    (tmp_path / "book.txt").write_bytes(TEXT)
    for name, tokenizer, width in (("bytes", BYTES, 1), ("tokens", learned(), 2)):
        found = written(str(tmp_path / "book.txt"), tmp_path / name, tokenizer)
        assert (tmp_path / name / store.TOKENS).stat().st_size == width * int(found.lengths.sum())


@pytest.mark.parametrize("name", ["bytes", "learned"])
@pytest.mark.parametrize("stops_after", range(1, 9, 2))
def test_what_was_interrupted_goes_on_and_ends_as_if_it_never_was(tmp_path, monkeypatch, name, stops_after):
    data, tokenizer = folder(tmp_path), TOKENIZERS[name]()
    monkeypatch.setattr(tokenize, "SAVED_EVERY", 400)
    monkeypatch.setattr(tokenize, "CHUNKS_AT_ONCE", 2)
    monkeypatch.setattr("memtrans.data.tokens.CHUNK", 150)
    monkeypatch.setattr("memtrans.data.texts.PIECE", 150)
    whole = written(data, tmp_path / "whole", tokenizer)
    calls = 0

    def report(size: int) -> None:
        nonlocal calls
        calls += 1
        if calls == stops_after:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_store(Source(data), tmp_path / "cut", tokenizer, "drawn", report=report)
    with pytest.raises(ValueError, match=r"store must be whole, got .* where tokenizing has not ended"):
        Store(tmp_path / "cut")
    calls = 99
    encoded = []
    with monkeypatch.context() as patch:
        encode = type(tokenizer).encode_chunks
        patch.setattr(
            type(tokenizer), "encode_chunks", lambda self, chunks: encoded.extend(chunks) or encode(self, chunks)
        )
        written(data, tmp_path / "cut", tokenizer)
    assert sum(map(len, encoded)) < int(whole.sizes.sum()), "what is done is not done again"
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("short", [b"", b"x"])
def test_texts_that_are_too_short_to_count_are_no_change_behind_an_interruption(tmp_path, monkeypatch, name, short):
    contents = {"0": short, "1": b"done", "2": short, "3": b"x" * 400, "4": short, "5": b"the end"}
    (tmp_path / "texts").mkdir()
    for number, content in contents.items():
        (tmp_path / "texts" / number).write_bytes(content)
    monkeypatch.setattr(tokenize, "SAVED_EVERY", 100)
    monkeypatch.setattr(tokenize, "CHUNKS_AT_ONCE", 2)
    monkeypatch.setattr("memtrans.data.texts.PIECE", 60)
    monkeypatch.setattr("memtrans.data.tokens.CHUNK", 60)

    def report(size: int) -> None:
        raise OSError(28, "No space left on device")

    tokenizer = TOKENIZERS[name]()
    with pytest.raises(OSError, match="No space"):
        write_store(Source(str(tmp_path / "texts")), tmp_path / "store", tokenizer, "drawn", report=report)
    assert json.loads((tmp_path / "store" / store.PROGRESS).read_text())["chunks"], "within the longest text"
    found = written(str(tmp_path / "texts"), tmp_path / "store", tokenizer)
    assert [(found.name(number), found.document(number).text()) for number in range(len(found))] == [
        (number, content) for number, content in contents.items() if len(content) > 1
    ]


def test_many_short_texts_are_made_tokens_together(tmp_path, monkeypatch):
    (tmp_path / "some.jsonl").write_text("".join(f'{{"text": "the fox {number}"}}\n' for number in range(500)))
    tokenizer, calls = learned(), []
    encode = type(tokenizer).encode_chunks
    monkeypatch.setattr(
        type(tokenizer), "encode_chunks", lambda self, chunks: calls.append(chunks) or encode(self, chunks)
    )
    found = written(str(tmp_path / "some.jsonl"), tmp_path / "store", tokenizer)
    assert [len(chunks) for chunks in calls] == [500]
    assert [found.document(number).text() for number in (0, 499)] == [b"the fox 0", b"the fox 499"]


def test_texts_that_changed_meanwhile_and_other_tokenizers_are_refused(tmp_path, monkeypatch):
    data = folder(tmp_path)
    monkeypatch.setattr(tokenize, "SAVED_EVERY", 400)
    done = []

    def report(size: int) -> None:
        done.append(size)
        if size:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_store(Source(data), tmp_path / "store", BYTES, "drawn", report=report)
    with pytest.raises(ValueError, match="out must be unfinished by the same data and tokenizer"):
        written(data, tmp_path / "store", learned())
    (tmp_path / "texts" / "0.txt").write_bytes(b"another text")
    with pytest.raises(ValueError, match=r"data must be what it was when tokenizing began, got '0.txt' changed since"):
        written(data, tmp_path / "store")


@pytest.mark.parametrize("change", ["begun text", "text that is done", "fewer texts"])
def test_a_text_that_changed_is_told_wherever_the_work_stopped(tmp_path, monkeypatch, change):
    data = folder(tmp_path)
    monkeypatch.setattr(tokenize, "SAVED_EVERY", 300)
    monkeypatch.setattr("memtrans.data.texts.PIECE", 150)
    monkeypatch.setattr(tokenize, "CHUNKS_AT_ONCE", 2)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "texts").iterdir())]

    def report(size: int) -> None:
        if size > sizes[0] + sizes[1] + 400:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_store(Source(data), tmp_path / "store", BYTES, "drawn", report=report)
    if change == "fewer texts":
        for path in sorted((tmp_path / "texts").iterdir())[1:]:
            path.unlink()
    else:
        path = tmp_path / "texts" / ("2.txt" if change == "begun text" else "1.txt")
        path.write_bytes(b"X" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="data must be what it was when tokenizing began"):
        written(data, tmp_path / "store")


@pytest.fixture
def some_store(tmp_path):
    (tmp_path / "book.txt").write_bytes(TEXT)
    written(str(tmp_path / "book.txt"), tmp_path / "store", learned())
    return tmp_path / "store"


@pytest.mark.parametrize("name", [store.TOKENS, store.DOCUMENTS, store.NAMES, "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_store_is_refused_by_name(some_store, name, damage):
    content = (some_store / name).read_bytes()
    if damage == "missing":
        (some_store / name).unlink()
    else:
        (some_store / name).write_bytes(content[:-1] + (b"" if damage == "cut" else bytes([content[-1] ^ 1])))
    message = {
        "cut": rf"{name} has \d+ of \d+ bytes",
        "changed": f"{name} was changed",
        "missing": f"{name} is missing",
    }
    with pytest.raises(ValueError, match=f"store must be whole, got .*{message[damage]}"):
        load_corpus(str(some_store))


def test_stores_of_other_versions_and_tokenizers_are_refused(some_store, tmp_path):
    with pytest.raises(ValueError, match=r"data must hold tokens of bytes, got .* a vocabulary of 280"):
        load_corpus(str(some_store), tokenizer=BYTES)
    index = json.loads((some_store / store.INDEX).read_text())
    (some_store / store.INDEX).write_text(json.dumps({**index, "version": 2}))
    with pytest.raises(ValueError, match="store must be of version 1, got 2"):
        load_corpus(str(some_store))
    (some_store / store.INDEX).write_text(json.dumps({**index, "tokens": 1}))
    with pytest.raises(ValueError, match=r"store.json was changed"):
        load_corpus(str(some_store))
    (some_store / store.INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"store must have a whole store.json"):
        load_corpus(str(some_store))


def test_an_empty_corpus_and_a_document_too_long_are_refused(tmp_path, monkeypatch):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="data must hold text of at least 2 bytes, got none in"):
        written(str(tmp_path / "empty.txt"), tmp_path / "store")
    assert not list((tmp_path / "store").iterdir()), "nothing is left behind"
    (tmp_path / "long.txt").write_bytes(TEXT)
    monkeypatch.setattr(tokenize, "MOST_TOKENS", 1000)
    with pytest.raises(ValueError, match=r"documents of fewer than 1000 tokens, got more in 'long.txt': cut it into"):
        written(str(tmp_path / "long.txt"), tmp_path / "store")


@pytest.mark.parametrize("name", ["store.json", "tokens.bin", "tokenizer.json"])
def test_a_file_of_a_store_is_no_text(some_store, name):
    with pytest.raises(ValueError, match=rf"data must be the directory of a store of tokens, got '.*{name}', a fi"):
        load_corpus(str(some_store / name))


def test_nothing_that_is_there_is_overwritten(some_store, tmp_path):
    with pytest.raises(ValueError, match="out must hold no store"):
        written(str(tmp_path / "book.txt"), some_store)
    for name in ("thesis.tex", "tokenizer.json", ".lock.txt"):
        (tmp_path / name[1:]).mkdir()
        (tmp_path / name[1:] / name).touch()
        with pytest.raises(ValueError, match=rf"out must be an empty directory or not exist, got .* holds '{name}'"):
            written(str(tmp_path / "book.txt"), tmp_path / name[1:])


def test_long_texts_are_read_from_a_store_that_is_made_once(tmp_path, monkeypatch, capsys):
    data = folder(tmp_path)
    monkeypatch.setenv("MEMTRANS_CACHE", str(tmp_path / "cache"))
    in_memory = load_corpus(data)
    monkeypatch.setattr(sources, "MOST_READ", 100)
    first = load_corpus(data)
    assert "making tokens of" in capsys.readouterr().err
    second = load_corpus(data)
    assert capsys.readouterr().err == ""
    assert in_memory.fingerprint == first.fingerprint == second.fingerprint
    assert [document.name for document in in_memory.train] == [document.name for document in second.train]
    with (tmp_path / "texts" / "0.txt").open("ab") as file:
        file.write(b"more")
    assert load_corpus(data).fingerprint != first.fingerprint


def test_a_directory_of_stores_that_will_not_do_is_named_with_what_helps(tmp_path, monkeypatch):
    data = folder(tmp_path)
    monkeypatch.setattr(sources, "MOST_READ", 100)
    for cache in (tmp_path / "texts" / "0.txt", tmp_path / "texts" / "0.txt" / "deeper"):
        monkeypatch.setenv("MEMTRANS_CACHE", str(cache))
        with pytest.raises(OSError, match=r"MEMTRANS_CACHE must name a directory .* got '.*0.txt"):
            load_corpus(data)
    monkeypatch.setenv("MEMTRANS_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as full:
        full.setattr(tokenize._Writer, "save", fill_up)
        with pytest.raises(OSError, match=r"MEMTRANS_CACHE must .*No space left"):
            load_corpus(data)
    load_corpus(data)
    (file,) = tmp_path.glob("cache/*/names.bin")
    file.unlink()
    with pytest.raises(ValueError, match=r"names.bin is missing; remove that directory, and the next run makes it"):
        load_corpus(data)


def test_where_stores_of_runs_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, found in (("~/stores", "stores"), ("", ".cache/memtrans")):
        monkeypatch.setenv("MEMTRANS_CACHE", value)
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        assert sources.cache_directory() == tmp_path / found
    monkeypatch.setattr(sources.Path, "home", homeless)
    with pytest.raises(ValueError, match="MEMTRANS_CACHE must name a directory for stores where the user has none"):
        sources.cache_directory()


def fill_up(writer) -> None:
    raise OSError(28, "No space left on device")


def homeless() -> None:
    raise RuntimeError("Could not determine home directory.")


def test_enwik8_keeps_its_split_in_a_store(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "ENWIK8_SPLIT", (901, 49, 50))
    (tmp_path / "enwik8").write_bytes((TEXT * 2)[:1000])
    source = Source(str(tmp_path / "enwik8"))
    way = held_out.way_of(source)
    write_store(source, tmp_path / "store", learned(), way, held_out.cuts_of(way))
    corpus = load_corpus(str(tmp_path / "store"))
    parts = [part[0].text() for part in (corpus.train, corpus.validation, corpus.test)]
    assert [len(part) for part in parts] == [901, 49, 50] and b"".join(parts) == (TEXT * 2)[:1000]


def test_the_end_of_a_single_text_is_held_out_in_bytes(tmp_path):
    (tmp_path / "book.txt").write_bytes(TEXT)
    corpus = load_corpus(str(tmp_path / "book.txt"), tokenizer=learned())
    train, held_out = corpus.train[0].text(), corpus.validation[0].text()
    assert train + held_out == TEXT and abs(len(held_out) - len(TEXT) // 10) < 20
    assert corpus.train[0].content.numpy().dtype == np.uint16
