"""A training run in a directory: what is reported, drawn, evaluated and saved when, and how it goes on after a stop.

OUT/metrics.jsonl   a line every `log_every` steps and at every evaluation
OUT/loss.png        its curves
OUT/checkpoint/     see `checkpoint.py`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from memtrans.distributed.ranks import ALONE, LostRankError, Ranks
from memtrans.inspection.sample import sample_retrievals
from memtrans.training.checkpoint import exists, load_checkpoint, require, save_checkpoint
from memtrans.training.evaluate import NonFiniteLossError, evaluate_both
from memtrans.training.metrics import Metrics
from memtrans.training.plot import plot_metrics
from memtrans.training.progress import Progress
from memtrans.training.reader import DocumentReader
from memtrans.training.settings import Settings
from memtrans.training.signals import Interruption, StoppedError
from memtrans.training.trainer import Trainer, check_shares, open_data, pick_device

MAY_CHANGE = (
    *("steps", "memory", "device", "compile", "fsdp", "skip_nonfinite"),
    *("eval_bytes", "eval_every", "checkpoint_every", "log_every", "sample"),
)


def checkpoint_of(out: str | Path) -> Path:
    """Where a run keeps its checkpoint."""
    return Path(out) / "checkpoint"


def metrics_of(out: str | Path) -> Metrics:
    """The record of a run."""
    return Metrics(Path(out) / "metrics.jsonl")


def resumed_settings(out: str | Path, given: Mapping[str, Any]) -> Settings:
    """The settings of the checkpoint in `out`, with those that were given and may change.

    A memory of another size keeps its newest entries, a larger one all of them: the paper trains with a small memory
    and continues with a large one (its table 5).

    Raises FileNotFoundError without a checkpoint, ValueError when it is damaged or was made with other settings.
    """
    checkpoint = require(load_checkpoint(checkpoint_of(out), wanted=lambda part, values: False), "settings")
    saved = Settings.from_json(checkpoint.values["settings"]).to_json()
    for name, value in given.items():
        if name not in MAY_CHANGE and value != saved[name]:
            raise ValueError(f"{name} must be {saved[name]!r}, as in the checkpoint to resume, got {value!r}")
    check_memory(given.get("memory", saved["memory"]), saved["memory"])
    return Settings.from_json({**saved, **given})


def check_memory(asked: int, trained: int) -> None:
    """Refuses a memory that gives or takes the layers that have one: their weights are others."""
    if bool(asked) != bool(trained):
        expected = "at least 1" if trained else "0"
        raise ValueError(f"memory must be {expected}, as the run was trained with {trained}, got {asked}")


def start(settings: Settings, out: str | Path, resume: bool, ranks: Ranks = ALONE) -> Trainer:
    """A trainer at the beginning of the run, or where the checkpoint in `out` left it.

    Raises ValueError or OSError, on every rank, when the data, the device, the directory or the checkpoint of one of
    them will not do, or they were not given the same.
    """
    ranks.agree(**settings.to_json(), out=str(out), resume=resume)
    ranks.together(lambda: _check_directory(out, resume))
    ranks.together(lambda: check_shares(settings, ranks))
    data = ranks.together(lambda: open_data(settings))
    device = ranks.together(lambda: pick_device(settings.device, ranks))
    ranks.agree(data=data.fingerprint, device=device.type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trainer = Trainer(settings, data, device, ranks)
    if resume:
        checkpoint = ranks.together(lambda: load_checkpoint(checkpoint_of(out), trainer.wants))
        ranks.together(lambda: trainer.restore(checkpoint))
        ranks.together(lambda: metrics_of(out).read())
    return trainer


def _check_directory(out: str | Path, resume: bool) -> None:
    blocked = next((path for path in (Path(out), *Path(out).parents) if path.exists() and not path.is_dir()), None)
    if blocked:
        raise ValueError(f"out must be a directory or not exist, got {str(out)!r}, where {str(blocked)!r} is a file")
    if not resume and exists(checkpoint_of(out)):
        raise ValueError(f"out must be a directory without a checkpoint, or come with --resume, got {str(out)!r}")


class Run:
    """Trains in a directory until the end, a signal to stop or a loss that is not finite.

    Args:
        trainer: from `start`. out: the directory, made if missing. plain: lines instead of a bar.

    Attributes:
        saved_step: of the last checkpoint that this process wrote, -1 before.
    """

    def __init__(self, trainer: Trainer, out: str | Path, plain: bool = False) -> None:
        self.trainer, self.out, self.plain = trainer, Path(out), plain
        self.settings, self.ranks = trainer.settings, trainer.ranks
        self.metrics = Metrics(metrics_of(self.out).path, kept=self.ranks.first)
        self.saved_step = -1
        self._seconds = 0.0  # spent on steps by this process
        self._read = 0  # tokens read in them
        self._since = (0.0, 0)  # both, at the last report

    def train(self) -> dict[str, Any]:
        """Runs to the end and returns the summary.

        Raises:
            StoppedError: Ctrl-C or SIGTERM; a checkpoint was written. NonFiniteLossError: the last good checkpoint is
            kept. OSError: a checkpoint could not be written; the previous one is kept. LostRankError: another rank is
            gone.
        """
        trainer = self.trainer
        self.out.mkdir(parents=True, exist_ok=True)
        self.metrics.truncate(trainer.step)
        self.progress = Progress(self.settings.steps, trainer.step, self.plain, shown=self.ranks.first)
        with Interruption(self.ranks.largest) as interruption:
            try:
                self._save()
                evaluation = self._evaluate_if_due(interruption) if trainer.step else {}
                while trainer.step < self.settings.steps:
                    self._step(interruption)
                    evaluation = self._evaluate_if_due(interruption) or evaluation
                    self._save_if_due()
            finally:
                self.progress.close()
        if self.settings.sample:
            self._show_retrieved()
        return self._summary(evaluation)

    def _show_retrieved(self) -> None:
        """Says what the memory retrieves for a few tokens of a held-out document."""
        trainer, settings = self.trainer, self.settings
        read = DocumentReader(trainer.model, 1).read
        for retrieved in sample_retrievals(
            trainer.model, trainer.data.held_out, settings.segment, settings.sample, read
        ):
            self.progress.say(str(retrieved))

    def _step(self, interruption: Interruption) -> None:
        """One optimiser step, and the report that is due after it; after a signal to stop, a checkpoint and the end."""
        trainer, settings = self.trainer, self.settings
        begin, tokens = time.perf_counter(), trainer.tokens
        trainer.advance()
        heard = interruption.heard()  # before anything waits for the GPU, which may wait for a rank that is gone
        last = trainer.step == settings.steps
        due = last or trainer.step % settings.log_every == 0
        line = trainer.report() if due else None
        self._seconds += time.perf_counter() - begin
        self._read += trainer.tokens - tokens
        self.progress.step()
        if line is not None:
            self._log(line)
        if heard:
            self._save()
            raise StoppedError(heard)

    def _save_if_due(self) -> None:
        """Writes a checkpoint after the last step and every so many, once an evaluation there found the model good."""
        step, settings = self.trainer.step, self.settings
        if step == settings.steps or step % settings.checkpoint_every == 0:
            self._save()

    def _log(self, line: dict[str, Any]) -> None:
        seconds, tokens = self._seconds - self._since[0], self._read - self._since[1]
        self._since = (self._seconds, self._read)
        line["tokens_per_second"] = tokens / seconds
        self.metrics.append(line)
        self.progress.report(line)

    def _save(self) -> None:
        """Writes a checkpoint unless the one of this step is there."""
        if self.saved_step != self.trainer.step:
            save_checkpoint(checkpoint_of(self.out), *self.trainer.state(), self.ranks)
            self.saved_step = self.trainer.step
            self._plot()

    def _plot(self) -> None:
        if self.ranks.first:
            plot_metrics(self.metrics.read(), self.out / "loss.png")

    def _evaluate_if_due(self, interruption: Interruption) -> dict[str, Any]:
        trainer, settings = self.trainer, self.settings
        if trainer.step < settings.steps and (not settings.eval_every or trainer.step % settings.eval_every):
            return {}
        try:
            evaluation = evaluate_settings(trainer, interruption.check)
        except (NonFiniteLossError, LostRankError):
            raise
        except BaseException:
            self._save()  # of what else stops an evaluation, the model knows nothing
            raise
        self.metrics.append({"step": trainer.step, "tokens": trainer.tokens, **evaluation})
        self._plot()
        self.progress.say(describe(trainer.step, evaluation))
        return evaluation

    def _summary(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "tokens_per_second": round(self._read / self._seconds, 1) if self._seconds else None,
            **{name: value for name, value in evaluation.items() if not isinstance(value, dict)},
            "parameters": trainer.parameters,
            "device": str(trainer.device),
            **({"ranks": self.ranks.size} if self.ranks.size > 1 else {}),
            "data": self.settings.data,
            "seed": self.settings.seed,
            "seconds": round(self._seconds, 1),
            "out": str(self.out),
        }


def evaluate_settings(trainer: Trainer, on_segment: Callable[[], None]) -> dict[str, Any]:
    """Both evaluations of a run over its held-out documents."""
    settings = trainer.settings
    return evaluate_both(
        trainer.model,
        trainer.data.held_out,
        settings.batch,
        settings.segment,
        settings.eval_bytes,
        dtype=settings.compute_dtype(trainer.device),
        keep_memory=settings.keep_memory,
        on_segment=on_segment,
        ranks=trainer.ranks,
    )


def describe(step: int, evaluation: Mapping[str, Any]) -> str:
    """An evaluation as a line of text."""
    text = (
        f"step {step}: held out {evaluation['eval_bits_per_byte']:.3f} bits per byte with memory, "
        f"{evaluation['eval_bits_per_byte_without_memory']:.3f} without"
    )
    if "recall_accuracy" in evaluation:
        text += (
            f"; far questions answered {evaluation['recall_accuracy']:.1%} with memory, "
            f"{evaluation['recall_accuracy_without_memory']:.1%} without (chance {evaluation['recall_chance']:.1%})"
        )
    return text
