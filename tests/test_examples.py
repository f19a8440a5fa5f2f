"""The scripts of docs/examples run as they stand, and are short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "examples"
SAYS = {
    "ask_memory.py": "The document moves the next byte's logits by up to 0.",
    "own_book.py": "bits per byte",
    "own_model.py": "epoch 2: loss",
    "several_gpus.py": "1 ranks remember 512 entries together",
}


def test_every_script_is_run() -> None:
    assert sorted(SAYS) == sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", sorted(SAYS))
def test_a_script_is_short_and_runs(name: str) -> None:
    assert len((FOLDER / name).read_text().splitlines()) <= 60
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, FOLDER / name], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
