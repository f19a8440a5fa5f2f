"""The cross entropy of a linear layer's logits, of which no more than a chunk of positions is ever held.

Logits z = hidden · weightᵀ + bias; the loss of a position is logsumexp(z) - z[label], and its gradient for the logits
softmax(z) - onehot(label). A chunk's turn gives its loss and the gradients of the loss's sum for hidden, weight and
bias, so that neither its logits nor their gradient outlive it; the backward pass scales those three. Matrix products
are in the dtype of the plain loss's, and what chunks add up to is summed in float32.

PyTorch 2.10 has nothing like it. The `linear_cross_entropy` of 2.13 has chunks too, but not inside a compiled graph.

Shapes: P positions (B documents of N tokens), C of them in a chunk, V tokens of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memtrans_kernels.eager import is_transformed

# The plain loss holds a segment's logits several times: in the dtype of products, in float32, their logarithms and
# gradients. Of so many that is 0.75 GB, and a vocabulary of 256 gets there with 262,144 positions; below, chunks save
# little and cost launches.
MOST_LOGITS = 1 << 26
# Large enough for matrix products to fill a GPU and to outweigh a weight's gradient that is added up once a chunk.
CHUNK_LOGITS = 1 << 25


def in_chunks(positions: int, vocabulary: int | None) -> bool:
    """Whether so many positions have more logits than are held at a time; never without a vocabulary.

    >>> in_chunks(16 * 512, 256), in_chunks(16 * 512, 32_000), in_chunks(16 * 512, None)
    (False, True, False)
    """
    return vocabulary is not None and positions * vocabulary > MOST_LOGITS


def fits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_cross_entropy` takes these as `F.linear` would; not inside a transform of torch.func.

    In float16 gradients that are not scaled yet would vanish.
    """
    if is_transformed():
        return False
    dtype = _dtype_of_products(weight)
    if dtype not in (torch.float64, torch.float32, torch.bfloat16):
        return False
    tensors = [hidden, weight] if bias is None else [hidden, weight, bias]
    autocast = torch.is_autocast_enabled(weight.device.type)
    return all(tensor.dtype != torch.float64 if autocast else tensor.dtype == dtype for tensor in tensors)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    reduction: str = "mean",
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias), labels, ...)` in chunks, of what `fits`.

    A gradient that is differentiated again comes by way of all logits.

    Args:
        hidden: (P, dim).
        weight: (V, dim). bias: (V,).
        labels: (P,) int64 in [0, V), or ignore_index, which is not scored.
        reduction: "mean" over the labels that are scored, "sum" of them, or "none", which has no gradient.

    Returns:
        () or (P,); float32 under autocast, else in the dtype of hidden.

    >>> hidden, weight, labels = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 6, -1, 3, 3])
    >>> plain = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-1)
    >>> torch.allclose(linear_cross_entropy(hidden, weight, None, labels, ignore_index=-1), plain)
    True
    """
    autocast = torch.is_autocast_enabled(weight.device.type)
    result = torch.float32 if autocast else hidden.dtype
    dtype = _dtype_of_products(weight)
    hidden, scored = hidden.to(dtype), labels != ignore_index
    if reduction == "none":
        return _losses(hidden, weight, bias, labels, scored).to(result)
    gradients = torch.is_grad_enabled()
    wanted = [gradients and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    compiled = torch.compiler.is_compiling()
    loss, *_ = _linear_cross_entropy(hidden, weight, bias, labels, scored, wanted, compiled)
    return (loss / scored.sum() if reduction == "mean" else loss).to(result)


def _dtype_of_products(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What softmax and sums compute in."""
    return torch.promote_types(dtype, torch.float32)


def _chunks(positions: int, vocabulary: int) -> list[slice]:
    """The positions in parts of nearly one size."""
    most = max(1, CHUNK_LOGITS // vocabulary)
    size = -(-positions // max(1, -(-positions // most)))
    return [slice(start, min(start + size, positions)) for start in range(0, positions, max(1, size))]


@torch.no_grad()
def _losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scored: Tensor) -> Tensor:
    """Of each position (P,); 0 where it is not scored."""
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    turns = [
        _loss(_log_softmax(hidden[part], weight, bias), _target(labels[part], scored[part]), scored[part])
        for part in _chunks(len(hidden), len(weight))
    ]
    return torch.cat(turns) if turns else hidden.new_zeros(0)


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(C, V), in the dtype of sums."""
    return torch.log_softmax(F.linear(hidden, weight, bias), dim=-1, dtype=_wide(hidden.dtype))


def _target(labels: Tensor, scored: Tensor) -> Tensor:
    """Labels (C, 1) that are token ids, also where they are not scored."""
    return labels.masked_fill(~scored, 0)[:, None]


def _loss(log_softmax: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Of each position (C,)."""
    return -log_softmax.gather(1, target)[:, 0].masked_fill(~scored, 0)


def _gradient(log_softmax: Tensor, target: Tensor, scored: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the summed loss for logits (C, V); takes the place of their logarithms where nothing compiles."""
    if torch.compiler.is_compiling():  # one kernel, with the softmax before it
        label = torch.arange(log_softmax.shape[1], device=target.device) == target
        return torch.where(scored[:, None], log_softmax.exp() - label.to(log_softmax.dtype), 0).to(dtype)
    of_label = log_softmax.gather(1, target).exp_().sub_(1)
    return log_softmax.exp_().scatter_(1, target, of_label).to(dtype).masked_fill_(~scored[:, None], 0)


def _turn(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scored: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The summed loss () of a chunk and its gradients: hidden (C, dim), labels and whether they are scored (C,)."""
    target = _target(labels, scored)
    log_softmax = _log_softmax(hidden, weight, bias)  # (C, V)
    loss = _loss(log_softmax, target, scored).sum()
    if not any(wanted):
        return loss, None, None, None
    grad = _gradient(log_softmax, target, scored, hidden.dtype)  # (C, V)
    del log_softmax
    return (
        loss,
        grad @ weight if wanted[0] else None,
        grad.T @ hidden if wanted[1] else None,
        grad.sum(dim=0, dtype=loss.dtype) if wanted[2] else None,
    )


@functools.cache
def _compiled_turn() -> Callable[..., tuple[Tensor | None, ...]]:
    return torch.compile(_turn, fullgraph=True, dynamic=False)


# An operator, because a compiler puts what it may look into in another order, and then holds several chunks.
@torch.library.custom_op("memtrans_model::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scored: Tensor,
    wanted: Sequence[bool],
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The summed loss (), and its gradients for hidden, weight and bias: without elements where they are not wanted."""
    sums = _nothing_yet(hidden, weight, wanted)
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    turn = _compiled_turn() if compiled else _turn
    for part in _chunks(len(hidden), len(weight)):
        _add(sums, part, turn(hidden[part], weight, bias, labels[part], scored[part], wanted))
    return sums


def _add(sums: Sequence[Tensor], part: slice, found: Sequence[Tensor | None]) -> None:
    """Adds what a chunk's turn gave; the gradient for hidden has a place for each chunk."""
    for total, more in zip((sums[0], sums[1][part], *sums[2:]), found, strict=True):
        if more is not None:
            total += more


@_linear_cross_entropy.register_fake
def _nothing_of(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _nothing_yet(hidden, weight, arguments[3])


def _nothing_yet(hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zeros for what `_linear_cross_entropy` returns."""
    wide = _wide(hidden.dtype)
    return (
        hidden.new_zeros((), dtype=wide),
        hidden.new_zeros(hidden.shape if wanted[0] else 0),
        weight.new_zeros(weight.shape if wanted[1] else 0, dtype=wide),
        weight.new_zeros(len(weight) if wanted[2] else 0, dtype=wide),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.wanted, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *inputs, labels, scored = ctx.saved_tensors[:5]
    none = (None, None, None, None)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # it is to be differentiated again
        return *_differentiable(inputs, labels, scored, ctx.wanted, grad), *none
    # rounded as the plain loss's, whichever dtype a weight is given in: steps that round weights once rely on it
    dtype = inputs[0].dtype
    scaled = [
        (unit.to(grad.dtype) * grad).to(dtype).to(given.dtype) if asked else None
        for unit, given, asked in zip(ctx.saved_tensors[5:], inputs, ctx.wanted, strict=True)
    ]
    return *scaled, *none


_linear_cross_entropy.register_autograd(_backward, setup_context=_keep)


def _differentiable(
    inputs: Sequence[Any], labels: Tensor, scored: Tensor, wanted: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients for hidden, weight and bias in a graph of their own, by way of all logits at once."""
    hidden, weight, bias = inputs
    dtype = hidden.dtype
    logits = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype)).to(_wide(dtype))
    loss = F.cross_entropy(logits, labels.masked_fill(~scored, -1), ignore_index=-1, reduction="sum")
    among = [tensor for tensor, asked in zip(inputs, wanted, strict=True) if asked]
    found = iter(torch.autograd.grad(loss, among, grad, create_graph=True))
    return [next(found) if asked else None for asked in wanted]
