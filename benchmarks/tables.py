"""Writes the README's tables from the result files: `python benchmarks/tables.py` after new results.

A table stands between `<!-- table: MACHINE OP -->` and `<!-- end of table -->`. Each cell is the median in
milliseconds; behind it, in brackets, how many times as long as `memtrans` takes in the same case and mode.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
OURS = "memtrans"


def milliseconds(value: float) -> str:
    """Three significant digits, without an exponent.

    >>> [milliseconds(value) for value in (0.00712, 1.3541, 43.21, 512.3)]
    ['0.00712', '1.35', '43.2', '512']
    """
    return f"{value:#.3g}".rstrip(".") if value >= 0.001 else f"{value:.6f}"


def cell(entry: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """An entry's time, and its ratio to ours."""
    if entry is None:
        return "–"
    if ours is None or entry is ours:
        return milliseconds(entry["ms"])
    return f"{milliseconds(entry['ms'])} ({entry['ms'] / ours['ms']:.1f}×)"


def table(entries: list[dict[str, Any]]) -> str:
    """One row for each case, mode and dtype; one column for each implementation, ours first."""
    impls = sorted({entry["impl"] for entry in entries}, key=lambda impl: (impl != OURS, impl))
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in entries:
        rows.setdefault((entry["case"], entry["mode"]), {})[entry["impl"]] = entry
    lines = [f"| case | mode | {' | '.join(impls)} |", f"| --- | --- |{' --- |' * len(impls)}"]
    for (case, mode), found in rows.items():
        cells = [cell(found.get(impl), found.get(OURS)) for impl in impls]
        lines.append(f"| {case} | {mode} | {' | '.join(cells)} |")
    first = entries[0]
    lines.append("")
    where = first["gpu"].replace("none, ", "a CPU, ")
    lines.append(f"Milliseconds on {where}, torch {first['torch']}, triton {first['triton']}.")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """The README with every table made anew."""

    def fill(place: re.Match[str]) -> str:
        entries = json.loads((RESULTS / place[2] / f"{place[3]}.json").read_text())
        return f"{place[1]}{table(entries)}{place[4]}"

    return PLACE.sub(fill, text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
