"""`eval --data`: all of a text that the run did not learn from, and what is held out of its own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from memtrans.cli.main import main
from memtrans.training import start
from memtrans.training.checkpoint import INDEX, load_checkpoint, save_checkpoint
from tests.helpers.tiny_runs import last_line, train, uneven_documents, written_text
from tests.helpers.vocabularies import learned


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    assert train(directory / "run", "--data", written_text(directory), "--steps", "2") == 0
    return directory / "run"


def report(capsys, *options: str) -> dict:
    assert main(["eval", *options]) == 0
    return last_line(capsys)


def test_all_of_another_text_is_scored(run, tmp_path, capsys):
    (tmp_path / "other.txt").write_bytes(b"another text, of which every byte counts. " * 100)
    found = report(capsys, "--out", str(run), "--data", str(tmp_path / "other.txt"))
    assert (found["split"], found["eval_scored_bytes"]) == ("all", 4199)


def test_eval_bytes_bounds_another_text(run, tmp_path, capsys):
    (tmp_path / "other.txt").write_bytes(b"another text, of which every byte counts. " * 100)
    found = report(capsys, "--out", str(run), "--data", str(tmp_path / "other.txt"), "--eval-bytes", "500")
    assert 500 <= found["eval_scored_bytes"] < 600


def test_a_split_of_another_text_is_scored_where_it_is_named(run, tmp_path, capsys):
    (tmp_path / "other.txt").write_bytes(b"another text, of which every byte counts. " * 100)
    found = report(
        capsys,
        "--out",
        str(run),
        "--data",
        str(tmp_path / "other.txt"),
        "--split",
        "validation",
        "--eval-bytes",
        "9000",
    )
    assert (found["split"], found["eval_scored_bytes"]) == ("validation", 419)


def test_the_runs_own_text_stays_its_held_out_part_wherever_it_is_and_whatever_its_name(run, tmp_path, capsys):
    (tmp_path / "moved" / "below").mkdir(parents=True)
    copy = Path(written_text(tmp_path / "moved" / "below"))
    renamed = copy.with_name("a copy.md")
    renamed.write_bytes(copy.read_bytes())
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(copy.read_bytes()))
    own = report(capsys, "--out", str(run))
    for data in (copy, renamed, packed):
        named = report(capsys, "--out", str(run), "--data", str(data))
        assert own["split"] == named["split"] == "validation"
        assert own["eval_bits_per_byte"] == named["eval_bits_per_byte"]


def test_several_texts_of_the_runs_under_other_names_are_refused(tmp_path, capsys):
    """Names say which of them are held out: others would hold out what the run learned from."""
    data = Path(uneven_documents(tmp_path / "texts"))
    assert train(tmp_path / "run", "--data", str(data), "--steps", "1") == 0
    (data / "0.txt").rename(data / "zero.txt")
    for command in (["eval", "--data", str(data)], ["train", "--resume", "--data", str(data)]):
        assert main([*command, "--out", str(tmp_path / "run")]) == 2
        assert "data must have the names with which the run read them" in capsys.readouterr().err


def test_another_text_needs_no_part_to_hold_out(run, tmp_path, capsys):
    (tmp_path / "two.txt").write_bytes(b"ab")
    found = report(capsys, "--out", str(run), "--data", str(tmp_path / "two.txt"))
    assert (found["split"], found["eval_scored_bytes"]) == ("all", 1)


def test_other_texts_of_one_token_each_are_refused_in_a_line(tmp_path, capsys):
    vocabulary = tmp_path / "tokenizer.json"
    vocabulary.write_bytes(learned(300).content)
    options = ["--tokenizer", str(vocabulary), "--steps", "1"]
    assert train(tmp_path / "run", "--data", written_text(tmp_path), *options) == 0
    (tmp_path / "words").mkdir()
    for number, word in enumerate(("the", " fox")):
        assert len(learned(300).encode(word.encode())) == 1
        (tmp_path / "words" / str(number)).write_bytes(word.encode())
    capsys.readouterr()
    assert main(["eval", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "words")]) == 2
    assert "data must hold text of at least 2 tokens, got none in" in capsys.readouterr().err
    assert train(tmp_path / "another", "--data", str(tmp_path / "words"), *options) == 2
    assert "data must hold text of at least 2 tokens to learn from, got none" in capsys.readouterr().err


def test_a_text_that_changed_since_is_told(run, tmp_path, capsys):
    assert train(tmp_path / "run", "--data", written_text(tmp_path), "--steps", "1") == 0
    with (tmp_path / "text.txt").open("ab") as file:
        file.write(b"and more")
    with pytest.warns(UserWarning, match="changed since the run read them"):
        assert report(capsys, "--out", str(tmp_path / "run"))["split"] == "validation"


def test_a_run_from_before_resumes_as_it_would_have_gone_on(tmp_path, monkeypatch):
    """Of 48195b5's rows each read the same book from its beginning."""
    text = written_text(tmp_path)

    def as_before(settings, split="validation", reading=1):
        return opened(settings, split, 1)

    opened = start.open_data
    with monkeypatch.context() as patch:
        patch.setattr(start, "open_data", as_before)
        for name, steps in (("whole", "6"), ("cut", "3")):
            assert train(tmp_path / name, "--data", text, "--steps", steps, "--warmup", "2", "--log-every", "1") == 0
    checkpoint = load_checkpoint(tmp_path / "cut" / "checkpoint")
    values = {name: value for name, value in checkpoint.values.items() if name != "reading"}
    save_checkpoint(tmp_path / "cut" / "checkpoint", checkpoint.parts, values)
    assert "reading" not in json.loads((tmp_path / "cut" / "checkpoint" / INDEX).read_text())["values"]
    assert train(tmp_path / "cut", "--resume", "--steps", "6") == 0
    assert (
        load_checkpoint(tmp_path / "cut" / "checkpoint").values["stream"]
        == (load_checkpoint(tmp_path / "whole" / "checkpoint").values["stream"])
    )


def test_a_way_of_reading_that_is_not_known_is_refused(run, tmp_path, capsys):
    checkpoint = load_checkpoint(run / "checkpoint")
    save_checkpoint(tmp_path / "checkpoint", checkpoint.parts, {**checkpoint.values, "reading": 3})
    for command in (["eval", "--out", str(tmp_path)], ["train", "--resume", "--out", str(tmp_path)]):
        assert main(command) == 2
        assert "reading must be in [1, 2], as this version can read data, got 3" in capsys.readouterr().err
