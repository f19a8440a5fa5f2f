"""A pretrained model and its tokenizer from a directory, without a network; and its answers as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from memtrans.devices import usable_device
from memtrans.generation.sampling import COLDEST
from memtrans.hf.model_memory import ModelMemory


def open_model(directory: Path, dtype: str, device: str | None, gguf: str | None = None) -> tuple[Any, Any]:
    """The model in a directory that `save_pretrained` wrote, or transformers downloaded, in `eval()` mode; a tokenizer.

    dtype: the name of one, or "auto" for that of the weights. device: Default: a GPU if there is one. gguf: a file of
        quantised weights in the directory, which holds the tokenizer too. Default: weights as transformers keeps them.

    Raises ValueError or OSError when there is none or it is damaged.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"model must be a directory, got {str(directory)!r}")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = usable_device(best if device in (None, "auto") else device)
    where = {"local_files_only": True} if gguf is None else {"local_files_only": True, "gguf_file": gguf}
    tokenizer = AutoTokenizer.from_pretrained(directory, **where)
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **where)
    except SafetensorError as error:
        raise ValueError(f"model must hold whole weights, got {str(directory)!r}: {error}") from error
    return model.to(chosen).eval(), tokenizer


def read_text(memory: ModelMemory, model: Any, tokenizer: Any, text: str) -> int:
    """Reads a text into the memory; returns how many tokens it has."""
    ids = torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.int64, device=model.device)
    if ids.shape[1] == 0:
        raise ValueError("document must hold some text, got none")
    memory.read(ids)
    return ids.shape[1]


class _Pieces(TextStreamer):
    """Hands on text that is whole words."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def answer(
    model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float, write: Callable[[str], None]
) -> Sequence[int]:
    """Continues a prompt; hands its text to `write` as it comes, and returns the ids. temperature: 0 is greedy."""
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    drawn = {"do_sample": True, "temperature": max(temperature, COLDEST)} if temperature > 0.0 else {"do_sample": False}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    written = model.generate(
        **given, max_new_tokens=tokens, pad_token_id=padding, streamer=_Pieces(tokenizer, write), **drawn
    )
    return written[0, given["input_ids"].shape[1] :].tolist()
