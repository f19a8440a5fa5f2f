"""Exact top-K search against its rivals, all in one run.

    pytest benchmarks/bench_knn_search.py --benchmark-json benchmarks/results/<machine>/knn_search.json

`extra_info.gpu_ms` is the figure to quote. Without a GPU a toy shape runs instead, to see that the module works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import CASES, NEIGHBOURS, TOY, Case, search_arguments
from benchmarks.measure import machine, median_ms
from memtrans_kernels import knn_search

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.float32
SHAPES = CASES if DEVICE.type == "cuda" else {TOY.name: TOY}
LARGEST_SCORE_MATRIX = 2**31  # bytes: beyond it the plain rivals do not run

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]
Rival = Callable[[Case, Arguments], Callable[[], Any]]


def _ours(backend: str) -> Rival:
    def prepare(case: Case, arguments: Arguments) -> Callable[[], Any]:
        return lambda: knn_search(*arguments, NEIGHBOURS, backend=backend)

    return prepare


def _by_row(case: Case, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """query (R, queries, D) and the M first slots of the keys, which are all visible but for the order of ages."""
    query, keys, *_ = arguments
    return query.reshape(keys.shape[0], -1, case.dim), keys[:, : case.capacity]


def _torch(case: Case, arguments: Arguments) -> Callable[[], Any]:
    query, keys = _by_row(case, arguments)
    if query.shape[1] * case.capacity * 4 > LARGEST_SCORE_MATRIX:
        pytest.skip("the score matrix of a row does not fit")
    return lambda: [(q @ k.T).topk(min(NEIGHBOURS, case.capacity), -1) for q, k in zip(query, keys, strict=True)]


def _sdpa_dense(case: Case, arguments: Arguments) -> Callable[[], Any]:
    query, keys = (tensor[:, None] for tensor in _by_row(case, arguments))
    return lambda: scaled_dot_product_attention(query, keys, keys)


def _flashlib(case: Case, arguments: Arguments) -> Callable[[], Any]:
    flash_knn = pytest.importorskip("flashlib").flash_knn
    query, keys = (tensor.bfloat16().contiguous() for tensor in _by_row(case, arguments))
    return lambda: flash_knn(query, keys, NEIGHBOURS)


RIVALS: dict[str, Rival] = {
    "memtrans": _ours("auto"),
    "memtrans-native": _ours("native"),
    "memtrans-triton": _ours("triton"),
    "faiss-gpu": _ours("faiss"),
    "flashlib": _flashlib,
    "torch": _torch,
    "sdpa-dense": _sdpa_dense,
}


@pytest.mark.parametrize("implementation", RIVALS)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_knn_search(benchmark: Any, case: Case, implementation: str) -> None:
    arguments = search_arguments(case, DTYPE, DEVICE)
    try:
        call = RIVALS[implementation](case, arguments)
        call()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"{implementation} cannot run {case.name}: {error}")
    gpu_ms = median_ms(call, capturable=implementation != "faiss-gpu")
    benchmark.extra_info.update(
        machine(), op="knn_search", impl=implementation, case=case.name, mode="forward", dtype=str(DTYPE)[6:],
        gpu_ms=gpu_ms, tflop_per_second=case.flop / gpu_ms / 1e9, key_bytes=case.key_bytes(DTYPE),
    )  # fmt: skip
    benchmark.pedantic(call, rounds=1)
