"""State and files of a memory: what comes back, what is refused, and that a failure loses nothing."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.memories import filled, held, pairs
from safetensors.torch import save_file
from torch import Tensor

from memtrans import KNNMemory, KNNMemoryList
from memtrans.storage import save_tensors


def test_a_saved_memory_comes_back_with_its_configuration(tmp_path: Path) -> None:
    memory = filled(kv_heads=1, dtype=torch.float16, value_dtype=torch.bfloat16, spare=7)
    memory.clear([0])
    memory.save(tmp_path / "memory")
    loaded = KNNMemory.load(tmp_path / "memory")
    assert held(loaded) == [[], [1, 2, 3]]
    assert (loaded.shape, loaded.spare) == (memory.shape, 7)
    assert (loaded.state_dict()["keys"].dtype, loaded.state_dict()["values"].dtype) == (torch.float16, torch.bfloat16)
    assert held(KNNMemory.load(str(tmp_path / "memory"), max_memories=2)) == [[], [2, 3]]


def test_a_memory_that_never_saw_a_tensor_can_be_saved_too(tmp_path: Path) -> None:
    KNNMemory(2, 4, 3, value_dtype=torch.float16).save(tmp_path / "memory")
    loaded = KNNMemory.load(tmp_path / "memory")
    assert loaded.lengths.tolist() == [0, 0, 0]
    assert (loaded.device, loaded.dtype, loaded.value_dtype) == (None, None, torch.float16)
    loaded.add(pairs(1, batch=3))
    assert loaded.state_dict()["values"].dtype == torch.float16


def test_a_dtype_that_nobody_chose_is_not_chosen_by_a_file(tmp_path: Path) -> None:
    """So what a CPU wrote is float16 on a GPU, and the other way round, as in a memory that was filled there."""
    memory = filled()
    memory.save(tmp_path / "memory")
    KNNMemoryList([memory, memory]).save(tmp_path / "list")
    for loaded in (KNNMemory.load(tmp_path / "memory"), *KNNMemoryList.load(tmp_path / "list")):
        assert (loaded.dtype, loaded.value_dtype) == (None, None)
        assert held(loaded) == [[1, 2, 3]] * 2
    state = memory.state_dict()
    half = {"keys": state["keys"].half(), "values": state["values"].half(), "lengths": state["lengths"]}
    save_tensors(tmp_path / "of a GPU", half, "memtrans.KNNMemory", memory.configuration())
    loaded = KNNMemory.load(tmp_path / "of a GPU")
    assert held(loaded) == [[1, 2, 3]] * 2
    assert loaded.state_dict()["keys"].dtype == torch.float32


def test_a_file_that_says_no_dtype_keeps_what_it_holds(tmp_path: Path) -> None:
    """As they were written before a configuration had dtypes."""
    memory = filled(dtype=torch.float16, value_dtype=torch.bfloat16)
    names = ("dim", "max_memories", "num_indices", "kv_heads", "spare")
    before = {name: getattr(memory, name) for name in names}
    save_tensors(tmp_path / "memory", memory.state_dict(), "memtrans.KNNMemory", before)
    loaded = KNNMemory.load(tmp_path / "memory")
    assert (loaded.dtype, loaded.value_dtype) == (torch.float16, torch.bfloat16)
    default = KNNMemory.load(tmp_path / "memory", dtype=None, value_dtype=None)
    assert default.state_dict()["values"].dtype == torch.float32
    assert held(loaded) == held(default) == [[1, 2, 3]] * 2
    foreign = {**before, "dtype": "int8"}
    save_tensors(tmp_path / "memory", memory.state_dict(), "memtrans.KNNMemory", foreign)
    with pytest.raises(ValueError, match=r"configuration must name dtypes of float32, .*, got \{'int8'\}"):
        KNNMemory.load(tmp_path / "memory")


def test_a_memory_that_has_no_device_takes_that_of_the_entries_it_loads_if_there_are_any() -> None:
    memory = KNNMemory(2, 4, 2)
    memory.load_state_dict(KNNMemory(2, 4, 2).state_dict())
    assert memory.device is None
    memory.load_state_dict(filled().state_dict())
    assert memory.device == torch.device("cpu")
    elsewhere = torch.zeros(2, 1, 2, 2, device="meta")
    with pytest.raises(ValueError, match=r"lives on cpu, got a tensor on meta: memory.to\('meta'\) moves it"):
        memory.add(elsewhere)


def test_a_memory_that_holds_entries_forgets_them_for_an_empty_state() -> None:
    memory = filled()
    memory.load_state_dict(KNNMemory(2, 4, 2).state_dict())
    assert held(memory) == [[], []]


def test_the_state_of_a_larger_or_smaller_memory_keeps_the_newest() -> None:
    state = filled().state_dict()
    for capacity, kept in ((1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (10, [1, 2, 3])):
        memory = KNNMemory(2, capacity, 2)
        memory.load_state_dict(state)
        assert held(memory) == [kept, kept]
        memory.add(pairs(4, batch=2))
        assert held(memory) == [[1, 2, 3, 4][-capacity:]] * 2


def test_a_wider_state_saturates_in_a_narrower_memory() -> None:
    wide = KNNMemory(2, 4)
    wide.add(pairs(1e6))
    narrow = KNNMemory(2, 4, dtype=torch.float16)
    narrow.load_state_dict(wide.state_dict())
    assert held(narrow) == [[65504]]


def test_loading_keeps_the_scope_and_replaces_every_document() -> None:
    memory, state = filled(3), filled(3).state_dict()
    with memory.at_batch_indices([1]):
        memory.add(pairs(9))
        memory.load_state_dict(state)
        assert memory.scoped_indices == [1]
        assert held(memory) == [[1, 2, 3]]
    assert held(memory) == [[1, 2, 3]] * 3


def test_a_list_of_memories_goes_through_its_state() -> None:
    memories, loaded = (KNNMemoryList([filled(), filled()]) for _ in range(2))
    memories[1].add(pairs(8, batch=2))
    loaded.load_state_dict(memories.state_dict())
    assert [held(memory) for memory in loaded] == [[[1, 2, 3]] * 2, [[1, 2, 3, 8]] * 2]


def changed(**fields: Any) -> dict[str, Tensor]:
    return {**filled().state_dict(), **fields}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            filled(dim=2, batch=3).state_dict(),
            ValueError,
            r"keys and values of shape \(2, entries, 2\).* got \(3, 3, 2\)",
        ),
        (KNNMemory(5, 4, 2).state_dict(), ValueError, r"shape \(2, entries, 2\) .* got \(2, 0, 5\)"),
        (KNNMemory(2, 4, 2, kv_heads=2).state_dict(), ValueError, r"shape \(2, entries, 2\) .* got \(4, 0, 2\)"),
        (changed(values=torch.zeros(2, 1, 2)), ValueError, r"shape .* got \(2, 3, 2\), \(2, 1, 2\)"),
        (changed(lengths=torch.tensor([3, 4])), ValueError, r"lengths must be in \[0, 3\], got \[3, 4\]"),
        (changed(lengths=torch.tensor([-1, 0])), ValueError, r"lengths must be in \[0, 3\], got \[-1, 0\]"),
        (changed(lengths=torch.tensor([1.0, 0.5])), TypeError, "lengths must be torch.int64, got torch.float32"),
        (changed(keys=torch.zeros(2, 3, 2).long()), TypeError, "keys must be floating point, got torch.int64"),
        ({"keys": torch.zeros(2, 3, 2)}, ValueError, r"got none of \['lengths', 'values'\]"),
        (changed(values=[1.0]), TypeError, "values must be a torch.Tensor, got list"),
        ([1], TypeError, "state must be a mapping of names to tensors, got list"),
        (changed(values=torch.full((2, 3, 2), torch.nan)), ValueError, "values must be numbers .* got NaN"),
        (changed(clearings=torch.tensor([1])), ValueError, r"clearings must be counts of shape \(2,\), got \[1\]"),
        (changed(clearings=torch.tensor([1, -1])), ValueError, r"clearings must be counts .* got \[1, -1\]"),
        (changed(clearings=torch.zeros(2)), TypeError, "clearings must be torch.int64, got torch.float32"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_lost(
    state: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    memory = filled()
    with pytest.raises(error, match=message):
        memory.load_state_dict(state)
    assert held(memory) == [[1, 2, 3]] * 2


@pytest.mark.parametrize("where", ["filler", "beside a key that is never found"])
def test_21_13_a_value_that_no_search_finds_may_be_anything(where: str) -> None:
    state = {name: tensor.clone() for name, tensor in filled().state_dict().items()}
    state["values"][:, 0] = torch.nan
    if where == "filler":
        state["lengths"] -= 1
    else:
        state["keys"][:, 0] = torch.inf
    memory = filled()
    memory.load_state_dict(state)
    key_values, mask = memory.search(torch.ones(2, 1, 2), topk=3)
    assert key_values[mask].isfinite().all() and int(mask.sum()) == 4


def test_a_list_refuses_another_number_of_memories_and_loads_all_or_none() -> None:
    memories = KNNMemoryList([filled(), filled()])
    with pytest.raises(ValueError, match=r"memories 0 to 1, got \['0'\]"):
        memories.load_state_dict(KNNMemoryList([filled()]).state_dict())
    other = KNNMemoryList([KNNMemory(2, 4, 2), filled(3)])
    with pytest.raises(ValueError, match=r"shape \(2, entries, 2\)"):
        memories.load_state_dict(other.state_dict())
    assert [held(memory) for memory in memories] == [[[1, 2, 3]] * 2] * 2


def test_a_missing_a_damaged_and_a_foreign_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    with pytest.raises(FileNotFoundError, match=r"path must name a file .*memory', which does not exist"):
        KNNMemory.load(path)
    filled().save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], b"not a memory at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"path must name a whole safetensors file, got .*memory'"):
            KNNMemory.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"path must name a file written as memtrans.KNNMemory, got .* of None"):
        KNNMemory.load(path)
    with pytest.raises(ValueError, match="path must name a whole safetensors file"):
        KNNMemory.load(tmp_path)
    save_file({"weight": torch.ones(2)}, path, {"kind": "memtrans.KNNMemory"})
    with pytest.raises(ValueError, match=r"path must name a file with a JSON configuration, got .*memory'"):
        KNNMemory.load(path)
    save_file({"weight": torch.ones(2)}, path, {"kind": "memtrans.KNNMemory", "configuration": "{}"})
    with pytest.raises(ValueError, match="state must hold keys, values and lengths, got none of"):
        KNNMemory.load(path)


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "memory"
    filled().save(path)
    newer = filled()
    newer.add(pairs(9, batch=2))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if failing == "write":
        real = os.fdopen

        def fdopen(*arguments: Any) -> Any:
            file = real(*arguments)
            return type(
                "Full", (), {"write": full, "__enter__": lambda self: self, "__exit__": lambda *_: file.close()}
            )()

        monkeypatch.setattr(os, "fdopen", fdopen)
    else:
        monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        newer.save(path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["memory"]
    assert held(KNNMemory.load(path)) == [[1, 2, 3]] * 2


def test_a_saved_file_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    plain, saved = tmp_path / "plain", tmp_path / "memory.safetensors"
    plain.write_bytes(b"")
    filled().save(saved)
    assert saved.stat().st_mode == plain.stat().st_mode


def test_21_9_load_on_an_instance_names_what_was_meant(tmp_path: Path) -> None:
    memory = filled()
    memory.save(tmp_path / "memory")
    memories = KNNMemoryList([filled()])
    memories.save(tmp_path / "list")
    with pytest.raises(TypeError, match=r"write KNNMemory\.load\(path\), or load_state_dict\(state\)"):
        memory.load(tmp_path / "memory")
    with pytest.raises(TypeError, match=r"write KNNMemoryList\.load\(path\), or load_state_dict\(state\)"):
        memories.load(tmp_path / "list", device="cpu")
    assert held(KNNMemory.load(tmp_path / "memory")) == held(memory)
    assert isinstance(KNNMemoryList.load(tmp_path / "list"), KNNMemoryList)


def test_21_9_save_makes_directories_that_are_missing(tmp_path: Path) -> None:
    filled().save(tmp_path / "one" / "more" / "memory")
    KNNMemoryList([filled()]).save(str(tmp_path / "another" / "list"))
    assert held(KNNMemory.load(tmp_path / "one" / "more" / "memory")) == [[1, 2, 3]] * 2
    assert len(KNNMemoryList.load(tmp_path / "another" / "list")) == 1


def test_21_16_a_pickled_memory_lives_where_its_tensors_are_loaded_to() -> None:
    """`torch.load(path, map_location="cpu")` of what a GPU held moves the tensors, not what is said beside them."""
    memory = filled()
    pickled = {**memory.__getstate__(), "device": torch.device("cuda")}
    moved = KNNMemory.__new__(KNNMemory)
    moved.__setstate__(pickled)
    assert moved.device == torch.device("cpu")
    assert held(moved) == held(memory)


def test_21_16_a_file_that_was_pickled_on_a_gpu_loads_with_map_location(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here without a GPU: the tensors in the file are marked as one's, and the memory says that it lives there."""
    memories = KNNMemoryList([filled(), KNNMemory(2, 4, 2)])
    memories[0].clear([1])
    file = io.BytesIO()
    with monkeypatch.context() as context:
        context.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        context.setattr(KNNMemory, "device", property(lambda memory: memory._ring and torch.device("cuda:0")))
        torch.save(memories, file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=False)
    assert [memory.device for memory in loaded] == [torch.device("cpu"), None]
    assert held(loaded[0]) == held(memories[0]) == [[1, 2, 3], []]
    for memory in loaded:
        memory.add(pairs(4, batch=2))
    assert [held(memory) for memory in loaded] == [[[1, 2, 3, 4], [4]], [[4]] * 2]
