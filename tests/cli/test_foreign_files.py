"""Checkpoints, models, memories and records that somebody made up: one line, by name, at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_runs import train, written_text

from memtrans import KNNMemory, KNNMemoryList, MemorizingTransformer
from memtrans.cli.main import main
from memtrans.storage import save_tensors
from memtrans.training import checkpoint
from memtrans.training.checkpoint import INDEX

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(60)]

DEEP = "[" * 10**6
SMALL: dict[str, Any] = {
    "num_tokens": 256, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "memorizing_layers": 2, "max_knn_memories": 50,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("made")
    assert train(folder / "run", "--data", written_text(folder), "--steps", "2") == 0
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def change(run: Path, alter: Callable[[dict[str, Any]], object]) -> None:
    """Changes what the checkpoint says, with the right digest."""
    path = run / "checkpoint" / INDEX
    index = json.loads(path.read_text())
    alter(index)
    del index["sha256"]
    path.write_text(json.dumps({**index, "sha256": checkpoint._digest(index)}))


def assert_refused(capsys: pytest.CaptureFixture[str], command: list[str], message: str) -> None:
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert len(error) < 2000


def commands(run: Path) -> dict[str, list[str]]:
    return {
        "train": ["train", "--resume", "--out", str(run), "--plain", "--steps", "3"],
        "eval": ["eval", "--out", str(run)],
        "generate": ["generate", "--checkpoint", str(run), "--tokens", "2"],
    }


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda index: index.update(files=[]), "checkpoint must name its files and values"),
        (lambda index: index.update(files={"model": 3}), "checkpoint must name its files and values"),
        (lambda index: index.update(values=[]), "checkpoint must name its files and values"),
        (lambda index: index.pop("values"), "checkpoint must name its files and values"),
        (lambda index: index["files"]["model"].update(name=7), "checkpoint must name its files and values"),
        (lambda index: index["files"]["model"].update(name="../x.safetensors"), "checkpoint must name its files"),
        (lambda index: index["values"].update(settings=[1]), "settings must be names with values, got [1]"),
        (lambda index: index["values"]["settings"].update(windows="no"), "windows must be of type bool, got 'no'"),
        (
            lambda index: index["values"]["settings"].update(layers=10**9),
            "layers must be at most 10000, got 10",
        ),
        (lambda index: index["values"]["settings"].update(layers=9999), "got others: "),
        (lambda index: index["values"]["settings"].update(width=10**9), "width must be at most 1048576, got 10"),
        (lambda index: index["values"]["settings"].update(width=2**20), "weights of this model, got others"),
        (lambda index: index["values"]["settings"].update(memory=10**30), "memory must be below 9223372036854775808"),
        (lambda index: index["values"]["settings"].update(clip=10**400), "clip must be below"),
        (lambda index: index["values"]["settings"].update(batch=10**8), "batch must be at most 65536, got 100000000"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval", "generate"])
def test_21_3_a_checkpoint_that_says_what_cannot_be_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, alter: Any, message: str
) -> None:
    change(run, alter)
    assert_refused(capsys, commands(run)[command], message)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        ({"ranks": "two"}, "ranks must be in [1, 2], as many as can share the batch, got 'two'"),
        ({"ranks": 10**18}, "ranks must be in [1, 2], as many as can share the batch, got 10"),
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"step": None}, "step must be an integer, got None"),
        ({"tokens": [3]}, "tokens must be an integer, got [3]"),
        ({"stream": 5}, "got another: TypeError"),
        ({"stream": {"taken": "x", "rows": [[0, 0], [0, 0]]}}, "state must hold numbers of documents"),
        ({"stream": {"taken": 3, "rows": [["a", 0], [0, 0]]}}, "state must hold numbers of documents"),
        ({"stream": {"taken": 3, "rows": [[0], [0, 0]]}}, "state must hold two numbers for each row"),
    ],
)
def test_21_3_a_position_that_no_run_has_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], alter: dict[str, Any], message: str
) -> None:
    change(run, lambda index: index["values"].update(alter))
    assert_refused(capsys, commands(run)["train"], message)


def test_21_3_an_xl_cache_that_is_longer_than_it_can_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, "--data", written_text(tmp_path), "--steps", "1", "--xl", "8") == 0
    held = checkpoint.load_checkpoint(out / "checkpoint")
    held.parts["xl"]["length"].fill_(9)
    checkpoint.save_checkpoint(out / "checkpoint", held.parts, held.values)
    assert_refused(capsys, commands(out)["train"], "state must hold lengths of XL caches in [0, 8], got [9, 9]")


@pytest.mark.parametrize("command", ["train", "eval", "generate"])
@pytest.mark.parametrize("kind", ["pipe", "device", "nested"])
def test_21_3_an_index_or_a_part_that_is_no_file_or_nests_without_end_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    (part,) = (run / "checkpoint").glob("model-*.safetensors")
    place = run / "checkpoint" / INDEX if kind == "nested" else part
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        place.write_text(DEEP)
    message = {"pipe": "a pipe", "device": "a device", "nested": "nests too deeply"}[kind]
    assert_refused(capsys, commands(run)[command], message)


# ------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    MemorizingTransformer(**SMALL).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"legacy": "no"}, "legacy must be of type bool, got 'no' in"),
        ({"dim": "16"}, "dim must be of type int, got '16' in"),
        ({"heads": True}, "heads must be of type int, got True in"),
        ({"memorizing_layers": ["x"]}, "memorizing_layers must be of type int | "),
        ({"attn_dropout": None}, "attn_dropout must be of type float, got None in"),
        ({"depth": 10**9}, "must hold weights of the model in config.json, got "),
        ({"dim": 2**40, "heads": 2**40}, "config.json"),
        ({"colour": 1}, "config.json must hold arguments of MemorizingTransformer, got others"),
    ],
)
def test_21_3_a_model_of_impossible_arguments_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], message: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changed}))
    assert_refused(capsys, ["generate", "--checkpoint", str(model)], message)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "nested"])
def test_21_3_a_model_whose_file_is_none_or_nests_without_end_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    place = model / name
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        place.write_text(DEEP)
    assert_refused(capsys, ["generate", "--checkpoint", str(model)], name)


# ----------------------------------------------------------------------------------------------------------- memories


def save_memories(path: Path, changed: dict[str, Any], state: dict[str, torch.Tensor] | None = None) -> None:
    memories = MemorizingTransformer(**SMALL).create_knn_memories(batch_size=1, device="cpu")
    configuration = {"layers": 1, **memories[0].configuration(), **changed}
    left = {name: value for name, value in configuration.items() if value != "left out"}
    save_tensors(path, {**memories.state_dict(), **(state or {})}, "memtrans.KNNMemoryList", left)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": 10**9}, "layers must be as many as the file holds memories, 1, got 1000000000"),
        ({"layers": "left out"}, "layers must be as many as the file holds memories, 1, got None"),
        ({"num_indices": 10**9}, "the file must hold keys of 1000000000 rows, as it says, got shape (1, 0, 8)"),
        ({"num_indices": "1"}, "num_indices must be of type int, got '1' in the file"),
        ({"max_memories": True}, "max_memories must be of type int, got True in the file"),
        ({"spare": 10**30}, "spare must be in [0, 9223372036854775808), got 10"),
        ({"dtype": 32}, "dtype must be of type str | None, got 32 in the file"),
        ({"dtype": "int3"}, "configuration must name dtypes of"),
        ({"dim": "left out"}, "configuration must hold dim, got none"),
        ({"device": "cpu"}, "configuration must hold dim, max_memories, num_indices, kv_heads, value_dim, spare"),
    ],
)
def test_21_3_memories_that_say_what_cannot_be_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], message: str
) -> None:
    save_memories(tmp_path / "memories", changed)
    command = ["generate", "--checkpoint", str(model), "--memories", str(tmp_path / "memories")]
    assert_refused(capsys, command, message)


@pytest.mark.parametrize("state", [{"0.keys": torch.ones(1, 2, 8).long()}, {"0.lengths": torch.tensor([9])}])
def test_21_3_memories_that_hold_what_cannot_be_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], state: dict[str, torch.Tensor]
) -> None:
    save_memories(tmp_path / "memories", {}, state)
    command = ["generate", "--checkpoint", str(model), "--memories", str(tmp_path / "memories")]
    assert_refused(capsys, command, next(iter(state)).partition(".")[2])


@pytest.mark.parametrize("kind", ["pipe", "device", "nested"])
def test_21_3_a_memory_whose_file_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "memory"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        save_tensors(place, {"keys": torch.zeros(1)}, "memtrans.KNNMemory", {})
        header = json.dumps({"__metadata__": {"kind": "memtrans.KNNMemory", "configuration": DEEP}}).encode()
        place.write_bytes(len(header).to_bytes(8, "little") + header)
    for load in (KNNMemory.load, KNNMemoryList.load):
        with pytest.raises(ValueError, match=r"path must (be a regular file|name a file)"):
            load(place)


# ------------------------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (DEEP, "metrics.jsonl must hold a JSON object with a step in each line"),
        ('{"step": true}', "metrics.jsonl must hold a JSON object with a step in each line"),
        ('{"step": 1, "bits_per_byte": "x"}', "metrics.jsonl must hold a number as bits_per_byte, got 'x' in 1"),
        ('{"step": 1, "bits_per_byte": 1' + "0" * 400 + "}", "metrics.jsonl must hold a number as bits_per_byte"),
    ],
)
def test_21_3_a_record_that_no_run_wrote_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (run / "metrics.jsonl").write_text(line + "\n")
    assert_refused(capsys, commands(run)["train"], message)


def test_21_3_a_record_that_is_a_pipe_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    assert_refused(capsys, commands(run)["train"], "metrics must be a regular file, got")
