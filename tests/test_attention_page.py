"""The page about attention runs from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "attention.md").read_text(encoding="utf-8")


def test_the_snippets_run_one_after_another() -> None:
    names: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) >= 7
