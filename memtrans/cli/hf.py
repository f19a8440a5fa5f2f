"""`python -m memtrans hf`: a pretrained model reads a document into a memory, and a prompt is continued with it."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from memtrans.cli.ending import reading_input, show
from memtrans.distributed.ranks import Ranks

SHARED = False


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Reads, calibrates, saves, writes to standard output; figures go to standard error."""
    del ranks
    with reading_input(ImportError):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    """Raises ValueError, OSError or ImportError for what the user gave or has not installed."""
    _check(options)
    from memtrans.hf import calibrate
    from memtrans.hf.opening import answer, open_model, read_text

    text = None if options.document is None else options.document.read_text(encoding="utf-8", errors="replace")
    model, tokenizer = open_model(options.model, options.dtype, options.device)
    memory = _memory(model, options)
    if options.calibrate:
        assert text is not None
        learned = calibrate(model, memory, tokenizer, [text], options.calibration_steps, seed=options.seed, report=_say)
        _say(f"before {learned['before']}\nafter  {learned['after']}")
    if text is not None:
        begin = time.perf_counter()
        tokens = read_text(memory, model, tokenizer, text)
        _say(f"read {tokens} tokens in {time.perf_counter() - begin:.1f} s")
    if options.save is not None:
        memory.save(options.save)
    if options.prompt is not None:
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
