"""Gradients summed over all ranks while the backward pass still computes the next ones.

The parameters are grouped into pieces in the order in which their gradients come, the last layer's first. A piece is
sent as soon as all of its gradients are there and the piece before it was sent, so that every rank sends the pieces in
one order. Each gradient is summed in place. Source: Li et al. 2020, "PyTorch Distributed" (VLDB), section 3.2.

The backward pass of a compiled function is one graph, which gives all gradients at its end; `compiled_in_parts` cuts it
into several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memtrans.cuda_graph import EAGER_CALLS
from memtrans.distributed.dtensors import is_sharded
from memtrans.distributed.ranks import Ranks

# Pieces so large that starting them costs little, parts smaller than pieces: a piece waits for the last part that has a
# gradient of it.
PIECE_BYTES, PART_BYTES = 64 << 20, 32 << 20
# Ranks compile during the first steps, not equally long: nothing leaves before all of them have all gradients. One step
# less than run before a capture, so that pieces have left early once before a graph holds that.
FIRST_SUMS = EAGER_CALLS - 1


class GradientSum:
    """Sums the gradients of one model over all ranks in every step.

    A step calls `begin` before its last backward pass and `finish` after it.

    Args:
        parameters: of the model, float32 on one device. FSDP sums those that it shards, which are left out.
        ranks: the processes that take part. A process that is alone sends nothing.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self.ranks, self._sums = ranks, 0
        own = [parameter for parameter in parameters if not is_sharded(parameter)]
        self._pieces = list(in_pieces(own[::-1], PIECE_BYTES)) or [[]]
        self._missing: list[int] = []  # gradients that each piece still waits for; empty while none may leave early
        self._under_way: list[dist.Work] = []
        self._left = 0  # pieces that need nothing more before `finish`
        if ranks.size > 1:
            for place, piece in enumerate(self._pieces):
                for parameter in piece:
                    parameter.register_post_accumulate_grad_hook(partial(self._arrived, place))

    def begin(self, total: Tensor) -> None:
        """Prepares for the step's last backward pass.

        total: a float32 scalar, such as the loss, to sum with the gradients.
        """
        self._total, self._under_way, self._left = total.clone(), [], 0
        early = self.ranks.size > 1 and self._sums >= FIRST_SUMS
        self._missing = [len(piece) for piece in self._pieces] if early else []

    def finish(self) -> Tensor:
        """Waits until each gradient is its sum over all ranks, bit for bit the same; returns the sum of the totals."""
        if self.ranks.size > 1:
            self._missing = []
            with self.ranks.listening():
                if self._sums < FIRST_SUMS:
                    self._sums += 1
                    self.ranks.meet()
                while self._left < len(self._pieces):
                    self._send()
                for work in self._under_way:
                    work.wait()
        return self._total

    def _arrived(self, place: int, _: Tensor) -> None:
        """Notes that a gradient of a piece is complete, and sends the pieces that can go."""
        if self._missing:
            self._missing[place] -= 1
            while self._left < len(self._pieces) and self._missing[self._left] == 0:
                self._send()

    def _send(self) -> None:
        """Starts the sum of the next piece. On a GPU the host does not wait, and a CUDA graph may capture it."""
        numbers = [parameter.grad for parameter in self._pieces[self._left] if parameter.grad is not None]
        self._left += 1
        if self._left == len(self._pieces):
            numbers.append(self._total)
        if numbers:
            assert self.ranks.quick is not None
            self._under_way.append(self.ranks.quick.allreduce_coalesced(numbers, dist.AllreduceCoalescedOptions()))


def in_pieces(parameters: Sequence[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Parameters in their order, as few at a time as have `size` bytes; the last may have less.

    >>> weights = [nn.Parameter(torch.zeros(length)) for length in (3, 1, 9, 1)]
    >>> [len(piece) for piece in in_pieces(weights, size=16)]
    [2, 1, 1]
    """
    piece: list[nn.Parameter] = []
    for parameter in parameters:
        piece.append(parameter)
        if sum(other.nbytes for other in piece) >= size:
            yield piece
            piece = []
    if piece:
        yield piece


def compiled_in_parts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function without graph breaks, in parts of PART_BYTES of parameters, each with a backward graph."""
    from torch._dynamo.backends.distributed import DDPOptimizer  # what PyTorch compiles a DDP module with

    parts = DDPOptimizer(PART_BYTES, torch._dynamo.lookup_backend("inductor"), first_bucket_cap=PART_BYTES)
    return torch.compile(function, fullgraph=True, backend=parts.compile_fn)
