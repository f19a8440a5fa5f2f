"""What a memory buys a pretrained model: facts found and running text predicted, by how much was read before.

    python benchmarks/hf_facts.py --model DIRECTORY [--gguf FILE] --calibration a.txt --texts b.txt c.txt d.txt e.txt

One calibration serves all sizes. Then the texts are read as documents with 64 facts each at even depths, of sentences,
names and places that the calibration has not seen, and are asked for them at each size; running text is what follows a
document, against the same segments without the memory. An entry for each size goes into
results/<machine>/hf_facts.json, and one, `in-context`, with as much of a document before each question as the model's
positions allow.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import DEVICE, environment, write_down
from torch import Tensor

from memtrans.hf import ModelMemory, add_memory, calibrate
from memtrans.hf.calibrate import text_loss
from memtrans.hf.facts import Fact, Words, facts
from memtrans.hf.opening import open_model
from memtrans.hf.planted import plant, questions

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
    names=(
        *("Adam", "Alice", "Amelia", "Andrew", "Anna", "Barbara", "Charles", "Charlotte", "Daniel", "David", "Diana"),
        *("Eleanor", "Emily", "Emma", "Frederick", "George", "Grace", "Hannah", "Isabel", "Jack", "James", "Jane"),
        *("John", "Joseph", "Julia", "Kate", "Laura", "Lawrence", "Louise", "Margaret", "Mark", "Mary", "Matthew"),
        *("Michael", "Nicholas", "Oliver", "Paul", "Peter", "Rachel", "Rebecca", "Richard", "Robert", "Samuel"),
        *("Sarah", "Sophie", "Stephen", "Susan", "Thomas", "Timothy", "William"),
    ),
)
FACTS, SEGMENTS, QUESTIONS, CONTEXT = 64, 8, 16, 3500


class Documents(NamedTuple):
    """B documents of one length, what is planted in them, and the running text behind them (B, SEGMENTS, N)."""

    ids: Tensor
    facts: list[list[Fact]]
    behind: Tensor


def documents_of(texts: Sequence[Sequence[int]], size: int, segment: int, encode: Any) -> Documents:
    """Facts at even depths in the first so many tokens of each text."""
    planted = [plant(text[:size], facts(FACTS, 100 + at, WORDS), (size,), encode) for at, text in enumerate(texts)]
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
    nats, right = asked(model, memory, documents, encode)
    text = torch.stack([text_loss(model, segments) for segments in documents.behind.unbind(1)]).mean()
    with memory.off():
        plain = torch.stack([text_loss(model, segments) for segments in documents.behind.unbind(1)]).mean()
    found = {"nats": float(nats), "right": float(right), "text": float(text), "text_without": float(plain)}
    return {**found, "read_tokens_per_second": documents.ids.numel() / seconds}


def asked(model: Any, memory: ModelMemory, documents: Documents, encode: Any) -> tuple[Tensor, Tensor]:
    """Nats of an answer, and the share whose first token is the likeliest; some of each document's questions a pass."""
    parts = []
    for at in range(0, FACTS, QUESTIONS):
        chosen = [fact for known in documents.facts for fact in known[at : at + QUESTIONS]]
        rows = questions(chosen, encode).to(torch.device(DEVICE))
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


def asked_for() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", help="file of quantised weights in the directory")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate with")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="documents, of other text")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16384, 65536, 262144])
    parser.add_argument("--calibration-sizes", type=int, nargs="+", default=[4096, 16384, 65536, 262144])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--together", type=int, default=4, help="documents that are read at once")
    parser.add_argument("--search", action="store_true", help="segments look at what was read before them")
    parser.add_argument("--save", type=Path, help="directory for what was learned")
    return parser.parse_args()


def main() -> None:
    options = asked_for()
    model, tokenizer = open_model(options.model, "bfloat16" if DEVICE == "cuda" else "float32", DEVICE, options.gguf)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    memory = add_memory(model, max_memories=max(*options.sizes, *options.calibration_sizes), segment=options.segment)
    texts = [encode(path.read_text()) for path in options.texts]

    def measured(size: int) -> dict[str, float]:
        groups = [texts[at : at + options.together] for at in range(0, len(texts), options.together)]
        made = (documents_of(group, size, options.segment, encode) for group in groups)
        return mean([judged(model, memory, documents, options.search, encode) for documents in made])

    untrained = {size: measured(size) for size in options.sizes[:2]}
    print("untrained", untrained, flush=True)
    begin = time.perf_counter()
    text = options.calibration.read_text()
    learned = calibrate(model, memory, tokenizer, [text], options.steps, options.calibration_sizes, report=print)
    seconds = time.perf_counter() - begin
    print(seconds, learned, flush=True)
    if options.save is not None:
        memory.save(options.save)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    labels = {"op": "hf_facts", "impl": "memtrans", "mode": "forward", "dtype": dtype, **environment()}
    context = in_context(model, memory, documents_of(texts, CONTEXT, options.segment, encode), encode)
    write_down({**labels, "case": "in-context", "ms": seconds * 1e3, **context})
    print("in context", context, flush=True)
    for size in options.sizes:
        figures = measured(size)
        entry = {"case": f"facts-{size}", "ms": seconds * 1e3, "documents": len(texts), "calibration": learned}
        write_down({**labels, **entry, **figures, "search": options.search, "untrained": untrained.get(size)})
        print(size, figures, flush=True)


if __name__ == "__main__":
    main()
