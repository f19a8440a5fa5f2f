"""`python -m memtrans hf`: a pretrained model reads a document into a memory, and a prompt is continued with it."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from memtrans.cli.ending import reading_input, show, writing
from memtrans.distributed.ranks import Ranks
from memtrans.files import read_input
from memtrans.generation.sampling import Sampling

SHARED = False


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Reads, calibrates, saves, writes to standard output; figures go to standard error."""
    del ranks
    with reading_input(ImportError):
        model, tokenizer, memory = _opened(options)
        _fill(memory, model, tokenizer, options)
    if options.save is not None:
        with writing():
            memory.save(options.save)
    if options.prompt is not None:
        _answer(model, tokenizer, options)


def _opened(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and its memory.

    Raises ValueError, OSError or ImportError for what the user gave or has not installed.
    """
    _check(options)
    from memtrans.hf.opening import open_model

    model, tokenizer = open_model(options.model, options.dtype, options.device)
    if options.prompt is not None and not tokenizer(options.prompt)["input_ids"]:
        raise ValueError("prompt must hold some text, got none")
    memory = _memory(model, options)
    if options.save is not None:  # before anything is read: a directory that cannot be made is known now
        options.save.mkdir(parents=True, exist_ok=True)
    return model, tokenizer, memory


def _fill(memory: Any, model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    from memtrans.hf import calibrate
    from memtrans.hf.opening import read_text

    if options.document is None:
        return
    text = read_input("document", options.document).decode("utf-8", "replace")
    if options.calibrate:
        learned = calibrate(model, memory, tokenizer, [text], options.calibration_steps, seed=options.seed, report=_say)
        _say(f"before {learned['before']}\nafter  {learned['after']}")
    begin = time.perf_counter()
    tokens = read_text(memory, model, tokenizer, text)
    _say(f"read {tokens} tokens in {time.perf_counter() - begin:.1f} s")


def _answer(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    from memtrans.hf.opening import answer

    torch.manual_seed(options.seed)
    begin = time.perf_counter()
    written = answer(model, tokenizer, options.prompt, options.tokens, options.temperature, _write)
    show("")
    _say(f"wrote {len(written) / (time.perf_counter() - begin):.0f} tokens/s")


def _check(options: argparse.Namespace) -> None:
    """Refuses what would do nothing, or fail only at the end."""
    if options.document is None and options.load is None:
        raise ValueError("document must be given where no memory is loaded, got none")
    if options.calibrate and options.document is None:
        raise ValueError("document must be given with --calibrate, got none")
    if options.tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {options.tokens}")
    Sampling(options.temperature, seed=options.seed)  # raises for what no draw can be made with
    if options.save is not None and options.save.is_file():
        raise ValueError(f"save must name a directory, got {str(options.save)!r}, a file")


def _memory(model: Any, options: argparse.Namespace) -> Any:
    from memtrans.hf import add_memory, load_memory

    if options.load is not None:
        return load_memory(model, options.load)
    return add_memory(
        model,
        layers=options.layers or "all",
        max_memories=options.memory,
        k=options.neighbours,
        segment=options.segment,
        offset="auto" if options.offset is None else options.offset,
    )


def _write(text: str) -> None:
    show(text, end="")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
