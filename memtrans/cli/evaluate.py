"""`python -m memtrans eval`: a run's held-out text again, with the memory and without, at any sizes."""

from __future__ import annotations

import argparse
import dataclasses

from memtrans.annotations import allows
from memtrans.cli.ending import reading_input, show_json
from memtrans.cli.parser import given_settings
from memtrans.distributed.ranks import Ranks
from memtrans.training.checkpoint import load_checkpoint, require
from memtrans.training.data import TrainingData, open_data
from memtrans.training.device import pick_device
from memtrans.training.directory import checkpoint_of
from memtrans.training.evaluate import evaluate_both
from memtrans.training.model import build_model
from memtrans.training.settings import Settings
from memtrans.training.start import check_memory
from memtrans.training.state import check_settings, load_weights
from memtrans.transformer import MemorizingTransformer

SHARED = True


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Evaluates and prints the report; several ranks read a share of the documents each."""
    with reading_input():
        settings, steps, data, model = ranks.together(lambda: _opened(options, ranks))
        ranks.agree(**settings.to_json(), out=str(options.out), split=options.split)
        ranks.agree(data=data.fingerprint)
    device = model.device
    report = evaluate_both(
        model,
        data.held_out,
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
                "split": options.split,
                "out": str(options.out),
                **report,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "device": str(device),
                **({"ranks": ranks.size} if ranks.size > 1 else {}),
            }
        )


def _opened(options: argparse.Namespace, ranks: Ranks) -> tuple[Settings, int, TrainingData, MemorizingTransformer]:
    """The settings, the steps that the run has done, its documents and its model."""
    checkpoint = require(load_checkpoint(checkpoint_of(options.out)), "settings", "step")
    step = checkpoint.values["step"]
    if not allows(int, step):
        raise ValueError(f"step must be of type int, got {step!r} in the checkpoint")
    trained = Settings.from_json(checkpoint.values["settings"])
    settings = dataclasses.replace(trained, **given_settings(options))
    check_memory(settings.memory, trained.memory)
    check_settings(settings, checkpoint)
    data = open_data(settings, options.split)
    model = build_model(settings).to(pick_device(settings.device, ranks))
    load_weights(model, checkpoint)
    return settings, step, data, model
