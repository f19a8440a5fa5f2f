"""Writes the README's tables from the result files: `python benchmarks/tables.py` after new results.

A table stands between `<!-- table: MACHINE OP -->` and `<!-- end of table -->`. Each cell is the median in
milliseconds; behind it, in brackets, how many times as long as `memtrans` takes in the same case and mode. With
`<!-- table: MACHINE OP peak -->` it is the most memory that was allocated, that of the ring aside, in megabytes; in
brackets, how many times what inputs and outputs take.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (\S+) (\S+)( peak)? -->\n).*?(<!-- end of table -->)", re.DOTALL)
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


def peak_cell(entry: dict[str, Any] | None) -> str:
    """An entry's peak, and its ratio to inputs and outputs; the ring counts in neither."""
    if entry is None:
        return "–"
    peak, least = entry["peak_bytes"] - entry["ring_bytes"], entry["input_bytes"] + entry["output_bytes"]
    return f"{peak / 1e6:.0f} ({peak / (least - entry['ring_bytes']):.2f}×)"


def table(entries: list[dict[str, Any]], peak: bool = False) -> str:
    """One row for each case, mode and dtype; one column for each implementation, ours first."""
    impls = sorted({entry["impl"] for entry in entries}, key=lambda impl: (impl != OURS, impl))
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in entries:
        rows.setdefault((entry["case"], entry["mode"]), {})[entry["impl"]] = entry
    lines = [f"| case | mode | {' | '.join(impls)} |", f"| --- | --- |{' --- |' * len(impls)}"]
    for (case, mode), found in rows.items():
        cells = [peak_cell(found.get(impl)) if peak else cell(found.get(impl), found.get(OURS)) for impl in impls]
        lines.append(f"| {case} | {mode} | {' | '.join(cells)} |")
    first = entries[0]
    lines.append("")
    where = first["gpu"].replace("none, ", "a CPU, ")
    lines.append(
        f"{'Megabytes' if peak else 'Milliseconds'} on {where}, torch {first['torch']}, triton {first['triton']}."
    )
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """The README with every table made anew."""

    def fill(place: re.Match[str]) -> str:
        entries = json.loads((RESULTS / place[2] / f"{place[3]}.json").read_text())
        return f"{place[1]}{table(entries, peak=bool(place[4]))}{place[5]}"

    return PLACE.sub(fill, text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
