"""One optimiser step: forward, loss and backward of its segments, clipping, update; eager, compiled, or replayed.

A step never asks the device for a value. So on a GPU it can be captured as one CUDA graph after a few steps, compiled
or not: it is then launched by one call, whatever the depth of the model.

Shapes: A backward passes a step, S segments a backward pass, B rows, N tokens of a segment.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from memtrans.cuda_graph import Replay
from memtrans.distributed.dtensors import gathered
from memtrans.distributed.gradient_sum import GradientSum, compiled_in_parts
from memtrans.distributed.ranks import ALONE, Ranks
from memtrans.memory.snapshot import MemorySnapshot
from memtrans.training.evaluate import negative_log_likelihood, scores_in_chunks
from memtrans.training.loader import StepInputs
from memtrans.training.optimizer import set_rate
from memtrans.training.reader import Carried, DocumentReader
from memtrans.training.rounded import RoundedWeights
from memtrans.training.settings import Settings


class Step:
    """All that the device does in a step, as a function of the step's inputs and learning rate.

    What rows carry from step to step is the reader's. The inputs and the result of a captured step stay where they are,
    so that the graph can be replayed.

    Args:
        reader: of the model. optimizer: from `make_optimizer`.
        settings: `compile` makes one graph of a segment's forward pass and loss and another of its backward, or of
            several ranks several of each; `capture` makes one of all launches of a step; `skip_nonfinite` leaves the
            model as it is where the loss or the gradient is not finite.
        ranks: each reads its own rows; loss and gradients are sums over all of them.
    """

    def __init__(
        self, reader: DocumentReader, optimizer: torch.optim.Optimizer, settings: Settings, ranks: Ranks = ALONE
    ) -> None:
        self.optimizer, self.settings, self._alone = optimizer, settings, ranks.size == 1
        self._gradients = GradientSum(reader.model.parameters(), ranks)
        self._read_with(reader)
        ranks.before_leaving(lambda: self._graph.release())

    def read_with(self, reader: DocumentReader) -> None:
        """Goes on with another reader of the same model; what was compiled and captured is made anew."""
        self._graph.release()
        self._read_with(reader)

    def _read_with(self, reader: DocumentReader) -> None:
        self.reader = reader
        self._segment_loss = self._loss
        if compiles(self.settings, reader):
            compiled_whole = partial(torch.compile, fullgraph=True)
            self._segment_loss = (compiled_whole if self._alone else compiled_in_parts)(self._loss)
        # several ranks send gradients when they are complete
        rounds = self._alone and reader.dtype != torch.float32 and self.settings.segments == 1
        self._rounded = RoundedWeights(reader.model, reader.dtype) if rounds else None
        self._graph = Replay(self._compute, reader.device, capture=captures(self.settings, reader, self._alone))
        self._inputs: StepInputs | None = None
        self._captured_with: list[MemorySnapshot] = []

    @property
    def captured(self) -> bool:
        """Whether steps replay a CUDA graph by now."""
        return self._graph.captured

    def __call__(self, inputs: StepInputs, rate: float) -> Tensor:
        """Does the step at that learning rate.

        Returns bits per byte, the gradient's norm and nats per token (3,), on the device.
        """
        set_rate(self.optimizer, rate)
        self._place(inputs)
        if self._graph.captured and not self.reader.still_holds(self._captured_with):
            self._graph.release()  # it would go on with storage that is nobody's any more
            self._captured_with = []
        was_captured = self._graph.captured
        self._graph()
        if self._graph.captured and not was_captured:
            self._captured_with = self.reader.snapshots()
        return self._result.clone()

    def _place(self, inputs: StepInputs) -> None:
        """Puts the inputs where `_compute` reads them: always the same place where a graph captures it."""
        if not self._graph.capture:
            self._inputs = inputs
        elif self._inputs is None:
            self._inputs = StepInputs(*(tensor.clone() for tensor in inputs.tensors()))
        else:
            for place, tensor in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
                place.copy_(tensor)

    def _compute(self) -> None:
        """Losses and gradients of every round of segments, then the update; leaves the result in `_result`."""
        assert self._inputs is not None
        carried = self.reader.carried
        total = torch.zeros((), dtype=torch.float32, device=self._inputs.tokens.device)
        rounds = self._inputs.rounds()
        with self._rounded.reading() if self._rounded else nullcontext():
            for number, segments in enumerate(rounds, start=1):
                losses = []
                for segment in segments:
                    loss, carried = self._segment_loss(*segment, carried)
                    losses.append(loss)
                mean = torch.stack(losses).sum() / self._inputs.scored
                total += mean.detach()
                if number == len(rounds):
                    self._gradients.begin(total)
                mean.backward()
                if self._rounded:
                    self._rounded.collect()
        total = self._gradients.finish()
        norm, carried = self._update(total, carried)
        self.reader.carry(carried)
        self._result = torch.stack((total / math.log(2) * self._inputs.per_byte, norm, total))

    def _update(self, total: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """Clips the gradient and moves the weights. Returns the gradient's norm, and what the rows carry on."""
        most = math.inf if self.settings.clip is None else self.settings.clip
        norm = gathered(nn.utils.clip_grad_norm_(self.reader.model.parameters(), most)).detach()
        if self.settings.skip_nonfinite:
            finite = norm.isfinite() & total.isfinite()
            # as a gradient scaler tells a fused optimiser not to move
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            carried = _emptied_unless(finite, carried)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, carried

    def _loss(
        self, tokens: Tensor, labels: Tensor, lengths: Tensor, fresh: Tensor, carried: Carried
    ) -> tuple[Tensor, Carried]:
        """Of one segment (B, N), summed over its scored labels, in nats; and what the rows carry on."""
        if scores_in_chunks(self.reader.model, tokens):
            return self.reader.forward(tokens, lengths, fresh, carried, labels)
        logits, carried = self.reader.forward(tokens, lengths, fresh, carried)
        return negative_log_likelihood(logits, labels), carried


def _emptied_unless(finite: Tensor, carried: Carried) -> Carried:
    """Nothing where the step was not finite: NaN in an XL cache would spread to every segment after it."""
    xl_memories = [torch.where(finite, cache, torch.zeros_like(cache)) for cache in carried.xl_memories]
    return Carried(xl_memories, carried.xl_length * finite)


def compiles(settings: Settings, reader: DocumentReader) -> bool:
    """Whether a run compiles its model: as the settings say, on a GPU by default."""
    return reader.on_gpu and not settings.fsdp if settings.compile is None else settings.compile


def captures(settings: Settings, reader: DocumentReader, alone: bool) -> bool:
    """Whether a run replays its steps: as the settings say; by default on a GPU, of several ranks what is compiled.

    alone: whether there is one rank.
    """
    wanted = settings.capture
    if wanted is None:
        wanted = compiles(settings, reader) or (alone and not settings.fsdp)
    return reader.on_gpu and wanted
