"""`python -m memtrans generate`: a prompt is read into the memory, and its continuation streams to the terminal."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from memtrans.generation.decoder import Decoder
from memtrans.generation.generate import as_texts, reading_bar, stream
from memtrans.generation.sampling import Sampling
from memtrans.pretrained import CONFIG
from memtrans.training import checkpoint
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.run import checkpoint_of
from memtrans.training.settings import BYTES, DTYPES, Settings, build_model
from memtrans.training.trainer import pick_device
from memtrans.training.weights import load_weights
from memtrans.transformer import MemorizingTransformer
from memtrans_kernels import checks

SEGMENT = 512  # where the checkpoint does not say what the model was trained with
START = ord("\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a run's directory, or one that save_pretrained wrote")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue (default: none, which stands for a line's end)")
    prompt.add_argument("--prompt-file", type=Path, help="file to continue, read as bytes, of any length")
    add("--tokens", type=int, default=256, help="bytes to write (256)")
    add("--temperature", type=float, default=1.0, help="divides the logits; 0 or less is greedy (1)")
    add("--top-k", type=int, help="draw among so many likeliest bytes")
    add("--top-p", type=float, help="draw among the fewest likeliest bytes that together have this probability")
    add("--seed", type=int, default=0, help="of the draws (0)")
    add("--segment", type=int, help=f"N: tokens of a segment (default: the run's, or {SEGMENT})")
    add("--memory", type=int, help="M: entries of the memory (default: the model's)")
    add("--memories", type=Path, help="begin with memories that were saved")
    add("--save-memories", type=Path, help="save the memories at the end")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    add("--dtype", choices=DTYPES, help="of the weights (default: as they were saved)")


@dataclass(frozen=True)
class Generation:
    """A model that has still to read its prompt."""

    decoder: Decoder
    prompt: list[torch.Tensor]
    sampling: Sampling
    tokens: int
    save_memories: Path | None

    @classmethod
    def open(cls, options: argparse.Namespace) -> Generation:
        """What the options ask for. Raises ValueError, IndexError or OSError where they will not do."""
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
        checks.integer("tokens", options.tokens, low=1)
        device = pick_device(options.device)
        model, segment = open_model(options.checkpoint)
        if model.num_tokens > BYTES:
            raise ValueError(f"checkpoint must be of a model over bytes, got one of {model.num_tokens} tokens")
        _check_memory_options(options, model)
        model = model.to(device, getattr(torch, options.dtype) if options.dtype else None).eval()
        sizes = {"max_memories": options.memory} if options.memory is not None else {}
        if options.memories is None:
            memories = model.create_knn_memories(batch_size=1, device=device, **sizes)
        else:
            memories = model.load_memories(options.memories, **sizes)
        text = os.fsencode(options.prompt) if options.prompt_file is None else options.prompt_file.read_bytes()
        start = START if model.clear_memories_on_sos_token_id is None else None
        prompt = as_texts(text, model, start)
        segment = segment if options.segment is None else options.segment
        decoder = Decoder(model, 1, segment=segment, memories=memories)
        return cls(decoder, prompt, sampling, options.tokens, options.save_memories)

    def text(self) -> Iterator[str]:
        """What the model writes, in pieces that are whole characters; bytes that are none become U+FFFD."""
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in stream(self.decoder, self.tokens, self.sampling):
            yield characters.decode(bytes(token.tolist()))
        yield characters.decode(b"", final=True)

    def run(self) -> None:
        """Reads, then writes to standard output; figures go to standard error."""
        length, begin = len(self.prompt[0]), time.perf_counter()
        with reading_bar(length, shown=True) as bar:
            self.decoder.read(self.prompt, bar.update)
        read = time.perf_counter()
        for piece in self.text():
            print(piece, end="", flush=True)
        print(flush=True)
        rate = self.tokens / (time.perf_counter() - read)
        print(f"read {length} tokens in {read - begin:.1f} s, wrote {rate:.0f} tokens/s", file=sys.stderr)
        if self.save_memories is not None:
            self.decoder.memories.save(self.save_memories)


def _check_memory_options(options: argparse.Namespace, model: MemorizingTransformer) -> None:
    """Refuses what would be ignored, or fail, only when everything is read and written."""
    given = {"memory": options.memory, "save_memories": options.save_memories}
    for name, value in given.items():
        if value is not None and not model.memorizing_layers:
            raise ValueError(f"{name} must not be given with a model that has no memory, got {str(value)!r}")
    path = options.save_memories
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"save_memories must name a file in a directory that exists, got {str(path)!r}")


def over_bytes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A run's weights without the tokens of its vocabulary that its text, read as bytes, never had."""
    return {
        name: tensor[:BYTES] if name.startswith(("token_emb.", "to_logits.1.")) else tensor
        for name, tensor in weights.items()
    }


def open_model(path: Path) -> tuple[MemorizingTransformer, int]:
    """The model of a training run (its directory, or the checkpoint in it) or of `save_pretrained`; and its N.

    Of a run with a vocabulary beyond bytes it is the model over bytes.

    Raises FileNotFoundError where there is neither, ValueError when it is damaged or does not fit.
    """
    for directory in (path, checkpoint_of(path)):
        if checkpoint.exists(directory):
            saved = checkpoint.require(checkpoint.load_checkpoint(directory), "settings")
            settings = Settings.from_json(saved.values["settings"])
            model = build_model(replace(settings, vocabulary=BYTES))
            load_weights(model, Checkpoint({"model": over_bytes(saved.parts["model"])}, saved.values))
            return model, settings.segment
    if (path / CONFIG).exists():
        return MemorizingTransformer.from_pretrained(path), SEGMENT
    raise FileNotFoundError(
        f"checkpoint must be a run's directory or hold {checkpoint.INDEX} or {CONFIG}, got {str(path)!r}"
    )
