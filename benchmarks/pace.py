"""How fast a run went, by its metrics.jsonl: the seconds that its steps took, or how many steps some seconds hold.

    python benchmarks/pace.py runs/book/metrics.jsonl
    python benchmarks/pace.py runs/book/metrics.jsonl --seconds 300

What lies between steps (evaluations, checkpoints) does not count, compiling the first one does. How many steps some
seconds hold is said by the second half of the reports, when all is compiled and the memories are full.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def reports(path: Path) -> list[Line]:
    """The lines that are no evaluations."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "tokens_per_second" in line]


def intervals(lines: list[Line]) -> list[tuple[int, float]]:
    """The steps of each report, and the seconds they took."""
    before = [{"step": 0, "tokens": 0}, *lines]
    return [
        (line["step"] - last["step"], (line["tokens"] - last["tokens"]) / line["tokens_per_second"])
        for last, line in zip(before, lines, strict=False)
    ]


def steps_in(seconds: float, lines: list[Line]) -> int:
    """How many steps so many seconds hold."""
    later = intervals(lines)[len(lines) // 2 :]
    return round(seconds / statistics.median(taken / steps for steps, taken in later))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="a run's metrics.jsonl")
    parser.add_argument("--seconds", type=float, help="print how many steps they hold")
    options = parser.parse_args()
    lines = reports(options.metrics)
    if not lines:
        parser.error(f"{options.metrics} must hold a report of a step")
    if options.seconds is None:
        print(round(sum(taken for _, taken in intervals(lines)), 1))
    else:
        print(steps_in(options.seconds, lines))


if __name__ == "__main__":
    main()
