"""docs/migrating.md: its snippets run, those for unchanged code with upstream's package too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import memtrans
from memtrans.knn_memory import KNNMemory

pytestmark = pytest.mark.cpu
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
SNIPPETS = [
    (title, number, snippet)
    for title, text in SECTIONS.items()
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
UNCHANGED = [snippet for snippet in SNIPPETS if snippet[0] in ("Import lines", "What runs unchanged")]
PUBLIC = {"memtrans", "memtrans.knn_memory", "memtrans.memorizing_transformers_pytorch"}


def named(snippets: list[tuple[str, int, str]]) -> list[object]:
    return [pytest.param(snippet, id=f"{title}, {number}") for title, number, snippet in snippets]


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty directory, and no precision that accelerate keeps for the process."""
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("snippet", named(SNIPPETS))
def test_22_a_snippet_runs(snippet: str) -> None:
    exec(snippet, {"__name__": "snippet"})


@pytest.mark.parametrize("snippet", named(UNCHANGED))
def test_22_what_runs_unchanged_runs_with_upstreams_package(snippet: str) -> None:
    theirs = re.sub(r"from memtrans\b", "from memorizing_transformers_pytorch", snippet)
    assert theirs != snippet
    exec(theirs, {})


@pytest.mark.parametrize("snippet", named(SNIPPETS))
def test_22_a_snippet_imports_from_places_that_stay(snippet: str) -> None:
    assert set(re.findall(r"^\s*(?:from|import) (memtrans[\w.]*)", snippet, re.MULTILINE)) <= PUBLIC


def test_22_what_stays_away_does_and_what_stands_for_it_is_there() -> None:
    memory = KNNMemory(dim=2, max_memories=3)
    for name in ("knns", "db", "db_offsets", "n_jobs"):
        assert f"`memory.{name}" in PAGE or name == "n_jobs"
        assert not hasattr(memory, name)
    for name in re.findall(r"\| .*? \| (.*?) \|", SECTIONS["What stays away"]):
        for found in re.findall(r"`memory\.(\w+)", name):
            assert hasattr(memory, found)


def test_22_the_package_under_upstreams_name_serves_its_import_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    name, modules = "memorizing_transformers_pytorch", ("knn_memory", "memorizing_transformers_pytorch")
    monkeypatch.setitem(__import__("sys").modules, name, memtrans)
    for module in modules:
        monkeypatch.setitem(__import__("sys").modules, f"{name}.{module}", getattr(memtrans, module))
    found: dict[str, object] = {}
    exec(f"from {name} import KNNAttention\nfrom {name}.knn_memory import KNNMemory", found)
    assert (found["KNNAttention"], found["KNNMemory"]) == (memtrans.KNNAttention, KNNMemory)
