"""A pretrained model reads a document, continues a prompt, and what it looked up is kept for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memtrans.hf.model_memory import ModelMemory
from memtrans.hf.opening import answer
from memtrans.inspection.records import Records, Written
from memtrans.inspection.texts import texts_of_offsets


def recorded(
    model: Any,
    memory: ModelMemory,
    tokenizer: Any,
    text: str,
    prompt: str,
    tokens: int,
    temperature: float = 0.0,
    *,
    source: str = "the document",
    name: str = "a model",
) -> Records:
    """Reads a text into an empty memory, continues a prompt, and returns what was looked up.

    Args:
        model, tokenizer: of transformers. memory: of the model.
        text: the document. prompt: what is continued. tokens: to write at most. temperature: 0 is greedy.
        source: what the document is called. name: what the model is called.

    Raises ValueError for a text or a prompt without tokens, or a memory that keeps no ids.
    """
    if not memory.settings.keep_ids:
        raise ValueError("memory must keep the ids of its tokens, whose places the page shows, got keep_ids=False")
    ids, texts = tokens_of(tokenizer, text)
    asked = tokenizer(prompt)["input_ids"]
    if not ids or not asked:
        raise ValueError("document and prompt must hold some text, got none")
    memory.read(torch.tensor([ids], dtype=torch.int64, device=model.device))
    with memory.tracing() as trace:
        new = answer(model, tokenizer, prompt, tokens, temperature, lambda piece: None)
    first = len(asked) - 1  # the query of the prompt's last token wrote the first one
    return Records(
        trace=trace,
        row=0,
        document=texts,
        prompt=prompt,
        written=[Written(piece, first + place) for place, piece in enumerate(written_texts(tokenizer, new))],
        names={layer: f"layer {layer}" for layer in trace.layers},
        source=source,
        model=name,
    )


def tokens_of(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """The ids of a text, and the text of each of them."""
    if not tokenizer.is_fast:
        ids = tokenizer(text)["input_ids"]
        return ids, written_texts(tokenizer, ids)
    encoded = tokenizer(text, return_offsets_mapping=True)
    return encoded["input_ids"], texts_of_offsets(text, encoded["offset_mapping"])


def written_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; nothing for one that ends amid a character, whose next one adds it."""
    texts, before, done = list[str](), 0, 0  # the text of ids[before:done] was given last: tokens decode behind others
    for end in range(1, len(ids) + 1):
        known, now = (tokenizer.decode(ids[before:to], clean_up_tokenization_spaces=False) for to in (done, end))
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(known) :])
        before, done = done, end
    return texts
