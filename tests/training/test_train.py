"""Steps, their schedule, and a run's state between two of them."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from pathlib import Path

import pytest
import torch
from helpers.checks import GAINED, SAME_CURVE, assert_close
from helpers.devices import default_dtype

from memtrans.data.stream import DocumentStream
from memtrans.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from memtrans.training.data import TrainingData, open_data
from memtrans.training.device import pick_device
from memtrans.training.settings import Settings
from memtrans.training.trainer import HOPELESS, NonFiniteLossError, Trainer

SMALL = Settings(
    data="recall",
    steps=12,
    batch=3,
    segment=32,
    layers=2,
    width=16,
    heads=2,
    head_width=8,
    memory=64,
    neighbours=4,
    warmup=2,
    eval_bytes=200,
)
VARIANTS = {
    "plain": SMALL,
    "dropout": dataclasses.replace(SMALL, dropout=0.2),
    "xl": dataclasses.replace(SMALL, xl=16, xl_layers=(1, 2)),
    "several segments before one backward": dataclasses.replace(SMALL, segments=3),
    "several backward passes before one step": dataclasses.replace(SMALL, accumulate=2, xl=8),
    "without memory": dataclasses.replace(SMALL, memory=0),
    "grouped heads": dataclasses.replace(SMALL, kv_heads=2),
    "adafactor": dataclasses.replace(SMALL, optimizer="adafactor", schedule="inverse-sqrt", clip=None),
    "muon": dataclasses.replace(SMALL, optimizer="muon", accumulate=2, skip_nonfinite=True),
    "memories that come late": dataclasses.replace(SMALL, memory_late=0.5, keep_memory=True),
    "memories kept": dataclasses.replace(SMALL, keep_memory=True, xl=16),
}


@pytest.fixture
def text(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        content = torch.randint(97, 103, (90 + 37 * number,), generator=generator, dtype=torch.uint8)
        (tmp_path / f"{number}.txt").write_bytes(bytes(content.tolist()))
    return str(tmp_path)


def trainer_of(settings: Settings) -> Trainer:
    return Trainer(settings, open_data(settings), torch.device("cpu"))


def advance(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.advance()


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


def advance_poisoned(trainer: Trainer, which: int = 1) -> None:
    """A step whose `which`-th segment, of all that it reads, gives a row of NaN."""
    read = 0

    def poison(module: torch.nn.Module, arguments: tuple, out: torch.Tensor) -> torch.Tensor:
        nonlocal read
        read += 1
        return torch.cat((out[:1] * torch.nan, out[1:])) if read == which else out

    hook = trainer.model.token_emb.register_forward_hook(poison)
    trainer.advance()
    hook.remove()
    assert read >= which


def assert_same_state(left: Trainer, right: Trainer) -> None:
    (left_parts, left_values), (right_parts, right_values) = left.state(), right.state()
    assert left_values == right_values
    for part in left_parts:
        assert set(left_parts[part]) == set(right_parts[part])
        for name, tensor in left_parts[part].items():
            assert torch.equal(tensor, right_parts[part][name]), (part, name)


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


def checkpoint_of(trainer: Trainer):
    from memtrans.training.checkpoint import Checkpoint

    return Checkpoint(*trainer.state())


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


def test_a_memory_comes_late_and_keeps_what_it_held(text):
    settings = dataclasses.replace(SMALL, data=text, memory=2000, memory_late=0.25, keep_memory=True)
    trainer = trainer_of(settings)
    advance(trainer, 9)
    before = trainer.reader.memories[0]
    assert (before.max_memories, before.lengths.tolist()) == (32, [32] * 3)
    advance(trainer, 3)
    memory = trainer.reader.memories[0]
    read = [row_tokens(trainer, row) for row in (0, 1, 2)]
    trainer.step = 9
    assert memory.max_memories == 2000
    assert memory.lengths.tolist() == [32 + after - row_tokens(trainer, row) for row, after in enumerate(read)]


def test_a_late_memory_must_be_one_that_can_grow():
    with pytest.raises(ValueError, match="memory must be above 32 with memory_late, got 32"):
        Settings(memory=32, memory_late=0.1)
    with pytest.raises(ValueError, match="memory_late must be below 1, got 1"):
        Settings(memory_late=1.0)


@pytest.mark.parametrize("changes", [{}, {"combine": "gate"}, {"memory_offset": -2.0, "kv_heads": 2, "xl": 16}])
def test_a_run_gains_a_memory_and_is_what_it_was_while_that_is_empty(text, changes):
    plain = trainer_of(dataclasses.replace(SMALL, data=text, memory=0, layers=3, **changes))
    advance(plain, 5)
    settings = dataclasses.replace(plain.settings, memory=64, similarity="product")
    trainer = trainer_of(settings)
    trainer.restore(checkpoint_of(plain))
    assert trainer.model.memorizing_layers == (1,) and trainer.model.config["similarity"] == "product"
    tokens = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))
    empty = trainer.model.create_knn_memories(batch_size=3)
    with torch.no_grad():
        before, after = plain.model.eval()(tokens), trainer.model.eval()(tokens, knn_memories=empty)
        if settings.xl:
            before, after = before[0], after[0]
    assert_close(after, before, GAINED, "logits")
    attention, as_before = (one.model.layers[0][0].fn for one in (trainer, plain))
    assert torch.equal(attention.to_out.bias, as_before.to_out.bias)
    if settings.memory_offset is not None:
        farthest = settings.segment - 1 + settings.xl  # what lies beyond has not learned
        far = plain.model.rel_pos_bias.table()[:, farthest]
        assert torch.equal(attention.memory_offset, settings.memory_offset + far)
    moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    assert len({tensor.data_ptr() for tensor in moments}) == len(moments)
    trainer.model.train()
    advance(trainer, 2)
    assert trainer.reader.memories[0].lengths.tolist() != [0, 0, 0]
    assert not torch.equal(trainer.model.knn_rel_pos_bias.relative_attention_bias.weight,
                           trainer.model.rel_pos_bias.relative_attention_bias.weight)  # fmt: skip
    again = trainer_of(settings)
    again.restore(checkpoint_of(trainer))
    assert_same_state(again, trainer)


def test_a_foreign_checkpoint_gains_nothing(text):
    plain = trainer_of(dataclasses.replace(SMALL, data=text, memory=0))
    checkpoint = checkpoint_of(plain)
    del checkpoint.parts["model"]["layers.0.0.fn.to_q.weight"]
    with pytest.raises(ValueError, match="checkpoint must hold weights of this model"):
        trainer_of(dataclasses.replace(plain.settings, memory=64, similarity="product")).restore(checkpoint)


def row_tokens(trainer: Trainer, row: int) -> int:
    """Real tokens that a row has read since the run began."""
    settings = trainer.settings
    stream = DocumentStream(open_data(settings).order, settings.batch, settings.segment)
    return sum(int(stream.next().lengths[row]) for _ in range(trainer.step))


@pytest.mark.parametrize("memory", [256, 40])
def test_a_run_goes_on_with_a_larger_memory_and_keeps_its_entries_or_a_smaller_one_and_keeps_the_newest(text, memory):
    settings = dataclasses.replace(SMALL, data=text)
    small, other = trainer_of(settings), trainer_of(dataclasses.replace(settings, memory=memory))
    advance(small, 4)
    other.restore(checkpoint_of(small))
    before, after = (trainer.reader.memories[0].state_dict() for trainer in (small, other))
    assert after["lengths"].tolist() == [min(length, memory) for length in before["lengths"].tolist()]
    for row, length in enumerate(after["lengths"].tolist()):
        for name in ("keys", "values"):
            assert torch.equal(after[name][row, -length:], before[name][row, -length:])
    advance(other, 3)
    assert int(other.reader.memories[0].lengths.max()) > min(64, memory) - 1
    assert other.reader.memories[0].max_memories == memory


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


def test_a_loss_that_is_not_finite_is_told_with_its_step_and_never_saved(text):
    trainer = trainer_of(dataclasses.replace(SMALL, data=text))
    advance(trainer, 3)
    with torch.no_grad():
        trainer.model.token_emb.weight.fill_(float("nan"))
    advance(trainer, 2)
    with pytest.raises(NonFiniteLossError, match=r"the loss must stay finite, got nan bits per byte .* in step 4"):
        trainer.state()
    with pytest.raises(NonFiniteLossError, match="in step 4"):
        trainer.report()


def test_a_gradient_that_is_not_finite_is_noticed_although_the_loss_is(text):
    trainer = trainer_of(dataclasses.replace(SMALL, data=text))
    trainer.model.token_emb.weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer.advance()
    with pytest.raises(NonFiniteLossError, match=r"got \d.* bits per byte with a gradient of norm (nan|inf) in step 1"):
        trainer.state()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_that_is_not_finite_is_skipped_if_asked_for(text, variant):
    """NaN in the first segment of the step; the rest of it attends to that segment's cache and memory."""
    trainer = trainer_of(dataclasses.replace(VARIANTS[variant], data=text, skip_nonfinite=True))
    advance(trainer, 4)
    before, _ = trainer.state()
    kept = {part: {name: tensor.clone() for name, tensor in before[part].items()} for part in ("model", "optimizer")}
    advance_poisoned(trainer)
    after, _ = trainer.state()
    for part, tensors in kept.items():
        for name, tensor in tensors.items():
            assert torch.equal(after[part][name], tensor), (part, name)
    assert all(cache.isfinite().all() for cache in trainer.reader.carried.xl_memories)
    advance(trainer, 5)
    assert trainer.check().isfinite().all(dim=1).tolist() == [True] * 4 + [False] + [True] * 5
    assert trainer.report()["skipped"] == 1
    assert not torch.equal(trainer.state()[0]["model"]["token_emb.weight"], kept["model"]["token_emb.weight"])


def test_after_a_skipped_step_the_rows_read_on_without_what_they_carried(text):
    """The other rows' caches go with the poisoned one's; the poisoned keys stay in the memory and are never found."""
    settings = dataclasses.replace(SMALL, data=text, xl=16, segments=2, memory=500, skip_nonfinite=True)
    trainer = trainer_of(settings)
    advance_poisoned(trainer, which=2)
    assert trainer.reader.carried.xl_length.tolist() == [0, 0, 0]
    memory = trainer.reader.memories[0]
    poisoned = memory.state_dict()["keys"].isnan().any(dim=2)
    assert poisoned[0].any() and not poisoned[1:].any()
    found, mask = memory.search(torch.randn(3, 50, SMALL.head_width), topk=4)
    assert mask.any() and found.isfinite().all()


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_skipped_step_is_resumed_over_bit_for_bit_and_one_that_is_not_is_never_saved(
    text, tmp_path_factory, skip_nonfinite
):
    settings = dataclasses.replace(SMALL, data=text, xl=8, accumulate=2, skip_nonfinite=skip_nonfinite)
    through = trainer_of(settings)
    advance(through, 3)
    advance_poisoned(through, which=2)
    if not skip_nonfinite:
        with pytest.raises(NonFiniteLossError, match="in step 4"):
            through.state()
        return
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory, *through.state())
    resumed = trainer_of(settings)
    resumed.restore(load_checkpoint(directory))
    for trainer in (resumed, through):
        advance(trainer, 3)
    assert resumed.check().isfinite().all(dim=1).tolist() == [True] * 3 + [False] + [True] * 3
    for part, tensors in through.state()[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor.nan_to_num(7.0), resumed.state()[0][part][name].nan_to_num(7.0)), (part, name)


def test_a_report_waits_for_a_finite_step_and_after_too_many_others_the_run_is_lost(text):
    trainer = trainer_of(dataclasses.replace(SMALL, data=text, skip_nonfinite=True))
    advance_poisoned(trainer)
    assert trainer.report() is None
    advance(trainer, 1)
    assert trainer.report()["skipped"] == 1
    for _ in range(HOPELESS - 1):
        advance_poisoned(trainer)
    assert trainer.report() is None
    advance_poisoned(trainer)
    with pytest.raises(NonFiniteLossError, match=f"got none in the {HOPELESS} steps up to step {HOPELESS + 2}"):
        trainer.report()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_a_step_that_is_not_finite_may_be_left_out(text, optimizer):
    trainer = trainer_of(dataclasses.replace(SMALL, data=text, skip_nonfinite=True, optimizer=optimizer))
    trainer.advance()
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    handle = trainer.model.token_emb.weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer.advance()
    handle.remove()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    trainer.advance()
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    assert trainer.report()["skipped"] == 1


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
