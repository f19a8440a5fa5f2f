"""The answers run: each snippet by itself, in an empty directory; command lines have options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from memtrans.cli.parser import build_parser

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
    launcher, *options = re.split(r"(?<=-m memtrans) ", command, maxsplit=1)
    assert launcher in ("python -m memtrans", *(f"torchrun --nproc-per-node={number} -m memtrans" for number in (4, 8)))
    build_parser().parse_args(shlex.split(*options))


ASKED = (  # of memorizing-transformers-pytorch, most of them in its issues
    "How do I generate text with the memory?",
    "Which arguments give the paper's table 4?",
    "Why do keys and values have a single head?",
    "Is the scale right?",
    "Do I need a list of memories for a single layer?",
    "Can it train on several GPUs?",
    "Can several GPUs share one memory?",
    "Is this the authors' code, and does it fit into my own training loop?",
    "Why is there no Faiss index?",
)


@pytest.mark.parametrize("question", ASKED)
def test_a_question_of_upstreams_users_is_answered_with_something_that_runs(question):
    assert SNIPPETS[question]


def test_every_answer_runs_or_names_what_does():
    assert all("```" in text or "README" in text for text in SECTIONS.values())


PUBLIC = {"memtrans", "memtrans.hf", "memtrans.presets", "memtrans_kernels"}


@pytest.mark.parametrize("title", SNIPPETS)
def test_a_snippet_imports_from_places_that_stay(title):
    imported = re.findall(r"^\s*(?:from|import) (memtrans[\w.]*)", "".join(SNIPPETS[title]), re.MULTILINE)
    assert set(imported) <= PUBLIC
