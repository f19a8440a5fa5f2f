"""Tokenizers made on the spot: a learned byte-level one, one of SentencePiece's kind, and one that loses text."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from memtrans.data.tokens import FileTokenizer, train_vocabulary

TEXT = b"the quick brown fox jumps over the lazy dog, and the dog dreams of the fox. " * 40


@cache
def learned(size: int = 280) -> FileTokenizer:
    """A byte-level vocabulary."""
    return FileTokenizer(train_vocabulary([TEXT], size))


@cache
def with_byte_fallback() -> FileTokenizer:
    """Words begin with a sign for a space; what has no token becomes bytes; a text begins with a space of its own."""
    vocabulary = {f"<0x{value:02X}>": value for value in range(256)}
    for token in ("<unk>", "\u2581", "a", "b", "\u2581a", "ab", "h", "i", "\u2581h", "\u2581hi"):
        vocabulary[token] = len(vocabulary)
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "h"), ("\u2581h", "i")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return FileTokenizer(tokenizer.to_str().encode())


@cache
def losing() -> FileTokenizer:
    """Knows a few words in small letters."""
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "hello": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return FileTokenizer(tokenizer.to_str().encode(), "few.json")


@cache
def without_lines() -> FileTokenizer:
    """Has a token for each small letter and for a space, and none for a line's end."""
    letters = " abcdefghijklmnopqrstuvwxyz"
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    return FileTokenizer(tokenizer.to_str().encode(), "letters.json")
