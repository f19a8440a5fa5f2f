"""Files of records: each a document, joined where a field says so, never held as a whole."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import tracemalloc
import zipfile
from functools import cache

import pytest
from helpers.packages import package

from memtrans.data.records import Fields
from memtrans.data.sources import load_corpus
from memtrans.data.texts import Source
from memtrans.data.tokenize import write_store
from memtrans.data.tokens import BYTES

RECORDS = [{"text": f"text {number}, d\u00e9j\u00e0 vu", "book": number // 3, "n": None} for number in range(9)]


def lines(records=RECORDS) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read(path, **fields) -> dict[str, str]:
    return {name: b"".join(pieces).decode() for name, pieces in Source(str(path), Fields(**fields)).texts()}


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        import zstandard

        half = len(content) // 2  # two frames, as `cat` makes them
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        return compressor.compress(content[:half]) + compressor.compress(content[half:])
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](content)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("ending", ["jsonl", "JSONL"])
def test_each_line_is_a_document(tmp_path, suffix, ending):
    path = tmp_path / f"some.{ending}{suffix}"
    path.write_bytes(compressed(lines(), suffix))
    assert list(read(path).values()) == [record["text"] for record in RECORDS]
    corpus = load_corpus(str(path))
    assert len(corpus.train) + len(corpus.validation) == 9


def test_records_side_by_side_are_joined_by_a_field(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(lines())
    found = read(tmp_path / "some.jsonl", join_by="book")
    assert list(found) == ["some.jsonl:0", "some.jsonl:1", "some.jsonl:2"]
    assert found["some.jsonl:1"] == "".join(record["text"] for record in RECORDS[3:6])


def test_values_of_other_types_join_no_records(tmp_path):
    rows = [{"text": f"text {number}", "book": book} for number, book in enumerate((1, 1, "1", "True", True, [1], [1]))]
    (tmp_path / "some.jsonl").write_bytes(lines(rows))
    found = [b"".join(pieces) for _, pieces in Source(str(tmp_path / "some.jsonl"), Fields(join_by="book")).texts()]
    assert found == [b"text 0text 1", b"text 2", b"text 3", b"text 4", b"text 5text 6"]
    (tmp_path / "some.jsonl").write_bytes(lines([*rows, {"text": "a", "book": None}]))
    with pytest.raises(ValueError, match=r"data must hold a value as 'book' in each record, got none in line 8 of"):
        read(tmp_path / "some.jsonl", join_by="book")


def test_another_field_holds_the_text(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(lines([{"content": "hello"}, {"content": "you"}]))
    assert list(read(tmp_path / "some.jsonl", text="content").values()) == ["hello", "you"]


def test_a_directory_may_hold_records_and_texts(tmp_path):
    (tmp_path / "sub" / "below").mkdir(parents=True)
    (tmp_path / "a.txt").write_bytes(b"plain")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS[:2])))
    (tmp_path / "sub" / "c.txt").write_bytes(b"below")
    (tmp_path / "sub" / "below" / "d.jsonl").write_bytes(lines(RECORDS[:1]))
    found = read(tmp_path)
    assert list(found) == ["a.txt", "b.jsonl.gz:1", "b.jsonl.gz:2", "sub", "sub/below/d.jsonl:1"]
    assert found["sub"] == "below"


def test_an_archive_may_hold_records_and_texts_packed_or_not(tmp_path):
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", lines(RECORDS[:1]))
        archive.writestr("b/c.jsonl.gz", gzip.compress(lines(RECORDS[1:2])))
        archive.writestr("d.txt.gz", gzip.compress(b"a text"))
    texts = [record["text"] for record in RECORDS[:2]]
    assert read(path) == {
        "some.zip/a.jsonl:1": texts[0], "some.zip/b/c.jsonl.gz:1": texts[1], "some.zip/d.txt.gz": "a text"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"got text, book, n in line 1 of '.*some.zip/a.jsonl'"):
        read(path, text="body")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("e.txt.gz", b"a text that is not packed")
    with pytest.raises(ValueError, match=r"data must hold whole .gz archives, got '.*some.zip/e.txt.gz'"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"title": "x"}', r"the field 'text' in each record, got title in line 2 of .*some.jsonl"),
        (b"{}", "the field 'text' in each record, got no field in line 2"),
        (b'{"text": null}', "a text as 'text', got 'None' in line 2"),
        (b'{"text": ["x"]}', "a text as 'text'"),
        (b'"text"', "an object in each record, got 'text' in line 2"),
        (b'{"text": "cut', "JSON in each line, got none in line 2"),
        (b'{"text": "\xff"}', "JSON in each line, got none in line 2"),
        (b"[" * 100_000, "JSON in each line, got none in line 2"),
    ],
)
def test_a_record_that_will_not_do_is_refused_by_its_line(tmp_path, line, message):
    (tmp_path / "some.jsonl").write_bytes(lines(RECORDS[:1]) + line + b"\n")
    with pytest.raises(ValueError, match=f"data must hold {message}"):
        load_corpus(str(tmp_path / "some.jsonl"))
    with pytest.raises(ValueError, match="the field 'author' in each record, got text, book, n in line 1"):
        read(tmp_path / "some.jsonl", join_by="author")


def test_half_a_character_is_kept(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(b'{"text": "half \\ud83d"}\n')
    ((_, pieces),) = ((name, b"".join(pieces)) for name, pieces in Source(str(tmp_path / "some.jsonl")).texts())
    assert pieces == "half \ud83d".encode(errors="surrogatepass")


def test_half_a_character_may_join_records(tmp_path):
    rows = [{"text": f"text {number}", "book": book} for number, book in enumerate(("\ud83d", "\ud83d", "\udcff", "b"))]
    (tmp_path / "some.jsonl").write_bytes(lines(rows))
    corpus = load_corpus(str(tmp_path / "some.jsonl"), fields=Fields(join_by="book"))
    assert [document.text() for document in corpus.documents] == [b"text 0text 1", b"text 2", b"text 3"]
    store = write_store(
        Source(str(tmp_path / "some.jsonl"), Fields(join_by="book")), tmp_path / "store", BYTES, "drawn"
    )
    assert [store.name(number) for number in range(3)] == [document.name for document in corpus.documents]


def test_a_window_of_any_length_is_read(tmp_path):
    import zstandard

    long = zstandard.ZstdCompressionParameters(window_log=28, chain_log=6, hash_log=6, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=long).compressobj()
    (tmp_path / "some.jsonl.zst").write_bytes(compressor.compress(lines()) + compressor.flush())
    assert list(read(tmp_path / "some.jsonl.zst").values()) == [record["text"] for record in RECORDS]


@cache  # to compress them takes its time
def long_archive(suffix):
    """Longer than what is read at once."""
    noise = random.Random(0)
    return compressed(lines([{"text": noise.randbytes(1000).hex()} for _ in range(1200)]), suffix)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["cut", "changed"])
@pytest.mark.parametrize("name", ["some.jsonl", "book.txt"])
def test_damage_is_told_wherever_it_is(tmp_path, suffix, kind, name):
    whole = long_archive(suffix)
    place = len(whole) * 3 // 4
    damaged = whole[:place] if kind == "cut" else whole[:place] + bytes(2000) + whole[place + 2000 :]
    (tmp_path / f"{name}{suffix}").write_bytes(damaged)
    message = f"data must hold whole {suffix} archives, got .*{name}{suffix}|JSON in each line"
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path / f"{name}{suffix}"))


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "some.jsonl.zst").write_bytes(compressed(lines(), ".zst"))
    (tmp_path / "some.parquet").write_bytes(b"PAR1")
    for library, suffix in (("zstandard", "jsonl.zst"), ("pyarrow", "parquet")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ValueError, match=rf"where {library} is missing, .*pip install 'memtrans\[text\]'"):
            load_corpus(str(tmp_path / f"some.{suffix}"))


# ------------------------------------------------------------------------------------------- columns: with pyarrow


def table(records=RECORDS):
    arrow = package("pyarrow")
    return arrow.Table.from_pylist([{"text": record["text"], "book": record["book"]} for record in records])


def saved_dataset(directory, records=RECORDS):
    """As `datasets.Dataset.save_to_disk` writes it: streams of Arrow, and a file that names them."""
    arrow = package("pyarrow")
    directory.mkdir(parents=True)
    rows = table(records)
    for number, part in enumerate((rows.slice(0, 4), rows.slice(4))):
        path = str(directory / f"data-{number}.arrow")
        with arrow.OSFile(path, "wb") as file, arrow.ipc.new_stream(file, rows.schema) as stream:
            stream.write_table(part)
    (directory / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}], "_split": "train"}
    (directory / "state.json").write_text(json.dumps(state))


@pytest.mark.slow
def test_a_row_of_parquet_is_a_document(tmp_path):
    parquet = package("pyarrow.parquet")

    parquet.write_table(table(), tmp_path / "some.parquet", row_group_size=2)
    assert list(read(tmp_path / "some.parquet").values()) == [record["text"] for record in RECORDS]
    assert len(read(tmp_path / "some.parquet", join_by="book")) == 3
    with pytest.raises(ValueError, match=r"the field 'body' in each record, got text, book in .*some.parquet"):
        read(tmp_path / "some.parquet", text="body")
    with pytest.raises(ValueError, match=r"a text as 'book', got '0' in record 1 of .*some.parquet"):
        read(tmp_path / "some.parquet", text="book")
    content = (tmp_path / "some.parquet").read_bytes()
    (tmp_path / "some.parquet").write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"data must hold whole Parquet files, got .*some.parquet"):
        read(tmp_path / "some.parquet")


@pytest.mark.slow
def test_rows_that_are_stored_together_are_read_a_piece_at_a_time(tmp_path):
    arrow, parquet = package("pyarrow"), package("pyarrow.parquet")

    texts = [random.Random(number).randbytes(500).hex() for number in range(20_000)]
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "some.parquet", row_group_size=len(texts))
    found = Source(str(tmp_path / "some.parquet")).texts()
    tracemalloc.start()
    assert b"".join(next(found).pieces).decode() == texts[0]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20, "of 20 MB"
    assert [b"".join(text.pieces).decode() for text in found] == texts[1:]


@pytest.mark.slow
def test_columns_of_one_name_and_bytes_that_are_no_utf8_are_refused_by_file(tmp_path):
    arrow, parquet = package("pyarrow"), package("pyarrow.parquet")

    texts = arrow.array(["one text", "another"])
    parquet.write_table(arrow.Table.from_arrays([texts, texts], names=["text", "text"]), tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"the field 'text' once in each record, got text, text in .*two.parquet"):
        read(tmp_path / "two.parquet")
    invalid = arrow.Array.from_buffers(arrow.string(), 2, [None, texts.buffers()[1], arrow.py_buffer(b"\xff" * 20)])
    parquet.write_table(arrow.table({"text": invalid}), tmp_path / "invalid.parquet")
    with pytest.raises(ValueError, match=r"whole Parquet files, got .*invalid.parquet.*invalid start byte"):
        read(tmp_path / "invalid.parquet")


@pytest.mark.slow
def test_a_saved_dataset_is_read_without_its_library(tmp_path):
    saved_dataset(tmp_path / "set")
    assert list(read(tmp_path / "set").values()) == [record["text"] for record in RECORDS]
    (tmp_path / "set" / "data-1.arrow").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"data must hold whole Arrow files, got .*data-1.arrow"):
        read(tmp_path / "set")


@pytest.mark.slow
def test_a_saved_dataset_that_is_cut_off_anywhere_is_refused(tmp_path):
    saved_dataset(tmp_path / "set")
    content = (tmp_path / "set" / "data-1.arrow").read_bytes()
    for length in range(len(content)):
        (tmp_path / "set" / "data-1.arrow").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"data must hold whole Arrow files, got .*data-1.arrow"):
            read(tmp_path / "set")


@pytest.mark.slow
def test_a_saved_dataset_keeps_its_own_splits(tmp_path):
    for split, records in (("train", RECORDS[:6]), ("validation", RECORDS[6:8]), ("test", RECORDS[8:])):
        saved_dataset(tmp_path / "sets" / split, records)
    (tmp_path / "sets" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    corpus = load_corpus(str(tmp_path / "sets"))
    names = [
        {document.name.split("/")[0] for document in part} for part in (corpus.train, corpus.validation, corpus.test)
    ]
    assert names == [{"train"}, {"validation"}, {"test"}]
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [6, 2, 1]
    (tmp_path / "sets" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    corpus = load_corpus(str(tmp_path / "sets"))
    assert (len(corpus.train) + len(corpus.validation), len(corpus.test)) == (6, 1)


@pytest.mark.slow
def test_datasets_saved_in_a_folder_are_records(tmp_path):
    for name in ("one", "sub/two"):
        saved_dataset(tmp_path / name)
    (tmp_path / "sub" / "a.txt").write_bytes(b"plain")
    found = {name: text for name, text in read(tmp_path).items() if text}
    assert list(found) == [f"one:{n}" for n in range(1, 10)] + ["sub"] + [f"sub/two:{n}" for n in range(1, 10)]
    assert (found["one:1"], found["sub"]) == (RECORDS[0]["text"], "plain")


def test_a_dataset_with_splits_in_a_folder_is_refused(tmp_path):
    """Its split for tests would be learned from."""
    (tmp_path / "sets" / "test").mkdir(parents=True)
    for name in ("test/state.json", "test/dataset_info.json", "dataset_dict.json"):
        (tmp_path / "sets" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"data must be a dataset with splits itself, got .* holds one in '.*/sets'"):
        read(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_memory_stays_flat_over_two_gigabytes(tmp_path, kind):
    """The anonymous memory of a process that tokenizes them and reads them as a stream."""
    block = lines([{"text": "words of a text that is long enough to count, " * 2000}])
    with (tmp_path / f"long.{kind}").open("wb") as file:
        for _ in range(2**31 // len(block) - 10):  # a text of 2^31 tokens would be refused
            file.write(block)
    program = f"""
import sys
from memtrans.data.documents import Shuffled
from memtrans.data.sources import load_corpus
from memtrans.data.stream import DocumentStream
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
begin = anonymous()
corpus = load_corpus({str(tmp_path / f"long.{kind}")!r})
stream = DocumentStream(Shuffled(corpus.train, 0), 8, 4096)
for _ in range(3000):
    stream.next()
print(begin, anonymous(), corpus.documents.library.sizes.sum())
"""
    environment = {"MEMTRANS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    begin, end, size = map(float, result.stdout.split())
    assert size > 1.9e9 and end - begin < 100, f"{end - begin:.0f} MB more"


LINES = ['{"text": "one"}\n{"text": "two"}\n', '{"text": "one", "id": 1}\n\n{"te']
NO_LINES = ['{"text": "one"}', '{"body": "one"}\n{"body": "two"}', '{\n"text": "one"\n}', "[1]\n2"]


@pytest.mark.parametrize("content", LINES)
@pytest.mark.parametrize("inside", [False, True])
def test_records_in_a_file_called_json_are_warned_of_once(tmp_path, recwarn, content, inside):
    file = tmp_path / "part.json"
    file.write_text(content)
    source = Source(str(tmp_path if inside else file))
    for _ in range(2):
        assert [b"".join(text.pieces) for text in source.texts()] == [content.encode()]
    assert ["called .jsonl, each record is a document" in str(said.message) for said in recwarn] == [True]


@pytest.mark.parametrize("content", NO_LINES)
def test_a_json_text_is_no_file_of_records(tmp_path, recwarn, content):
    (tmp_path / "settings.json").write_text(content)
    assert len(list(Source(str(tmp_path)).texts())) == 1 and not list(recwarn)
