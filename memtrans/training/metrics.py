"""The record of a run: a JSON object a line, in the order of its steps, cut back to the checkpoint it resumes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memtrans.annotations import allows
from memtrans.files import parse_json, read_file
from memtrans.storage import write_atomically
from memtrans.training.plot import ACCURACIES, CURVES

MOST = 2**63  # of a number that can be drawn
MOST_SHOWN = 200  # bytes of a line that an error shows
EVALUATED = "eval_bits_per_byte"  # the field that tells the line of an evaluation


class Metrics:
    """Appends to a file; each line is in the file when `append` returns.

    path: of the file. kept: False makes `append` and `truncate` do nothing, on ranks whose run another one records.
    """

    def __init__(self, path: str | Path, kept: bool = True) -> None:
        self.path, self.kept = Path(path), kept

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line."""
        if not self.kept:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; a kill may have left a part of one at the end.

        Raises ValueError when another line is no report of a step: then the file is not a run's.
        """
        if not self.path.exists():
            return []
        *whole, _ = read_file("metrics", self.path).split(b"\n")
        return [self._report(number, line) for number, line in enumerate(whole, start=1)]

    def _report(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            report = parse_json(line)
        except ValueError:
            report = None
        if not isinstance(report, dict) or not allows(int, report.get("step")):
            raise ValueError(
                f"{self.path} must hold a JSON object with a step in each line, got {line[:MOST_SHOWN]!r} in {number}"
            )
        for name in ("step", *CURVES, *ACCURACIES):
            if name in report and (not allows(float, report[name]) or abs(report[name]) >= MOST):
                raise ValueError(f"{self.path} must hold a number as {name}, got {report[name]!r} in {number}")
        return report

    def truncate(self, step: int, evaluates: bool) -> None:
        """Keeps what was known when the checkpoint of `step` was written.

        evaluates: whether the run that goes on evaluates at that step, in the place of the evaluation that is there.
        """
        if not self.kept:
            return
        known = [line for line in self.read() if line["step"] <= step]
        kept = [line for line in known if line["step"] < step or not (evaluates and EVALUATED in line)]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
