"""`python -m memtrans presets`: what `train --preset` takes, and what each would cost."""

from __future__ import annotations

import argparse

from memtrans.cli.ending import show
from memtrans.cli.settings_file import written
from memtrans.distributed.ranks import Ranks
from memtrans.presets import PRESETS, figures

SHARED = False


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Prints a line for each preset, or all settings of one."""
    del ranks
    if options.preset:
        show(written(options.preset))
        return
    for name, settings in PRESETS.items():
        show(f"{name:22} {figures(settings)}")
