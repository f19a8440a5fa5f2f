"""The README shows what the code and the result files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.scripts import benchmark_script

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(snippet, names)
    assert names["logits"].shape == (2, 256, 256)
    assert names["memories"][0].lengths.tolist() == [0, 1024]
    assert names["new"].shape == (2, 8)
    assert (tmp_path / "my_model" / "memories.safetensors").exists()


def test_its_tables_are_those_of_the_result_files() -> None:
    assert benchmark_script("tables").filled(README) == README, "run: python benchmarks/tables.py"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_every_file_it_links_to_exists(path: str) -> None:
    assert (ROOT / path).exists()
