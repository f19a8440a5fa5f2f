"""The loss over a vocabulary of 32,000 with its gradients: a model's last product, in bfloat16 of float32 weights.

P = 16 · 512 positions of width 512, `cpu-` 8 · 512. `memtrans` holds a chunk of the logits, `torch` (F.linear and
F.cross_entropy in float32) all of them; `-compiled` are the same inside one graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import allocations
from common import DEVICE, TOY, bytes_of, compiled, measure, peak_bytes
from torch import Tensor

from memtrans.cross_entropy import linear_cross_entropy

CASE = "32k" if DEVICE == "cuda" else "cpu-32k"
POSITIONS, DIM, VOCABULARY = (16, 8, 50) if TOY else (8192 if DEVICE == "cuda" else 4096, 512, 32_000)
IGNORED, DTYPE, MODE = -1, torch.bfloat16, "forward+backward"
SAME = 2e-2  # of the largest number, between two ways to round


def in_chunks(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, bias, labels, IGNORED, "sum")


def of_all_logits(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, ignore_index=IGNORED, reduction="sum")


IMPLS: dict[str, Callable[..., Tensor]] = {"memtrans": in_chunks, "torch": of_all_logits}


@pytest.mark.parametrize("impl", ["memtrans", "memtrans-compiled", "torch", "torch-compiled"])
def test_cross_entropy(benchmark: Any, impl: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, DIM, device=DEVICE, requires_grad=True)
    weight = (torch.randn(VOCABULARY, DIM, device=DEVICE) / DIM**0.5).requires_grad_()
    bias = torch.zeros(VOCABULARY, device=DEVICE, requires_grad=True)
    labels = torch.randint(VOCABULARY, (POSITIONS,), device=DEVICE)
    labels[: POSITIONS // 16] = IGNORED
    leaves = (hidden, weight, bias)
    function = IMPLS[impl.removesuffix("-compiled")]
    loss = compiled(function) if impl.endswith("-compiled") else function

    def run(loss: Callable[..., Tensor] = loss) -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, DTYPE):
            result = loss(*leaves, labels)
        return result.detach(), *torch.autograd.grad(result / POSITIONS, leaves)

    results = run()
    for ours, plain in zip(results, run(of_all_logits), strict=True):
        torch.testing.assert_close(ours, plain, atol=SAME * float(plain.abs().max()), rtol=0.0)
    sizes = {"input_bytes": bytes_of([*leaves, labels]), "output_bytes": bytes_of(results), "ring_bytes": 0}
    del results, ours, plain
    inputs = sizes["input_bytes"]
    peak = peak_bytes(run, inputs) if DEVICE == "cuda" else allocations(run).peak + inputs
    measure(
        benchmark, run, op="cross_entropy", impl=impl, case=CASE, mode=MODE, dtype=DTYPE,
        flop=3 * 2 * POSITIONS * DIM * VOCABULARY, peak_bytes=peak, load=[round(load, 1) for load in os.getloadavg()],
        **sizes,
    )  # fmt: skip
