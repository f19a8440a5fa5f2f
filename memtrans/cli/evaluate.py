"""`python -m memtrans eval`: a run's held-out text again, with the memory and without, at any sizes."""

from __future__ import annotations

import argparse
import dataclasses
import warnings

from memtrans.annotations import allows
from memtrans.cli.ending import reading_input, show_json
from memtrans.cli.parser import given_settings
from memtrans.distributed.ranks import Ranks
from memtrans.training.checkpoint import Checkpoint, load_checkpoint, require
from memtrans.training.data import ALL, HeldOut, open_held_out
from memtrans.training.device import pick_device
from memtrans.training.directory import checkpoint_of
from memtrans.training.evaluate import evaluate_both
from memtrans.training.model import build_model
from memtrans.training.settings import Settings
from memtrans.training.start import check_memory
from memtrans.training.state import check_settings, load_weights
from memtrans.transformer import MemorizingTransformer

SHARED = True
MOST = 2**63 - 1  # bytes: all that there are


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Evaluates and prints the report; several ranks read a share of the documents each."""
    with reading_input():
        settings, steps, held_out, model = ranks.together(lambda: _opened(options, ranks))
        ranks.agree(**settings.to_json(), out=str(options.out), split=held_out.split)
        ranks.agree(data=held_out.fingerprint)
    device = model.device
    report = evaluate_both(
        model,
        held_out.documents,
        settings.batch,
        settings.segment,
        settings.eval_bytes,
        ranks,
        dtype=settings.compute_dtype(device),
        keep_memory=settings.keep_memory,
    )
    if ranks.first:
        show_json(
            {
                "steps": steps,
                "data": settings.data,
                "split": held_out.split,
                "out": str(options.out),
                **report,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "device": str(device),
                **({"ranks": ranks.size} if ranks.size > 1 else {}),
            }
        )


def _opened(options: argparse.Namespace, ranks: Ranks) -> tuple[Settings, int, HeldOut, MemorizingTransformer]:
    """The settings, the steps that the run has done, its documents and its model."""
    checkpoint = require(load_checkpoint(checkpoint_of(options.out)), "settings", "step", "fingerprint")
    step = checkpoint.values["step"]
    if not allows(int, step):
        raise ValueError(f"step must be of type int, got {step!r} in the checkpoint")
    trained = Settings.from_json(checkpoint.values["settings"])
    settings = dataclasses.replace(trained, **given_settings(options))
    check_memory(settings.memory, trained.memory)
    check_settings(settings, checkpoint)
    held_out = _held_out(settings, options, checkpoint)
    if held_out.split == ALL and not hasattr(options, "eval_bytes"):
        settings = dataclasses.replace(settings, eval_bytes=MOST)
    model = build_model(settings).to(pick_device(settings.device, ranks))
    load_weights(model, checkpoint)
    return settings, step, held_out, model


def _held_out(settings: Settings, options: argparse.Namespace, checkpoint: Checkpoint) -> HeldOut:
    """The documents to evaluate on: of the data that were named, or of the run's own, changed since or not."""
    trained_on, named = str(checkpoint.values["fingerprint"]), hasattr(options, "data")
    split = options.split or (None if named else "validation")
    held_out = open_held_out(settings, split, checkpoint)
    if not named and held_out.fingerprint != trained_on:
        warnings.warn(
            f"data {settings.data!r} changed since the run read them: it may have learned from what is evaluated here",
            stacklevel=2,
        )
    return held_out
