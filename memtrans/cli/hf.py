"""`python -m memtrans hf`: a pretrained model reads a document into a memory, and a prompt is continued with it."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory of a pretrained causal language model and its tokenizer")
    add("--document", type=Path, help="text to read into the memory, of any length (default: what --load holds)")
    add("--prompt", default=None, help="text to continue (default: none; the document is read, and saved if asked)")
    add("--tokens", type=int, default=64, help="tokens to write at most (64)")
    add("--temperature", type=float, default=0.0, help="of the draws; 0 is greedy (0)")
    add("--seed", type=int, default=0, help="of the draws (0)")
    add("--layers", type=int, nargs="+", metavar="LAYER", help="layers with a memory (default: all)")
    add("--memory", type=int, default=65536, help="M: entries of the memory (65536)")
    add("--neighbours", type=int, default=32, help="K: neighbours of a query (32)")
    add("--segment", type=int, default=512, help="N: tokens read at a time (512)")
    add("--offset", type=float, help="added to the logits of neighbours (default: by the size of the memory)")
    add("--calibrate", action="store_true", help="first learn from the document how much each head trusts the memory")
    add("--calibration-steps", type=int, default=120, help="of --calibrate (120)")
    add("--save", type=Path, help="directory to write the memory to: what it learned and what it holds")
    add("--load", type=Path, help="directory that --save wrote; the options of the memory are those saved")
    add("--dtype", default="auto", help="of the model: auto (that of its weights), float32, bfloat16, float16 (auto)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def run(options: argparse.Namespace) -> None:
    """Reads, calibrates, saves, writes to standard output; figures go to standard error.

    Raises ValueError, OSError or ImportError for what the user gave or has not installed.
    """
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
        print(flush=True)
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
    print(text, end="", flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
