"""`python -m memtrans completion`: what bash or zsh reads to complete the command."""

from __future__ import annotations

import argparse

from memtrans.cli.ending import EndedError, show
from memtrans.cli.parser import build_parser
from memtrans.distributed.ranks import Ranks

SHARED = False


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Prints the script."""
    del ranks
    try:
        from shtab import complete
    except ImportError as error:
        raise EndedError("completion needs shtab: `pip install 'memtrans[completion]'` brings it", 2) from error
    show(complete(build_parser(), shell=options.shell))
