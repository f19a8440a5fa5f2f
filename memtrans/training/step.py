"""One optimiser step: forward, loss and backward of its segments, clipping, update; eager, compiled, or replayed.

A step never asks the device for a value. On a GPU it is captured as one CUDA graph after a few eager steps: the model
is launched by one call, whatever its depth.

Shapes: A backward passes a step, S segments a backward pass, B rows, N tokens of a segment.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from memtrans.cuda_graph import Replay
from memtrans.distributed.dtensors import gathered, is_spread
from memtrans.distributed.gradient_sum import GradientSum, compiled_in_parts
from memtrans.distributed.ranks import ALONE, Ranks
from memtrans.training.adafactor import Adafactor, initial_state
from memtrans.training.evaluate import negative_log_likelihood
from memtrans.training.loader import StepInputs
from memtrans.training.reader import Carried, DocumentReader
from memtrans.training.settings import Settings


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimiser of a run, with weight decay on matrices of linear layers alone.

    Both kinds can be captured, read the learning rate from the device on a GPU, and leave a step out where their
    attribute `found_inf` is 1.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    on_gpu = parameters[0].is_cuda and not is_spread(parameters[0])  # spread parameters are never captured
    rate = torch.tensor(settings.learning_rate, device=parameters[0].device) if on_gpu else settings.learning_rate
    if settings.optimizer == "adafactor":
        return Adafactor(groups, lr=rate)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=on_gpu)


def state_shapes(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, tuple[int, ...]]:
    """What an optimiser of `make_optimizer` keeps for a weight, by name."""
    if isinstance(optimizer, Adafactor):
        return {name: tuple(tensor.shape) for name, tensor in initial_state(weight).items()}
    return {"step": (), "exp_avg": tuple(weight.shape), "exp_avg_sq": tuple(weight.shape)}


class Step:
    """A step as a function of its inputs; what rows carry from step to step is the reader's.

    Args:
        reader: of the model. optimizer: from `make_optimizer`.
        settings: `compile` makes one graph of a segment's forward pass and loss and another of its backward, or of
            several ranks several of each; `skip_nonfinite` leaves the model as it is where the loss or the gradient is
            not finite.
        ranks: each reads its own rows; loss and gradients are sums over all of them.
    """

    def __init__(
        self, reader: DocumentReader, optimizer: torch.optim.Optimizer, settings: Settings, ranks: Ranks = ALONE
    ) -> None:
        self.reader, self.optimizer, self.settings, self.ranks = reader, optimizer, settings, ranks
        self._gradients = GradientSum(reader.model.parameters(), ranks)
        self._segment_loss = self._loss
        if compiles(settings, reader):
            alone = ranks.size == 1
            self._segment_loss = torch.compile(self._loss, fullgraph=True) if alone else compiled_in_parts(self._loss)

    def run(self, inputs: StepInputs, rate: float) -> Tensor:
        """Does the step at that learning rate. Returns bits per byte and the gradient's norm (2,), on the device."""
        self.set_rate(rate)
        return self.compute(inputs)

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate, in place where it lives on the device."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def compute(self, inputs: StepInputs) -> Tensor:
        """All of the step that runs on the device."""
        carried = self.reader.carried
        total = torch.zeros((), device=inputs.tokens.device)
        rounds = inputs.rounds()
        for number, segments in enumerate(rounds, start=1):
            losses = []
            for segment in segments:
                loss, carried = self._segment_loss(*segment, carried)
                losses.append(loss)
            mean = torch.stack(losses).sum() / inputs.scored
            total += mean.detach()
            if number == len(rounds):
                self._gradients.begin(total)
            mean.backward()
        total = self._gradients.finish()
        most = math.inf if self.settings.clip is None else self.settings.clip
        norm = gathered(nn.utils.clip_grad_norm_(self.reader.model.parameters(), most)).detach()
        finite = norm.isfinite() & total.isfinite()
        if self.settings.skip_nonfinite:
            # as a gradient scaler tells a fused optimiser not to move
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            carried = _emptied_unless(finite, carried)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.reader.carry(carried)
        return torch.stack((total / math.log(2), norm))

    def _loss(
        self, tokens: Tensor, labels: Tensor, lengths: Tensor, fresh: Tensor, carried: Carried
    ) -> tuple[Tensor, Carried]:
        """Of one segment (B, N), summed over its scored labels, in nats; and what the rows carry on."""
        logits, carried = self.reader.forward(tokens, lengths, fresh, carried)
        return negative_log_likelihood(logits, labels), carried


def _emptied_unless(finite: Tensor, carried: Carried) -> Carried:
    """Nothing where the step was not finite: NaN in an XL cache would spread to every segment after it."""
    xl_memories = [torch.where(finite, cache, torch.zeros_like(cache)) for cache in carried.xl_memories]
    return Carried(xl_memories, carried.xl_length * finite)


class ReplayedStep:
    """A step whose inputs and result stay where they are, so that a captured graph of it can be replayed."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.replay = Replay(self._compute, step.reader.device)
        step.ranks.before_leaving(self.replay.release)
        self._inputs: StepInputs | None = None

    def run(self, inputs: StepInputs, rate: float) -> Tensor:
        """See `Step.run`."""
        self.step.set_rate(rate)
        if self._inputs is None:
            self._inputs = StepInputs(*(tensor.clone() for tensor in inputs.tensors()))
        else:
            for place, tensor in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
                place.copy_(tensor)
        self.replay()
        return self._result.clone()

    def _compute(self) -> None:
        assert self._inputs is not None
        self._result = self.step.compute(self._inputs)


def compiles(settings: Settings, reader: DocumentReader) -> bool:
    """Whether a run compiles its model: as the settings say, on a GPU by default."""
    return reader.on_gpu and not settings.fsdp if settings.compile is None else settings.compile


def make_step(
    reader: DocumentReader, optimizer: torch.optim.Optimizer, settings: Settings, ranks: Ranks = ALONE
) -> Step | ReplayedStep:
    """The step of a run: replayed on a GPU if it is compiled."""
    step = Step(reader, optimizer, settings, ranks)
    return ReplayedStep(step) if reader.on_gpu and compiles(settings, reader) else step
