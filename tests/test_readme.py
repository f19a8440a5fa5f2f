"""README.md and docs/ show what the code and the result files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.scripts import benchmark_script

ROOT = Path(__file__).resolve().parents[1]
TABLES = benchmark_script("tables")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*TABLES.PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
}
README = PAGES["README.md"]
MOST_LINES = 180
LINKS = sorted({(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)})
GENERATED = ("README.md", "docs/benchmarks.md", "docs/distributed.md", "docs/portability.md", "docs/results.md")


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= MOST_LINES, "what is more than a start belongs in docs/"


def test_its_python_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(snippet, names)
    assert names["logits"].shape == (2, 256, 256)
    assert names["memories"][0].lengths.tolist() == [0, 1024]
    assert names["out"].shape == (2, 256, 64)
    assert names["new"].shape == (2, 8)
    assert (tmp_path / "my_model" / "memories.safetensors").exists()


@pytest.mark.parametrize("page", PAGES)
def test_its_tables_are_those_of_the_result_files(page: str) -> None:
    assert TABLES.filled(PAGES[page]) == PAGES[page], "run: python benchmarks/tables.py"


@pytest.mark.parametrize("page", GENERATED)
def test_a_table_with_a_measured_figure_is_generated(page: str) -> None:
    by_hand = TABLES.PLACE.sub("", PAGES[page])
    rows = [line for line in by_hand.splitlines() if line.startswith("|") and "0.4.1" not in line]
    assert not [row for row in rows if re.search(r"\d\.\d|\d×|\d ms|\d%", row)]


@pytest.mark.parametrize(("page", "link"), [case for case in LINKS if "://" not in case[1]])
def test_a_link_leads_to_a_file_and_to_a_heading_of_it(page: str, link: str) -> None:
    path, _, heading = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]


PATHS = sorted(
    {
        (page, path)
        for page, text in PAGES.items()
        if page != "docs/log.md"  # which is of the trees of its days
        for path in re.findall(r"`((?:benchmarks|csrc|docs|memtrans|memtrans_kernels|tests)/[\w./-]+)`", text)
    }
)


@pytest.mark.parametrize(("page", "path"), PATHS)
def test_a_file_that_a_page_names_exists(page: str, path: str) -> None:
    assert (ROOT / path).exists()
