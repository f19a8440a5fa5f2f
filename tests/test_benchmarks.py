"""The benchmarks run, at toy size, and write down what the tables are made from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from helpers.scripts import BENCHMARKS, benchmark_script
from helpers.separate import Ended, beside_each_other, selected
from helpers.tiny_runs import written_text

LABELS = {"op", "impl", "case", "mode", "dtype", "gpu", "torch", "triton", "commit"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, results: Path) -> Iterator[dict[str, Future[Ended]]]:
    """Of each module the process that it shares with every other one, because PyTorch's start takes its time."""
    variables = {"MEMTRANS_BENCH_TOY": "1", "CUDA_VISIBLE_DEVICES": "", "MEMTRANS_BENCH_RESULTS": str(results)}
    chosen = selected(request)
    shares = {share[0]: share for share in (chosen[::2], chosen[1::2]) if share}
    for ends in beside_each_other(
        list(shares), lambda first: ([str(BENCHMARKS / module) for module in shares[first]], variables)
    ):
        yield {module: ends[first] for first, share in shares.items() for module in share}


@pytest.mark.parametrize("module", sorted(path.name for path in BENCHMARKS.glob("bench_*.py")))
def test_a_benchmark_runs_and_writes_its_entries(module: str, runs: dict[str, Future[Ended]], results: Path) -> None:
    done = runs[module].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    operator = module.removeprefix("bench_").removesuffix(".py")
    entries = json.loads((results / "cpu" / f"{operator}.json").read_text())
    assert entries
    for entry in entries:
        assert set(entry) >= LABELS
        assert entry["ms"] > 0
    assert {entry["impl"] for entry in entries} >= {"memtrans"}


def test_memory_gain_trains_each_size_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "MEMTRANS_BENCH_RESULTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    script = [sys.executable, str(BENCHMARKS / "memory_gain.py"), "--data", written_text(tmp_path)]
    small = ["batch=2", "segment=32", "layers=2", "width=16", "heads=2", "head_width=8", "memory_layers=[1]", "xl=0"]
    sizes = ["--bytes", "800", "--memory", "0", "64", "--eval-bytes", "500", "--final-eval-bytes", "2000"]
    picture = tmp_path / "gain.png"
    command = [*script, *sizes, "--set", *small, 'dtype="float32"']
    subprocess.run(command, env=environment, cwd=BENCHMARKS.parent, check=True)
    memory_gain = benchmark_script("memory_gain")
    monkeypatch.setattr(memory_gain, "RESULTS", tmp_path)
    memory_gain.main(["--plot", str(picture), "--machine", "cpu"])
    off, on = json.loads((tmp_path / "cpu" / "memory_gain.json").read_text())
    assert (off["settings"]["memory"], on["settings"]["memory"]) == (0, 64)
    assert off["bits_per_byte"] == off["bits_per_byte_without_memory"]
    assert on["bits_per_byte"] != on["bits_per_byte_without_memory"]
    assert [point["bytes"] for point in on["curve"]] == sorted({point["bytes"] for point in on["curve"]})
    assert picture.stat().st_size > 0
    rows = benchmark_script("tables").gain_table([off, on]).splitlines()[2:4]
    assert [row.split(" | ")[3:5] for row in rows] == [["–", "0"], ["64", "0"]]
    assert f"{on['bits_per_byte']:.4f}" in rows[1] and f"{on['bits_per_byte_without_memory']:.4f}" in rows[1]
