"""docs/inspection.md: its snippets run, its commands have options that exist, its picture is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from memtrans.cli.parser import build_parser

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "inspection.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_a_snippet_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})


@pytest.mark.parametrize("command", re.findall(r"^python -m memtrans (.*)$", PAGE, re.MULTILINE))
def test_a_command_has_options_that_exist(command: str) -> None:
    build_parser().parse_args(shlex.split(command))


def test_pictures_and_pages_that_it_leads_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (DOCS / target).exists(), target
