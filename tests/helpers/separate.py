"""Test modules and benchmarks in processes of their own, where an import or the environment decides what they do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Ended = subprocess.CompletedProcess[str]


def selected(request: pytest.FixtureRequest) -> list[str]:
    """The parameters `module` of the tests that this run has chosen of the requesting module."""
    items = [item for item in request.session.items if item.path == request.path]
    chosen = [getattr(item, "callspec", None) for item in items]
    return [callspec.params["module"] for callspec in chosen if callspec and "module" in callspec.params]


def beside_each_other(
    modules: list[str], run: Callable[[str], tuple[list[str], Mapping[str, str]]]
) -> Iterator[dict[str, Future[Ended]]]:
    """pytest in a process of its own for each module, two at a time: each computes on one core.

    run: gives a module's further arguments of pytest and its environment variables.
    """

    def ended(module: str) -> Ended:
        arguments, variables = run(module)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        environment = {**inherited, "OMP_NUM_THREADS": "1", **variables}  # a worker's benchmarks would measure nothing
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)

    pool = ThreadPoolExecutor(2)
    yield {module: pool.submit(ended, module) for module in modules}
    pool.shutdown(cancel_futures=True)
