"""The answers run: each snippet by itself, in an empty directory; command lines have options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from memtrans.cli import _parser

FAQ = (Path(__file__).resolve().parents[1] / "docs" / "faq.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", FAQ, re.DOTALL | re.MULTILINE))
SNIPPETS = {
    title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for title, text in SECTIONS.items()
    if "```python" in text
}
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", FAQ, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("title", SNIPPETS)
def test_a_snippet_runs(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for snippet in SNIPPETS[title]:
        exec(snippet, {})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_options_that_exist(command):
    python, module, memtrans, *options = shlex.split(command)
    assert (python, module, memtrans) == ("python", "-m", "memtrans")
    _parser().parse_args(options)


def test_the_questions_of_upstreams_users_are_there():
    assert len(SNIPPETS) >= 8
    assert all("```" in text or "README" in text for text in SECTIONS.values())
