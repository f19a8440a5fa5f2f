"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CURVES = {
    "bits_per_byte": ("training", "tab:gray", "-"),
    "eval_bits_per_byte": ("held out, with memory", "tab:blue", "o-"),
    "eval_bits_per_byte_without_memory": ("held out, without", "tab:orange", "s--"),
}
ACCURACIES = {
    "recall_accuracy": ("with memory", "tab:blue", "o-"),
    "recall_accuracy_without_memory": ("without", "tab:orange", "s--"),
    "recall_chance": ("chance", "tab:gray", ":"),
}


def plot_metrics(lines: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws bits per byte over steps, and the share of far questions answered where there is one.

    lines: of `Metrics.read`. path: of a PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    answers = any("recall_accuracy" in line for line in lines)
    figure = Figure(figsize=(10 if answers else 6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if answers else 1, squeeze=False)[0]
    _draw(panels[0], lines, CURVES, "bits per scored byte")
    if answers:
        _draw(panels[1], lines, ACCURACIES, "far questions answered")
        panels[1].set_ylim(-0.03, 1.03)
    figure.savefig(path, format="png", dpi=120)


def _draw(
    axes: Any, lines: Sequence[Mapping[str, Any]], curves: Mapping[str, tuple[str, str, str]], title: str
) -> None:
    for name, (label, colour, style) in curves.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
    axes.set_xlabel("steps")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
