"""The command that a warning names installs again what was installed, from where it came, past a cache."""

from __future__ import annotations

import json
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import pytest

from memtrans_kernels import mending

GIT = {"url": "https://example.org/memtrans.git", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}
FRESH = "--no-cache-dir --force-reinstall --no-deps"


@pytest.mark.parametrize(
    ("installer", "place", "command"),
    [
        ("pip", {}, f"pip install {FRESH} memtrans==0.1.0"),
        ("pip", {"url": "file:///src/my%20tree", "dir_info": {}}, f'pip install {FRESH} "/src/my tree"'),
        ("pip", {"url": "file:///src/tree", "dir_info": {"editable": True}}, "pip install -e /src/tree"),
        ("pip", {"url": "file:///dist/memtrans-0.1.0.tar.gz"}, f"pip install {FRESH} /dist/memtrans-0.1.0.tar.gz"),
        ("pip", GIT, f"pip install {FRESH} 'memtrans @ git+https://example.org/memtrans.git@abc123'"),
        ("uv", {}, "uv pip install --no-cache --reinstall-package memtrans memtrans==0.1.0"),
    ],
)
def test_what_to_type(
    installer: str, place: dict, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "METADATA").write_text("Metadata-Version: 2.1\nName: memtrans\nVersion: 0.1.0\n")
    (tmp_path / "INSTALLER").write_text(f"{installer}\n")
    if place:
        (tmp_path / "direct_url.json").write_text(json.dumps(place))
    monkeypatch.setattr(mending, "distribution", lambda name: Distribution.at(tmp_path))
    assert mending.mending_command() == command


def test_a_tree_that_was_not_installed_builds_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Distribution:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(mending, "distribution", missing)
    assert mending.mending_command().endswith("&& python setup.py build_ext --inplace")
