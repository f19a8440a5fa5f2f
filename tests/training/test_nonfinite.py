"""Steps whose loss or gradient is not finite: told, skipped where that is asked for, never saved."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.small_runs import SMALL, VARIANTS, advance, trainer_of

from memtrans.training.checkpoint import load_checkpoint, save_checkpoint
from memtrans.training.trainer import HOPELESS, NonFiniteLossError, Trainer


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
