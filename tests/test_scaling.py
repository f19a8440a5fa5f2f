"""The calculation of what more GPUs would do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

ALONE = {"ms": 100.0, "tokens_per_second": 1000.0, "gradient_bytes": 8 * 5e8}
TWO = {"exchange_ms": 4.0, "gradient_bytes": 8 * 5e8}


def test_one_gpu_exchanges_nothing_two_what_was_measured_and_hosts_what_the_network_takes() -> None:
    times = [scaling.step_milliseconds(gpus, ALONE, TWO) for gpus in (1, 2, 8, 16)]
    assert times == pytest.approx([100.0, 104.0, 107.0, 117.0])


def test_the_tables_have_a_line_for_each_number_of_gpus() -> None:
    entries = {"ddp-paper-64k-1": ALONE, "ddp-paper-64k-2": TWO, "sharded-d64-64k-1": {"ms": 1.0}}
    lines = scaling.throughput_table({**entries, "sharded-d64-64k-2": {"ms": 1.2}}).splitlines()
    assert lines[2:4] == ["| 1 | 1,000 | 100% | 1.00 |", "| 2 | 1,923 | 96% | 1.20 |"]
    assert lines[-1].endswith("| – |")


def test_an_exchange_that_was_not_measured_takes_what_the_link_is_assumed_to_take() -> None:
    lines = scaling.throughput_table({"ddp-paper-64k-1": ALONE}).splitlines()
    step = 100.0 + 8 * 5e8 / scaling.LINK * 1e3
    assert lines[3] == f"| 2 | {2 * 1000 * 100 / step:,.0f} | {100 / step:.0%} |"


def test_the_readme_has_both_tables() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert scaling.memory_table() in readme
    assert scaling.throughput_table(scaling.measured("h100-x2", "h200-x2")) in readme
