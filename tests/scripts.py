"""Scripts beside the package, as modules; and test modules in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
Ended = subprocess.CompletedProcess[str]


def benchmark_script(name: str) -> ModuleType:
    """benchmarks/<name>.py, loaded under its own name without a place in `sys.modules`."""
    specification = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


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
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)

    pool = ThreadPoolExecutor(2)
    yield {module: pool.submit(ended, module) for module in modules}
    pool.shutdown(cancel_futures=True)
