"""A memory's file of another form is taken up in its form; one that does not fit is refused with what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_families import made, tokens
from torch import Tensor

from memtrans.hf import ModelMemory, add_memory, load_memory
from memtrans.hf.layer_memory import FORMS
from memtrans.hf.saved import ENTRIES, KIND, WEIGHTS
from memtrans.storage import load_tensors, save_tensors

SIZES: dict[str, Any] = {"max_memories": 100, "k": 8, "segment": 16}
QUESTION = tokens(length=6, seed=2)
OF_ENTRIES = "memtrans.hf.Entries"
Edit = Callable[[dict[str, Tensor], dict[str, Any]], object]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(QUESTION).logits
    return logits


def calibrated(model: Any, form: str, seed: int = 0) -> ModelMemory:
    """A memory that has read something, with other numbers than zeros for all that its form learns."""
    memory = add_memory(model, **SIZES)
    torch.manual_seed(seed)
    for layer in memory.layers.values():
        layer.learned.learn_to_ask(form)
        for parameter in layer.learned.parameters():
            parameter.data.normal_(std=0.3)
    memory.read(tokens(length=30, seed=seed), progress=False)
    return memory


@pytest.mark.parametrize("theirs", FORMS)
@pytest.mark.parametrize("ours", FORMS)
def test_what_is_loaded_has_the_form_that_was_saved(ours: str, theirs: str, tmp_path: Path) -> None:
    saved, model = made("llama"), made("llama")
    calibrated(saved, theirs).save(tmp_path)
    memory = calibrated(model, ours, seed=1)
    memory.load(tmp_path)
    assert torch.equal(logits_of(model), logits_of(saved))
    assert len(memory.parameters()) == 2 * (2 + len(FORMS[theirs]))


def test_a_form_that_stays_keeps_its_parameters(tmp_path: Path) -> None:
    memory = calibrated(made("llama"), "gain")
    memory.save(tmp_path)
    before = memory.parameters()  # an optimiser may hold them
    memory.load(tmp_path)
    assert all(mine is its for mine, its in zip(memory.parameters(), before, strict=True))


def test_a_memory_that_forgot_everything_is_saved_without_what_it_held(tmp_path: Path) -> None:
    memory = calibrated(made("llama"), "offset")
    memory.save(tmp_path)
    memory.reset()
    memory.save(tmp_path)
    assert load_memory(made("llama"), tmp_path).lengths.tolist() == []


def test_entries_that_were_saved_without_ids_have_none(tmp_path: Path) -> None:
    model = made("llama")
    without = add_memory(model, **SIZES, keep_ids=False)
    without.read(tokens(length=30), progress=False)
    without.save(tmp_path)
    memory = load_memory(made("llama"), tmp_path, keep_ids=True)
    memory.read(tokens(length=5), progress=False)
    with pytest.raises(ValueError, match="keep_ids must be True from the first token on"):
        memory.ids(0)


def test_a_reader_that_was_kept_is_not_asked_with_former_parameters(tmp_path: Path) -> None:
    calibrated(made("llama"), "mix").save(tmp_path)
    (tmp_path / ENTRIES).unlink()
    memory = calibrated(made("llama"), "gain")
    with memory.reading_again():
        memory.read(tokens(length=30), progress=False)
        before = memory._readers.kept
        memory.load(tmp_path)
        memory.read(tokens(length=30), progress=False)
        assert before is not None and memory._readers.kept is not before


WRONG_WEIGHTS: list[tuple[Edit, str]] = [
    (lambda t, c: t.update({"1.memory_gain": torch.ones(4, 9)}),
     r"layer 1 .* memory_gain must hold .* of shape \(4, 8\), got torch.float32 of shape \(4, 9\)"),
    (lambda t, c: t.update({"0.memory_across": torch.ones(8, 8)}), r"memory_across must hold .* \(32, 32\)"),
    (lambda t, c: t.update({"0.memory_offset": torch.ones(4, dtype=torch.int64)}), "memory_offset .* torch.int64"),
    (lambda t, c: t.update({"0.memory_slopes": torch.ones(4)}), "layer 0 .* got .*memory_slopes"),
    (lambda t, c: t.update({"7.memory_slope": torch.ones(4)}), r"layers \[0, 1\], got 7.memory_slope"),
    (lambda t, c: t.pop("1.memory_slope"), "state must hold memory_offset and memory_slope"),
    (lambda t, c: t.pop("1.memory_gain"), "all that one of the forms"),
    (lambda t, c: c.update(layers=[1, 0]), r"layers \[0, 1\], got \[1, 0\]"),
    (lambda t, c: c.pop("layers"), r"layers \[0, 1\], got None"),
]  # fmt: skip
WRONG_ENTRIES: list[tuple[Edit, str]] = [
    (lambda t, c: c.update(documents=10**15), "documents must be how many .* got 10{15}"),
    (lambda t, c: c.update(documents="2"), "documents must be how many .* got '2'"),
    (lambda t, c: c.update(documents=0), "documents must be how many"),
    (lambda t, c: c.clear(), "documents must be how many .* got None"),
    (lambda t, c: t.update(read=torch.zeros(3, dtype=torch.int64)), r"read must be int64 of shape \(2,\)"),
    (lambda t, c: t.update(read=torch.zeros(2)), r"read must be int64 .* got torch.float32"),
    (lambda t, c: t.update({"ids.keys": torch.zeros(2, 5, 1)}), "state must hold keys"),
    (lambda t, c: t.update({"1.keys": t["1.keys"][:, :, :4].clone()}), "state must hold keys"),
    (lambda t, c: t.pop("1.lengths"), "none of .*lengths"),
]


def edited(path: Path, kind: str, edit: Edit) -> None:
    tensors, configuration = load_tensors(path, kind)
    edit(tensors, configuration)
    save_tensors(path, tensors, kind, configuration)


@pytest.mark.parametrize(
    ("name", "kind", "edit", "message"),
    [
        *((WEIGHTS, KIND, edit, message) for edit, message in WRONG_WEIGHTS),
        *((ENTRIES, OF_ENTRIES, edit, message) for edit, message in WRONG_ENTRIES),
    ],
)
def test_a_crafted_file_is_refused_and_nothing_has_changed(
    name: str, kind: str, edit: Edit, message: str, tmp_path: Path
) -> None:
    calibrated(made("llama"), "mix").save(tmp_path)
    edited(tmp_path / name, kind, edit)
    model = made("llama")
    memory = calibrated(model, "offset", seed=1)
    before, held = logits_of(model), memory.parameters()
    with pytest.raises(ValueError, match=message):
        memory.load(tmp_path)
    assert torch.equal(logits_of(model), before)
    assert all(mine is its for mine, its in zip(memory.parameters(), held, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
        ({"widths": 3, "eval": 1}, "settings must be arguments of add_memory, got eval, widths"),
    ],
)
def test_settings_that_no_memory_has_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    calibrated(made("llama"), "offset").save(tmp_path)
    edited(tmp_path / WEIGHTS, KIND, lambda tensors, configuration: configuration.update(changes))
    with pytest.raises(ValueError, match=message):
        load_memory(made("llama"), tmp_path)
