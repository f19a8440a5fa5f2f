"""What several GPUs hold, and what they would do: `python benchmarks/scaling.py MACHINE...`. Calculated, not measured.

Of several machines a later one's cases stand for those of an earlier one.

Data parallel, n GPUs on hosts of 8: a step takes what it takes on one GPU, and the exchange of the gradients. Inside a
host that moves 2 (n - 1) / n of their bytes at the bandwidth that two GPUs showed, or at LINK where they were not
measured; between h hosts each GPU moves 2 (h - 1) / h of an eighth of them at NETWORK. None of it is hidden behind the
backward pass, as none is today.

Sharded search, n GPUs of one host, 65,536 queries in all over 64K entries a GPU: the time of one GPU, and of an
exchange that grows with the (n - 1) / n of the answers that come from others.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tables import RESULTS

HOST = 8  # GPUs of a host
LINK = 300e9  # bytes a second between GPUs of a host: an assumption, about what NCCL reaches over NVLink 4
NETWORK = 50e9  # bytes a second for each GPU between hosts: an assumption, a port of 400 Gbit/s
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


def step_milliseconds(gpus: int, alone: dict[str, Any], two: dict[str, Any]) -> float:
    """Of data-parallel training."""
    inside, hosts = min(gpus, HOST), max(1, gpus // HOST)
    exchange = 2 * (inside - 1) / inside * two["exchange_ms"]
    return alone["ms"] + exchange + 2 * (hosts - 1) / hosts * two["gradient_bytes"] / HOST / NETWORK * 1e3


def throughput_table(entries: dict[str, dict[str, Any]]) -> str:
    """Tokens a second of `ddp-paper-64k`, and milliseconds of the sharded searches."""
    alone = entries["ddp-paper-64k-1"]
    assumed = {"gradient_bytes": alone["gradient_bytes"], "exchange_ms": alone["gradient_bytes"] / LINK * 1e3}
    two = entries.get("ddp-paper-64k-2", assumed)
    names = [name for name in ("sharded-d64-64k", "sharded-paper-64k") if f"{name}-2" in entries]
    head = ["GPUs", "tokens/s", "of n × one GPU", *names]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for gpus in GPUS:
        step = step_milliseconds(gpus, alone, two)
        tokens = gpus * alone["tokens_per_second"] * alone["ms"] / step
        one = [entries[f"{name}-1"]["ms"] for name in names]
        more = [entries[f"{name}-2"]["ms"] - ms for name, ms in zip(names, one, strict=True)]
        found = [f"{ms + add * 2 * (gpus - 1) / gpus:.2f}" for ms, add in zip(one, more, strict=True)]
        cells = found if gpus <= HOST else ["–"] * len(names)
        line = [str(gpus), f"{tokens:,.0f}", f"{alone['ms'] / step:.0%}", *cells]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def measured(*machines: str) -> dict[str, dict[str, Any]]:
    """The entries of machines by case, a later machine's for those of an earlier one."""
    paths = [RESULTS / machine / "multi_gpu.json" for machine in machines]
    return {entry["case"]: entry for path in paths for entry in json.loads(path.read_text())}


if __name__ == "__main__":
    print(memory_table(), throughput_table(measured(*sys.argv[1:])), sep="\n")
