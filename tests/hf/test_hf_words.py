"""The varied words of `benchmarks/hf_facts.py --words varied` are none that a memory is judged by afterwards."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from helpers.scripts import benchmark_script

from memtrans.hf.facts import Words, facts

HF_FACTS = benchmark_script("hf_facts")
JUDGED = (HF_FACTS.WORDS, HF_FACTS.VARIED)


@pytest.fixture(scope="module")
def found() -> Any:
    return json.loads(HF_FACTS.VARIED_WORDS.read_text())


@pytest.fixture(scope="module")
def words() -> Words:
    return HF_FACTS.varied_words()


def test_no_sentence_of_a_calibration_is_one_that_a_memory_is_judged_by(found: Any, words: Words) -> None:
    ones = (*found["of_people"]["ones"], *found["of_things"]["ones"], *HF_FACTS.PEOPLE, *HF_FACTS.THINGS)
    any_one = re.compile(rf"\b({'|'.join(ones)})\b")
    learned = {any_one.sub("{one}", template) for template, _ in words.templates}
    judged = {any_one.sub("{one}", template) for of in JUDGED for template, _ in of.templates}
    assert len(learned) > 100 and not learned & judged


def test_a_calibration_speaks_of_nobody_and_nothing_that_a_memory_is_judged_by(found: Any) -> None:
    judged = " ".join(template for of in JUDGED for template, _ in of.templates)
    for one in (*found["of_people"]["ones"], *found["of_things"]["ones"]):
        assert not re.search(rf"\b{one}\b", judged), one


def test_places_and_names_of_a_calibration_are_others_than_those_that_a_memory_is_judged_by(
    found: Any, words: Words
) -> None:
    said = {word for answers in found["answers"].values() for answer in answers for word in answer.split()}
    for of in JUDGED:
        for mine, its in zip(words.syllables, of.syllables, strict=True):
            assert not set(mine) & set(its)
        assert not said & set(of.answers["name"])


def test_a_name_may_be_any_token_that_could_be_one_but_those_that_a_memory_is_judged_by() -> None:
    class Tokenizer:
        tokens = (" Clara", " Adam", " of", "Harold", " Enoch", " McCoy", " Al", " 4")

        def __len__(self) -> int:
            return len(self.tokens)

        def decode(self, ids: list[int]) -> str:
            return self.tokens[ids[0]]

    words = HF_FACTS.vocabulary_words(Tokenizer())
    assert words.answers["name"] == ["Clara", "Enoch"]
    assert {**words.answers, "name": None} == {**HF_FACTS.varied_words().answers, "name": None}


def test_no_word_is_there_twice(found: Any) -> None:
    said = (found["of_people"], found["of_things"])
    forms = [forms for of in said for forms in of["forms"].values()]
    for one in (*forms, *(of["ones"] for of in said), *found["syllables"], *found["answers"].values()):
        assert len(set(one)) == len(one)


def test_a_template_is_of_one_place_and_leads_to_an_answer(words: Words) -> None:
    assert {kind for _, kind in words.templates} == set(words.answers)
    for template, _ in words.templates:
        assert template.count("{place}") == 1 and "{one}" not in template and template == template.strip()


@pytest.mark.parametrize("alike", [1, 8])
def test_no_question_is_asked_twice(words: Words, alike: int) -> None:
    assert len({fact.question for fact in facts(96, 3, words, alike)}) == 96
