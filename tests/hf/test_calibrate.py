"""Calibration learns how much heads trust the memory, from facts and text, and touches nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.byte_tokenizers import bytes_tokenizer
from helpers.checks import PARITY, assert_close
from helpers.hf_families import made
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from memtrans.hf import ModelMemory, Words, add_memory, calibrate, load_memory
from memtrans.hf.calibrate import PACES, TEXT_EVERY, Pace, Plan, Step, fill, text_loss
from memtrans.hf.facts import FIRST, LAST, MIDDLE, Fact, facts
from memtrans.hf.lessons import SPARE, Course, Drawn, Lesson
from memtrans.hf.planted import plant, questions
from memtrans_kernels import memory_attention

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
        model, memory, bytes_tokenizer(), [TEXT, TEXT], steps=12, sizes=[100, 600], facts=6, batch=2, rate=0.5
    )
    assert all(learned["after"][f"text_{size}"] < learned["before"][f"text_{size}"] for size in (100, 600))
    assert learned["after"]["text"] == learned["before"]["text"]
    assert learned["after"].pop("steps") == 12
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
        ({"form": "gains"}, "form must be one of offset, gain, mix, across, value, next, got 'gains'"),
        ({"form": ["mix"]}, r"form must be one of offset, gain, mix, across, value, next, got \['mix'\]"),
        ({"seconds": 0}, "seconds must be a finite number above 0, got 0"),
        ({"seconds": -1.0}, "seconds must be a finite number above 0, got -1.0"),
        ({"seconds": float("nan")}, "seconds must be a finite number above 0, got nan"),
        ({"seconds": "5"}, "seconds must be a finite number above 0, got '5'"),
        ({"text_weight": -1}, "text_weight must be at least 0, got -1"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"sizes": 100}, "sizes must be numbers in a list, got 100"),
        ({"documents": TEXT}, "documents must be texts in a list, got one text"),
        ({"documents": [""]}, "documents must have at least 64 tokens, got 0"),
        ({"words": {"name": ["Ida"]}}, "words must be memtrans.hf.Words, got dict"),
        (
            {"words": Words(syllables=[["Bel", "Cor"], ["dale"]]), "facts": 3},
            "words must have places for the 3 facts of a piece, got syllables of 2 places",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused(model: PreTrainedModel, arguments: Any, message: str) -> None:
    memory = with_memory(model)
    with pytest.raises((ValueError, TypeError), match=message):
        calibrate(model, memory, bytes_tokenizer(), **{"documents": [TEXT], "steps": 1, **arguments})


def test_a_memory_of_another_model_or_of_none_is_refused(model: PreTrainedModel) -> None:
    memory = with_memory(model)
    with pytest.raises(ValueError, match="model must be the one that the memory is of, got another LlamaForCausalLM"):
        calibrate(made("llama", vocab_size=260), memory, bytes_tokenizer(), [TEXT], steps=1)
    memory.remove()
    with pytest.raises(ValueError, match="memory must be in its model"):
        calibrate(model, memory, bytes_tokenizer(), [TEXT], steps=1)


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
    assert all(known for known in lesson.known(200))


def test_no_lesson_repeats_another_and_the_end_of_a_text_is_kept_to_judge_by(model: PreTrainedModel) -> None:
    memory = with_memory(model, max_memories=2000)
    course = Course.of(memory, bytes_tokenizer(), [TEXT * 40], [700, 1600], 6, 2)
    lessons = [course.lesson(seed) for seed in range(3)]
    known = [tuple(lesson.bank.ids[row].tolist()) for lesson in lessons for rows in lesson.known(1600) for row in rows]
    assert len(set(known)) == len(known) == 3 * 2 * 6
    assert all(lesson.ids.shape == (2, 1600) and lesson.behind.shape == (2, 8, 32) for lesson in lessons)
    kept = course.lesson(9, len(course.ids) - course.tokens)
    assert kept.behind[0].flatten().tolist() == list(course.ids[-256:])
    asked = kept.asked(700, 8, 1)
    assert len(asked.ids) == 8 and asked.ids.shape[1] == course.width


def test_facts_of_a_lesson_are_of_the_words_that_are_given(model: PreTrainedModel) -> None:
    words = Words(
        [("Le pont de {place} date de", "year"), ("Le maire de {place} est", "name")],
        {"year": range(1200, 1300), "name": ["Zoé"]},
        [["Mont", "Saint-"], ["ju", "mar"], ["lieu", "tin"]],
    )
    memory = with_memory(model)
    course = Course.of(memory, bytes_tokenizer(), [TEXT], [600], 6, 2, words)
    lesson, tokenizer = course.lesson(1), bytes_tokenizer()
    for rows in lesson.known(600):
        for row in rows:
            asked = tokenizer.decode(lesson.bank.ids[row][lesson.bank.ids[row] > 0])
            pattern = r"(\. )?Le (pont de \S+ date de 12\d\d|maire de \S+ est Zoé)"
            assert re.fullmatch(pattern, asked), asked
    learned = calibrate(model, memory, bytes_tokenizer(), [TEXT], steps=2, facts=4, batch=1, words=words)
    assert learned["after"]["steps"] == 2


def test_a_question_that_is_longer_than_its_row_fills_it_with_its_end() -> None:
    made_up = [Fact("abcdef", " gh"), Fact("a", " b"), Fact("a", " bcdefgh")]
    asked = questions(made_up, encode, width=5)
    shown = [bytes_tokenizer().decode(row[row > 0]) for row in asked.ids]
    assert shown == ["ef gh", "a b", "defgh"]
    assert asked.answers.tolist() == [[False] * 2 + [True] * 3, [False, True, True, False, False], [True] * 5]


def lesson_of(memory: ModelMemory, steps: int) -> tuple[Course, Lesson, Drawn]:
    course = Course.of(memory, bytes_tokenizer(), [TEXT * 10], [200, 600], 8, 2)
    lesson = course.lesson(3)
    return course, lesson, lesson.draw(steps, course.asked, course.sizes, 0)


def test_a_passage_goes_on_as_its_document_does(model: PreTrainedModel) -> None:
    course, lesson, _ = lesson_of(with_memory(model), 1)
    each = len(lesson.distances) // 2
    for row in (lesson.facts, each - 1, each + lesson.facts):
        document, distance = lesson.ids[row // each].tolist(), int(lesson.distances[row])
        asked, answer = lesson.bank.ids[row], lesson.bank.answers[row]
        end = int(answer.nonzero().max()) + 1
        begin = len(document) - distance
        assert asked[:end].tolist() == document[begin : begin + end]
        assert int(answer.sum()) == 4 and end <= course.width


def test_facts_of_a_lesson_are_told_apart_by_their_places() -> None:
    place = re.compile(rf"\b({'|'.join(FIRST)})({'|'.join(MIDDLE)})({'|'.join(LAST)})\b")
    made_up = facts(64, seed=1, alike=8)
    said = [place.sub("{place}", fact.question) for fact in made_up]
    assert all(said.count(one) == 8 for one in said) and len({fact.question for fact in made_up}) == 64


def test_what_is_drawn_is_within_the_size_that_is_seen(model: PreTrainedModel) -> None:
    course, lesson, drawn = lesson_of(with_memory(model), 12)
    each = len(lesson.distances) // 2
    assert all(sorted(pair) == [200, 600] for pair in drawn.sizes.view(6, 2).tolist())
    for rows, place, size, behind in zip(*drawn, strict=True):
        assert int(lesson.distances[rows].max()) <= int(size)
        assert (rows // each).view(2, course.asked // 2).tolist() == [[row] * (course.asked // 2) for row in (0, 1)]
        assert (rows % each >= lesson.facts).any()
        assert behind == lesson.stored[place] and int(lesson.stored[0] - behind) >= 150


def test_no_question_is_asked_again_before_all_were(model: PreTrainedModel) -> None:
    course = Course.of(with_memory(model), bytes_tokenizer(), [TEXT * 10], [600], 6, 2)
    lesson = course.lesson(3)
    known = lesson.known(600)
    drawn = lesson.draw(7, 8, course.sizes, 0)  # three facts and a passage of each document in a step
    for of_facts in known:
        asked = [number for step in drawn.rows.tolist() for number in step if number in of_facts]
        rounds = [asked[at : at + len(of_facts)] for at in range(0, len(asked), len(of_facts))]
        assert len(asked) == 21 and len(rounds) > 2
        assert all(sorted(one) == sorted(of_facts) for one in rounds if len(one) == len(of_facts))


@pytest.mark.parametrize("steps", [4, 60])
@pytest.mark.parametrize("sizes", [[200, 600], [100, 200, 400, 600]])
def test_text_is_read_at_every_size(model: PreTrainedModel, steps: int, sizes: list[int]) -> None:
    course = Course.of(with_memory(model), bytes_tokenizer(), [TEXT * 10], sizes, 8, 2)
    lesson = course.lesson(3)
    lessons = [lesson.draw(steps, course.asked, course.sizes, seed).sizes.tolist() for seed in range(240 // steps)]
    read = [size for lesson in lessons for size in lesson][::TEXT_EVERY]
    assert all(read.count(size) >= len(read) // len(sizes) // 2 for size in sizes)


def test_a_piece_has_as_many_facts_as_there_are_places_and_as_half_of_it_has_room_for(model: PreTrainedModel) -> None:
    memory = with_memory(model)
    few = Words([("{place} has", "number")], {"number": range(10)}, [["Bel", "Cor", "Dun"], ["dale", "den"]])
    assert Course.of(memory, bytes_tokenizer(), [TEXT * 10], [600], None, 2, few).facts == few.room == 6
    course = Course.of(memory, bytes_tokenizer(), [TEXT * 10], [300, 600], None, 2)
    assert course.facts == 2 * (300 // (2 * (course.width - SPARE)))


def test_a_segment_is_read_again_with_what_was_read_before_it(model: PreTrainedModel) -> None:
    memory = with_memory(model)
    _, lesson, _ = lesson_of(memory, 1)
    for place in (3, 17):
        memory.reset(2)
        fill(memory, lesson)
        with torch.no_grad(), memory.newest(200, int(lesson.stored[place])):
            found = text_loss(model, lesson.segments[:, place])
        memory.reset(2)
        memory.read(lesson.ids[:, : place * 32], search=False, progress=False)
        with torch.no_grad(), memory.newest(200):
            wanted = text_loss(model, lesson.ids[:, place * 32 : place * 32 + 32])
        assert_close(found, wanted, PARITY)


def learning(model: PreTrainedModel, form: str) -> ModelMemory:
    """A memory of two documents, all of whose parameters and no others are learned."""
    memory = with_memory(model.requires_grad_(False))
    with memory.learning(form):
        memory.reset(2)
    for parameter in memory.parameters():
        parameter.requires_grad_(True)
    return memory


@pytest.mark.parametrize("form", ["mix", "next"])
def test_a_step_on_static_buffers_learns_what_one_by_hand_learns(form: str) -> None:
    def prepared() -> tuple[PreTrainedModel, ModelMemory]:
        model = made("llama", vocab_size=260)
        return model, learning(model, form)

    plan = Plan(6, 1, 0.1, 0.5, 0)
    model, memory = prepared()
    course, lesson, drawn = lesson_of(memory, 6)
    fill(memory, lesson)
    step = Step(model, memory, course, plan)
    step.take_up(lesson, drawn)
    for number in range(6):
        step.run(1.0 - number / 6)

    other, by_hand = prepared()
    fill(by_hand, lesson)
    kinds = {name for name, _ in by_hand.layers[0].learned.named_parameters()}
    groups = [
        {
            "params": [getattr(layer.learned, name) for layer in by_hand.layers.values()],
            "highest": 0.1 * PACES.get(name, Pace()).rate,
            "weight_decay": PACES.get(name, Pace()).decay,
        }
        for name in sorted(kinds)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    seen = torch.zeros(2)
    for number in range(6):
        rows, place, size, behind = (tensor[number] for tensor in drawn)
        with by_hand.newest(int(size)), by_hand.expand(course.asked // 2):
            asked = lesson.bank.rows(rows)
            nats = asked.losses(other(input_ids=asked.ids, use_cache=False).logits)[0].mean()
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * (1.0 - number / 6)
        nats.backward()
        seen[0] += nats.detach() / 6
        if number in (0, 4):  # text is read every fourth step, and counts four times as much
            with by_hand.newest(int(size), int(behind)):
                text = text_loss(other, lesson.segments[:, int(place)])
            (2.0 * text).backward()
            seen[1] += text.detach() / 2
        optimizer.step()
        optimizer.zero_grad()
    assert_close(torch.tensor(step.seen_on_average()), seen, PARITY)
    learned = getattr(by_hand.layers[0].learned, f"memory_{form}")
    assert learned.abs().max() > 2 * 0.1 * PACES[f"memory_{form}"].rate  # it went some steps
    for mine, its in zip(memory.parameters(), by_hand.parameters(), strict=True):
        assert_close(mine.detach(), its.detach(), PARITY)


def test_a_lesson_that_read_no_text_says_nothing_of_it(model: PreTrainedModel) -> None:
    said: list[str] = []
    memory = add_memory(model, max_memories=400, segment=32)
    steps = {"steps": 2, "lesson_steps": 1, "facts": 4, "batch": 1}
    calibrate(model, memory, bytes_tokenizer(), ["word " * 200], report=said.append, **steps)
    assert ["a token of text" in line for line in said] == [True, False]


class Unaskable(TorchDispatchMode):
    """Refuses what would make the host wait for the device, which a captured graph cannot hold."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split("::")[1].split(".")[0]
        assert name not in self.ASKING, f"{name} asks the device for a value"
        assert not (name == "index" and any(at is not None and at.dtype == torch.bool for at in args[1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["mix", "next"])
def test_a_step_asks_the_device_for_no_value(
    model: PreTrainedModel, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = learning(model, form)
    course, lesson, drawn = lesson_of(memory, 5)
    fill(memory, lesson)
    step = Step(model, memory, course, Plan(5, 1, 0.1, 2.0, 0))
    step.take_up(lesson, drawn)
    step.run(1.0)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)  # as while capturing
    monkeypatch.setattr("memtrans_kernels.checks.may_look", lambda *said: False)  # as off the CPU
    monkeypatch.setattr("memtrans_kernels.ledger._added", lambda *counts: 0)  # those are on the host
    step.optimizer.step = lambda: None  # on a CPU, AdamW asks for its rate
    with Unaskable():
        for _ in range(4):  # the last one reads text
            step.run(1.0)


def test_a_mask_that_is_made_while_capturing_is_left_out(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = with_memory(model)
    ids = torch.tensor([encode(TEXT)[:200]])
    memory.read(ids, progress=False)
    seen: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("bias_dense"))
        return memory_attention(*args, **kwargs)

    monkeypatch.setattr("memtrans.hf.attention.memory_attention", noted)
    with torch.no_grad():
        wanted = model(ids[:, :20]).logits
        monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)
        assert_close(model(ids[:, :20]).logits, wanted, PARITY)
        assert seen == [None] * 4
        model(ids[:, :20], attention_mask=torch.ones(1, 20))
        assert seen[4] is not None


@pytest.mark.parametrize(
    ("form", "learned"), [("offset", 2), ("gain", 4), ("mix", 5), ("across", 6), ("value", 6), ("next", 7)]
)
def test_a_form_says_what_is_learned_and_is_saved(
    model: PreTrainedModel, form: str, learned: int, tmp_path: Path
) -> None:
    memory = with_memory(model)
    calibrate(model, memory, bytes_tokenizer(), [TEXT], steps=2, facts=4, batch=1, form=form)
    wanted = [parameter.detach().clone() for parameter in memory.parameters()]
    assert len(wanted) == 2 * learned
    memory.save(tmp_path)
    memory.remove()
    again = load_memory(model, tmp_path).parameters()
    assert all(torch.equal(mine, its) for mine, its in zip(again, wanted, strict=True))


def test_a_calibration_ends_when_its_time_is_up(model: PreTrainedModel) -> None:
    memory = with_memory(model)
    learned = calibrate(model, memory, bytes_tokenizer(), [TEXT], steps=10**6, facts=4, batch=1, seconds=1.0)
    assert learned["after"]["steps"] < 1000
