"""Each file of a folder is read once, whatever links lead to it; what cannot be listed is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memtrans.cli.main import main
from memtrans.data.folders import files_below
from memtrans.data.sources import load_corpus
from memtrans.data.texts import Source
from memtrans.data.tokenize import write_store
from memtrans.data.tokens import BYTES
from memtrans.training.directory import checkpoint_of, lock, metrics_of


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text {name}")
    return folder


def links(folder: Path, **targets: str) -> None:
    for name, target in targets.items():
        (folder / name.replace("__", "/")).symlink_to(target)


def found(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in files_below(folder)]


def test_files_come_in_path_order_without_hidden_ones(tmp_path):
    files(tmp_path, "b/z.txt", "b/a/x.txt", "a.txt", "b.txt", ".git/config", "b/.hidden")
    assert found(tmp_path) == ["a.txt", "b/a/x.txt", "b/z.txt", "b.txt"]


def test_links_within_a_folder_add_nothing_and_end(tmp_path):
    files(tmp_path, "a.txt", "sub/b.txt")
    links(tmp_path, aa=".", first="sub/b.txt", sub__up="..", loop="loop", nothing="gone", z="sub")
    assert found(tmp_path) == ["a.txt", "sub/b.txt"]


@pytest.mark.parametrize("place", ["", "sub"])
def test_links_out_of_a_folder_are_followed_at_any_depth(tmp_path, place):
    folder = files(tmp_path / "texts", "sub/a.txt") / place
    files(tmp_path, "other/deep/b.txt", "one.txt")
    other = os.path.relpath(tmp_path / "other", folder)
    links(folder, other=other, same=f"{other}/deep", one=f"{other}/../one.txt")
    expected = [os.path.join(place, name) for name in ("one", "other/deep/b.txt")]
    assert found(tmp_path / "texts") == sorted([*expected, "sub/a.txt"], key=lambda name: name.split("/"))


def test_a_link_to_what_is_hidden_is_followed(tmp_path):
    files(tmp_path, ".store/1", ".store/2")
    links(tmp_path, a=".store/1", b=".store/1")
    assert found(tmp_path) == ["a"]


def test_a_link_to_the_folder_itself_gives_no_text_twice(tmp_path):
    files(tmp_path, "a.txt", "b.txt")
    before = [name for name, _ in Source(str(tmp_path)).texts()]
    links(tmp_path, again=".")
    assert [name for name, _ in Source(str(tmp_path)).texts()] == before == ["a.txt", "b.txt"]


def test_stores_of_tokens_in_a_folder_are_no_texts(tmp_path):
    data = str(files(tmp_path / "texts", "a.txt", "sub/b.txt"))
    before = load_corpus(data).fingerprint
    for out in (tmp_path / "texts" / "tokens", tmp_path / "texts" / "sub" / "tokens"):
        store = write_store(Source(data), out, BYTES, "drawn")
        assert [store.name(number) for number in range(len(store))] == ["a.txt", "sub"]
        assert load_corpus(data).fingerprint == store.fingerprint == before


def test_runs_in_a_folder_are_no_texts(tmp_path):
    files(tmp_path, "a.txt", "sub/b.txt", "other/checkpoint/c.json", "other/metrics.jsonl")
    for out in (tmp_path / "runs" / "demo", tmp_path / "sub" / "run"):
        lock(out, "demo", resume=False).release()
        metrics_of(out).append({"step": 1})
        files(checkpoint_of(out), "checkpoint.json")
    assert found(tmp_path) == ["a.txt", "other/checkpoint/c.json", "other/metrics.jsonl", "sub/b.txt"]


@pytest.mark.parametrize("content", ['{"percent": 30}', "[]", "no JSON", '{"kind": "of ours"}'])
def test_files_that_are_called_like_ours_are_texts(tmp_path, content):
    files(tmp_path, "a.txt")
    for name in ("progress.json", "store.json"):
        (tmp_path / name).write_text(content)
    names = [document.name for document in load_corpus(str(tmp_path)).documents]
    assert names == ["a.txt", "progress.json", "store.json"]


def test_a_folder_that_cannot_be_listed_ends_a_command_with_its_name(tmp_path, monkeypatch, capsys):
    files(tmp_path / "texts", "a.txt", "sub/closed/b.txt")
    closed, listed = str(tmp_path / "texts" / "sub" / "closed"), os.scandir

    def scandir(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert main(["tokenize", str(tmp_path / "texts"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"memtrans tokenize: [Errno 13] Permission denied: '{closed}'\n"
