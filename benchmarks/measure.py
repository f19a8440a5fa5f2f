"""GPU time by CUDA events, and what every entry of a result file says about its run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

GRAPH_BELOW_MS = 0.5
GRAPH_CALLS = 20


def _events_ms(call: Callable[[], Any], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def _graph(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph


def median_ms(call: Callable[[], Any], rounds: int = 21, capturable: bool = True) -> float:
    """Median time of a call after warm-up; a short one in replays of a graph of GRAPH_CALLS. Wall clock on a CPU."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    _events_ms(call, 5)
    eager = median(_events_ms(call, rounds))
    if eager >= GRAPH_BELOW_MS or not capturable:
        return eager
    return median(_events_ms(_graph(call).replay, rounds)) / GRAPH_CALLS


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def machine() -> dict[str, str | None]:
    """GPU, versions and commit, for `extra_info`."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "triton": _version("triton"), "commit": _commit()}
