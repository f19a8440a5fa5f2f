"""What several GPUs did, hold, and would do: the tables of docs/distributed.md, which `tables.py` writes.

The first table is of the machine's result file; the others are calculated, not measured.

Data parallel, n GPUs on hosts of 8: a step takes what it takes on one GPU, and what is not hidden of the exchange of
the gradients. Inside a host that is what two GPUs showed, times 2 (n - 1) / n, as the bytes that each GPU moves grow;
between h hosts each GPU moves 2 (h - 1) / h of an eighth of the gradients at NETWORK, and none of that is hidden.

Sharded search, n GPUs of one host, 65,536 queries in all over 64K entries a GPU: the time of one GPU, and of an
exchange that grows with the (n - 1) / n of the answers that come from others.
"""

from __future__ import annotations

from typing import Any

HOST = 8  # GPUs of a host
NETWORK = 50e9  # bytes a second for each GPU between hosts: an assumption, a port of 400 Gbit/s
MEASURED = {
    "ddp-paper-64k": "a step of training, paper's shape, memory of 64K, 16 documents a GPU",
    "sharded-d64-64k": "a search, d64, 64K entries a row and GPU",
    "sharded-paper-64k": "a search, paper's shape, 64K entries a row and GPU",
}
GPUS = (1, 2, 8, 64, 512)
FOR_MEMORY = 16 * 2**30  # bytes of each GPU
SHAPES = {"d64 (D 64, G 1)": (64, 1), "d128 (D 128, G 1)": (128, 1), "paper (D 128, G 8)": (128, 8)}


def memory_table() -> str:
    """Entries of a document in one layer whose keys and values, float16, fill FOR_MEMORY of each GPU of a group."""
    lines = [f"| GPUs | {' | '.join(SHAPES)} |", f"| --- |{' --- |' * len(SHAPES)}"]
    for gpus in GPUS[:-1]:
        entries = (gpus * FOR_MEMORY // (2 * width * 2 * groups) for width, groups in SHAPES.values())
        lines.append(f"| {gpus} | {' | '.join(f'{number / 1e6:,.1f} M' for number in entries)} |")
    return "\n".join(lines) + "\n"


def measured_table(entries: dict[str, dict[str, Any]]) -> str:
    """Two GPUs against one: of training the tokens a second, of a search the time."""
    lines = ["| milliseconds | one GPU | two GPUs | |", "| --- | --- | --- | --- |"]
    for name, what in MEASURED.items():
        one, two = entries[f"{name}-1"], entries[f"{name}-2"]
        ratio = f"{two['ms'] / one['ms']:.2f} × the time"
        if "tokens_per_second" in one:
            ratio = f"{two['tokens_per_second'] / one['tokens_per_second']:.2f} × the tokens a second"
        lines.append(f"| {what} | {one['ms']:.2f} | {two['ms']:.2f} | {ratio} |")
    return "\n".join(lines) + "\n"


def step_milliseconds(gpus: int, alone: dict[str, Any], two: dict[str, Any]) -> float:
    """Of data-parallel training."""
    inside, hosts = min(gpus, HOST), max(1, gpus // HOST)
    exchange = 2 * (inside - 1) / inside * (two["ms"] - alone["ms"])
    return alone["ms"] + exchange + 2 * (hosts - 1) / hosts * two["gradient_bytes"] / HOST / NETWORK * 1e3


def throughput_table(entries: dict[str, dict[str, Any]]) -> str:
    """Tokens a second of data-parallel training, and milliseconds of the sharded searches."""
    training, *searches = MEASURED
    alone, two = entries[f"{training}-1"], entries[f"{training}-2"]
    head = ["GPUs", "tokens/s", "of n × one GPU", *searches]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for gpus in GPUS:
        step = step_milliseconds(gpus, alone, two)
        tokens = gpus * alone["tokens_per_second"] * alone["ms"] / step
        cells = ["–"] * len(searches)
        if gpus <= HOST:
            cells = [
                f"{search_milliseconds(gpus, entries[f'{name}-1'], entries[f'{name}-2']):.2f}" for name in searches
            ]
        line = [str(gpus), f"{tokens:,.0f}", f"{alone['ms'] / step:.0%}", *cells]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def search_milliseconds(gpus: int, alone: dict[str, Any], two: dict[str, Any]) -> float:
    return alone["ms"] + (two["ms"] - alone["ms"]) * 2 * (gpus - 1) / gpus
