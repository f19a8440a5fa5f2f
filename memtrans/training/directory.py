"""The directory of a run, and the lock by which one run at a time writes to it.

OUT/checkpoint/     see `checkpoint.py`
OUT/metrics.jsonl   a line every `log_every` steps and at every evaluation
OUT/loss.png        its curves
OUT/tensorboard/    the same record, with `--log tensorboard`
OUT/retrieved.html  what the end of a held-out document looked up; see `memtrans.inspection.page`
OUT/.lock           locked while a run writes; the operating system unlocks it when the process ends, however it ends.
                    It stays, and tells a directory that a run wrote to from others
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

from memtrans.data.folders import CHECKPOINT, METRICS
from memtrans.locks import LOCK, Lock
from memtrans.training.checkpoint import exists
from memtrans.training.metrics import Metrics

RUNS = Path("runs")  # where runs without --out go
REPLACED = (CHECKPOINT, METRICS, "loss.png", "retrieved.html")  # by a run that begins


def checkpoint_of(out: str | Path) -> Path:
    """Where a run keeps its checkpoint."""
    return Path(out) / CHECKPOINT


def metrics_of(out: str | Path) -> Metrics:
    """The record of a run."""
    return Metrics(Path(out) / METRICS)


def check_directory(out: str | Path, resume: bool) -> None:
    """Raises ValueError when a run cannot write there: a file is in the way, what it would replace is a checkpoint, or
    no run's."""
    blocked = next((path for path in (Path(out), *Path(out).parents) if path.exists() and not path.is_dir()), None)
    if blocked:
        raise ValueError(f"out must be a directory or not exist, got {str(out)!r}, where {str(blocked)!r} is a file")
    if not resume and exists(checkpoint_of(out)):
        raise ValueError(f"out must be a directory without a checkpoint, or come with --resume, got {str(out)!r}")
    foreign = None if resume else _foreign(Path(out))
    if foreign:
        raise ValueError(f"out must hold no {foreign.name} but a run's, got {str(out)!r}, where no run has begun")


def _foreign(out: Path) -> Path | None:
    """The first of what a run would replace, where no run has ever locked the directory."""
    if (out / LOCK).exists():
        return None
    there = (out / name for name in REPLACED if (out / name).exists())
    return next((path for path in there if not path.is_dir() or any(path.iterdir())), None)


def numbered(name: str, number: int) -> Path:
    """A directory of `runs/`.

    >>> print(numbered("demo", 1), numbered("demo", 2))
    runs/demo runs/demo-2
    """
    return RUNS / (name if number == 1 else f"{name}-{number}")


def newest(name: str) -> Path:
    """The last of runs/NAME, runs/NAME-2, ... that exists; the first one where none does."""
    last = next(number for number in count(1) if not numbered(name, number).exists()) - 1
    return numbered(name, max(1, last))


def lock(out: str | Path | None, name: str, resume: bool) -> Lock:
    """Locks a run's directory; without `out` a new one, the first of runs/NAME, runs/NAME-2, ... that does not exist.

    Raises ValueError when the directory is another run's or will not do.
    """
    if out is None:
        return _lock_new(name)
    taken = Lock(out)
    try:
        check_directory(out, resume)  # again: another run may have ended in it meanwhile
    except ValueError:
        taken.release()
        raise
    return taken


def _lock_new(name: str) -> Lock:
    RUNS.mkdir(exist_ok=True)
    for number in count(1):
        try:
            numbered(name, number).mkdir()  # fails where another run has just made it
        except FileExistsError:
            continue
        return Lock(numbered(name, number))
    raise AssertionError("numbers have no end")
