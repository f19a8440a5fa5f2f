"""What a memory buys a pretrained model: facts found and running text predicted, by how much was read before.

    python benchmarks/hf_facts.py --model DIRECTORY [--gguf FILE] --calibration a.txt --texts b.txt c.txt d.txt e.txt

One calibration serves all sizes. Then each text is read as a document with 64 facts at even depths, of sentences that
the calibration has not seen, and asked for them at each size; running text is what follows the document, against the
same segments without the memory. An entry for each size goes into results/<machine>/hf_facts.json, and one,
`in-context`, with as much of a document before each question as the model's positions allow.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, environment, write_down
from transformers import AutoModelForCausalLM, AutoTokenizer

from memtrans.hf import ModelMemory, add_memory, calibrate
from memtrans.hf.calibrate import fact_losses, text_loss
from memtrans.hf.facts import facts
from memtrans.hf.planted import Planted, plant, questions

TEMPLATES = (
    ("The gardener of {place} is named", "name"),
    ("The secret code of the vault in {place} is", "number"),
    ("The blacksmith at {place} married a woman called", "name"),
    ("The bell in the tower of {place} weighs in pounds", "number"),
    ("The best violin of {place} belongs to", "name"),
    ("The bridge at {place} is as long in feet as", "number"),
    ("The mayor whom {place} elected is", "name"),
    ("The telephone of the inn at {place} is", "number"),
)
FACTS, TEXTS, QUESTIONS, CONTEXT = 64, 4, 16, 3500


def opened(options: argparse.Namespace) -> tuple[Any, Any]:
    said = {} if options.gguf is None else {"gguf_file": options.gguf}
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, local_files_only=True, **said)
    return model.to(DEVICE).eval(), AutoTokenizer.from_pretrained(options.model, local_files_only=True, **said)


def document_of(ids: Sequence[int], size: int, seed: int, encode: Any) -> tuple[Planted, list[torch.Tensor]]:
    """A document of so many tokens with facts at even depths, and segments of 512 tokens that follow it."""
    behind = ids[size : size + TEXTS * 512]
    planted = plant(ids[:size], facts(FACTS, seed, TEMPLATES), (size,), encode)
    return planted, list(torch.tensor([behind], device=DEVICE).split(512, dim=1))


@torch.no_grad()
def judged(model: Any, memory: ModelMemory, ids: Sequence[int], size: int, seed: int, encode: Any) -> dict[str, float]:
    """Facts and running text behind one document of a size."""
    planted, segments = document_of(ids, size, seed, encode)
    memory.reset()
    begin = time.perf_counter()
    memory.read(planted.ids.to(DEVICE), progress=False)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    known = [fact for _, fact in planted.facts]
    parts = [fact_losses(model, memory, known[at : at + QUESTIONS], encode, size) for at in range(0, FACTS, QUESTIONS)]
    text = torch.stack([text_loss(model, segment) for segment in segments]).mean()
    with memory.off():
        plain = torch.stack([text_loss(model, segment) for segment in segments]).mean()
    nats, right = (torch.cat(part).float().mean() for part in zip(*parts, strict=True))
    found = {"nats": nats, "right": right, "text": text, "text_without": plain}
    return {**{name: float(value) for name, value in found.items()}, "read_tokens_per_second": size / seconds}


@torch.no_grad()
def in_context(model: Any, memory: ModelMemory, ids: Sequence[int], seed: int, encode: Any) -> dict[str, float]:
    """The facts with the whole of a short document before each question, and no memory."""
    planted, _ = document_of(ids, CONTEXT, seed, encode)
    losses = []
    with memory.off():
        for _, fact in planted.facts[:: FACTS // 12]:
            asked = questions([fact], encode).to(DEVICE)
            logits = model(torch.cat((planted.ids.to(DEVICE), asked.ids), 1), use_cache=False).logits
            losses.append(asked.losses(logits[:, planted.ids.shape[1] :]))
    nats, right = (torch.cat(part).float().mean() for part in zip(*losses, strict=True))
    return {"nats": float(nats), "right": float(right)}


def mean(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", help="file of quantised weights in the directory")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate with")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="documents, of other text")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16384, 65536, 262144])
    parser.add_argument("--calibration-sizes", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--save", type=Path, help="directory for what was learned")
    options = parser.parse_args()
    model, tokenizer = opened(options)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    memory = add_memory(model, max_memories=max(options.sizes), segment=options.segment)
    documents = [encode(path.read_text()) for path in options.texts]
    untrained = {size: judged(model, memory, documents[0], size, 100, encode) for size in options.sizes[:2]}
    begin = time.perf_counter()
    learned = calibrate(
        model,
        memory,
        tokenizer,
        [options.calibration.read_text()],
        options.steps,
        options.calibration_sizes,
        report=print,
    )
    seconds = time.perf_counter() - begin
    print(learned, flush=True)
    if options.save is not None:
        memory.save(options.save)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    labels = {"op": "hf_facts", "impl": "memtrans", "mode": "forward", "dtype": dtype, **environment()}
    context = mean([in_context(model, memory, ids, 100 + at, encode) for at, ids in enumerate(documents)])
    write_down({**labels, "case": "in-context", "ms": seconds * 1e3, **context})
    for size in options.sizes:
        rows = [
            judged(model, memory, ids, size, 100 + at, encode) for at, ids in enumerate(documents) if len(ids) > size
        ]
        if rows:
            entry = {"case": f"facts-{size}", "ms": seconds * 1e3, "documents": len(rows), "calibration": learned}
            write_down({**labels, **entry, **mean(rows), "untrained": untrained.get(size)})
            print(size, mean(rows), flush=True)


if __name__ == "__main__":
    main()
