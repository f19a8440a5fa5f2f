"""The learning rate of each step."""

from __future__ import annotations

import math

from memtrans.training.settings import Settings


def learning_rate(settings: Settings, step: int) -> float:
    """Of the optimiser step after `step` others: a linear warm-up, then a decay.

    A cosine ends at `final_rate` of the highest rate. The inverse square root of the number of the step, constant
    during the warm-up but for its ramp, is the paper's: highest at the warm-up's end, `learning_rate` / sqrt(`warmup`).

    >>> settings = Settings(steps=100, warmup=10, learning_rate=1.0, final_rate=0.0)
    >>> [round(learning_rate(settings, step), 2) for step in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    >>> settings = Settings(schedule="inverse-sqrt", warmup=100, learning_rate=1.0)
    >>> [round(learning_rate(settings, step), 3) for step in (0, 49, 99, 399)]
    [0.001, 0.05, 0.1, 0.05]
    """
    highest = settings.learning_rate
    if settings.schedule == "inverse-sqrt":
        highest /= math.sqrt(max(step + 1, settings.warmup))
    if step < settings.warmup:
        return highest * (step + 1) / settings.warmup
    if settings.schedule == "inverse-sqrt":
        return highest
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    share = settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return highest * share
