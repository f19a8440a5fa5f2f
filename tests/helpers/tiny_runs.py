"""Runs of the command line that take a moment, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from memtrans.cli.main import main
from memtrans.training.metrics import Metrics

TINY = [
    *("--batch", "2", "--segment", "32", "--layers", "2", "--width", "16", "--heads", "2", "--head-width", "8"),
    *("--memory", "64", "--neighbours", "4", "--eval-bytes", "300", "--sample", "0", "--plain"),
]


def written_text(directory: Path) -> str:
    """The path of a small text."""
    path = directory / "text.txt"
    path.write_bytes(b"".join(b"line %d of a text, " % number for number in range(400)))
    return str(path)


def uneven_documents(directory: Path) -> str:
    """The path of documents of different lengths: rows end theirs at different steps, not every token is scored."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(9):
        content = torch.randint(97, 103, (90 + 57 * number,), generator=generator, dtype=torch.uint8)
        (directory / f"{number}.txt").write_bytes(bytes(content.tolist()))
    return str(directory)


def train(out: Path, *options: str) -> int:
    """The status of a tiny run."""
    return main(["train", "--out", str(out), *TINY, *options])


def last_line(capsys) -> dict:
    """What the run reports at its end."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def without_times(out: Path) -> list[dict]:
    """Its metrics, but for those that differ from run to run."""
    lines = Metrics(out / "metrics.jsonl").read()
    timed = ("tokens_per_second", "peak_share")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def checkpoint_files(out: Path) -> dict[str, bytes]:
    """Its checkpoint, to the byte."""
    return {path.name: path.read_bytes() for path in (out / "checkpoint").iterdir()}
