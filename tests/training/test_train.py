"""Steps, their schedule, and a run's state between two of them."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from pathlib import Path

import pytest
import torch
from helpers.checks import SAME_CURVE
from helpers.devices import default_dtype
from helpers.small_runs import SMALL, VARIANTS, advance, assert_same_state, checkpoint_of, row_tokens, trainer_of

from memtrans.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from memtrans.training.data import TrainingData, open_data
from memtrans.training.device import pick_device
from memtrans.training.trainer import Trainer


@pytest.mark.filterwarnings("ignore:data .* holds out")
@pytest.mark.parametrize("variant", ["several backward passes before one step", "adafactor", "muon"])
def test_21_16_a_step_is_the_same_whatever_the_default_dtype_is(variant, text):
    """Of a model that was made before: what comes without a dtype is a sum of losses, a share, a count."""
    losses = []
    settings = dataclasses.replace(VARIANTS[variant], data=text, segment=101)  # bfloat16 counts to 256
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        trainer = trainer_of(settings)
        with default_dtype(dtype):
            advance(trainer, 3)
            losses.append(trainer.check())
    assert losses[0].dtype == torch.float32
    assert all(torch.equal(of_dtype, losses[0]) for of_dtype in losses)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_was_saved_and_resumed_equals_one_that_was_not_bit_for_bit(text, tmp_path_factory, variant):
    settings = dataclasses.replace(VARIANTS[variant], data=text)
    through = trainer_of(settings)
    advance(through, 10)

    stopped = trainer_of(settings)
    advance(stopped, 4)
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory, *stopped.state())
    torch.manual_seed(999)
    resumed = trainer_of(settings)
    resumed.restore(load_checkpoint(directory))
    advance(resumed, 6)
    assert_same_state(resumed, through)
    assert resumed.report() == through.report()


@pytest.mark.parametrize("data", ["recall", "windows"])
def test_the_other_orders_resume_bit_for_bit_too(text, data):
    changes = {"data": "recall"} if data == "recall" else {"data": text, "windows": True}
    settings = dataclasses.replace(SMALL, **changes)
    through, stopped = trainer_of(settings), trainer_of(settings)
    advance(through, 7)
    advance(stopped, 5)
    resumed = trainer_of(settings)
    resumed.restore(checkpoint_of(stopped))
    advance(resumed, 2)
    assert_same_state(resumed, through)


def test_the_same_seed_gives_the_same_run_and_another_one_another(text):
    runs = []
    for seed in (0, 0, 1):
        trainer = trainer_of(dataclasses.replace(SMALL, data=text, seed=seed))
        advance(trainer, 3)
        runs.append(trainer.model.state_dict()["token_emb.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_training_lowers_the_loss(text):
    trainer = trainer_of(dataclasses.replace(SMALL, data=text, steps=60, learning_rate=1e-2))
    advance(trainer, 1)
    first = trainer.report()["bits_per_byte"]
    advance(trainer, 59)
    last = trainer.report()["bits_per_byte"]
    assert first > 6
    assert last < 4.5


def test_memories_live_on_across_steps_and_end_with_their_document(text):
    trainer = trainer_of(dataclasses.replace(SMALL, data=text, memory=500))
    held = []
    for _ in range(8):
        fresh_before = [row.index for row in trainer.loader.stream._rows]
        trainer.advance()
        lengths = trainer.reader.memories[0].lengths.tolist()
        for row, length in enumerate(lengths):
            state = trainer.loader.stream._rows[row]
            assert length == state.offset
        held.append((fresh_before, lengths))
    assert any(length > SMALL.segment for _, lengths in held for length in lengths)


def test_windows_clear_every_memory_after_their_segments(text):
    settings = dataclasses.replace(SMALL, data=text, windows=True, window_segments=2, memory=500)
    trainer = trainer_of(settings)
    lengths = []
    for _ in range(4):
        trainer.advance()
        lengths.append(trainer.reader.memories[0].lengths.tolist())
    assert lengths == [[32] * 3, [64] * 3, [32] * 3, [64] * 3]


def test_kept_memories_outlive_their_documents(text):
    trainer = trainer_of(dataclasses.replace(SMALL, data=text, memory=2000, keep_memory=True))
    for _ in range(20):
        trainer.advance()
    assert [int(length) for length in trainer.reader.memories[0].lengths] == [
        row_tokens(trainer, row) for row in (0, 1, 2)
    ]
    assert trainer.loader.stream._taken > 3, "no document has ended"


def test_several_segments_before_one_backward_learn_from_all_of_them(text):
    """Two segments at once weigh what two backward passes weigh: the memory is never differentiated."""
    together = trainer_of(dataclasses.replace(SMALL, data=text, segments=2))
    apart = trainer_of(dataclasses.replace(SMALL, data=text, accumulate=2))
    for trainer in (together, apart):
        trainer.advance()
    left, right = together.report(), apart.report()
    assert left["tokens"] == right["tokens"]
    assert left["bits_per_byte"] == pytest.approx(right["bits_per_byte"])
    assert left["gradient_norm"] == pytest.approx(right["gradient_norm"])


# ---------------------------------------------------------------------------------------------------------- bad input


def test_other_data_than_the_checkpoints_is_refused(text):
    settings = dataclasses.replace(SMALL, data=text)
    checkpoint = checkpoint_of(trainer_of(settings))
    data = open_data(settings)
    changed = Trainer(settings, TrainingData(data.order, data.held_out, "another"), torch.device("cpu"))
    with pytest.raises(ValueError, match="data must be what the checkpoint was trained on"):
        changed.restore(checkpoint)


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("optimizer", None, "checkpoint must be one that a run with its settings wrote, got another: KeyError: 'optim"),
        ("optimizer", {"weight": torch.ones(1)}, r"this model's moments, weight of shape None, got \(1,\)"),
        ("optimizer", {"0.step": torch.ones(())}, r"this model's moments, 0.exp_avg of shape \(.*\), got None"),
        ("memories", {"a": torch.ones(1)}, r"state must hold memories 0 to 0, got \['a'\]"),
        ("loop", {"pending": torch.zeros(0, 2)}, "checkpoint must be one that .* got another: KeyError: 'random.cpu'"),
    ],
)
def test_a_checkpoint_whose_parts_are_not_a_runs_is_refused(text, part, changed, message):
    trainer = trainer_of(dataclasses.replace(SMALL, data=text))
    trainer.advance()
    parts, values = trainer.state()
    parts = {name: tensors for name, tensors in {**parts, part: changed}.items() if tensors is not None}
    with pytest.raises(ValueError, match=message):
        trainer_of(trainer.settings).restore(Checkpoint(parts, values))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": "3"}, "got another: TypeError: step must be an integer, got '3'"),
        ({"stream": {}}, "got another: KeyError: 'taken'"),
        ({"stream": {"taken": 3, "rows": [[0, 10**9]] * 3}}, r"places in documents of \d+ bytes, got 1000000000"),
    ],
)
def test_a_checkpoint_whose_values_are_not_a_runs_is_refused(text, changed, message):
    trainer = trainer_of(dataclasses.replace(SMALL, data=text))
    parts, values = trainer.state()
    with pytest.raises(ValueError, match=message):
        trainer_of(trainer.settings).restore(Checkpoint(parts, {**values, **changed}))


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"device must be one that .*got '{name}'"):
        pick_device(name)


@pytest.mark.parametrize(("name", "expected"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")])
def test_a_gpu_has_a_number(monkeypatch, name, expected):
    """As `torch.cuda.set_device` asks for one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("memtrans.training.device.usable_device", torch.device)
    assert pick_device(name) == torch.device(expected)


def test_data_without_a_test_split_says_so(text):
    with pytest.raises(ValueError, match=r"split must be validation, .*got 'test'"):
        open_data(dataclasses.replace(SMALL, data=text), "test")


def resident_bytes() -> int:
    """What the process holds in memory, as Linux tells."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells what a process holds")
def test_ten_thousand_steps_stay_finite_and_take_no_more_memory_than_a_thousand(text):
    """Documents end and memories wrap all the time; the process holds what it held."""
    trainer = trainer_of(dataclasses.replace(VARIANTS["xl"], data=text, steps=10_000))
    held = []
    for _ in range(10):
        for _ in range(1000):
            trainer.advance()
        assert math.isfinite(trainer.report()["bits_per_byte"])
        gc.collect()
        held.append(resident_bytes())
    assert held[-1] - held[0] < 16e6, held


@pytest.mark.slow
def test_a_compiled_run_has_the_curve_of_an_eager_one(text):
    """Over document ends, wrapping memories, XL caches and several backward passes a step."""
    settings = dataclasses.replace(VARIANTS["several backward passes before one step"], data=text, memory=40)
    curves = []
    for compiled in (False, True):
        trainer = trainer_of(dataclasses.replace(settings, compile=compiled))
        advance(trainer, 12)
        curves.append(trainer.check()[:, 0])
    assert (curves[0] - curves[1]).abs().max() < SAME_CURVE
    assert curves[1][-1] < curves[1][0]
