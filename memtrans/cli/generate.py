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

from memtrans.cli.ending import reading_input, show, writing
from memtrans.cli.parser import SEGMENT
from memtrans.data.tokens import BYTES, FILE, Tokenizer, open_tokenizer
from memtrans.distributed.ranks import Ranks
from memtrans.files import read_input
from memtrans.generation.decoder import Decoder
from memtrans.generation.generate import as_texts, reading_bar, stream
from memtrans.generation.sampling import Sampling, check_chosen
from memtrans.pretrained import CONFIG
from memtrans.training import checkpoint
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.data import tokenizer_in
from memtrans.training.device import pick_device
from memtrans.training.directory import checkpoint_of
from memtrans.training.model import build_model
from memtrans.training.settings import Settings
from memtrans.training.state import check_settings, load_weights
from memtrans.transformer import MemorizingTransformer
from memtrans_kernels import checks

SHARED = False
START = b"\n"


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Reads the prompt and writes its continuation."""
    del ranks
    with reading_input(IndexError, TypeError):
        generation = Generation.open(options)
    generation.run()


@dataclass(frozen=True)
class Generation:
    """A model that has still to read its prompt."""

    decoder: Decoder
    prompt: list[torch.Tensor]
    sampling: Sampling
    tokens: int
    save_memories: Path | None
    tokenizer: Tokenizer = BYTES

    @classmethod
    def open(cls, options: argparse.Namespace) -> Generation:
        """What the options ask for. Raises ValueError, IndexError or OSError where they will not do."""
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
        checks.integer("tokens", options.tokens, low=1)
        device = pick_device(options.device)
        model, segment, tokenizer = open_model(options.checkpoint)
        check_vocabulary(model, tokenizer)
        _check_memory_options(options, model)
        model = model.to(device, getattr(torch, options.dtype) if options.dtype else None).eval()
        sizes = {"max_memories": options.memory} if options.memory is not None else {}
        if options.memories is None:
            memories = model.create_knn_memories(batch_size=1, device=device, **sizes)
        else:
            memories = model.load_memories(options.memories, **sizes)
        file = options.prompt_file
        text = os.fsencode(options.prompt) if file is None else read_input("prompt_file", file)
        start = None if text else _start(model, tokenizer)
        prompt = as_texts(text if tokenizer is BYTES else torch.from_numpy(tokenizer.encode(text)), model, start)
        segment = segment if options.segment is None else options.segment
        decoder = Decoder(model, 1, segment=segment, memories=memories)
        return cls(decoder, prompt, sampling, options.tokens, options.save_memories, tokenizer)

    def text(self) -> Iterator[str]:
        """What the model writes, in pieces that are whole characters; bytes that are none become U+FFFD."""
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for number, token in enumerate(stream(self.decoder, self.tokens, self.sampling)):
            check_chosen(token[:, None], number)
            yield characters.decode(self.tokenizer.decode(token.tolist()))
        yield characters.decode(b"", final=True)

    def run(self) -> None:
        """Reads, then writes to standard output; figures go to standard error."""
        length, begin = len(self.prompt[0]), time.perf_counter()
        with reading_bar(length, shown=_has_tqdm()) as more:
            self.decoder.read(self.prompt, more)
        read = time.perf_counter()
        for piece in self.text():
            show(piece, end="")
        show("")
        rate = self.tokens / (time.perf_counter() - read)
        print(f"read {length} tokens in {read - begin:.1f} s, wrote {rate:.0f} tokens/s", file=sys.stderr)
        if self.save_memories is not None:
            with writing():
                self.decoder.memories.save(self.save_memories)


def _has_tqdm() -> bool:
    """Whether the extra `train` is installed: a bar is a comfort, and the figures at the end tell the same."""
    try:
        import tqdm  # noqa: F401
    except ImportError:
        return False
    return True


def check_vocabulary(model: MemorizingTransformer, tokenizer: Tokenizer) -> None:
    """Raises ValueError where a model may write tokens that its tokenizer does not have."""
    if model.vocabulary > max(BYTES.vocabulary, tokenizer.vocabulary):
        known = "bytes" if tokenizer is BYTES else f"the {tokenizer.vocabulary} tokens of its tokenizer"
        raise ValueError(f"checkpoint must be of a model over {known}, got one of {model.vocabulary} tokens")
    if tokenizer is not BYTES and tokenizer.vocabulary > model.vocabulary:
        raise ValueError(
            f"checkpoint must be of a model over the {tokenizer.vocabulary} tokens of its tokenizer, "
            f"got one of {model.vocabulary}"
        )


def _start(model: MemorizingTransformer, tokenizer: Tokenizer) -> int | None:
    """The token that stands for no prompt: a line's end, None where the model has a start token.

    Raises ValueError where the tokenizer has none for it.
    """
    if model.clear_memories_on_sos_token_id is not None:
        return None
    try:
        return int(tokenizer.encode(START)[0])
    except ValueError as error:
        raise ValueError("prompt must hold text where the tokenizer has no token for a line's end, got none") from error


def _check_memory_options(options: argparse.Namespace, model: MemorizingTransformer) -> None:
    """Refuses what would be ignored, or fail, only when everything is read and written."""
    given = {"memory": options.memory, "save_memories": options.save_memories}
    for name, value in given.items():
        if value is not None and not model.memorizing_layers:
            raise ValueError(f"{name} must not be given with a model that has no memory, got {str(value)!r}")
    path = options.save_memories
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"save_memories must name a file in a directory that exists, got {str(path)!r}")


def over_tokens(weights: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """A run's weights without the tokens of its vocabulary that its tokenizer, of so many tokens, does not have."""
    return {
        name: tensor[:count] if name.startswith(("token_emb.", "to_logits.1.")) else tensor
        for name, tensor in weights.items()
    }


def open_model(path: Path) -> tuple[MemorizingTransformer, int, Tokenizer]:
    """The model of a training run (its directory, or the checkpoint in it) or of `save_pretrained`; N; its tokenizer.

    Of a run with a vocabulary beyond its tokenizer's it is the model over what the tokenizer has. A directory of
    `save_pretrained` may hold a tokenizer.json.

    Raises FileNotFoundError where there is neither, ValueError when it is damaged or does not fit.
    """
    for directory in (path, checkpoint_of(path)):
        if checkpoint.exists(directory):
            saved = checkpoint.require(checkpoint.load_checkpoint(directory), "settings")
            tokenizer = tokenizer_in(saved)
            count = max(BYTES.vocabulary, tokenizer.vocabulary)
            settings = replace(Settings.from_json(saved.values["settings"]), vocabulary=count)
            weights = Checkpoint({"model": over_tokens(saved.parts.get("model", {}), count)}, saved.values)
            check_settings(settings, weights)
            model = build_model(settings)
            load_weights(model, weights)
            return model, settings.segment, tokenizer
    if (path / CONFIG).exists():
        tokenizer = open_tokenizer(str(path) if (path / FILE).exists() else None)
        return MemorizingTransformer.from_pretrained(path), SEGMENT, tokenizer
    raise FileNotFoundError(
        f"checkpoint must be a run's directory or hold {checkpoint.INDEX} or {CONFIG}, got {str(path)!r}"
    )
