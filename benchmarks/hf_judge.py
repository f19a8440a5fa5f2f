"""What a memory of a pretrained model is judged by: documents with facts in them, and the running text behind them.

Sentences, names and places are others than those of `memtrans.hf.facts`, which a calibration is made of.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from common import DEVICE
from torch import Tensor

from memtrans.hf import ModelMemory
from memtrans.hf.calibrate import text_loss
from memtrans.hf.facts import Fact, Words, facts
from memtrans.hf.planted import BEHIND_A_STOP, plant, questions

NAMES = (
    *("Adam", "Alice", "Amelia", "Andrew", "Anna", "Barbara", "Charles", "Charlotte", "Daniel", "David", "Diana"),
    *("Eleanor", "Emily", "Emma", "Frederick", "George", "Grace", "Hannah", "Isabel", "Jack", "James", "Jane", "John"),
    *("Joseph", "Julia", "Kate", "Laura", "Lawrence", "Louise", "Margaret", "Mark", "Mary", "Matthew", "Michael"),
    *("Nicholas", "Oliver", "Paul", "Peter", "Rachel", "Rebecca", "Richard", "Robert", "Samuel", "Sarah", "Sophie"),
    *("Stephen", "Susan", "Thomas", "Timothy", "William"),
)
WORDS = Words(
    templates=(
        ("The gardener of {place} is named", "name"),
        ("The secret code of the vault in {place} is", "number"),
        ("The blacksmith at {place} married a woman called", "name"),
        ("The bell in the tower of {place} weighs in pounds", "number"),
        ("The best violin of {place} belongs to", "name"),
        ("The bridge at {place} is as long in feet as", "number"),
        ("The mayor whom {place} elected is", "name"),
        ("The telephone of the inn at {place} is", "number"),
    ),
    syllables=(
        ("Ash", "Bran", "Chel", "Dray", "Ever", "Fen", "Had", "Kin", "Lang", "Mil", "Oak", "Ret", "Shel", "Tam", "Wes"),
        ("ber", "co", "den", "fi", "ga", "hu", "ko", "lin", "ma", "ne", "pa", "ru", "to"),
        ("brook", "by", "cliff", "combe", "croft", "field", "gate", "hurst", "mouth", "port", "ridge", "ton"),
    ),
    answers={"name": NAMES, "number": range(1000, 9990)},
)
OF_PEOPLE = (
    "The {one} of {{place}} is named",
    "{{place}} has a {one} whose name is",
    "The best {one} near {{place}} is",
    "People in {{place}} say that their {one} is",
)
OF_THINGS = (
    "The secret code of the {one} in {{place}} is",
    "The telephone of the {one} at {{place}} is",
    "The {one} of {{place}} weighs in pounds",
    "Visitors of the {one} in {{place}} last year:",
)
PEOPLE = ("gardener", "blacksmith", "mayor", "violinist", "cobbler", "midwife", "postman", "sheriff")
THINGS = ("vault", "bell", "bridge", "inn", "dam", "orchard", "brewery", "fountain")
VARIED = replace(
    WORDS,
    templates=(
        *((form.format(one=one), "name") for form in OF_PEOPLE for one in PEOPLE),
        *((form.format(one=one), "number") for form in OF_THINGS for one in THINGS),
    ),
)
KINDS = {"facts": VARIED, "alike": WORDS}
FACTS, SEGMENTS, QUESTIONS = 64, 8, 16


class Documents(NamedTuple):
    """B documents of one length, what is planted in them, and the running text behind them (B, SEGMENTS, N)."""

    ids: Tensor
    facts: list[list[Fact]]
    behind: Tensor


def documents_of(texts: Sequence[Sequence[int]], size: int, segment: int, encode: Any, words: Words) -> Documents:
    """Facts at even depths in the first so many tokens of each text."""
    planted = [plant(text[:size], facts(FACTS, 100 + at, words), (size,), encode) for at, text in enumerate(texts)]
    behind = [torch.tensor(text[size : size + SEGMENTS * segment]).view(SEGMENTS, segment) for text in texts]
    known = [[fact for _, fact in document.facts] for document in planted]
    ids = torch.cat([document.ids for document in planted])
    return Documents(ids.to(DEVICE), known, torch.stack(behind).to(DEVICE))


@torch.no_grad()
def judged(model: Any, memory: ModelMemory, documents: Documents, search: bool, encode: Any) -> dict[str, float]:
    """Facts and running text behind documents."""
    memory.reset()
    begin = time.perf_counter()
    memory.read(documents.ids, search=search, progress=False)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    nats, right = asked(model, memory, documents, encode, "")
    nats_behind_stop, right_behind_stop = asked(model, memory, documents, encode, BEHIND_A_STOP)
    segments = documents.behind.flatten(0, 1)  # (B · SEGMENTS, N)
    with memory.expand(SEGMENTS):
        behind = float(text_loss(model, segments))
    with memory.off():
        plain = float(text_loss(model, segments))
    with memory.writing():
        text = float(torch.stack([text_loss(model, part) for part in documents.behind.unbind(1)]).mean())
    found = {"nats": float(nats), "right": float(right), "text": text, "text_behind": behind, "text_without": plain}
    found |= {"nats_behind_stop": float(nats_behind_stop), "right_behind_stop": float(right_behind_stop)}
    return {**found, "read_tokens_per_second": documents.ids.numel() / seconds}


def asked(model: Any, memory: ModelMemory, documents: Documents, encode: Any, before: str) -> tuple[Tensor, Tensor]:
    """Nats of an answer, and the share whose first token is the likeliest; some of each document's questions a pass."""
    parts = []
    for at in range(0, FACTS, QUESTIONS):
        chosen = [fact for known in documents.facts for fact in known[at : at + QUESTIONS]]
        rows = questions(chosen, encode, before=(before,)).to(torch.device(DEVICE))
        with memory.expand(len(chosen) // len(documents.facts)):
            parts.append(rows.losses(model(input_ids=rows.ids, use_cache=False).logits))
    nats, right = (torch.cat(part).float().mean() for part in zip(*parts, strict=True))
    return nats, right


@torch.no_grad()
def in_context(model: Any, memory: ModelMemory, documents: Documents, encode: Any) -> dict[str, float]:
    """The facts with the whole of a short document before each question, and no memory."""
    losses = []
    with memory.off():
        for ids, known in zip(documents.ids, documents.facts, strict=True):
            for fact in known[:: FACTS // 12]:
                rows = questions([fact], encode).to(torch.device(DEVICE))
                logits = model(torch.cat((ids[None], rows.ids), 1), use_cache=False).logits
                losses.append(rows.losses(logits[:, ids.shape[0] :]))
    nats, right = (torch.cat(part).float().mean() for part in zip(*losses, strict=True))
    return {"nats": float(nats), "right": float(right)}


def mean(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
