"""The training loop: steps, and what is reported, drawn, evaluated and saved between them.

See `directory.py` for the files that it writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from memtrans.distributed.ranks import LostRankError
from memtrans.inspection.records import Records
from memtrans.inspection.sample import sample_retrievals
from memtrans.training.checkpoint import exists, save_checkpoint
from memtrans.training.directory import checkpoint_of, metrics_of
from memtrans.training.evaluate import NonFiniteLossError, evaluate_both
from memtrans.training.events import Events, NoEvents
from memtrans.training.metrics import Metrics
from memtrans.training.plot import plot_metrics
from memtrans.training.progress import Progress
from memtrans.training.reader import DocumentReader
from memtrans.training.signals import Interruption, StoppedError
from memtrans.training.step import compiles
from memtrans.training.trainer import Trainer


class NotWrittenError(OSError):
    """A run could not write to its directory: the disk is full, or the like."""


class Run:
    """Trains in a directory until the end, a signal to stop or a loss that is not finite.

    Args:
        trainer: from `start`. out: the directory, made if missing. plain: lines instead of a bar.

    Attributes:
        saved_step: of the last checkpoint that this process wrote, -1 before.
        retrieved: what the end of a held-out document looked up in the end, if `sample` asks for it.
    """

    def __init__(self, trainer: Trainer, out: str | Path, plain: bool = False) -> None:
        self.trainer, self.out, self.plain = trainer, Path(out), plain
        self.settings, self.ranks = trainer.settings, trainer.ranks
        self.metrics = Metrics(metrics_of(self.out).path, kept=self.ranks.first)
        self.saved_step = -1
        self.retrieved: Records | None = None
        self._seconds = 0.0  # spent on steps by this process
        self._read = 0  # tokens read in them
        self._since = (0.0, 0)  # both, at the last report
        self._drawn: int | None = 0  # lines of the record in the picture of the curves; None where none can be drawn

    def train(self) -> dict[str, Any]:
        """Runs to the end and returns the summary.

        Raises:
            StoppedError: Ctrl-C or SIGTERM; a checkpoint was written, unless a step failed by it. NonFiniteLossError:
            the last good checkpoint is kept. NotWrittenError: the directory could not be written to; the previous
            checkpoint is kept, if there is one. LostRankError: another rank is gone.
        """
        with self._writing():
            self.out.mkdir(parents=True, exist_ok=True)
            self.metrics.truncate(self.trainer.step, self._begins_with_evaluation())
            kept = self.settings.log is not None and self.ranks.first
            self.events = Events(self.out / "tensorboard", self.trainer.step) if kept else NoEvents()
        self.progress = Progress(self.settings.steps, self.trainer.step, self.plain, shown=self.ranks.first)
        with Interruption(self.ranks.largest) as interruption:
            try:
                evaluation = self._loop(interruption)
            finally:
                self.progress.close()
                self.events.close()
        if self.settings.sample:
            self._show_retrieved()
        return self._summary(evaluation)

    def _loop(self, interruption: Interruption) -> dict[str, Any]:
        """Every step, and what is due after it; returns the last evaluation."""
        trainer, settings = self.trainer, self.settings
        evaluation: dict[str, Any] = {}
        self._save()
        if trainer.device.type == "cuda" and compiles(settings, trainer.reader):
            self.progress.say("compiling the step, about 40 s, once")
        if self._begins_with_evaluation():
            evaluation = self._evaluate(interruption.check)
        while trainer.step < settings.steps:
            begin, tokens = time.perf_counter(), trainer.tokens
            if settings.log is not None and self._is_due(settings.log_every, after=1):
                trainer.watch()
            self._advance(interruption)
            heard = interruption.heard()  # before anything waits for the GPU, which may wait for a rank that is gone
            line = trainer.report() if self._is_due(settings.log_every) else None
            self._seconds += time.perf_counter() - begin
            self._read += trainer.tokens - tokens
            self.progress.step()
            if line is not None:
                self._log(line)
            if heard:
                self._save()
                raise StoppedError(heard)
            if self._is_due(settings.eval_every):
                evaluation = self._evaluate(interruption.check)
            if self._is_due(settings.checkpoint_every):
                self._save()  # after an evaluation found the model good
        return evaluation

    def _advance(self, interruption: Interruption) -> None:
        """A step. One that fails after a signal to stop is most likely stopped by it: compilers hear Ctrl-C too."""
        try:
            self.trainer.advance()
        except (LostRankError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not interruption.noted:
                raise
            raise StoppedError(interruption.noted, error) from error

    def _begins_with_evaluation(self) -> bool:
        """Whether it goes on from a checkpoint at which an evaluation is due: a stopped one may not have been made."""
        return self.trainer.step > 0 and self._is_due(self.settings.eval_every)

    def _is_due(self, every: int, after: int = 0) -> bool:
        """Whether something happens after this step, or `after` more: every so many (0: never), and after the last."""
        step = self.trainer.step + after
        return step == self.settings.steps or (every > 0 and step % every == 0)

    # ------------------------------------------------------------------------------------- reports and evaluations

    def _log(self, line: dict[str, Any]) -> None:
        seconds, tokens = self._seconds - self._since[0], self._read - self._since[1]
        self._since = (self._seconds, self._read)
        line["tokens_per_second"] = tokens / seconds
        share = self.trainer.peak_share(line["tokens_per_second"])
        if share is not None:
            line["peak_share"] = share
        self._record(line)
        self.progress.report(line)

    def _record(self, line: Mapping[str, Any]) -> None:
        with self._writing():
            self.metrics.append(line)
            self.events.append(line)

    def _evaluate(self, on_segment: Callable[[], None]) -> dict[str, Any]:
        """Evaluates, records the result and says it; saves the model first when something stops it."""
        trainer = self.trainer
        try:
            evaluation = evaluate_settings(trainer, on_segment)
        except (NonFiniteLossError, LostRankError):
            raise
        except BaseException:
            self._save()  # of what else stops an evaluation, the model knows nothing
            raise
        self._record({"step": trainer.step, "tokens": trainer.tokens, **evaluation})
        self._plot()
        self.progress.say(describe(trainer.step, evaluation))
        return evaluation

    def _show_retrieved(self) -> None:
        """Says what the memory retrieves for a few tokens of a held-out document, and keeps the rest."""
        trainer, settings = self.trainer, self.settings
        reader = DocumentReader(trainer.model, 1)
        held_out, name = trainer.data.held_out, self.out.resolve().name
        sample = sample_retrievals(trainer.model, held_out, settings.segment, reader.read, reader.memories, name)
        if sample is None:
            return
        self.retrieved = sample.records
        for line in sample.lines(settings.sample):
            self.progress.say(line)

    # ------------------------------------------------------------------------------------------- files of the run

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what a full disk raises into a NotWrittenError, which says what there is to go on from."""
        try:
            yield
        except OSError as error:
            kept = "the last checkpoint is kept" if exists(checkpoint_of(self.out)) else "no checkpoint is saved yet"
            raise NotWrittenError(f"writing to {self.out} failed: {error}; {kept}") from error

    def _save(self) -> None:
        """Writes a checkpoint unless the one of this step is there."""
        if self.saved_step != self.trainer.step:
            state = self.trainer.state()
            with self._writing():
                save_checkpoint(checkpoint_of(self.out), *state, self.ranks)
            self.saved_step = self.trainer.step
            self._plot()

    def _plot(self) -> None:
        """Draws the curves if they are longer than those drawn; where Matplotlib is missing, one line says so."""
        if not self.ranks.first or self._drawn is None:
            return
        with self._writing():
            lines = self.metrics.read()
        if len(lines) == self._drawn:
            return
        try:
            with self._writing():
                plot_metrics(lines, self.out / "loss.png")
            self._drawn = len(lines)
        except ImportError as error:
            self._drawn = None
            self.progress.say(f"no loss.png, which needs Matplotlib: pip install 'memtrans[train]' ({error})")

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
    perplexities = [evaluation[f"eval_perplexity{name}"] for name in ("", "_without_memory")]
    if evaluation["eval_scored_tokens"] != evaluation["eval_scored_bytes"] and None not in perplexities:
        text += f" (perplexity per token {perplexities[0]:.1f} and {perplexities[1]:.1f})"
    if "recall_accuracy" in evaluation:
        text += (
            f"; far questions answered {evaluation['recall_accuracy']:.1%} with memory, "
            f"{evaluation['recall_accuracy_without_memory']:.1%} without (chance {evaluation['recall_chance']:.1%})"
        )
    return text
