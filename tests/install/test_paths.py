"""The table of the ways to install: a line is written when its way has ended, and the others stay."""

from __future__ import annotations

import sys
from pathlib import Path

import paths
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = f"before\n{paths.BEGIN}\n{paths.END}\nafter\n"
PLAIN, UV = (f"| {paths.WAYS[name][0]} | installed | 9 s | 8 s | built, loaded |" for name in ("plain", "uv"))


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page with the place of the table."""
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path)
    (tmp_path / "CONTRIBUTING.md").write_text(PAGE)
    return tmp_path / "CONTRIBUTING.md"


def table(*lines: str) -> str:
    return "\n".join(["before", paths.BEGIN, *paths.HEADER, *lines, paths.END, "after\n"])


def test_each_line_has_its_place_and_replaces_its_former_one(page: Path) -> None:
    paths.put(UV)
    paths.put(PLAIN)
    assert page.read_text() == table(PLAIN, UV)
    failed = f"| {paths.WAYS['uv'][0]} | failed | – | – | – |"
    paths.put(failed)
    assert page.read_text() == table(PLAIN, failed)


def test_a_way_that_fails_is_in_the_table_and_in_the_status(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths.sys, "argv", ["paths.py", "plain", "uv"])
    monkeypatch.setattr(paths, "try_way", {"plain": PLAIN, "uv": UV}.__getitem__)
    assert paths.main() == 0
    monkeypatch.setattr(paths, "try_way", {"plain": PLAIN, "uv": UV.replace("installed", "failed")}.__getitem__)
    assert paths.main() == 1
    assert page.read_text() == table(PLAIN, UV.replace("installed", "failed"))


def test_the_committed_table_names_ways_that_there_are() -> None:
    text = (paths.REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = text.partition(paths.BEGIN)[2].partition(paths.END)[0].splitlines()
    ways = [title for title, _ in paths.WAYS.values()]
    found = [paths.title_of(line) for line in lines if line and line not in paths.HEADER]
    assert found == [title for title in ways if title in found]


def test_uv_sync_builds_with_what_other_installers_build_with_and_the_pytorch_that_is_there() -> None:
    project = tomllib.loads((paths.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    required = [name for name in project["build-system"]["requires"] if not name.startswith("torch")]
    assert sorted(project["dependency-groups"]["build"]) == sorted(required)
    assert project["tool"]["uv"]["default-groups"] == ["build"]
    assert project["tool"]["uv"]["no-build-isolation-package"] == [project["project"]["name"]]
