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

from memtrans.checkpoint import Checkpoint, require
from memtrans.data import Document, DocumentOrder, DocumentStream, RandomWindows, Shuffled
from memtrans.evaluate import NonFiniteLossError
from memtrans.loader import StepLoader
from memtrans.reader import DocumentReader
from memtrans.recall import RecallDocuments, RecallTask
from memtrans.settings import Settings, build_model
from memtrans.sources import load_corpus
from memtrans.step import make_optimizer, make_step, state_shapes
from memtrans.transformer import MemorizingTransformer
from memtrans.validation import usable_device
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


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` takes a GPU where there is one. Raises ValueError when it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = usable_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    return device


def learning_rate(settings: Settings, step: int) -> float:
    """Of the optimiser step after `step` others: a linear warm-up, then a decay.

    A cosine ends at `final_rate` of the highest rate. The inverse square root of the number of the step, constant
    during the warm-up but for its ramp, is the paper's: highest at the warm-up's end, `learning_rate` / sqrt(`warmup`).

    >>> settings = Settings(steps=100, warmup=10, learning_rate=1.0, final_rate=0.0)
    >>> [round(learning_rate(settings, step), 2) for step in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    >>> settings = Settings(schedule="inverse-sqrt", warmup=100, learning_rate=1.0)
    >>> [round(learning_rate(settings, step), 3) for step in (0, 49, 99, 399)]
    [0.001, 0.05, 0.1, 0.05]
    """
    highest = settings.learning_rate
    if settings.schedule == "inverse-sqrt":
        highest /= math.sqrt(max(step + 1, settings.warmup))
    if step < settings.warmup:
        return highest * (step + 1) / settings.warmup
    if settings.schedule == "inverse-sqrt":
        return highest
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    share = settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return highest * share


class Trainer:
    """A run between two steps: model, optimiser, what the rows carry, the position in the data.

    Args:
        settings: of the run. data: from `open_data`. device: from `pick_device`.

    Attributes:
        step: optimiser steps done. tokens: real tokens read.
    """

    def __init__(self, settings: Settings, data: TrainingData, device: torch.device) -> None:
        self.settings, self.data, self.device = settings, data, device
        torch.manual_seed(settings.seed)
        self.model: MemorizingTransformer = build_model(settings).to(device)
        self.optimizer = make_optimizer(self.model, settings)
        stream = DocumentStream(data.order, settings.batch, settings.segment)
        self.loader = StepLoader(stream, settings.accumulate, settings.segments, device)
        spare, dtype = settings.segments * settings.segment, settings.compute_dtype(device)
        self.reader = DocumentReader(
            self.model, settings.batch, spare=spare, dtype=dtype, keep_memory=settings.keep_memory
        )
        self._step = make_step(self.reader, self.optimizer, settings)
        self.step = self.tokens = 0
        self._pending: list[Tensor] = []  # (2,) each: bits per byte and gradient norm of the steps since `report`

    @property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def advance(self) -> None:
        """One optimiser step."""
        inputs, real = self.loader.take()
        self._pending.append(self._step.run(inputs, learning_rate(self.settings, self.step)))
        self.loader.prepare()
        self.step += 1
        self.tokens += real

    def check(self) -> Tensor:
        """Losses and gradient norms (steps, 2) since the last report, on the host.

        Raises NonFiniteLossError if one is infinite or NaN, and such steps are not skipped: then the model is lost.
        """
        if not self._pending:
            return torch.zeros(0, 2)
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

        Raises NonFiniteLossError rather than hand out a model that is lost.
        """
        pending = self.check()
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        moments = {
            f"{place}.{name}": tensor
            for place, tensors in self.optimizer.state_dict()["state"].items()
            for name, tensor in tensors.items()
        }
        parts = {
            "model": self.model.state_dict(),
            "optimizer": moments,
            **self.reader.state_dict(),
            "loop": {"pending": pending, **{f"random.{name}": state for name, state in random_state.items()}},
        }
        values = {
            "settings": self.settings.to_json(),
            "step": self.step,
            "tokens": self.tokens,
            "stream": self.loader.state_dict(),
            "fingerprint": self.data.fingerprint,
        }
        return parts, values

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes to where the checkpoint was written.

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
        require(checkpoint, "settings", "step", "tokens", "stream", "fingerprint")
        parts, values = checkpoint.parts, checkpoint.values
        if values["fingerprint"] != self.data.fingerprint:
            raise ValueError(
                f"data must be what the checkpoint was trained on, got {self.settings.data!r} changed since"
            )
        load_weights(self.model, checkpoint)
        self._check_moments(parts["optimizer"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            place, key = name.split(".", 1)
            moments.setdefault(int(place), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.reader.load_state_dict(parts)
        self.loader.load_state_dict(values["stream"])
        self.step, self.tokens = checks.integer("step", values["step"]), checks.integer("tokens", values["tokens"])
        self._pending = list(parts["loop"]["pending"].reshape(-1, 2).to(self.device))
        torch.set_rng_state(parts["loop"]["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in parts["loop"]:
            torch.cuda.set_rng_state(parts["loop"]["random.cuda"], self.device)

    def _check_moments(self, saved: Mapping[str, Tensor]) -> None:
        """Refuses what are no moments of this optimiser: it takes any. A parameter without a gradient has none."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        places = {name.partition(".")[0] for name in saved}
        expected = {
            f"{place}.{name}": shape
            for place, parameter in enumerate(parameters)
            for name, shape in state_shapes(self.optimizer, parameter).items()
            if str(place) in places
        }
        found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        if found != expected:
            wrong = sorted(set(found.items()) ^ set(expected.items()))[0][0]
            raise ValueError(
                f"checkpoint must hold this model's moments, {wrong} of shape {expected.get(wrong)}, "
                f"got {found.get(wrong)}"
            )


def load_weights(model: MemorizingTransformer, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's weights into a model. Raises ValueError when they are another model's."""
    try:
        model.load_state_dict(dict(checkpoint.parts["model"]))
    except (KeyError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"checkpoint must hold weights of this model, got others: {detail}") from error
