"""Files of records, each a text: JSON lines, Parquet, and datasets that Hugging Face's library saved to disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

from memtrans.files import parse_json, read_file

COLUMNAR = (".parquet",)
RECORDS = (".jsonl", ".ndjson", *COLUMNAR)  # what files of records end with, before a compression's name
STATE = "state.json"  # names the files of a dataset on disk
SAVED_DATASET = (STATE, "dataset_info.json")
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of Arrow; without it a reader takes what is left for the whole
UNREADABLE = (OSError, UnicodeDecodeError)  # what damaged columns raise, beside the library's own errors
AT_ONCE = 256  # records of a columnar file
PIECE = 1 << 20  # bytes of a columnar file that are read at once
MOST_SHOWN = 200  # characters of a record or of its fields that an error shows


class Text(NamedTuple):
    """A name, and the pieces of what it says, which are read before the next text is asked for."""

    name: str
    pieces: Iterator[bytes]


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are read.

    Attributes:
        text: holds the text. join_by: records next to one another with the same value of this field are one text; None
            makes each record one.
    """

    text: str = "text"
    join_by: str | None = None

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.text, self.join_by) if name is not None))


class Record(NamedTuple):
    """Where a record stands, what it is joined by, and its text."""

    number: int
    key: Any
    text: bytes


def is_saved_dataset(path: Path) -> bool:
    """Whether Hugging Face's library saved a dataset there, or a split of one."""
    return all((path / name).is_file() for name in SAVED_DATASET)


def begins_with_record(beginning: bytes, fields: Fields) -> bool:
    """Whether a text looks like JSON lines: its first line is a record with the fields, and others come behind it."""
    line, _, behind = beginning.partition(b"\n")
    if not behind.strip():
        return False
    try:
        record = parse_json(line)
    except ValueError:
        return False
    return isinstance(record, dict) and all(name in record for name in fields.names)


def records_of(
    name: str, path: Path, content: IO[bytes] | None, lines: Iterable[bytes] | None, fields: Fields
) -> Iterator[Text]:
    """The texts of a file of records, or of a directory that is a saved dataset.

    name: of the file, with which each text's name begins. content: of the file, None of a directory. lines: of a file
        that has lines.

    Raises ValueError where a record lacks a field, or the file is damaged.
    """
    if content is None:
        records = _of_dataset(path, fields)
    elif lines is None:
        records = _of_columns(path, content, fields)
    else:
        records = _of_lines(path, lines, fields)
    return _joined(name, records) if fields.join_by else _single(name, records)


def _single(name: str, records: Iterable[Record]) -> Iterator[Text]:
    for record in records:
        yield Text(f"{name}:{record.number}", iter([record.text]))


def _joined(name: str, records: Iterable[Record]) -> Iterator[Text]:
    for (_, key), members in groupby(records, key=lambda record: (type(record.key), str(record.key))):
        yield Text(f"{name}:{_as_name(key)}", (record.text for record in members))


def _as_name(value: str) -> str:
    """A value as names of files are written: halves of a character, which JSON may hold, as bytes that are no UTF-8.

    >>> _as_name("half " + chr(0xD83D)).encode(errors="surrogateescape")
    b'half \\xed\\xa0\\xbd'
    """
    return value.encode(errors="surrogatepass").decode(errors="surrogateescape")


def _record(number: int, values: Any, fields: Fields, where: str) -> Record:
    """A record of its values. Raises ValueError where it lacks a field, or the field holds no text."""
    if not isinstance(values, dict):
        raise ValueError(f"data must hold an object in each record, got {str(values)[:MOST_SHOWN]!r} in {where}")
    for name in fields.names:
        if name not in values:
            found = ", ".join(map(str, values))[:MOST_SHOWN]
            raise ValueError(f"data must hold the field {name!r} in each record, got {found or 'no field'} in {where}")
    text = values[fields.text]
    if isinstance(text, str):
        text = text.encode(errors="surrogatepass")
    if not isinstance(text, bytes):
        raise ValueError(f"data must hold a text as {fields.text!r}, got {str(text)[:MOST_SHOWN]!r} in {where}")
    key = None if fields.join_by is None else values[fields.join_by]
    if fields.join_by is not None and key is None:
        raise ValueError(f"data must hold a value as {fields.join_by!r} in each record, got none in {where}")
    return Record(number, key, text)


def _of_lines(path: Path, lines: Iterable[bytes], fields: Fields) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise ValueError(f"data must hold JSON in each line, got none in {where}: {error}") from error
        yield _record(number, values, fields, where)


def _of_columns(path: Path, content: IO[bytes], fields: Fields) -> Iterator[Record]:
    arrow = _arrow(path)
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(content, buffer_size=PIECE, pre_buffer=False)  # whose groups may be of any size
        _check_columns(file.schema_arrow.names, fields, path)
        batches = file.iter_batches(batch_size=AT_ONCE, columns=fields.names)
        yield from _of_batches(batches, fields, path, 1)
    except (arrow.ArrowException, *UNREADABLE) as error:
        raise _damaged(path, "Parquet", error) from error


def _of_dataset(path: Path, fields: Fields) -> Iterator[Record]:
    arrow = _arrow(path)
    number = 1
    for file in _data_files(path):
        try:
            with arrow.memory_map(str(file)) as mapped, arrow.ipc.open_stream(mapped) as batches:
                if mapped.read_at(len(END), max(0, mapped.size() - len(END))) != END:
                    raise _damaged(file, "Arrow", EOFError("the file ends before its content does"))
                _check_columns(batches.schema.names, fields, file)
                for batch in batches:
                    small = (batch.slice(start, AT_ONCE) for start in range(0, batch.num_rows, AT_ONCE))
                    yield from _of_batches(small, fields, file, number)
                    number += batch.num_rows
        except (arrow.ArrowException, *UNREADABLE) as error:
            raise _damaged(file, "Arrow", error) from error


def _data_files(path: Path) -> list[Path]:
    """The files that a saved dataset names."""
    try:
        files = parse_json(read_file(STATE, path / STATE))["_data_files"]
        return [path / Path(file["filename"]).name for file in files]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data must name its files in {STATE}, got {str(path)!r} without") from error


def _of_batches(batches: Iterable[Any], fields: Fields, path: Path, first: int) -> Iterator[Record]:
    """The records of columns; `first` is the number of the first one."""
    number = first
    for batch in batches:
        columns = [batch.column(name).to_pylist() for name in fields.names]
        for values in zip(*columns, strict=True):
            values_by_name = dict(zip(fields.names, values, strict=True))
            yield _record(number, values_by_name, fields, f"record {number} of {str(path)!r}")
            number += 1


def _check_columns(found: list[str], fields: Fields, path: Path) -> None:
    for name in fields.names:
        if found.count(name) != 1:
            shown = ", ".join(found)[:MOST_SHOWN]
            once = " once" if name in found else ""
            raise ValueError(f"data must hold the field {name!r}{once} in each record, got {shown} in {str(path)!r}")


def _damaged(path: Path, kind: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"data must hold whole {kind} files, got {str(path)!r}: {reason}")


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ValueError(
            f"data must hold no columnar files where pyarrow is missing, got {str(path)!r}: "
            f"pip install 'memtrans[text]' ({error})"
        ) from error
    return pyarrow
