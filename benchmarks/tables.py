"""Writes the README's tables from the result files: `python benchmarks/tables.py` after new results.

A table stands between `<!-- table: MACHINE OP -->` and `<!-- end of table -->`. Each cell is the median in
milliseconds; behind it, in brackets, how many times as long as `memtrans` takes in the same case and mode. Where the
machine's ceilings were measured (bench_knn_search.py), `of the ceiling` is how near `memtrans` comes to the rate of a
large matrix product or of a copy, whichever it is nearer to. With
`<!-- table: MACHINE OP peak -->` it is the most memory that was allocated, that of the ring aside, in megabytes; in
brackets, how many times what inputs and outputs take. `<!-- table: MACHINE train tokens -->` has tokens a second,
`<!-- table: MACHINE memory_gain gain -->` held-out bits per byte.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (\S+) (\S+)( peak| tokens| gain)? -->\n).*?(<!-- end of table -->)", re.DOTALL)
OURS = "memtrans"


def milliseconds(value: float) -> str:
    """Three significant digits or all before the point, without an exponent.

    >>> [milliseconds(value) for value in (0.00712, 1.3541, 43.21, 512.3, 999.7)]
    ['0.00712', '1.35', '43.2', '512', '1,000']
    """
    if value >= 999.5:
        return f"{value:,.0f}"
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


def share_cell(entry: dict[str, Any] | None, ceilings: dict[str, float]) -> str:
    """How near an entry comes to the nearer one of the machine's ceilings."""
    shares = [entry[rate] / most for rate, most in ceilings.items() if rate in entry] if entry else []
    return f"{max(shares):.0%}" if shares else "–"


def ceilings_of(machine: str) -> dict[str, float]:
    """The best rates measured on a machine: `flop_per_second` and `bytes_per_second`."""
    path = RESULTS / machine / "ceilings.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    return {rate: entry[rate] for entry in entries for rate in entry if rate.endswith("_per_second")}


def tokens_table(entries: list[dict[str, Any]]) -> str:
    """Tokens a second of each case; ours also relative to the same shape without a memory."""
    found = {(entry["case"], entry["impl"]): entry for entry in entries}
    lines = [
        "| case | memtrans | of memory off | GPU busy | peak, GB | memtrans-eager | upstream |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in dict.fromkeys(entry["case"] for entry in entries):
        ours, off = found[case, OURS], found[f"{case.rsplit('-', 1)[0]}-off", OURS]
        others = [found.get((case, impl)) for impl in ("memtrans-eager", "upstream")]
        cells = [f"{other['tokens_per_second']:,.0f}" if other else "–" for other in others]
        share = ours["tokens_per_second"] / off["tokens_per_second"]
        lines.append(
            f"| {case} | {ours['tokens_per_second']:,.0f} | {share:.1%} | {ours['gpu_busy']:.1%} "
            f"| {ours['peak_bytes'] / 1e9:.2f} | {' | '.join(cells)} |"
        )
    first = entries[0]
    return (
        "\n".join([*lines, "", f"Tokens a second on {first['gpu']}, torch {first['torch']}, triton {first['triton']}."])
        + "\n"
    )


def gain_table(entries: list[dict[str, Any]]) -> str:
    """Held-out bits per byte of each run: all, with retrieval off, and far into long documents."""
    far = max((int(place) for place in set.intersection(*(set(entry["by_position"]) for entry in entries))), default=0)
    names = (
        "local heads start",
        "learning rate",
        "XL cache",
        "memory",
        "seed",
        "bits per byte",
        "with retrieval off",
        f"from byte {far:,} on",
    )
    columns = (*names, "training bytes", "seconds")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    sort = ("learning_rate", "xl", "memory", "seed")
    for entry in sorted(entries, key=lambda entry: [_start(entry), *(entry["settings"][name] for name in sort)]):
        settings, last = entry["settings"], entry["curve"][-1]
        memory, cache = (f"{settings[name]:,}" if settings[name] else "–" for name in ("memory", "xl"))
        off = f"{entry['bits_per_byte_without_memory']:.4f}" if settings["memory"] else "–"
        lines.append(
            f"| {_start(entry)} | {settings['learning_rate']:g} | {cache} | {memory} | {settings['seed']} "
            f"| {entry['bits_per_byte']:.4f} | {off} | {entry['by_position'][str(far)]:.4f} "
            f"| {last['bytes'] / 1e6:.0f} M | {last['seconds']:.0f} |"
        )
    first = entries[0]
    return "\n".join([*lines, "", f"On {first['gpu']}, torch {first['torch']}, triton {first['triton']}."]) + "\n"


def _start(entry: dict[str, Any]) -> str:
    """How local heads started: at looking a few tokens back, or at random."""
    return "near" if entry["settings"]["position_start"] else "random"


def table(entries: list[dict[str, Any]], ceilings: dict[str, float], peak: bool = False) -> str:
    """One row for each case, mode and dtype; one column for each implementation, ours first."""
    impls = sorted({entry["impl"] for entry in entries}, key=lambda impl: (impl != OURS, impl))
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in entries:
        rows.setdefault((entry["case"], entry["mode"]), {})[entry["impl"]] = entry
    ceilings = {} if peak else {rate: most for rate, most in ceilings.items() if any(rate in e for e in entries)}
    columns = ["case", "mode", *impls, *(["of the ceiling"] if ceilings else [])]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for (case, mode), found in rows.items():
        cells = [peak_cell(found.get(impl)) if peak else cell(found.get(impl), found.get(OURS)) for impl in impls]
        cells += [share_cell(found.get(OURS), ceilings)] if ceilings else []
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
        wanted = (place[4] or "").strip()
        special = {"tokens": tokens_table, "gain": gain_table}
        make = special.get(wanted, lambda entries: table(entries, ceilings_of(place[2]), wanted == "peak"))
        return f"{place[1]}{make(entries)}{place[5]}"

    return PLACE.sub(fill, text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
