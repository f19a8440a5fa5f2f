"""A run that goes on with a memory that it did not have, had later, or had in another size."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers.checks import GAINED, assert_close
from helpers.small_runs import SMALL, advance, assert_same_state, checkpoint_of, row_tokens, trainer_of

from memtrans.training.checkpoint import Checkpoint
from memtrans.training.evaluate import negative_log_likelihood
from memtrans.training.gaining import gaining
from memtrans.training.optimizer import OWN_QUERY
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"combine": "gate"},
        {"memory_offset": -2.0, "kv_heads": 2, "xl": 16},
        {"plain_similarity": "cosine", "xl": 16},
        {"optimizer": "muon"},
        {"optimizer": "adafactor"},
    ],
)
def test_a_run_gains_a_memory_and_is_what_it_was_while_that_is_empty(text, changes):
    plain = trainer_of(dataclasses.replace(SMALL, data=text, memory=0, layers=3, **changes))
    advance(plain, 5)
    settings = dataclasses.replace(plain.settings, memory=64, **gaining(plain.settings.to_json()))
    trainer = trainer_of(settings)
    trainer.restore(checkpoint_of(plain))
    assert trainer.model.memorizing_layers == (1,)
    assert trainer.model.config["similarity"] == changes.get("plain_similarity", "product")
    tokens = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))
    empty = trainer.model.create_knn_memories(batch_size=3)
    with torch.no_grad():
        before, after = plain.model.eval()(tokens), trainer.model.eval()(tokens, knn_memories=empty)
        if settings.xl:
            before, after = before[0], after[0]
    assert_close(after, before, GAINED, "logits")
    assert_learns_no_query_of_its_own(trainer, tokens)
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
    assert all(parameter.abs().sum() > 0 for parameter in own_queries(trainer).values())
    assert trainer.reader.memories[0].lengths.tolist() != [0, 0, 0]
    assert not torch.equal(trainer.model.knn_rel_pos_bias.relative_attention_bias.weight,
                           trainer.model.rel_pos_bias.relative_attention_bias.weight)  # fmt: skip
    again = trainer_of(settings)
    again.restore(checkpoint_of(trainer))
    assert_same_state(again, trainer)


def own_queries(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in trainer.model.named_parameters() if name.endswith(OWN_QUERY)}


def assert_learns_no_query_of_its_own(trainer: Trainer, tokens: torch.Tensor) -> None:
    """From memories with nothing in them; all else has its gradient."""
    logits = trainer.model(tokens, knn_memories=trainer.model.create_knn_memories(batch_size=len(tokens)))
    negative_log_likelihood(logits[0] if trainer.settings.xl else logits, tokens).backward()
    found = own_queries(trainer)
    assert len(found) == 2
    for name, parameter in found.items():
        assert not parameter.any() and parameter.grad is not None and not parameter.grad.any(), name
    assert trainer.model.layers[0][0].fn.to_q.weight.grad.any()
    trainer.model.zero_grad()


def test_a_run_that_asks_with_the_shared_query_goes_on_so(text):
    """As all did that gained a memory before there was another one: their settings do not say it."""
    plain = trainer_of(dataclasses.replace(SMALL, data=text, memory=0))
    advance(plain, 2)
    shared = {**gaining(plain.settings.to_json()), "memory_query": "shared"}
    gained = trainer_of(dataclasses.replace(plain.settings, memory=64, **shared))
    gained.restore(checkpoint_of(plain))
    advance(gained, 2)
    assert not own_queries(gained)
    parts, values = copy.deepcopy(gained.state())  # whose moments are the run's own
    settings = {name: value for name, value in values["settings"].items() if name != "memory_query"}
    again = trainer_of(Settings.from_json(settings))
    again.restore(Checkpoint(parts, {**values, "settings": settings}))
    for trainer in (gained, again):
        advance(trainer, 2)
    assert_same_state(again, gained)


def test_a_foreign_checkpoint_gains_nothing(text):
    plain = trainer_of(dataclasses.replace(SMALL, data=text, memory=0))
    checkpoint = checkpoint_of(plain)
    del checkpoint.parts["model"]["layers.0.0.fn.to_q.weight"]
    with pytest.raises(ValueError, match="checkpoint must hold weights of this model"):
        trainer_of(dataclasses.replace(plain.settings, memory=64, similarity="product")).restore(checkpoint)


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
