"""`python -m memtrans tokenize`: texts become a store of tokens, which `train` and `eval` read."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from memtrans.cli.ending import EndedError, reading_input, show_json
from memtrans.data.held_out import cuts_of, pieces_to_learn, way_of
from memtrans.data.records import Fields
from memtrans.data.store import PROGRESS
from memtrans.data.texts import Source
from memtrans.data.tokenize import check_new, check_texts, describe, lock_store, write_store
from memtrans.data.tokens import FILE, FileTokenizer, Tokenizer, check_learnable, open_tokenizer, train_vocabulary
from memtrans.distributed.ranks import Ranks
from memtrans.files import MOST_JSON, read_file

SHARED = False


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Writes the store and prints what it holds."""
    del ranks
    begin = time.perf_counter()
    with reading_input():
        source = Source(options.data, Fields(options.text_field, options.join_by))
        check_texts(source)
        tokenizer = _tokenizer(options, source)
        way = way_of(source)
        try:
            learned = options.train_vocabulary
            store = write_store(source, options.out, tokenizer, way, cuts_of(way), _report, learned)
        except OSError as error:
            if error.filename is not None and not _is_of(error, options.out):
                raise
            raise EndedError(
                f"writing to {options.out} failed: {error}; the same command goes on from there"
            ) from error
    show_json({**describe(store), "seconds": round(time.perf_counter() - begin, 1)})


def _tokenizer(options: argparse.Namespace, source: Source) -> Tokenizer:
    """The tokenizer that is asked for; in the place of one to train, that of an earlier call that has not ended."""
    if options.train_vocabulary is None:
        return open_tokenizer(options.tokenizer)
    if options.tokenizer is not None:
        raise ValueError(f"tokenizer must not be given with train_vocabulary, got {options.tokenizer!r}")
    if source.is_pipe():
        raise ValueError(f"data must be read twice to learn a vocabulary, got {options.data!r}, a pipe")
    file = options.out / FILE
    if (options.out / PROGRESS).is_file() and file.is_file():
        return FileTokenizer(read_file("tokenizer", file, MOST_JSON), str(file))
    check_new(options.out)
    check_learnable(options.train_vocabulary)
    lock = lock_store(options.out)  # what cannot be written is refused before anything is learned
    try:
        print(f"learning a vocabulary of {options.train_vocabulary} tokens", file=sys.stderr, flush=True)
        return FileTokenizer(train_vocabulary(pieces_to_learn(source), options.train_vocabulary), str(file))
    finally:
        lock.release()


def _report(size: int) -> None:
    amount = f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size:,} bytes"
    print(f"{amount} of text are tokens", file=sys.stderr, flush=True)


def _is_of(error: OSError, out: Path) -> bool:
    """Whether an error is of a file in the directory."""
    return Path(str(error.filename)).is_relative_to(out)
