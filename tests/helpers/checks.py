"""Every tolerance of the test suite, and the comparisons that use them."""

from __future__ import annotations

import torch
from torch import Tensor

PARITY = 1e-5  # against upstream in float32: logits, loss and gradients, relative to the largest of each tensor
SAME_GRAPH = 2e-5  # compiled against eager, float32
GAINED = 1e-6  # a model whose plain layers gained a memory that is empty, float32
SAME_FORMULA = 1e-11  # one formula computed in two ways, float64
SAME_SUMS = 1e-5  # losses of several processes against one, float32: the same numbers added in another order
GPU_MODEL = 1e-3  # losses and gradients on a GPU against the CPU, float32: sums in another order, near-ties swap

# Attention and its gradients against float64. PyTorch's own arithmetic, rounded to the dtype at its end alone, loses
# half of this: 1e-6, 2e-3 and 1e-2, the most in the gradient of scale, which hangs on the rounding of `out`.
ATTENTION = {torch.float32: 2e-6, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
# The same over drawn shapes, next to what plain PyTorch loses on each. Of 1,000 drawn, the worst it lost was 8.4e-6,
# 7.4e-3 and 5.9e-2; where it rounds `out` both lose alike, in float32 each its own.
DRAWN_ATTENTION = {**ATTENTION, torch.float32: 1.7e-5}
LSE = 1e-6  # in float32 whatever the inputs

# Bytes a thread that kernels of the CUDA module store to the stack for want of registers, by a part of their names.
MOST_SPILLED = {"knn_scan": 284, "knn_redo": 516}

PREDICTION = 0.25  # a step's predicted time against a measured one, which moves with each faster kernel

# Two runs are the same curve when their losses agree so closely over the first steps, and their final losses, means of
# the last steps, within the spread of seeds: which neighbours are nearest is not continuous.
SAME_CURVE, FIRST_STEPS, LAST_STEPS = 1e-3, 20, 20


def error_of(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number (at least 1)."""
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "tensor") -> None:
    """The largest difference, relative to the largest expected number (at least 1), stays below `tolerance`."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    assert actual.isfinite().all(), f"{name} is not finite"
    error = error_of(actual, expected)
    assert error <= tolerance, f"{name}: off by {error:.3g}, allowed {tolerance:.3g}"


def assert_as_close_as(plain: Tensor, actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    """Within twice what plain PyTorch loses in `dtype` on the same inputs, or what it usually loses: a gradient is a
    sum that may cancel down to the rounding of its terms, or of `out`, which every implementation must round."""
    assert_close(actual, expected, max(DRAWN_ATTENTION[dtype], 2 * error_of(plain, expected)), name)


def assert_same_curve(losses: Tensor, plain: Tensor) -> None:
    """losses (steps,) follow the first of the curves of several seeds, plain (seeds, steps)."""
    off = float((losses - plain[0])[:FIRST_STEPS].abs().max())
    assert off <= SAME_CURVE, f"the first {FIRST_STEPS} losses are off by {off:.3g}, allowed {SAME_CURVE:.3g}"
    final, finals = losses[-LAST_STEPS:].mean(), plain[:, -LAST_STEPS:].mean(dim=1)
    off, spread = float((final - finals[0]).abs()), float(finals.max() - finals.min())
    assert off <= spread, f"the final loss is off by {off:.3g}, the spread of seeds is {spread:.3g}"


def score_error_bound(query: Tensor, keys: Tensor) -> Tensor:
    """What one float32 accumulation of <query, key> may lose: (..., Q, M) for query (..., Q, D), keys (..., M, D)."""
    width = query.shape[-1]
    magnitude = query.double().abs() @ keys.double().abs().transpose(-1, -2)
    return (width + 2) * torch.finfo(torch.float32).eps * magnitude + torch.finfo(torch.float32).tiny


def assert_nearest(query: Tensor, keys: Tensor, order: Tensor, scores: Tensor, k: int) -> None:
    """Tie-proof: what was returned for query (Q, D) among finite keys (M, D), old to new, is a correct K nearest.

    order (Q, K): positions in `keys`, -1 where there is none; scores (Q, K).
    """
    exact = query.double() @ keys.double().T
    bound = score_error_bound(query, keys)
    found = order >= 0
    expected = min(k, keys.shape[0])
    assert (found.sum(-1) == expected).all()
    assert found[:, :expected].all()
    assert (scores[~found] == -torch.inf).all()
    if expected == 0:
        return
    order, scores = order[:, :expected].long(), scores[:, :expected].double()
    assert all(len(set(row)) == expected for row in order.tolist()), "a neighbour was returned twice"
    got, allowed = exact.gather(1, order), bound.gather(1, order)
    kth = exact.topk(expected, dim=-1).values[:, -1:]
    assert (got >= kth - 2 * bound.amax(-1, keepdim=True)).all(), "a nearer key was missed"
    assert ((scores - got).abs() <= allowed).all(), "a score is not its key's"
    assert (scores.diff(dim=-1) <= 0).all(), "not best first"
    equal = (keys[order[:, :-1]] == keys[order[:, 1:]]).all(dim=-1)  # (Q, K - 1), neighbours in rank
    assert (~equal | (scores.diff(dim=-1) == 0)).all(), "equal keys have different scores"
    assert (~equal | (order.diff(dim=-1) > 0)).all(), "equal keys are not older first"


def assert_older_first(keys: Tensor, order: Tensor) -> None:
    """Of keys (M, D), old to new, that are equal bit for bit, order (Q, K) holds the oldest, and those in order."""
    equals: dict[bytes, list[int]] = {}
    bits = [row.tobytes() for row in keys.contiguous().view(torch.uint8).cpu().numpy()]
    for position, key in enumerate(bits):
        equals.setdefault(key, []).append(position)
    for query, positions in enumerate(order.tolist()):
        found: dict[bytes, list[int]] = {}
        for position in positions:
            if position >= 0:
                found.setdefault(bits[position], []).append(position)
        for key, got in found.items():
            assert got == equals[key][: len(got)], f"query {query}: of the equal keys {equals[key]} it got {got}"
