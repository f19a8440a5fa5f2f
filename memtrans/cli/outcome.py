"""Runs a command on this rank, and turns whatever ends it into a message and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from types import ModuleType

import torch

from memtrans.cli.ending import EndedError
from memtrans.distributed.ranks import ALONE, LaunchError, LostRankError, Ranks, end_process, joined, launched
from memtrans.generation.sampling import NoTokenError
from memtrans.training.evaluate import NonFiniteLossError
from memtrans.training.run import NotWrittenError
from memtrans.training.signals import StoppedError

# of host memory; the last is what the CPU library says
NO_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed", "aten::new_empty")


def outcome(verb: ModuleType, options: argparse.Namespace) -> int:
    """The exit status of the command that was parsed.

    Its module `verb` has `run(options, ranks)`, and `SHARED`: whether several ranks share the work. Where they do not,
    the first one does it, and the others end well at once. Ranks that share work never return from here: whatever ended
    it, the process ends at once, lest its groups wait for a rank that is gone, or abort.
    """
    try:
        ranks = launched()
    except LaunchError as error:
        if verb.SHARED:
            return _told(options, EndedError(str(error), 2), ALONE)
        ranks = ALONE
    if not verb.SHARED:
        return _attempt(verb, options, ALONE) if ranks.first else 0
    status = _attempt(verb, options, ranks)
    if ranks.size > 1:
        end_process(status)
    return status


def _attempt(verb: ModuleType, options: argparse.Namespace, ranks: Ranks) -> int:
    try:
        with joined(ranks):
            verb.run(options, ranks)
        return 0
    except BrokenPipeError:  # whoever read the text has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Python flushes it once more when it ends
        return 1
    except (Exception, KeyboardInterrupt) as error:
        ending = _ending(error)
        if ending is None and ranks.size == 1:
            raise
        if ending is None:
            traceback.print_exc()
            return 1
        return _told(options, ending, ranks)


def _ending(error: BaseException) -> EndedError | None:
    """What an error means for the user; None for one that should not come."""
    if isinstance(error, EndedError):
        return error
    if isinstance(error, StoppedError):
        return EndedError(str(error), error.status, everywhere=error.failed is not None)
    if isinstance(error, KeyboardInterrupt):
        return EndedError("stopped by Ctrl-C", 130)
    if isinstance(error, LostRankError):
        return EndedError(str(error), everywhere=True)
    if isinstance(error, (NonFiniteLossError, NoTokenError, NotWrittenError)):
        return EndedError(str(error))
    if _is_out_of_memory(error):  # the others have memory enough, and hear of a lost rank only
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return EndedError(f"the device has too little memory for these sizes: {reason}", everywhere=True)
    return EndedError(str(error)) if isinstance(error, OSError) else None


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has a class for it on GPUs alone."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _told(options: argparse.Namespace, ending: EndedError, ranks: Ranks) -> int:
    if ranks.first or ending.everywhere:
        lines = (line.strip() for line in str(ending).splitlines())  # other libraries' errors have several
        print(f"memtrans {options.name}: {' '.join(filter(None, lines))}", file=sys.stderr, flush=True)
    return ending.status
