"""The scripts of docs/examples run as they stand, and are short."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.programs import Program

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
    program = Program(script=FOLDER / name, variables={"CUDA_VISIBLE_DEVICES": ""})
    said, errors = program.communicate(timeout=120)
    assert program.returncode == 0, errors
    assert SAYS[name] in said
