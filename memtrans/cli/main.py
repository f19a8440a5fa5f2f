"""`python -m memtrans train | eval | generate | tokenize | hf | inspect | presets | info | completion`.

Bad input ends with one line on standard error and exit status 2; Ctrl-C with 130 and SIGTERM with 143, `train` after
a checkpoint; a loss that is not finite, a disk that is full, too little memory or a rank that is lost with 1, and the
last good checkpoint is kept. The last line of `train` and `eval` on standard output is one JSON object. Of several
ranks the first one speaks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from memtrans.cli.parser import build_parser


def main(arguments: Sequence[str] | None = None, imported: Callable[[], object] = lambda: None) -> int:
    """Runs a command and returns its exit status; one of several ranks ends the process with it.

    imported: called once everything is imported and the command is about to begin.
    """
    options = build_parser().parse_args(arguments)
    outcome = import_module("memtrans.cli.outcome").outcome  # not before the options are known to be good: PyTorch
    verb = import_module(f"memtrans.cli.{options.verb}")
    imported()
    return int(outcome(verb, options))
