"""Calibration learns how much heads trust the memory, from facts and text, and touches nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.byte_tokenizers import bytes_tokenizer
from helpers.hf_families import made
from transformers import PreTrainedModel

from memtrans.hf import ModelMemory, add_memory, calibrate
from memtrans.hf.facts import facts
from memtrans.hf.lessons import Course
from memtrans.hf.planted import plant, questions

TEXT = "It was a bright cold day in the hills, and all the clocks were being wound again. " * 12


def encode(text: str) -> list[int]:
    return list(bytes_tokenizer()(text)["input_ids"])


@pytest.fixture
def model() -> PreTrainedModel:
    return made("llama", vocab_size=260)


def with_memory(model: PreTrainedModel, **changed: Any) -> ModelMemory:
    return add_memory(model, **{"max_memories": 700, "k": 8, "segment": 32, **changed})


def test_a_memory_that_drowns_the_text_is_trusted_less(model: PreTrainedModel) -> None:
    memory = with_memory(model, offset=6.0)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "memtrans" not in name}
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    learned = calibrate(
        model, memory, bytes_tokenizer(), [TEXT, TEXT], steps=30, sizes=[100, 600], facts=6, batch=2, rate=0.5
    )
    assert all(learned["after"][f"text_{size}"] < learned["before"][f"text_{size}"] for size in (100, 600))
    assert learned["after"]["text"] == learned["before"]["text"]
    assert set(learned["after"]) == {
        "text",
        *(f"{n}_{size}" for n in ("facts", "right", "text") for size in (100, 600)),
    }
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())
    assert (model.training, model.model.embed_tokens.weight.requires_grad, model.lm_head.weight.requires_grad) == (
        *(True, False, True),
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    assert memory.lengths.tolist() == []


def test_the_same_seed_learns_the_same() -> None:
    def learned() -> list[float]:
        model = made("llama", vocab_size=260)
        memory = with_memory(model)
        calibrate(model, memory, bytes_tokenizer(), [TEXT], steps=3, facts=4, batch=1)
        return [float(parameter.detach().sum()) for parameter in memory.parameters()]

    assert learned() == learned()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [900]}, r"sizes must be .* up to max_memories=700 and the \d+ tokens .*, got \[900\]"),
        ({"sizes": []}, "sizes must be"),
        ({"sizes": [20]}, r"sizes must have room for a fact of \d+ tokens, got 20"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"facts": 0}, "facts must be at least 1, got 0"),
        ({"documents": [""]}, "documents must have at least 64 tokens, got 0"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(model: PreTrainedModel, arguments: Any, message: str) -> None:
    memory = with_memory(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, memory, bytes_tokenizer(), **{"documents": [TEXT], **arguments})


def test_facts_stand_in_the_text_at_every_size() -> None:
    made_up, text = facts(6, seed=1), encode(TEXT)
    document = plant(text, made_up, (200, 800), encode)
    ids = document.ids[0].tolist()
    assert len(document.within(200)) == 3 and len(document.within(800)) == 6
    assert len(ids) == 800
    for distance, fact in document.facts:
        begin = len(ids) - distance
        assert ids[begin : begin + len(encode(fact.sentence))] == encode(fact.sentence)


def test_an_answer_is_scored_and_its_question_is_not() -> None:
    asked = questions(facts(2, seed=1), encode)
    logits = torch.zeros(*asked.ids.shape, 260)
    logits[:, :-1].scatter_(2, asked.ids[:, 1:, None], 100.0)
    nats, right = asked.losses(logits)
    assert nats.tolist() == [0.0, 0.0] and right.tolist() == [True, True]
    wrong = logits.clone()
    wrong[0, int(asked.answers[0].int().argmax()) - 1] = 0.0
    nats, right = asked.losses(wrong)
    assert right.tolist() == [False, True] and float(nats[0]) > 5.0


def test_more_facts_than_a_text_has_room_for_leave_it_as_long_as_it_was(model: PreTrainedModel) -> None:
    course = Course.of(with_memory(model), bytes_tokenizer(), [TEXT * 40], [200, 600], 500, 2)
    lesson = course.lesson(0)
    assert lesson.ids.shape == (2, 600)
    assert all(document.within(200) for document in lesson.documents)


def test_no_lesson_repeats_another_and_the_end_of_a_text_is_kept_to_judge_by(model: PreTrainedModel) -> None:
    memory = with_memory(model, max_memories=2000)
    course = Course.of(memory, bytes_tokenizer(), [TEXT * 40], [700, 1600], 6, 2)
    lessons = [course.lesson(seed) for seed in range(3)]
    known = [fact for lesson in lessons for document in lesson.documents for _, fact in document.facts]
    assert len({fact.question for fact in known}) == len(known) == 3 * 2 * 6
    assert all(lesson.ids.shape == (2, 1600) and lesson.behind.shape == (2, 8, 32) for lesson in lessons)
    kept = course.lesson(9, len(course.ids) - course.tokens)
    assert kept.behind[0].flatten().tolist() == list(course.ids[-256:])
    asked = kept.asked(700, 8, 1)
    assert len(asked.ids) == 8 and asked.ids.shape[1] == course.width
