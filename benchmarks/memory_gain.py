"""What the memory buys: the same model and the same text, with memories of several sizes.

    python benchmarks/c_sources.py linux-source-6.1.tar.xz c-sources.zip
    python benchmarks/memory_gain.py --data c-sources.zip --bytes 300000000 --memory 0 32 8192 65536 --seeds 0 1
    python benchmarks/memory_gain.py --data c-sources.zip --set position_start=null --label random-start
    python benchmarks/memory_gain.py --data c-sources.zip --memory 0 --set learning_rate=5e-4 --label half-rate
    python benchmarks/memory_gain.py --data c-sources.zip --memory 65536 --late 0 --late-set final_rate=0
    python benchmarks/memory_gain.py --data c-sources.zip --memory 65536 --late 0 --late-set 'memory_query="shared"'
    python benchmarks/memory_gain.py --plot docs/images/memory_gain.png --machine h100 --label "" half-rate

Each run writes an entry into results/<machine>/memory_gain.json when it ends: held-out bits per byte along the way,
against bytes and against seconds of training (evaluations and compilation not counted), and at the end by the position
in the document, with the memory and with retrieval off. A `late-0-` run was trained with a plain layer first, and asks
its memory with a query of its own, as `train --resume` does; committed ones before that did with the shared one. Plain
layers take products, as the preset's did when the committed runs were made; --set 'plain_similarity="cosine"' has them
as they are now.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, RESULTS, environment, machine, write_down

from memtrans.presets import PRESETS
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.data import open_data
from memtrans.training.evaluate import Evaluation, evaluate, held_out_stream
from memtrans.training.gaining import gaining
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer

POINTS = 12  # evaluations along the way


def evaluated(trainer: Trainer, size: int, retrieval: bool = True) -> Evaluation:
    settings = trainer.settings
    stream = held_out_stream(trainer.data.held_out, settings.batch, settings.segment)
    return evaluate(trainer.model, stream, size, retrieval=retrieval, dtype=settings.compute_dtype(trainer.device))


def curve(trainer: Trainer, size: int) -> list[dict[str, float]]:
    """Trains to the end; held-out bits per byte at POINTS places along the way."""
    steps, seconds, begin, points = trainer.settings.steps, 0.0, time.perf_counter(), []
    begun = trainer.step
    marks = {max(1, begun + (steps - begun) * (point + 1) // POINTS) for point in range(POINTS)}
    while trainer.step < steps:
        trainer.advance()
        if trainer.step == begun + 10:  # compiled by now
            trainer.check()
            begin = time.perf_counter()
        if trainer.step in marks:
            training = trainer.report()["bits_per_byte"]
            seconds += time.perf_counter() - begin
            bits = evaluated(trainer, size).bits_per_byte
            points.append({"bytes": trainer.tokens, "seconds": seconds, "bits_per_byte": bits, "training": training})
            print(points[-1], flush=True)
            begin = time.perf_counter()
    return points


def late(settings: Settings, first: int, share: float, then: list[str]) -> Trainer:
    """A run that is about to read with all of its memory, for such a share of steps more than it has done.

    first: entries that it has done with; 0 for a plain layer. then: what other settings these steps have.
    """
    gains = gaining(settings.to_json()) if first == 0 else {}
    before = Trainer(dataclasses.replace(settings, memory=first), open_data(settings), torch.device(DEVICE))
    while before.step < settings.steps:
        before.advance()
    after = dataclasses.replace(settings, steps=round((1.0 + share) * settings.steps), **gains)
    after = overridden(after, then)
    trainer = Trainer(after, before.data, torch.device(DEVICE))
    trainer.restore(Checkpoint(*before.state()))
    return trainer


def run(settings: Settings, options: argparse.Namespace) -> None:
    """One training run, written down."""
    if options.late is None:
        trainer = Trainer(settings, open_data(settings), torch.device(DEVICE))
    else:
        trainer = late(settings, options.late, options.late_share, options.late_set)
        settings = trainer.settings
    points = curve(trainer, options.eval_bytes)
    on, off = (evaluated(trainer, options.final_eval_bytes, retrieval) for retrieval in (True, False))
    begun = "" if options.late is None else f"late-{options.late}-"
    label = "".join(f"-{label}" for label in options.label if label)
    entry = {
        "op": "memory_gain",
        "impl": "memtrans",
        "case": f"{begun}memory-{settings.memory}-xl-{settings.xl}-seed-{settings.seed}{label}",
        "mode": "train",
        "dtype": settings.dtype,
        **environment(),
        "settings": settings.to_json() | {"data": Path(settings.data).name},
        "curve": points,
        "bits_per_byte": on.bits_per_byte,
        "bits_per_byte_without_memory": off.bits_per_byte,
        "by_position": on.by_position,
        "by_position_without_memory": off.by_position,
        "scored_bytes": on.scored,
        "ms": points[-1]["seconds"] * 1e3,
    }
    path = write_down(entry)
    print(entry["case"], on.bits_per_byte, off.bits_per_byte, path, flush=True)


def overridden(settings: Settings, assignments: list[str]) -> Settings:
    """The settings with NAME=VALUE applied; values are JSON."""
    values = {name: json.loads(value) for name, value in (text.split("=", 1) for text in assignments)}
    return Settings.from_json(settings.to_json() | values)


def plot(path: str, folder: str, labels: list[str]) -> None:
    """Held-out bits per byte by the position in the document: a line without a memory and one for each size of it.

    Of the runs with these labels and the longest XL cache, the best without a memory and the worst of each size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = json.loads((RESULTS / folder / "memory_gain.json").read_text())
    entries = [entry for entry in found if entry["case"].partition(f"-seed-{entry['settings']['seed']}")[2] in labels]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = {"color": ("tab:gray", "tab:cyan", "tab:blue", "tab:purple"), "marker": "osD^", "linestyle": ("--", "-")}
    for number, entry in enumerate(shown(entries)):
        size = entry["settings"]["memory"]
        kind = {name: of[min(number, len(of) - 1)] for name, of in styles.items()}
        places, bits = _places(entry["by_position"])
        axes.plot(places, bits, markersize=4.5, linewidth=2, **kind)
        name = f"memory of {size:,} tokens" if size else "without a memory"
        at = {"xytext": (10, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(name, (places[-1], bits[-1]), color=kind["color"], fontweight="bold", **at)
    axes.set_xscale("log", base=2)
    ticks = [1024 * 4**power for power in range(4)]
    axes.set_xticks(ticks, [f"{tick // 1024} KB" for tick in ticks])
    axes.set_xlabel("position in the document")
    axes.set_ylabel("bits per byte of held-out text")
    axes.set_title("The longer the document, the more its memory is worth", loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, format="png", dpi=150)


def shown(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that are drawn: by the size of the memory, the best without one and the worst of each size."""
    longest = max(entry["settings"]["xl"] for entry in entries)
    runs: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["settings"]["xl"] == longest:
            runs.setdefault(entry["settings"]["memory"], []).append(entry)
    return [(max if size else min)(runs[size], key=itemgetter("bits_per_byte")) for size in sorted(runs)]


def _places(by_position: dict[str, float]) -> tuple[list[int], list[float]]:
    """Where each part of the documents begins, 256 bytes on so that the first one has a logarithm; and its bits."""
    return [int(position) + 256 for position in by_position], list(by_position.values())


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib", help="as of `python -m memtrans train`")
    parser.add_argument("--bytes", type=float, default=300e6, help="training bytes of each run (300e6)")
    parser.add_argument(
        "--memory",
        type=int,
        nargs="+",
        default=[0, 8192, 65536],
        help="sizes; 0 for a plain layer instead, 32 for the layer with next to no memory",
    )
    parser.add_argument("--late", type=int, help="entries to train with at first; 0 for a plain layer")
    parser.add_argument("--late-share", type=float, default=0.1, help="of steps more, with all of the memory (0.1)")
    parser.add_argument("--late-set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of those steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--eval-bytes", type=int, default=1_000_000, help="held-out bytes at each place along the way")
    parser.add_argument("--final-eval-bytes", type=int, default=4_000_000, help="held-out bytes at the end, both ways")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of the runs")
    parser.add_argument("--label", nargs="*", default=[""], help="added to the name of the runs; of those to draw")
    parser.add_argument("--plot", metavar="PNG", help="draw what has been measured, and train nothing")
    parser.add_argument("--machine", default=machine(), help="whose results to draw (this machine's)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options: Any = parsed(arguments)
    if options.plot:
        return plot(options.plot, options.machine, [f"-{label}" if label else "" for label in options.label])
    base = dataclasses.replace(PRESETS["code"], plain_similarity="product", data=options.data, dtype="bfloat16")
    base = overridden(base, options.set)
    per_step = base.batch * base.segment * base.segments * base.accumulate
    steps = max(POINTS, int(options.bytes) // per_step)
    for seed in options.seeds:
        for memory in options.memory:
            run(dataclasses.replace(base, memory=memory, seed=seed, steps=steps), options)


if __name__ == "__main__":
    main()
