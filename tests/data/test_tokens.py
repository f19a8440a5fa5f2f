"""Tokenizers give every text back, whatever it is, and know the bytes of each token."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrans.data import tokens
from memtrans.data.tokens import BYTES, FileTokenizer, chunks_of, open_tokenizer, train_vocabulary
from tests.helpers.vocabularies import TEXT, learned, losing, with_byte_fallback

TOKENIZERS = {"bytes": lambda: BYTES, "learned": learned, "byte fallback": with_byte_fallback}
texts = st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")))
HARD = [
    b"",
    b"\xff",
    b"hi \xc3",
    b"\x80" * 70_000,
    bytes(range(256)) * 3,
    " hi\u2581a".encode(),
    "hi ab\u2581 h\u00e9 \U0001f600".encode(),
    b"x" * 200_000,
    "\u00e9".encode() * 70_000,
    "e\u0301 \ufb01".encode(),
]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(text=texts)
def test_a_text_comes_back(name, text):
    tokenizer = TOKENIZERS[name]()
    found = tokenizer.encode(text)
    assert tokenizer.decode(found) == text
    assert int(tokenizer.sizes[found].sum()) == len(text), "an invalid tail of UTF-8 included"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_a_hard_text_comes_back(name, text):
    tokenizer = TOKENIZERS[name]()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(st.lists(texts, max_size=5), st.lists(st.integers(1, 500), max_size=3).map(lambda cuts: sorted(set(cuts))))
def test_chunks_are_the_text_and_end_where_they_are_told_to(pieces, cuts):
    chunks = list(chunks_of(pieces, cuts))
    text = b"".join(pieces)
    assert b"".join(chunks) == text
    ends = {sum(map(len, chunks[: number + 1])) for number in range(len(chunks))}
    assert {cut for cut in cuts if cut <= len(text)} <= ends | {0}


@pytest.mark.parametrize("size", [1, 7, 1000, 2**16, 2**20])
def test_chunks_do_not_depend_on_the_pieces(size):
    text = (TEXT * 60)[:150_000] + "\u00e9".encode() * 40_000
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    chunks = list(chunks_of(pieces if size > 1 else [text[:1], text[1:]]))
    assert chunks == list(chunks_of([text]))
    assert max(map(len, chunks)) <= tokens.CHUNK
    assert chunks[0].endswith(b" "), "a chunk ends with a word"
    assert all(chunk.decode() for chunk in chunks), "and never within a character"


def test_a_learned_vocabulary_makes_fewer_tokens_than_bytes():
    tokenizer = learned()
    assert (tokenizer.vocabulary, len(tokenizer.encode(TEXT)) < len(TEXT) / 2) == (280, True)
    with pytest.raises(ValueError, match="train_vocabulary must be at least 256, a token for each byte, got 255"):
        train_vocabulary([TEXT], 255)
    with pytest.raises(ValueError, match="train_vocabulary must be at most 16777216, got 18446744073709551616"):
        train_vocabulary([TEXT], 2**64)


def test_bytes_that_are_no_utf8_cut_no_words_elsewhere():
    tokenizer, texts = learned(), [b"the quick brown fox j", b"mps over the l", b"zy dog"]
    single = tokenizer.encode(b"\xfc").tolist()
    expected = single + tokenizer.encode(texts[0]).tolist()
    for text in texts[1:]:
        expected += single + tokenizer.encode(text).tolist()
    assert tokenizer.encode(b"\xfc" + b"\xfc".join(texts)).tolist() == expected


def test_what_a_tokenizer_would_lose_is_refused_by_name():
    with pytest.raises(ValueError, match=r"tokenizer must give every text back.*got 'few.json', which loses 'H'"):
        losing().encode(b"Hello")


def test_added_tokens_truncation_and_padding_change_no_text():
    description = json.loads(learned().content)
    description["added_tokens"] = [
        {
            "id": 280,
            "content": "<|end|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    description["truncation"] = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    tokenizer = FileTokenizer(json.dumps(description).encode())
    found = tokenizer.encode(b"the fox<|end|>the dog")
    assert 280 in found and tokenizer.vocabulary == 281
    assert tokenizer.decode(found) == b"the fox<|end|>the dog"


def test_a_small_vocabulary_counts_as_large_as_that_of_bytes():
    """A model has 256 tokens at least; those beyond the tokenizer's stand for nothing."""
    assert losing().vocabulary == 256
    assert losing().decode([1, 255]) == b"hello"


def test_names_of_tokenizers(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(learned().content)
    by_file, by_directory = (open_tokenizer(str(path)) for path in (tmp_path / "tokenizer.json", tmp_path))
    assert by_file.digest == by_directory.digest == learned().digest
    assert open_tokenizer(None) is open_tokenizer("bytes") is BYTES


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"not json", b"\xff\xfe"])
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer must be a tokenizer.json, got .*tokenizer.json"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"tokenizer must be bytes, a tokenizer.json .* got '/no/such'"):
        open_tokenizer("/no/such")


@pytest.mark.parametrize("vocabulary", [2**16 - 1, 2**16, 2**16 + 1])
def test_the_last_token_of_a_vocabulary_is_kept(vocabulary):
    tokenizer = FileTokenizer(numbered({"a": 0, "b": vocabulary - 1}))
    assert (tokenizer.vocabulary, tokenizer.encode(b"ab").tolist()) == (vocabulary, [0, vocabulary - 1])


def test_numbers_of_tokens_beyond_any_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"tokens below 16777216, got 4000000000 in 'far.json'"):
        FileTokenizer(numbered({"a": 0, "b": 4_000_000_000}), "far.json")


def test_a_tokenizer_without_tokens_loses_every_text():
    with pytest.raises(ValueError, match=r"got 'none.json', which loses 'a'"):
        FileTokenizer(numbered({}), "none.json").encode(b"ab")


def numbered(tokens: dict[str, int]) -> bytes:
    """A tokenizer.json of tokens that are single characters, with these numbers."""
    return json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": tokens, "merges": []}}).encode()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizer must be bytes without tokenizers: pip install 'memtrans\[text\]'"):
        FileTokenizer(learned().content)
