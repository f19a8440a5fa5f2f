"""A launch that Triton is not asked about again gives the kernel what Triton gave it; no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.scripts import benchmark_script
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from memtrans_kernels.attention_inputs import AttentionInputs  # noqa: E402
from memtrans_kernels.impl.triton import launching  # noqa: E402
from memtrans_kernels.impl.triton.cosine import cosine, cosine_backward  # noqa: E402
from memtrans_kernels.impl.triton.knn_add import knn_add_  # noqa: E402
from memtrans_kernels.impl.triton.launching import launch  # noqa: E402
from memtrans_kernels.impl.triton.memory_attention import memory_attention  # noqa: E402
from memtrans_kernels.impl.triton.memory_attention_backward import memory_attention_backward  # noqa: E402

pytestmark = pytest.mark.cpu
NoDriver = benchmark_script("host_time").NoDriver


@triton.jit
def scaled_kernel(x, out, factor, strides, mask, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at * strides[0], tl.load(x + at * strides[0]) * factor)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in = NoDriver()
    monkeypatch.setattr(driver, "_active", stand_in)
    monkeypatch.setattr(launching, "_COMPILED", {})
    return stand_in


def seen_by_kernel(launch: tuple[Any, ...]) -> list[Any]:
    """All that a launch gives, with what a new tensor has in common with the one before in its place."""
    common = [(given.dtype, given.shape, given.stride()) if isinstance(given, Tensor) else given for given in launch]
    return [given for given in common if type(given).__name__ not in ("LazyDict", "HookChain")]


def scaled(x: Tensor, factor: int = 3, strides: tuple[int, ...] = (1, 2), **options: int) -> None:
    arguments = {"x": x, "out": x, "factor": factor, "strides": strides, "mask": None, "BLOCK": 16}
    launch(scaled_kernel, (2, 5), arguments, **{"num_warps": 4, **options})


def test_a_second_launch_is_the_first_one_again_without_triton(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(32)
    scaled(x)
    monkeypatch.setattr(type(scaled_kernel), "run", None)
    scaled(x)
    first, second = gpu.launches
    assert first[:4] == (2, 5, 1, 7)  # the grid and the stream
    assert seen_by_kernel(first) == seen_by_kernel(second)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(32, dtype=torch.float16)},
        {"x": torch.zeros(33)[1:]},  # begins at no multiple of 16 bytes
        {"factor": 1},  # a constant to Triton
        {"factor": 2**40},
        {"strides": (2, 1)},
        {"num_warps": 8},
    ],
)
def test_other_arguments_ask_triton_which_kernel_is_theirs(gpu: Any, other: dict[str, Any]) -> None:
    ours = {"x": torch.zeros(32), **other}
    for _ in range(2):
        scaled(torch.zeros(32))
        scaled(**ours)
    asked, again = gpu.launches[:2], gpu.launches[2:]
    assert asked[0][4] != asked[1][4]  # Triton compiled two kernels
    assert [seen_by_kernel(one) for one in asked] == [seen_by_kernel(one) for one in again]


def test_few_combinations_of_arguments_are_kept(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST_KEPT", 4)
    for factor in range(16, 176, 16):
        scaled(torch.zeros(32), factor)
    assert len(launching._COMPILED) <= 4


def test_the_kernels_of_training_are_launched_alike_every_time(gpu: Any) -> None:
    heads, length, width, neighbours = 2, 16, 16, 4
    query = torch.zeros(2, length, heads, width, dtype=torch.bfloat16).transpose(1, 2)
    key = torch.zeros(2, 1, 2 * length, width, dtype=torch.bfloat16)
    ring, found = torch.zeros(2, 64, width, dtype=torch.float16), torch.zeros(2, heads, length, neighbours)
    inputs = AttentionInputs(
        query, key, key.clone(), ring, ring.clone(), torch.arange(2), found, found.int(), torch.ones(heads),
        bias_table=torch.zeros(heads, 129), local_length=torch.full((2,), length),
    )  # fmt: skip
    for _ in range(2):
        out, lse = memory_attention(inputs)
        memory_attention_backward(inputs, out, lse, out, lse)
        cosine_backward(*cosine(query, key), query, key)
        knn_add_(ring, ring.clone(), torch.arange(2), torch.arange(2), key, key, at=torch.arange(2))
    once = len(gpu.launches) // 2
    # the bias laid out, and attention; laid out again, gradients of queries and of keys, whose parts are added up,
    # tiles of the bias and sums of their diagonals; cosine twice, the ring
    assert once == 11
    for first, second in zip(gpu.launches[:once], gpu.launches[once:], strict=True):
        assert seen_by_kernel(first) == seen_by_kernel(second)
