"""The benchmarks run, at toy size, and write down what the tables are made from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LABELS = {"op", "impl", "case", "mode", "dtype", "gpu", "torch", "triton", "commit"}


@pytest.mark.parametrize("module", sorted(path.name for path in BENCHMARKS.glob("bench_*.py")))
def test_a_benchmark_runs_and_writes_its_entries(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(BENCHMARKS / module)]
    environment = {
        **os.environ, "MEMTRANS_BENCH_TOY": "1", "MEMTRANS_BENCH_RESULTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    entries = [entry for path in (tmp_path / "cpu").glob("*.json") for entry in json.loads(path.read_text())]
    assert entries
    for entry in entries:
        assert set(entry) >= LABELS
        assert entry["ms"] > 0
    assert {entry["impl"] for entry in entries} >= {"memtrans"}
