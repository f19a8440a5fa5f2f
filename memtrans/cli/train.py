"""`python -m memtrans train`: a run from its beginning, or from its checkpoint on."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from memtrans.cli.ending import EndedError, reading_input, show_json, writing
from memtrans.cli.parser import given_settings
from memtrans.cli.settings_file import read_settings
from memtrans.distributed.ranks import LostRankError, Ranks
from memtrans.inspection.page import write_page
from memtrans.presets import PRESETS
from memtrans.training.checkpoint import exists
from memtrans.training.data import fitted
from memtrans.training.directory import checkpoint_of, newest
from memtrans.training.evaluate import NonFiniteLossError
from memtrans.training.run import Run
from memtrans.training.settings import Settings
from memtrans.training.signals import StoppedError
from memtrans.training.start import resumed_settings, start

SHARED = True
PRESET = "demo"  # where neither the command line nor a file names one


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Trains to the end and prints the summary."""
    try:
        with reading_input():
            preset, given = ranks.together(lambda: _given(options))
            out = options.out or (newest(preset) if options.resume else None)
            settings = ranks.together(lambda: _settings(preset, given, out if options.resume else None))
            trainer, options.out, lock = start(settings, out, options.resume, ranks, preset)
        try:
            run = Run(trainer, options.out, options.plain)
            summary = _trained(run)
            if ranks.first and run.retrieved is not None:
                with writing():
                    write_page(options.out / "retrieved.html", run.retrieved)
        finally:
            if lock is not None:
                lock.release()
    except LostRankError as error:
        has_checkpoint = options.out is not None and exists(checkpoint_of(options.out))
        kept = "the last checkpoint is kept, --resume goes on from there" if has_checkpoint else "nothing is saved yet"
        raise EndedError(f"{error}; {kept}", everywhere=True) from error
    if ranks.first:
        show_json(summary)


def _trained(run: Run) -> dict[str, object]:
    try:
        return run.train()
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, StoppedError) else StoppedError()
        kept = f"step {run.saved_step} is saved, --resume --out {run.out} goes on from there"
        saved = kept if run.saved_step >= 0 else "nothing is saved yet"
        raise EndedError(f"{stopped}; {saved}", stopped.status, everywhere=stopped.failed is not None) from error
    except NonFiniteLossError as error:
        raise EndedError(f"{error}; the last good checkpoint is kept") from error


def _given(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The preset to begin with, and the settings that override it: the command line's above those of the file."""
    preset, in_file = read_settings(options.config) if options.config else (None, {})
    return options.preset or preset or PRESET, in_file | given_settings(options)


def _settings(preset: str, given: dict[str, Any], resumed: Path | None) -> Settings:
    if resumed is not None:
        return resumed_settings(resumed, given)
    settings = dataclasses.replace(PRESETS[preset], **given)
    return settings if "vocabulary" in given else fitted(settings)
