"""Training: streams of documents, memories that live across optimiser steps, the state of a run between two of them.

A step never asks the device for a value; losses stay on the device until they are reported or saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtrans.data.documents import Document, DocumentOrder, DocumentStream, RandomWindows, Shuffled
from memtrans.data.recall import RecallDocuments, RecallTask
from memtrans.data.sources import load_corpus
from memtrans.devices import usable_device
from memtrans.distributed.fsdp import spread
from memtrans.distributed.ranks import ALONE, Ranks
from memtrans.training.checkpoint import Checkpoint, part_name, require
from memtrans.training.evaluate import NonFiniteLossError
from memtrans.training.loader import StepLoader
from memtrans.training.reader import DocumentReader
from memtrans.training.rows import SHARED, overlapping, parts_of_rows
from memtrans.training.schedule import learning_rate
from memtrans.training.settings import Settings, build_model
from memtrans.training.step import make_optimizer, make_step
from memtrans.training.weights import load_moments, load_weights, moments_of, weights_of
from memtrans.transformer import MemorizingTransformer
from memtrans_kernels import checks

RECALL = "recall"
HOPELESS = 20  # steps that are not finite, one after the other: no batch is to blame then


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from: an order of documents, documents held out, and which corpus that is."""

    order: DocumentOrder
    held_out: Sequence[Document]
    fingerprint: str


def open_data(settings: Settings, split: str = "validation") -> TrainingData:
    """The documents that the settings ask for.

    split: which documents are held out, `validation` or `test`.

    Raises FileNotFoundError or ValueError when there is no such data or no such split.
    """
    if settings.data == RECALL:
        return _recall_data(settings)
    corpus = load_corpus(settings.data)
    held_out = {"validation": corpus.validation, "test": corpus.test}[split]
    if not held_out:
        raise ValueError(f"split must be validation, which is all that {settings.data!r} holds out, got {split!r}")
    order: DocumentOrder = Shuffled(corpus.train, settings.seed)
    if settings.windows:
        order = RandomWindows(corpus.train, settings.window_segments * settings.segment + 1, settings.seed)
    return TrainingData(order, held_out, corpus.fingerprint)


def _recall_data(settings: Settings) -> TrainingData:
    """Facts and questions; the first documents of every row are near ones until `near_steps` are over."""
    if settings.windows:
        raise ValueError("windows must be off for recall, whose far questions no window holds, got True")
    segments = settings.near_steps * settings.segments * settings.accumulate
    per_document = math.ceil(RecallTask.near_length * 7 / 8 / settings.segment)
    task = RecallTask(near_documents=settings.batch * segments // per_document)
    held_out_task = RecallTask()
    held_out = RecallDocuments("held out", held_out_task)
    count = max(settings.batch, math.ceil(settings.eval_bytes / (held_out_task.length * 3 // 4)))
    return TrainingData(
        RecallDocuments(settings.seed, task), [held_out.document(index) for index in range(count)], f"{RECALL} {task}"
    )


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of that name, a GPU with its number; `auto` takes one where there is one.

    Of several ranks on a host each takes a GPU of its own, in their order. Raises ValueError when it cannot be used.
    """
    device = usable_device(name) if name != "auto" else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cpu":
        return device
    if ranks.size == 1:
        return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    if ":" in name:
        raise ValueError(f"device must be auto, cpu or cuda with {ranks.size} ranks, each on its own, got {name!r}")
    if ranks.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device must have a GPU for each rank, got {torch.cuda.device_count()} for rank {ranks.local_rank} "
            "of this host"
        )
    return torch.device("cuda", ranks.local_rank)


class Trainer:
    """A run between two steps: model, optimiser, what the rows carry, the position in the data.

    Args:
        settings: of the run. data: from `open_data`. device: from `pick_device`.
        ranks: the processes that share the run; each has a trainer, and what one method says all of them do together.

    Attributes:
        step: optimiser steps done. tokens: real tokens read, by all ranks.

    Raises ValueError when the batch cannot be shared out evenly.
    """

    def __init__(self, settings: Settings, data: TrainingData, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.settings, self.data, self.device, self.ranks = settings, data, device, ranks
        check_shares(settings, ranks)
        torch.manual_seed(settings.seed)
        self.model: MemorizingTransformer = build_model(settings).to(device)
        ranks.broadcast(parameter.detach() for parameter in self.model.parameters())
        if ranks.rank > 0:
            torch.manual_seed(settings.seed + ranks.rank)  # each rank has a dropout of its own
        if settings.fsdp:
            spread(self.model, ranks, device)
        self.optimizer = make_optimizer(self.model, settings)
        self.rows = ranks.rows(settings.batch)
        stream = DocumentStream(data.order, settings.batch, settings.segment, self.rows)
        self.loader = StepLoader(stream, settings.accumulate, settings.segments, device)
        spare, dtype = settings.segments * settings.segment, settings.compute_dtype(device)
        self.reader = DocumentReader(
            self.model, len(self.rows), spare=spare, dtype=dtype, keep_memory=settings.keep_memory
        )
        self._step = make_step(self.reader, self.optimizer, settings, ranks)
        self.step = self.tokens = 0
        self._pending: list[Tensor] = []  # (2,) each: bits per byte and gradient norm of the steps since `report`
        self._reached: list[torch.cuda.Event] = []  # of the same steps, where a rank may wait for another in vain

    @property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def advance(self) -> None:
        """One optimiser step."""
        inputs, real = self.loader.take()
        with self.ranks.listening():
            self._pending.append(self._step.run(inputs, learning_rate(self.settings, self.step)))
        if self.ranks.size > 1 and self.device.type == "cuda":
            self._reached.append(torch.cuda.current_stream(self.device).record_event())
        self.loader.prepare()
        self.step += 1
        self.tokens += real

    def check(self) -> Tensor:
        """Losses and gradient norms (steps, 2) since the last report, on the host.

        Raises NonFiniteLossError if one is infinite or NaN, and such steps are not skipped: then the model is lost.
        """
        if not self._pending:
            return torch.zeros(0, 2)
        self.ranks.wait(self._reached)
        self._reached = []
        pending = torch.stack(self._pending).cpu()
        wrong = (~pending.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if wrong and not self.settings.skip_nonfinite:
            step = self.step - len(pending) + wrong[0] + 1
            loss, norm = pending[wrong[0]].tolist()
            raise NonFiniteLossError(
                f"the loss must stay finite, got {loss} bits per byte with a gradient of norm {norm} in step {step}; "
                "a lower learning rate may help, and --skip-nonfinite goes on without such steps"
            )
        return pending

    def report(self) -> dict[str, Any] | None:
        """The mean over the steps since the last report, which it ends; `skipped` of them were not finite.

        None while all of them were not: they wait for the next report. Raises NonFiniteLossError after HOPELESS such.
        """
        pending = self.check()
        finite = pending[pending.isfinite().all(dim=1)]
        if len(pending) and not len(finite):
            if len(pending) >= HOPELESS:
                raise NonFiniteLossError(
                    f"some losses must stay finite, got none in the {len(pending)} steps up to step {self.step}"
                )
            return None
        self._pending = []
        losses, norms = finite.mean(dim=0).tolist()
        skipped = {"skipped": len(pending) - len(finite)} if self.settings.skip_nonfinite else {}
        return {
            "step": self.step,
            "tokens": self.tokens,
            "bits_per_byte": losses,
            "gradient_norm": norms,
            "learning_rate": learning_rate(self.settings, self.step - 1),
            **skipped,
        }

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by part and JSON values: all that the run needs to go on as if it had never stopped.

        Of several ranks each returns its own rows and random numbers, the first one also what all have in common.

        Raises NonFiniteLossError rather than hand out a model that is lost.
        """
        pending = self.check()
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        with self.ranks.listening():
            weights, moments = weights_of(self.model), moments_of(self.optimizer)
        own = {
            **self.reader.state_dict(),
            "loop": {"pending": pending, **{f"random.{name}": state for name, state in random_state.items()}},
        }
        parts = {part_name(part, self.ranks.rank): tensors for part, tensors in own.items()}
        if self.ranks.first:
            parts = {"model": weights, "optimizer": moments, **parts}
        values = {
            "settings": self.settings.to_json(),
            "step": self.step,
            "tokens": self.tokens,
            "stream": self.loader.state_dict(),
            "fingerprint": self.data.fingerprint,
            "ranks": self.ranks.size,
        }
        return parts, values

    def wants(self, part: str, values: Mapping[str, Any]) -> bool:
        """Whether this rank restores from a part of a checkpoint with these values."""
        name, _, rank = part.partition(".")
        owners = overlapping(self.rows, self.settings.batch, values.get("ranks", 1)) if name in SHARED else [0]
        return int(rank or 0) in (owners if name in SHARED else [0, self.ranks.rank])

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes to where the checkpoint was written.

        Whatever number of ranks wrote it; with another number, dropout goes on with other random numbers.

        Raises ValueError when it is of another model or other data, or when no run with these settings wrote it.
        """
        try:
            self._restore(checkpoint)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, IndexError, RuntimeError) as error:
            what = f"another: {type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"checkpoint must be one that a run with its settings wrote, got {what}") from error

    def _restore(self, checkpoint: Checkpoint) -> None:
        require(checkpoint, "settings", "step", "tokens", "stream", "fingerprint", "ranks")
        parts, values = checkpoint.parts, checkpoint.values
        saved_by = checks.integer("ranks", values["ranks"], low=1)
        if values["fingerprint"] != self.data.fingerprint:
            raise ValueError(
                f"data must be what the checkpoint was trained on, got {self.settings.data!r} changed since"
            )
        load_weights(self.model, checkpoint)
        load_moments(self.optimizer, parts["optimizer"])
        self.reader.load_state_dict(parts_of_rows(parts, self.rows, self.settings.batch, saved_by))
        self.loader.load_state_dict(values["stream"])
        self.step, self.tokens = checks.integer("step", values["step"]), checks.integer("tokens", values["tokens"])
        self._pending = list(parts["loop"]["pending"].reshape(-1, 2).to(self.device))
        if saved_by == self.ranks.size:
            self._restore_random(parts[part_name("loop", self.ranks.rank)])
        else:
            torch.manual_seed(self.settings.seed + self.ranks.rank + self.ranks.size * self.step)

    def _restore_random(self, saved: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(saved["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in saved:
            torch.cuda.set_rng_state(saved["random.cuda"], self.device)


def check_shares(settings: Settings, ranks: Ranks) -> None:
    """Refuses settings that so many ranks cannot share."""
    if settings.batch % ranks.size:
        raise ValueError(f"batch must be a multiple of the {ranks.size} ranks that share it, got {settings.batch}")
    if settings.fsdp and ranks.size == 1:
        raise ValueError("fsdp must be off with one process, which has nothing to spread, got True (--no-fsdp)")
