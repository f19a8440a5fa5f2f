"""The Triton kernels pass their operators' tests in Triton's interpreter, where there is no GPU.

A process of their own: Triton decides at import whether it interprets. It takes minutes, so that everyone's run has one
of 24 cases of each test, and `make test-slow` all. Programs that are interpreted one after the other give the same
bits twice whatever they do; that is left to `make test-slow` and to GPUs.
"""

from __future__ import annotations

import re
from collections import Counter
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
    "test_whole_attention.py",
    "test_knn_add.py",
    "test_cosine.py",
    "test_gather_logits.py",
    "test_gather_pairs.py",
]

DRAWN = "test_memory_attention_drawn.py"  # its examples are not cases: a minute and a half
QUICK = [module for module in MODULES if module != DRAWN]
TWICE = "two_passes_give_the_same_bits or the_same_inputs_give_the_same_bits"
EVERYONES = "everyone's"  # all of them in one process, which starts once


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Ended]]]:
    def run(name: str) -> tuple[list[str], dict[str, str]]:
        everyones = name == EVERYONES
        modules, chosen = (QUICK, f"triton and not ({TWICE})") if everyones else ([name], "triton")
        arguments = ["-k", chosen, "-rp", *(str(TESTS / module) for module in modules)]
        return arguments, {"TRITON_INTERPRET": "1", "MEMTRANS_TEST_ONE_OF": "24" if everyones else "1"}

    yield from beside_each_other(selected(request), run)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", [EVERYONES, *(pytest.param(module, marks=pytest.mark.slow) for module in MODULES)])
def test_interpreted(module: str, runs: dict[str, Future[Ended]]) -> None:
    result = runs[module].result()
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = Counter(re.findall(r"^PASSED \S*?(\w+\.py)::", result.stdout, re.MULTILINE))
    least = dict.fromkeys(QUICK, 1) if module == EVERYONES else {module: 3}
    assert all(passed[name] >= count for name, count in least.items()), f"the triton backend was not live: {passed}"
