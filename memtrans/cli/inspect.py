"""`python -m memtrans inspect`: a document is read, a prompt continued, and a page shows where each word came from."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from memtrans.cli.ending import reading_input, show, writing
from memtrans.distributed.ranks import Ranks
from memtrans.files import read_input
from memtrans.generation.sampling import Sampling, check_chosen
from memtrans.inspection.page import LEVELS, write_page
from memtrans.inspection.records import Records, Written, to_json
from memtrans.inspection.texts import texts_of_tokens
from memtrans.storage import write_atomically
from memtrans_kernels import checks

SHARED = False
MOST = 65536  # entries of a pretrained model's memory, where nothing is said; a shorter document needs fewer


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Reads, writes, and says where the page is."""
    del ranks
    with reading_input(ImportError, IndexError, TypeError):
        _check(options)
        records = _of_checkpoint(options) if options.model is None else _of_pretrained(options)
    with writing():
        _write(records, options)


def _check(options: argparse.Namespace) -> None:
    """Refuses what would fail only when everything is read and written."""
    for name in ("tokens", "memory", "segment"):
        if getattr(options, name) is not None:
            checks.integer(name, getattr(options, name), low=1)
    Sampling(options.temperature, seed=options.seed)  # raises for what no draw can be made with
    for name in ("out", "json"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{name} must name a file in a directory that exists, got {str(path)!r}")
    if options.json is not None and options.json.absolute() == options.out.absolute():
        raise ValueError(f"json must name another file than out, got {str(options.json)!r} for both")
    if options.dtype != "auto" and options.model is None:
        raise ValueError(f"dtype must come with --model, got {options.dtype!r}")
    if options.load is not None and options.model is None:
        raise ValueError(f"load must come with --model, got {str(options.load)!r}")


def _write(records: Records, options: argparse.Namespace) -> None:
    if options.json is not None:
        write_atomically(options.json, json.dumps(to_json(records)).encode())
    try:
        detail = write_page(options.out, records)
    except ValueError as error:
        raise OSError(error) from error
    shares = [records.from_memory[token.query] for token in records.written]
    print(f"{sum(shares) / len(shares):.1%} of the weight came from the memory", file=sys.stderr)
    if detail != LEVELS[0]:
        heads = "with their heads" if detail.heads else "without their heads"
        print(f"the page holds {detail.entries} entries a token and layer, {heads}", file=sys.stderr)
    show(str(options.out))


# -------------------------------------------------------------------------------------------------- models of one's own


def _of_checkpoint(options: argparse.Namespace) -> Records:
    """Of a model of one's own, which stores its prompt too."""
    from memtrans.cli.generate import check_vocabulary, open_model
    from memtrans.generation.decoder import Decoder
    from memtrans.generation.generate import as_texts, stream
    from memtrans.training.device import pick_device

    sampling = Sampling(temperature=options.temperature, seed=options.seed)
    model, segment, tokenizer = open_model(options.checkpoint)
    check_vocabulary(model, tokenizer)
    if not model.memorizing_layers:
        raise ValueError("checkpoint must be of a model with a memory, got one without")
    device = pick_device(options.device or "auto")
    model = model.to(device).eval()
    entries = options.memory or model.max_knn_memories
    memories = model.create_knn_memories(batch_size=1, device=device, max_memories=entries)
    decoder = Decoder(model, 1, segment=options.segment or segment, memories=memories)
    content, asked = read_input("document", options.document), os.fsencode(options.prompt)
    (document,), (prompt,) = (
        as_texts(torch.from_numpy(tokenizer.encode(text).astype("int64")), model) for text in (content, asked)
    )
    decoder.read([document])
    with memories.tracing() as trace:
        decoder.read([prompt])
        new = torch.stack(list(stream(decoder, options.tokens, sampling)), dim=1)
    check_chosen(new)
    if any(int(memory.snapshot().start[0]) for memory in memories):
        raise ValueError("document and prompt must not hold the token that clears the memory, whose places would move")
    all_ids = torch.cat((document, prompt, new[0].cpu())).numpy()
    texts = texts_of_tokens(tokenizer.decode(all_ids), tokenizer.sizes[all_ids].tolist())
    first = len(prompt) - 1  # the query of the prompt's last token wrote the first one
    shift, count = model.shift_knn_memories_down, model.num_memory_layers
    return Records(
        trace=trace,
        row=0,
        document=texts,
        prompt="".join(texts[len(document) : len(document) + len(prompt)]),
        written=[Written(text, first + place) for place, text in enumerate(texts[len(document) + len(prompt) :])],
        names={place: f"layer {model.memorizing_layers[(place - shift) % count]}" for place in range(count)},
        source=options.document.name,
        model=_name(options.checkpoint),
    )


# -------------------------------------------------------------------------------------------------- pretrained models


def _of_pretrained(options: argparse.Namespace) -> Records:
    """Of a model from the hub, whose memory holds the document alone."""
    from memtrans.hf import add_memory, load_memory
    from memtrans.hf.opening import open_model
    from memtrans.hf.recording import recorded

    text = read_input("document", options.document).decode("utf-8", "replace")
    model, tokenizer = open_model(options.model, options.dtype, options.device)
    sizes: dict[str, Any] = {"max_memories": options.memory, "segment": options.segment}
    given = {name: value for name, value in sizes.items() if value is not None}
    if options.memory is None and options.load is None:
        given["max_memories"] = max(1, min(MOST, len(tokenizer(text)["input_ids"])))
    memory = add_memory(model, **given) if options.load is None else load_memory(model, options.load, **given)
    memory.reset()
    torch.manual_seed(options.seed)
    return recorded(
        model, memory, tokenizer, text, options.prompt, options.tokens, options.temperature,
        source=options.document.name, name=_name(options.model),
    )  # fmt: skip


def _name(directory: Path) -> str:
    return directory.absolute().name
