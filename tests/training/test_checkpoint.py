"""A checkpoint is whole at every moment, and says so when it is not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from memtrans import storage
from memtrans.training import checkpoint
from memtrans.training.checkpoint import INDEX, exists, load_checkpoint, save_checkpoint


def parts_of(number: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"weight": torch.full((4, 3), float(number)), "steps": torch.tensor(number)},
        "optimizer": {"0.moment": torch.arange(6, dtype=torch.float64).reshape(2, 3).T * number},
        "loop": {},
    }


def assert_holds(directory: Path, number: int) -> None:
    found = load_checkpoint(directory)
    assert found.values == {"step": number, "rows": [[1, 2]]}
    assert set(found.parts) == {"model", "optimizer", "loop"}
    for part, tensors in parts_of(number).items():
        assert set(found.parts[part]) == set(tensors)
        for name, tensor in tensors.items():
            assert found.parts[part][name].dtype == tensor.dtype
            assert torch.equal(found.parts[part][name], tensor)


def write(directory: Path, number: int) -> None:
    save_checkpoint(directory, parts_of(number), {"step": number, "rows": [[1, 2]]})


def test_a_checkpoint_holds_what_was_saved_in_files_of_safetensors_and_json_alone(tmp_path):
    write(tmp_path / "run" / "checkpoint", 3)
    assert_holds(tmp_path / "run" / "checkpoint", 3)
    assert {path.suffix for path in (tmp_path / "run" / "checkpoint").iterdir()} == {".json", ".safetensors"}


def test_a_new_checkpoint_takes_the_place_of_the_old_one_and_leaves_no_file_of_it(tmp_path):
    write(tmp_path, 1)
    files = {path.name for path in tmp_path.iterdir()}
    write(tmp_path, 2)
    assert_holds(tmp_path, 2)
    now = {path.name for path in tmp_path.iterdir()}
    assert len(now) == 4
    assert {name.split("-")[0] for name in now & files} == {INDEX, "loop"}  # no tensors: the same bytes


def test_saving_the_same_again_changes_nothing(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 1)
    assert_holds(tmp_path, 1)


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch, fails_at):
    write(tmp_path, 1)
    before = {path.name for path in tmp_path.iterdir()}
    calls = []

    def fill_up(path, content):
        calls.append(path)
        if len(calls) > fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        storage.write_atomically(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", fill_up)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path, 2)
    assert_holds(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def no_space(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path, 2)
    assert_holds(tmp_path, 1)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_first_checkpoint_that_fails_leaves_none(tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_atomically", fail)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path, 1)
    assert not exists(tmp_path)


def test_a_directory_that_cannot_be_made_is_what_the_error_says(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*checkpoint"):
        write(tmp_path / "checkpoint", 1)


def test_a_full_disk_is_what_the_error_says_where_the_previous_index_is_damaged(tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path, 1)
    damage(tmp_path / INDEX, "shorter")
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(checkpoint, "write_atomically", fail)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == before, "which of them belong to it is not known"


def test_what_an_interrupted_checkpoint_left_behind_is_removed_and_files_of_others_stay(tmp_path):
    write(tmp_path, 1)
    of_others = {"notes.txt", "adapter.safetensors", "model-00001-of-00002.safetensors", ".adapter.safetensors.x7"}
    left = {f"memories.3-{'0a' * 8}.safetensors", f".model-{'1b' * 8}.safetensors.x7", f".{INDEX}.abc"}
    for name in (*of_others, *left):
        (tmp_path / name).write_text("left")
    write(tmp_path, 2)
    found = {path.name for path in tmp_path.iterdir()}
    assert found >= of_others
    assert len(found - of_others) == 4


def test_whoever_reads_while_another_one_is_written_gets_one_of_them_whole(tmp_path, monkeypatch):
    """Twice a new checkpoint comes while the first part is read, which removes the files of the one before."""
    write(tmp_path, 1)
    read_file, numbers = checkpoint.read_file, [2, 3]

    def slowly(name, path, *most):
        content = read_file(name, path, *most)
        if name != INDEX and numbers:
            number = numbers.pop(0)
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "read_file", read_file)
                write(tmp_path, number)
        return content

    monkeypatch.setattr(checkpoint, "read_file", slowly)
    assert_holds(tmp_path, 3)


# ------------------------------------------------------------------------------------------------ damaged or foreign


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "shorter":
        path.write_bytes(content[: len(content) // 2])
    elif how == "a byte":
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["shorter", "a byte", "empty", "missing"])
def test_a_damaged_tensor_file_is_refused_by_name(tmp_path, how):
    write(tmp_path, 1)
    (path,) = tmp_path.glob("model-*.safetensors")
    damage(path, how)
    with pytest.raises(ValueError, match=rf"checkpoint must be whole, got .*{path.name}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("how", ["shorter", "a byte", "empty"])
def test_a_damaged_index_is_refused(tmp_path, how):
    write(tmp_path, 1)
    damage(tmp_path / INDEX, how)
    with pytest.raises(ValueError, match=r"checkpoint must .*, got .*checkpoint\.json"):
        load_checkpoint(tmp_path)


def test_a_changed_value_is_refused(tmp_path):
    write(tmp_path, 1)
    text = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).write_text(text.replace('"step": 1', '"step": 9'))
    with pytest.raises(ValueError, match="changed since it was written"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"kind": "of somebody else"}, "must be one of memtrans"),
        ([1, 2], "must be one of memtrans"),
        ({"kind": checkpoint.KIND, "version": 99}, "must be of version 1, got 99"),
    ],
)
def test_a_foreign_index_is_refused(tmp_path, index, message):
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    assert not exists(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"checkpoint must be a directory with checkpoint\.json, got"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------------- kills

WRITER = """
import sys, torch
from memtrans.training.checkpoint import save_checkpoint
number = 0
while True:
    number += 1
    tensors = {"weight": torch.full((300_000,), float(number))}
    save_checkpoint(sys.argv[1], {"model": tensors, "optimizer": tensors}, {"step": number})
    print(number, flush=True)
"""


def kill_a_writer(directory: Path, after: float) -> None:
    """Kills a process that writes one checkpoint after another; what it leaves is whole and is the newest or the
    next."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = int(process.stdout.readline())
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split()
    told = int(rest[-1]) if rest else told
    found = load_checkpoint(directory)
    assert found.values["step"] in (told, told + 1)
    for part in ("model", "optimizer"):
        assert (found.parts[part]["weight"] == found.values["step"]).all()
    write(directory, 5)
    assert_holds(directory, 5)


@pytest.mark.parametrize("after", [0.013, 0.05])
def test_a_kill_leaves_a_whole_checkpoint(tmp_path, after):
    kill_a_writer(tmp_path, after)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.007 * number for number in range(20)])
def test_twenty_kills_leave_twenty_whole_checkpoints(tmp_path, after):
    kill_a_writer(tmp_path, after)


def test_what_is_written_takes_the_place_of_no_device_and_no_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    storage.write_atomically(pipe, b"a page")
    assert (os.read(reader, 100), pipe.is_fifo()) == (b"a page", True)
    os.close(reader)
