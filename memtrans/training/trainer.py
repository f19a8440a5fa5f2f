"""A run between two optimiser steps: model, optimiser, what the rows carry, the position in the data.

A step never asks the device for a value; losses stay on the device until they are reported or saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memtrans.annotations import allows
from memtrans.data.stream import DocumentStream
from memtrans.data.tokens import BYTES
from memtrans.distributed.ranks import ALONE, LostRankError, Ranks
from memtrans.inspection.share import measured_share, memory_fill
from memtrans.training.checkpoint import Checkpoint, part_name, require
from memtrans.training.data import TOKENIZER_PART, TrainingData, reading_of, tokenizer_part
from memtrans.training.evaluate import NonFiniteLossError, perplexity
from memtrans.training.gaining import gains_memory, with_memory
from memtrans.training.loader import StepInputs, StepLoader
from memtrans.training.model import build_model
from memtrans.training.optimizer import learning_rate, make_optimizer
from memtrans.training.peak import flop_per_token, peak_of
from memtrans.training.reader import DocumentReader
from memtrans.training.rows import ROW_PARTS, owns_some, parts_of_rows
from memtrans.training.settings import Settings
from memtrans.training.state import load_moments, load_weights, moments_of, weights_of
from memtrans.training.step import Step
from memtrans.transformer import MemorizingTransformer
from memtrans_kernels import checks

HOPELESS = 20  # steps that are not finite, one after the other: no batch is to blame then


class Trainer:
    """Everything of a run that a step changes, and that a checkpoint has to hold.

    Args:
        settings: of the run. data: from `open_data`. device: from `pick_device`.
        ranks: the processes that share the run; each has a trainer, and what one method says all of them do together.

    Attributes:
        step: optimiser steps done. tokens: real tokens read, by all ranks.
        flop_per_token: of matrix products. peak: FLOP/s of all ranks' devices, None where that is not known.

    Raises ValueError when the batch cannot be shared out evenly.
    """

    def __init__(self, settings: Settings, data: TrainingData, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.settings, self.data, self.device, self.ranks = settings, data, device, ranks
        check_shares(settings, ranks)
        if settings.capture and device.type != "cuda":
            raise ValueError(f"capture must be off without a GPU, got True on {device} (--no-capture)")
        torch.manual_seed(settings.seed)
        self.model: MemorizingTransformer = build_model(settings).to(device)
        ranks.broadcast(parameter.detach() for parameter in self.model.parameters())
        if ranks.rank > 0:
            torch.manual_seed(settings.seed + ranks.rank)  # each rank has a dropout of its own
        self.flop_per_token = flop_per_token(self.model, settings)
        self.peak = peak_of(ranks, device, settings.compute_dtype(device))
        if settings.fsdp:
            from memtrans.distributed.fsdp import shard  # what it needs of PyTorch takes a second to import

            shard(self.model, ranks, device)
        self.optimizer = make_optimizer(self.model, settings)
        self.rows = ranks.rows(settings.batch)
        self.reader = self._reader(step=0)
        stream = DocumentStream(data.order, settings.batch, settings.segment, self.rows)
        self.loader = StepLoader(stream, settings.accumulate, settings.segments, device)
        self._step = Step(self.reader, self.optimizer, settings, ranks)
        self.step = self.tokens = 0
        self._looked: dict[str, float | None] = {}
        self._watches = False
        self._pending: list[Tensor] = []  # (3,) each, see `Step`, of the steps since `report`
        self._reached: list[torch.cuda.Event] = []  # of the same steps, where a rank may wait for another in vain

    def _reader(self, step: int) -> DocumentReader:
        """One with memories of the size that they have in the step after so many."""
        settings = self.settings
        return DocumentReader(
            self.model,
            len(self.rows),
            spare=settings.segments * settings.segment,
            dtype=settings.compute_dtype(self.device),
            keep_memory=settings.keep_memory,
            max_memories=max(1, settings.memory_at(step)),
        )

    def _fit_memories(self, step: int) -> None:
        """The memories get the size that they have after so many steps, and keep what there is room for."""
        if self.reader.memories and self.reader.memories[0].max_memories != self.settings.memory_at(step):
            held, self.reader = self.reader.state_dict(), self._reader(step)
            self.reader.load_state_dict(held)
            self._step.read_with(self.reader)

    @property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def peak_share(self, tokens_per_second: float) -> float | None:
        """The share of the devices' peak that matrix products reach at that rate; None where the peak is not known."""
        return None if self.peak is None else tokens_per_second * self.flop_per_token / self.peak

    def watch(self) -> None:
        """Has the next step first measure, for the report, how full memories are and what attention they get."""
        self._watches = True

    def advance(self) -> None:
        """Has the device do the next step, and draws the inputs of the one after it meanwhile."""
        self._fit_memories(self.step)
        inputs, real = self.loader.take()
        if self._watches:
            self._looked, self._watches = self._look(inputs), False
        with self.ranks.listening():
            self._pending.append(self._step(inputs, learning_rate(self.settings, self.step)))
        if self.ranks.size > 1 and self.device.type == "cuda":
            self._reached.append(torch.cuda.current_stream(self.device).record_event())
        self.loader.prepare()
        self.step += 1
        self.tokens += real

    def _look(self, inputs: StepInputs) -> dict[str, float | None]:
        """The memories before a step, and their share of attention in its first segment, in rows that read on."""
        tokens, _, lengths, fresh = inputs.rounds()[0][0]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        counted = (places < lengths[:, None]) & ~fresh[:, None]
        share = measured_share(self.model, self.reader.memories, lambda: self.reader.look(tokens, lengths), counted)
        with self.ranks.listening():
            found = self.ranks.gather((memory_fill(self.reader.memories), share))
        names = ("memory_fill", "memory_share")
        return {name: _mean(values) for name, values in zip(names, zip(*found, strict=True), strict=True)}

    def check(self) -> Tensor:
        """What `Step` returned (steps, 3) since the last report, on the host.

        Raises NonFiniteLossError if one is infinite or NaN, and such steps are not skipped: then the model is lost.
        """
        if not self._pending:
            return torch.zeros(0, 3, dtype=torch.float32)
        self.ranks.wait(self._reached)
        self._reached = []
        pending = torch.stack(self._pending).cpu()
        wrong = (~pending.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if wrong and not self.settings.skip_nonfinite:
            step = self.step - len(pending) + wrong[0] + 1
            loss, norm, _ = pending[wrong[0]].tolist()
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
        losses, norms, nats = finite.mean(dim=0).tolist()
        skipped = {"skipped": len(pending) - len(finite)} if self.settings.skip_nonfinite else {}
        return {
            "step": self.step,
            "tokens": self.tokens,
            "bits_per_byte": losses,
            "nats_per_token": nats,
            "perplexity": perplexity(nats),
            "gradient_norm": norms,
            "learning_rate": learning_rate(self.settings, self.step - 1),
            **self._looked,
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
            weights, moments = weights_of(self.model), moments_of(self.model, self.optimizer)
        own = {
            **self.reader.state_dict(),
            "loop": {"pending": pending, **{f"random.{name}": state for name, state in random_state.items()}},
        }
        parts = {part_name(part, self.ranks.rank): tensors for part, tensors in own.items()}
        if self.ranks.first:
            parts = {"model": weights, "optimizer": moments, **parts, **tokenizer_part(self.data.tokenizer)}
        values = {
            "settings": self.settings.to_json(),
            "step": self.step,
            "tokens": self.tokens,
            "stream": self.loader.state_dict(),
            "fingerprint": self.data.fingerprint,
            "contents": self.data.contents,
            "reading": self.data.reading,
            "tokenizer": self.data.tokenizer.digest,
            "ranks": self.ranks.size,
        }
        return parts, values

    def wants(self, part: str, values: Mapping[str, Any]) -> bool:
        """Whether this rank restores from a part of a checkpoint with these values."""
        name, _, number = part.partition(".")
        if not (number or "0").isdecimal():
            return False
        rank = int(number or 0)
        if name in ROW_PARTS:
            return owns_some(self.rows, self.settings.batch, self._saved_by(values.get("ranks", 1)), rank)
        return part != TOKENIZER_PART and rank in (0, self.ranks.rank)

    def _saved_by(self, ranks: Any) -> int:
        """How many ranks wrote a checkpoint. Raises ValueError when so many cannot have shared the batch."""
        most = self.settings.batch
        if not allows(int, ranks) or not 1 <= ranks <= most:
            raise ValueError(f"ranks must be in [1, {most}], as many as can share the batch, got {ranks!r}")
        return int(ranks)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes to where the checkpoint was written.

        Whatever number of ranks wrote it; with another number, dropout goes on with other random numbers.

        Raises ValueError when it is of another model or other data, or when no run with these settings wrote it.
        """
        try:
            self._restore(checkpoint)
        except (torch.OutOfMemoryError, LostRankError):
            raise
        except (KeyError, TypeError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
            what = f"another: {type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"checkpoint must be one that a run with its settings wrote, got {what}") from error

    def _restore(self, checkpoint: Checkpoint) -> None:
        require(checkpoint, "settings", "step", "tokens", "stream", "fingerprint", "ranks")
        parts, values = checkpoint.parts, checkpoint.values
        saved_by = self._saved_by(values["ranks"])
        if values["fingerprint"] != self.data.fingerprint:
            raise ValueError(
                f"data must be what the checkpoint was trained on, got other texts or names in {self.settings.data!r}"
            )
        if values.get("tokenizer", BYTES.digest) != self.data.tokenizer.digest:
            raise ValueError(
                f"tokenizer must be the checkpoint's, {values['tokenizer']}, got {self.data.tokenizer.digest}"
            )
        if reading_of(values) != self.data.reading:
            raise ValueError(f"reading must be {reading_of(values)}, as the checkpoint's, got {self.data.reading}")
        gains = gains_memory(values["settings"], self.settings)
        with self.ranks.listening():
            if gains:
                checkpoint = with_memory(checkpoint, self.model, self.settings.segment - 1 + self.settings.xl)
            load_weights(self.model, checkpoint)
            load_moments(self.model, self.optimizer, checkpoint.parts["optimizer"])
        self._fit_memories(checks.integer("step", values["step"], low=0))
        carried = parts_of_rows(parts, self.rows, self.settings.batch, saved_by)
        if gains:  # it begins empty
            carried["memories"] = self.reader.state_dict()["memories"]
        self.reader.load_state_dict(carried)
        self.loader.load_state_dict(values["stream"])
        self.step, self.tokens = (checks.integer(name, values[name], low=0) for name in ("step", "tokens"))
        self._pending = list(_with_nats(parts["loop"]["pending"]).to(self.device, torch.float32))
        if saved_by == self.ranks.size:
            self._restore_random(parts[part_name("loop", self.ranks.rank)])
        else:
            torch.manual_seed(self.settings.seed + self.ranks.rank + self.ranks.size * self.step)

    def _restore_random(self, saved: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(saved["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in saved:
            torch.cuda.set_rng_state(saved["random.cuda"], self.device)


def _mean(values: Sequence[float | None]) -> float | None:
    """Of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _with_nats(pending: Tensor) -> Tensor:
    """Steps that wait for a report (steps, 3); earlier checkpoints hold no nats, of models over bytes (steps, 2)."""
    if pending.shape[-1] == 3:
        return pending.reshape(-1, 3)
    pending = pending.reshape(-1, 2)
    return torch.cat((pending, pending[:, :1] * math.log(2)), dim=1)


def check_shares(settings: Settings, ranks: Ranks) -> None:
    """Refuses settings that so many ranks cannot share."""
    if settings.batch % ranks.size:
        raise ValueError(f"batch must be a multiple of the {ranks.size} ranks that share it, got {settings.batch}")
    if settings.fsdp and ranks.size == 1:
        raise ValueError("fsdp must be off with one process, which has nothing to spread, got True (--no-fsdp)")
