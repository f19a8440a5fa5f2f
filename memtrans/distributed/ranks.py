"""The processes of one run, as `torchrun` starts them: which rows each owns, what they tell each other, who is lost.

A rank is one process with one device. All of them run the same program on their share of the batch; what they exchange
goes through `torch.distributed`: gloo for what lies in host memory, NCCL for what lies on a GPU. There are two groups:

    quick     gradients, and a word after each step; a rank that is silent for RANK_SECONDS is lost
    patient   whatever may take one rank longer than another: starting, compiling, evaluating, writing checkpoints

A process that ended closes its connections, which the others hear at once, in either group.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

RANK_SECONDS, PATIENT_SECONDS = 60, 1800
Result = TypeVar("Result")


class LaunchError(ValueError):
    """The variables that tell a process of its ranks are not those that `torchrun` sets."""


class LostRankError(RuntimeError):
    """Another rank ended, or did not answer in time: the run cannot go on."""


@dataclass
class Ranks:
    """This process among those of its run; one that was started alone is the only one, and exchanges nothing.

    Attributes:
        rank: its number, from 0. size: how many there are. local_rank: its number on its host.
        quick, patient: process groups of all ranks; None for one that is alone.
        farewells: called before the groups are left; see `before_leaving`.

    >>> Ranks().rows(4)
    range(0, 4)
    >>> Ranks(rank=1, size=2).rows(4)
    range(2, 4)
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    quick: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None
    farewells: list[Callable[[], None]] = field(default_factory=list)

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and draws."""
        return self.rank == 0

    def rows(self, batch: int) -> range:
        """The rows of a batch that this rank owns; shares differ by one row where they cannot be equal."""
        return range(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def before_leaving(self, act: Callable[[], None]) -> None:
        """Has `act` called before the groups are left: NCCL waits until no captured graph exchanges through them."""
        if self.size > 1:
            self.farewells.append(act)

    # ------------------------------------------------------------------------------------------------- exchange

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turns what `torch.distributed` raises when a rank is gone into a LostRankError."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_of_communication(error):
                raise
            raise self._lost(" ".join(str(error).split())) from error

    def _lost(self, reason: str) -> LostRankError:
        """How long is too long differs from group to group, and a memory's group is the user's."""
        return LostRankError(
            f"rank {self.rank} of {self.size} lost another one, which ended, or was silent for too long: {reason}"
        )

    def gather(self, value: Result) -> list[Result]:
        """What each rank gives, small and of Python; the same list on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.listening():
            dist.all_gather_object(values, value, group=self.patient)
        return values

    def together(self, function: Callable[[], Result]) -> Result:
        """Calls a function that exchanges nothing, on every rank; where one fails, all raise the same error."""
        if self.size == 1:
            return function()
        failure: Exception | None = None
        try:
            result = function()
        except Exception as error:
            failure = error
        told = None if failure is None else (_kind(failure), str(failure) or type(failure).__name__)
        for rank, failed in enumerate(self.gather(told)):
            if failed is not None:
                kind, message = failed
                raise kind(f"{message} (on rank {rank})") from failure
        return result

    def agree(self, **values: Any) -> None:
        """Raises ValueError on every rank when one has other values than the first one."""
        given = self.gather(values)
        for rank, others in enumerate(given):
            for name, value in others.items():
                if value != given[0][name]:
                    raise ValueError(
                        f"{name} must be the same on every rank, got {given[0][name]!r} on rank 0 and "
                        f"{value!r} on rank {rank}"
                    )

    def largest(self, number: int) -> int:
        """The largest of the numbers that the ranks give, from 0 on; the same on all of them."""
        return number if self.size == 1 else self._word(number, self.quick)

    def _word(self, number: int, group: dist.ProcessGroup | None) -> int:
        """The largest of the numbers that the ranks give; through the host's memory, whatever the GPUs do."""
        word = torch.tensor([number], device="cpu")
        with self.listening():
            dist.all_reduce(word, dist.ReduceOp.MAX, group=group)
        return int(word)

    def meet(self) -> None:
        """Waits, patiently, until all ranks have come here."""
        if self.size > 1:
            self._word(0, self.patient)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives every rank what the first one holds, in place."""
        if self.size > 1:
            with self.listening():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0, group=self.patient)

    def wait(self, events: Iterable[torch.cuda.Event]) -> None:
        """Waits for the GPU to reach each event; a rank that it waits for in vain is lost.

        Without this the host would sit in a copy from the GPU for good: no time limit applies to a replayed graph.
        """
        for event in events:
            deadline = time.monotonic() + RANK_SECONDS
            while not event.query():
                if time.monotonic() > deadline:
                    raise self._lost("the GPU waits for what the other was to send")
                time.sleep(0.001)


ALONE = Ranks()


def ranks_of(group: dist.ProcessGroup) -> Ranks:
    """The members of a process group. Raises TypeError or ValueError when it is none, or not this process's."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("process_group must be a group that this process is a member of, got another one")
    return Ranks(dist.get_rank(group), dist.get_world_size(group), 0, group, group)


def _kind(error: Exception) -> type[Exception]:
    """A class that takes a message, as the classes of some errors do not."""
    kinds: tuple[type[Exception], ...] = (FileNotFoundError, OSError, ValueError, torch.OutOfMemoryError, MemoryError)
    return next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)


def _is_of_communication(error: RuntimeError) -> bool:
    """gloo's own errors have no class."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "pair closure"))


def launched() -> Ranks:
    """This process as the variables of `torchrun` describe it, without groups yet; ALONE without them.

    Raises LaunchError when they are not whole: WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT belong together.
    """
    size = _number("WORLD_SIZE", "1", low=1)
    if size == 1:
        return ALONE
    rank = _number("RANK", below=size)
    _number("MASTER_PORT", below=2**16)
    if not os.environ.get("MASTER_ADDR"):
        raise LaunchError("MASTER_ADDR must name the host of rank 0, as torchrun sets it, got ''")
    return Ranks(rank, size, _number("LOCAL_RANK", str(rank)))


@contextmanager
def joined(ranks: Ranks | None = None) -> Iterator[Ranks]:
    """Joins the groups of the ranks that `torchrun` started this process with, for as long as the `with` lasts.

    ranks: from `launched`, which is called without it; one that is alone joins nothing.

    Raises LaunchError when the variables that torchrun sets (RANK, WORLD_SIZE, ...) are not whole, LostRankError when
    not all ranks come.
    """
    ranks = launched() if ranks is None else ranks
    if ranks.size == 1:
        yield ranks
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with ranks.listening():
        dist.init_process_group(backend, timeout=timedelta(seconds=PATIENT_SECONDS))
        ranks.patient = dist.group.WORLD
        ranks.quick = dist.new_group(backend=backend, timeout=timedelta(seconds=RANK_SECONDS))
    yield ranks
    for act in ranks.farewells:
        act()
    dist.destroy_process_group()  # after an error the others may be gone, and this would wait for them


def end_process(status: int) -> NoReturn:
    """Ends one of several ranks at once, with this status, whatever its groups still do.

    The interpreter's own end waits for the GPU, which may wait for a rank that is gone; and gloo's threads, which
    outlive groups that FSDP holds and groups that nobody left, now and then abort it, so that a good run seems to fail.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _number(name: str, default: str = "", low: int = 0, below: int | None = None) -> int:
    """A variable that torchrun sets, a number from `low` on and below `below`."""
    value = os.environ.get(name, default)
    if not value.isdecimal() or int(value) < low or (below is not None and int(value) >= below):
        limits = f"at least {low}" if below is None else f"in [{low}, {below})"
        raise LaunchError(f"{name} must be a number {limits}, as torchrun sets it, got {value!r}")
    return int(value)
