"""The calculation of what more GPUs would do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

ALONE = {"ms": 100.0, "tokens_per_second": 1000.0, "gradient_bytes": 8 * 5e8}
TWO = {"ms": 104.0, "tokens_per_second": 1923.0, "gradient_bytes": 8 * 5e8}
ENTRIES = {
    "ddp-paper-64k-1": ALONE, "ddp-paper-64k-2": TWO,
    "sharded-d64-64k-1": {"ms": 1.0}, "sharded-d64-64k-2": {"ms": 1.2},
    "sharded-paper-64k-1": {"ms": 2.0}, "sharded-paper-64k-2": {"ms": 3.0},
}  # fmt: skip


def test_one_gpu_exchanges_nothing_two_what_was_measured_and_hosts_what_the_network_takes() -> None:
    times = [scaling.step_milliseconds(gpus, ALONE, TWO) for gpus in (1, 2, 8, 16)]
    assert times == pytest.approx([100.0, 104.0, 107.0, 117.0])


def test_two_gpus_stand_beside_one() -> None:
    lines = scaling.measured_table(ENTRIES).splitlines()
    assert lines[2].endswith("| 100.00 | 104.00 | 1.92 × the tokens a second |")
    assert lines[3].endswith("| 1.00 | 1.20 | 1.20 × the time |")


def test_the_tables_have_a_line_for_each_number_of_gpus() -> None:
    lines = scaling.throughput_table(ENTRIES).splitlines()
    assert lines[2:4] == ["| 1 | 1,000 | 100% | 1.00 | 2.00 |", "| 2 | 1,923 | 96% | 1.20 | 3.00 |"]
    assert lines[-1].endswith("| – | – |")
