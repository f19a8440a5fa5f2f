"""The Triton kernels pass their operators' tests in Triton's interpreter, where there is no GPU.

A process of their own: Triton decides at import whether it interprets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from helpers.separate import Ended, beside_each_other, selected

TESTS = Path(__file__).parent
MODULES = [  # those that take longest first
    "test_attention_arguments.py",
    "test_memory_attention_backward.py",
    "test_memory_attention_drawn.py",
    "test_knn_search.py",
    "test_knn_merge.py",
    "test_memory_attention.py",
    "test_knn_add.py",
    "test_cosine.py",
    "test_gather_logits.py",
    "test_gather_pairs.py",
]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Ended]]]:
    yield from beside_each_other(
        selected(request), lambda module: (["-k", "triton", str(TESTS / module)], {"TRITON_INTERPRET": "1"})
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", MODULES)
def test_interpreted(module: str, runs: dict[str, Future[Ended]]) -> None:
    result = runs[module].result()
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 3, "the triton backend was not live"
