"""How a run begins: what a checkpoint lets change, what all ranks have to agree on, where the run left off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memtrans.data.tokens import BYTES, open_tokenizer
from memtrans.distributed.ranks import ALONE, Ranks
from memtrans.training.checkpoint import Checkpoint, load_checkpoint, require
from memtrans.training.data import TOKENIZER_PART, TrainingData, check_apart, open_data, reading_of, tokenizer_in
from memtrans.training.device import pick_device
from memtrans.training.directory import Lock, check_directory, checkpoint_of, lock, metrics_of
from memtrans.training.events import check_events
from memtrans.training.gaining import OF_MEMORY, RATES, gaining
from memtrans.training.settings import Settings
from memtrans.training.state import check_settings
from memtrans.training.trainer import Trainer, check_shares

MAY_CHANGE = (
    *("data", "tokenizer", "steps", "memory", "device", "compile", "capture", "fsdp", "skip_nonfinite"),
    *("eval_bytes", "eval_every", "checkpoint_every", "log_every", "log", "sample"),
)


def resumed_settings(out: str | Path, given: Mapping[str, Any]) -> Settings:
    """The settings of the checkpoint in `out`, with those that were given and may change.

    Data and tokenizer may lie elsewhere than they did, but have to be the same: data are compared when they are read.
    A memory of another size keeps its newest entries, a larger one all of them: the paper trains with a small memory
    and continues with a large one (its table 5). A run that was trained without one gets layers that are its plain
    layers as long as their memory is empty; see `gaining.py`.

    Raises FileNotFoundError without a checkpoint, ValueError when it is damaged or was made with other settings.
    """
    checkpoint = require(load_checkpoint(checkpoint_of(out), wanted=lambda part, values: part == "model"), "settings")
    settings = Settings.from_json(checkpoint.values["settings"])
    check_settings(settings, checkpoint)
    saved = settings.to_json()
    asked = given.get("memory", saved["memory"])
    gains = bool(asked) and not saved["memory"]
    expected = {**saved, **(gaining(saved) if gains else {})}
    for name, value in given.items():
        may_change = name in MAY_CHANGE or (gains and name in (*OF_MEMORY, *RATES))
        if not may_change and value != expected[name]:
            raise ValueError(f"{name} must be {expected[name]!r}, as in the checkpoint to resume, got {value!r}")
    if given.get("tokenizer") is not None:
        _check_tokenizer(given["tokenizer"], checkpoint)
    if not gains:
        check_memory(asked, saved["memory"])
    return Settings.from_json({**expected, **given})


def _check_tokenizer(name: str, checkpoint: Checkpoint) -> None:
    """Refuses another tokenizer than the one that the checkpoint carries."""
    found, carried = open_tokenizer(name).digest, checkpoint.values.get("tokenizer", BYTES.digest)
    if found != carried:
        raise ValueError(f"tokenizer must be the checkpoint's, {carried}, got {found} as {name!r}")


def check_memory(asked: int, trained: int) -> None:
    """Refuses a memory that gives or takes the layers that have one: their weights are others."""
    if bool(asked) != bool(trained):
        expected = "at least 1" if trained else "0"
        raise ValueError(f"memory must be {expected}, as the run was trained with {trained}, got {asked}")


def start(
    settings: Settings, out: str | Path | None, resume: bool, ranks: Ranks = ALONE, name: str = "run"
) -> tuple[Trainer, Path, Lock | None]:
    """A trainer at the beginning of the run, or where the checkpoint in `out` left it.

    Args:
        out: the directory; None for a new one, runs/NAME or the first of runs/NAME-2, ... that does not exist.
        resume: go on from the checkpoint in `out`. ranks: that share the run. name: of a new directory.

    Returns:
        The trainer, the directory, and the first rank's lock on it: release it when the run has ended.

    Raises:
        ValueError, OSError: on every rank, when the data, the device, the directory or the checkpoint of one of them
        will not do, another run writes to the directory, or the ranks were not given the same.
    """
    ranks.agree(**settings.to_json(), out=str(out), resume=resume)
    if out is not None:
        ranks.together(lambda: check_directory(out, resume))
        ranks.together(lambda: check_apart(settings.data, out))
    trainer = _prepared(settings, ranks, checkpoint_of(out) if resume and out is not None else None)
    taken = ranks.together(lambda: lock(out, name, resume) if ranks.first else None)
    try:
        directory = ranks.gather(None if taken is None else taken.directory)[0]
        assert directory is not None
        if resume:
            checkpoint = ranks.together(lambda: load_checkpoint(checkpoint_of(directory), trainer.wants))
            ranks.together(lambda: trainer.restore(checkpoint))
        ranks.together(lambda: metrics_of(directory).read())
    except BaseException:
        if taken is not None:
            taken.release()
        raise
    return trainer, directory, taken


def _prepared(settings: Settings, ranks: Ranks, saved: Path | None) -> Trainer:
    """The trainer of a run's first step; its data are read as by the run that wrote the checkpoint `saved`, if any."""
    ranks.together(lambda: check_shares(settings, ranks))
    if settings.log is not None:
        ranks.together(check_events)
    data = ranks.together(lambda: _data(settings, saved))
    device = ranks.together(lambda: pick_device(settings.device, ranks))
    ranks.agree(data=data.fingerprint, device=device.type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Trainer(settings, data, device, ranks)


def _data(settings: Settings, saved: Path | None) -> TrainingData:
    if saved is None:
        return open_data(settings)
    checkpoint = load_checkpoint(saved, wanted=lambda part, values: part == TOKENIZER_PART)
    values = require(checkpoint, "fingerprint").values
    return open_data(settings, reading=reading_of(values), tokenizer=tokenizer_in(checkpoint), trained=values)
