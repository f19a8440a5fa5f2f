"""The commands of docs/data.md run, one after another in one directory, on small texts."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from memtrans.cli.main import main
from tests.helpers.tiny_runs import TINY

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("python -m memtrans ")
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
TEXT = " ".join(f"The sentence number {number} of a book says {number * number}.\n" for number in range(300))


@pytest.mark.filterwarnings("ignore:batch is")
def test_the_commands_run(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("memtrans.training.events._library", lambda: _Silent)
    Path("book.txt").write_text(TEXT)
    records = [{"text": line, "body": line, "book": number // 30} for number, line in enumerate(TEXT.splitlines())]
    content = "".join(json.dumps(record) + "\n" for record in records)
    Path("records.jsonl").write_text(content)
    Path("records.jsonl.zst").write_bytes(zstandard.compress(content.encode()))
    for command in COMMANDS:
        small = [*TINY, "--steps", "1"] if command.startswith("train") else []
        assert main([*shlex.split(command), *small]) == 0, command


class _Silent:
    """Stands for tensorboard's writer."""

    def __init__(self, directory: str, purge_step: int) -> None:
        Path(directory).mkdir(parents=True)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert isinstance(value, float | int), name

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
