"""Attention to the local context alone, as plain layers have it: causal, one key head, with a bias by distance.

`-l1024` has 512 cached keys before the segment's own 512. `cpu-` is of two documents and one head. The rivals:

- `flex`: FlexAttention, its bias looked up by distance.
- `sdpa`: PyTorch's attention without any bias, which no layer of the model could use: what the bias costs.

Each entry has `flop`, of the products that causality leaves: two forward, five more with gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bench_memory_attention import BACKWARD, DISTANCES, DTYPE, FORWARD, SAME, Rival, flex_options, has_gradients, step
from common import DEVICE, TOY, bytes_of, compiled, measure, peak_bytes
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention

from memtrans_kernels import local_attention

SIZES = {"d64-l512": (64, 512), "d64-l1024": (64, 1024), "d128-l512": (128, 512)}  # D and L, of N = 512 queries
CASES = tuple(SIZES) if DEVICE == "cuda" or TOY else tuple(f"cpu-{name}" for name in SIZES)
PRODUCTS = {FORWARD: 2, BACKWARD: 7}


class Problem(NamedTuple):
    query: Tensor  # (B, H, N, D)
    key: Tensor  # (B, 1, L, D)
    value: Tensor  # (B, 1, L, D)
    bias: Tensor  # (H, distances)

    @property
    def factor(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.query.shape[-1] ** -0.5

    @property
    def flop(self) -> int:
        """Of one product over all pairs of a query and a key that it sees."""
        batch, heads, length, width = self.query.shape
        pairs = length * (self.key.shape[2] - length) + length * (length + 1) // 2
        return 2 * batch * heads * pairs * width


def problem(name: str) -> Problem:
    """Random queries, keys and values."""
    width, local = SIZES[name.removeprefix("cpu-")]
    batch, heads, length = (2, 1, 512) if name.startswith("cpu-") else (16, 8, 512)
    if TOY:
        batch, length, local = 2, 8, local // 64

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(DTYPE)

    query, key, value = random(batch, heads, length, width), *(random(batch, 1, local, width) for _ in range(2))
    return Problem(query, key, value, torch.randn(heads, DISTANCES, device=DEVICE))


def ours(given: Problem) -> Rival:
    scale = torch.full(given.bias.shape[:1], given.factor, device=DEVICE)  # plain layers do not learn it
    return Rival(lambda: local_attention(*given[:3], scale, given.bias)[0], list(given), [scale], [])


def without_bias(given: Problem) -> Problem:
    return given._replace(bias=torch.zeros_like(given.bias))


def flex(given: Problem) -> Rival:
    options = flex_options(given.query.shape[2], given.key.shape[2], given.bias)
    return Rival(compiled(lambda: flex_attention(*given[:3], scale=given.factor, **options)), list(given), [], [])


def sdpa(given: Problem) -> Rival:
    causal = causal_lower_right(given.query.shape[2], given.key.shape[2])
    attend = lambda: F.scaled_dot_product_attention(*given[:3], causal, enable_gqa=True)  # noqa: E731
    return Rival(attend, list(given[:3]), [], [])


RIVALS: dict[str, Callable[[Problem], Rival]] = {"memtrans": ours, "flex": flex, "sdpa": sdpa}
MEASURED = [(name, impl, FORWARD) for name in CASES for impl in RIVALS]
MEASURED += [(name, impl, BACKWARD) for name in CASES for impl in RIVALS if has_gradients(name, impl)]


def assert_same_as_ours(given: Problem, grad_out: Tensor, mode: str, actual: list[Tensor]) -> None:
    """Out, and the gradients of query, key, value and the bias where there is one."""
    expected = step(ours(given), grad_out, mode)()
    for mine, theirs in zip(expected, actual, strict=False):
        largest = max(1.0, float(mine.abs().max()))
        torch.testing.assert_close(theirs, mine, atol=SAME[DTYPE] * largest, rtol=0.0, check_dtype=False)


@pytest.mark.parametrize(("name", "impl", "mode"), MEASURED)
def test_local_attention(benchmark: Any, name: str, impl: str, mode: str) -> None:
    torch.manual_seed(0)
    given = problem(name)
    rival, grad_out = RIVALS[impl](given), torch.randn_like(given.query)
    run = step(rival, grad_out, mode)
    results = run()
    output_bytes = bytes_of(results)
    assert_same_as_ours(without_bias(given) if impl == "sdpa" else given, grad_out, mode, results)
    del results
    inputs = [*rival.leaves, *rival.others, *([grad_out] if mode == BACKWARD else [])]
    measure(
        benchmark, run, op="local_attention", impl=impl, case=name, mode=mode, dtype=DTYPE,
        flop=PRODUCTS[mode] * given.flop, input_bytes=bytes_of(inputs), output_bytes=output_bytes,
        ring_bytes=0, peak_bytes=peak_bytes(run, bytes_of(inputs)),
    )  # fmt: skip
